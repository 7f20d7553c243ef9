"""The report's pictures, drawn from its figures alone; each for a wide page and for a phone.

Names that people chose (of rewards, methods, prompts) are not drawn: the page has them in its own text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rollflow.profile.records import CHORES
from rollflow.profile.report import svg

WIDTH = {True: 860, False: 340}  # pixels; of the wide version, and of the narrow one
TEXT = {True: 12.5, False: 12.5}
METHODS = 8  # colours of methods
LANES = 8  # with bars of their own
Draw = Callable[[bool], Any]


def drawn(name: str, label: str, draw: Draw) -> str:
    """A picture as SVG in both versions, of which the page shows one.

    Args:
        name: no other picture of the page has it.
        label: what it shows, in words.
        draw: makes the figure, wide or not.
    """
    found = []
    for wide in (True, False):
        with svg.style(TEXT[wide]):
            kind = "wide" if wide else "narrow"
            found.append(svg.text(draw(wide), f"{name}-{kind}", kind, label))
    return "".join(found)


def part_color(part: str) -> str:
    """The colour of a part of the lanes' time, by its name among `svg.COLORS`."""
    return "chore" if part in CHORES else part


def bars(rows: Sequence[tuple[str, Mapping[str, float]]], unit: str) -> Draw:
    """Shares of wholes: a bar of 100 % for each row, of parts by their name, which is their colour's too."""

    def draw(wide: bool) -> Any:
        figure = _figure(wide, 34 + 40 * len(rows))
        axes = figure.add_subplot()
        for place, (_, parts) in enumerate(rows):
            whole, left = sum(parts.values()), 0.0
            for name, value in parts.items():
                share = 100 * value / whole if whole else 0.0
                axes.barh(place, share, left=left, color=svg.color(part_color(name)), height=0.62, **_EDGE)
                if share >= (6 if wide else 14):
                    ink = svg.color(_ink(name))
                    axes.text(left + share / 2, place, f"{share:.0f} %", color=ink, ha="center", va="center")
                left += share
        axes.set(xlim=(0, 100), ylim=(len(rows) - 0.45, -0.55), xlabel=unit)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.grid(False)
        return figure

    return draw


def _ink(part: str) -> str:
    """The colour of text that can be read on a part's."""
    if part.startswith("idle") or part in ("padding", "queue", "outside"):
        return "ink"
    return "night" if part in ("decode", "propose", "finish", "speculative", "open") else "page"


def timeline(found: Mapping[str, Any]) -> Draw:
    """Rows on the lanes over time, stacked by what they are for, and the bucket as an outline."""

    def draw(wide: bool) -> Any:
        lanes = [("mean of a lane", _binned(found))] if found["binned"] else [*_lanes(found)]
        figure = _figure(wide, 50 + (150 if len(lanes) == 1 else 105) * max(1, len(lanes)))
        panels = figure.subplots(max(1, len(lanes)), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (title, (edges, rows, bucket)) in zip(panels, lanes, strict=False):
            below = np.zeros(len(bucket))
            for name, values in rows.items():
                if values.any():
                    above = below + values
                    axes.stairs(above, edges, baseline=below, fill=True, color=svg.color(name), lw=0)
                    below = above
            axes.stairs(bucket, edges, color=svg.color("ink"), lw=0.8 if wide else 0.6, alpha=0.75)
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.set_ylabel("rows")
            axes.yaxis.set_major_locator(_whole(4))
        panels[-1].set(xlim=(0, found["seconds"] or 1), xlabel="seconds since the recording began")
        panels[-1].xaxis.set_major_formatter(_plain)
        return figure

    return draw


def _lanes(found: Mapping[str, Any]) -> Iterator[tuple[str, tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]]]:
    """Of each lane its edges in time, and between them rows by what they are for and the bucket."""
    for lane in found["lanes"]:
        edges = np.stack([lane["started"], lane["ended"]], 1)
        edges[1:, 0] = np.maximum(edges[1:, 0], edges[:-1, 1])  # in order, though clocks may disagree by a little
        edges[:, 1] = np.maximum(edges[:, 1], edges[:, 0])

        def alternating(values: Sequence[float]) -> np.ndarray:
            steps = np.zeros(2 * len(values) - 1)  # nothing runs between batches
            steps[::2] = values
            return steps

        rows = {name: alternating(values) for name, values in lane["rows"].items()}
        yield f"lane {lane['lane']}", (edges.reshape(-1), rows, alternating(lane["bucket"]))


