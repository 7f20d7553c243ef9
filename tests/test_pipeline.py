"""What is learned of pipelines, what is refused, and that the pipelines stay as they are."""

import copy
import gc
import inspect
import threading
import weakref
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_image import IMAGE, lumina2, sana, stable_diffusion_3, z_image
from tiny_image_more import MORE
from tiny_text import clip, tiny
from tiny_video import VIDEO

from rollflow import Engine, Request
from rollflow.errors import LONGEST, ModelError, RequestError
from rollflow.models import Geometry, adapt
from rollflow.models.layout import Layout
from rollflow.models.pipeline import Family, PipelineModel, learn, memory
from rollflow.models.pipeline.exact import ExactTimes
from rollflow.models.pipeline.families import family
from rollflow.models.pipeline.recording import Recording
from rollflow.models.text import Text

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {**IMAGE, **MORE, **VIDEO}


def model_of(name, pipeline=None, **fixed):
    one = FAMILIES[name]
    pipeline = one.build() if pipeline is None else pipeline
    known = family(pipeline)
    return PipelineModel(pipeline, replace(known, fixed={**known.fixed, **one.call, **fixed}))


def geometry_of(name, model):
    one = FAMILIES[name]
    return model.geometry(one.height, one.width, one.frames)


def refused(kind, message, call, *args):
    with pytest.raises(kind, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= LONGEST


def in_bfloat16(pipeline):
    """The pipeline as it is loaded in bfloat16: some modules stay in 32 bits."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            kept = getattr(part, "_keep_in_fp32_modules", None) or ()
            for name, tensor in (*part.named_parameters(), *part.named_buffers()):
                if tensor.is_floating_point() and not any(word in name.split(".") for word in kept):
                    tensor.data = tensor.data.to(torch.bfloat16)
    return pipeline


# What is refused, and why.


def test_models_that_predict_noise_are_refused():
    tokenizer, encoder = clip()
    blocks = {"block_out_channels": (4, 4), "norm_num_groups": 2, "layers_per_block": 1, "cross_attention_dim": 16}
    blocks |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = tiny(diffusers.UNet2DConditionModel, sample_size=8, **blocks, attention_head_dim=2)
    vae = stable_diffusion_3().vae
    diffusion = diffusers.StableDiffusionPipeline(
        vae, encoder, tokenizer, unet, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )
    refused(ModelError, "DDIMScheduler: its model must be one of flow matching", adapt, diffusion)


@pytest.mark.parametrize("kind", [diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler])
@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"prediction_type": "flow_prediction"}, "it is 'flow_prediction'. and use_flow_sigmas=True .it is False"),
        ({"use_flow_sigmas": True}, "it is 'epsilon'. and use_flow_sigmas=True .it is True"),
    ],
)
def test_schedulers_that_are_flow_by_half_are_refused(kind, config, found):
    pipeline = stable_diffusion_3()
    pipeline.scheduler = kind(**config)
    refused(ModelError, f"has a {kind.__name__}: its model must be one of flow matching, .*{found}", adapt, pipeline)


@pytest.mark.parametrize(
    ("sigmas", "times", "message"),
    [
        ([14.6, 0.9, 0.4, 0.0], [999, 800, 500], r"noise levels reach 14.6, those of flow matching lie in \[0, 1\]"),
        ([1.0, 0.9, 0.0], [1000, 500], "times follow its noise levels in a way that is not known"),
        ([1.0, 0.9, 0.5, 0.0], [1000, 500, 400], "times follow its noise levels in a way that is not known"),
    ],
)
def test_a_clock_is_learned_from_enough_noise_levels_of_flow_matching(sigmas, times, message):
    recording = Recording()
    recording.sigmas, recording.timesteps = sigmas, times
    refused(ModelError, message, learn._clock, model_of("StableDiffusion3Pipeline").driver, recording)


def test_trigflow_is_refused():
    pipeline = sana()
    parts = {name: pipeline.components[name] for name in ("tokenizer", "text_encoder", "vae", "transformer")}
    sprint = diffusers.SanaSprintPipeline(scheduler=diffusers.SCMScheduler(), **parts)
    refused(ModelError, "SCMScheduler: .* TrigFlow, are not sampled here", adapt, sprint)


@pytest.mark.parametrize(
    ("part", "lacks"), [("transformer", "transformer"), ("vae", "vae"), ("scheduler", "scheduler")]
)
def test_pipelines_that_lack_a_part_are_refused(part, lacks):
    pipeline = stable_diffusion_3()
    setattr(pipeline, part, None)
    refused(ModelError, f"lacks {lacks}: pass a whole pipeline", adapt, pipeline)


def test_a_pipeline_that_cannot_be_run_says_what_it_lacks():
    pipeline = lumina2()
    pipeline.text_encoder = None
    refused(ModelError, "Lumina2Pipeline cannot be run: .*it lacks text_encoder", adapt(pipeline).geometry, 32, 48)


def test_guidance_with_momentum_is_refused():
    pipeline = MORE["HunyuanImagePipeline"].build()
    pipeline.guider = diffusers.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5)
    model = model_of("HunyuanImagePipeline", pipeline)
    refused(
        ModelError, "none of the .* known forms|guidance changes at step", geometry_of, "HunyuanImagePipeline", model
    )
    pipeline.guider = diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=5)
    refused(ModelError, "guidance changes at step [0-9]", geometry_of, "HunyuanImagePipeline", model)


@pytest.mark.parametrize(
    ("name", "fixed", "message"),
    [
        ("StableDiffusion3Pipeline", {"skip_guidance_layers": [0]}, "guidance changes at step 1 of 12"),
        ("Lumina2Pipeline", {"cfg_trunc_ratio": 0.5}, "called 2 times .* and 1 times .* depends on the step"),
    ],
)
def test_guidance_that_depends_on_the_step_is_refused(name, fixed, message):
    refused(ModelError, message, geometry_of, name, model_of(name, **fixed))


@pytest.mark.parametrize("distort", [lambda scale: scale.clamp(min=3), torch.sqrt, lambda scale: 16 / scale])
def test_a_scale_that_is_not_embedded_linearly_is_refused(distort):
    class Bent(diffusers.FluxPipeline):
        def __call__(self, *args, **kwargs):
            usual = self.transformer.forward

            def forward(guidance, **rest):
                return usual(guidance=distort(guidance), **rest)

            self.transformer.forward = forward
            return super().__call__(*args, **kwargs)

        __call__.__signature__ = inspect.signature(diffusers.FluxPipeline.__call__)

    pipeline = Bent(**IMAGE["FluxPipeline"].build().components)
    model = PipelineModel(pipeline, Family(fixed=IMAGE["FluxPipeline"].call))
    message = r"argument guidance of its network is [\d.]+ at guidance 2, and .* is not embedded linearly is refused"
    refused(ModelError, message, model.geometry, 32, 48)


def test_experts_with_scales_of_their_own_are_refused():
    model = model_of("WanPipeline 2.2 A14B", guidance_scale_2=2.0)
    refused(ModelError, "guidance changes at step [0-9]", geometry_of, "WanPipeline 2.2 A14B", model)


class Until(diffusers.StableDiffusion3Pipeline):
    """Guides at times above 200 alone."""

    @property
    def guidance_scale(self):
        return self._guidance_scale if self._at > 200 else 1.0

    def __call__(self, *args, **kwargs):
        usual = self.transformer.forward

        def forward(hidden_states, timestep, **rest):
            self._at = float(timestep[0])
            return usual(hidden_states=hidden_states, timestep=timestep, **rest)

        self.transformer.forward = forward
        return super().__call__(*args, **kwargs)

    __call__.__signature__ = inspect.signature(diffusers.StableDiffusion3Pipeline.__call__)


class Mixing(diffusers.StableDiffusion3Pipeline):
    """Hands its network a state that is multiplied by the time."""

    def __call__(self, *args, **kwargs):
        usual = self.transformer.forward

        def forward(hidden_states, timestep, **rest):
            return usual(hidden_states=hidden_states * timestep.view(-1, 1, 1, 1), timestep=timestep, **rest)

        self.transformer.forward = forward
        return super().__call__(*args, **kwargs)

    __call__.__signature__ = inspect.signature(diffusers.StableDiffusion3Pipeline.__call__)


class Scaling(diffusers.StableDiffusion3Pipeline):
    """Makes another velocity of what its network gives than any form of guidance."""

    def __call__(self, *args, **kwargs):
        step = self.scheduler.step
        self.scheduler.step = lambda output, *rest, **named: step(output.tanh(), *rest, **named)
        return super().__call__(*args, **kwargs)

    __call__.__signature__ = inspect.signature(diffusers.StableDiffusion3Pipeline.__call__)


class Brightening(diffusers.StableDiffusion3Pipeline):
    """Does more to its pixels than its decoder."""

    def __call__(self, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        return type(made)(images=made.images.sqrt())

    __call__.__signature__ = inspect.signature(diffusers.StableDiffusion3Pipeline.__call__)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Until, "its guidance changes at step [0-9]+ of 12: what depends on the time"),
        (Mixing, "hidden_states of the network depends on state and time at once"),
        (Scaling, r"what it makes of the outputs of its network \(2 a state\) is none of the"),
        (Brightening, "its pixels differ by .* from those of its decoder alone"),
    ],
)
def test_what_no_rule_describes_is_refused_and_leaves_nothing(kind, message):
    parts = stable_diffusion_3().components
    called("StableDiffusion3Pipeline", diffusers.StableDiffusion3Pipeline(**parts))
    pipeline = kind(**parts)
    model, before = model_of("StableDiffusion3Pipeline", pipeline), state_of(pipeline)
    refused(ModelError, message, geometry_of, "StableDiffusion3Pipeline", model)
    assert not model.spaces and not model.layout.of and not memory.known(pipeline.transformer)
    assert state_of(pipeline) == before
    refused(ModelError, message, geometry_of, "StableDiffusion3Pipeline", model)  # again, the same


def test_sizes_that_a_pipeline_rounds_or_refuses_are_refused():
    model = model_of("HiDreamImagePipeline")  # every size has the same area
    refused(
        RequestError,
        r"height=64: the pipeline .* makes \d+x\d+ of what was asked; ask for that",
        model.geometry,
        64,
        96,
    )
    model = model_of("StableDiffusion3Pipeline")
    refused(RequestError, "StableDiffusion3Pipeline refuses this: .*divisible by", model.geometry, 33, 48)
    refused(RequestError, "frames=5: .* makes images; leave it out", model.geometry, 32, 48, 5)
    assert not model.spaces
    model = model_of("WanPipeline 2.1")
    refused(RequestError, "frames=6: the pipeline WanPipeline makes 32x48, 5 frames", model.geometry, 32, 48, 6)


@pytest.mark.parametrize("name", ["FluxPipeline", "HunyuanVideoPipeline"])
def test_a_negative_prompt_is_refused_where_guidance_is_embedded(name):
    model = model_of(name)
    geometry = geometry_of(name, model)
    assert not model.capabilities.negative
    refused(RequestError, f"negative='blurred': {name} has no classifier-free guidance", model.encode,
            [Text("a cat", "blurred")], geometry)  # fmt: skip
    one = FAMILIES[name]
    asked = {"nfe": 2, "steps": 2, "height": one.height, "width": one.width, "frames": one.frames}
    with Engine(model, buckets=[1], lanes=1, threads=1) as engine:
        refused(RequestError, "no classifier-free guidance", engine.generate,
                Request("a cat", brightness, method="bon", negative="blurred", **asked))  # fmt: skip


def test_a_second_scale_can_be_the_one_of_requests():
    pipeline, one = IMAGE["FluxPipeline"].build(), IMAGE["FluxPipeline"]
    known = Family("true_cfg_scale", fixed={**one.call, "guidance_scale": 2.0}, negative_needed=True)
    model = PipelineModel(pipeline, known)
    geometry = model.geometry(32, 48)
    plain, other = model.encode(["a cat", Text("a cat", "blurred")], geometry)
    assert model.capabilities.negative and model.network_rows(plain) == 2
    x, tau, scale = torch.randn(1, 1, geometry.channel), torch.tensor([0.5]), torch.tensor([4.0])
    with torch.no_grad():
        found = [model.velocity(x, tau, [one], scale, geometry) for one in (plain, other)]
    assert (found[0] - found[1]).abs().max() > 1e-3


# What stays as it was.


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def called(name, pipeline):
    """The pipeline after a call of its user's: encoders of transformers install hooks when they first run."""
    one = FAMILIES[name]
    size = {"height": one.height, "width": one.width, "num_inference_steps": 1}
    pipeline(prompt="a cat", **size, **one.call, output_type="latent")
    return pipeline


def state_of(pipeline):
    """All that a pipeline and its parts hold, in plain values and identities."""
    found = {"pipeline": {name: id(value) for name, value in vars(pipeline).items()}, "config": repr(pipeline.config)}
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                own = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
                found[name, path] = own, module.training, sorted(vars(module)), id(module)
            for path, tensor in (*part.named_parameters(), *part.named_buffers()):
                kept = tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.requires_grad, tensor._version
                found[name, path, "tensor"] = kept, float(tensor.detach().double().sum())
        elif part is not None:
            found[name] = repr(sorted(vars(part))), repr(getattr(part, "config", None))
    scheduler = {name: repr(value) for name, value in vars(pipeline.scheduler).items()}
    return {**found, "scheduler": scheduler}


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "HunyuanImagePipeline", "Kandinsky5T2IPipeline"])
@pytest.mark.parametrize("low", [False, True])
def test_learning_and_running_leave_the_pipeline_as_it_was(name, low, capfd):
    pipeline, one = FAMILIES[name].build(), FAMILIES[name]
    pipeline = called(name, in_bfloat16(pipeline) if low else pipeline)
    pipeline.transformer.train()
    before, _ = state_of(pipeline), capfd.readouterr()
    asked = {"nfe": 2, "steps": 2, "height": one.height, "width": one.width, "grid": "model"}
    with Engine(model_of(name, pipeline), buckets=[2], lanes=1, threads=1) as engine:
        engine.generate([Request("a cat", brightness, method="bon", diffusion=0, interpolant="linear", **asked)] * 2)
    assert state_of(pipeline) == before
    assert capfd.readouterr().err == ""  # no bars


