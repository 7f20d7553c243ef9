"""`report.html`: what an NFE cost and what it bought, as one page that needs nothing but a browser."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rollflow.errors import RequestError, shown
from rollflow.profile.recording import Recording
from rollflow.profile.records import CHORES
from rollflow.profile.report import charts, svg
from rollflow.profile.report.figures import figures
from rollflow.profile.report.pictures import PARTS, pictures
from rollflow.profile.report.units import UNITS, text
from rollflow.values import number

LOOKS, EACH = 16, 24  # requests with pictures, and pictures of one
REQUESTS = 200  # lines of the table of requests
ABOUT = ("model", "adapter", "device", "machine", "dtype", "lanes", "threads", "cores", "preview", "versions")
SCENARIO = ("name", "seconds", "speedup", "nfe_per_second")  # what each must have; and "p95", which may be None
KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp", b"\xff\xd8\xff": "jpeg"}  # of pictures, by how they begin
ROWS = {
    "committed": "part of a search",
    "guided": "part of a search, moved by a reward's gradient",
    "finish": "last steps of a search without judging",
    "refresh": "evaluated in full after a cache: what a search goes on from or returns",
    "speculative": "ran ahead and was not needed, or its request ended before",
    "padding": "fills a batch up to its bucket",
    "open": "on its way when the recording ended",
    "image": "final images: decoded, no NFE",
}


def html(
    recording: Recording,
    folder: str | Path | None = None,
    scenarios: Sequence[Mapping[str, Any]] = (),
    usd_per_hour: float | None = None,
) -> str:
    """The page.

    Args:
        recording: what it reports.
        folder: in which the pictures lie that `recording.about["looks"]` names: {"request", "nfe", "seconds" (of the
            ledger's clock), "reward" or None, "file" (relative to it), "final"}; they become part of the page.
        scenarios: what-if predictions: "name" ("decode 0.5x"), "seconds" (wall), "speedup", "nfe_per_second", and "p95"
            (seconds of a request; None or left out where unknown).
        usd_per_hour: price of the whole device; None: no dollars are shown.

    Raises:
        RequestError: a scenario lacks something, the price is none, or jinja2 is not installed.
    """
    if usd_per_hour is not None and number("usd_per_hour", usd_per_hour) <= 0:
        raise RequestError(
            f"usd_per_hour={shown(usd_per_hour)}: it must be greater than 0; leave it out for no dollars"
        )
    for one in scenarios:
        for name in SCENARIO:
            if name not in one:
                raise RequestError(f"the scenario {shown(dict(one))} lacks {name!r}: each takes {', '.join(SCENARIO)}")
    found = figures(recording, scenarios, usd_per_hour)
    return _template().render(
        f=found,
        about={name: recording.about.get(name) for name in ABOUT},
        n=lambda path, unit="count": _number(found, path, unit),
        counted=partial(_at, found),
        charts=pictures(found),
        looks=_looks(recording, None if folder is None else Path(folder)),
        parts=PARTS,
        kinds=ROWS,
        light=svg.css_variables(False),
        dark=svg.css_variables(True),
        part_color=charts.part_color,
        chores=CHORES,
        listed=REQUESTS,
        methods={one["method"]: place % charts.METHODS for place, one in enumerate(found["methods"])},
    )


def save(
    recording: Recording,
    path: str | Path,
    folder: str | Path | None = None,
    scenarios: Sequence[Mapping[str, Any]] = (),
    usd_per_hour: float | None = None,
) -> Path:
    """Writes the page, see `html`, into a file, such as `report.html`; returns its path."""
    path = Path(path)
    path.write_text(html(recording, folder, scenarios, usd_per_hour), encoding="utf-8")
    return path


@cache
def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise RequestError("report.html takes jinja2: pip install 'rollflow[profile]'") from error
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["spoken"] = lambda value, unit: text(value, UNITS[unit])
    return made.get_template("page.html.j2")


def _at(found: Any, path: str) -> Any:
    """The figure of a name such as "stages.0.seconds"."""
    for key in path.split("."):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def _number(found: Mapping[str, Any], path: str, unit: str) -> Any:
    """A figure as the page shows it, with its name and its full value beside."""
    from markupsafe import Markup

    value = _at(found, path)
    if value is None:
        return Markup('<data data-figure="{}" value="">\N{EN DASH}</data>').format(path)
    plain = repr(float(value)) if isinstance(value, float) else str(value)
    return Markup('<data data-figure="{}" value="{}">{}</data>').format(path, plain, text(value, UNITS[unit]))


def _looks(recording: Recording, folder: Path | None) -> dict[str, Any]:
    """Pictures by request, in order of time, and how many could not be read."""
    known = {int(one["request"]): one for one in recording.requests}
    by: dict[int, list[Mapping[str, Any]]] = {}
    for look in recording.about.get("looks", []):
        by.setdefault(int(look["request"]), []).append(look)
    rows, missing = [], 0
    for request in sorted(by)[:LOOKS]:
        looks = sorted(by[request], key=lambda look: (bool(look["final"]), look["seconds"]))
        if len(looks) > EACH:
            looks = [looks[place] for place in np.linspace(0, len(looks) - 1, EACH).round().astype(int)]
        shots = [{**look, "data": _picture(folder, str(look["file"]))} for look in looks]
        missing += sum(shot["data"] is None for shot in shots)
        shots = [shot for shot in shots if shot["data"] is not None]
        one = known.get(request)
        words = {} if one is None else {name: str(one[name]) for name in ("prompt", "method")}
        since = None if one is None else float(one["submitted"])
        for shot in shots:
            if shot["final"] and one is not None and not np.isnan(one["ended"]):  # later, its picture was taken
                shot["seconds"] = float(one["ended"])
        if shots:
            rows.append({"request": request, "prompt": "", "method": "", **words, "since": since, "shots": shots})
    return {"rows": rows, "missing": missing, "more": max(0, len(by) - LOOKS)}


def _picture(folder: Path | None, file: str) -> str | None:
    """A picture's file as a data URI; None where it is none, or not in the folder."""
    if folder is None:
        return None
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    data = path.read_bytes()
    kind = next((kind for begin, kind in KINDS.items() if data.startswith(begin)), None)
    return None if kind is None else f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
