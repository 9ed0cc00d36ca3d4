"""The command line: each command is one public function."""

from hfshrink.cli import cards, compression, distillation, measures, publishing, selection  # noqa: F401 # they add commands
from hfshrink.cli.program import app, main

__all__ = ["app", "main"]
