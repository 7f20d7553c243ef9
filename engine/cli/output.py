"""What the command line shows and writes: the progress bar, results as text and as JSON, the demo's table and grid."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import rollflow
from rollflow import rewards
from rollflow.methods import title

if TYPE_CHECKING:
    from rollflow.calls import Progress as State
    from rollflow.request import Request, Result

IMAGE, MARGIN, LINE = 192, 16, 18  # pixels: an image's width in the grid, the space around it, a line of text
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)

Pair = tuple["Result", "Result"]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def number(value: float | None) -> str:
    """A score with four significant digits, six where it is large; "-" where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value + 0.0:.{4 if abs(value) < 1000 else 6}g}"  # + 0.0: no "-0"


def names(requests: Sequence[Request]) -> list[str]:
    """A file name for each request, made of its prompt and seed; distinct among `requests`."""
    taken: list[str] = []
    for request in requests:
        slug = re.sub(r"[\W_]+", "-", request.prompt.lower()).strip("-")[:48].rstrip("-") or "image"
        name = plain = f"{slug}-seed{request.seed}"
        copy = 1
        while name in taken:
            copy += 1
            name = f"{plain}-{copy}"
        taken.append(name)
    return taken


def summary(result: Result) -> str:
    """The scores and the cost of a result in one line."""
    held_out = "" if result.held_out is None else f", held-out {number(result.held_out)}"
    terms = ", ".join(f"{name} {number(term)}" for name, term in (result.terms or {}).items())
    scores = f"reward {number(result.reward)}{terms and f' ({terms})'}{held_out}"
    return f"{scores}, {result.committed_nfe} NFE, {result.seconds:.1f} s"


def record(result: Result, **files: Path | None) -> dict[str, Any]:
    """A result as JSON can hold it: of its pixels nothing, and of what it started from the shapes.

    `files` are where fields of the request come from, by name; they stand in place of the shapes.
    """
    request = {
        name: {"shape": [*value.shape]} if isinstance(value, Tensor) else value
        for name, value in vars(result.request).items()
    } | {name: str(file) for name, file in files.items() if file is not None}
    own = {
        "method": title(result.request.method), "reward": _judge(result.request.reward),
        "held_out": _judge(result.request.held_out),
    }  # fmt: skip
    return {
        "request": {**request, **own, "options": dict(result.request.options)},
        "reward": _finite(result.reward),
        "terms": _all_finite(result.terms),
        "held_out": _finite(result.held_out),
        "committed_nfe": result.committed_nfe,
        "cached_nfe": result.cached_nfe,
        "executed_nfe": result.executed_nfe,
        "network_rows": result.network_rows,
        "frames": len(result.pixels) if result.pixels.ndim == 4 else None,
        "stopped": result.stopped,
        "seconds": round(result.seconds, 3),
        "versions": {"rollflow": rollflow.__version__, "torch": version("torch"), "diffusers": version("diffusers")},
        "history": [
            {**asdict(row), "reward": _finite(row.reward), "terms": _all_finite(row.terms)} for row in result.history
        ],
        "notes": [{name: _plain(value) for name, value in note.items()} for note in result.notes],
    }


def _plain(value: Any) -> Any:
    """What JSON can hold of a method's note: numbers that are none become null, what it does not know becomes text."""
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, str | int) else str(value)


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity: they become null."""
    return value if value is not None and math.isfinite(value) else None


def _all_finite(values: Mapping[str, float] | None) -> dict[str, float | None] | None:
    return None if values is None else {name: _finite(value) for name, value in values.items()}


def _judge(reward: Any) -> str | None:
    """What a file calls a reward."""
    return reward if reward is None or isinstance(reward, str) else rewards.title(reward)


class Bar:
    """A progress bar of function evaluations on standard error; shows nothing where that is no terminal."""

    def __init__(self, bar: Progress):
        self._bar = bar
        self._task = bar.add_task("loading the model", total=None, best="", count="")

    def start(self, nfe: int | None) -> None:
        """Begins to count up to `nfe` evaluations; None where the time decides how many there will be."""
        self._bar.update(self._task, description="searching", total=nfe, count=_count(0, nfe))

    def update(self, state: State) -> None:
        """An `on_progress` callback of `Engine.generate`; of several requests it shows the mean of the best rewards."""
        done, rewards = sum(state.committed_nfe), [r for r in state.best_reward if math.isfinite(r)]
        label = "best reward" if len(state.best_reward) == 1 else "mean best reward"
        best = f"{label} {number(sum(rewards) / len(rewards))}" if rewards else ""
        count = _count(done, self._bar.tasks[self._task].total)
        self._bar.update(self._task, completed=done, count=count, best=best)


def _count(done: int, total: float | None) -> str:
    return f"{done} NFE" if total is None else f"{done}/{total:.0f} NFE"


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """A `Bar` that disappears at the end of the block."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Bar(bar)


