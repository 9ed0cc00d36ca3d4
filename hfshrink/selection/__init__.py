"""Dataset distillation: the subset worth training on, and what it leaves out."""

from hfshrink.selection.coverage_table import Coverage, Thresholds
from hfshrink.selection.datamap import DataMap, LabelError
from hfshrink.selection.datamap_callback import DataMapCallback
from hfshrink.selection.embeddings import embed
from hfshrink.selection.group_scores import worst_group
from hfshrink.selection.groups import coverage
from hfshrink.selection.run import select
from hfshrink.selection.selection_report import SelectionReport
from hfshrink.selection.subset import Subset
from hfshrink.selection.synthesis import synthesize
from hfshrink.selection.synthetic import Synthetic

__all__ = [
    "Coverage",
    "DataMap",
    "DataMapCallback",
    "LabelError",
    "SelectionReport",
    "Subset",
    "Synthetic",
    "Thresholds",
    "coverage",
    "embed",
    "select",
    "synthesize",
    "worst_group",
]
