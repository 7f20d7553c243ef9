"""What an evaluation of a model costs: operations, bytes, and how near it comes to what the machine can do.

The roofline (Williams, Waterman and Patterson 2009): work of F operations that moves B bytes takes at least
max(F / P, B / W) seconds on a machine of P operations and W bytes a second, both measured here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rollflow.cli.folders import writable
from rollflow.cli.options import ModelOptions, SearchOptions
from rollflow.errors import RequestError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from rollflow.engine import Engine
    from rollflow.models import Geometry

FILE = "roofline.json"
ROWS = (1, 2, 4, 8, 16, 32, 64)  # that are measured, where the engine uses them
LONG = 0.3  # seconds for which work is timed, but twice in any case,
TIMES = 10  # and so often at most
WIDTH = 120  # where standard output is no terminal
PARTS = {
    "forward": "an evaluation: the transformer",
    "decode": "the decoder",
    "preview": "the light decoder",
    "encode": "the text encoders, one prompt",
    "step": "an evaluation and a decode, as the engine ran and timed them at warm-up",
}
COLUMNS = (
    "FLOP: matrix products, convolutions, attention. least MB: parameters, inputs and results, each once",
    "most MB: with all that operators hand to each other, as if nothing were fused or stayed in a cache",
    "roofline: by FLOP and least MB, which nothing can beat; unfused: by most MB; share: roofline over measured",
)


class Rates(NamedTuple):
    """What the machine does in a second, measured on a lane's cores: operations of a large matrix product, and bytes of
    a large copy, both in the model's dtype."""

    flops: float
    bytes: float

    @classmethod
    def measured(cls, model: Any) -> Rates:
        """Those of a model's device and dtype, on this thread's cores."""
        from rollflow.cli import measuring

        return cls(*(rate(model.device, model.dtype) for rate in (measuring.matmul_rate, measuring.copy_rate)))


