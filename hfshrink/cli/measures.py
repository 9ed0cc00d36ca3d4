"""Commands that measure and show: sensitivity, evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfshrink.cli.program import Model, app
from hfshrink.errors import SettingError


@app.command(epilog="Example: hfshrink sensitivity path/to/model path/to/rows --structure neurons --plot rises.png")
def sensitivity(
    model: Model,
    data: Annotated[str, typer.Argument(help="Data set with labels: Hub id or folder of save_to_disk.")],
    structure: Annotated[
        str | None,
        typer.Option(
            help="Prune: unstructured (the default), N:M, heads, neurons, heads+neurons, channels or layers."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="With --structure: magnitude or random.")] = "magnitude",
    scheme: Annotated[
        str | None, typer.Option(help="Quantize instead: int (8, 4, 3 and 2 bits), nf4, bf16 or fp16.")
    ] = None,
    factor: Annotated[bool, typer.Option("--factor", help="Factorize instead: rank ratios 0.9 to 0.3.")] = False,
    split: Annotated[str, typer.Option(help="Split of the data, where it has several.")] = "validation",
    samples: Annotated[int, typer.Option(help="Rows to measure on.")] = 256,
    plot: Annotated[Path | None, typer.Option(help="Heat-map to write, .png or .svg.")] = None,
) -> None:
    """Measure how far the loss rises when one place of a model after the other is compressed."""
    from hfshrink import factorization, pruning, quantization
    from hfshrink.data import read_dataset
    from hfshrink.errors import require
    from hfshrink.sensitivity import PLOT_SUFFIXES, measure_sensitivity

    if (scheme is not None) + (structure is not None) + factor > 1:
        raise SettingError("Give one of --structure, to prune, --scheme, to quantize, and --factor, to factorize.")

    if plot is not None:
        if plot.suffix.lower() not in PLOT_SUFFIXES or not plot.parent.is_dir():
            raise SettingError(
                f"--plot must be a file in a folder that exists, ending in {' or '.join(PLOT_SUFFIXES)}, "
                f"got {str(plot)!r}."
            )
        require("matplotlib", extra="plots")
    trial: Any = pruning.perturbation(structure or "unstructured", method)
    if factor:
        trial = factorization.perturbation()
    elif scheme is not None:
        trial = quantization.perturbation(scheme)
    found = measure_sensitivity(model, read_dataset(data, split), trial, samples=samples)
    typer.echo(found)
    if plot is not None:
        found.plot(plot)


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
