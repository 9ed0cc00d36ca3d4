"""Commands that train a student: distill, cache-teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfshrink.cli.program import Model, app
from hfshrink.errors import SettingError


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
