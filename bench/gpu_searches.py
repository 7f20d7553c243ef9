"""Searches on a geometry with decode and reward in the loop: the engine in several ways, and the sequential loop."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from rollflow.bench import prompt_sets
from rollflow.bench.baselines import Baseline, sequential_rbf
from rollflow.bench.gpu_parts import QUICK_BUCKETS, Deadline, Row, Subject
from rollflow.bench.gpu_time import SHARES, shares
from rollflow.bench.measure import in_turns
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.models import traits
from rollflow.request import Request, Result

PATH: dict[str, Any] = {"interpolant": "vp", "grid": "paper", "diffusion": 3.0}  # the paper's VP-SDE
LANES_2, LANES_1, EAGER, LIGHT = "engine, 2 lanes", "engine, 1 lane", "engine, eager", "engine, light decoder"
BON, SEQUENTIAL = "engine, bon", "sequential"  # best-of-N is run by the engine of two lanes
OPTIONS: dict[str, dict[str, Any]] = {
    LANES_2: {"lanes": 2},
    LIGHT: {"lanes": 2, "preview": True},
    LANES_1: {"lanes": 1},
    EAGER: {"lanes": 2, "graphs": False},
}


class Budget(NamedTuple):
    """What searches a geometry gets.

    Attributes:
        prompts: numbers of prompts that are searched for together.
        nfe: of each prompt.
        steps: points of the time grid.
        sequential: NFE of the sequential loop.
        engines: which of `OPTIONS`, the first of which runs best-of-N, too.
        repetitions: how often each contender runs, at most.
    """

    prompts: tuple[int, ...]
    nfe: int
    steps: int
    sequential: int
    engines: tuple[str, ...]
    repetitions: int = 2

    def quick(self) -> Budget:
        """The least that runs through everything."""
        steps = min(3, self.steps)
        return self._replace(prompts=(2,), nfe=steps + 2, steps=steps, sequential=steps + 1)


SEARCHES = {
    "shapes": Budget((16, 64), 60, 10, 20, (LANES_2, LANES_1, EAGER)),
    "sd3": Budget((8,), 20, 10, 12, (LANES_2, LIGHT, LANES_1, EAGER)),
    # An evaluation takes a fifth of a second, and graphs gain 3 %: more prompts once say more than fewer twice.
    "flux": Budget((4,), 10, 6, 8, (LANES_2, LIGHT, LANES_1), 1),
}


class Searched(NamedTuple):
    """What a run of the engine gave.

    Attributes:
        results: of its requests.
        finals: images that were decoded in full for what is returned.
        shares: of the wall time, see `rollflow.bench.gpu_time`.
    """

    results: list[Result]
    finals: int
    shares: Mapping[str, float]


Run = Callable[[], Baseline | Callable[[], Searched]]


def searches(subject: Subject, budget: Budget, repetitions: int, quick: bool, deadline: Deadline) -> Iterator[Row]:
    """RBF by the engines of the budget, best-of-N, and the sequential loop; in turns.

    The engines get the batch sizes up to the one that the bare transformer is best at. The loop runs one prompt, and on
    the engine's own pipeline: there is no memory to waste on a second. Where the engine's measured costs do not let the
    searches end in time, they get fewer evaluations.
    """
    buckets = QUICK_BUCKETS if quick else subject.paying
    options: dict[str, Any] = {"traits": traits(subject.name), "buckets": buckets}
    engines = {name: Engine(subject.model, **options, **OPTIONS[name]) for name in budget.engines}
    prompts = prompt_sets.load("medium", 100)
    asked, least = list(enumerate(prompts[: max(budget.prompts)])), budget.steps + 1
    for engine in engines.values():  # measures batches, captures graphs, loads what loads lazily, and fills the batches
        engine.encode([prompt for _, prompt in asked])
        engine.generate([_request(subject, prompt, seed, least, budget.steps) for seed, prompt in asked])
    alone = partial(_sequential, subject, prompts[0], budget.steps)
    start = deadline.clock()
    alone(least)
    repetitions = min(repetitions, budget.repetitions)
    loop = (deadline.clock() - start) / least * repetitions * budget.sequential
    first = engines[budget.engines[0]]
    each = seconds_a_row(first, subject)
    for place, count in enumerate(budget.prompts):
        share = 0.7 * deadline.left / (len(budget.prompts) - place) - loop
        affordable = int(share / (repetitions * (len(engines) + 1) * count * each))
        if affordable < least:
            raise RequestError(f"{deadline.left:.0f} s are too few for {count} searches at {1000 * each:.0f} ms a row")
        nfe = min(budget.nfe, affordable)
        runs: dict[str, Run] = {}
        for name, engine in engines.items():
            # One image in full: of searches as short as these, several would cost what the light decoder saves.
            more: dict[str, Any] = {"finalists": 1} if name == LIGHT else {}
            requests = [_request(subject, p, i, nfe, budget.steps, **more) for i, p in asked[:count]]
            runs[name] = _search(engine, requests)
        bon = [_request(subject, p, i, nfe, budget.steps, "bon") for i, p in asked[:count]]
        runs[BON] = _search(first, bon)
        runs[SEQUENTIAL] = partial(alone, budget.sequential)
        held = {name: {"graph_bytes": graph_memory(engine)} for name, engine in engines.items()}
        held[BON] = held[budget.engines[0]]
        for row in _compared(subject, runs, count, nfe, budget.steps, repetitions, deadline):
            yield {**row, **held.get(row["contender"], {})}


def seconds_a_row(engine: Engine, subject: Subject) -> float:
    """What a row costs at the best batch size, its reward included, as measured."""
    least = min(seconds / bucket for bucket, seconds in engine.buckets().items())
    return least + subject.seconds.get("reward", 0.0)


def graph_memory(engine: Engine) -> int:
    """Bytes of device memory that the engine's CUDA graphs and their inputs hold; 0 without graphs."""
    return sum(engine._host.runner.graph_memory.values())


