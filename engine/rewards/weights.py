"""Where the weights of rewards are: folders, a folder of folders, or the hub's cache; and what is known of them."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rollflow.errors import RequestError, line, shown
from rollflow.names import FOLDERS as FOLDERS
from rollflow.names import fetched, hub_id

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # no pickles
T = TypeVar("T")
_loaded: dict[Hashable, Any] = {}
_locks: dict[Hashable, threading.Lock] = {}
_turns: dict[Hashable, threading.Lock] = {}  # at what was loaded, for which several rewards may wait
_lock = threading.Lock()
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")  # suffixes of files without which a model is not there


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
        cached = Path(snapshot_download(model, revision=revision, allow_patterns=[*patterns], local_files_only=True))
        return cached if _whole(cached, patterns) else None
    except (OSError, ValueError):  # it is not in the hub's cache
        return None


def _of_hub(reward: str, model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": list(patterns)}
    try:
        cached = Path(snapshot_download(model, **wanted, local_files_only=True))
        if _whole(cached, patterns):  # else it was cached for other files
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


def _whole(folder: Path, patterns: Sequence[str]) -> bool:
    """Whether a folder has files of these patterns: of its weights, where weights are among them."""
    heavy = [pattern for pattern in patterns if pattern.endswith(WEIGHTS)]
    return any(next(folder.glob(pattern), None) for pattern in heavy or patterns)


def turn(key: Hashable) -> threading.Lock:
    """A lock for those that use what was loaded under a key: tokenizers hold state while they work."""
    with _lock:
        return _turns.setdefault(key, threading.Lock())


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


def all_missing(rewards: Mapping[str, Any]) -> RequestError | None:
    """What to do about the models of rewards that are not here; None if all are.

    Args:
        rewards: those with `wanted`, by how they are written in a spec.
    """
    missing: dict[str, None] = {}
    patterns: dict[str, None] = {}
    asked: dict[str, None] = {}
    for name, reward in rewards.items():
        own = [one for one in reward.wanted() if here(*one) is None]
        missing.update(dict.fromkeys(one.model for one in own))
        patterns.update(dict.fromkeys(pattern for one in own for pattern in one.patterns))
        if own:
            spec = reward.kind if "..." in name else name  # one that was shortened cannot be asked for
            asked[f'"{spec}"' if ":" in spec else spec] = None
    if not missing:
        return None
    which = f" ({', '.join(patterns)})" if len(asked) == 1 else ""
    return RequestError(
        f"the reward{'s' * (len(asked) > 1)} {' and '.join(asked)} need{'s' * (len(asked) == 1)} the models "
        f"{', '.join(missing)}, which are neither here nor to be had from the hub: put their files{which} into "
        f"DIR/OWNER/NAME, as `rollflow fetch {' '.join(asked)} --to DIR` does where there is a network, and set "
        f"{FOLDERS}=DIR"
    )


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` gives, made once a process for each key, by one thread; an error is not kept."""
    with _lock:
        if key in _loaded:
            return _loaded[key]
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _loaded:
            _loaded[key] = made = make()
            return made
        return _loaded[key]


def forget() -> None:
    """Lets go of what was loaded; rewards load it again when they are called."""
    with _lock:
        _loaded.clear()
