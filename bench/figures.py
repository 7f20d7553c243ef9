"""The study's plots, from its tables: PNG and SVG."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rollflow import interpolant, sde
from rollflow.bench import contenders

Row = dict[str, Any]
MIXTURE = ((-1.5, 0.0, 0.25), (1.5, 0.8, 0.25), (0.6, -1.4, 0.25))  # x, y, deviation: equal weights
TRAJECTORIES, FINE = 10, 400


def pyplot() -> Any:
    """matplotlib for files, imported when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, out: Path, name: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    name = name.replace("/", "-")  # of a reward's name
    for suffix in ("png", "svg"):
        figure.savefig(out / f"{name}.{suffix}", dpi=110)
    pyplot().close(figure)


def scores(out: Path, part: str, entries: list[Row]) -> None:
    """Score against budget for each set, and where RBF spends its evaluations."""
    entries = [e for e in entries if e["label"] not in contenders.FIXED]
    for model, reward in dict.fromkeys((e["model"], e["reward"]) for e in entries):
        mine = [e for e in entries if (e["model"], e["reward"]) == (model, reward)]
        suffix = f"-{model}-{reward}"
        if len({e["nfe"] for e in mine}) > 1:
            _budgets(out, f"{part}-budgets{suffix}", mine)
        if part == "methods":
            _levels(out, f"rollover{suffix}", [e for e in mine if e["label"] == "RBF, as published"])
    if part in ("solvers", "noise") and entries:
        _bars(out, part, entries)


def _budgets(out: Path, name: str, entries: list[Row]) -> None:
    budgets = {(e["set"], e["label"], e["path"]): set[int]() for e in entries}
    for e in entries:
        budgets[e["set"], e["label"], e["path"]].add(e["nfe"])
    sets = list(dict.fromkeys(key[0] for key, found in budgets.items() if len(found) > 1))
    if not sets:
        return
    figure, axes = pyplot().subplots(1, len(sets), figsize=(max(5.5, 4 * len(sets)), 3.6), squeeze=False, sharey=True)
    curves: dict[tuple[str, str], None] = {}
    for axis, chosen in zip(axes[0], sets, strict=True):
        for label, path in dict.fromkeys((e["label"], e["path"]) for e in entries):
            curve = sorted((e["nfe"], e["score"], *e["score_95"]) for e in entries if _is(e, label, path, chosen))
            if len(curve) > 1:
                curves[label, path] = None
                color = f"C{list(curves).index((label, path)) % 10}"
                nfe, middle, low, high = np.array(curve).T
                axis.plot(nfe, middle, "o-", ms=3, color=color, label=f"{label}, {path}")
                axis.fill_between(nfe, low, high, alpha=0.12, color=color, lw=0)
        axis.set(title=chosen, xlabel="NFE a prompt", xscale="log")
        ticks = sorted({e["nfe"] for e in entries})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
    axes[0][0].set_ylabel("share exactly right" if entries[0]["reward"] in ("count", "classifier") else "mean reward")
    axes[0][-1].legend(fontsize=7, frameon=False, loc="best")
    _save(figure, out, name)


def _is(entry: Row, label: str, path: str, name: str) -> bool:
    return (entry["label"], entry["path"], entry["set"]) == (label, path, name)