def roofline(runtime: ModelOptions, search: SearchOptions | None = None, out: Path | None = None) -> dict[str, Any]:
    """Counts and measures what an evaluation costs, prints a table, and writes it into a folder.

    Args:
        runtime: the model, and what to run it on.
        search: its size, guidance scale and frames are those that are measured.
        out: a folder for `roofline.json`; None for none.

    Returns:
        What `roofline.json` holds: the model, where it ran, "flops_per_second" and "bytes_per_second" of the machine,
        and "points", see `point` and `placed`.

    Raises:
        RollflowError: there is no such model, device or dtype, it does not make this size, or it is to be compiled.
    """
    if runtime.compile is not None:
        raise RequestError(
            f"--compile {runtime.compile}: operators are counted one by one, which compiled code has not; leave it out"
        )
    search = search or SearchOptions()
    if out is None:
        found = figures(runtime, search)
    else:
        with writable(out, [FILE]):
            found = figures(runtime, search)
            (out / FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print_roofline(found)
    return found


def figures(runtime: ModelOptions, search: SearchOptions) -> dict[str, Any]:
    """What is printed; see `roofline`."""
    from rollflow.cli.memory import size_of
    from rollflow.cli.sizes import tell
    from rollflow.models import own_size
    from rollflow.models.text import Size

    with runtime.load() as engine:
        size = size_of(engine.model, search.height, search.width, search.frames)
        tell(engine.model, Size(*size), own_size(runtime.model))
        seconds = engine.buckets(*size)
        with engine.profile() as profile:
            pass
        about = profile.recording.about
        geometry = engine.model.geometry(*size)
        known = {name: about[name] for name in ("model", "adapter", "device", "dtype", "machine", "lanes", "threads")}
        known |= {"versions": about["versions"], "size": str(geometry), "state": [*geometry.state]}
        return {**known, **_measured(engine, runtime.model, geometry, seconds, known["threads"], search.guidance)}


def _measured(
    engine: Engine, name: str, geometry: Geometry, seconds: Mapping[int, float], threads: int, guidance: float | None
) -> dict[str, Any]:
    """All of it on a thread like those of the engine's lanes, which have nothing to do meanwhile."""
    from rollflow.cli.memory import PROMPT, conditioning_of
    from rollflow.device.workers import Lanes

    model: Any = engine.model

    def work() -> dict[str, Any]:
        conditioning, network_rows, scale = conditioning_of(model, name, geometry, PROMPT, guidance)
        before = Rates.measured(model)
        sizes = [rows for rows in ROWS if rows in seconds] or [*seconds][:1]
        points = parts(model, geometry, conditioning, scale, sizes)
        if network_rows == 1:  # the engine times batches without guidance
            points += steps(points, seconds, "preview" if engine.preview else "decode")
        texts = ([PROMPT], geometry) if model.capabilities.sized_text else ([PROMPT],)
        points.append(point("encode", 1, lambda: model.encode(*texts), model.device))
        rates = Rates(*map(max, zip(before, Rates.measured(model), strict=True)))  # others slow down, nobody hurries
        return {
            "flops_per_second": rates.flops, "bytes_per_second": rates.bytes, "guidance": scale,
            "network_rows": network_rows, "points": [placed(one, rates) for one in points],
        }  # fmt: skip

    lanes = Lanes(model.device, 1, threads)
    try:
        return lanes.run(work).result()
    finally:
        lanes.close()


def parts(
    model: Any, geometry: Geometry, conditioning: Any, guidance: float, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """An evaluation and a decode by each decoder, on batches of some sizes, see `point`."""
    from rollflow.cli import measuring

    work: dict[str, Callable[[int], measuring.Work]] = {
        "forward": measuring.forwards(model, geometry, conditioning, guidance),
        "decode": measuring.decodes(model, geometry, model.decode),
    }
    if model.capabilities.preview:
        work["preview"] = measuring.decodes(model, geometry, model.preview)
    return [point(part, rows, make(rows), model.device) for part, make in work.items() for rows in sizes]


def steps(points: Sequence[Mapping[str, Any]], seconds: Mapping[int, float], decoder: str) -> list[dict[str, Any]]:
    """What the engine timed of batches, with the counts of their parts."""
    found = []
    for forward in (one for one in points if one["part"] == "forward"):
        rows = forward["rows"]
        decode = next(one for one in points if one["part"] == decoder and one["rows"] == rows)
        counts = {name: forward[name] + decode[name] for name in ("flops", "least_bytes", "most_bytes")}
        found.append({"part": "step", "rows": rows, **counts, "seconds": seconds[rows]})
    return found


def point(part: str, rows: int, work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Counts and times what a part of a model does.

    Returns:
        "part" and "rows"; counted, "flops" (matrix products, convolutions, attention), "least_bytes" (parameters,
        inputs and results, each once) and "most_bytes" (with what operators hand to each other, as if nothing were
        fused or stayed in a cache); and "seconds", the shortest of a few. `placed` adds the roofline.
    """
    import torch

    from rollflow.cli import measuring, traffic
    from rollflow.profile.operations import flops

    with torch.no_grad():
        least, most = traffic.bytes_of(work)  # it also loads what is loaded at the first call
        counted = flops(work, device)
        times = [measuring.seconds(work, device)]
        while len(times) < 2 or (sum(times) < LONG and len(times) < TIMES):
            times.append(measuring.seconds(work, device))
    counts = {"flops": counted, "least_bytes": least, "most_bytes": most}
    return {"part": part, "rows": rows, **counts, "seconds": min(times)}


def placed(one: Mapping[str, Any], rates: Rates) -> dict[str, Any]:
    """A point under the roofline.

    Returns:
        It, with "bound_seconds" by the least bytes and what it is "bound_by", "unfused_seconds" by the most bytes,
        "flops_per_byte" of the least bytes, "flops_per_second", and the "share" of the roofline, bound over measured.
    """
    flops, least, seconds = one["flops"], one["least_bytes"], one["seconds"]
    operations, moved = flops / rates.flops, least / rates.bytes
    return {
        **one, "bound_seconds": max(operations, moved), "bound_by": "operations" if operations >= moved else "bytes",
        "unfused_seconds": max(operations, one["most_bytes"] / rates.bytes),
        "flops_per_byte": flops / least if least else None, "flops_per_second": flops / seconds,
        "share": max(operations, moved) / seconds,
    }  # fmt: skip


def print_roofline(found: Mapping[str, Any]) -> None:
    """A table of the parts, a line a batch size."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    peak, copied, threads = found["flops_per_second"], found["bytes_per_second"], found["threads"]
    on_cpu = f", one lane alone, on {threads} core{'s' * (threads > 1)}" if found["device"] == "cpu" else ""
    console.print(
        f"{found['model']} at {found['size']} on {found['machine']} in {found['dtype']}{on_cpu}", markup=False
    )
    console.print(
        f"a large matrix product does {peak / 1e9:.4g} GFLOP/s and a large copy {copied / 1e9:.4g} GB/s: below "
        f"{peak / copied:.3g} FLOP a byte it is bytes that bound",
        markup=False,
    )
    console.print(_table(found["points"]))
    for name in dict.fromkeys(one["part"] for one in found["points"]):
        console.print(f"{name}: {PARTS[name]}", markup=False)
    for text in COLUMNS:
        console.print(text, markup=False)
    if (rows := found["network_rows"]) > 1:
        text = f"guidance {found['guidance']:g}: an evaluation takes {rows} rows of the network"
        console.print(f"{text}; warm-up times batches without it, which are left out", markup=False)


def _table(points: Sequence[Mapping[str, Any]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    names = "part", "rows", "GFLOP", "least MB", "most MB", "FLOP/B", "roofline ms", "by", "unfused", "measured ms"
    for name in (*names, "GFLOP/s", "share"):
        table.add_column(name, justify="left" if name in ("part", "by") else "right", no_wrap=True)
    before = None
    for one in points:
        table.add_row(
            one["part"] if one["part"] != before else "",
            str(one["rows"]),
            f"{one['flops'] / 1e9:.4g}",
            f"{one['least_bytes'] / 1e6:.4g}",
            f"{one['most_bytes'] / 1e6:.4g}",
            "-" if one["flops_per_byte"] is None else f"{one['flops_per_byte']:.3g}",
            f"{1e3 * one['bound_seconds']:.3g}",
            one["bound_by"],
            f"{1e3 * one['unfused_seconds']:.3g}",
            f"{1e3 * one['seconds']:.4g}",
            f"{one['flops_per_second'] / 1e9:.3g}",
            f"{100 * one['share']:.1f} %",
        )
        before = one["part"]
    return table
