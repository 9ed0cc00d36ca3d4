"""The command that publishes: push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfshrink.cli.program import app
from hfshrink.errors import SettingError


@app.command(epilog="Example: hfshrink push small my-name/small-model --private --export onnx-int8=small-int8")
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model or an export that hfshrink wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository: name, or namespace/name. Made where it is missing.")],
    export: Annotated[
        list[str] | None, typer.Option(help="Export beside the weights, as scheme=folder; may be repeated.")
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made where it is missing.")] = None,
    tag: Annotated[str | None, typer.Option(help="Name for the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="Identifier of the Hub; the base's when left out.")] = None,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="The terms of a base that is not permissive were read.")
    ] = False,
    model_name: Annotated[str | None, typer.Option(help="Title of the card.")] = None,
    language: Annotated[str | None, typer.Option(help="Of the texts, such as en; the base's when left out.")] = None,
) -> None:
    """Publish a model with its record, results and card in one commit.

    The token comes from `hf auth login` or from HF_TOKEN: an option would stand in the shell's history.
    """
    from hfshrink.hub import push_to_hub

    exports = dict(_pair(text) for text in export or [])
    given: dict[str, Any] = {"private": private, "revision": revision, "tag": tag, "create_pr": create_pr}
    given |= {"license": license, "accept_license": accept_license, "commit_message": message}
    card = {"model_name": model_name, "language": language}
    given |= {name: value for name, value in card.items() if value is not None}
    typer.echo(push_to_hub(folder, repo, exports=exports, **given))


def _pair(text: str) -> tuple[str, Path]:
    scheme, equals, folder = text.partition("=")
    if not equals or not scheme or not folder:
        raise SettingError(f"--export must be scheme=folder, such as onnx-int8=small-int8, got {text!r}.")
    return scheme, Path(folder)
