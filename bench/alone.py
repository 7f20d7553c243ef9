"""The baselines in a process of their own, where no engine's threads get into their way.

OpenMP makes idle threads wait more politely, and thereby slower to wake, where a process has more threads than cores,
as an engine's has. A loop that runs alone, as published ones do, must not pay for that.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch
from diffusers import FluxPipeline

from rollflow.bench.baselines import Baseline, diffusers_bon, sequential_rbf
from rollflow.bench.measure import OWN, peak_memory
from rollflow.bench.pipelines import pipeline_bon
from rollflow.bench.stand_ins import reward_named
from rollflow.models import silence, traits
from rollflow.models.loading import load
from rollflow.models.text import Size
from rollflow.request import Request

SEQUENTIAL_PROMPTS = 4  # of which the sequential loop runs: it costs the same a prompt however many there are
PROBE_NFE = 20


@dataclass(frozen=True)
class Timed:
    """What a baseline did, in how many seconds, with how much memory of its process."""

    baseline: Baseline
    seconds: float
    peak_memory_bytes: int
    threads: int


@dataclass(frozen=True)
class Job:
    """A run of a baseline.

    Attributes:
        contender: "sequential", of FluxPipelines, or "diffusers".
        model: a built-in name, a folder or a hub id.
        prompts: what it runs on; of the sequential loop the first few.
        nfe: budget of each prompt.
        steps: of best-of-N.
        device: where.
        dtype: of the networks.
        size: of images or clips; the sequential loop makes those of the model's own.
        reward: "count", "brightness" or "clip-sized".
        shrink: divides the layers and heads of the reward "clip-sized".
        threads: on a CPU; by default one or all, whichever suits it better.
    """

    contender: str
    model: str
    prompts: tuple[str, ...]
    nfe: int
    steps: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    size: Size = OWN
    reward: str = "count"
    shrink: int = 1
    threads: int | None = None

    def __call__(self, threads: int | None = None) -> Timed:
        """Runs it, here, on that many threads, by default on its own number of them."""
        usual, threads = torch.get_num_threads(), threads or self.threads
        torch.set_num_threads(threads or _best_threads(replace(self, prompts=("two red circles",), nfe=0)))
        found: dict[str, int] = {}
        try:
            pipeline = _pipeline(self.model, self.device, self.dtype)
            with peak_memory("", found):
                start = time.perf_counter()
                baseline = self._run(pipeline)
                if self.device != "cpu":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            return Timed(baseline, seconds, found[""], torch.get_num_threads())
        finally:
            torch.set_num_threads(usual)

    def _run(self, pipeline: Any) -> Baseline:
        reward = reward_named(self.reward, self.device, self.dtype, self.shrink)
        if self.contender == "diffusers":
            each = max(1, self.nfe // self.steps)
            if not isinstance(pipeline, FluxPipeline):
                return pipeline_bon(pipeline, self.prompts, reward, self.nfe, self.steps, each, self.size)
            height, width = self.size.height, self.size.width
            return diffusers_bon(pipeline, self.prompts, reward, self.nfe, self.steps, each, height=height, width=width)
        runs = [
            sequential_rbf(pipeline, Request(prompt, reward, nfe=self.nfe, method="rbf", seed=i), traits(self.model))
            for i, prompt in enumerate(self.prompts[:SEQUENTIAL_PROMPTS])
        ]
        return Baseline(
            sum(run.committed_nfe for run in runs),
            len(runs),
            sum(run.decodes for run in runs),
            tuple(reward for run in runs for reward in run.rewards),
        )


class Alone:
    """Runs jobs in a process of its own on a CPU, and in this one on a GPU."""

    def __init__(self, device: torch.device):
        self._pool = ProcessPoolExecutor(1, get_context("spawn")) if device.type == "cpu" else None

    def __call__(self, job: Job) -> Timed:
        """Runs a job and waits for it."""
        return job() if self._pool is None else self._pool.submit(job).result()

    def close(self) -> None:
        """Ends the process."""
        if self._pool is not None:
            self._pool.shutdown()


@cache
def _pipeline(model: str, device: str, dtype: torch.dtype) -> Any:
    silence()
    pipeline: Any = load(model, torch.device(device), dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def _best_threads(job: Job) -> int:
    """One thread or all, whichever is faster for a budget as small as can be, in turns."""
    job = replace(job, nfe=max(PROBE_NFE, job.steps))
    seconds: dict[int, list[float]] = {1: [], torch.get_num_threads(): []}
    for _ in range(4):
        for threads, times in seconds.items():
            times.append(job(threads).seconds)
    return min(seconds, key=lambda threads: statistics.median(seconds[threads][1:]))
