"""Cards: what was done and measured, rendered from the record."""

from hfshrink.cards.model import model_card

__all__ = ["model_card"]
