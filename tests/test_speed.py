"""How an engine is set up to be fast, and what must not change by it."""

import gc
import threading
import weakref
from queue import SimpleQueue

import pytest
import torch
from diffusers import AutoencoderTiny, FluxPipeline

from rollflow.bench import shapes_networks as networks
from rollflow.device import calibrate
from rollflow.device.workers import Lanes
from rollflow.engine import Engine
from rollflow.errors import ModelError, RequestError
from rollflow.models import Capabilities, FlowModel, Geometry, folder
from rollflow.models.acceleration import compile_blocks
from rollflow.models.flux import FluxModel
from rollflow.models.layout import Layout
from rollflow.models.recorded import traced
from rollflow.request import Request
from rollflow.settings import REPRODUCIBLE_BUCKET, batch_sizes

PROMPT = "two red circles and three blue squares"


def brightness(images, prompts):
    return images.mean((1, 2, 3))


class Misleading(FlowModel):
    """A model whose light decoder sees everything inverted; records what was decoded by which."""

    device, dtype, layout = torch.device("cpu"), torch.float32, Layout((1, 2, 2), (1.0,) * 3, (0.0,) * 3)

    capabilities = Capabilities(preview=True)

    def __init__(self):
        self.decoded, self.previewed = 0, 0

    def geometry(self, height=None, width=None):
        return Geometry(8, 8, 8, 8, 16, 12)

    def check_prompt(self, prompt):
        pass

    def encode(self, prompts):
        return [None for _ in prompts]

    def velocity(self, x, tau, conditioning, guidance, geometry):
        return x * 0.5

    def decode(self, latents):
        self.decoded += len(latents)
        return latents.sigmoid()

    def preview(self, latents):
        self.previewed += len(latents)
        return 1 - latents.sigmoid()


@pytest.fixture(scope="module")
def pipeline():
    return FluxPipeline.from_pretrained(folder("shapes"), dtype=torch.float32)


def test_particles_are_judged_on_previews_and_the_best_of_the_decoded_finalists_is_returned():
    request = Request("a", reward=brightness, method="bon", nfe=40, steps=1, finalists=5)
    engine = Engine(Misleading(), preview=True, buckets=(1, 2, 4, 8))
    result = engine.generate(request)
    assert engine.model.previewed == 40 and engine.model.decoded == 5 + 3  # padded to a bucket of eight
    seen = sorted(1 - record.reward for record in result.history)  # by the full decoder
    assert result.reward == pytest.approx(seen[4], abs=1 / 255)  # the brightest of the five that looked brightest
    plain = Engine(Misleading(), buckets=(1, 2, 4, 8))
    assert plain.generate(request).reward == pytest.approx(seen[-1], abs=1 / 255)
    assert plain.model.previewed == 0


def test_previews_have_more_finalists_and_a_finish_has_one():
    engine = Engine(Misleading(), preview=True)
    for options, decoded in (({}, 8), ({"finish": 2}, 1), ({"finalists": 3}, 3)):
        engine.model.decoded = 0
        engine.generate(Request("a", reward=brightness, method="bon", nfe=30, steps=2, **options))
        assert engine.model.decoded == decoded


def test_the_built_in_models_have_a_light_decoder():
    torch.manual_seed(0)
    full, light = (Engine.from_pretrained("shapes", preview=preview) for preview in (False, True))
    request = Request(PROMPT, method="bon", nfe=4, steps=4, seed=1, diffusion=0)
    a, b = full.generate(request), light.generate(request)
    assert torch.allclose(a.pixels, b.pixels, atol=1e-5)  # what is returned is decoded in full
    latents = light.model.vae.encode(a.pixels[None] * 2 - 1).latent_dist.mode()
    difference = (light.model.preview(latents) - light.model.decode(latents)).abs().mean()
    assert 0 < difference < 0.02
    assert light.ledger.seconds["decode"] > 0


