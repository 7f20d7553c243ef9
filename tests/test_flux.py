"""The adapter of FluxPipeline: the engine makes the image that diffusers makes, rows keep to themselves."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline

from rollflow.bench import shapes_networks as networks
from rollflow.engine import Engine
from rollflow.errors import ModelError, RequestError
from rollflow.models import folder
from rollflow.models.flux import FluxModel, text_tokens_of
from rollflow.request import Request

PROMPT = "two red circles and three blue squares"


@pytest.fixture(scope="module", params=["random", "shapes", "shapes-base"])
def pipeline(request):
    if request.param != "random":
        return FluxPipeline.from_pretrained(folder(request.param), dtype=torch.float32)
    torch.manual_seed(0)
    pipeline = networks.pipeline(networks.autoencoder(), networks.transformer(), *networks.text_encoders())
    pipeline.vae.register_to_config(scaling_factor=0.9, shift_factor=-0.1)
    return pipeline


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_ode_gives_the_image_of_diffusers(pipeline, steps):
    latents = torch.randn(16, 32, generator=torch.Generator().manual_seed(5))
    sigmas = np.linspace(1, 1 / steps, steps)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        height=64,
        width=64,
        sigmas=sigmas,
        num_inference_steps=steps,
        latents=latents[None],
        max_sequence_length=networks.TEXT_TOKENS,
        output_type="np",
    ).images[0]
    options = {"method": "bon", "nfe": steps, "interpolant": "linear", "diffusion": 0}
    ours = Engine(pipeline).generate(
        PROMPT, reward=brightness, times=pipeline.scheduler.sigmas.tolist(), latents=latents, **options
    )
    assert ours.committed_nfe == steps
    np.testing.assert_allclose(ours.pixels.permute(1, 2, 0).numpy(), theirs, atol=1e-4)
    np.testing.assert_allclose(np.asarray(ours.image) / 255, theirs, atol=0.51 / 255)


@torch.inference_mode()
def network(images, prompts):
    """A reward whose scores of an image depend, in the last bits, on how many images it is given."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(16, 3, 5, 5, generator=generator)
    last = torch.randn(1, 16 * 32 * 32, generator=generator)
    return F.linear(F.conv2d(images, first, stride=2, padding=2).relu().flatten(1), last)[:, 0]


def test_each_row_has_its_own_time_and_prompt(pipeline):
    model = FluxModel(pipeline)
    geometry = model.geometry()
    prompts = [PROMPT, "a blue triangle", "draw nine green squares"]
    conditioning = model.encode(prompts)
    x = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(1))
    tau, guidance = torch.tensor([1.0, 0.61234, 0.07]), torch.zeros(3)
    together = model.velocity(x, tau, conditioning, guidance, geometry)
    for i in range(3):
        alone = model.velocity(x[i : i + 1], tau[i : i + 1], conditioning[i : i + 1], guidance[:1], geometry)
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=1e-4)
    swapped = model.velocity(x, tau, conditioning[::-1], guidance, geometry)
    assert (swapped[0] - together[0]).abs().max() > 1e-4  # the text does matter


@pytest.mark.parametrize("bucket", [24])
def test_alone_and_among_32_others(pipeline, bucket):
    """One bucket: bit for bit the same on a CPU, judged by a network."""
    mine = Request(PROMPT, reward=network, nfe=9, steps=4, seed=11)
    others = [
        Request(("a blue triangle", "draw nine green squares")[i % 2], network, nfe=2 + i % 3, steps=1 + i % 2, seed=i)
        for i in range(32)
    ]
    alone = Engine(pipeline, buckets=(bucket,)).generate(mine)
    crowd = Engine(pipeline, buckets=(bucket,)).generate([*others[:9], mine, *others[9:]])[9]
    assert torch.equal(alone.pixels, crowd.pixels) and alone.history == crowd.history


def test_words_and_sizes_that_the_model_cannot_do():
    torch.manual_seed(0)
    pipeline = networks.pipeline(networks.autoencoder(), networks.transformer(), *networks.text_encoders())
    engine = Engine(pipeline)
    with pytest.raises(RequestError, match=r"does not know pink, stars in .* its words are .*circle circles"):
        engine.generate("two pink stars", reward=brightness)
    with pytest.raises(RequestError, match="17 tokens"):
        engine.generate("red " * 16, reward=brightness)
    with pytest.raises(RequestError, match="multiples of 16"):
        engine.generate(PROMPT, reward=brightness, height=60)
    with pytest.raises(RequestError, match=r"does not know ,, in 'two red circles ,, one blue square'"):
        engine.generate("two red circles ,, one blue square")
    with pytest.raises(RequestError, match=r"request 1: size 128x128: the reward count judges images of 64x64 only"):
        engine.generate([Request(PROMPT), Request(PROMPT, height=128, width=128)])
    for reward in ("movement", "jpeg + movement"):
        with pytest.raises(RequestError, match="clips of two frames or more, and this request makes"):
            engine.check(Request(PROMPT, reward))
    assert engine.ledger.ticks == 0
    assert engine.generate("red", reward=brightness, nfe=4, steps=2, height=32, width=96).image.size == (96, 32)


@pytest.mark.parametrize(
    ("guided", "longest", "asked", "tokens"),
    [
        (False, 512, None, 256),
        (True, 512, None, 512),
        (False, 12, None, 12),
        (False, 512, 512, 512),
        (True, 512, 77, 77),
    ],
)
def test_a_prompt_has_the_tokens_that_its_transformer_was_trained_with(guided, longest, asked, tokens):
    """FLUX.1-schnell 256, -dev 512; those that are asked for go before."""
    pipeline = networks.pipeline(networks.autoencoder(), networks.transformer(), *networks.text_encoders())
    pipeline.transformer.register_to_config(guidance_embeds=guided)
    pipeline.tokenizer_2.model_max_length = longest
    assert text_tokens_of(pipeline, asked) == tokens
    model = FluxModel(pipeline, text_tokens=asked)
    assert model.text_tokens == len(model.encode([PROMPT])[0].sequence) == tokens
    with pytest.raises(
        RequestError, match=f"text_tokens={longest + 1}: it must be a whole number of at most {longest}"
    ):
        FluxModel(pipeline, text_tokens=longest + 1)


def test_what_is_no_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded as a pipeline"):
        Engine.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"there is no model .*nowhere"):
        Engine.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="choose one of shapes, shapes-base"):
        folder("shape")


def test_prompts_are_checked_while_others_are_encoded(pipeline):
    """A fast tokenizer's padding is its state: one that two threads share gives encodings without padding."""
    model, stop = FluxModel(pipeline), threading.Event()

    def check():
        while not stop.is_set():
            model.check_prompt("two red circles")

    checking = threading.Thread(target=check)
    checking.start()
    try:
        shapes = {tuple(model.encode(["two red circles"])[0].sequence.shape) for _ in range(150)}
    finally:
        stop.set()
        checking.join()
    assert len(shapes) == 1


@pytest.mark.gpu
def test_the_engine_on_a_gpu_agrees_with_the_cpu(pipeline):
    """The same noise and the same decisions up to rounding: float32, one sample of the SDE."""
    request = Request(PROMPT, reward=brightness, method="bon", nfe=6, steps=6, diffusion=1.0, seed=3)
    on_cpu = Engine(pipeline.to("cpu")).generate(request).pixels
    on_gpu = Engine(pipeline.to("cuda")).generate(request).pixels
    pipeline.to("cpu")
    torch.testing.assert_close(on_gpu, on_cpu, atol=2e-2, rtol=0)
