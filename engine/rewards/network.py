"""Rewards that are networks: where their weights are, where they run, and how clips are judged by their frames."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import ModelError, RequestError, RollflowError, line, said, shown
from rollflow.rewards import known, weights
from rollflow.rewards.expression import Named
from rollflow.rewards.protocol import Reward
from rollflow.rewards.weights import Wanted

FRAMES = ("mean", "min", "first", "last", "ends")
DTYPES = ("auto", "float32", "bfloat16", "float16")
REMEMBERED = 4096  # prompts whose embedding is kept
LOCAL = {
    "local_files_only": True,
    "trust_remote_code": False,
}  # how the automatic classes of transformers read a folder


@dataclass(frozen=True)
class FrameReward(Reward):
    """A reward of images, which judges a clip by its frames.

    Attributes:
        frames: what counts of a clip: the "mean" or the "min" of its frames, the "first", the "last", or the mean of
            both "ends".
    """

    kind: ClassVar[str]  # its name in specs
    always: ClassVar[tuple[str, ...]] = ()  # options that its name has even where they are as usual
    differentiable: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()  # that it imports, beyond what rollflow itself takes

    frames: str = "mean"

    def __post_init__(self) -> None:
        if self.frames not in FRAMES:
            raise RequestError(f"{self.kind}: frames={shown(self.frames)}: choose one of {', '.join(FRAMES)}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The reward as it is written in a spec, without what is as usual; shortened to 100 characters."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.repr}
        usual = {
            f.name: f.default
            for f in fields(self)
            if f.default is not MISSING and f.name not in getattr(self, "always", ())
        }
        said = sorted((key, str(value)) for key, value in given.items() if value != usual.get(key))
        return line(str(Named(self.kind, tuple(said))), 100)

    def check(self, prompt: str) -> None:
        """Looks for its packages; see `rollflow.rewards.Reward.check`. By default every prompt can be judged."""
        imported(self.kind, self.packages)

    def __call__(
        self, images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " row"]:
        """See `rollflow.rewards.Reward`."""
        if images.ndim == 4:
            return self._scores(images, [*prompts])
        rows, count = images.shape[:2]
        places = {"first": [0], "last": [count - 1], "ends": [0, count - 1]}.get(self.frames, [*range(count)])
        chosen, each = images[:, places], list[Tensor]()
        most = getattr(self, "batch", None)
        step = rows if most is None else max(1, most // len(places))  # whole clips: none depends on its place
        for i in range(0, rows, step):
            asked = [prompt for prompt in prompts[i : i + step] for _ in places]
            each.append(self._scores(chosen[i : i + step].flatten(0, 1), asked).view(-1, len(places)))
        scores = torch.cat(each)
        return scores.amin(1) if self.frames == "min" else scores.mean(1)

    def _scores(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """`score`, of at most `batch` images at a time: those of a clip are its frames."""
        most = getattr(self, "batch", None) or len(images)
        if len(images) <= most:
            return self.score(images, prompts)
        places = range(0, len(images), most)
        return torch.cat([self.score(images[i : i + most], prompts[i : i + most]) for i in places])

    @abstractmethod
    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """Scores of images in [0, 1], float32, on any device."""


@dataclass(frozen=True)
class NetworkReward(FrameReward):
    """A reward that is a network with weights of its own, which are loaded once a process, when it is first called.

    Attributes:
        model: a hub id or a folder.
        revision: commit or tag on the hub; None: the one that was pinned for the usual model, else the latest.
        device: where it runs; None: where the images are.
        dtype: of the network; "auto": bfloat16 on a GPU, else float32.
        batch: the most images of a call; None: as many as there are.
    """

    files: ClassVar[tuple[str, ...]] = weights.PATTERNS

    model: str = ""
    revision: str | None = None
    device: str | None = None
    dtype: str = "float32"
    batch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise RequestError(f"{self.kind}: dtype={shown(self.dtype)}: choose one of {', '.join(DTYPES)}")
        if self.batch is not None and self.batch < 1:
            raise RequestError(f"{self.kind}: batch={self.batch}: it must be at least 1")
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise RequestError(f"{self.kind}: device={shown(self.device)}: cpu, cuda or cuda:N") from error

    @property
    def folder(self) -> Path:
        """Where its weights are. Raises as `rollflow.rewards.weights.folder` does."""
        return weights.folder(self.name, self.model, self.revision or self.pinned(), self.files)

    def pinned(self) -> str | None:
        """The revision of its usual model that was seen to work."""
        return known.revision(self.model)

    def wanted(self) -> tuple[Wanted, ...]:
        """What it loads, as `rollflow fetch` gets it: its model, and where it has several networks the others too."""
        return (Wanted(self.model, self.revision or self.pinned(), self.files),)

    def check(self, prompt: str) -> None:
        """Looks for its packages and weights; see `rollflow.rewards.Reward.check`."""
        super().check(prompt)
        errors = []
        for one in self.wanted():
            try:
                weights.folder(self.name, *one)
            except RequestError as error:
                errors.append(error)
        if len(errors) > 1:
            raise weights.all_missing({self.name: self}) or errors[0]
        if errors:
            raise errors[0]

    def _key(self, device: torch.device) -> tuple[Any, ...]:
        """What tells apart what rewards of this kind load."""
        device = device if self.device is None else torch.device(self.device)
        return (type(self), self.model, self.revision, str(device), self.chosen_dtype(device), self.variant())

    def _scores(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        with weights.turn(self._key(images.device)):  # rewards that differ in an option share networks and tokenizers
            return super()._scores(images, prompts)

    def parts(self, device: torch.device) -> Any:
        """What `load` made, once a process for each model, dtype and device."""
        key = self._key(device)
        device = device if self.device is None else torch.device(self.device)
        dtype = self.chosen_dtype(device)

        def load() -> Any:
            with torch.inference_mode(False):  # a later call may need gradients of images
                return self.load(self.folder, device, dtype)

        return weights.once(key, load)

    def chosen_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of its network on a device."""
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return getattr(torch, self.dtype)

    def variant(self) -> tuple[Any, ...]:
        """What else `load` depends on, besides model, revision, device and dtype."""
        return ()

    @abstractmethod
    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
        """Its networks, in evaluation mode and without gradients of their weights, and what prepares their inputs."""


