"""The report: each figure is recomputed from the exported Parquet, and found again in the page and in its pictures."""

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import recount_figures
import synthetic
from PIL import Image
from recount import Recount
from report_cases import MAKERS, SCENARIOS, USD, flat, forgetful, recording_of
from synthetic import empty, limited, made, row, staged

from rollflow import RequestError
from rollflow.profile.recording import Recording
from rollflow.profile.report import charts, svg
from rollflow.profile.report import page as report
from rollflow.profile.report.figures import figures


@pytest.fixture(scope="module", params=MAKERS)
def case(request, tmp_path_factory):
    """A recording, its figures, and the same counted from its files."""
    recording = recording_of(request.param)
    folder = recording.save(tmp_path_factory.mktemp("recording"))
    return recording, figures(recording, SCENARIOS, USD), recount_figures.all_of(Recount(folder), SCENARIOS, USD)


def alike(one, other):
    if one is None or other is None or isinstance(one, str):
        return one == other
    return one == pytest.approx(other, rel=1e-6, abs=1e-9)


def test_every_figure_is_recomputed_from_the_files(case):
    _, found, counted = case
    found, counted = flat(found), flat(counted)
    assert {*found} == {*counted}
    assert {name: (one, counted[name]) for name, one in found.items() if not alike(one, counted[name])} == {}


def test_figures_are_plain_and_lanes_add_up(case):
    recording, found, _ = case
    assert json.loads(json.dumps(found)) == found
    for lane in found["lanes"]:
        assert sum(lane["seconds"].values()) == pytest.approx(found["span"]["seconds"], rel=0.02)
    if not found["totals"]["unfinished_batches"]:  # others are counted in parts there
        for lane in recording.lanes:
            mine = found["lanes"][lane.lane]["seconds"]
            assert {stage: mine[stage] for stage in lane.stages} == pytest.approx(lane.stages, abs=1e-9)
            assert {kind: mine[kind] for kind in lane.chores} == pytest.approx(lane.chores)
            idle = sum(seconds for part, seconds in mine.items() if part.startswith("idle"))
            assert idle + mine["outside"] == pytest.approx(lane.idle)
    assert sum(one["nfe"] for one in found["methods"]) == sum(one["nfe"] for one in found["kinds"][:-1])
    assert sum(one["lane_seconds"] for one in found["methods"]) == pytest.approx(
        sum(sum(one["seconds"]) + one["padding_seconds"] + one["image_seconds"] for one in found["levels"]["methods"])
    )


# The page.


