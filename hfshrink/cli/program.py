"""The program `hfshrink`, and what its commands share."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
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


def in_options(message: str, options: Mapping[str, str]) -> str:
    """An error's advice in the words of the command: its keywords as options, `overwrite=True` as `--overwrite`.

    Calls in Python, paths and what was "got" stay as they are.

    Example:
        >>> names = {"model": "--model", "method": "--method", "overwrite": "--overwrite"}
        >>> in_options("pass model= or method='random', or set overwrite=True: select(method='auto') does not", names)
        "pass --model or --method random, or set --overwrite: select(method='auto') does not"
    """
    for keyword, option in options.items():
        start = rf"(?<![\w/(])(?<!got ){keyword}="
        message = re.sub(rf"{start}(?!True\b)'?([\w.-]*\w)'?", rf"{option} \1", message)
        message = re.sub(rf"{start}(True\b)?", option, message)
    return message


def main() -> None:
    """Run a command; errors of ours become one line and exit code 1."""
    try:
        app()
    except HfshrinkError as error:
        command = typer.main.get_command(app).commands.get(sys.argv[1])  # type: ignore[attr-defined]
        params = [] if command is None else [param for param in command.params if param.opts[0].startswith("--")]
        options = {param.name: param.opts[0] for param in params}
        typer.echo(f"error: {in_options(str(error), options)}", err=True)
        sys.exit(1)