def _binned(found: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    rows = {name: np.array(values) for name, values in found["rows"].items()}
    return np.array(found["edges"]), rows, np.array(found["bucket"])


def levels(found: Mapping[str, Any]) -> Draw:
    """NFE and lane seconds by point of the time grid, stacked by method; padding and images beside."""

    def draw(wide: bool) -> Any:
        figure = _figure(wide, 230 if wide else 400)
        panels = figure.subplots(*((1, 2) if wide else (2, 1)))
        names, at = found["levels"], np.arange(len(found["levels"]), dtype=float)
        for axes, what in zip(panels, ("nfe", "seconds"), strict=True):
            beside = ["padding"] if what == "nfe" else ["padding", "images"]
            apart = 1.0 if wide else 1.6
            places = np.concatenate([at, len(at) + 0.6 + apart * np.arange(len(beside))])
            below = np.zeros(len(places))
            for place, one in enumerate(found["methods"]):
                extra = [one[f"padding_{what}"], one["image_seconds"]][: len(beside)]
                values = np.array([*one[what], *extra], dtype=float)
                axes.bar(places, values, 0.8, bottom=below, color=svg.color(f"method{place % METHODS}"), **_EDGE)
                below += values
            step = max(1, -(-len(names) // (14 if wide else 10)))
            ticks = [*at[::step], *places[len(at) :]]
            short = {"padding": "pad", "images": "img"}
            axes.set_xticks(ticks, [*map(str, names[::step]), *(short[one] for one in beside)])
            axes.set_title("NFE" if what == "nfe" else "lane seconds")
            axes.set_xlabel("point of the time grid")
            axes.yaxis.set_major_formatter(_plain)
        return figure

    return draw


def progress(
    curves: Sequence[Mapping[str, Any]], band: Mapping[str, Any] | None, colors: Mapping[str, int],
    images: Mapping[int, tuple[float | None, float | None, float | None]],
) -> Draw:  # fmt: skip
    """Best reward so far against NFE and against seconds, of the searches of one reward.

    Args:
        curves: those that are drawn by themselves, see `rollflow.profile.report.progress`.
        band: quantiles of the others.
        colors: a number for each method.
        images: of requests, NFE, seconds and reward of the image that was returned.
    """

    def draw(wide: bool) -> Any:
        figure = _figure(wide, 260 if wide else 470)
        panels = figure.subplots(*((1, 2) if wide else (2, 1)), sharey=wide)
        for axes, what in zip(panels, ("nfe", "seconds"), strict=True):
            if band is not None:
                own, gray = band[what], svg.color("muted")
                axes.fill_between(own["at"], own["low"], own["high"], step="post", color=gray, alpha=0.18, lw=0)
                axes.plot(own["at"], own["middle"], color=gray, lw=1.2, ls="--", drawstyle="steps-post")
            for one in curves:
                shade = svg.color(f"method{colors[one['method']] % METHODS}")
                axes.plot(one[what], one["best"], color=shade, lw=1.3, alpha=0.8, drawstyle="steps-post")
                nfe, seconds, reward = images.get(one["request"], (None, None, None))
                at = nfe if what == "nfe" else seconds
                if at is not None and reward is not None:
                    axes.plot([at], [reward], "o", mfc=svg.color("page"), mec=shade, mew=1.2, ms=5)
            axes.set_title("against NFE" if what == "nfe" else "against time")
            axes.set_xlabel("NFE of the search" if what == "nfe" else "seconds since it was submitted")
            axes.margins(y=0.08)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(_whole(6) if what == "nfe" else _round(6))
            axes.xaxis.set_major_formatter(_plain)
            axes.yaxis.set_major_formatter(_plain)
        panels[0].set_ylabel("best reward so far")
        if not wide:
            panels[1].set_ylabel("best reward so far")
        return figure

    return draw


def buckets(found: Mapping[str, Any]) -> Draw:
    """Seconds of batches by bucket: the network's, the decoder's, and both together beside the cost model."""

    def draw(wide: bool) -> Any:
        figure = _figure(wide, 270)
        axes = figure.add_subplot()
        points, fit, table = found["points"], found["fit"], found["table"]
        top = max([*points["network"], *fit["seconds"], *(one["total"] for one in table), 1e-9])
        unit, scale = ("ms", 1e3) if top < 0.75 else ("s", 1.0)
        bucket = np.array(points["bucket"], dtype=float)
        for name, color in (("network", "forward"), ("decode", "decode")):
            values = scale * np.array([np.nan if one is None else one for one in points[name]], dtype=float)
            axes.plot(bucket, values, "o", color=svg.color(color), ms=5, mew=0, alpha=0.55)
        ink = svg.color("ink")
        totals = [scale * one["total"] for one in table]
        axes.plot([one["bucket"] for one in table], totals, "D", mfc=svg.color("page"), mec=ink, mew=1.1, ms=5.5)
        axes.plot(fit["bucket"], [scale * one for one in fit["seconds"]], color=ink, lw=1.3)
        axes.set(xlim=(0, None), ylim=(0, None), xlabel="bucket (rows of a batch, padding included)")
        axes.set_title(f"{unit} of a batch")
        axes.xaxis.set_major_locator(_whole(9 if wide else 6))
        axes.yaxis.set_major_formatter(_plain)
        return figure

    return draw


_EDGE = {"edgecolor": svg.color("page"), "linewidth": 0.8}


def _figure(wide: bool, height: float) -> Any:
    """A figure of so many pixels."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=4 / 72, h_pad=4 / 72, hspace=0.06, wspace=0.04)
    return Figure(figsize=(WIDTH[wide] / 72, height / 72), layout=layout)


def _whole(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True, steps=[1, 2, 4, 5, 8, 10])


def _round(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=[1, 2, 5, 10])


def _plain(value: float, _place: int) -> str:
    """A tick's number: 12,000; 0.25."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