def test_two_threads_may_ask_for_sizes_while_others_run():
    model = model_of("StableDiffusion3Pipeline")
    first, errors, found = model.geometry(32, 48), [], []
    known = model.encode(["a cat"], first)

    def ask(height, width):
        try:
            found.append(model.geometry(height, width))
            model.encode(["a dog", "a cat"], found[-1])
        except Exception as error:  # reported below
            errors.append(error)

    threads = [threading.Thread(target=ask, args=size) for size in ((48, 32), (48, 32), (32, 32), (32, 48))]
    for thread in threads:
        thread.start()
    x, tau = torch.randn(1, 1, first.channel), torch.tensor([0.5])
    with torch.no_grad():
        runs = [model.velocity(x, tau, known, torch.tensor([3.0]), first) for _ in range(20)]
    for thread in threads:
        thread.join()
    assert not errors and sorted(map(str, found)) == ["32x32", "32x48", "48x32", "48x32"]
    assert all(torch.equal(one, runs[0]) for one in runs)
    assert len(model.spaces) == 3


# What is learned once.


def test_a_pipeline_is_learned_once(monkeypatch):
    pipeline = z_image()
    model_of("ZImagePipeline", pipeline).geometry(32, 48)
    asked = []
    run = diffusers.ZImagePipeline.__call__

    def counting(self, *args, **kwargs):
        asked.append(kwargs)
        return run(self, *args, **kwargs)

    counting.__signature__ = inspect.signature(run)
    monkeypatch.setattr(diffusers.ZImagePipeline, "__call__", counting)
    again = model_of("ZImagePipeline", pipeline)
    geometry = again.geometry(32, 48)
    assert not asked and set(again.spaces[geometry].errors) == {"guided", "not guided", "pixels"}
    known = again.encode(["a cat"], geometry)
    assert again.velocity(
        torch.randn(1, 1, geometry.channel), torch.tensor([0.5]), known, torch.ones(1), geometry
    ).any()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    asked.clear()
    model_of("ZImagePipeline", pipeline).geometry(32, 48)
    assert asked  # it is another pipeline now
    network = weakref.ref(pipeline.transformer)
    del pipeline, again
    gc.collect()
    assert network() is None  # what was learned keeps nothing alive


