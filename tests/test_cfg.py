"""Classifier-free guidance around a model of one's own: a mixture of Gaussians whose velocities are known exactly."""

import itertools
import math

import pytest
import torch

from rollflow import Engine, ModelError, Request, RequestError, sde
from rollflow.models import Capabilities, FlowModel, Geometry
from rollflow.models.cfg import ClassifierFree
from rollflow.models.layout import Layout
from rollflow.models.rule import Rule
from rollflow.models.text import Text

WIDTH, STEPS = 12, 6
SIZE = Geometry(2, 2, 2, 2, 1, WIDTH)
SPREADS, WEIGHTS = torch.tensor([0.5, 0.7, 0.6]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
MEANS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).double() * 0.6
PARTS = {"left": [0], "right": [1], "far": [2], "both": [0, 1], "": [0, 1, 2]}


def exact(y, tau, prompt):
    """`E[eps - x0 | y]` of the parts that a prompt names, for y [n, WIDTH] of the linear path, in float64."""
    parts = PARTS[prompt]
    means, spreads, weights = MEANS[parts], SPREADS[parts], WEIGHTS[parts]
    variance = (1 - tau) ** 2 * spreads**2 + tau**2
    away = y[:, None] - (1 - tau) * means
    share = torch.softmax(weights.log() - away.square().sum(2) / (2 * variance) - WIDTH / 2 * variance.log(), 1)
    x0 = means + ((1 - tau) * spreads**2 / variance)[:, None] * away
    return (y - (share[..., None] * x0).sum(1)) / tau


class Mixture(FlowModel):
    """The exact velocities of what a prompt names; counts its calls and their rows."""

    device, dtype, layout = torch.device("cpu"), torch.float32, Layout((1, 2, 2), (1.0,) * 3, (0.0,) * 3)

    def __init__(self):
        self.calls = []

    def geometry(self, height=None, width=None):
        return SIZE

    def check_prompt(self, prompt):
        if prompt not in PARTS:
            raise RequestError(f"no part {prompt!r}")

    def encode(self, prompts):
        return list(prompts)

    def velocity(self, x, tau, conditioning, guidance, geometry):
        assert guidance.unique().tolist() == [3.5]  # of this model's own, not of the request
        self.calls.append(len(x))
        rows = zip(x.double(), tau.double(), conditioning, strict=True)
        return torch.cat([exact(one, time, prompt) for one, time, prompt in rows])[:, None].float()

    def decode(self, latents):
        return latents


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def guided(prompt, scale, negative, rule, phi, interval):
    """The velocity of `ClassifierFree` in closed form."""

    def velocity(y, tau):
        c, u = exact(y, tau, prompt), exact(y, tau, negative)
        if not (rule.on(scale) and interval[0] < tau <= interval[1]):
            return c
        v = u + (scale if rule.base == "without" else scale + 1) * (c - u)
        if rule.norm == "token":
            v = v * c.norm() / v.norm()
        return phi * v * c.std() / v.std() + (1 - phi) * v

    return velocity


def euler(velocity, start):
    x = start.double().view(1, -1)
    for time, following in itertools.pairwise(sde.time_grid(STEPS, "uniform")):
        x = x + (following - time) * velocity(x, time)
    return x.view(1, WIDTH)


def start(seed=0):
    return torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(seed))


def ask(prompt="left", **options):
    """One sample of the guided ODE from noise that is known."""
    given = {"method": "bon", "nfe": STEPS, "steps": STEPS, "grid": "uniform", "interpolant": "linear", "diffusion": 0}
    return Request(prompt, reward=brightness, **{"latents": start(), **given, **options})


def engine(model, **options):
    return Engine(model, **{"buckets": (8,), "lanes": 1, "threads": 1, **options})


def final(result):
    """The sample as [1, WIDTH], in the order of its state."""
    return Mixture.layout.pack(result.pixels[None].float()).view(1, WIDTH).double()


RULES = [Rule(), Rule("with", above=0.0), Rule(norm="token")]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    ("phi", "interval"), [(0.0, (0.0, 1.0)), (0.7, (0.0, 1.0)), (0.0, (0.3, 0.7)), (0.5, (0.2, 0.9))]
)
def test_samples_are_those_of_a_hand_written_euler_loop(rule, phi, interval):
    model = ClassifierFree(Mixture(), rule, rescale=phi, interval=interval)
    with engine(model) as made:
        for prompt, scale, negative in [("left", 2.5, ""), ("right", 4.0, "far"), ("both", 1.3, "right")]:
            result = made.generate(ask(prompt, guidance=scale, negative=negative))
            wanted = euler(guided(prompt, scale, negative, rule, phi, interval), start())
            assert (final(result) - wanted).abs().max() < 2e-5
            plain = euler(guided(prompt, scale, negative, Rule(above=math.inf), 0, interval), start())
            assert (wanted - plain).abs().max() > 1e-2  # guidance is there to be seen


