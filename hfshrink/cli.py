"""The command line: each command is one public function."""

from __future__ import annotations

import json
import sys
from pathlib import Path
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

    given: dict[str, Any] = {"metric": metric, "max_drop": max_drop, **_read_options(option or [])}
    rows = None if calibration is None else read_dataset(calibration, calibration_split)
    run(model, scheme, output_dir=output_dir, calibration=rows, task=task, overwrite=overwrite, **given)
    typer.echo(read(output_dir))


def _read_options(pairs: list[str]) -> dict[str, Any]:
    """name=value pairs; values are read as JSON where they are (numbers, true, false), else as text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name.isidentifier() and equals):
            raise SettingError(f"--option takes name=value, such as group_size=64, got {pair!r}.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


@app.command(epilog="Example: hfshrink distill path/to/teacher path/to/rows small --num-layers 3 --epochs 4")
def distill(
    teacher: Model,
    train_data: Annotated[str, typer.Argument(help="Data set: Hub id or folder of save_to_disk.")],
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; must be empty or not exist.")],
    student: Annotated[str | None, typer.Option(help="Hub id or folder of the student.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Cut the student from the teacher: layers to keep.")] = None,
    split: Annotated[str, typer.Option(help="Split of the training data, where it has several.")] = "train",
    eval_data: Annotated[str | None, typer.Option(help="Held-out data set, evaluated after each epoch.")] = None,
    eval_split: Annotated[str, typer.Option(help="Split of the held-out data, where it has several.")] = "validation",
    epochs: Annotated[float, typer.Option(help="Passes over the training data.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    temperature: Annotated[float | None, typer.Option(help="Softness; 2, for language models 1, if left out.")] = None,
    label_weight: Annotated[float | None, typer.Option(help="Weight of the labels; 0.5 where there are any.")] = None,
    teacher_cache: Annotated[Path | None, typer.Option(help="Folder that keeps the teacher's answers.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 42,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
) -> None:
    """Train a student to do what its teacher does; writes an ordinary transformers folder."""
    from hfshrink.data import read_dataset
    from hfshrink.distillation import LogitLoss, make_student
    from hfshrink.distillation import distill as run
    from hfshrink.loading import load
    from hfshrink.record import report as read
    from hfshrink.saving import save_aside

    if (student is None) == (num_layers is None):
        raise SettingError("Give one of --student and --num-layers.")
    with save_aside(output_dir, overwrite) as folder:
        big, processor = load(teacher)
        small = make_student(big, num_layers) if student is None else student
        rows = read_dataset(train_data, split)
        held_out = None if eval_data is None else read_dataset(eval_data, eval_split)
        settings: dict[str, Any] = {"num_train_epochs": epochs, "learning_rate": learning_rate, "seed": seed}
        if teacher_cache is not None:
            settings["teacher_cache"] = teacher_cache
        losses = None if temperature is None else [LogitLoss(temperature=temperature)]
        trained = run(small, big, rows, eval_dataset=held_out, losses=losses, label_weight=label_weight, **settings)
        trained.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    typer.echo(read(output_dir))


@app.command(epilog="Example: hfshrink cache-teacher path/to/teacher path/to/rows answers --split train")
def cache_teacher(
    teacher: Model,
    data: Annotated[str, typer.Argument(help="Data set: Hub id or folder of save_to_disk.")],
    cache_dir: Annotated[Path, typer.Argument(help="Folder that keeps the answers; grows with each call.")],
    split: Annotated[str | None, typer.Option(help="Split of the data set.")] = None,
    signal: Annotated[str | None, typer.Option(help="full, sampled or top_k; chosen by the head if left out.")] = None,
    entries: Annotated[int, typer.Option(help="Draws (sampled) or tokens (top_k) kept per position.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 32,
) -> None:
    """Run a teacher once over a data set and keep what it says, for DistillationTrainer(teacher_cache=…)."""
    from hfshrink.data import read_dataset
    from hfshrink.distillation import cache_teacher as run

    rows = read_dataset(data, split)
    kept = run(rows, teacher, cache_dir=cache_dir, signal=signal, entries=entries, batch_size=batch_size)
    size = sum(file.stat().st_size for file in cache_dir.rglob("*") if file.is_file())
    typer.echo(f"{len(kept)} rows; {cache_dir} holds {size:,} bytes, {size / len(kept):,.0f} per row.")


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


def main() -> None:
    """Run a command; errors of ours become one line and exit code 1."""
    try:
        app()
    except HfshrinkError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