@pytest.mark.parametrize(
    ("name", "calls", "rows"),
    [("FluxPipeline", 5, 7), ("StableDiffusion3Pipeline", 9, 20), ("LTXPipeline", 9, 20), ("WanPipeline 2.1", 12, 19)],
)
def test_a_size_takes_few_forwards_of_the_network(name, calls, rows):
    model, made = model_of(name), []
    model.pipeline.transformer.register_forward_hook(lambda module, args, output: made.append(len(output[0])))
    geometry_of(name, model)
    assert 0 < len(made) <= calls and sum(made) <= rows  # as the docstring of `memory` says; stand-ins make none


def test_texts_are_encoded_once_for_a_size():
    pipeline, calls = stable_diffusion_3(), []
    hook = pipeline.text_encoder_3.register_forward_hook(lambda *_: calls.append(1))
    model = model_of("StableDiffusion3Pipeline", pipeline)
    model.geometry(32, 48)
    hook.remove()
    assert len(calls) < 30


# Details of what is learned.


def test_times_are_those_of_the_pipelines_own_scheduler():
    wan = model_of("WanPipeline 2.1")  # UniPC
    geometry = geometry_of("WanPipeline 2.1", wan)
    scheduler = copy.deepcopy(wan.pipeline.scheduler)
    scheduler.set_timesteps(5)
    assert wan.times(5, geometry) == pytest.approx(scheduler.sigmas[:-1].tolist())
    mochi = model_of("MochiPipeline")  # inverted
    times = mochi.times(5, geometry_of("MochiPipeline", mochi))
    assert times[0] == 1 and times == sorted(times, reverse=True) and times[-1] > 0


