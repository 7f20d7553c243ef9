"""What limits a run, in small recordings of which the answer is known."""

import re

import numpy as np
import pytest
from report_cases import SCENARIOS
from synthetic import batch, limited, staged

from rollflow.profile import report, spans
from rollflow.profile.report import charts
from rollflow.profile.report.figures import figures
from rollflow.profile.report.lane_time import lane_time
from rollflow.profile.report.units import UNITS, text


@pytest.fixture
def undrawn(monkeypatch):
    """Pages have no pictures: those take time."""
    monkeypatch.setattr(charts, "drawn", lambda name, label, draw: f"({name}: {label})")


@pytest.mark.parametrize(
    ("recording", "what", "share", "words"),
    [
        (limited([staged(0, 0.0, 0.6, "decode"), staged(1, 0.6, 1.0, "forward")]), "decode", 0.6, "Decode limits"),
        (limited([staged(0, 0.0, 0.3, "forward", reward_started=0.3, reward_ended=0.9, reward_seconds=0.6)]),
         "rewards", 0.6, "Rewards limit"),
        (limited([staged(0, 0.0, 0.3, "forward")]), "host", 0.7, "The host limits"),
        (limited([batch(0, 0.0, 0.9, host=0.9)]), "host", 1.0, "The host limits"),
        (limited([staged(0, 0.0, 0.2, "forward")], [(0.0, 0.2)]), "nothing", 0.8, "Nothing limits"),
        (limited([batch(0, 0.0, 0.9, work=3)]), "chores", 0.9, "Chores limit"),
        (limited([staged(0, 0.0, 0.45, "forward"), staged(1, 0.45, 1.0, "decode")], lanes=2), "rows", 0.5,
         "Too few rows"),
        (limited([]), "host", 1.0, "The host limits"),
    ],
)  # fmt: skip
def test_what_limits(recording, what, share, words, undrawn):
    found = figures(recording)["limit"]
    assert (found["what"], found["share"]) == (what, pytest.approx(share, abs=0.001))
    assert found["halved"] == pytest.approx(1 / (1 - share / 2), abs=0.002)
    page = report.html(recording)
    headline = re.search(r"<h1.*?</h1>", page, re.DOTALL)[0]
    assert words in headline and text(found["share"], UNITS["share"]) in headline


def test_the_limit_quotes_a_scenario_that_makes_it_faster(undrawn):
    recording = limited([staged(0, 0.0, 0.6, "decode"), staged(1, 0.6, 1.0, "forward")])
    others = [
        {**SCENARIOS[1], "name": name, "speedup": 9.0} for name in ("forward 0.5x", "decode 2x", "decode 0.5x, 2 GPUs")
    ]
    found = figures(recording, [*others, SCENARIOS[2]])["limit"]
    assert found["scenario"] == {"name": "decode 0.5x", "speedup": 4 / 3}
    assert figures(recording, others)["limit"]["scenario"] is None
    page = report.html(recording, None, [*others, SCENARIOS[2]])
    assert re.search(r"<em>decode 0.5x</em> makes all of it <data [^>]*>1.33x</data> as fast", page)


def test_a_moment_of_loop_and_rewards_is_the_loops():
    one = staged(0, 0.0, 0.2, "forward", reward_started=0.2, reward_ended=0.4, reward_seconds=0.2)
    two = staged(1, 0.6, 1.0, "forward", reward_started=0.2, reward_ended=0.7, reward_seconds=0.5)
    recording = limited([{**one, "decide_started": 0.4, "decide_ended": 0.5}, {**two, "chosen": 0.55}])
    (lane,) = lane_time(recording)
    assert lane["seconds"]["idle_loop"] == pytest.approx(0.15)  # 0.4 to 0.5, 0.55 to 0.6
    assert lane["seconds"]["idle_rewards"] == pytest.approx(0.25)


def test_lanes_that_share_a_device_wait_for_it():
    """Two lanes, whose batches run one after the other on the device: neither the host nor idleness limits."""
    fields = {"forward_started": 0.0, "forward_ended": 0.01, "forward_seconds": 0.01, "host": 0.99}
    batches = [
        batch(lane, 0.0, 1.0, lane, **fields, forward_device_started=0.5 * lane, forward_device_seconds=0.5)
        for lane in (0, 1)
    ]
    recording = limited(batches, lanes=2)
    for lane in lane_time(recording):
        assert lane["seconds"]["forward"] == lane["seconds"]["queue"] == pytest.approx(0.5)
        assert lane["seconds"]["host"] == pytest.approx(0.0, abs=1e-9)
    found = figures(recording)["limit"]
    assert (found["what"], found["share"], found["halved"]) == ("forward", pytest.approx(1.0), pytest.approx(2.0))


def test_sets_of_times():
    one, other = np.array([[0.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 3.5]])
    assert spans.union(one, other).tolist() == [[0.0, 4.0]]
    assert spans.common(one, other).tolist() == [[1.0, 2.0], [3.0, 3.5]]
    assert spans.without(one, other).tolist() == [[0.0, 1.0], [3.5, 4.0]]
    assert spans.between(np.array([0.0, 1.0, np.nan, 5.0]), np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [[0.0, 2.0]]
    assert spans.length(spans.without(spans.NEVER, one)) == 0.0
