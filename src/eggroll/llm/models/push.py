"""Pushing a saved model to the Hugging Face hub, checked before a run and harmless after it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from eggroll._command import typed
from eggroll._optional import require
from eggroll.errors import ModelError
from eggroll.llm.models.export import card_for_hub
from eggroll.llm.models.hub import quiet_progress

CARD = "README.md"


def check_push(repo_id: str | None) -> None:
    """Refuse what a push would end with anyway: no token, a name that the hub does not take, or no hub.

    Whether the token may write is asked of the hub, if that can be reached now.

    Args:
        repo_id: ``account/name`` or a name; ``None`` if it is not known yet.

    Raises:
        ModelError: the message says what is missing and how to get it.
    """
    hub = _hub()
    if repo_id is not None:
        try:
            hub.utils.validate_repo_id(repo_id)
        except hub.errors.HFValidationError as error:
            raise ModelError(f"hub_model_id {repo_id!r} is not a name of the Hugging Face hub: {error}") from None
    if hub.constants.HF_HUB_OFFLINE:
        raise ModelError("nothing can be pushed to the hub while HF_HUB_OFFLINE is set; unset it, or do not push")
    if hub.get_token() is None:
        raise ModelError(
            f"pushing to the Hugging Face hub needs a token that may write: {typed('hf')} auth login, or set HF_TOKEN "
            "(https://huggingface.co/settings/tokens)"
        )
    try:
        about = hub.HfApi(endpoint=hub.constants.ENDPOINT).whoami()
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise ModelError(
                f"the hub does not take the token ({_in_a_line(error)}); make one that may write: "
                f"https://huggingface.co/settings/tokens, then {typed('hf')} auth login"
            ) from error
        return  # it may be there when the run has ended
    if about.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ModelError(
            "the token for the Hugging Face hub may only read; make one that may write: "
            "https://huggingface.co/settings/tokens"
        )


def push(directory: str | Path, repo_id: str, *, private: bool = False, advice: str = "") -> str:
    """Push a directory that :func:`eggroll.llm.models.export.save_pretrained` wrote, as one commit.

    The card's lines load the model from the repository there.

    Args:
        directory: the saved model.
        repo_id: ``account/name``, or a name under the token's account; made if it does not exist.
        private: make a new repository private; otherwise it is what the account makes by default.
        advice: what to do if it fails, in a sentence, for a directory that is not there for long.

    Returns:
        The repository's address.

    Raises:
        ModelError: it could not be pushed; the message has the line that does it later.
    """
    hub, folder = _hub(), Path(directory)
    try:
        api = hub.HfApi(endpoint=hub.constants.ENDPOINT)
        with quiet_progress(), _NoBars(hub):
            made = api.create_repo(repo_id, private=private or None, exist_ok=True)
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CARD)
            add = hub.CommitOperationAdd
            operations = [add(path.relative_to(folder).as_posix(), str(path)) for path in files]
            if (folder / CARD).exists():
                operations.append(add(CARD, card_for_hub(folder, made.repo_id).encode()))
            api.create_commit(made.repo_id, operations, commit_message="A model trained with eggroll")
    except Exception as error:  # of the hub, of the network below it, of files
        way = advice or f"It is saved in {folder}; push it later: {later(folder, repo_id, private=private)}"
        raise ModelError(f"the model could not be pushed to {repo_id}: {_in_a_line(error)}. {way}") from error
    return str(made)


def later(directory: str | Path, repo_id: str, *, private: bool = False) -> str:
    """The command that pushes a saved model by hand."""
    words = ["upload", repo_id, str(directory), ".", *(["--private"] if private else [])]
    return " ".join([typed("hf"), *map(shlex.quote, words)])


class _NoBars:
    """No progress bars of the hub's client, which are on or off for the process."""

    def __init__(self, hub: Any) -> None:
        self.hub, self.were_off = hub, hub.utils.are_progress_bars_disabled()

    def __enter__(self) -> None:
        self.hub.utils.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        if not self.were_off:
            self.hub.utils.enable_progress_bars()


def _in_a_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__


def _hub() -> Any:
    hub = require("huggingface_hub", extra="llm")
    for name in ("constants", "errors", "utils"):
        require(f"huggingface_hub.{name}", extra="llm")
    return hub