def test_the_rounding_of_16_bits_is_averaged_where_latents_are_scaled():
    model = model_of("StableDiffusion3Pipeline", in_bfloat16(stable_diffusion_3()))
    decoding = model.spaces[geometry_of("StableDiffusion3Pipeline", model)].decoding
    config = model.pipeline.vae.config
    assert decoding.scale.ndim == 0 and decoding.dtype == torch.bfloat16
    assert float(decoding.scale) == pytest.approx(1 / config.scaling_factor, rel=3e-4)  # of one number, 1e-3
    assert float(decoding.offset) == pytest.approx(config.shift_factor, abs=2e-4)


def test_a_decoder_in_32_bits_may_follow_a_network_in_16():
    pipeline = in_bfloat16(VIDEO["LTXPipeline"].build())
    pipeline.vae.float()
    model = model_of("LTXPipeline", pipeline)
    space = model.spaces[geometry_of("LTXPipeline", model)]
    assert space.decoding.dtype == torch.float32 and space.errors["pixels"] < 0.02


def test_the_networks_time_may_be_another_than_the_noise_level():
    model = model_of("CogView4Pipeline")  # it shifts the noise levels alone
    clock = model.spaces[geometry_of("CogView4Pipeline", model)].replay.learned.clock
    assert clock.shift == pytest.approx(0.48, abs=0.01)
    for tau in (0.1, 0.5, 0.9):
        u = clock.time(tau) / 1000
        assert clock.shift * u / (1 + (clock.shift - 1) * u) == pytest.approx(tau)
        assert clock.tau(clock.time(tau)) == pytest.approx(tau)


