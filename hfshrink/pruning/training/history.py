"""The step that a pruning adds to the model's record."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedConfig

from hfshrink.measurement import Measurement
from hfshrink.modules import measure_parameters
from hfshrink.record import StepRecord, append_step

SOURCES = {
    "magnitude": "Zhu and Gupta 2017, arXiv:1710.01878",
    "movement": "Sanh et al. 2020, arXiv:2005.07683",
    "soft-movement": "Sanh et al. 2020, arXiv:2005.07683",
    "taylor": "Molchanov et al. 2019, arXiv:1906.10771",
    "fisher": "Theis et al. 2018, arXiv:1801.05787",
    "wanda": "Sun et al. 2023, arXiv:2306.11695",
    "sparsegpt": "Frantar and Alistarh 2023, arXiv:2301.00774",
}
OWN_SOURCES = {
    ("heads and neurons", "search"): "Kwon et al. 2022, arXiv:2204.09656",
    ("heads and neurons", "fisher"): "Kwon et al. 2022, arXiv:2204.09656",
    ("heads and neurons", "taylor"): "Michel et al. 2019, arXiv:1905.10650",
    ("heads and neurons", "activation"): "Muralidharan et al. 2024, arXiv:2407.14679",
    ("channels", "magnitude"): "Li et al. 2017, arXiv:1608.08710",
    ("layers", "influence"): "Men et al. 2024, arXiv:2403.03853",
    ("layers", "top"): "Sajjad et al. 2020, arXiv:2004.03844",
}
"""(kind of structure, method) -> paper, where one-shot pruning has another one."""
TRAINING_SETTINGS = ("num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "seed")
ZEROS_ONLY = "Zeros in dense tensors: neither the file nor the latency shrinks."

logger = logging.getLogger(__name__)


def record_training(
    trainer: Any, results: dict[str, Any], before: Measurement, changed: list[str], seconds: float
) -> None:
    """Append the step of a `PruningMixin` trainer that has just trained, and say in the log what zeros are not.

    A plain `nn.Module` has no config, and so no record.
    """
    pruning, after = trainer.pruning, measure_parameters(trainer.model)
    if before.parameters == after.parameters:
        results["note"] = ZEROS_ONLY
        is_masked = pruning.is_structured and not pruning.cut
        logger.warning("%s%s", ZEROS_ONLY, " Cut the units out with cut=True." if is_masked else "")
    if not isinstance(getattr(trainer.model, "config", None), PreTrainedConfig):
        return
    step = StepRecord(
        technique="prune",
        method=pruning.method,
        settings={**pruning.given(), "training": {name: getattr(trainer.args, name) for name in TRAINING_SETTINGS}},
        before=before,
        after=after,
        modules=changed,
        results=results,
        seconds=seconds,
        source=SOURCES.get(pruning.method, ""),
    )
    append_step(trainer.model, step)
