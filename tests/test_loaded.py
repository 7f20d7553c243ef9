"""Pipelines with LoRA, quantized, mapped, offloaded, cached or compiled: supported, or refused with a line."""

import importlib.util

import pytest
import torch
from tiny import Tiny
from tiny_image import IMAGE

from rollflow import Engine, ModelError
from rollflow.device import calibrate
from rollflow.models import Capabilities, acceleration, adapt
from rollflow.models.acceleration import compile_decoder
from rollflow.models.flux import FluxModel
from rollflow.models.loaded import Loaded, loaded
from rollflow.models.pipeline import memory

HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
CALL = {"height": 32, "width": 48}
needs_accelerate = pytest.mark.skipif(not HAS_ACCELERATE, reason="needs accelerate")


def flux():
    return IMAGE["FluxPipeline"].build()


def chroma():
    return IMAGE["ChromaPipeline"].build()


def lora(pipeline, strength=1.0):
    """LoRA of random weights on the attention of the transformer."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.5)
    pipeline.transformer.add_adapter(config, adapter_name="style")
    if strength != 1.0:
        pipeline.transformer.set_adapters(["style"], [strength])
    return pipeline


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def sample(pipeline, steps=3, **options):
    """The engine's sample under the ODE at the pipeline's own times, from known noise."""
    with Engine(pipeline, buckets=(2,), lanes=1, threads=1) as engine:
        geometry = engine.model.geometry(32, 48)
        x = torch.randn(1, geometry.token, geometry.channel, generator=torch.Generator().manual_seed(3))
        return engine.generate(
            "a cat", method="bon", nfe=steps, steps=steps, grid="uniform", interpolant="linear", diffusion=0,
            reward=brightness, height=32, width=48, latents=x, **options,
        ), x, geometry  # fmt: skip


def own_sample(pipeline, x, geometry, steps=3, **options):
    """The pipeline's own sample of the same noise at the same times."""
    pipeline.set_progress_bar_config(disable=True)
    scheduler, longest = pipeline.scheduler, getattr(getattr(pipeline, "tokenizer_2", None), "model_max_length", 512)
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, use_dynamic_shifting=False, shift=1.0)
    sigmas = [1 - i / steps for i in range(steps)]
    images = pipeline(
        "a cat", num_inference_steps=steps, sigmas=sigmas, latents=x.view(1, *geometry.state), output_type="pt",
        max_sequence_length=min(512, longest), **CALL, **options,
    ).images  # fmt: skip
    pipeline.scheduler = scheduler
    return images[0]


def refused(pipeline, *words):
    """Engines refuse it, in one line that says why and what to do."""
    with pytest.raises(ModelError) as caught:
        Engine(pipeline)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("build", [flux, chroma])
def test_nothing_special(build):
    assert loaded(build()) == Loaded()


# LoRA


def test_lora_on_flux_is_part_of_the_velocity():
    plain, x, geometry = sample(flux(), guidance=3.5)
    pipeline = lora(flux())
    pipeline.transformer.train()  # with its dropout; an engine works in eval mode
    styled, *_ = sample(pipeline, guidance=3.5)
    assert pipeline.transformer.training
    pipeline.transformer.eval()
    wanted = own_sample(pipeline, x, geometry, guidance_scale=3.5)
    assert (styled.pixels - wanted).abs().max() < 1e-4
    assert (styled.pixels - plain.pixels).abs().max() > 1e-3
    assert (plain.pixels - own_sample(flux(), x, geometry, guidance_scale=3.5)).abs().max() < 1e-4


def test_lora_on_a_learned_pipeline_is_part_of_the_velocity():
    plain, x, geometry = sample(chroma(), guidance=3.0)
    pipeline = lora(chroma())
    styled, *_ = sample(pipeline, guidance=3.0)
    pipeline.transformer.eval()  # peft adds layers in train mode
    wanted = own_sample(pipeline, x, geometry, guidance_scale=3.0, negative_prompt="")
    assert (styled.pixels - wanted).abs().max() < 1e-4
    assert (styled.pixels - plain.pixels).abs().max() > 1e-3


def test_the_strength_of_lora_is_that_which_is_set():
    strong, *_ = sample(lora(flux()))
    weak, *_ = sample(lora(flux(), 0.5))
    none, *_ = sample(lora(flux(), 0.0))
    plain, *_ = sample(flux())
    assert (strong.pixels - weak.pixels).abs().max() > 1e-4
    assert (none.pixels - plain.pixels).abs().max() < 1e-6