def test_experts_share_the_times_among_them():
    model = model_of("WanPipeline 2.2 A14B")
    geometry = geometry_of("WanPipeline 2.2 A14B", model)
    calls = []
    for name in ("transformer", "transformer_2"):

        def seen(module, args, output, name=name):
            calls.append((name, len(output[0])))

        getattr(model.pipeline, name).register_forward_hook(seen)
    known = [model.for_request(one, 1.0) for one in model.encode(["a cat"] * 2, geometry)]
    x = torch.randn(2, 1, geometry.channel)
    for times, wanted in (
        ([0.9, 0.8], [("transformer", 1), ("transformer_2", 1)]),
        ([0.8, 0.4], [("transformer_2", 2)]),
        ([0.875, 1.0], [("transformer", 2)]),
    ):
        calls.clear()
        with torch.no_grad():
            model.velocity(x, torch.tensor(times), known, torch.ones(2), geometry)
        assert calls == wanted


def test_the_low_band_is_that_of_the_layout():
    model = model_of("FluxPipeline")
    geometry = model.geometry(32, 48)
    layout = Layout((1, 2, 2), (1.0,) * 4, (0.0,) * 4)
    x = torch.randn(6, 16)
    found = model.layout.coarse(x.view(1, -1), geometry)
    assert torch.allclose(found.view(6, 16), layout.patch_means(x), atol=1e-6)
    assert torch.allclose(
        model.layout.decodable(x.view(1, 1, -1), geometry),
        model.pipeline.vae.config.shift_factor
        + layout.unpack(x[None], 4, 6) / model.pipeline.vae.config.scaling_factor,
        atol=1e-6,
    )


