"""`factorize`: thin factors in the place of weights, with ranks by a ratio, by energy, by a budget or by a drop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from hfshrink.checkpoint import set_layers
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.factorization.making import SOURCES, make, warn
from hfshrink.factorization.request import Request
from hfshrink.factorization.sites import factorable
from hfshrink.factorization.streaming import stream_request, streams
from hfshrink.modules import measure_parameters, replace_module
from hfshrink.record import StepRecord, append_step, config_of, report
from hfshrink.saving import save_aside


def factorize(  # noqa: PLR0913
    model: Any,
    rank_ratio: float | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_parameters: int | None = None,
    max_size_bytes: int | None = None,
    max_drop: float | None = None,
    metric: Any = None,
    weighting: str | None = None,
    calibration: Any = None,
    form: str = "channel",
    update_inputs: bool = False,
    rank_multiple: int = 8,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] | None = None,
    output_dir: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Any:
    """Put two thin factors, W ≈ up · down, in the place of the weights of Linear, Conv1D and Conv2d.

    Exactly one of `rank_ratio`, `rank`, `energy`, `max_parameters`, `max_size_bytes` and `max_drop` says how small the
    model gets. A module that no rank makes smaller, or that is worth its parameters, stays dense and is listed in the
    record with the reason. The saved model needs `import hfshrink` before `from_pretrained`; `to_dense` folds the
    factors back. To recover accuracy, train the factored model with `CompressionTrainer`, or adapters of peft on the
    factors, `LoraConfig(target_modules=[], target_parameters=["query.weight", "query.up"])`, which `merge_and_unload`
    adds to them; the empty list keeps peft from looking for plain Linears.

    Args:
        model: A model, a folder or a Hub id; a model is changed in place.
        rank_ratio: Kept parameters / dense parameters of each module's weight, in (0, 1).
        rank: The same rank for all.
        energy: Share of the (weighted) squared norm that each module keeps, in (0, 1).
        max_parameters: Of the whole model. Ranks are spread by what each module loses per parameter, in units of the
            loss where `calibration` has labels, or is for a language model (K-FAC, arXiv:1503.05671): far better than
            without.
        max_size_bytes: Of all tensors that are saved, in their dtype; the files' headers come on top.
        max_drop: How far `metric` may fall, in its own unit: 0.01 is one point of accuracy. The smallest budget that
            holds it on the rows of `calibration`, which need labels, is found by bisection. Use validation rows: rows
            that the model will be tested on would make the test too good.
        metric: With `max_drop`, as `evaluate` names it; None takes the main one of the task.
        weighting: What counts as an error; None takes "activation" with `calibration`, else "none".

            * "none": of the weight, all entries alike; transformers lose far more than with the others
            * "activation": of the outputs on the calibration rows
            * "fisher": rows by the gradients of the loss; needs labels, which language models make of their inputs
            * "fisher+activation": both
        calibration: Rows like those that the model will see: a `datasets.Dataset`, a Hub id, a folder or an iterable
            of batches. At most 2,048 rows and 262,144 tokens are read; padding does not count. There must be as many
            tokens as a module has input features, better ten times as many; where there are more than eight times as
            many, an even sample of them enters its Gram matrix.
        form: Of convolutions: "channel" (k×k into `rank` channels, then 1×1), "separable" (k×1, then 1×k) or "tucker"
            (1×1, k×k, 1×1; with `rank_ratio` only). The weighting serves "channel"; the others are plain.
        update_inputs: With "activation": whether each layer is fitted to what the factored layers before it make.
        rank_multiple: Ranks are rounded to a multiple of it.
        include: Wildcards of module names. Embeddings are factored where a wildcard names nothing but embeddings.
        exclude: Wildcards of names to leave out; None means the task head, `()` nothing. Tied weights stay dense.
        output_dir: Where to save the model with its tokenizer; None keeps it in memory. A folder or Hub id without
            `calibration` goes there file to file, in the form "channel": the model never is in memory, and a call
            that was killed goes on where it stood.
        max_shard_size: Largest file there.
        overwrite: Whether a folder with files in it may be replaced.

    Returns:
        The model, with the step in its record; the folder, where a named checkpoint went file to file.

    Raises:
        SettingError: A keyword out of range, none or two that say how small, too few tokens, no labels where they are
            needed, NaN weights or inputs, a wildcard without match, nothing to factor, or a model that is quantized or
            no model of transformers.
        BudgetError: The budget can't be met; the message tells the nearest.
        UnsupportedModelError: An export, quantized weights, or layers that can't be run one by one.
        CheckpointError: `model` can't be loaded, or `output_dir` can't be written or holds other files.
        After any of them the model is as it was.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> model = factorize(BertForSequenceClassification(BertConfig(**sizes)), 0.5, rank_multiple=1)
        >>> model.bert.encoder.layer[0].intermediate.dense
        LowRankLinear(in_features=16, out_features=32, rank=5, bias=True)
    """
    start = time.perf_counter()
    target = None if output_dir is None else Path(output_dir).expanduser()
    request = Request(
        model, rank_ratio, rank, energy, max_parameters, max_size_bytes, max_drop, metric, weighting or "",
        calibration, form, update_inputs, rank_multiple, include, exclude, target, overwrite,
    )  # fmt: skip
    if streams(request):
        return stream_request(request, max_shard_size, start)
    network = request.load()
    modules, skipped = factorable(network, include, exclude, form)
    before = dataclasses.replace(measure_parameters(network), size_bytes=request.source_bytes())
    aside = nullcontext() if target is None else save_aside(target, overwrite)
    with _undone_on_error(network, modules), aside as folder:  # in this order: the last move may fail too
        made = make(request, modules)
        set_layers(network, made.layers)
        warn(made, len(modules))
        step = StepRecord(
            technique="factorize",
            method=request.weighting,
            settings=request.settings,
            before=before,
            modules=list(made.layers),
            skipped=skipped | made.reasons,
            results=made.results(modules),
            source=SOURCES[request.weighting],
        )
        _finish(request, step, start, folder, max_shard_size)
    return network


def _finish(request: Request, step: StepRecord, start: float, folder: Path | None, max_shard_size: int | str) -> None:
    """Save the model, then record the step in it and in the folder."""
    after = measure_parameters(request.model)
    if folder is not None:
        request.model.save_pretrained(folder, max_shard_size=max_shard_size)
        if request.processor is not None:
            request.processor.save_pretrained(folder)
        after = dataclasses.replace(after, size_bytes=weight_bytes(folder))
    append_step(request.model, dataclasses.replace(step, after=after, seconds=time.perf_counter() - start))
    if folder is not None:
        report(request.model).save(folder)


@contextmanager
def _undone_on_error(model: Any, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules and the config's own entries back where anything raises."""
    config = vars(config_of(model))
    held: dict[str, Any] = {key: config[key] for key in ("quantization_config", "hfshrink") if key in config}
    try:
        yield
    except BaseException:
        for name, module in modules.items():
            replace_module(model, name, module)
        for key in ("quantization_config", "hfshrink"):
            config.pop(key, None)
        config.update(held)
        raise
