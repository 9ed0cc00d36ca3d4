"""Which module gets how many bits: by measured loss rises, under a budget, within an accuracy bound."""
