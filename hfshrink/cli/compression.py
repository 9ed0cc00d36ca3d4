"""Commands that make a model smaller: quantize, prune, factorize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfshrink.cli.program import Model, app, read_options
from hfshrink.errors import SettingError


@app.command(
    epilog="Example: hfshrink quantize distilbert/distilbert-base-uncased-distilled-squad small --scheme onnx-int8"
)
def quantize(
    model: Model,
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; must be empty or not exist.")],
    scheme: Annotated[
        str, typer.Option(help="How to quantize, such as nf4, onnx-int8, openvino-int8; auto looks at the processor.")
    ] = "auto",
    calibration: Annotated[
        str | None, typer.Option(help="Data set (Hub id or folder) to take ranges from, and to check the result on.")
    ] = None,
    calibration_split: Annotated[str, typer.Option(help="Split of that data, where it has several.")] = "train",
    metric: Annotated[str | None, typer.Option(help="With --max-drop: what may fall, measured on that data.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="How far the metric may fall, 0.01 for a point; else modules stay float.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Of the scheme, as name=value; may be repeated: --option group_size=64.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task, for a config that names no architecture.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in the folder.")] = False,
) -> None:
    """Quantize a model into a folder that loads with transformers."""
    from hfshrink.data import read_dataset
    from hfshrink.quantization import quantize as run
    from hfshrink.record import report as read

    given: dict[str, Any] = {"metric": metric, "max_drop": max_drop, **read_options(option or [])}
    rows = None if calibration is None else read_dataset(calibration, calibration_split)
    run(model, scheme, output_dir=output_dir, calibration=rows, task=task, overwrite=overwrite, **given)
    typer.echo(read(output_dir))


@app.command(
    epilog="Example: hfshrink prune path/to/model small --sparsity 0.4 --structure heads+neurons "
    "--calibration path/to/rows"
)
def prune(
    model: Model,
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; must be empty or not exist.")],
    sparsity: Annotated[float | None, typer.Option(help="Share that goes, in [0, 1); left out for N:M.")] = None,
    structure: Annotated[
        str,
        typer.Option(
            help="unstructured, N:M such as 2:4, heads, neurons, heads+neurons, channels, layers or vocabulary."
        ),
    ] = "unstructured",
    method: Annotated[str | None, typer.Option(help="The best that the data allows, if left out.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Data set: Hub id or folder of save_to_disk. For vocabulary the corpus.")
    ] = None,
    calibration_split: Annotated[str, typer.Option(help="Split of that data, where it has several.")] = "train",
    scope: Annotated[str | None, typer.Option(help="What is ranked together: global, module or row.")] = None,
    cost: Annotated[str | None, typer.Option(help="What search saves: macs, or latency on this machine.")] = None,
    seed: Annotated[int, typer.Option(help="Of the method random.")] = 0,
    zeros_only: Annotated[bool, typer.Option(help="Leave zeros instead of cutting units out.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
) -> None:
    """Take weights, heads, neurons, channels, layers or tokens out of a model without training it."""
    from hfshrink.data import read_dataset
    from hfshrink.loading import load
    from hfshrink.record import report as read
    from hfshrink.saving import save_aside

    given = {"sparsity": sparsity, "method": method, "scope": scope, "cost": cost, "zeros_only": zeros_only or None}
    how = {name: value for name, value in given.items() if value is not None}
    if structure == "vocabulary" and (how or calibration is None):
        wrong = ", ".join("--" + name.replace("_", "-") for name in how)
        raise SettingError(
            "--structure vocabulary takes the texts in --calibration and none of the other settings"
            + (f", got {wrong}." if wrong else ".")
        )
    with save_aside(output_dir, overwrite) as folder:
        loaded, processor = load(model)
        rows = None if calibration is None else read_dataset(calibration, calibration_split)
        smaller, processor = _pruned(loaded, processor, structure, rows, {**how, "seed": seed})
        smaller.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    typer.echo(read(output_dir))


def _pruned(model: Any, processor: Any, structure: str, rows: Any, how: dict[str, Any]) -> tuple[Any, Any]:
    """The pruned model and the tokenizer or processor that goes with it."""
    from hfshrink.pruning import prune as run
    from hfshrink.pruning import trim_vocabulary

    if structure == "vocabulary":
        return trim_vocabulary(model, rows, processor)
    cut = not how.pop("zeros_only", False)
    return run(model, structure=structure, calibration=rows, cut=cut, **how), processor


@app.command(epilog="Example: hfshrink factorize path/to/model small --rank-ratio 0.7 --calibration path/to/rows")
def factorize(
    model: Model,
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; must be empty or not exist.")],
    rank_ratio: Annotated[float | None, typer.Option(help="Kept share of each weight's parameters.")] = None,
    rank: Annotated[int | None, typer.Option(help="The same rank for all.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of its energy that each weight keeps.")] = None,
    max_parameters: Annotated[int | None, typer.Option(help="Budget: parameters of the whole model.")] = None,
    max_size_bytes: Annotated[int | None, typer.Option(help="Budget: bytes of all saved tensors.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Budget: how far --metric may fall on the calibration rows, 0.01 for a point.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="With --max-drop; the task's main one when left out.")] = None,
    weighting: Annotated[
        str | None, typer.Option(help="none, activation, fisher or fisher+activation; activation with data.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Data set: Hub id or folder of save_to_disk; none reads file to file.")
    ] = None,
    calibration_split: Annotated[str, typer.Option(help="Split of that data, where it has several.")] = "train",
    form: Annotated[str, typer.Option(help="Of convolutions: channel, separable or tucker.")] = "channel",
    overwrite: Annotated[bool, typer.Option(help="Replace what is in the folder.")] = False,
) -> None:
    """Put two thin factors in the place of each weight."""
    from hfshrink.data import read_dataset
    from hfshrink.factorization import factorize as run
    from hfshrink.record import report as read

    given: dict[str, Any] = {
        "rank": rank,
        "energy": energy,
        "max_parameters": max_parameters,
        "max_size_bytes": max_size_bytes,
    }
    given |= {"max_drop": max_drop, "metric": metric, "weighting": weighting}
    how = {name: value for name, value in given.items() if value is not None}
    rows = None if calibration is None else read_dataset(calibration, calibration_split)
    run(model, rank_ratio, calibration=rows, form=form, output_dir=output_dir, overwrite=overwrite, **how)
    typer.echo(read(output_dir))