def _request(
    subject: Subject, prompt: str, seed: int, nfe: int, steps: int, method: str = "rbf", **more: Any
) -> Request:
    path = PATH if method == "rbf" else {}
    return Request(prompt, subject.reward, method, nfe, steps, seed=seed, **path, **more)


def _search(engine: Engine, requests: list[Request]) -> Run:
    """A run, which returns what reads its results: what the ledger says of it is added up when its time is over."""
    ledger = engine.ledger

    def run() -> Callable[[], Searched]:
        since, full, begin = ledger.written, ledger.decoded["full"], ledger.clock()
        results = engine.generate(requests)
        end, decoded = ledger.clock(), ledger.decoded["full"] - full

        def read() -> Searched:
            finals = decoded if engine.preview else len(results)
            return Searched(results, finals, shares(ledger.snapshot(since)[0]["batches"], begin, end))

        return read

    return run


def _sequential(subject: Subject, prompt: str, steps: int, nfe: int) -> Baseline:
    return sequential_rbf(subject.alone, _request(subject, prompt, 0, nfe, steps), traits(subject.name))


def _compared(
    subject: Subject, runs: dict[str, Run], count: int, nfe: int, steps: int, repetitions: int, deadline: Deadline
) -> Iterator[Row]:
    """Rows of all contenders, each with its ratio to the sequential loop."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, Baseline | Searched] = {}
    memory: dict[str, int] = {}
    for _ in range(repetitions):
        last = sum(seconds[-1] for seconds in taken.values() if seconds)
        if not deadline.allows(last):
            warnings.warn(f"{subject.of.name}: fewer repetitions than asked for, no time", RuntimeWarning, stacklevel=2)
            break
        for name, run in runs.items():
            seconds, results, peak = in_turns({name: run}, 1, warm_up=False)
            taken[name] += seconds[name]
            memory[name], result = peak[name], results[name]
            found[name] = result if isinstance(result, Baseline) else result()
    rows = {name: _row(subject, name, run, taken[name], memory[name]) for name, run in found.items()}
    alone = rows[SEQUENTIAL]["nfe_per_second"]
    for name, row in rows.items():
        cuda = subject.device.type == "cuda" and OPTIONS.get(name, {}).get("graphs", name == BON or name in OPTIONS)
        yield {
            "contender": name,
            **subject.row,
            "mode": "graph" if cuda else "eager",
            "method": "bon" if name == BON else "rbf",
            "reward": subject.reward.name,
            "prompts": count,
            "nfe": nfe,
            "steps": steps,
            **row,
            "over_sequential": row["nfe_per_second"] / alone,
        }


def _row(subject: Subject, name: str, run: Baseline | Searched, seconds: list[float], memory: int) -> Row:
    """What a search did; `efficiency` and `of_parts` are the bare times, best bucket and mode, over the wall time."""
    if isinstance(run, Baseline):
        committed, executed, judged, finals = run.committed_nfe, run.committed_nfe, run.decodes, 0
        found: Mapping[str, float] = {}
    else:
        committed = sum(result.committed_nfe for result in run.results)
        executed = sum(result.executed_nfe for result in run.results)
        judged = sum(record.reward is not None for result in run.results for record in result.history)
        finals, found = run.finals, run.shares
    wall, bare = statistics.median(seconds), subject.seconds
    row: Row = {
        "committed_nfe": committed,
        "judged": judged + finals,
        "seconds": seconds,
        "nfe_per_second": committed / wall,
        "milliseconds_per_nfe": 1000 * wall / committed,
        "executed_over_committed": executed / committed,
        "peak_memory_bytes": memory,
        **{f"share_{part}": found[part] for part in SHARES if found},
    }
    decoder = "preview" if name == LIGHT else "decode"
    if "transformer" in bare:
        row["efficiency"] = committed * bare["transformer"] / wall
        if {"decode", decoder, "reward"} <= bare.keys():
            beside = judged * bare[decoder] + finals * bare["decode"] + (judged + finals) * bare["reward"]
            row["of_parts"] = row["efficiency"] + beside / wall
    return row
