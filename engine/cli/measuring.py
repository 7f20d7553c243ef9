"""Counts what a model takes: bytes of its parts, tensors alive in a forward, floating-point operations."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollflow.models import Geometry
from rollflow.profile.operations import flops

SECONDS = 0.3  # that the matrix product is timed for, and a copy
SIDE = {"cpu": 1024, "cuda": 8192}  # of its matrices
COPIED = {"cpu": 2**28, "cuda": 2**29}  # bytes of each buffer of the copy: more than most caches hold


@dataclass(frozen=True)
class Cost:
    """Of rows of a forward or a decode: `base + slope` bytes of one row, `flops` and measured `seconds` of one."""

    base: int
    slope: int
    flops: int
    seconds: float

    def bytes_of(self, rows: int) -> int:
        """Of tensors that are alive at once, taken to grow by the same with each row."""
        return self.base + self.slope * rows


def parts(pipeline: Any) -> dict[str, int]:
    """Bytes of the parameters and buffers of a pipeline's networks, by name; shared ones count once."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            tensors = {id(one): one for one in (*part.parameters(), *part.buffers()) if id(one) not in seen}
            seen |= tensors.keys()
            found[name] = sum(one.nbytes for one in tensors.values())
    return found


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or available to new processes on this machine; 0 where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


Work = Callable[[], Any]


@torch.no_grad()
def costs(model: Any, geometry: Geometry, conditioning: Any, guidance: float) -> tuple[Cost, Cost]:
    """Of an evaluation, with the rows of the network that its guidance takes, and of a decode."""
    forward, decode = forwards(model, geometry, conditioning, guidance), decodes(model, geometry, model.decode)
    return _cost(forward, model.device), _cost(decode, model.device)


def forwards(model: Any, geometry: Geometry, conditioning: Any, guidance: float) -> Callable[[int], Work]:
    """An evaluation of so many rows, all of one prompt."""
    generator = torch.Generator().manual_seed(0)

    def forward(rows: int) -> Work:
        x = torch.randn(rows, geometry.token, geometry.channel, generator=generator).to(model.device, model.dtype)
        tau, scale = torch.full((rows,), 0.7, device=model.device), torch.full((rows,), guidance, device=model.device)
        return lambda: model.velocity(x, tau, [conditioning] * rows, scale, geometry)

    return forward


def decodes(model: Any, geometry: Geometry, decoder: Callable[[Tensor], Any]) -> Callable[[int], Work]:
    """A decode of so many rows by a decoder of the model's."""
    generator = torch.Generator().manual_seed(0)

    def decode(rows: int) -> Work:
        x = torch.randn(rows, geometry.token, geometry.channel, generator=generator).to(model.device)
        z = model.layout.decodable(x, geometry).to(model.dtype)
        return lambda: decoder(z)

    return decode


@torch.no_grad()
def reward_cost(
    reward: Any, pixels: tuple[int, ...], prompt: str, device: torch.device, most: int | None
) -> dict[str, Any]:
    """What a reward takes: bytes of its networks that are on `device`, and of its largest call.

    Args:
        reward: one that is called for itself.
        pixels: shape of an image or a clip.
        prompt: of each.
        device: that of the images.
        most: images of a call, should the reward not take fewer.

    Raises:
        RollflowError: it cannot be had, or does not judge such images.
    """
    from rollflow import rewards

    generator = torch.Generator().manual_seed(0)

    def call(rows: int) -> Work:
        images = torch.rand(rows, *pixels, generator=generator).to(device)
        return lambda: reward(images, [prompt] * rows)

    rewards.check(reward, prompt)
    cost = _cost(call, device)
    parts = getattr(reward, "parts", None)
    networks = networks_in((reward, parts(device) if callable(parts) else None))
    held = {id(t): t for net in networks.values() for t in (*net.parameters(), *net.buffers()) if t.device == device}
    batch = min(one for one in (rewards.batch(reward), most) if one is not None)
    resident = sum(tensor.nbytes for tensor in held.values())
    return {"resident": resident, "batch": batch, "call": cost.bytes_of(batch), "seconds": cost.seconds}


def networks_in(thing: Any, depth: int = 7) -> dict[int, nn.Module]:
    """The networks that an object holds, in attributes, containers and functions' closures, by identity."""
    if isinstance(thing, nn.Module):
        return {id(thing): thing}
    if depth == 0 or isinstance(thing, str | bytes | Tensor | type):
        return {}
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, tuple | list) else ()
    own = vars(thing).values() if hasattr(thing, "__dict__") and type(thing).__module__.startswith("rollflow") else ()
    cells = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or () if cell != CellType()]
    bound = [getattr(thing, "__self__", None), *getattr(thing, "args", ())] if callable(thing) else []
    return {key: net for one in (*inner, *own, *cells, *bound) for key, net in networks_in(one, depth - 1).items()}


def _cost(make: Callable[[int], Work], device: torch.device) -> Cost:
    one, two = make(1), make(2)
    one()  # what is loaded at the first call stays
    operations = flops(one, device)
    first, second = _peak(one), _peak(two)
    slope = max(0, second - first)
    return Cost(first - slope, slope, operations, min(seconds(one, device) for _ in range(2)))


def _peak(work: Work) -> int:
    with Alive() as alive:
        work()
    return alive.peak


def seconds(work: Work, device: torch.device) -> float:
    """How long work takes, on a GPU until that is done with it."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of large square matrices."""
    side = SIDE.get(device.type, 1024)
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device)


def copy_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second that a copy from one large buffer to another reads and writes."""
    many = COPIED.get(device.type, COPIED["cpu"]) // dtype.itemsize
    a, b = (torch.ones(many, device=device, dtype=dtype) for _ in range(2))
    return 2 * a.nbytes / _best(lambda: b.copy_(a), device)


def _best(work: Work, device: torch.device) -> float:
    """The seconds of the fastest of many runs."""
    best, until = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < until:
        best = min(best, seconds(work, device))
    return best


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it: `now`, and at most, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation; what it is given was there before, unless it was seen to be made."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), 0)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage, size: int | None = None) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if size is None else size
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, size).atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