def print_table(pairs: Sequence[Pair]) -> None:
    """Prints the scores of (base, search) results, a line a prompt, to standard output."""
    table = Table(box=SIMPLE_HEAD, caption="seconds from start to end of each search; all share the forwards")
    table.add_column("\nprompt")
    method = title(pairs[0][1].request.method)
    for judge in ("reward", "held-out"):
        for name in ("base", method):
            table.add_column(f"{name}\n{judge}", justify="right", no_wrap=True)
    for name in ("NFE", "seconds"):
        table.add_column(f"\n{name}", justify="right", no_wrap=True)
    for base, search in pairs:
        scores = (base.reward, search.reward, base.held_out, search.held_out)
        row = [*map(number, scores), str(search.committed_nfe), f"{search.seconds:.1f}"]
        table.add_row(search.request.prompt, *row)
    Console(file=sys.stdout).print(table)


def grid(pairs: Sequence[Pair]) -> Image.Image:
    """A picture of (base, search) results: a row a prompt, captioned, the scores below each image."""
    font = ImageFont.load_default(size=13)
    width = 2 * IMAGE + 3 * MARGIN
    blocks = [_block(base, search, width, font) for base, search in pairs]
    header = Image.new("RGB", (width, LINE + MARGIN), PAPER)
    pen = ImageDraw.Draw(header)
    names = "base sample", title(pairs[0][1].request.method)
    for column, (name, result) in enumerate(zip(names, pairs[0], strict=True)):
        text = f"{name}, {result.committed_nfe} NFE"
        pen.text((MARGIN + column * (IMAGE + MARGIN), MARGIN), text, font=font, fill=FAINT)
    parts = [header, *blocks]
    sheet = Image.new("RGB", (width, sum(part.height for part in parts)), PAPER)
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    return sheet


def _block(base: Result, search: Result, width: int, font: Font) -> Image.Image:
    """One row of the grid: the caption, both images and their scores."""
    caption = _wrap(search.request.prompt, width - 2 * MARGIN, font)
    images = [_enlarge(result.image) for result in (base, search)]
    top = MARGIN + LINE * len(caption)
    below = top + max(image.height for image in images) + 4
    block = Image.new("RGB", (width, below + LINE), PAPER)
    pen = ImageDraw.Draw(block)
    for i, line in enumerate(caption):
        pen.text((MARGIN, MARGIN + i * LINE - 4), line, font=font, fill=INK)
    for column, (image, result) in enumerate(zip(images, (base, search), strict=True)):
        x = MARGIN + column * (IMAGE + MARGIN)
        block.paste(image, (x, top))
        held_out = "" if result.held_out is None else f", held-out {number(result.held_out)}"
        pen.text((x, below), f"reward {number(result.reward)}{held_out}", font=font, fill=FAINT)
    return block


def _enlarge(image: Image.Image) -> Image.Image:
    """The image at the grid's width; small ones keep their hard pixels."""
    height = max(1, round(image.height * IMAGE / image.width))
    kind = Image.Resampling.NEAREST if image.width < IMAGE else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((IMAGE, height), kind)


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """`text` in lines that are at most `width` pixels wide, where its words allow it."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
