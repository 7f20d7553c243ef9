"""Pinned attention: what diffusers computes, by the kernel that was asked for; no switch of the process is touched."""

import threading

import pytest
import torch
import torch.nn.functional as F
from tiny_image import IMAGE
from torch.backends import cuda, cudnn

from rollflow import Engine, ModelError
from rollflow.bench import baselines
from rollflow.models import attention
from rollflow.models.attention import ATTENTION, Pinned, pin, pinned

GPU = torch.device("cuda")  # pins do not look for one
PATIENCE = 30


@pytest.fixture(scope="module")
def pipeline():
    return IMAGE["FluxPipeline"].build()


def layers(pipeline):
    return [
        block.attn
        for block in (*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks)
    ]


def velocity(pipeline):
    model = pipeline.transformer
    seeded = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 6, 16, generator=seeded), torch.randn(2, 5, 16, generator=seeded)
    with torch.no_grad():
        return model(
            hidden_states=x, timestep=torch.tensor([0.3, 1.0]), guidance=torch.ones(2), encoder_hidden_states=text,
            pooled_projections=torch.randn(2, 16, generator=seeded), txt_ids=torch.zeros(5, 3),
            img_ids=torch.rand(6, 3, generator=seeded), return_dict=False,
        )[0]  # fmt: skip


def on_a_cpu(query, key, value, mask):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)[0]


@pytest.mark.parametrize("fused", [False, True])
def test_the_pinned_layers_compute_what_those_of_diffusers_do(fused):
    pipeline = IMAGE["FluxPipeline"].build()
    wanted = velocity(pipeline)
    if fused:
        pipeline.transformer.fuse_qkv_projections()
    (handle,) = pin(pipeline.transformer, "math", GPU)
    assert all(isinstance(layer.processor, Pinned) for layer in layers(pipeline))
    found = velocity(pipeline)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.equal(found, wanted)  # another kernel rounds otherwise
    handle.remove()
    if not fused:
        assert torch.equal(velocity(pipeline), wanted)


def test_a_judge_finds_its_kernel_while_a_model_is_on_flash(pipeline, monkeypatch):
    """Masked float32 attention with heads of 36 channels, in the middle of the model's own."""
    within, judged = threading.Event(), threading.Event()

    def flash(query, key, value, mask):
        within.set()
        assert judged.wait(PATIENCE)
        return on_a_cpu(query, key, value, mask)

    monkeypatch.setitem(ATTENTION, "flash", flash)
    found = []
    before = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(attention, "_on_gpu", lambda device: True)
        with pinned(pipeline.transformer, "flash"):
            model = threading.Thread(target=lambda: found.append(velocity(pipeline)))
            model.start()
            assert within.wait(PATIENCE)
            q = torch.randn(1, 2, 7, 36)
            try:
                seen = F.scaled_dot_product_attention(q, q, q, torch.zeros(1, 1, 7, 7))
            finally:
                judged.set()
            model.join(PATIENCE)
    torch.testing.assert_close(seen, F.scaled_dot_product_attention(q, q, q))
    torch.testing.assert_close(found[0], velocity(pipeline), atol=1e-5, rtol=1e-5)
    after = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    assert after == before and all(after)


@pytest.mark.parametrize(("version", "left_to_torch"), [(91300, False), (91500, False), (91501, True), (None, True)])
def test_cudnn_is_left_out_where_it_is_older_than_9_15_1(pipeline, monkeypatch, version, left_to_torch):
    monkeypatch.setattr(cudnn, "version", lambda: version)
    pins = pin(pipeline.transformer, None, GPU)
    assert (pins == []) == left_to_torch
    assert {type(layer.processor) is Pinned for layer in layers(pipeline)} == {not left_to_torch}
    for one in pins:
        one.remove()


@pytest.mark.parametrize(
    ("able", "chosen"), [({"flash", "efficient"}, "flash"), ({"efficient"}, "efficient"), (set(), "math")]
)
def test_without_cudnn_it_is_the_first_that_can(monkeypatch, able, chosen):
    for name in ("flash", "efficient"):
        monkeypatch.setattr(attention, f"can_use_{name}_attention", lambda asked, name=name: name in able)
    q, results = torch.zeros(1, 1, 2, 8), {name: torch.ones(()) for name in ATTENTION}
    for name in ATTENTION:
        monkeypatch.setattr(attention, f"_{name}", lambda *_, name=name: results[name])
    assert attention._without_cudnn(q, q, q, None) is results[chosen]


def test_a_pin_is_that_of_all_who_hold_it(pipeline):
    plain = [layer.processor for layer in layers(pipeline)]
    (first,), (second,) = pin(pipeline.transformer, "math", GPU), pin(pipeline.transformer, "math", GPU)
    with pytest.raises(ModelError, match="attention='flash': another engine has this transformer on math: close it"):
        pin(pipeline.transformer, "flash", GPU)
    first.remove()
    first.remove()
    assert all(isinstance(layer.processor, Pinned) for layer in layers(pipeline))
    second.remove()
    assert [layer.processor for layer in layers(pipeline)] == plain


def test_processors_of_others_stay():
    pipeline = IMAGE["FluxPipeline"].build()

    class Own(type(layers(pipeline)[0].processor)):
        pass

    layers(pipeline)[0].set_processor(Own())
    with pytest.raises(
        ModelError, match=r"has processors of its own \(Own\), which choose for themselves; leave it out"
    ):
        pin(pipeline.transformer, "math", GPU)
    assert not any(isinstance(layer.processor, Pinned) for layer in layers(pipeline))


def test_engines_pin_and_give_back(monkeypatch):
    pipeline = IMAGE["FluxPipeline"].build()
    monkeypatch.setattr(attention, "_on_gpu", lambda device: True)
    plain = [layer.processor for layer in layers(pipeline)]
    from rollflow.models.flux import FluxModel

    with Engine(FluxModel(pipeline, attention="math"), buckets=(1,), lanes=1, threads=1):
        assert [layer.processor.name for layer in layers(pipeline)] == ["math"] * len(plain)
    assert [layer.processor for layer in layers(pipeline)] == plain


def test_a_kernel_that_takes_no_mask_says_so():
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ModelError, match="attention='flash': its kernel takes no mask"):
        ATTENTION["flash"](q, q, q, q)


def test_baselines_attend_as_engines_do(pipeline, monkeypatch):
    monkeypatch.setattr(attention, "_on_gpu", lambda device: True)
    monkeypatch.setattr(cudnn, "version", lambda: 91400)

    @baselines._attending_alike
    def search(pipeline):
        return [layer.processor.name for layer in layers(pipeline)]

    assert search(pipeline) == ["any but cuDNN"] * len(layers(pipeline))
    assert not any(isinstance(layer.processor, Pinned) for layer in layers(pipeline))
