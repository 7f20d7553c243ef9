"""`rollflow profile`: searches that are recorded, with a report of where every evaluation went and what it bought."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rollflow.cli.folders import writable
from rollflow.cli.options import ModelOptions, SearchOptions, by_default
from rollflow.errors import RequestError, RollflowError, said, shown

if TYPE_CHECKING:
    from rollflow.engine import Engine
    from rollflow.job import Job
    from rollflow.profile.recording import Recording
    from rollflow.request import Request

Prompts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...", help_behavior_hint="(or --requests)")]
Usd = Annotated[float | None, by_default("not told")]

LIMITS = {
    "nothing": "nothing limits: no request was here for {share}",
    "rewards": "rewards limit: lanes waited for them for {share}",
    "host": "the host limits: it takes {share}",
    "rows": "too few rows limit: there was none to run for {share}",
    "chores": "chores (encodings, measurements, pictures) limit: they take {share}",
}


@dataclass(frozen=True)
class Profile:
    """Record searches: where every function evaluation went, and what it bought.

    Writes into --out: report.html; trace.json.gz for ui.perfetto.dev; ledger.parquet (a row an evaluation),
    batches.parquet, calls.parquet, requests.parquet and recording.json, of which `rollflow what-if` predicts other runs
    and `rollflow profile diff A B` tells what got slower; and images/. The model is loaded and batches are measured
    before the recording begins. `rollflow profile --roofline` counts what an evaluation costs instead.
    """

    prompts: tyro.conf.Positional[Prompts] = ()
    """What the images should show, each prompt in quotes."""
    requests: Annotated[Path | None, by_default("none")] = None
    """A file with a request a line, as JSON: {"prompt": "...", "method": "rbf", "nfe": 200}; what it leaves out is as
    the options say. "at" is when it comes, in seconds from the first."""
    out: Path = Path("profile")
    """Folder for all that is written; made if it is not there."""
    repetitions: int = 1
    """How often everything runs and is recorded; with several, into OUT/1, OUT/2, ... for `rollflow profile diff`."""
    kernels: bool = False
    """Record operators and kernels by torch.profiler, too, for the trace; it slows everything down."""
    usd_per_hour: Usd = None
    """What the device costs an hour, for the cost of an image."""
    looks: bool = True
    """Take pictures of the first 16 searches on their way, each at the cost of a decode."""
    roofline: bool = False
    """Count what an evaluation of this model costs: operations, bytes, and the share of what the machine can do."""
    search: SearchOptions = field(default_factory=SearchOptions)
    runtime: ModelOptions = field(default_factory=ModelOptions)

    def __call__(self) -> None:
        """Runs the command."""
        self.runtime.check()
        if self.roofline:
            from rollflow.cli.roofline import roofline

            roofline(self.runtime, self.search, self.out)
            return
        asked = self._asked()
        if self.usd_per_hour is not None and not self.usd_per_hour > 0:
            raise RequestError(f"--usd-per-hour {self.usd_per_hour:g}: it must be above 0; leave it out for no dollars")
        if self.repetitions < 1:
            raise RequestError(f"--repetitions {self.repetitions}: everything runs at least once")
        from rollflow.cli.judging import check_weights
        from rollflow.profiling import check_installed

        check_installed()
        check_weights([request for _, request in asked])
        with writable(self.out, ["report.html", "recording.json"]), self.runtime.load() as engine:
            _check(engine, [request for _, request in asked])
            _warm_up(engine, [request for _, request in asked])
            for repetition in range(1, self.repetitions + 1):
                folder = self.out if self.repetitions == 1 else self.out / str(repetition)
                self._record(engine, asked, folder)

    def _record(self, engine: Engine, asked: list[tuple[float, Request]], folder: Path) -> None:
        from rollflow.cli.output import progress_bar

        with progress_bar() as bar:
            bar.start(None)
            with engine.profile(folder, self.usd_per_hour, self.kernels) as profile:
                jobs = _submitted(engine, asked)
                profile.follow(jobs, **({} if self.looks else {"moments": ()}))
        failed = _failures(jobs)
        if len(failed) == len(jobs):
            raise failed[0]
        _print(profile.recording, folder)
        for error in failed:
            print(f"rollflow: warning: {error}", file=sys.stderr)

    def _asked(self) -> list[tuple[float, Request]]:
        """The requests, and when each comes: seconds from the first."""
        if bool(self.prompts) == (self.requests is not None):
            raise RequestError(
                'give either prompts, in quotes, or a file of requests: rollflow profile "two red circles" --out DIR'
            )
        if self.requests is None:
            return [(0.0, self.search.request(prompt)) for prompt in self.prompts]
        return read_requests(self.requests, self.search)


def read_requests(path: Path, search: SearchOptions) -> list[tuple[float, Request]]:
    """Requests of a file, a JSON object a line, and when each comes.

    Raises:
        RequestError: the file cannot be read, or a line is no request; it says which.
    """
    try:
        lines = [*enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    except (OSError, UnicodeError) as error:
        raise RequestError(f"--requests {shown(str(path))}: it cannot be read ({said(error)})") from error
    found = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            found.append(_request(json.loads(line), search))
        except (ValueError, RollflowError) as error:
            raise RequestError(f"--requests {shown(str(path))}, line {number}: {error}") from error
    if not found:
        raise RequestError(f"--requests {shown(str(path))}: there is no request in it, write one as JSON on each line")
    first = min(when for when, _ in found)
    return sorted(((when - first, request) for when, request in found), key=lambda one: one[0])


def _request(content: Any, search: SearchOptions) -> tuple[float, Request]:
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise RequestError('a request is an object with a prompt, such as {"prompt": "two red circles", "nfe": 200}')
    given = dict(content)
    when, prompt, options = given.pop("at", 0.0), given.pop("prompt"), given.pop("options", {})
    if not isinstance(when, int | float) or not 0 <= when < 1e9:
        raise RequestError(f"at={shown(when)}: it must be seconds from 0 on")
    known = [one.name for one in fields(search) if one.name not in ("own", "image", "mask")]
    if unknown := [name for name in given if name not in known]:
        raise RequestError(f"unknown field {shown(unknown[0])}: there are prompt, at, options, {', '.join(known)}")
    from rollflow import checks

    if not isinstance(options, Mapping):
        raise RequestError(f"options={shown(options)}: they must be an object of the method's options")
    if wrong := [name for name in ("reward", "held_out") if not isinstance(given.get(name, ""), str)]:
        raise RequestError(f"{wrong[0]}={shown(given[wrong[0]])}: it must be the name or the expression of a reward")
    request = replace(search, **given).request(prompt)
    request = replace(request, options={**request.options, **options})
    checks.request(request)  # numbers; what depends on the model is checked when it is there
    return float(when), request


def _submitted(engine: Engine, asked: list[tuple[float, Request]]) -> list[Job]:
    """Hands requests in when they come; those that come together all at once."""
    import time

    jobs, began = [], time.monotonic()
    for when, request in asked:
        if (left := began + when - time.monotonic()) > 0:
            time.sleep(left)
        jobs.append(engine.submit(request))
    return jobs


def _check(engine: Engine, requests: list[Request]) -> None:
    """Raises `RequestError` for a request that cannot be honoured, before anything runs."""
    for number, request in enumerate(requests, 1):
        try:
            engine._door.check(request, {})
        except RollflowError as error:
            raise RequestError(f"request {number} of {len(requests)}, {shown(request.prompt)}: {error}") from error


def _warm_up(engine: Engine, requests: list[Request]) -> None:
    """Measures what batches cost of every image size, before anything is recorded."""
    for size in dict.fromkeys((one.height, one.width, one.frames) for one in requests):
        engine.warm_up(*size)


def _failures(jobs: list[Job]) -> list[RollflowError]:
    found = []
    for job in jobs:
        try:
            job.result()
        except RollflowError as error:
            found.append(error)
    return found


def graph_lines(recording: Recording) -> Iterator[str]:
    """What the CUDA graphs of each image size hold of the device's memory; nothing where there are none."""
    from rollflow.cli.reports import memory

    for size in recording.about["sizes"]:
        if held := size.get("graph_bytes"):
            yield "CUDA graphs of {height}x{width} hold {held}".format(**size["geometry"], held=memory(held))


def _print(recording: Recording, folder: Path) -> None:
    from rollflow.profile.report.figures import figures

    found = figures(recording)
    total, limit = found["totals"], found["limit"]
    limits = LIMITS.get(limit["what"], f"{limit['what']} limits: it takes {{share}}")
    print(f"{limits.format(share=format(limit['share'], '.0%'))} of the lanes' time")
    rate = f"{total['committed_per_second']:.0f} NFE/s, {total['images_per_second']:.2f} images/s"
    many = "request" if total["requests"] == 1 else "requests"
    print(f"  {total['committed_nfe']} NFE of {total['requests']} {many} in {recording.seconds:.1f} s: {rate}")
    for held in graph_lines(recording):
        print(f"  {held}")
    for name in ("report.html", "trace.json.gz", "ledger.parquet"):
        print(f"  {folder / name}")
