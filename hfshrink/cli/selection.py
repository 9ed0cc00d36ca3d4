"""Commands of dataset distillation: select, data-map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hfshrink.cli.program import app, read_options
from hfshrink.errors import SettingError

EXPORTS = (".json", ".csv")
SHOWN = 60  # characters of a row's text in a table


@app.command(epilog="Example: hfshrink select path/to/rows subset --fraction 0.1 --model path/to/model")
def select(
    dataset: Annotated[str, typer.Argument(help="Training rows: Hub id or folder of save_to_disk.")],
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; must be empty or not exist.")],
    fraction: Annotated[float | None, typer.Option(help="Share of the rows to keep, in (0, 1].")] = None,
    size: Annotated[int | None, typer.Option(help="Rows to keep; the other way to say --fraction.")] = None,
    method: Annotated[
        str, typer.Option(help="auto, random, kmeans, herding, k-center, facility, moderate, el2n, ccs, …")
    ] = "auto",
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the model that embeds the rows.")] = None,
    stratify: Annotated[
        str, typer.Option(help="Column whose values each keep their share; none takes all rows alike.")
    ] = "label",
    deduplicate: Annotated[
        str | None, typer.Option(help="true, false, or the cosine above which rows count as the same.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data set, where it has several.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Test rows, which no training row may be among.")] = None,
    held_out_split: Annotated[str | None, typer.Option(help="Split of the test rows.")] = None,
    data_map: Annotated[Path | None, typer.Option(help="Folder of a data map, to rank the rows by.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder that keeps the embeddings.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Metadata column to report the coverage of; may be repeated.")
    ] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="Of the coverage's warnings, as name=value, such as min_rows=20.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    option: Annotated[list[str] | None, typer.Option(help="Of the method, as name=value; may be repeated.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Write the rows too, into the subfolder data.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
) -> None:
    """Pick the rows worth training on; writes their numbers, the report and the data card."""
    from hfshrink.data import read_dataset
    from hfshrink.saving import save_aside
    from hfshrink.selection import select as run

    given: dict[str, Any] = {"columns": column, "split": split}
    how = {name: value for name, value in given.items() if value} | read_options(option or [])
    if threshold:
        how["thresholds"] = read_options(threshold, "--threshold", "min_rows=20")
    with save_aside(output_dir, overwrite) as folder:
        subset = run(
            dataset,
            fraction,
            method,
            size=size,
            model=model,
            stratify=None if stratify == "none" else stratify,
            deduplicate=_read_deduplicate(deduplicate),
            held_out=None if held_out is None else read_dataset(held_out, held_out_split),
            data_map=data_map,
            cache_dir=cache_dir,
            seed=seed,
            **how,
        )
        _write(subset, folder, rows)
    typer.echo(subset)


def _read_deduplicate(text: str | None) -> bool | float | None:
    words = {None: None, "true": True, "false": False}
    if text in words:
        return words[text]
    try:
        return float(text or "")
    except ValueError:
        raise SettingError(f"--deduplicate must be true, false or a cosine in (0, 1), got {text!r}.") from None


def _write(subset: Any, folder: Path, rows: bool) -> None:
    """The subset's files, its data card as README.md, and the rows where they are wanted."""
    from hfshrink.cards import dataset_card

    subset.save(folder)
    (folder / "README.md").write_text(str(dataset_card(subset)), encoding="utf-8")
    if rows:
        subset.dataset.save_to_disk(folder / "data")


@app.command(epilog="Example: hfshrink data-map path/to/trained/data_map --errors 20 --plot map.png")
def data_map(
    folder: Annotated[Path, typer.Argument(help="Folder that DataMapCallback wrote.")],
    errors: Annotated[int, typer.Option(help="Likely label errors to list, the likeliest first.")] = 0,
    data: Annotated[str | None, typer.Option(help="The data set of the map, to show the rows' texts.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of that data, where it has several.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot to write, .png or .svg.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="File for all likely label errors (or --errors of them), .json or .csv.")
    ] = None,
) -> None:
    """Show how a training run saw its rows: a summary, likely label errors, the plot."""
    from hfshrink.selection import DataMap

    for file in (plot, export):
        if file is not None and not file.parent.is_dir():
            raise SettingError(f"{str(file)!r} must lie in a folder that exists.")
    if export is not None and export.suffix.lower() not in EXPORTS:
        raise SettingError(f"--export must end in {' or '.join(EXPORTS)}, got {str(export)!r}.")
    inner = folder / "data_map"  # of a Trainer's folder
    found = DataMap.load(inner if inner.is_dir() else folder)
    wanted = found.label_errors(errors or None) if errors or export is not None else []
    lines = _error_lines(found, wanted, None if data is None else _texts(found, data, split))
    if plot is not None:
        found.plot(plot)
    if export is not None:
        _export(export, lines)
    typer.echo(found)
    if errors:
        from hfshrink.terminal import table

        shown = [[str(value)[:SHOWN] for value in line.values()] for line in lines]
        typer.echo("\n" + (table(tuple(lines[0]), shown) if lines else "No likely label errors."))


def _texts(found: Any, data: str, split: str | None) -> list[str]:
    """What each row says; the rows are checked to be those of the map."""
    from hfshrink.data import read_dataset
    from hfshrink.selection.contents import row_texts

    rows = read_dataset(data, split)
    found.check_rows(rows)
    texts = row_texts(rows)
    if texts is None:
        raise SettingError(f"--data has no text to show; its columns are {', '.join(rows.column_names)}.")
    return [text.replace("\0", " / ") for text in texts]  # of several columns


def _error_lines(found: Any, wanted: list[Any], texts: list[str] | None) -> list[dict[str, Any]]:
    """One dict for each likely label error, with the names of the classes where they are known."""
    names = dict(enumerate(found.label_names))
    return [
        {
            "row": error.row,
            "given": names.get(error.given, error.given),
            "predicted": names.get(error.predicted, error.predicted),
            "aum": round(error.aum, 4),
            "confidence": round(error.confidence, 4),
            **({} if texts is None else {"text": texts[error.row]}),
        }
        for error in wanted
    ]


def _export(path: Path, lines: list[dict[str, Any]]) -> None:
    import csv
    import io

    from hfshrink.saving import write_text

    if path.suffix.lower() == ".json":
        write_text(path, json.dumps(lines, indent=2) + "\n")
        return
    header = list(lines[0]) if lines else ["row", "given", "predicted", "aum", "confidence"]
    file = io.StringIO()
    writer = csv.DictWriter(file, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, file.getvalue())
