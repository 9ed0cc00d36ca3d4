"""`python -m hfshrink.cli`, where the script `hfshrink` is not installed."""

from hfshrink.cli import main

main()
