"""A pipeline that engines worked on is as it was before: modes, gradients, memory formats, hooks, compiled calls."""

import gc
import time

import pytest
import torch
from tiny import PATIENCE
from tiny import Tiny as Plain
from tiny_image import IMAGE

from rollflow import Engine
from rollflow.models import Capabilities
from rollflow.models.borrowed import Borrowed, networks_of
from rollflow.models.flux import FluxModel
from rollflow.models.pipeline import Family, PipelineModel


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def trained(pipeline):
    """As somebody has it who trains: the transformer, and of the autoencoder one layer that he froze."""
    pipeline.transformer.train()
    pipeline.vae.train()
    pipeline.vae.decoder.conv_out.eval()
    pipeline.transformer.requires_grad_(True)
    pipeline.vae.requires_grad_(True)
    next(pipeline.vae.parameters()).requires_grad_(False)
    for parameter in pipeline.vae.decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    pipeline.transformer.register_forward_pre_hook(lambda module, args: None)
    return pipeline


def known(pipeline):
    """All that must be as it was, and the weights themselves."""
    found = {}
    for part, network in networks_of(pipeline).items():
        for name, module in network.named_modules():
            own = [*vars(module).items()]  # at once, as another thread may be giving it back
            hooks = {key: len(value) for key, value in own if key.endswith("_hooks")}
            marks = {key: value for key, value in own if "gradient_checkpointing" in key}
            found[part, name] = module.training, hooks, module._compiled_call_impl, "forward" in vars(module), marks
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            grad = None if tensor.grad is None else tensor.grad.stride()
            found[part, name, "tensor"] = tensor.requires_grad, tensor.stride(), tensor.dtype, tensor.device, grad
            found[part, name, "sum"] = float(tensor.detach().double().sum())
    found["components"] = {name: id(part) for name, part in pipeline.components.items()}
    found["config"] = dict(pipeline.config), dict(pipeline.scheduler.config)
    return found


def borrowed(pipeline):
    """Whether an engine holds it."""
    networks = networks_of(pipeline).values()
    modes = {module.training for network in networks for module in network.modules()}
    gradients = {parameter.requires_grad for network in networks for parameter in network.parameters()}
    assert len(modes) == 1 or len(gradients) == 2
    return modes == {False} and gradients == {False}


def flux():
    return trained(IMAGE["FluxPipeline"].build())


def chroma():
    return trained(IMAGE["ChromaPipeline"].build())


def flux_engine(pipeline):
    return Engine(pipeline, buckets=(8,), lanes=1, threads=1)


def search(engine, prompt="a cat"):
    return engine.generate(prompt, nfe=3, steps=2, method="bon", reward=brightness, height=32, width=32)


def gone(pipeline, before):
    """Waits until nobody holds it."""
    end = time.monotonic() + PATIENCE
    while known(pipeline) != before and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return known(pipeline) == before


def test_flux_is_as_it_was_when_the_engine_closes():
    pipeline = flux()
    before = known(pipeline)
    engine = flux_engine(pipeline)
    assert isinstance(engine.model, FluxModel) and borrowed(pipeline)
    convolution = pipeline.vae.decoder.conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last) and not convolution.is_contiguous()
    assert len(pipeline.transformer.time_text_embed._forward_pre_hooks) == 1
    search(engine)
    assert borrowed(pipeline)
    engine.close()
    assert known(pipeline) == before
    engine.close()
    assert known(pipeline) == before


def test_any_other_pipeline_is_as_it_was_when_the_engine_closes():
    pipeline = chroma()
    before = known(pipeline)
    with flux_engine(pipeline) as engine:
        assert isinstance(engine.model, PipelineModel) and borrowed(pipeline)
        search(engine)
        assert borrowed(pipeline)
    assert known(pipeline) == before


@pytest.mark.parametrize("used", [False, True])
def test_it_is_as_it_was_when_the_engine_is_dropped(used):
    pipeline = flux()
    before = known(pipeline)
    engine = flux_engine(pipeline)
    if used:
        search(engine)
    assert known(pipeline) != before
    del engine
    assert gone(pipeline, before)


def test_it_is_as_it_was_when_an_engine_could_not_be_made():
    pipeline = flux()
    before = known(pipeline)
    with pytest.raises(ValueError, match="buckets"):
        Engine(pipeline, buckets=(0,))
    assert gone(pipeline, before)


def test_of_two_engines_the_last_gives_back():
    pipeline = flux()
    before = known(pipeline)
    one, other = flux_engine(pipeline), flux_engine(pipeline)
    assert one.model is not other.model
    alone = search(one)
    one.close()
    assert borrowed(pipeline)
    assert len(pipeline.transformer.time_text_embed._forward_pre_hooks) == 1
    again = search(other)
    assert torch.equal(alone.pixels, again.pixels)
    other.close()
    assert known(pipeline) == before


def test_engines_of_both_kinds_on_one_pipeline():
    pipeline = flux()
    before = known(pipeline)
    generic, own = PipelineModel(pipeline), FluxModel(pipeline)
    own.give_back()
    assert borrowed(pipeline)
    generic.give_back()
    assert known(pipeline) == before


