"""`push_to_hub`: a model, an export or a subset with its record, plots, results and card, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfshrink.errors import SettingError
from hfshrink.hub.client import hub_api, quiet_unless_terminal, staging
from hfshrink.hub.commits import commit
from hfshrink.hub.models import ModelParts
from hfshrink.hub.repositories import Target, check_access, open_repository
from hfshrink.hub.subsets import SubsetParts, is_subset
from hfshrink.hub.terms import Terms

WORDS = {"weights": "model", "export": "export", "dataset": "subset"}


def push_to_hub(  # noqa: PLR0913
    model: Any,
    repo_id: str,
    *,
    processor: Any = None,
    exports: Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    license: str | None = None,
    accept_license: bool = False,
    base_card: Any = None,
    rows: bool | None = None,
    max_shard_size: int | str = "50GB",
    **metadata: Any,
) -> str:
    """Publish a model, an export or a subset on the Hub: files, record, plots, results and card in one commit.

    Nothing but the files of a model (`hfshrink.hub.contents.MODEL_FILES`) is uploaded. A push that breaks off changes
    nothing, and the next one sends only what is missing; without any change there is no commit. What the repository's
    README has outside the markers of the card is kept. Trouble that passes (429, 5xx, dropped connections) is waited
    for. In the same commit are deleted: weights and rows that would be read in place of the new ones, such as old
    shards, and what else an earlier push names as its own.

    Args:
        model: A model or export that hfshrink made, the folder that it was saved to, or a `Subset`.
        repo_id: `"name"` in the token's namespace, or `"namespace/name"`; made where it is missing.
        processor: Tokenizer or processor; None takes that of the folder, or of the folder that the model came from.
        exports: Name of a scheme -> export, or its folder, to put beside the weights in `onnx/<scheme>/`, from where
            `ExportedModel.from_pretrained(repo_id, subfolder="onnx/<scheme>")` loads it.
        private: Of a new repository; None takes the namespace's default.
        revision: Branch, made where it is missing; None is the main one.
        tag: Name for the commit.
        create_pr: Whether to open a pull request instead.
        commit_message: Its first line.
        token: One that may write; None takes the saved one.
        license: Identifier of the Hub; None inherits that of the base.
        accept_license: Whether the terms of a base, or of a subset's source, whose licence is no permissive one were
            read and let this be published.
        base_card: Fields of the base's card, or of the source data set's; None reads them from the Hub.
        rows: Of a subset, whether to publish the rows themselves beside indices and scores; None leaves that to the
            licence of their source.
        max_shard_size: As of `save_pretrained`.
        **metadata: For the card: `model_name` (`dataset_name` of a subset), `language`, `datasets`, `tags`, ….

    Returns:
        The commit's address, of the latest one where nothing changed; of a pull request that of its commit.

    Raises:
        SettingError: No token or one that may only read, another's namespace, a name that the Hub does not take, a
            repository of the other type or public in place of private, a model without record, an unfit licence, an
            export or rows in the place of those that hfshrink did not push.
        CheckpointError: No model in the folder, weights that are not safetensors, files that hold a token, or the Hub
            can't be reached: the message says what was uploaded and what was not.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> push_to_hub(BertModel(config), "me/small")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        hfshrink.errors.SettingError: This model has no record: hfshrink did nothing to it...
    """
    subset = is_subset(model)
    if subset and (exports or processor is not None):
        raise SettingError("processor= and exports= belong to models, this is a subset of a data set.")
    if not subset and rows is not None:
        raise SettingError("rows= belongs to subsets of data sets, this is a model.")
    terms = Terms(license, accept_license, base_card)
    parts: Any = SubsetParts(model, rows) if subset else ModelParts(model, processor, exports or {}, max_shard_size)
    parts.check()
    target = Target(hub_api(token), str(repo_id), "dataset" if subset else "model", revision, create_pr, tag)
    target = check_access(target, private)
    with quiet_unless_terminal(), staging() as folder:
        contents, card = parts.contents(target, folder, terms, metadata)
        open_repository(target, private)
        return commit(target, contents, card, commit_message or f"Upload {WORDS[contents.kind]} with hfshrink")