def test_requests_of_all_kinds_share_an_engine_and_are_what_they_are_alone():
    kinds = [
        {"guidance": 3.0}, {"guidance": 7.5}, {"guidance": 3.0, "negative": "far"}, {"guidance": 1.0}, {},
        {"prompt": "right", "guidance": 2.0, "negative": "left"},
        {"prompt": "right", "guidance": 1.0, "negative": ""},
    ]  # fmt: skip
    requests = [ask(**kind, seed=i, latents=start(i)) for i, kind in enumerate(kinds)]
    requests += [
        Request("both", reward=brightness, method="rbf", nfe=24, steps=STEPS, guidance=scale) for scale in (1.0, 5.0)
    ]
    inner = Mixture()
    with engine(ClassifierFree(inner)) as made:
        together = made.generate(requests)
    for request, result in zip(requests, together, strict=True):
        with engine(ClassifierFree(Mixture())) as made:
            alone = made.generate(request)
        assert torch.equal(alone.pixels, result.pixels) and alone.reward == result.reward
        assert repr(alone.history) == repr(result.history)
    assert len({tuple(result.pixels.flatten().tolist()) for result in together}) == len(requests)
    assert set(inner.calls) == {8, 16}  # a batch is one call: of one row an evaluation, or of two
    assert together[3].request.guidance == 1.0 and together[4].request.guidance == 3.5


def test_network_rows_are_counted():
    inner = Mixture()
    with engine(ClassifierFree(inner), buckets=(1, 2, 4)) as made:
        guided, neutral = made.generate([ask(guidance=3.0), ask(guidance=1.0)])
        assert (guided.executed_nfe, guided.network_rows) == (STEPS, 2 * STEPS)
        assert (neutral.executed_nfe, neutral.network_rows) == (STEPS, STEPS)
        assert made.ledger.network_rows == sum(inner.calls) == 3 * STEPS


def test_rows_outside_of_the_interval_may_leave_their_second_row_out():
    found = {}
    for skip in (False, True):
        inner = Mixture()
        with engine(ClassifierFree(inner, interval=(0.3, 0.7), skip=skip), buckets=(1,)) as made:
            found[skip] = made.generate(ask(guidance=3.0)), inner.calls
    (all_of_them, twice), (skipped, some) = found[False], found[True]
    assert twice == [2] * STEPS
    assert some == [2 if 0.3 < time <= 0.7 else 1 for time in sde.time_grid(STEPS, "uniform")[:-1]]
    assert torch.allclose(all_of_them.pixels, skipped.pixels, atol=1e-6)
    assert skipped.network_rows == 2 * STEPS  # the most that it may take


def test_rows_with_guidance_and_without_may_be_mixed():
    model = ClassifierFree(Mixture(), interval=(0.2, 1.0), rescale=0.3)
    x, tau = torch.randn(4, 1, WIDTH, generator=torch.Generator().manual_seed(2)), torch.tensor([1.0, 0.6, 0.1, 0.4])
    texts = [Text("left"), Text("right", "far"), Text("left"), Text("both")]
    pairs = [model.for_request(one, s) for one, s in zip(model.encode(texts), (3.0, 2.0, 3.0, 1.0), strict=True)]
    assert [model.network_rows(one) for one in pairs] == [2, 2, 2, 1]
    assert [model.company(one) for one in pairs] == [True, True, True, False]
    scales = torch.tensor([3.0, 2.0, 3.0, 1.0])
    together = model.velocity(x, tau, pairs, scales, SIZE)
    for i in range(4):
        alone = model.velocity(x[i : i + 1], tau[i : i + 1], pairs[i : i + 1], scales[i : i + 1], SIZE)
        rule = guided(texts[i].prompt, float(scales[i]), texts[i].negative or "", Rule(), 0.3, (0.2, 1.0))
        assert torch.equal(alone[0], together[i])
        assert (together[i].double() - rule(x[i].double(), float(tau[i].double()))).abs().max() < 1e-5


