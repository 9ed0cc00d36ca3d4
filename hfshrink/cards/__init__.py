"""Cards: what was done and measured, rendered from the record."""

from hfshrink.cards.dataset import dataset_card
from hfshrink.cards.licences import is_permissive
from hfshrink.cards.merging import merge_card
from hfshrink.cards.model import model_card
from hfshrink.cards.plots import write_plots

__all__ = ["dataset_card", "is_permissive", "merge_card", "model_card", "write_plots"]
