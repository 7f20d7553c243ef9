"""What the report's pictures draw, against the figures that are counted once more."""

import numpy as np
import pytest
import recount_figures
from recount import Recount
from report_cases import recording_of

from rollflow.profile.report import charts, svg
from rollflow.profile.report.figures import figures


@pytest.fixture(scope="module", params=["engine", "device", "many"])
def case(request, tmp_path_factory):
    """The figures of a recording, and the same counted from its files."""
    recording = recording_of(request.param)
    folder = recording.save(tmp_path_factory.mktemp("recording"))
    return figures(recording), recount_figures.all_of(Recount(folder))


def figure(draw):
    with svg.style(12):
        return draw(True)


def test_bars_draw_the_shares(case):
    found, counted = case
    rows = [("lane", {one["name"]: one["seconds"] for one in found["stages"] if one["seconds"]})]
    widths = [patch.get_width() for patch in figure(charts.bars(rows, "share")).axes[0].patches]
    assert widths == pytest.approx([100 * one["share"] for one in counted["stages"] if one["seconds"]])


def test_the_timeline_draws_rows_up_to_the_bucket(case):
    found, counted = case
    axes, expected = figure(charts.timeline(found["timeline"])).axes, counted["timeline"]
    lanes = [expected] if expected["binned"] else expected["lanes"]
    assert len(axes) == len(lanes)
    for panel, lane in zip(axes, lanes, strict=True):
        *filled, outline = (patch.get_data() for patch in panel.patches)
        step = 1 if expected["binned"] else 2
        assert outline.values[::step] == pytest.approx(lane["bucket"])
        drawn = [name for name in lane["rows"] if any(lane["rows"][name])]
        assert len(filled) == len(drawn)
        for one, name in zip(filled, drawn, strict=True):
            assert (one.values - one.baseline)[::step] == pytest.approx(lane["rows"][name])
        if step == 2:
            assert outline.edges[::2] == pytest.approx(lane["started"]) and not outline.values[1::2].any()
            assert outline.edges[1::2] == pytest.approx(lane["ended"])
        assert filled[-1].values == pytest.approx(outline.values)


def test_levels_draw_stacks(case):
    found, counted = case
    for panel, what, beside in zip(
        figure(charts.levels(found["levels"])).axes, ("nfe", "seconds"), (1, 2), strict=True
    ):
        heights = [bar.get_height() for bar in panel.patches]
        expected = []
        for one in counted["levels"]["methods"]:
            expected += [*one[what], *(one[f"padding_{what}"], one["image_seconds"])[:beside]]
        assert heights == pytest.approx(expected)


def test_progress_draws_the_curves(case):
    found, counted = case
    colors = {one["method"]: place for place, one in enumerate(found["methods"])}
    for reward in {one["reward"] for one in counted["curves"]}:
        own = [one for one in counted["curves"] if one["reward"] == reward and one["drawn"]]
        mine = [one for one in found["curves"] if one["reward"] == reward and one["drawn"]]
        band = [one for one in found["bands"] if one["reward"] == reward]
        panels = figure(charts.progress(mine, band[0] if band else None, colors, {})).axes
        for panel, axis in zip(panels, ("nfe", "seconds"), strict=True):
            lines = [line for line in panel.lines if line.get_linestyle() == "-"]
            assert len(lines) == len(own)
            for line, curve in zip(lines, own, strict=True):
                assert line.get_xdata() == pytest.approx(curve[axis]) and line.get_drawstyle() == "steps-post"
                assert line.get_ydata() == pytest.approx(curve["best"])


def test_buckets_draw_points_medians_and_the_model(case):
    found, counted = case
    for mine, own in zip(found["buckets"], counted["buckets"], strict=True):
        network, decode, medians, model = figure(charts.buckets(mine)).axes[0].lines
        scale = 1000.0  # milliseconds
        assert medians.get_ydata() == pytest.approx([scale * one["total"] for one in own["table"]])
        assert network.get_ydata() == pytest.approx([scale * one for one in own["points"]["network"]])
        drawn = decode.get_ydata()
        assert drawn[~np.isnan(drawn)] == pytest.approx([scale * one for one in own["points"]["decode"] if one])
        assert model.get_ydata() == pytest.approx([scale * one for one in own["fit"]["seconds"]])
        assert medians.get_xdata() == pytest.approx([one["bucket"] for one in own["table"]])
