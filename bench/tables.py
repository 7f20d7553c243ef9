"""A study's tables: means and 95 % intervals of its rows, paired gains, as Markdown, JSON, CSV and on the screen."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rollflow.bench import contenders, figures, intervals
from rollflow.bench.contenders import PATHS
from rollflow.bench.environment import environment
from rollflow.bench.rows import Row, Rows

SHARES = ("count", "classifier")  # rewards whose 0 is an image that is exactly right: reported as a share


def score(row: Row, judge: str = "rewards") -> np.ndarray:
    """What a row is compared by, a number a prompt: whether the image is exactly right, or the reward itself."""
    values = np.array([np.nan if v is None else v for v in row[judge]], dtype=float)
    return (values == 0).astype(float) if row["reward"] in SHARES else values


def pooled(rows: Rows, part: str) -> list[Row]:
    """One entry for each contender, path, set and budget: means and 95 % intervals, over prompts and seeds."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows.rows.values():
        if row["part"] == part:
            groups.setdefault(tuple(row[k] for k in _GROUP), []).append(row)
    entries = []
    for key, group in ((key, list(by_seed(group).values())) for key, group in groups.items()):
        size = min(row["prompts"] for row in group)
        given = np.stack([score(row)[:size] for row in group]).mean(0)  # over seeds, a number a prompt
        held = np.stack([score(row, "held_out")[:size] for row in group]).mean(0)
        committed = sum(row["committed_nfe"] for row in group)
        entries.append(
            {
                **dict(zip(_GROUP, key, strict=True)),
                "prompts": size,
                "seeds": len(group),
                "score": given.mean(),
                "score_95": _interval(given, group[0]["reward"]),
                "held_out": held.mean(),
                "held_out_95": _interval(held, group[0]["reward"]),
                "mean_reward": float(np.mean([reward for row in group for reward in row["rewards"]])),
                "committed_nfe": committed / sum(row["prompts"] for row in group),
                "executed_over_committed": sum(row["executed_nfe"] for row in group) / committed,
                "milliseconds_per_nfe": 1000 * sum(row["seconds"] for row in group) / committed,
                "nfe_by_level": group[0]["nfe_by_level"],
            }
        )
    return entries


def by_seed(rows: list[Row]) -> dict[int, Row]:
    """One row a seed, that of the most prompts: a study may have been run on a few prompts first."""
    found: dict[int, Row] = {}
    for row in rows:
        if row["seed"] not in found or row["prompts"] > found[row["seed"]]["prompts"]:
            found[row["seed"]] = row
    return found


_GROUP = ("part", "model", "reward", "label", "path", "set", "nfe")


def _interval(values: np.ndarray, reward: str) -> tuple[float, float]:
    if np.isnan(values).any():
        return np.nan, np.nan
    return intervals.wilson(values) if reward in SHARES else intervals.bootstrap(values)


def paired(group: list[Row], ours: tuple[str, str], theirs: tuple[str, str]) -> Row | None:
    """By how much one (contender, path) is ahead of another on the rows of one set and budget: mean difference of the
    score and of the held-out one, paired by prompt and seed, with bootstrap intervals over prompts and the p-value of
    the sign test, which is exact where few prompts differ. None: no pair.
    """
    mine, others = (by_seed([r for r in group if (r["label"], r["path"]) == which]) for which in (ours, theirs))
    seeds = sorted(mine.keys() & others.keys())
    if not seeds:
        return None
    size = min(min(mine[s]["prompts"], others[s]["prompts"]) for s in seeds)
    found: Row = {"prompts": size, "seeds": len(seeds)}
    for judge, title in (("rewards", "gain"), ("held_out", "held_out_gain")):
        values = np.stack([score(mine[s], judge)[:size] - score(others[s], judge)[:size] for s in seeds]).mean(0)
        found[title] = float(values.mean())
        found[f"{title}_95"] = (np.nan, np.nan) if np.isnan(values).any() else intervals.bootstrap(values)
        found[f"{title}_p"] = intervals.sign_test(values)
    return found


def _cells(rows: Rows) -> dict[tuple, list[Row]]:
    """The rows that can be compared: by model, reward, set and budget."""
    cells: dict[tuple, list[Row]] = {}
    for row in rows.rows.values():
        if row["part"] == "methods":
            cells.setdefault((row["model"], row["reward"], row["set"], row["nfe"]), []).append(row)
    return cells


def gains(rows: Rows, label: str) -> list[Row]:
    """By how much the contender `label` is ahead of every other of the same budget, on each set."""
    found = []
    for (model, reward, name, nfe), group in _cells(rows).items():
        mine = next(((r["label"], r["path"]) for r in group if r["label"] == label), None)
        for other in dict.fromkeys((r["label"], r["path"]) for r in group if r["label"] != label):
            entry = paired(group, mine, other) if mine else None
            if entry:
                key = {"model": model, "reward": reward, "set": name, "nfe": nfe}
                found.append({**key, "ahead": label, "of": other[0], "path": other[1], **entry})
    return found


def claims(rows: Rows) -> list[Row]:
    """The comparisons of `rollflow.bench.contenders.CLAIMS`, wherever both sides were computed."""
    found = []
    for (model, reward, name, nfe), group in _cells(rows).items():
        for claim, ours, theirs in contenders.CLAIMS:
            entry = paired(group, ours, theirs)
            if entry:
                key = {"model": model, "reward": reward, "set": name, "nfe": nfe, "claim": claim}
                sides = {"ahead": ", ".join(ours), "of": ", ".join(theirs)}
                found.append({**key, **sides, **entry})
    return found