def test_gradients_flow_through_guidance():
    model = ClassifierFree(Mixture(), rescale=0.5, interval=(0.0, 0.9))
    x = torch.randn(1, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    x.data = torch.linspace(-1, 1, WIDTH, dtype=torch.float64).view(1, 1, WIDTH)
    pairs, tau, scale = model.encode(["left"]), torch.tensor([0.5]), torch.tensor([3.0])
    (gradient,) = torch.autograd.grad(model.velocity(x, tau, pairs, scale, SIZE).sum(), x)
    closed = x.detach().view(1, WIDTH).requires_grad_(True)
    (wanted,) = torch.autograd.grad(guided("left", 3.0, "", Rule(), 0.5, (0.0, 0.9))(closed, 0.5).sum(), closed)
    assert (gradient.view(1, WIDTH) - wanted).abs().max() < 1e-4


class Able(Mixture):
    """Declares everything that a model of one's own may."""

    capabilities = Capabilities(
        preview=True, recordable=True, releases_text=True, graphable=True, schedule=True, images=True, returns=True,
        signature="able",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.seen = []

    def preview(self, latents):
        return latents * 0.5

    def record(self, geometry, conditioning):
        self.seen.append(("record", conditioning))

    def release_text_encoders(self):
        self.seen.append("release")

    def times(self, steps, geometry):
        return [1 - i / steps for i in range(steps)]

    def state(self, image, geometry):
        return self.layout.pack(image[None])[0]

    def collate(self, conditioning):
        return (torch.zeros(len(conditioning)),)

    def forward(self, x, tau, collated, guidance, geometry):
        return x

    def borrow(self):
        self.seen.append("borrow")

    def give_back(self):
        self.seen.append("give back")


def test_capabilities_are_passed_on_where_they_stay_true():
    inner = Able()
    model = ClassifierFree(inner, negative="far", guidance=6.0)
    able = model.capabilities
    assert able.preview and able.recordable and able.releases_text and able.schedule and able.images and able.returns
    assert able.negative and able.companies and able.guidance == 6.0 and not able.graphable and not able.frames
    assert "able" in able.signature and able.signature != "able"
    none = ClassifierFree(Mixture()).capabilities
    assert none == Capabilities(negative=True, guides=True, companies=True)
    with engine(model, preview=True) as made:
        result = made.generate(ask(grid="model"))
        made.release_text_encoders()
    assert result.request.guidance == 6.0
    assert (final(result) - euler(guided("left", 6.0, "far", Rule(), 0, (0.0, 1.0)), start())).abs().max() < 2e-5
    assert inner.seen == ["borrow", ("record", "left"), "release", "give back"]


def test_negative_prompts_are_encoded_once_and_checked():
    encoded = []

    class Counting(Mixture):
        def encode(self, prompts):
            encoded.extend(prompts)
            return super().encode(prompts)

    model = ClassifierFree(Counting())
    model.encode(["left", "right", Text("left", "far"), Text("both", "far")])
    assert sorted(encoded) == ["", "both", "far", "left", "left", "right"]
    with engine(model) as made, pytest.raises(RequestError, match="no part 'north'"):
        made.generate(ask(guidance=2.0, negative="north"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale": 1.5}, "rescale=1.5: it must be a number from 0"),
        ({"interval": (0.5, 0.5)}, "interval=.*: it must be .low, high"),
        ({"interval": (0.0, 1.5)}, "interval=.*: it must be .low, high"),
        ({"negative": "north"}, "no part 'north'"),
        ({"guidance": math.nan}, "guidance=nan: it must be a finite number"),
    ],
)
def test_what_cannot_be_honoured(options, message):
    with pytest.raises(RequestError, match=message) as caught:
        ClassifierFree(Mixture(), **options)
    assert "\n" not in str(caught.value)


def test_models_that_guide_by_themselves_are_not_wrapped():
    with pytest.raises(ModelError, match="ClassifierFree of a ClassifierFree: it guides by itself"):
        ClassifierFree(ClassifierFree(Mixture()))
    with pytest.raises(ModelError, match="a str is no model"):
        ClassifierFree("shapes")


def test_a_flux_pipeline_with_true_guidance():
    """The built-in model, whose pipeline has the same guidance under the name of true_cfg_scale."""
    from diffusers import FluxPipeline

    from rollflow.models import folder

    pipeline = FluxPipeline.from_pretrained(folder("shapes"))
    pipeline.set_progress_bar_config(disable=True)
    model = ClassifierFree(pipeline, negative="a blue square")
    geometry = model.geometry()
    x = torch.randn(1, geometry.token, geometry.channel, generator=torch.Generator().manual_seed(0))
    asked = {"latents": x, "height": geometry.height, "width": geometry.width}
    images = pipeline(
        "two red circles", negative_prompt="a blue square", true_cfg_scale=2.0, num_inference_steps=4,
        max_sequence_length=model.model.text_tokens,
        output_type="pt", **asked,
    ).images  # fmt: skip
    with engine(model) as made:
        result = made.generate(
            "two red circles", method="bon", nfe=4, times=pipeline.scheduler.sigmas.tolist(), interpolant="linear",
            diffusion=0, guidance=2.0, reward=brightness, **asked,
        )  # fmt: skip
    assert (images[0] - result.pixels).abs().max() < 1e-4


@pytest.mark.parametrize("options", [{}, {"interval": (0.1, 0.6)}, {"interval": (0.1, 0.6), "skip": True}])
def test_batches_are_timed_with_all_rows_of_the_network(options):
    """Also where guidance takes place at some times alone, and the second rows are left out at others."""
    model = Mixture()
    model.capabilities = Capabilities(signature=f"test_cfg: {options}")
    with engine(ClassifierFree(model, **options), buckets=(1, 2, 4)) as made:
        made.warm_up()
        assert [*dict.fromkeys(model.calls)] == [2, 4, 8]
