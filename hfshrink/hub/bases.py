"""The card of the model or data set that something was made from, as far as it can be read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hfshrink.hub.contents import CARD_FILE
from hfshrink.hub.earlier import MAX_BYTES
from hfshrink.hub.retries import reason

logger = logging.getLogger(__name__)


def read_base(api: Any, name: str | None, repo_type: str = "model") -> dict[str, Any] | None:
    """The metadata of a card on the Hub; None, with a warning, where it can't be read. It never fails a push.

    Args:
        api: The client.
        name: A Hub id; a folder's name is none, and None is returned for it.
        repo_type: `"model"` or `"dataset"`.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if name is None or name.count("/") != 1:
        return None
    try:
        return _metadata(Path(api.hf_hub_download(name, CARD_FILE, repo_type=repo_type)))
    except LocalEntryNotFoundError:  # huggingface_hub has tried several times
        why = "the connection failed"
    except EntryNotFoundError:
        return {}
    except GatedRepoError:
        why = "it is gated, and this token has no access"
    except RepositoryNotFoundError:
        why = "it is private, or not on the Hub"
    except Exception as error:  # a broken README, …: the push goes on without it
        why = reason(error)
    logger.warning("The card of %s can't be read: %s. Its licence and language are not inherited.", name, why)
    return None


def _metadata(path: Path) -> dict[str, Any]:
    from huggingface_hub import RepoCard

    if path.stat().st_size > MAX_BYTES:
        raise ValueError("it is too large")
    card = RepoCard(path.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True)
    return dict(card.data.to_dict())
