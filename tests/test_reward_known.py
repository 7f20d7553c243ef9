"""The table of weights that rewards use: nothing that a reward loads is missing, and nothing in it is unused."""

import re

import pytest

from rollflow import rewards
from rollflow.rewards import known
from rollflow.rewards.network import NetworkReward

BACKED = [name for name in rewards.names() if isinstance(rewards.make(name), NetworkReward)]
OPTIONS = {  # what rewards load if they are asked to, and by which option
    "Qwen/Qwen2.5-VL-3B-Instruct": "vqa:model=",
    "zhiqiulin/clip-flant5-xxl": "vqa:model=",
    "zhiqiulin/clip-flant5-xl": "vqa:model=",
    "IDEA-Research/grounding-dino-base": "count:model=",
    "google/owlv2-base-patch16-ensemble": "count:model=",
    "facebook/sam-vit-base": "count:model=IDEA-Research/grounding-dino-base,masks=",
}


def of(entry):
    """The rewards that an entry names before the colon of its source."""
    return re.split(r",? and |, ", entry.source.partition(":")[0].removesuffix(", masks"))


def loaded(spec):
    """The models that a reward loads."""
    return {one.model: one.revision for one in rewards.make(spec).wanted()}


@pytest.mark.parametrize("name", BACKED)
def test_what_a_reward_loads_is_in_the_table_at_its_revision(name):
    entries = {entry.model: entry for entry in known.WEIGHTS}
    for model, revision in loaded(name).items():
        assert model in entries, f"{name} loads {model}, which is not in known.WEIGHTS"
        assert revision == entries[model].revision == known.revision(model)
        assert name in of(entries[model]), f"the entry of {model} does not name {name}"


@pytest.mark.parametrize("entry", known.WEIGHTS, ids=lambda entry: entry.model)
def test_what_is_in_the_table_is_loaded(entry):
    assert set(of(entry)) <= {*rewards.names()}
    specs = [*BACKED, *(f"{option}{model}" for model, option in OPTIONS.items())]
    assert any(entry.model in loaded(spec) for spec in specs)
    if entry.model in OPTIONS:
        assert loaded(f"{OPTIONS[entry.model]}{entry.model}")[entry.model] == entry.revision


@pytest.mark.parametrize("entry", known.WEIGHTS, ids=lambda entry: entry.model)
def test_an_entry_is_complete(entry):
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.model)
    assert entry.revision is None or re.fullmatch(r"[0-9a-f]{40}", entry.revision)
    assert ("commit" in entry.source) == (entry.revision is not None)  # where a pin comes from is said
    assert entry.licence and 0 < entry.gigabytes < 100 and "\n" not in entry.source


def test_no_model_and_no_commit_is_there_twice():
    assert len({entry.model for entry in known.WEIGHTS}) == len(known.WEIGHTS)
    pins = [entry.revision for entry in known.WEIGHTS if entry.revision]
    assert len({*pins}) == len(pins)


def test_another_model_has_no_pin():
    assert known.revision("some/other") is None
    assert rewards.make("hps:model=some/other").wanted()[0].revision is None
    assert rewards.make("hps:revision=main").wanted()[0].revision == "main"
