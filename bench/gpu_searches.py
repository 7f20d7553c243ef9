"""Searches on a geometry with decode and reward in the loop: the engine in several ways, and the sequential loop."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from rollflow.bench import prompt_sets
from rollflow.bench.baselines import Baseline, sequential_rbf
from rollflow.bench.gpu_parts import QUICK_BUCKETS, Deadline, Row, Subject
from rollflow.bench.measure import in_turns
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.models import traits
from rollflow.request import Request, Result

Run = Callable[[], Baseline | list[Result]]

PATH: dict[str, Any] = {"interpolant": "vp", "grid": "paper", "diffusion": 3.0}  # the paper's VP-SDE


class Budget(NamedTuple):
    """What searches a geometry gets: numbers of prompts, NFE of each and points of its grid; NFE of the loop."""

    prompts: tuple[int, ...]
    nfe: int
    steps: int
    sequential: int

    def quick(self) -> Budget:
        """The least that runs through everything."""
        steps = min(3, self.steps)
        return Budget((2,), steps + 2, steps, steps + 1)


SEARCHES = {
    "shapes": Budget((16, 64), 100, 10, 20),
    "sd3": Budget((8,), 24, 10, 12),
    "flux": Budget((2,), 12, 6, 8),
}


def searches(subject: Subject, budget: Budget, repetitions: int, quick: bool, deadline: Deadline) -> Iterator[Row]:
    """RBF by the engine with one lane and two, without graphs, best-of-N, and the sequential loop; in turns.

    The loop runs one prompt, and on the engine's own pipeline: there is no memory to waste on a second. Where the
    engine's measured costs do not let the searches end in time, they get fewer evaluations.
    """
    options: dict[str, Any] = {"traits": traits(subject.name), "buckets": QUICK_BUCKETS if quick else None}
    engines = {
        "engine, 2 lanes": Engine(subject.model, lanes=2, **options),
        "engine, 1 lane": Engine(subject.model, lanes=1, **options),
        "engine, eager": Engine(subject.model, lanes=2, graphs=False, **options),
    }
    prompts = prompt_sets.load("medium", 100)
    for engine in engines.values():  # measures batches, captures graphs, loads what loads lazily
        engine.encode(prompts[: max(budget.prompts)])
        engine.generate(_request(subject, prompts[0], 0, budget.steps + 1, budget.steps))
    alone = partial(_sequential, subject, prompts[0], budget.steps)
    start = deadline.clock()
    alone(budget.steps + 1)
    loop = (deadline.clock() - start) / (budget.steps + 1) * repetitions * budget.sequential
    each = seconds_a_row(engines["engine, 2 lanes"], subject)
    for place, count in enumerate(budget.prompts):
        share = 0.7 * deadline.left / (len(budget.prompts) - place) - loop
        affordable = int(share / (repetitions * (len(engines) + 1) * count * each))
        if affordable < budget.steps + 1:
            raise RequestError(f"{deadline.left:.0f} s are too few for {count} searches at {1000 * each:.0f} ms a row")
        nfe = min(budget.nfe, affordable)
        asked = list(enumerate(prompts[:count]))
        runs: dict[str, Run] = {}
        for name, engine in engines.items():
            runs[name] = _search(engine, [_request(subject, p, i, nfe, budget.steps) for i, p in asked])
        bon = [_request(subject, p, i, nfe, budget.steps, "bon") for i, p in asked]
        runs["engine, bon"] = _search(engines["engine, 2 lanes"], bon)
        runs["sequential"] = partial(alone, budget.sequential)
        yield from _compared(subject, runs, count, nfe, budget.steps, repetitions, deadline)


def seconds_a_row(engine: Engine, subject: Subject) -> float:
    """What a row costs at the best batch size, its reward included, as measured."""
    least = min(seconds / bucket for bucket, seconds in engine.buckets().items())
    return least + subject.seconds.get("reward", 0.0)


def _request(subject: Subject, prompt: str, seed: int, nfe: int, steps: int, method: str = "rbf") -> Request:
    path = PATH if method == "rbf" else {}
    return Request(prompt, subject.reward, method, nfe, steps, seed=seed, **path)


def _search(engine: Engine, requests: list[Request]) -> Run:
    return lambda: engine.generate(requests)


def _sequential(subject: Subject, prompt: str, steps: int, nfe: int) -> Baseline:
    return sequential_rbf(subject.model.pipeline, _request(subject, prompt, 0, nfe, steps), traits(subject.name))


def _compared(
    subject: Subject, runs: dict[str, Run], count: int, nfe: int, steps: int, repetitions: int, deadline: Deadline
) -> Iterator[Row]:
    """Rows of all contenders, each with its ratio to the sequential loop."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        last = sum(seconds[-1] for seconds in taken.values() if seconds)
        if not deadline.allows(last):
            warnings.warn(f"{subject.of.name}: fewer repetitions than asked for, no time", RuntimeWarning, stacklevel=2)
            break
        seconds, results, memory = in_turns(runs, 1, warm_up=False)
        for name in runs:
            taken[name] += seconds[name]
    rows = {name: _row(subject, run, taken[name], memory[name]) for name, run in results.items()}
    alone = rows["sequential"]["nfe_per_second"]
    for name, row in rows.items():
        cuda = subject.device.type == "cuda" and name.startswith("engine") and "eager" not in name
        yield {
            "contender": name,
            **subject.row,
            "mode": "graph" if cuda else "eager",
            "method": "bon" if "bon" in name else "rbf",
            "reward": subject.reward.name,
            "prompts": count,
            "nfe": nfe,
            "steps": steps,
            **row,
            "over_sequential": row["nfe_per_second"] / alone,
        }


def _row(subject: Subject, run: Baseline | list[Result], seconds: list[float], memory: int) -> Row:
    """What a search did; `efficiency` and `of_parts` are the bare times, best bucket and mode, over the wall time."""
    if isinstance(run, Baseline):
        committed, executed, judged = run.committed_nfe, run.committed_nfe, run.decodes
    else:
        committed, executed = sum(r.committed_nfe for r in run), sum(r.executed_nfe for r in run)
        judged = sum(record.reward is not None for r in run for record in r.history) + len(run)
    wall, bare = statistics.median(seconds), subject.seconds
    row: Row = {
        "committed_nfe": committed,
        "judged": judged,
        "seconds": seconds,
        "nfe_per_second": committed / wall,
        "milliseconds_per_nfe": 1000 * wall / committed,
        "executed_over_committed": executed / committed,
        "peak_memory_bytes": memory,
    }
    if "transformer" in bare:
        row["efficiency"] = committed * bare["transformer"] / wall
        if "decode" in bare and "reward" in bare:
            row["of_parts"] = row["efficiency"] + judged * (bare["decode"] + bare["reward"]) / wall
    return row