class Page(HTMLParser):
    """The figures that a page shows, its ids and what refers to them."""

    def __init__(self, page):
        super().__init__()
        self.shown, self.ids, self.links, self.texts, self._open = {}, [], [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "data":
            self._open = given["data-figure"]
            self.shown[self._open], self.texts[self._open] = given["value"], ""
        self.ids += [given["id"]] if "id" in given else []
        for value in given.values():
            self.links += re.findall(r"^#(.+)|url\(#([^)]+)\)", value or "")

    def handle_data(self, data):
        if self._open is not None:
            self.texts[self._open] += data

    def handle_endtag(self, tag):
        if tag == "data":
            self._open = None


UNIT = {"h": 3600, "min": 60, "s": 1, "ms": 1e-3, "µs": 1e-6, "%": 0.01, "x": 1, "": 1}


def read(words):
    """A number as the page writes it, and half of what its last digit stands for."""
    match = re.fullmatch(r"\$?(-?[\d,]+)(\.\d+)?(?:e(-?\d+))?\s?(\D*)", words.replace("\N{MINUS SIGN}", "-"))
    assert match, words
    whole, rest, power, unit = match.groups()
    scale = UNIT[unit] * 10.0 ** int(power or "0")
    value = float((whole + (rest or "")).replace(",", ""))
    return value * scale, 0.51 * scale * 10.0 ** -max(0, len(rest or "") - 1)


@pytest.fixture(scope="module", params=["engine", "device"])
def shown(request, tmp_path_factory):
    recording = recording_of(request.param)
    page = report.html(recording, None, SCENARIOS, USD)
    folder = recording.save(tmp_path_factory.mktemp("recording"))
    counted = recount_figures.all_of(Recount(folder), SCENARIOS, USD)
    return page, Page(page), flat(counted), counted


@pytest.fixture
def undrawn(monkeypatch):
    """Pages have no pictures: those take time."""
    monkeypatch.setattr(charts, "drawn", lambda name, label, draw: f"({name}: {label})")


def test_the_page_shows_the_figures(shown):
    _, page, counted, _ = shown
    for name, value in page.shown.items():
        if counted[name] is None:
            assert (value, page.texts[name]) == ("", "\N{EN DASH}"), name
            continue
        assert float(value) == pytest.approx(counted[name], rel=1e-6, abs=1e-9), name
        number, half = read(page.texts[name].removeprefix("< "))
        half *= 2 if page.texts[name].startswith("< ") else 1
        capped = page.texts[name].startswith("99.9")  # where it is nearly all
        assert abs(number - float(value)) <= (2 * half if capped else half), (name, page.texts[name], value)


def test_the_page_leaves_no_figure_out(shown):
    _, page, counted, nested = shown
    expected = {
        name
        for name, value in counted.items()
        if re.match(r"(totals|methods|prices\.methods|requests|chores|scenarios|slowest\.listed|beside\.terms)\.", name)
        and not isinstance(value, str)
    }
    totals = {f"totals.{name}" for name in nested["totals"]}
    told = {f"totals.{name}" for name in nested["totals"] if nested["totals"][name] not in (0, None)}
    hidden = {f"totals.{name}_requests" for name in ("queued", "running", "failed", "cancelled")}
    words = ("requests", "nfe", "speculative", "padding", "lane_seconds", "seconds_per_nfe", "reward_seconds")
    expected = {name for name in expected - totals if not name.startswith("methods.") or name.split(".")[2] in words}
    expected -= {
        n
        for n in expected
        if re.match(r"prices\.methods\.\d+\.judged|requests\.\d+\.nfe|slowest.*(height|width|frames)", n)
    }
    expected -= {name for name in expected if name.endswith(".beside")}
    expected |= told - hidden
    expected |= {
        f"stages.{i}.{n}" for i, one in enumerate(nested["stages"]) if one["seconds"] for n in ("seconds", "share")
    }
    expected |= {f"kinds.{i}.{n}" for i, one in enumerate(nested["kinds"]) if one["nfe"] for n in ("nfe", "share")}
    ran = "|".join(str(place) for place, one in enumerate(nested["buckets"]) if one["batches"])
    expected |= {n for n in counted if re.match(rf"buckets\.({ran})\.(batches|decoded|table\.\d+\.)", n)}
    expected |= {n for n in counted if re.match(r"levels\.methods\.\d+\.(nfe|seconds|padding|image)", n)}
    expected |= {"limit.share", "span.seconds", "span.lanes", "prices.usd_per_hour", "prices.usd"}
    expected |= {"slowest.compared"} if counted["slowest.compared"] else set()
    assert expected - {*page.shown} == set()


def test_the_page_needs_nothing_else(shown):
    page, parsed, _, _ = shown
    assert "://" not in page and "@import" not in page and "xmlns" not in page
    assert len(page.encode()) < 2 * 2**20
    assert len(parsed.ids) == len({*parsed.ids})
    assert {one or other for one, other in parsed.links} <= {*parsed.ids}
    assert {*re.findall(r"var\(--([a-z_0-9]+)\)", page)} <= {*svg.COLORS}
    assert not re.search("|".join(svg._STAND_INS.values()), page)


def test_pictures_have_a_version_for_each_width_and_say_what_they_show(shown):
    page = shown[0]
    wide, narrow = (re.findall(rf'<svg class="{kind}" viewBox="0 0 (\d+) [^>]*>', page) for kind in ("wide", "narrow"))
    assert len(wide) == len(narrow) >= 5
    labels = re.findall(r'<svg class="wide"[^>]* role="img" aria-label="([^"]+)">', page)
    assert len(labels) == len(wide) and all(re.search(r"\d", label) for label in labels)
    for picture in re.findall(r'<svg class="narrow".*?</svg>', page, re.DOTALL):
        sizes = [float(size) for size in re.findall(r"font-size: ([0-9.]+)px", picture)]
        assert sizes and min(sizes) * 358 / charts.WIDTH[False] >= 12  # pixels on a page that is 390 wide
        assert "font-family" not in picture
    assert min(float(size) for size in re.findall(r"font-size: ([0-9.]+)px", page.split("</style>")[0])) >= 12


# What there may be none of.


def test_a_recording_of_nothing_has_a_page():
    page = report.html(empty(), None, (), USD)
    assert figures(empty())["limit"]["what"] is None and "Nothing was recorded" in page
    assert "No batch ran" in page and "No request was done" in page and "<svg" not in page
    page = report.html(empty(lanes=2, sizes=[]))
    assert re.search(r"no request was here for <data [^>]*>100\s%</data>", page) and "No batch ran" in page
    assert page.count("<svg") == 2  # of the idle lanes


def test_requests_without_rewards_have_a_page(undrawn):
    page = report.html(limited([staged(0, 0.0, 0.6, "forward", judged=0)]))
    assert "No request had a particle judged" in page


def test_failures_and_losses_are_told(undrawn):
    page = re.sub("<[^>]+>", "", report.html(forgetful()))
    assert re.search(r"The ledger forgot \d+ rows, 10 batches", page) and "covers the last" in page
    assert re.search(r"\d+ of the requests failed, \d+ (was|were) cancelled", page)
    assert re.search(r"\d+ calls? of (a reward|rewards) failed", page) and re.search(
        r"encodings? of (a prompt|prompts) took", page
    )


def test_names_that_people_choose_are_text():
    spec = {
        "prompt": "<script>alert(1)</script>",
        "method": "$\\frac$",
        "reward": "<b>\N{CJK UNIFIED IDEOGRAPH-732B}</b>",
    }
    one = staged(0, 0.0, 0.6, "forward", decide_started=0.6, decide_ended=0.7)
    life = {"request": 1, "submitted": 0.0, "ended": 1.0, "state": 2, "score": 1.0, **spec}
    page = report.html(made([one], [row(0, reward=0.5)], [life]))
    assert page.count("<script") == 1 and "<b>" not in page
    assert "&lt;script&gt;alert(1)" in page and "$\\frac$" in page and "\N{CJK UNIFIED IDEOGRAPH-732B}" in page


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"usd_per_hour": 0.0}, "greater than 0"),
        ({"usd_per_hour": math.nan}, "finite"),
        ({"scenarios": [{"name": "decode 0.5x"}]}, "lacks 'seconds'"),
    ],
)
def test_what_cannot_be_shown_is_refused(given, words):
    with pytest.raises(RequestError, match=words):
        report.html(empty(), **given)