def test_models_with_lora_are_told_from_those_without():
    pipeline = lora(flux())
    found = loaded(pipeline)
    assert found.adapters == ("style r=2 ['to_k', 'to_q', 'to_v']",) and found.plain and found.graphable
    assert adapt(pipeline).capabilities.signature != adapt(flux()).capabilities.signature
    assert adapt(lora(chroma())).capabilities.signature != adapt(chroma()).capabilities.signature


def test_fused_lora_needs_nothing():
    pipeline = lora(flux())
    unfused, *_ = sample(pipeline)
    pipeline.transformer.fuse_lora()
    pipeline.transformer.unload_lora()
    assert loaded(pipeline) == Loaded()
    fused, *_ = sample(pipeline)
    assert (fused.pixels - unfused.pixels).abs().max() < 1e-4


# Quantized


@pytest.mark.parametrize("build", [flux, chroma])
def test_torchao_is_supported(build):
    torchao = pytest.importorskip("torchao.quantization")
    pipeline = build()
    plain, x, geometry = sample(pipeline, guidance=3.0)
    torchao.quantize_(pipeline.transformer, torchao.Int8WeightOnlyConfig())
    assert loaded(pipeline).quantized == ("torchao",) and loaded(pipeline).graphable and not loaded(pipeline).plain
    found, *_ = sample(pipeline, guidance=3.0)
    options = {"negative_prompt": ""} if build is chroma else {}
    assert (found.pixels - own_sample(pipeline, x, geometry, guidance_scale=3.0, **options)).abs().max() < 1e-4
    assert (found.pixels - plain.pixels).abs().max() > 0
    signatures = {adapt(one).capabilities.signature for one in (pipeline, build())}
    assert len(signatures) == 2


@pytest.mark.parametrize("build", [flux, chroma])
def test_gguf_is_supported(build):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    pipeline = build()
    kind, found = gguf.GGMLQuantizationType.Q8_0, {}
    for name, module in pipeline.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0:
            blocks = torch.from_numpy(gguf.quants.quantize(module.weight.detach().numpy(), kind))
            found[f"{name}.weight"] = GGUFParameter(blocks, quant_type=kind)
    assert found
    biases = {name: value for name, value in pipeline.transformer.state_dict().items() if name not in found}
    _replace_with_gguf_linear(pipeline.transformer, torch.float32, found)
    pipeline.transformer.load_state_dict({**biases}, strict=False, assign=True)
    for name, value in found.items():
        owner, _, leaf = name.rpartition(".")
        setattr(pipeline.transformer.get_submodule(owner), leaf, value)
    assert loaded(pipeline).quantized == ("gguf",) and not loaded(pipeline).graphable
    result, x, geometry = sample(pipeline, guidance=3.0)
    options = {"negative_prompt": ""} if build is chroma else {}
    assert (result.pixels - own_sample(pipeline, x, geometry, guidance_scale=3.0, **options)).abs().max() < 1e-4


def test_other_libraries_are_known_by_what_they_declare_and_never_recorded():
    class Config:
        quant_method = "bitsandbytes"

    class Quantizer:
        quantization_config = Config()

    pipeline = flux()
    pipeline.transformer.hf_quantizer = Quantizer()
    assert loaded(pipeline) == Loaded(quantized=("bitsandbytes",))
    model = adapt(pipeline)
    assert not model.capabilities.graphable
    geometry = model.geometry(32, 48)
    model.record(geometry, model.encode(["a cat"])[0])
    assert "partial" in repr(type(model._recorded[geometry])) and not model.loaded.plain


# Where it is


@needs_accelerate
@pytest.mark.parametrize("build", [flux, chroma])
def test_model_offloading_is_refused(build):
    from accelerate import cpu_offload_with_hook

    pipeline = build()
    hook = None
    for name in ("text_encoder", "transformer", "vae"):
        _, hook = cpu_offload_with_hook(getattr(pipeline, name), "cpu", prev_module_hook=hook)
    refused(
        pipeline, type(pipeline).__name__, "is offloaded (CpuOffload)", "without offloading", "release_text_encoders"
    )


