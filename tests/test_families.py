"""Pipelines of the true classes with tiny random networks: what the engine makes is what each pipeline makes itself."""

import copy
import inspect
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_image import IMAGE
from tiny_image_more import MORE
from tiny_text import Tiny
from tiny_video import VIDEO

from rollflow import Engine, Request
from rollflow.models.pipeline import PipelineModel
from rollflow.models.pipeline.families import family
from rollflow.models.text import Text

FAMILIES = {**IMAGE, **MORE, **VIDEO}
STEPS = 4
SHORT, LONG = "a cat", "two red circles and a blue square"
EMBEDDED = ("FluxPipeline", "HunyuanVideoPipeline")  # the scale is an argument of the network
PLUS = ("ZImagePipeline", "Krea2Pipeline")  # v = c + s (c - u), so that a scale of 0 leaves guidance out
GROUPED = ("CogView4Pipeline", "Kandinsky5T2IPipeline", "Kandinsky5T2VPipeline")  # no mask: calls by length of the text

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi's rotary embeddings ask for 32 bits
    pytest.mark.usefixtures("one_thread"),
]


@dataclass
class Case:
    name: str
    tiny: Tiny
    pipeline: Any
    model: PipelineModel
    engine: Engine

    @property
    def size(self):
        return {"height": self.tiny.height, "width": self.tiny.width, "frames": self.tiny.frames}

    @property
    def off(self):
        return 0.0 if self.name in PLUS else 1.0

    @property
    def other(self):
        """Another size; of a clip, another number of frames."""
        if self.tiny.frames is None:
            return {"height": self.tiny.width, "width": self.tiny.height, "frames": None}
        return {**self.size, "frames": self.tiny.frames + (6 if self.name == "MochiPipeline" else 8)}

    @property
    def geometry(self):
        return self.model.geometry(**self.size)

    def ask(self, prompt, **fields):
        plain = {"method": "bon", "nfe": STEPS, "steps": STEPS, "interpolant": "linear", "diffusion": 0}
        return Request(prompt, brightness, **{**plain, "grid": "model", **self.size, **fields})

    def conditioning(self, prompt, scale, negative=None):
        return self.model.for_request(self.model.encode([Text(prompt, negative)], self.geometry)[0], scale)

    def velocity(self, x, tau, conditioning, scales):
        with torch.no_grad():
            rows = x.view(len(x), self.geometry.token, self.geometry.channel)
            return self.model.velocity(rows, torch.tensor(tau), conditioning, torch.tensor(scales), self.geometry)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    tiny = FAMILIES[request.param]
    for package in tiny.needs:
        pytest.importorskip(package)
    pipeline = tiny.build()
    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):  # Euler's steps are what the engine takes
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    known = family(pipeline)
    model = PipelineModel(pipeline, replace(known, fixed={**known.fixed, **tiny.call}))
    with Engine(model, buckets=[2], lanes=1, threads=1) as engine:
        yield Case(request.param, tiny, pipeline, model, engine)


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def noise(geometry, rows=1, seed=3):
    return torch.randn(rows, *geometry.state, generator=torch.Generator().manual_seed(seed))