@pytest.mark.parametrize(("kind", "build"), [(FluxModel, flux), (PipelineModel, chroma)])
def test_a_model_may_have_engines_one_after_another_and_at_a_time(kind, build):
    pipeline = build()
    before = known(pipeline)
    model = kind(pipeline)
    with Engine(model, buckets=(8,), lanes=1, threads=1) as engine:
        first = search(engine)
        with Engine(model, buckets=(8,), lanes=1, threads=1) as inner:
            second = search(inner)
        assert borrowed(pipeline)
    assert known(pipeline) == before
    with Engine(model, buckets=(8,), lanes=1, threads=1) as engine:
        assert borrowed(pipeline)
        third = search(engine)  # on what was recorded in the first
    assert known(pipeline) == before
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.pixels, third.pixels)


def test_a_model_that_gave_back_computes_the_same_and_leaves_nothing():
    pipeline = flux()
    pipeline.to(torch.bfloat16)
    before = known(pipeline)
    model = FluxModel(pipeline)
    geometry = model.geometry(32, 32)
    x = torch.randn(2, geometry.token, geometry.channel, generator=torch.Generator().manual_seed(0)).bfloat16()
    tau, guidance = torch.tensor([0.901, 0.9012]), torch.full((2,), 3.5)  # one number in bfloat16
    x[1] = x[0]

    def both():
        with torch.no_grad():
            u = model.velocity(x, tau, model.encode(["a cat", "a cat"]), guidance, geometry)
            latents = model.layout.decodable(x.float() - u.float(), geometry)
            return u, model.decode(latents)

    first = both()
    assert not torch.equal(first[0][0], first[0][1])
    model.give_back()
    assert known(pipeline) == before
    for one, other in zip(first, both(), strict=True):
        assert torch.equal(one, other)
    assert known(pipeline) == before


def test_a_learned_model_that_gave_back_computes_the_same_and_leaves_nothing():
    pipeline = chroma()
    pipeline.text_encoder.train()  # it has dropout
    before = known(pipeline)
    model = PipelineModel(pipeline, Family(fixed=IMAGE["ChromaPipeline"].call))

    def computed():
        geometry = model.geometry(32, 32)
        x = torch.randn(1, geometry.token, geometry.channel, generator=torch.Generator().manual_seed(0))
        conditioning, times = model.encode(["a cat"], geometry), model.times(3, geometry)
        u = model.velocity(x, torch.tensor([0.5]), conditioning, torch.tensor([3.0]), geometry)
        images = model.decode(model.layout.decodable(x - u, geometry))
        return u, images, model.state(images[0], geometry), torch.tensor(times)

    first = computed()
    assert not first[0].requires_grad
    model.give_back()
    assert known(pipeline) == before
    for one, other in zip(first, computed(), strict=True):
        assert torch.equal(one, other) and not other.requires_grad
    other = model.geometry(48, 32)  # one that it has not learned yet
    assert model.encode(["a dog"], other) and known(pipeline) == before


def test_a_light_decoder_is_given_back_too():
    pipeline, light = flux(), IMAGE["FluxPipeline"].build().vae.train()
    before, strides = known(pipeline), [parameter.stride() for parameter in light.parameters()]
    with Engine(FluxModel(pipeline, light), preview=True, buckets=(8,), lanes=1, threads=1) as engine:
        assert not light.training and [parameter.stride() for parameter in light.parameters()] != strides
        search(engine)
    assert light.training and all(parameter.requires_grad for parameter in light.parameters())
    assert [parameter.stride() for parameter in light.parameters()] == strides
    assert known(pipeline) == before


def test_what_others_change_meanwhile_stays():
    pipeline = IMAGE["FluxPipeline"].build()
    pipeline.transformer.eval().requires_grad_(False)
    with flux_engine(pipeline):
        pipeline.transformer.proj_out.train().requires_grad_(True)
    assert pipeline.transformer.proj_out.training and pipeline.transformer.proj_out.weight.requires_grad
    assert not pipeline.transformer.training


def test_released_text_encoders_are_not_kept():
    pipeline = flux()
    engine = flux_engine(pipeline)
    encoder = torch.utils.weak.ref(pipeline.text_encoder)
    engine.encode(["a cat"])
    engine.release_text_encoders()
    gc.collect()
    assert encoder() is None
    search(engine)
    engine.close()
    assert pipeline.transformer.training and pipeline.text_encoder is None


def test_pairs_of_borrow_and_give_back():
    class Owner:
        pass

    owner, network = Owner(), torch.nn.Linear(2, 2)
    lent = Borrowed(owner, [network, network])
    assert lent.held and not network.training
    lent.borrow()
    lent.borrow()
    lent.give_back()
    assert lent.held
    lent.give_back()
    assert not lent.held and network.training
    lent.give_back()
    with lent:
        assert lent.held and not network.training and not network.weight.requires_grad
    assert network.training and network.weight.requires_grad
    lent.borrow()
    del owner
    gc.collect()
    assert network.training and not lent.held


def test_any_model_may_declare_it():
    class Lent(Plain):
        capabilities = Capabilities(returns=True)
        calls = ()

        def borrow(self):
            self.calls = (*self.calls, "borrow")

        def give_back(self):
            self.calls = (*self.calls, "give back")
            raise OSError("no")

    model = Lent()
    engine = Engine(model, buckets=(8,), lanes=1)
    assert model.calls == ("borrow",)
    engine.generate("a", reward=brightness, nfe=2, steps=1, method="bon")
    engine.close()
    engine.close()
    assert model.calls == ("borrow", "give back")