def test_a_light_decoder_may_be_an_autoencoder_tiny_of_any_scale(pipeline):
    torch.manual_seed(0)
    for channels, blocks in ((3, (8, 8, 8, 8)), (12, (8, 8, 8)), (48, (8, 8))):
        tiny = AutoencoderTiny(
            out_channels=channels,
            latent_channels=8,
            encoder_block_out_channels=blocks,
            decoder_block_out_channels=blocks,
            num_encoder_blocks=(0,) * len(blocks),
            num_decoder_blocks=(1,) * len(blocks),
            scaling_factor=2.0,
            shift_factor=0.25,
        )
        model = FluxModel(pipeline, tiny)
        latents = torch.randn(3, 8, 8, 8)
        images = model.preview(latents)
        assert images.shape == (3, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
        own = model.layout.normalise(latents) / 2.0 + 0.25
        drawn = torch.nn.functional.pixel_shuffle(tiny.decode(own).sample, round((channels / 3) ** 0.5))
        torch.testing.assert_close(images, (drawn / 2 + 0.5).clamp(0, 1))


def test_what_there_is_no_light_decoder_for(pipeline, tmp_path):
    with pytest.raises(RequestError, match="no light decoder"):
        Engine(pipeline, preview=True)
    pipeline.save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match=r"no folder 'preview' with a light decoder: pass the folder or hub id"):
        Engine.from_pretrained(tmp_path / "plain", preview=True)
    with pytest.raises(ModelError, match="is no autoencoder that can be loaded"):
        Engine.from_pretrained("shapes", preview=tmp_path)
    with pytest.raises(ModelError, match="a light decoder is an AutoencoderTiny or AutoencoderKL"):
        Engine.from_pretrained("shapes", preview=folder("shapes") / "transformer")


def test_a_reproducible_engine_has_one_bucket_and_its_results_do_not_depend_on_the_load(pipeline):
    mine = Request(PROMPT, nfe=14, steps=4, seed=3, method="rbf")
    others = [Request("a blue triangle", nfe=8 + i, steps=3, seed=i) for i in range(3)]
    found = [Engine(pipeline, reproducible=True).generate(load)[0] for load in ([mine], [mine, *others])]
    assert torch.equal(found[0].pixels, found[1].pixels) and found[0].history == found[1].history
    soft = Request(PROMPT, nfe=12, steps=4, seed=3, reward="soft_count", method="smc")
    mates = [
        Request("a blue triangle", nfe=8 + i, steps=3, seed=i, reward=("soft_count", "count")[i % 2]) for i in range(3)
    ]
    found = [Engine(pipeline, reproducible=True).generate(load)[0] for load in ([soft], [soft, *mates])]
    assert torch.equal(found[0].pixels, found[1].pixels) and found[0].history == found[1].history
    engine = Engine(pipeline, reproducible=True)
    assert [*engine.buckets()] == [REPRODUCIBLE_BUCKET]
    with pytest.raises(RequestError, match="a reproducible engine has a single batch size"):
        Engine(pipeline, reproducible=True, buckets=(8, 16))
    with pytest.raises(RequestError, match="a multiple of 8"):
        Engine(pipeline, reproducible=True, buckets=(5,))


def test_the_callers_number_of_threads_stays_as_it_is():
    usual, seen, judging = torch.get_num_threads(), [], SimpleQueue()
    lanes = Lanes(torch.device("cpu"), 2, 1)
    lanes.judge(judging, False, lambda turn: judging.put(torch.get_num_threads()))
    assert lanes.run(torch.get_num_threads).result() == judging.get(timeout=60) == 1
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert torch.get_num_threads() == usual == seen[0]
    lanes.close()


def test_lanes_and_threads_that_cannot_be():
    for options, what in (({"lanes": 0}, "lanes=0"), ({"threads": 0}, "threads=0"), ({"buckets": (4, 2)}, "ascending")):
        with pytest.raises(RequestError, match=what):
            Engine(Misleading(), **options)
    for buckets in (8, "abc", [2.5], [], [0]):
        with pytest.raises(RequestError, match="buckets"):
            batch_sizes(buckets, False, True)
    assert Engine(Misleading(), lanes=3, threads=1).lanes.count == 3


def test_measured_costs_are_kept_for_the_process(pipeline, monkeypatch):
    asked = []

    def seconds(model, geometry, conditioning, bucket, *rest):
        asked.append(bucket)
        return 0.01 + bucket / 1000

    monkeypatch.setattr(calibrate, "_seconds", seconds)
    monkeypatch.setattr(calibrate, "_seconds_by", {})
    for _ in range(2):
        engine = Engine(pipeline, buckets=(1, 8, 32), lanes=1, threads=1)
        engine.warm_up()
        assert engine.buckets() == pytest.approx({1: 0.011, 8: 0.018, 32: 0.042})
    assert asked == [1, 8, 32]