def own(case, prompt, scale, latents, size=None):
    """What the pipeline itself makes, by its own `__call__`."""
    pipeline, size = copy.copy(case.pipeline), size or case.size
    parts = pipeline.__dict__
    if getattr(pipeline, "guider", None) is not None:
        parts["guider"] = copy.deepcopy(pipeline.guider)
        parts["guider"].guidance_scale = scale
    parts["_progress_bar_config"] = {"disable": True}
    if case.name == "Kandinsky5T2VPipeline":  # beside the latents lie a video to continue and its mask: none
        latents = torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[..., :1])], -1)
    if case.name == "Flux2KleinPipeline":  # it packs what it is given
        latents = latents.transpose(1, 2).reshape(1, -1, size["height"] // 16, size["width"] // 16)
    given = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    given |= {"height": size["height"], "width": size["width"], "num_frames": size["frames"], **case.tiny.call}
    given |= {"true_cfg_scale" if case.name == "QwenImagePipeline" else "guidance_scale": scale}
    if case.name in ("QwenImagePipeline", "LongCatImagePipeline") and scale > 1:
        given["negative_prompt"] = ""
    names = inspect.signature(type(pipeline).__call__).parameters
    given = {name: value for name, value in given.items() if name in names}
    made = pipeline(prompt=prompt, latents=latents, **given)
    (pixels,) = next(iter(made.values()))
    return pixels.float()


def test_pictures_are_the_pipelines_own(case):
    geometry = case.geometry
    latents = noise(geometry)
    for scale in (3.0, case.off):
        found = case.engine.generate(case.ask(SHORT, guidance=scale, latents=latents))
        wanted = own(case, SHORT, scale, latents)
        assert found.pixels.shape == wanted.shape
        assert (found.pixels - wanted).abs().max() <= 1e-4
        rows = 1 if case.name in EMBEDDED or scale == case.off else 2
        assert found.committed_nfe == STEPS and found.network_rows == rows * found.executed_nfe
    assert len(found.frames) == (case.tiny.frames or 1)
    assert wanted.std() > 0.01  # there is something to see


def test_two_sizes_live_in_one_engine(case):
    sizes, scale = (case.size, case.other), 3.0
    latents = [noise(case.model.geometry(**size)) for size in sizes]
    asked = [case.ask(SHORT, guidance=scale, latents=x, **size) for x, size in zip(latents, sizes, strict=True)]
    found = case.engine.generate(asked)
    assert found[0].pixels.shape != found[1].pixels.shape
    for result, x, size in zip(found, latents, sizes, strict=True):
        assert (result.pixels - own(case, SHORT, scale, x, size)).abs().max() <= 1e-4


def test_requests_with_and_without_guidance_share_an_engine(case):
    latents = [noise(case.geometry, seed=i) for i in range(3)]
    kinds = ((SHORT, 3.0), (LONG, case.off), (LONG, 5.0))
    asked = [case.ask(p, nfe=2, steps=2, guidance=s, latents=x) for (p, s), x in zip(kinds, latents, strict=True)]
    together, alone = case.engine.generate(asked), [case.engine.generate(one) for one in asked]
    for one, other in zip(together, alone, strict=True):
        assert (one.pixels - other.pixels).abs().max() <= 1e-4
    assert (together[1].pixels - together[2].pixels).abs().max() > 1e-3


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_rows_of_different_prompts_times_and_scales_are_those_of_each_alone(case):
    x, tau = noise(case.geometry, 4), [0.93, 0.31, 0.57, 0.74]
    scales = [3.0, case.off, 5.0, 3.0]
    known = [case.conditioning(p, s) for p, s in zip((SHORT, LONG, LONG, SHORT), scales, strict=True)]
    together = case.velocity(x, tau, known, scales)
    alone = [case.velocity(x[i : i + 1], tau[i : i + 1], known[i : i + 1], scales[i : i + 1]) for i in range(4)]
    assert relative(together, torch.cat(alone)) <= 1e-4


def test_what_a_row_is_asked_moves_its_velocity(case):
    x, tau, scale = noise(case.geometry), [0.6], [3.0]
    plain, other = case.conditioning(SHORT, 3.0), case.conditioning("two red circles", 3.0)
    u = case.velocity(x, tau, [plain], scale)
    assert relative(case.velocity(x, [0.62], [plain], scale), u) > 1e-3
    assert relative(case.velocity(x, tau, [other], scale), u) > 1e-3
    assert relative(case.velocity(x, tau, [plain], [3.5]), u) > 1e-3
    assert relative(case.velocity(x + 0.01, tau, [plain], scale), u) > 1e-3
    if case.model.capabilities.negative:
        assert relative(case.velocity(x, tau, [case.conditioning(SHORT, 3.0, LONG)], scale), u) > 1e-3


@contextmanager
def counted(case):
    """The rows of each call of the networks."""
    rows = []
    networks = [getattr(case.pipeline, name) for name in case.model.driver.networks]
    hooks = [one.register_forward_hook(lambda module, args, output: rows.append(len(output[0]))) for one in networks]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def test_one_call_of_the_network_serves_a_batch(case):
    guided = 1 if case.name in EMBEDDED else 2
    x, tau = noise(case.geometry, 2), [0.8, 0.4]
    for scales, rows in (((3.0, 5.0), 2 * guided), ((3.0, case.off), guided + 1)):
        known = [case.conditioning(p, s) for p, s in zip((SHORT, LONG), scales, strict=True)]
        assert sum(case.model.network_rows(one) for one in known) == rows
        with counted(case) as calls:
            case.velocity(x, tau, known, list(scales))
        assert sum(calls) == rows
        assert len(calls) in ((2, 3) if case.name in GROUPED else (1,))
    same = [case.conditioning(SHORT, 3.0), case.conditioning("a dog", 3.0)]  # of one length
    with counted(case) as calls:
        case.velocity(x, tau, same, [3.0, 3.0])
    assert len(calls) <= (2 if case.name in GROUPED else 1)
    assert (case.model.company(known[0]) == case.model.company(known[1])) == (case.name in EMBEDDED)
