"""Where the weights of rewards are: folders, a folder of folders, or the hub's cache; and what is known of them."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rollflow.errors import RequestError, line, shown
from rollflow.names import FOLDERS as FOLDERS
from rollflow.names import fetched, hub_id

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # no pickles
T = TypeVar("T")
_loaded: dict[Hashable, Any] = {}
_locks: dict[Hashable, threading.Lock] = {}
_lock = threading.Lock()


class Wanted(NamedTuple):
    """Files of a model: its hub id or folder, the revision (None: the latest), and which of its files."""

    model: str
    revision: str | None = None
    patterns: tuple[str, ...] = PATTERNS


def folder(reward: str, model: str, revision: str | None = None, patterns: Sequence[str] = PATTERNS) -> Path:
    """The folder of a model: itself, one below `$ROLLFLOW_MODELS`, in the hub's cache, or fetched from the hub.

    Args:
        reward: for whom, in messages: as it is written in a spec.
        model: a folder, or a hub id OWNER/NAME.
        revision: commit or tag on the hub; None: the latest.
        patterns: which files are wanted.

    Raises:
        RequestError: it cannot be had; the message says which files to put where.
    """
    given = Path(model).expanduser()
    if given.is_dir():
        return given
    if (below := fetched(model)) is not None:
        return below
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise RequestError(
            f"the reward {reward} has model={shown(model)}: there is no such folder, and a hub id is OWNER/NAME"
        )
    return once(("folder", model, revision, tuple(patterns)), lambda: _of_hub(reward, model, revision, patterns))


def here(model: str, revision: str | None = None, patterns: Sequence[str] = PATTERNS) -> Path | None:
    """Where `folder` finds a model without the hub's help; None where it does not."""
    from huggingface_hub import snapshot_download

    if model and (given := Path(model).expanduser()).is_dir():
        return given
    if (below := fetched(model)) is not None or not hub_id(model):
        return below
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*patterns], local_files_only=True))
    except (OSError, ValueError):  # it is not in the hub's cache
        return None


def _of_hub(reward: str, model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": list(patterns)}
    try:
        cached = Path(snapshot_download(model, **wanted, local_files_only=True))
        if any(next(cached.glob(pattern), None) for pattern in patterns):  # else it was cached for other files
            return cached
    except LocalEntryNotFoundError:
        pass
    except Exception as error:
        raise _missing(reward, model, patterns, error) from error
    if not reachable():  # or it would be tried for half a minute
        raise _missing(reward, model, patterns, ConnectionError("no connection to it"))
    try:
        return Path(snapshot_download(model, **wanted))
    except Exception as error:  # of the network, of the hub or of the disk
        raise _missing(reward, model, patterns, error) from error


def reachable() -> bool:
    """Whether the hub can be reached: something answers within a few seconds."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10):
            return True
    except urllib.error.HTTPError:  # it answered
        return True
    except (OSError, ValueError):
        return False


def _missing(reward: str, model: str, patterns: Sequence[str], error: Exception) -> RequestError:
    asked = f'"{reward}"' if ":" in reward else reward  # quoted for the shell
    return RequestError(
        f"the reward {reward} needs the model {model}, which is neither here nor to be had from the hub "
        f"({line(str(error), 80) or type(error).__name__}): put its files ({', '.join(patterns)}) into DIR/{model}, as "
        f"`rollflow fetch {asked} --to DIR` does where there is a network, and set {FOLDERS}=DIR"
    )


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` gives, made once a process for each key, by one thread; an error is not kept."""
    with _lock:
        if key in _loaded:
            return _loaded[key]
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _loaded:
            _loaded[key] = make()
        return _loaded[key]


def forget() -> None:
    """Lets go of every loaded network that no reward uses at the moment."""
    with _lock:
        _loaded.clear()
