"""`rollflow fetch`: the files of rewards and models, from the hub into a folder, for machines without a network."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from rollflow.errors import RequestError, line, shown
from rollflow.names import BUILT_IN, FOLDERS, hub_id

LICENCES = ("LICENSE*", "LICENCE*")
PIPELINE = (  # its parts; what lies beside them is the same once more, in one file
    "model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja",
)  # fmt: skip
VARIANTS = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")  # the same in another precision
PARTIAL = ".partial"  # folder of what is not complete
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(required)")]
To = Annotated[Path, tyro.conf.arg(metavar="DIR")]


class Listed(NamedTuple):
    """What a model on the hub has of the files that are wanted.

    Attributes:
        model: hub id.
        commit: that is taken.
        files: by name, their bytes.
    """

    model: str
    commit: str
    files: dict[str, int]


@dataclass(frozen=True)
class Fetch:
    """Fetch what rewards and models need from the hub into a folder, for machines without a network.

    Writes DIR/OWNER/NAME for each model, in the revision that rollflow pins where it pins one. On the other machine set
    the environment variable ROLLFLOW_MODELS to that folder: rewards find their weights there, and so does --model
    OWNER/NAME. Files that are there already are not fetched again, so that a command that was broken off goes on with
    the same command. Models that ask for consent need HF_TOKEN, or `hf auth login`.
    """

    to: To
    """The folder; made if it is not there."""
    names: tyro.conf.Positional[Names] = ()
    """Rewards (vqa, or with options as in "vqa:model=Qwen/Qwen2.5-VL-3B-Instruct", or an expression of several), hub
    ids (OWNER/NAME), and short names of models that `rollflow models` and `rollflow rewards` list (FLUX.1-schnell)."""

    def __call__(self) -> None:
        """Runs the command.

        Raises:
            RequestError: a name that stands for nothing, before anything is fetched; or what could not be had, after
                the rest was.
        """
        if not self.names:
            raise RequestError("name what to fetch: rollflow fetch pickscore FLUX.1-schnell --to DIR")
        wanted = _wanted(self.names)
        if sys.stderr.isatty() and "huggingface_hub" not in sys.modules:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"  # which other commands turn off
        failed: dict[str, list[str]] = {}
        for (model, revision), patterns in wanted.items():
            try:
                self._fetch(_listed(model, revision, patterns))
            except Exception as error:  # of the hub, the network or the disk: the others may still be had
                failed.setdefault(_reason(model, error), []).append(model)
        if failed:
            what = "; ".join(f"{', '.join(models)} ({reason})" for reason, models in failed.items())
            raise RequestError(f"could not be had: {what}. The same command goes on from what is in {self.to}")
        if wanted:
            print(f"where it is used: export {FOLDERS}={self.to.absolute()}")

    def _fetch(self, listed: Listed) -> None:
        """Fetches what is missing of a model; its folder gets its name when all of it is there."""
        from huggingface_hub import snapshot_download

        target = self.to / listed.model
        place = target if target.is_dir() else self.to / PARTIAL / listed.model
        missing = {file: size for file, size in listed.files.items() if not _has(place / file, size)}
        total = sum(listed.files.values())
        print(f"{listed.model} at {listed.commit[:12]}: {len(listed.files)} files, {size_of(total)}", end="")
        print(f", {size_of(sum(missing.values()))} missing" if missing else ", none missing", flush=True)
        place.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(place).free) < sum(missing.values()):
            raise RequestError(f"{size_of(sum(missing.values()))}, and {size_of(free)} are free in {self.to}")
        patterns = [*map(_literal, listed.files)]
        snapshot_download(listed.model, revision=listed.commit, allow_patterns=patterns, local_dir=place)
        if place != target:
            target.parent.mkdir(parents=True, exist_ok=True)
            place.rename(target)
            for folder in (place.parent, place.parent.parent):
                if not any(folder.iterdir()):
                    folder.rmdir()
        print(f"  {target}", flush=True)


def _wanted(names: Sequence[str]) -> dict[tuple[str, str | None], set[str] | None]:
    """What names stand for: the patterns of files by hub id and revision, None for all that a model consists of."""
    from rollflow import rewards
    from rollflow.rewards import known

    found: dict[tuple[str, str | None], set[str] | None] = {}
    short = _short()
    for name in names:
        if name in BUILT_IN:
            print(f"{name}: it is part of rollflow")
        elif hub_id(name) or (name not in rewards.names() and name.lower() in short):
            model = name if hub_id(name) else short[name.lower()]
            found[model, known.revision(model)] = None
        else:
            for one in _of_rewards(name):
                had = found.get((one.model, one.revision), {*LICENCES})
                found[one.model, one.revision] = None if had is None else had | {*one.patterns}
    return found


def _short() -> dict[str, str]:
    """Hub ids of models and weights that are known, by what follows the owner, in lower case."""
    from rollflow.models.known import KNOWN
    from rollflow.rewards import known

    ids = {*KNOWN, *(one.model for one in known.WEIGHTS)}
    names = [model.rpartition("/")[2].lower() for model in ids]
    return {name: model for name, model in zip(names, ids, strict=True) if names.count(name) == 1}


def _of_rewards(text: str) -> list[Any]:
    """The files that the rewards of an expression want from the hub.

    Raises:
        RequestError: it stands for nothing.
    """
    from rollflow import rewards

    try:
        terms = rewards.terms_of(rewards.make(text))
    except RequestError as error:
        names = [*rewards.names(), *BUILT_IN, *(model.rpartition("/")[2] for model in _short().values())]
        close = get_close_matches(text, names, 3, 0.5)
        meant = f"did you mean {', '.join(close)}?" if close else f"{line(str(error), 200)};"
        raise RequestError(
            f"fetch {shown(text)}: {meant} A name is that of a reward, a hub id OWNER/NAME, or a short name in "
            "`rollflow models`"
        ) from error
    found = []
    for term in terms:
        wanted = [*term.wanted()] if hasattr(term, "wanted") else []
        for one in wanted:
            if Path(one.model).expanduser().exists() or not hub_id(one.model):
                print(f"{term.name}: {shown(one.model)} is none of the hub's")
            else:
                found.append(one)
        if not wanted:
            print(f"{term.name}: it needs no weights from the hub")
    return found


def _listed(model: str, revision: str | None, patterns: set[str] | None) -> Listed:
    """Looks up what the hub has; raises what its client does, and `LookupError` where none of it is wanted."""
    from huggingface_hub import HfApi

    from rollflow.rewards.weights import PATTERNS

    info = HfApi().model_info(model, revision=revision, files_metadata=True)
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or []}
    if patterns is None:
        patterns = {*LICENCES, *(PIPELINE if "model_index.json" in sizes else PATTERNS)}
    kept = [file for file in sizes if _fits(file, patterns) and not _fits(file, VARIANTS)]
    if not any(Path(file).suffix not in ("", ".md") for file in kept):
        raise LookupError(f"it has none of {', '.join(sorted(patterns - {*LICENCES}))}")
    return Listed(model, str(info.sha), {file: sizes[file] for file in kept})


def _fits(file: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def size_of(count: int) -> str:
    """Bytes in GB of 10^9, as the hub tells sizes, or in MB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _has(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _literal(file: str) -> str:
    """A pattern that a file alone fits."""
    return "".join(f"[{one}]" if one in "*?[" else one for one in file)


def _reason(model: str, error: Exception) -> str:
    """Why a model could not be had, in a few words."""
    from huggingface_hub import errors

    if isinstance(error, RequestError | LookupError):
        return line(str(error), 150)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return f"accept its terms at https://huggingface.co/{model}, then set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub does not have the pinned revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or it is private: set HF_TOKEN"
    root: BaseException = error
    while (cause := root.__cause__ or root.__context__) is not None:
        root = cause
    text = line(str(root), 80)
    return f"no connection to the hub: {text}" if "onnect" in type(error).__name__ else text or type(error).__name__
