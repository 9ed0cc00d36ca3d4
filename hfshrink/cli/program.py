"""The program `hfshrink`, and what its commands share."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from hfshrink.errors import HfshrinkError, SettingError

app = typer.Typer(
    name="hfshrink",
    help="Make Hugging Face models smaller, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Hub id, folder of a model, or folder of an export.")]


def read_options(pairs: list[str], title: str = "--option", example: str = "group_size=64") -> dict[str, Any]:
    """name=value pairs; values are read as JSON where they are (numbers, true, false), else as text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name.isidentifier() and equals):
            raise SettingError(f"{title} takes name=value, such as {example}, got {pair!r}.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def main() -> None:
    """Run a command; errors of ours become one line and exit code 1."""
    try:
        app()
    except HfshrinkError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