def test_means_of_latents_with_odd_sides():
    model = model_of("SanaPipeline")
    geometry = geometry_of("SanaPipeline", model)  # latents of 2 x 3
    x = torch.randn(1, geometry.channel)
    found = model.layout.coarse(x, geometry).view(4, 2, 3)
    z = x.view(4, 2, 3)
    assert torch.allclose(found[:, 0, 0], z[:, :, :2].mean((1, 2)), atol=1e-6)
    assert torch.allclose(found[:, 1, 2], z[:, :, 2].mean(1), atol=1e-6)


def test_gradients_flow_to_the_state():
    model = model_of("Flux2KleinPipeline")
    geometry = model.geometry(32, 48)
    known = model.encode(["a cat", "a much longer prompt"], geometry)
    x = torch.randn(2, 1, geometry.channel, requires_grad=True)
    u = model.velocity(x, torch.tensor([0.5, 0.7]), known, torch.tensor([3.0, 2.0]), geometry)
    pixels = model.decode(model.layout.decodable(x - u, geometry))
    (gradient,) = torch.autograd.grad(pixels.mean(), x)
    assert gradient.abs().amax((1, 2)).min() > 0


# 16 bits.


@pytest.mark.parametrize("name", ["Flux2KleinPipeline", "QwenImagePipeline", "MochiPipeline", "ZImagePipeline"])
def test_bfloat16_tells_times_apart_that_it_cannot_hold(name):
    exact = model_of(name)
    low = model_of(name, in_bfloat16(copy.deepcopy(exact.pipeline)))
    geometry = geometry_of(name, exact)
    assert geometry_of(name, low) == geometry and low.dtype == torch.bfloat16
    x = torch.randn(1, 1, geometry.channel, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1)
    tau, scales = torch.tensor([0.901, 0.9012]), torch.full((2,), 3.0)
    u = []
    for model in (exact, low):
        known = model.encode(["a cat"], geometry) * 2
        with torch.no_grad():
            u.append(model.velocity(x, tau, known, scales, geometry))
    assert not torch.equal(u[1][0], u[1][1])
    assert (u[0] - u[1]).square().mean().sqrt() < 0.15 * u[0].square().mean().sqrt()
    assert not any(module._forward_pre_hooks for module in low.pipeline.transformer.modules())


def test_exact_times_of_two_threads_do_not_mix():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Identity()

        def forward(self, time):
            return self.embed(1000 * (time / 1000).to(torch.bfloat16))

    network, exact = Network(), ExactTimes()
    exact.learn(network, network, 1000, torch.device("cpu"))
    times = [torch.tensor([901.0, 901.2, 333.3]) + i for i in range(4)]
    failed = []

    def run(time):
        for _ in range(200):
            with exact.at(network, time):
                if not torch.allclose(network(time), time, atol=1e-3):
                    failed.append(time)

    threads = [threading.Thread(target=run, args=(time,)) for time in times]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and not network.embed._forward_pre_hooks
    assert not torch.allclose(network(times[0]).float(), times[0], atol=0.1)


def test_a_network_that_needs_16_bits_keeps_its_own_times():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Linear(1, 1, dtype=torch.bfloat16)

        def forward(self, time):
            return self.embed(time.to(torch.bfloat16)[:, None])

    network, exact = Network(), ExactTimes()
    exact.learn(network, network, 1000, torch.device("cpu"))
    with exact.at(network, torch.tensor([901.2])):
        assert network(torch.tensor([901.2])).dtype == torch.bfloat16


def test_geometries_name_their_size():
    assert str(Geometry(32, 48, 4, 6, 1, 96, frames=5, shape=(4, 2, 4, 6))) == "32x48, 5 frames"
