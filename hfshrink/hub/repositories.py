"""The repository on the Hub: who may write there, and what is there."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from hfshrink.errors import SettingError
from hfshrink.hub.client import told
from hfshrink.hub.retries import with_retries

OTHER_TYPE = {"model": "dataset", "dataset": "model"}
WORDS = {"model": "model", "dataset": "data set"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Where a commit goes.

    Attributes:
        api: The client.
        repo_id: `namespace/name`.
        repo_type: `"model"` or `"dataset"`.
        revision: Branch; None for the main one.
        create_pr: Whether the commit becomes a pull request.
        tag: Set to the commit afterwards.
    """

    api: Any
    repo_id: str
    repo_type: str = "model"
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None


def check_access(target: Target, private: bool | None = None) -> Target:
    """Check everything that can be known before work. Nothing is created.

    Args:
        target: Where to; its `repo_id` may lack the namespace.
        private: Whether the repository must be private; None takes it as it is.

    Returns:
        The target with its full name.

    Raises:
        SettingError: No token, one that may only read, somebody else's namespace, a name that is none, a repository of
            another type, a public one where a private one was asked for, or a tag that is taken.
        CheckpointError: The Hub can't be reached, or refuses.
    """
    target = _checked(target)
    api, other = target.api, OTHER_TYPE[target.repo_type]
    with told(f"Can't look at {target.repo_id}", api):
        info = repository_info(target)
        if info is not None:
            if private is not None and private != bool(info.private):
                _check_visibility(target.repo_id, private)
            _check_tag(target)
        elif with_retries(lambda: api.repo_exists(target.repo_id, repo_type=other), "Reading the repository"):
            # most likely a slip; a repository that is there already was not made by one
            raise SettingError(
                f"{target.repo_id} is a {WORDS[other]} repository, this is a {WORDS[target.repo_type]}. Choose "
                "another name; the Hub allows one name for both, so make the second one first where you mean that: "
                f"HfApi().create_repo({target.repo_id!r}, repo_type={target.repo_type!r})."
            )
        elif target.create_pr:
            raise SettingError(f"There is no {target.repo_id} to open a pull request on. Leave create_pr=True out.")
    return target


def open_repository(target: Target, private: bool | None = None) -> None:
    """Create the repository and the branch where they are missing.

    Args:
        target: As `check_access` returned it.
        private: Of a new repository; None takes the namespace's default.

    Raises:
        CheckpointError: The Hub can't be reached, or refuses.
    """
    api, where = target.api, {"repo_id": target.repo_id, "repo_type": target.repo_type}
    with told(f"Can't create {target.repo_id}", api):
        if repository_info(target) is None:
            make = {"private": private, "exist_ok": True}
            with_retries(lambda: api.create_repo(**where, **make), "Creating the repository")
        if target.revision is not None and not target.revision.startswith("refs/") and not target.create_pr:
            branch = {"branch": target.revision, "exist_ok": True}
            with_retries(lambda: api.create_branch(**where, **branch), "Creating the branch")


def _checked(target: Target) -> Target:
    """The target with its namespace, once the token may write there."""
    from huggingface_hub.utils import HFValidationError, get_token, validate_repo_id

    api = target.api
    try:
        validate_repo_id(target.repo_id)
    except HFValidationError as error:
        raise SettingError(f"repo_id must be 'name' or 'namespace/name' as the Hub takes it: {error}") from None
    if target.create_pr and target.tag is not None:
        raise SettingError("tag= and create_pr=True don't go together: tag the commit when the request is merged.")
    if api.token is False or (api.token in (None, True) and get_token() is None):
        raise SettingError(
            "Publishing needs a token that may write: run `hf auth login`, set HF_TOKEN or pass token=."
        )
    with told("Can't ask the Hub who you are", api):
        me = with_retries(api.whoami, "Asking who you are")
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise SettingError(
            f"The token of {me['name']} may only read. Make one that may write at {api.endpoint}/settings/tokens."
        )
    namespace, _, name = target.repo_id.rpartition("/")
    orgs = [org["name"] for org in me.get("orgs") or () if org.get("roleInOrg") not in ("read", "no_access")]
    own = [me["name"], *orgs]
    if namespace and namespace not in own and not target.create_pr:
        raise SettingError(
            f"{me['name']} can't write to {namespace!r}; choose one of {', '.join(own)}, or propose the change there "
            "with create_pr=True."
        )
    return dataclasses.replace(target, repo_id=f"{namespace or me['name']}/{name}")


def repository_info(target: Target) -> Any:
    """What the Hub knows of the repository; None where there is none that the token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return with_retries(
            lambda: target.api.repo_info(target.repo_id, repo_type=target.repo_type), "Reading the repository"
        )
    except RepositoryNotFoundError:
        return None


def _check_visibility(repo_id: str, private: bool) -> None:
    if private:
        raise SettingError(
            f"private=True, but {repo_id} exists and is public. Hide it first: "
            f"HfApi().update_repo_settings({repo_id!r}, private=True)."
        )
    logger.warning("private=False, but %s exists and is private; it stays so.", repo_id)


def _check_tag(target: Target) -> None:
    if target.tag is None:
        return
    found = tags(target).get(target.tag)
    if found is not None and found != head(target):
        raise SettingError(f"{target.repo_id} has a tag {target.tag!r} at {found[:8]} already. Choose another name.")


def tags(target: Target) -> dict[str, str]:
    """Tag -> the commit that it points to."""
    refs = with_retries(
        lambda: target.api.list_repo_refs(target.repo_id, repo_type=target.repo_type), "Reading the tags"
    )
    return {tag.name: tag.target_commit for tag in refs.tags}


def head(target: Target) -> str | None:
    """The commit that the branch points to."""
    info = with_retries(
        lambda: target.api.repo_info(target.repo_id, repo_type=target.repo_type, revision=target.revision),
        "Reading the repository",
    )
    return info.sha
