"""Traits of checkpoints: the table against the installed diffusers, and files that hold them."""

import importlib
import inspect
import json
import re
import warnings

import diffusers
import pytest
from tiny import engine

from rollflow import Engine, ModelError, RequestError
from rollflow.bench import probes
from rollflow.bench.study import Study
from rollflow.models import Traits, folder, traits
from rollflow.models.known import FILE, KNOWN, traits_of, write_traits

SCALES = ("true_cfg_scale", "guidance_scale")


@pytest.mark.parametrize("name", KNOWN)
def test_numbers_that_diffusers_states_are_those_of_diffusers(name):
    one = KNOWN[name]
    kind = getattr(diffusers, one.pipeline)
    defaults = {key: value.default for key, value in inspect.signature(kind.__call__).parameters.items()}
    example = importlib.import_module(kind.__module__).EXAMPLE_DOC_STRING
    scale = "true_cfg_scale" if one.pipeline == "QwenImagePipeline" else "guidance_scale"
    for number, argument in ((one.steps, "num_inference_steps"), (one.guidance, scale), (one.shift, "flow_shift")):
        if number is None:
            continue
        value, source = number
        if source == "call":
            assert defaults[argument] == value
        if source == "docstring":
            stated = re.findall(rf"{argument} ?= ?([\d.]+)|([\d.]+) for (?:\d+P|T2V)", example)
            assert value in {float(text) for pair in stated for text in pair if text}
    assert traits(name) == one.traits and one.traits.trusted_from == Traits().trusted_from
    assert one.traits.steps == one.steps[0] >= 1


def test_few_step_checkpoints():
    assert traits("black-forest-labs/FLUX.1-schnell") == Traits(4, shift=1.0, guidance=0.0)
    assert traits("stabilityai/stable-diffusion-3.5-large-turbo") == Traits(4, shift=3.0, guidance=0.0)
    assert traits("Tongyi-MAI/Z-Image-Turbo").steps == 8
    assert traits("black-forest-labs/FLUX.1-dev") == Traits(28, guidance=3.5)


def test_other_models_have_the_default_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert traits("somebody/something") == traits(tmp_path) == traits(tmp_path / "none") == Traits()
        assert traits("a\0b") == Traits()
    assert traits("shapes") == Traits(5, 1.0)


def test_a_folder_may_say_what_holds_for_its_model(tmp_path):
    known = Traits(7, 0.35, 2.0, 4.5)
    write_traits(tmp_path / FILE, known, reward="count")
    assert traits_of(tmp_path) == traits(tmp_path) == traits(str(tmp_path)) == known
    (tmp_path / FILE).write_text('{"traits": {"steps": 3}}')
    assert traits(tmp_path) == Traits(3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "hold nothing: expected"),
        ('{"steps": 4}', "hold nothing: expected"),
        ('{"traits": {"step": 4}}', "hold 'step': expected .*steps, trusted_from, shift, guidance"),
        ('{"traits": {"steps": 0}}', "a wrong number: traits.steps=0: it must be a whole number of at least 1"),
        ('{"traits": {"steps": null}}', "a wrong number: traits.steps=None"),
        ('{"traits": {"trusted_from": 2}}', "a wrong number: traits.trusted_from=2"),
        ('{"traits": {"shift": 0}}', "a wrong number: traits.shift=0: it must be above 0"),
        ('{"traits": {"guidance": "no"}}', "a wrong number: traits.guidance='no'"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_files_that_say_something_else(tmp_path, text, message):
    (tmp_path / FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=message) as caught:
        traits(tmp_path)
    assert "\n" not in str(caught.value) and FILE in str(caught.value)


def test_from_pretrained_reads_them(tmp_path):
    for file in folder("shapes").iterdir():
        (tmp_path / file.name).symlink_to(file)
    write_traits(tmp_path / FILE, Traits(3, 0.5, None, 2.5))
    with Engine.from_pretrained(tmp_path, device="cpu", buckets=(4,), lanes=1, threads=1) as made:
        assert made.traits == Traits(3, 0.5, None, 2.5)
        result = made.generate("two red circles", nfe=3, method="bon", reward="count")
        assert len({record.level for record in result.history}) == 3 and result.request.guidance == 2.5
        assert made.generate("two red circles", nfe=3, method="bon", guidance=1.5).request.guidance == 1.5


def test_traits_of_an_engine_are_checked():
    with pytest.raises(RequestError, match=r"traits.shift=0: it must be above 0"):
        engine(traits=Traits(shift=0))
    with pytest.raises(RequestError, match=r"traits.guidance=inf"):
        engine(traits=Traits(guidance=float("inf")))
    with pytest.raises(RequestError, match=r"at most 10000"):
        engine(traits=Traits(10**6))


def test_the_study_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 4)
    file = tmp_path / FILE
    for one in folder("shapes-base").iterdir():
        (tmp_path / one.name).symlink_to(one)
    options = {
        "model": str(tmp_path),
        "prompts": 3,
        "sets": ("medium",),
        "paths": ("linear-ODE",),
        "out": tmp_path / "out",
    }
    Study("fidelity", traits=file, **options)()
    given = json.loads(file.read_text())
    assert given["measured"] == {"model": tmp_path.name, "reward": "count", "prompts": 3, "points": 4}
    found = traits(tmp_path)
    assert found.steps == Traits().steps and 0 <= found.trusted_from <= 1


@pytest.mark.parametrize(
    "options", [{"part": "methods"}, {"part": "diversity"}, {"part": "fidelity", "paths": ("VP-SDE",)}]
)
def test_a_study_that_measures_none_writes_none(tmp_path, options):
    with pytest.raises(RequestError, match=r"--traits .* measures none: it takes the part fidelity, on linear-ODE"):
        Study(traits=tmp_path / FILE, out=tmp_path / "out", **options)()
    with pytest.raises(RequestError, match=r"cannot be written .*choose another --traits"):
        Study("fidelity", traits=tmp_path, out=tmp_path / "out")()
