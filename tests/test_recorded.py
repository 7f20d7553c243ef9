"""A learned pipeline's network and decoder as recordings on a CPU: the same bits, or the network as it is."""

import gc
import inspect
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_image import IMAGE
from tiny_image_more import MORE
from tiny_video import VIDEO

from rollflow import Engine, Request
from rollflow.models.pipeline import PipelineModel, model
from rollflow.models.pipeline.families import family

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {**IMAGE, **MORE, **VIDEO}
TEXTS = ("a cat", "a dog that runs along a river", "two red circles")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """No machine is too slow for a recording."""
    monkeypatch.setattr(model, "LONG", float("inf"))


def learned(name, change=lambda pipeline: pipeline):
    one = FAMILIES[name]
    pipeline = change(one.build())
    known = family(pipeline)
    made = PipelineModel(pipeline, replace(known, fixed={**known.fixed, **one.call}))
    return made, made.geometry(one.height, one.width, one.frames)


def in_bfloat16(pipeline):
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.data = tensor.data.to(torch.bfloat16) if tensor.is_floating_point() else tensor.data
    return pipeline


def batch(model, geometry, rows, guided=True):
    """Rows of several texts at times on both sides of where experts change."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, geometry.token, geometry.channel, generator=generator).to(model.dtype)
    known = [model.for_request(one, 3.0 if guided else 0.0) for one in model.encode(TEXTS, geometry)]
    scales = torch.linspace(2, 5, rows)
    return x, torch.linspace(0.2, 0.97, rows), [known[i % 3] for i in range(rows)], scales, geometry


def network_calls(model, monkeypatch):
    """Calls of the networks in Python."""
    kind, calls = type(model._network), []
    usual = kind.forward

    def forward(self, *args, **kwargs):
        calls.append(1)
        return usual(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(usual)
    monkeypatch.setattr(kind, "forward", forward)
    return calls


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("FluxPipeline", None), ("StableDiffusion3Pipeline", None), ("LTXPipeline", None),
        ("WanPipeline 2.2 A14B", None), ("StableDiffusion3Pipeline", in_bfloat16),
    ],
)  # fmt: skip
def test_recordings_compute_the_same_bits_for_any_number_of_rows(name, change, monkeypatch):
    model, geometry = learned(name, change or (lambda pipeline: pipeline))
    assert model.capabilities.recordable
    batches = [batch(model, geometry, rows, guided) for rows in (1, 2, 7) for guided in (True, False)]
    latents = [torch.randn(rows, *model.layout.of[geometry].shape, generator=torch.Generator().manual_seed(1))
               for rows in (1, 4)]  # fmt: skip
    with torch.no_grad():
        before = [model.velocity(*one) for one in batches], [model.decode(one) for one in latents]
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            model.record(geometry, batches[0][2][0])
        calls = network_calls(model, monkeypatch)
        after = [model.velocity(*one) for one in batches], [model.decode(one) for one in latents]
        assert not calls
    for one, other in zip([*before[0], *before[1]], [*after[0], *after[1]], strict=True):
        assert torch.equal(one, other)
    x = batches[1][0].clone().requires_grad_()  # with gradients, it runs as it is
    model.velocity(x, *batches[1][1:]).float().square().sum().backward()
    assert calls and x.grad.abs().sum() > 0


def test_times_that_16_bits_merge_stay_apart_in_a_recording(monkeypatch):
    model, geometry = learned("Flux2KleinPipeline", in_bfloat16)
    x, _, known, scales, _ = batch(model, geometry, 2)
    work = (x[:1].repeat(2, 1, 1), torch.tensor([0.901, 0.9012]), [known[0]] * 2, scales[:1].repeat(2), geometry)
    with torch.no_grad():
        before = model.velocity(*work)
        model.record(geometry, known[0])
        calls = network_calls(model, monkeypatch)
        after = model.velocity(*work)
    assert not calls and torch.equal(before, after) and not torch.equal(after[0], after[1])


@pytest.mark.parametrize("name", ["QwenImagePipeline", "CogView4Pipeline"])
def test_calls_whose_form_follows_the_text_stay_as_they_are(name, monkeypatch):
    model, geometry = learned(name)
    work = batch(model, geometry, 3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        before = model.velocity(*work)
        model.record(geometry, work[2][0])
        calls = network_calls(model, monkeypatch)
        assert torch.equal(model.velocity(*work), before) and calls


def test_what_holds_for_one_number_of_rows_runs_as_it_is_with_a_warning(monkeypatch):
    model, geometry = learned("ChromaPipeline")
    work = batch(model, geometry, 4)
    with torch.no_grad():
        before = model.velocity(*work)
        with pytest.warns(RuntimeWarning, match="the transformer runs .* computes something else for another number"):
            model.record(geometry, work[2][0])
        calls = network_calls(model, monkeypatch)
        assert torch.equal(model.velocity(*work), before) and calls


def test_hooks_are_run(monkeypatch):
    model, geometry = learned("StableDiffusion3Pipeline")
    network, seen = model.pipeline.transformer, []
    work = batch(model, geometry, 2)
    handle = network.transformer_blocks[0].register_forward_hook(lambda *_: seen.append("block"))
    with torch.no_grad():
        model.record(geometry, work[2][0])
        model.velocity(*work)
        assert seen == ["block"] * 2  # of the timing of `record` and of the velocity: nothing was recorded
        handle.remove()
        model.record(geometry, work[2][0])
        calls = network_calls(model, monkeypatch)
        handle = network.register_forward_hook(lambda *_: seen.append("network"))
        model.velocity(*work)
        assert seen[2:] == ["network"] and len(calls) == 1
        handle.remove()
        model.velocity(*work)
        assert len(seen) == 3 and len(calls) == 1


def test_what_takes_long_is_not_recorded(monkeypatch):
    made, geometry = learned("StableDiffusion3Pipeline")
    monkeypatch.setattr(model, "LONG", 0.0)
    work = batch(made, geometry, 1)
    with torch.no_grad():
        made.record(geometry, work[2][0])
        calls = network_calls(made, monkeypatch)
        made.velocity(*work)
    assert calls


def test_searches_run_on_recordings_and_leave_no_network_behind(monkeypatch):
    model, _ = learned("StableDiffusion3Pipeline")
    one = FAMILIES["StableDiffusion3Pipeline"]
    asked = {"nfe": 4, "steps": 2, "height": one.height, "width": one.width, "method": "bon"}
    with Engine(model, buckets=[2], lanes=1, threads=1) as engine:
        engine.warm_up(one.height, one.width)
        calls = network_calls(model, monkeypatch)
        result = engine.generate(Request("a cat", lambda images, prompts: images.flatten(1).mean(1), **asked))
        count = len(calls)
    assert result.committed_nfe == 4
    assert not count  # the pipeline's own run, for the text, goes by a stand-in
    parts = [weakref.ref(model.pipeline.transformer), weakref.ref(model.pipeline.vae)]
    del model, engine, result
    gc.collect()
    assert [part() for part in parts] == [None, None]