def test_without_jinja_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(report, "_template", report._template.__wrapped__)
    with pytest.raises(RequestError, match="pip install 'rollflow"):
        report.html(empty())


def test_images_along_the_way_are_part_of_the_page(tmp_path, undrawn):
    recording = synthetic.busy(requests=20, batches=20)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "1.png")
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "2.webp")
    (tmp_path / "note.png").write_text("no picture")
    (tmp_path.parent / "secret.png").write_bytes((tmp_path / "1.png").read_bytes())
    look = {
        "request": 1,
        "nfe": 12,
        "seconds": synthetic.BEGIN + 0.501,
        "reward": 0.25,
        "file": "1.png",
        "final": False,
    }
    looks = [look, {**look, "nfe": 30, "file": "2.webp", "final": True, "reward": None}]
    looks += [{**look, "file": file} for file in ("gone.png", "note.png", "../secret.png")]
    recording.about["looks"] = looks + [{**look, "request": number} for number in range(2, 21)]
    page = report.save(recording, tmp_path / "report.html", tmp_path).read_text("utf-8")
    assert page.count('src="data:image/png;base64,') == 16 and page.count('src="data:image/webp;base64,') == 1
    assert (
        "12 NFE<br>0.250<br>500" in page
        and "30 NFE<br>\N{EN DASH}" in page
        and page.count('<figure class="final">') == 1
    )
    assert "3 images could not be read" in page and "4 more requests have images" in page
    assert "3 images could not" not in report.html(synthetic.busy(requests=3, batches=20))


def test_a_large_recording_has_a_page_of_two_megabytes():
    recording = recording_of("many")
    batches = recording.batches.copy()
    batches["height"] = 64 + 8 * (np.arange(len(batches)) % 12)
    requests = np.concatenate([recording.requests] * 20)
    requests["reward"] = [f"reward {place % 9}" for place in range(len(requests))]
    page = report.html(replace(recording, batches=batches, requests=requests))
    assert len(page.encode()) < 2 * 2**20
    assert (
        "more image sizes were measured or ran" in page
        and "more rewards are not drawn" in page
        and "requests.parquet" in page
    )


def test_it_can_be_loaded_and_reported_again(tmp_path):
    recording = recording_of("engine")
    again = Recording.load(recording.save(tmp_path))
    assert figures(again, SCENARIOS, USD) == figures(recording, SCENARIOS, USD)
