"""`rollflow batch`: searches for every line of a file, however many, and whatever ends the process."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rollflow.cli.options import ModelOptions, SearchOptions, by_default
from rollflow.errors import BudgetError, RequestError, shown

if TYPE_CHECKING:
    from rollflow.request import Request
    from rollflow.serve.batch import State
    from rollflow.serve.shards import Counts, Shards

EVERY = 60.0  # seconds between lines of progress where standard error is no terminal
Lines = Annotated[Path, tyro.conf.arg(metavar="FILE")]
Out = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
Form = Annotated[str, tyro.conf.arg(metavar="parquet|embedded|webdataset")]
Cores = Annotated[int | None, by_default("all, divided by the workers")]
Window = Annotated[int | None, by_default("64 for each worker")]


@dataclass(frozen=True)
class Batch:
    """Search for every line of a file; write images, and what was found as Parquet or as tar files of WebDataset.

    A line is a prompt, or a JSON object with a "prompt", perhaps an "id", and any other field of a request, such as
    "reward", "method", "nfe" or "seed"; what it leaves out is as the options say. The same command goes on where an
    earlier one ended, however it ended, and does no line twice. The exit code is 1 if a line failed. While a reward is
    not available lines wait; after many in a row the batch ends with exit code 2, to be gone on with later.
    """

    lines: tyro.conf.Positional[Lines]
    """The file."""
    out: Out
    """Folder for what is found; made if it is not there."""
    format: Form = "parquet"
    """parquet: a row a line, and images as files; embedded: with the images' bytes in the rows; webdataset: tar
    files."""
    shard: int = 1000
    """Lines of the file that one file of the output stands for."""
    workers: int = 1
    """Engines; more than one are processes of their own, which share the cores, or have a GPU each."""
    ray: bool = False
    """Run the workers as actors of a Ray cluster."""
    cores: Cores = None
    """Cores of each of several workers, where they have no GPU."""
    window: Window = None
    """Searches that are there at a time."""
    strict: bool = False
    """End at the first line that fails, in place of writing down why it did."""
    retry_failed: bool = False
    """Do lines again that failed before; their shards are written anew."""
    search: SearchOptions = field(default_factory=SearchOptions)
    runtime: ModelOptions = field(default_factory=ModelOptions)

    def __call__(self) -> int:
        """Runs the command; returns 1 if a line failed."""
        self.runtime.check()
        from rollflow import wire
        from rollflow.serve.formats import WRITERS
        from rollflow.serve.lines import source
        from rollflow.serve.shards import Shards

        for name in ("shard", "workers", "cores", "window"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise RequestError(f"--{name} {given}: it must be at least 1")
        if self.format not in WRITERS:
            raise RequestError(f"--format {shown(self.format)}: choose one of {', '.join(WRITERS)}")
        WRITERS[self.format].check()
        defaults = wire.to_json(self._checked())
        del defaults["prompt"]
        options = {"shard": self.shard, **self._model(), **defaults}
        shards = Shards(self.out, source(self.lines, self.shard), options, self.format, self.retry_failed)
        try:
            with following(shards.counts.lines, shards.source.total) as told:
                counts = shards.counts
                if counts.lines < shards.source.total:
                    counts = asyncio.run(self._run(shards, defaults, told))
        finally:
            shards.close()
        failed = f", {counts.failed} failed" if counts.failed else ""
        print(f"{counts.lines} lines{failed}, {counts.nfe} NFE in all: {self.out}")
        if counts.failed:
            print("why is in the column error of those rows; --retry-failed does them again", file=sys.stderr)
        return 1 if counts.failed else 0

    def _checked(self) -> Request:
        """What the options ask for, of any prompt; raises `RequestError` for what would fail every line."""
        from rollflow.cli.judging import check_weights
        from rollflow.models import traits
        from rollflow.plan import plan

        request = self.search.request("two red circles")
        check_weights([request])
        if request.grid != "model":
            with suppress(BudgetError):  # lines may have their own
                plan(request, traits(self.runtime.model), self.runtime.preview)
        return request

    def _model(self) -> dict[str, Any]:
        """What the results depend on, besides the lines."""
        names = ("model", "pipeline", "dtype", "preview", "reproducible")
        return {name: value for name in names if (value := getattr(self.runtime, name)) not in (None, False)}

    async def _run(self, shards: Shards, defaults: dict[str, Any], told: Callable[[State], None]) -> Counts:
        from rollflow.cli.workers import channels
        from rollflow.serve.batch import run
        from rollflow.serve.desk import Desk

        window = self.window or 64 * self.workers
        desk = Desk(channels(self.runtime, self.workers, self.ray, self.cores), max_queued=2 * window, keep=0.0)
        await desk.start()
        try:
            return await run(desk, shards, defaults, window=window, strict=self.strict, told=told)
        finally:
            await desk.close(0.0)


@contextmanager
def following(done: int, total: int) -> Iterator[Callable[[State], None]]:
    """Shows how far a batch is on standard error: a bar on a terminal, elsewhere a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rest]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, last = bar.add_task("lines", total=total, completed=done, rest=""), time.monotonic()

        def told(state: State) -> None:
            nonlocal last
            rest = told_text(state)
            bar.update(task, completed=state.counts.lines, rest=rest)
            if not console.is_terminal and time.monotonic() - last >= EVERY:
                last = time.monotonic()
                print(f"{state.counts.lines}/{state.total} lines, {rest}", file=sys.stderr)

        yield told


def told_text(state: State) -> str:
    """Failures, speed and the time that is left, as far as they are known."""
    parts = [f"{state.counts.failed} failed"] if state.counts.failed else []
    if state.nfe_per_second is not None:
        parts.append(f"{state.nfe_per_second:.3g} NFE/s")
    if state.left is not None:
        minutes, seconds = divmod(round(state.left), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"{hours}:{minutes:02d}:{seconds:02d} left")
    return ", ".join(parts)