class Remembered:
    """What was made of prompts, the most recent ones; rewards that differ in an option may share one.

    Args:
        make: from distinct prompts to one tensor each, `[prompt, ...]`.
    """

    def __init__(self, make: Callable[[list[str]], Tensor]):
        self._make, self._of, self._lock = make, OrderedDict[str, Tensor](), Lock()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """One a prompt, in order: `[row, ...]`; each distinct prompt is made once."""
        with self._lock:
            missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._of]
            if missing:
                with torch.inference_mode(False), torch.no_grad():  # a later call may need gradients of images
                    self._of.update(zip(missing, self._make(missing), strict=True))
            for prompt in dict.fromkeys(prompts):
                self._of.move_to_end(prompt)
            found = torch.stack([self._of[prompt] for prompt in prompts])
            while len(self._of) > REMEMBERED:
                self._of.popitem(last=False)
        return found


def imported(reward: str, packages: Sequence[str]) -> None:
    """Looks whether the packages of a reward are here. Raises `RequestError` with what installs them."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RequestError(f"the reward {reward} takes {', '.join(missing)}: pip install 'rollflow[rewards]'")


@contextmanager
def loading(reward: str, source: object) -> Iterator[None]:
    """Makes one line of what a library raises while it reads a model.

    Args:
        reward: for whom, in messages.
        source: where the model is.

    Raises:
        RequestError: a package is missing.
        ModelError: the files are not such a model.
    """
    try:
        yield
    except RollflowError:
        raise
    except ImportError as error:
        raise RequestError(f"the reward {reward}: {said(error)}: pip install 'rollflow[rewards]'") from error
    except Exception as error:
        raise ModelError(f"the reward {reward} cannot load {shown(str(source))}: {said(error)}") from error


def pretrained(
    reward: str,
    kind: Any,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    read: torch.dtype = torch.float32,
) -> Any:
    """A network of transformers, of the class `kind`, from safetensors; frozen.

    Args:
        reward: for whom, in messages.
        kind: its class, or an automatic one.
        folder: of its weights.
        device, dtype: of the network.
        read: in which dtype it is read; a large one had better be read in its own.

    Raises:
        RequestError: a package is missing.
        ModelError: the folder holds no such network, or not all of its weights.
    """
    with loading(reward, folder):
        network, found = kind.from_pretrained(
            folder, dtype=read, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):
            raise ModelError(
                f"{shown(str(folder))} has no weights for {len(missing)} tensors of the reward {reward}, such as "
                f"{missing[0]}: it must hold a {type(network).__name__}"
            )
        return frozen(network, device, dtype)


def frozen(network: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A network on its device, in evaluation mode, without gradients of its weights."""
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)
