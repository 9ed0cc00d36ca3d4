"""The compression extension of Hugging Face transformers: distil, prune, quantize, factorize, measure, publish.

Importing the package registers its checkpoint loader with transformers; everything else is imported when it is first
used.
"""

import importlib
from typing import Any

from hfshrink import checkpoint as _checkpoint  # noqa: F401  registers the loader for compressed layers

__version__ = "0.1.0"

_HOMES = {
    "AttentionLoss": "distillation",
    "CompressionReport": "record",
    "CompressionTrainer": "trainer",
    "CrossTokenizerLoss": "distillation",
    "DataMapCallback": "selection",
    "DecoupledLoss": "distillation",
    "DeepToShallowLoss": "distillation",
    "DistillationMixin": "distillation",
    "DistillationTrainer": "distillation",
    "FeatureMapLoss": "distillation",
    "HfshrinkError": "errors",
    "HiddenLoss": "distillation",
    "LogitLoss": "distillation",
    "OnPolicy": "distillation",
    "Pruning": "pruning",
    "PruningMixin": "pruning",
    "PruningTrainer": "pruning",
    "QAT": "quantization",
    "QATMixin": "quantization",
    "QATTrainer": "quantization",
    "RelationLoss": "distillation",
    "Subset": "selection",
    "add_soft_labels": "taught",
    "augment": "distillation",
    "cache_teacher": "distillation",
    "compare": "evaluation",
    "dataset_card": "cards",
    "distill": "distillation",
    "evaluate": "evaluation",
    "evaluate_subset": "proof",
    "factorize": "factorization",
    "filter_by_teacher": "distillation",
    "generate_texts": "distillation",
    "load": "loading",
    "load_soft_labels": "taught",
    "make_student": "distillation",
    "measure_sensitivity": "sensitivity",
    "model_card": "cards",
    "mutate_texts": "distillation",
    "profile": "evaluation",
    "prune": "pruning",
    "push_to_hub": "hub",
    "quantize": "quantization",
    "report": "record",
    "save_soft_labels": "taught",
    "select": "selection",
    "synthesize": "selection",
    "to_dense": "checkpoint",
    "trim_vocabulary": "pruning",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"hfshrink.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hfshrink' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