@needs_accelerate
def test_sequential_offloading_is_refused():
    from accelerate import cpu_offload

    pipeline = chroma()
    cpu_offload(pipeline.transformer, torch.device("cpu"))
    refused(pipeline, "transformer is offloaded (AlignDevicesHook)", "several threads", "load it without offloading")


def test_group_offloading_is_refused():
    from diffusers.hooks import apply_group_offloading

    pipeline = flux()
    apply_group_offloading(pipeline.vae, onload_device=torch.device("cpu"), offload_type="leaf_level")
    refused(pipeline, "vae is offloaded (GroupOffloadingHook)", "load it without offloading")


def test_layerwise_casting_is_refused():
    pipeline = flux()
    pipeline.transformer.enable_layerwise_casting(torch.float16, torch.float32)
    refused(pipeline, "transformer casts its weights layer by layer", "without enable_layerwise_casting")


@needs_accelerate
def test_a_device_map_of_one_device_is_supported():
    from accelerate import dispatch_model

    plain, *_ = sample(flux())
    pipeline = flux()
    dispatch_model(pipeline.transformer, {"": "cpu"}, main_device="cpu", force_hooks=True)
    pipeline.hf_device_map = {"transformer": "cpu", "vae": "cpu", "text_encoder": "cpu", "text_encoder_2": "cpu"}
    assert hasattr(pipeline.transformer, "_hf_hook")
    mapped, *_ = sample(pipeline)
    assert torch.equal(mapped.pixels, plain.pixels)


def test_parts_without_weights_are_refused():
    pipeline = flux()
    pipeline.transformer.to("meta")
    refused(pipeline, "no weights in transformer", "device meta", "load it whole")


def test_parts_on_several_devices_are_refused(monkeypatch):
    pipeline = chroma()
    parameter = next(pipeline.text_encoder.parameters())
    monkeypatch.setattr("rollflow.models.loaded.device_of", lambda one: "cuda:1" if one is parameter else "cpu")
    refused(pipeline, "text_encoder on cpu and cuda:1", "an engine works on one: call pipeline.to(device)")
    pipeline.hf_device_map = {"transformer": 0, "text_encoder": 1}
    refused(pipeline, "call pipeline.reset_device_map() and then pipeline.to(device)")


# Compiled, cached


@pytest.mark.parametrize("build", [flux, chroma])
@pytest.mark.parametrize("how", ["wrapped", "in place", "forward"])
def test_compiled_as_a_whole_is_refused(build, how):
    pipeline = build()
    if how == "wrapped":
        pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    elif how == "in place":
        pipeline.transformer.compile(backend="eager")
    else:
        pipeline.transformer.forward = torch.compile(pipeline.transformer.forward, backend="eager")
    refused(pipeline, "transformer is compiled as a whole", "pipeline.transformer.compile_repeated_blocks()")


def test_compiled_blocks_are_supported_and_stay():
    plain, *_ = sample(flux(), guidance=3.0)
    pipeline = flux()
    pipeline.transformer.compile_repeated_blocks(backend="eager")
    assert loaded(pipeline) == Loaded(compiled=True) and not loaded(pipeline).plain
    blocks = [module for module in pipeline.transformer.modules() if module._compiled_call_impl is not None]
    found, *_ = sample(pipeline, guidance=3.0)
    assert (found.pixels - plain.pixels).abs().max() < 1e-5
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)


def test_a_compiled_decoder_is_told_from_a_plain_one():
    pipeline = chroma()
    pipeline.vae.decoder.compile(backend="eager")
    assert loaded(pipeline) == Loaded()
    assert adapt(pipeline).capabilities.signature != adapt(chroma()).capabilities.signature


@pytest.mark.parametrize("how", ["lora", "quantized", "compiled"])
def test_what_was_learned_of_the_plain_networks_is_learned_again(how):
    pipeline = chroma()
    learned = memory.known(pipeline.transformer)
    for _ in range(2):
        adapt(pipeline).geometry(32, 48)
        assert len(learned) == 1
    if how == "lora":
        lora(pipeline)
    elif how == "quantized":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(pipeline.transformer, torchao.Int8WeightOnlyConfig())
    else:
        pipeline.transformer.compile_repeated_blocks(backend="eager")
    adapt(pipeline).geometry(32, 48)
    assert len(learned) == 2