def differences(entries: list[Row]) -> str:
    """Paired differences of one model, reward and budget as a Markdown table: a row a comparison, a column a set; in
    points of a hundred for shares.
    """
    known = {name: i for i, name in enumerate(("easy", "medium", "hard"))}
    sets = sorted(dict.fromkeys(e["set"] for e in entries), key=lambda name: known.get(name, len(known)))
    lines = [f"| claim | difference | {' | '.join(sets)} |", "|---|---|" + "---|" * len(sets)]
    for claim, ahead, of in dict.fromkeys((e["claim"], e["ahead"], e["of"]) for e in entries):
        mine = {e["set"]: e for e in entries if (e["claim"], e["ahead"], e["of"]) == (claim, ahead, of)}
        cells = [_difference(mine[name]) if name in mine else "" for name in sets]
        lines.append(f"| {claim} | {ahead} less {of} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _difference(entry: Row) -> str:
    (low, high), scale, digits = entry["gain_95"], 1, ".4g"
    if entry["reward"] in SHARES:
        scale, digits = 100, ".0f"
    middle, low, high = (f"{scale * x:+{digits}}" for x in (entry["gain"], low, high))
    return f"{middle} [{low}, {high}]"


def report(rows: Rows, out: Path, console: Console | None = None) -> None:
    """Writes the tables and the plots of all rows that there are, and prints the tables."""
    for part in dict.fromkeys(row["part"] for row in rows.rows.values()):
        entries = pooled(rows, part)
        save(out, part, entries)
        (out / f"{part}.md").write_text(markdown(entries), encoding="utf-8")
        if console:
            for table in _tables(entries):
                console.print(table)
        figures.scores(out, part, entries)
    save(out, "gains", gains(rows, contenders.OURS))
    save(out, "claims", claims(rows))


def save(out: Path, name: str, entries: list[Row]) -> None:
    """The entries as JSON, with where they came from, and as CSV."""
    content = {"environment": environment(), "rows": entries}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for entry in entries for key in entry)))
        writer.writeheader()
        writer.writerows(entries)


def columns(entries: list[Row]) -> list[tuple[str, int]]:
    """The table's columns, set and budget; what has a budget of its own stands in all of its set."""
    budgets = sorted({e["nfe"] for e in entries if e["label"] not in contenders.FIXED})
    budgets = budgets or sorted({e["nfe"] for e in entries})[:1]
    return [(name, nfe) for name in dict.fromkeys(e["set"] for e in entries) for nfe in budgets]


def cell(entries: list[Row], label: str, path: str, name: str, nfe: int) -> Row | None:
    """The entry of one cell of the table, if it was computed."""
    mine = (e for e in entries if (e["label"], e["path"], e["set"]) == (label, path, name))
    return next((e for e in mine if e["nfe"] == nfe or label in contenders.FIXED), None)


def shown(entry: Row | None) -> str:
    """A score with its interval, and the held-out one: "75 [66, 82] / 71"."""
    if entry is None:
        return ""
    share = entry["reward"] in SHARES
    low, high = entry["score_95"]
    if share:
        return f"{100 * entry['score']:.0f} [{100 * low:.0f}, {100 * high:.0f}] / {100 * entry['held_out']:.0f}"
    held = "" if np.isnan(entry["held_out"]) else f" / {entry['held_out']:.4g}"
    return f"{entry['score']:.4g} [{low:.4g}, {high:.4g}]{held}"


def _lines(entries: list[Row]) -> list[list[str]]:
    found = columns(entries)
    return [
        [label, path, *(shown(cell(entries, label, path, name, nfe)) for name, nfe in found)]
        for label, path in _ordered(entries)
    ]


def _ordered(entries: list[Row]) -> list[tuple[str, str]]:
    """Contenders in the order of `rollflow.bench.contenders`, whatever the order in which they were computed."""
    order = {label: i for i, label in enumerate(contenders.by_label())}
    pairs = dict.fromkeys((e["label"], e["path"]) for e in entries)
    return sorted(pairs, key=lambda pair: (order.get(pair[0], len(order)), list(PATHS).index(pair[1])))


def markdown(entries: list[Row]) -> str:
    """A table for each model and reward, under a line that names them."""
    text = []
    for model, reward in dict.fromkeys((e["model"], e["reward"]) for e in entries):
        mine = [e for e in entries if (e["model"], e["reward"]) == (model, reward)]
        text.append(f"{model}, reward {reward}\n\n{grid(mine)}")
    return "\n".join(text)


def grid(entries: list[Row]) -> str:
    """The scores of one model and reward: a row a contender and path, a column a set and budget."""
    heads = ["contender", "path", *(f"{name}, {nfe}" for name, nfe in columns(entries))]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(line)} |" for line in _lines(entries))]) + "\n"


def _tables(entries: list[Row]) -> Iterator[Table]:
    for model, reward in dict.fromkeys((e["model"], e["reward"]) for e in entries):
        mine = [e for e in entries if (e["model"], e["reward"]) == (model, reward)]
        unit = "% exactly right" if reward in SHARES else f"mean {reward}"
        table = Table(title=f"{entries[0]['part']}: {unit} [95 % interval] / held-out, {model}")
        for head in ("contender", "path", *(f"{name}\n{nfe} NFE" for name, nfe in columns(mine))):
            table.add_column(head)
        for line in _lines(mine):
            table.add_row(*line)
        yield table


def plain(title: str, entries: list[Row]) -> Table:
    """Entries as they are, for the screen; what is the same in all of them stands in the title."""
    same = [head for head in entries[0] if len({repr(entry[head]) for entry in entries}) == 1]
    table = Table(title=f"{title}: {', '.join(f'{head} {_plain(entries[0][head])}' for head in same)}")
    heads = [head for head in entries[0] if head not in same]
    for head in heads:
        table.add_column(head)
    for entry in entries:
        table.add_row(*(_plain(entry[head]) for head in heads))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
