"""The command that writes a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hfshrink.cli.program import app
from hfshrink.errors import CheckpointError


@app.command(epilog="Example: hfshrink card ./small --output ./small --license apache-2.0 --repo-id me/small")
def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a model or an export, or of a subset.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="README.md or its folder; what you wrote in it is kept. Else printed."),
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Title of the card.")] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="The Hub's name of a licence, such as apache-2.0.")
    ] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language, such as en; may be repeated.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Hub id that the snippets load.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base, where the record has none.")] = None,
    base_card: Annotated[
        str | None, typer.Option(help="Card that licence and language come from: README.md, its folder, or a Hub id.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Draw the record's plots beside the card.")] = False,
) -> None:
    """Write the card of a model or of a subset, from its record alone."""
    from hfshrink.cards import merge_card
    from hfshrink.cards.merging import KEPT
    from hfshrink.cards.metadata import read_card_data
    from hfshrink.saving import write_text

    target = output / "README.md" if output is not None and output.is_dir() else output
    if target is not None and not target.parent.is_dir():
        raise CheckpointError(f"There is no folder {target.parent} to write {target.name} to.")
    given: dict[str, Any] = {"license": license_name, "language": language or None}
    inherited = None if base_card is None else read_card_data(base_card)
    if (folder / "report.json").is_file() and not (folder / "config.json").is_file():
        made = _subset_card(folder, model_name, repo_id, inherited, given)
    else:
        beside = None if target is None or not plots else target.parent / "plots"
        made = _model_card(
            folder, beside, inherited, {"model_name": model_name, "repo_id": repo_id}, given, base_model
        )
    if target is None:
        typer.echo(made.content)
        return
    try:
        if target.is_file():
            made = merge_card(target.read_text(encoding="utf-8"), made, keep=() if license_name else KEPT)
        write_text(target, made.content)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"Can't write {target}: {error}. It is as it was.") from error
    typer.echo(f"{target} written.")


def _model_card(
    folder: Path, plots: Path | None, inherited: Any, how: dict[str, Any], given: dict[str, Any], base: str | None
) -> Any:
    from hfshrink.cards import model_card, write_plots
    from hfshrink.record import report

    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.")
    drawn = None if plots is None else write_plots(report(folder), plots)
    return model_card(folder, base_card=inherited, plots=drawn, base_model=base, **how, **given)


def _subset_card(folder: Path, name: str | None, repo_id: str | None, inherited: Any, given: dict[str, Any]) -> Any:
    from hfshrink.cards import dataset_card

    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'report.json'} can't be read as JSON: {error}") from None
    return dataset_card(report, dataset_name=name, source_card=inherited, repo_id=repo_id, **given)