def test_caches_between_steps_are_refused():
    from diffusers import FirstBlockCacheConfig

    pipeline = flux()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    refused(pipeline, "keeps results from step to step", "call pipeline.transformer.disable_cache()")
    pipeline.transformer.disable_cache()
    assert loaded(pipeline) == Loaded()


def test_split_over_processes_is_refused():
    pipeline = chroma()
    pipeline.transformer._parallel_config = object()
    refused(pipeline, "transformer is split over processes", "load it without enable_parallelism")


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(12))

    def forward(self, x):
        return x @ self.weight


class Compiled(Tiny):
    """A model with a compiled layer, which says for how many rows it was compiled."""

    def __init__(self):
        self.sizes = []
        self.capabilities = Capabilities(compiled=True, signature=f"test_loaded: {id(self)}")
        self.layer = Layer()
        self.layer.compile(backend=self._seen, fullgraph=True, dynamic=False)

    def _seen(self, graph, inputs):
        self.sizes.append(next(len(given) for given in inputs if given.ndim == 3))
        return graph.forward

    def velocity(self, x, tau, conditioning, guidance, geometry):
        return self.layer(x)


def test_compiled_layers_run_at_every_batch_size():
    model, sizes = Compiled(), (*range(1, 13),)
    with Engine(model, buckets=sizes, lanes=2, threads=1) as engine:
        assert [*engine.buckets()] == [*sizes]
        assert model.sizes == [*sizes]  # before any request comes
        engine.generate("a cat", method="bon", nfe=11, steps=1, reward=brightness)
    assert model.sizes == [*sizes]


def test_batch_sizes_that_do_not_pay_are_not_compiled(monkeypatch):
    """Two pays without compilation, four does not; compiled, two does not either."""
    own, model = calibrate._seconds, Compiled()
    eager, compiled = {1: 1.0, 2: 1.5, 4: 3.0, 8: 6.0, 16: 12.0}, {1: 0.5, 2: 1.0}

    def seconds(of, geometry, conditioning, bucket, *rest):
        before = len(model.sizes)
        own(of, geometry, conditioning, bucket, *rest)
        return (compiled if len(model.sizes) > before else eager)[bucket]

    monkeypatch.setattr(calibrate, "_seconds", seconds)
    with Engine(model, lanes=1, threads=1) as engine:
        assert engine.buckets() == {1: 0.5}
        assert model.sizes == [1, 2]


class Decoder(torch.nn.Module):
    """A decoder of one block, which is compiled in no time."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.out = torch.nn.GroupNorm(1, channels), torch.nn.Conv2d(channels, 12, 3, padding=1)

    def forward(self, z, latent_embeds=None):
        return torch.nn.functional.pixel_shuffle(self.out(torch.nn.functional.silu(self.norm(z))), 2)


def test_a_compiled_decoder_gives_the_same_images():
    pipeline, graphs = flux(), []
    pipeline.vae.decoder = Decoder(pipeline.vae.config.latent_channels)

    def seen(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = adapt(pipeline)
    geometry = model.geometry(32, 48)
    latents = torch.randn(5, *model.layout.shape(geometry), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model.decode(latents)
        compile_decoder(pipeline.vae, "regional", seen)
        assert torch.equal(model.decode(latents), wanted) and not graphs
        compile_decoder(pipeline.vae, "all", seen)
        other = FluxModel(pipeline)
        assert other.capabilities.compiled and other.capabilities.signature != model.capabilities.signature
        for rows in (1, 2, 3, 4, 5):
            torch.testing.assert_close(other.decode(latents[:rows]), wanted[:rows], atol=1e-5, rtol=1e-5)
    assert 1 < len(graphs) < 4  # of one row, and of any number, which may take a second try
    other.record(geometry, other.encode(["a cat"])[0])
    assert not other._decoders


def test_nothing_is_compiled_while_any_thread_wants_it_eager():
    graphs = []

    def seen(graph, inputs):
        graphs.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=seen)
    first, second = acceleration.eagerly(), acceleration.eagerly()
    for stage in (first.__enter__, second.__enter__, first.__exit__):  # in turns, as threads have it
        stage()
        assert double(torch.ones(2)).sum() == 4 and not graphs
    second.__exit__()
    assert double(torch.ones(2)).sum() == 4 and graphs
