"""Publishing: a model, an export or a subset with its record and card, in one commit."""

from hfshrink.hub.push import push_to_hub

__all__ = ["push_to_hub"]