def _levels(out: Path, name: str, entries: list[Row]) -> None:
    """Evaluations that RBF spends at each point of the grid: what rollover is about."""
    if not entries:
        return
    budget = min((e["nfe"] for e in entries), key=lambda nfe: abs(nfe - 100))
    entries = [e for e in entries if e["nfe"] == budget]
    figure, axis = pyplot().subplots(figsize=(6, 3.4))
    for entry in entries:
        line = "o-" if entry["path"] == contenders.VP else "s--"
        axis.plot(entry["nfe_by_level"], line, ms=3, label=f"{entry['set']}, {entry['path']}")
    each = (budget - budget // 10) // len(entries[0]["nfe_by_level"])
    axis.axhline(each, color="0.6", lw=1, ls=":")
    axis.set(xlabel="point of the grid", ylabel="NFE", title=f"where RBF spends {budget} NFE (dotted: its quota)")
    axis.legend(fontsize=7, frameon=False)
    _save(figure, out, name)


def _bars(out: Path, part: str, entries: list[Row]) -> None:
    paths = list(dict.fromkeys(e["path"] for e in entries))
    height = 1.2 + 0.24 * len(entries) / len(paths)
    figure, axes = pyplot().subplots(1, len(paths), figsize=(4.6 * len(paths), height), squeeze=False, sharex=True)
    for axis, path in zip(axes[0], paths, strict=True):
        mine = [e for e in entries if e["path"] == path][::-1]
        middle = np.array([e["score"] for e in mine])
        error = np.abs(np.array([e["score_95"] for e in mine]).T - middle)
        axis.barh([e["label"] for e in mine], middle, xerr=error, color="C0", alpha=0.6, ecolor="0.3", height=0.7)
        axis.set(title=f"RBF, {path}, {mine[0]['set']}, {mine[0]['nfe']} NFE", xlabel="score")
        axis.tick_params(axis="y", labelsize=7)
    _save(figure, out, part)


def probe(out: Path, name: str, part: str, rows: list[Row]) -> None:
    """Correlation with the final reward by linear time, or distances of siblings, a panel a prompt set."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure, axes = pyplot().subplots(1, len(sets), figsize=(4.2 * len(sets), 3.4), squeeze=False, sharey=True)
    for axis, chosen in zip(axes[0], sets, strict=True):
        mine = [row for row in rows if row["set"] == chosen]
        if part == "fidelity":
            for path in dict.fromkeys(row["path"] for row in mine):
                curve = sorted((r["level"], r["pearson"], *r["pearson_95"]) for r in mine if r["path"] == path)
                level, middle, low, high = np.array(curve).T
                axis.plot(level, middle, "o-", ms=3, label=path)
                axis.fill_between(level, low, high, alpha=0.15, lw=0)
            axis.set(title=chosen, xlabel="point of the grid")
        else:
            for point, color in (("first", "C0"), ("last", "C1")):
                bars = [row for row in mine if row["point"] == point]
                at = np.arange(len(bars)) + (0.2 if point == "last" else -0.2)
                error = np.abs(np.array([r["rms_95"] for r in bars]).T - [r["rms"] for r in bars])
                heights = [r["rms"] for r in bars]
                axis.bar(at, heights, 0.38, yerr=error, color=color, alpha=0.6, label=f"{point} point")
                axis.set_xticks(range(len(bars)), [r["path"] for r in bars])
            axis.set(title=chosen)
    label = (
        "correlation with the final reward" if part == "fidelity" else "distance of two siblings (RMS, pixel values)"
    )
    axes[0][0].set_ylabel(label)
    axes[0][-1].legend(fontsize=8, frameon=False)
    _save(figure, out, name)


def paths(out: Path) -> None:
    """Log-SNR of the interpolants, and particles of the ODE and of two SDEs on a mixture of three Gaussians."""
    figure, axis = pyplot().subplots(figsize=(5, 3.4))
    times = np.linspace(0.001, 0.999, 400)
    for name in ("linear", "vp", "cosine", "polynomial"):
        path = interpolant.make(name)
        axis.plot(times, [path.log_snr(t) for t in times], label=name)
    axis.set(xlabel="time (1 is noise)", ylabel="log SNR", ylim=(-12, 14))
    axis.legend(fontsize=8, frameon=False)
    _save(figure, out, "log-snr")

    figure, axes = pyplot().subplots(1, 3, figsize=(11, 3.8), sharex=True, sharey=True)
    for axis, (title, given) in zip(axes, contenders.PATHS.items(), strict=True):
        ends, tracks = trajectories(given["interpolant"], given.get("diffusion", 3.0))
        axis.plot(*ends.T, ".", ms=1.5, color="0.75", zorder=0)
        for track in tracks:
            axis.plot(*track.T, lw=0.7, alpha=0.8)
        axis.set(title=title, xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    _save(figure, out, "trajectories")


def mixture_velocity(x: np.ndarray, tau: float) -> np.ndarray:
    """`E[eps - x0 | x]` of the mixture on the linear path at time `tau`, for points [n, 2]."""
    means = np.array([part[:2] for part in MIXTURE])
    spread = np.array([part[2] ** 2 for part in MIXTURE])
    variance = (1 - tau) ** 2 * spread + tau**2
    away = x[:, None] - (1 - tau) * means
    log_weight = -np.square(away).sum(2) / (2 * variance) - np.log(variance)
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    x0 = means + ((1 - tau) * spread / variance)[:, None] * away
    x0_hat = (weight[..., None] * x0).sum(1)
    return (x - x0_hat) / tau  # x = (1 - tau) x0_hat + tau eps_hat


def trajectories(name: str, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Particles [n, 2] at the end, and tracks [n, step, 2], in units of the linear path, of a few that start alike."""
    path, rng = interpolant.make(name), np.random.default_rng(seed)
    grid = sde.time_grid(FINE, "uniform")
    x = rng.standard_normal((400, 2)) * path.sigma(1.0)
    x[:TRAJECTORIES] = np.array([0.3, 0.4]) * path.sigma(1.0) if scale else x[:TRAJECTORIES]
    tracks = []
    for start, end in pairwise(grid):
        c = path.scale(start)
        tracks.append(x[:TRAJECTORIES] / c)
        a, b, k = sde.step_coefficients(path, start, end, sde.diffusion(scale), "euler")
        x = a * x + b * mixture_velocity(x / c, path.linear_time(start)) + k * rng.standard_normal(x.shape)
    assert math.isfinite(float(x.sum()))
    return x, np.stack([*tracks, x[:TRAJECTORIES]], 1)


def throughput(rows: list[Row], file: Path) -> None:
    """NFE a second against the number of prompts, and the bare parts against the batch size."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.8))
    searches = [row for row in rows if "prompts" in row]
    for name in dict.fromkeys(row["contender"] for row in searches):
        mine = [row for row in searches if row["contender"] == name]
        left.plot([row["prompts"] for row in mine], [row["nfe_per_second"] for row in mine], "o-", label=name)
    bare = [row for row in rows if "bucket" in row]
    for name in dict.fromkeys(row["contender"] for row in bare):
        mine = [row for row in bare if row["contender"] == name]
        right.plot([row["bucket"] for row in mine], [row["nfe_per_second"] for row in mine], "o-", label=name)
    for axes, title, x, y in ((left, "searches", "prompts", "NFE / s"), (right, "bare parts", "batch", "rows / s")):
        axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot().close(figure)


def latency(rows: list[Row], file: Path) -> None:
    """Time to the first update and to the result against the load, with intervals, and closed loops' medians."""
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 3.8), sharey=True)
    loads = sorted((row for row in rows if "load" in row), key=lambda row: row["load"])
    closed = [row for row in rows if "concurrency" in row]
    for axes, measured, title in zip(panels, ("to_first_update", "to_result"), ("first update", "result"), strict=True):
        for p in (50, 95, 99):
            name = f"seconds_{measured}_p{p}"
            if not (mine := [row for row in loads if row[name] is not None]):
                continue
            middle = np.array([row[name] for row in mine])
            # An end that the sample is too small to know is open: drawn is what is known.
            ends = [[m if e is None else e for e in row[f"{name}_95"]] for m, row in zip(middle, mine, strict=True)]
            error = np.abs(np.array(ends).reshape(-1, 2).T - middle)
            axes.errorbar([row["load"] for row in mine], middle, error, fmt="o-", ms=4, capsize=3, label=f"p{p}")
        for i, row in enumerate(row for row in closed if row[f"seconds_{measured}_p50"] is not None):
            label = f"{row['concurrency']} in flight, p50"
            axes.axhline(row[f"seconds_{measured}_p50"], color="0.4", lw=1, ls=(":", "--", "-.")[i % 3], label=label)
        axes.set(title=f"time to the {title}", xlabel="arrivals, share of the capacity", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    panels[1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot().close(figure)