def test_prompts_are_encoded_before_the_text_encoders_go():
    engine = Engine.from_pretrained("shapes")
    engine.encode([PROMPT])
    with pytest.raises(RequestError, match="does not know"):
        engine.encode(["a purple dragon"])
    engine.release_text_encoders()
    assert engine.model.pipeline.text_encoder is None
    assert engine.generate(PROMPT, nfe=10, steps=2).committed_nfe == 10
    with pytest.raises(RequestError, match="was not encoded before the text encoders were released"):
        engine.generate("four green squares", nfe=10, steps=2)
    with pytest.raises(RequestError, match="has no text encoders"):
        Engine(Misleading()).release_text_encoders()


def test_acceleration_that_cannot_be():
    for options, error, what in (
        ({"compile": "whole"}, RequestError, "compile='whole': choose regional or all"),
        ({"attention": "fast"}, RequestError, "attention='fast': choose one of flash, efficient, cudnn, math"),
        ({"quantize": "int3"}, RequestError, "quantize='int3': choose fp8"),
    ):
        with pytest.raises(error, match=what):
            Engine.from_pretrained("shapes", device="cpu", **options)
    with pytest.raises(ModelError, match="and this is cpu"):
        Engine.from_pretrained("shapes", device="cpu", quantize="fp8")
    with pytest.raises(ModelError, match="does not say which blocks it repeats"):
        compile_blocks(torch.nn.Linear(1, 1), "regional")


def test_pinned_attention_gives_the_same_velocities(pipeline):
    x, tau = torch.randn(2, 16, 32), torch.tensor([1.0, 0.5])
    plain, pinned = FluxModel(pipeline), FluxModel(pipeline, attention="math")
    conditioning = plain.encode([PROMPT, PROMPT])
    work = (x, tau, conditioning, torch.zeros(2), plain.geometry())
    torch.testing.assert_close(plain.velocity(*work), pinned.velocity(*work), atol=2e-5, rtol=1e-4)


def test_a_released_model_leaves_no_hook_on_the_pipeline():
    pipeline = networks.pipeline(networks.autoencoder(), networks.transformer(), *networks.text_encoders())
    hooks = pipeline.transformer.time_text_embed._forward_pre_hooks
    model = FluxModel(pipeline)
    assert len(hooks) == 1
    del model
    assert not hooks


def test_dtype_auto_is_one_of_two():
    assert Engine.from_pretrained("shapes", device="cpu", dtype="auto").model.dtype in (torch.float32, torch.bfloat16)


def test_recorded_networks_compute_the_same_bits_for_any_number_of_rows(pipeline):
    eager, recorded = FluxModel(pipeline), FluxModel(pipeline)
    geometry = eager.geometry()
    conditioning = eager.encode([PROMPT, "a blue triangle"])
    recorded.record(geometry, conditioning[0])
    for rows in (1, 2, 7, 16):
        x, tau = torch.randn(rows, 16, 32), torch.linspace(0.07, 1, rows)
        work = (x, tau, [conditioning[i % 2] for i in range(rows)], torch.zeros(rows), geometry)
        with torch.no_grad():
            assert torch.equal(recorded.velocity(*work), eager.velocity(*work))
            latents = torch.randn(rows, 8, 8, 8)
            assert torch.equal(recorded.decode(latents), eager.decode(latents))
    x = torch.randn(1, 16, 32, requires_grad=True)  # with gradients, the networks run as they are
    recorded.velocity(x, torch.ones(1), conditioning[:1], torch.zeros(1), geometry).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_recording_does_not_outlive_its_networks():
    model = FluxModel(networks.pipeline(networks.autoencoder(), networks.transformer(), *networks.text_encoders()))
    model.record(model.geometry(), model.encode([PROMPT])[0])
    weights = [weakref.ref(model.transformer), weakref.ref(model.vae)]
    del model
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


def test_what_cannot_be_recorded_runs_as_it_is_with_a_warning():
    nothing = torch.nn.Identity()

    def by_rows(x):
        return x * len(x.tolist())  # a constant for the tracer

    with pytest.warns(
        RuntimeWarning, match="the thing runs with Python between its operations .*another number of rows"
    ):
        function = traced(by_rows, nothing, (torch.ones(2),), (torch.ones(3),), "thing")
    assert function is by_rows

    def fails(x):
        raise RuntimeError("no such thing")

    with pytest.warns(RuntimeWarning, match="no such thing"):
        assert traced(fails, nothing, (torch.ones(2),), (torch.ones(3),), "thing") is fails
    assert torch.equal(
        traced(torch.sin, nothing, (torch.ones(2),), (torch.ones(3),), "thing")(torch.ones(5)), torch.ones(5).sin()
    )
