"""The benchmark of the adapters: every contender is timed, and they make the same pictures."""

import json

import pytest
import torch

from rollflow.bench import adapters, compare
from rollflow.errors import RequestError

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")
SMALL = {"rows": (2,), "prompts": (1,), "lanes": (1,), "nfe": 10, "method": "bon", "device": "cpu"}


def test_all_contenders_are_timed_and_make_the_same_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(adapters, "BUCKETS", (1, 2, 4))
    file, threads = tmp_path / "adapters.json", torch.get_num_threads()
    adapters.Adapters(**SMALL, repetitions=1, json=file)()
    assert torch.get_num_threads() == threads and "PipelineModel" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["expected"] == adapters.EXPECTED and set(found["load"]) == {"before", "after"}
    names = {adapters.FLUX, adapters.PLAIN, adapters.LEARNED, adapters.UNRECORDED}
    for part in ("forward", "decode", "search"):
        rows = [row for row in found["rows"] if row["part"] == part]
        assert {row["contender"] for row in rows} == names and len(rows) == 4
        assert all(row["milliseconds_per_nfe"] > 0 and row["greatest_difference"] < 1e-4 for row in rows)
    assert len(compare.load(file).rows) == len(found["rows"]) == 12  # each can be told from the others


def test_contenders_record_as_their_names_say():
    models = adapters.made(torch.device("cpu"))
    assert {name: one.capabilities.recordable for name, one in models.items()} == {
        adapters.FLUX: True, adapters.PLAIN: False, adapters.LEARNED: True, adapters.UNRECORDED: False,
    }  # fmt: skip
    assert len({one.capabilities.signature for one in models.values()}) == 4
    assert len({id(one.pipeline.vae) for one in models.values()}) == 4


def test_the_interval_is_one_of_ratios_of_neighbours():
    seconds = {adapters.FLUX: [1.0, 2.0, 4.0] * 4, adapters.LEARNED: [2.0, 4.0, 8.0] * 4}  # the machine slows both
    pictures = {adapters.FLUX: torch.zeros(2), adapters.LEARNED: torch.tensor([0.0, 0.25])}
    flux, learned = adapters._rows({"part": "search"}, seconds, 10, pictures)
    assert flux["learned_over_this"] == 2 and flux["interval"] == (2, 2) and flux["milliseconds_per_nfe"] == 200
    assert flux["greatest_difference"] == 0.25 and learned["greatest_difference"] == 0
    assert learned["learned_over_this"] == 1


def test_nothing_is_not_timed():
    with pytest.raises(RequestError, match="repetitions=0: everything is timed at least once"):
        adapters.Adapters(**SMALL, repetitions=0)()
