"""Timing of contenders in turns, and the bare parts of a search at every batch size."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.bench.baselines import bare_decode, bare_forward, bare_reward
from rollflow.device.workers import Lanes
from rollflow.engine import Engine
from rollflow.models.text import Size
from rollflow.request import Request
from rollflow.rewards import Reward

LEAST_SECONDS = 0.3  # that a part is timed for, at least, in each repetition
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
OWN = Size()  # the model's own
T = TypeVar("T")


def in_turns(
    contenders: Mapping[str, Callable[[], T]], repetitions: int, warm_up: bool = True
) -> tuple[dict[str, list[float]], dict[str, T], dict[str, int]]:
    """Runs each contender once untimed, then all in turns, so that what slows the machine slows them alike.

    Returns:
        Wall seconds of every repetition, what the last repetition returned, and its peak memory in bytes.
    """
    if warm_up:
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, T] = {}
    memory: dict[str, int] = {}
    for _ in range(repetitions):
        for name, run in contenders.items():
            gc.collect()
            with peak_memory(name, memory):
                start = time.perf_counter()
                results[name] = run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    return seconds, results, memory


@contextmanager
def peak_memory(name: str, into: dict[str, int]) -> Iterator[None]:
    """Writes the peak of device memory, or without a GPU of the process's resident memory, in bytes; 0 if unknown."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield
        into[name] = torch.cuda.max_memory_allocated()
        return
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # resets the high-water mark, see proc(5)
    yield
    into[name] = _resident("VmHWM")


def resident_memory() -> int:
    """The process's resident memory now, in bytes; 0 where the system does not say."""
    return _resident("VmRSS")


def _resident(field: str) -> int:
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


def rate(work: Callable[[], None], rows: int, lanes: Lanes, device: torch.device) -> float:
    """Rows a second of `work`, which does `rows` of them, run on all lanes at once for a while."""

    def loop(until: float) -> int:
        with torch.no_grad():
            done = 0
            while not done or time.perf_counter() < until:
                work()
                done += rows
            return done

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    count = lanes.count if lanes.parallel else 1
    for lane in [lanes.run(loop, 0.0) for _ in range(count)]:
        lane.result()
    wait()
    start = time.perf_counter()
    running = [lanes.run(loop, start + LEAST_SECONDS) for _ in range(count)]
    done = sum(lane.result() for lane in running)
    wait()
    return done / (time.perf_counter() - start)


def _images(engine: Engine, prompt: str, count: int, size: Size) -> Float[Tensor, "image *frame 3 height width"]:
    """Images that the model draws: what a reward costs may depend on what it sees."""
    asked = size._asdict()
    requests = [Request(prompt, _nothing, "bon", nfe=4, steps=4, seed=i, **asked) for i in range(count)]
    return torch.stack([result.pixels for result in engine.generate(requests)]).to(engine.model.device)


def _nothing(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.zeros(len(images))


class Parts:
    """Rows a second of the bare transformer, decoders and reward, by part and bucket, over several repetitions.

    On a CPU each is run as the engine runs it, on all lanes side by side, and on one lane with all threads; the better
    counts, so that the engine is compared with the best that the machine can do.
    """

    def __init__(self, engine: Engine, reward: Reward, prompt: str, buckets: Sequence[int], size: Size = OWN):
        model = engine.model
        self.model, self.buckets = model, buckets
        self._lanes = [engine.lanes]
        if model.device.type == "cpu" and engine.lanes.count > 1:
            self._lanes.append(Lanes(model.device, 1, torch.get_num_threads()))
        self.rates: dict[tuple[str, int], list[float]] = {}
        images = _images(engine, prompt, max(buckets), size)
        self._make: dict[str, Callable[[int], Callable[[], None]]] = {
            "transformer": lambda bucket: bare_forward(model, bucket, *size),
            "decode": lambda bucket: bare_decode(model, bucket, False, *size),
            "reward": lambda bucket: bare_reward(reward, images[:bucket], [prompt] * bucket),
        }
        if model.capabilities.preview:
            self._make["preview"] = lambda bucket: bare_decode(model, bucket, True, *size)

    def measure(self) -> None:
        """One more repetition of every part at every bucket."""
        for part, make in self._make.items():
            for bucket in self.buckets:
                work = make(bucket)
                best = max(rate(work, bucket, lanes, self.model.device) for lanes in self._lanes)
                self.rates.setdefault((part, bucket), []).append(best)

    def seconds(self, part: str) -> float:
        """Of a row, at the part's best batch size: the median over repetitions."""
        return min(1 / statistics.median(rates) for (name, _), rates in self.rates.items() if name == part)
