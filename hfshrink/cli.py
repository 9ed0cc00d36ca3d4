"""The command line: each command is one public function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hfshrink.errors import HfshrinkError

app = typer.Typer(
    name="hfshrink",
    help="Make Hugging Face models smaller, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Hub id, folder of a model, or folder of an export.")]


@app.command(
    epilog="Example: hfshrink quantize distilbert/distilbert-base-uncased-distilled-squad small --scheme onnx-int8"
)
def quantize(
    model: Model,
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; must be empty or not exist.")],
    scheme: Annotated[
        str, typer.Option(help="How to quantize: onnx-int8, or onnx-fp32 for the float baseline.")
    ] = "onnx-int8",
    calibration: Annotated[
        str | None, typer.Option(help="Data set (Hub id or folder) to check the result on.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task, for a config that names no architecture.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in the folder.")] = False,
) -> None:
    """Quantize a model into a folder that loads with transformers' ExportedModel."""
    from hfshrink.quantization import quantize as run
    from hfshrink.record import report as read

    run(model, scheme, output_dir=output_dir, calibration=calibration, task=task, overwrite=overwrite)
    typer.echo(read(output_dir))


@app.command(epilog="Example: hfshrink evaluate ./small stanfordnlp/sst2 --split validation")
def evaluate(
    model: Model,
    dataset: Annotated[str, typer.Argument(help="Hub id of a data set, or a folder written by save_to_disk.")],
    split: Annotated[str | None, typer.Option(help="Split of the data set.")] = None,
    metric: Annotated[str | None, typer.Option(help="Name of one metric; all of the task's when left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 32,
) -> None:
    """Measure a model or an export on a data set."""
    from hfshrink.evaluation import evaluate as run

    typer.echo(run(model, dataset, metric, split=split, batch_size=batch_size))


@app.command(epilog="Example: hfshrink report ./small")
def report(model: Model) -> None:
    """Show what was done to a model, and what was measured."""
    from hfshrink.record import report as read

    typer.echo(read(model))


def main() -> None:
    """Run a command; errors of ours become one line and exit code 1."""
    try:
        app()
    except HfshrinkError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
