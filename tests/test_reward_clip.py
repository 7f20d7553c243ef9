"""Rewards of CLIP's kind, on tiny models of the true classes, against the processors and models of transformers."""

import shutil

import pytest
import tiny_text
import torch
import transformers
from judging import SIZES, gradient_errors, images, pictures
from safetensors.torch import load_file, save_file
from torch import nn

from rollflow import ModelError, RequestError, rewards

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a red cube", "Two Dogs, and a cat!", "", "a very long story of a fox " * 20, "a red cube"]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTH = 16


def clip_folder(folder, seed):
    """A CLIP, without its processor."""
    tokenizer = tiny_text.clip_tokenizer()
    text = tiny_text._clip(tokenizer, WIDTH).to_dict()
    vision = {**VISION, "image_size": 30, "patch_size": 6, "initializer_factor": 4.0}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    tiny_text.tiny(transformers.CLIPModel, config, seed=seed).save_pretrained(folder)
    return folder


def clip_processor(folder):
    size = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessorPil(**size), tiny_text.clip_tokenizer())
    processor.save_pretrained(folder)


def siglip_folder(folder, naflex=False):
    """A SigLIP of a fixed size with SigLIP 2's tokenizer, or a SigLIP 2 of any."""
    tokenizer = tiny_text.gemma_tokenizer()
    text = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": WIDTH}
    if naflex:
        vision = {**VISION, "num_patches": 16, "patch_size": 6}
        config = transformers.Siglip2Config(text_config=text, vision_config=vision)
        model = tiny_text.tiny(transformers.Siglip2Model, config, gain=2.0)
        images = transformers.Siglip2ImageProcessorPil(patch_size=6, max_num_patches=20)
        processor = transformers.Siglip2Processor(images, tokenizer)
    else:
        vision = {**VISION, "image_size": 30, "patch_size": 6}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = tiny_text.tiny(transformers.SiglipModel, config, gain=2.0)
        images = transformers.SiglipImageProcessorPil(size={"height": 30, "width": 30}, resample=2)
        processor = transformers.SiglipProcessor(images, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Head(nn.Module):
    """The authors' head of the aesthetic predictor, narrower."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(width, 10), nn.Dropout(0.2), nn.Linear(10, 8), nn.Dropout(0.2), nn.Linear(8, 6)),
            *(nn.Dropout(0.1), nn.Linear(6, 4), nn.Linear(4, 1)),
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    clip = clip_folder(root / "clip", 0)
    clip_processor(clip)
    siglip_folder(root / "siglip")
    siglip_folder(root / "naflex", naflex=True)
    (root / "head").mkdir()
    save_file(tiny_text.tiny(Head, 12).state_dict(), root / "head" / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def specs(models):
    return {
        "clip": f"clip:model={models / 'clip'}",
        "pickscore": f"pickscore:model={models / 'clip'}",
        "siglip": f"siglip:model={models / 'siglip'}",
        "logit": f"siglip:model={models / 'siglip'},logit=true",
        "naflex": f"siglip:model={models / 'naflex'}",
        "naflex logit": f"siglip:model={models / 'naflex'},logit=true",
        "aesthetic": f"aesthetic:model={models / 'clip'},head={models / 'head'}",
    }


NAMES = ("clip", "pickscore", "siglip", "logit", "naflex", "naflex logit", "aesthetic")


# The libraries' own ways
# -----------------------


def of_clip(folder, seen, prompts):
    """What `CLIPModel` gives each image with its prompt."""
    model = transformers.CLIPModel.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    given = processor(text=prompts, images=pictures(seen), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**given)


def of_siglip(folder, seen, prompts):
    """The logits of `SiglipModel` or `Siglip2Model`, as their documentation calls them."""
    model = transformers.AutoModel.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    lower = [prompt.lower() for prompt in prompts]  # of which Gemma's tokenizer knows nothing
    text = processor.tokenizer(lower, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    given = processor.image_processor(pictures(seen), return_tensors="pt")  # `Siglip2Processor` has sizes of its own
    with torch.no_grad():  # without a mask of the text, as for the checkpoints, whose tokenizers give none
        return model(input_ids=text.input_ids, **given).logits_per_image.diagonal()


def of_aesthetic(folder, head, seen):
    """The authors' `simple_inference.py`, with the embeddings of `CLIPModel`."""
    embeddings = of_clip(folder, seen, [""] * len(seen)).image_embeds
    mlp = Head(12)
    mlp.load_state_dict(load_file(head / "model.safetensors"))
    with torch.no_grad():
        return mlp.eval().layers(embeddings / embeddings.norm(dim=-1, keepdim=True))[:, 0]


def expected(name, models, seen, prompts):
    if name == "clip":
        found = of_clip(models / "clip", seen, prompts)
        return 2.5 * (found.image_embeds * found.text_embeds).sum(-1).clamp(min=0)
    if name == "pickscore":
        return of_clip(models / "clip", seen, prompts).logits_per_image.diagonal()
    if name == "aesthetic":
        return of_aesthetic(models / "clip", models / "head", seen)
    logits = of_siglip(models / ("naflex" if "naflex" in name else "siglip"), seen, prompts)
    return logits if "logit" in name else logits.sigmoid()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_library(models, specs, name, size):
    seen = images(len(PROMPTS), *size)
    scores, wanted = rewards.make(specs[name])(seen, PROMPTS), expected(name, models, seen, PROMPTS)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert wanted.std() > 1e-3 and (name != "clip" or wanted.max() > 0.1)
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_judged_by_themselves(specs, name):
    reward, seen = rewards.make(specs[name]), images(len(PROMPTS), 50, 41)
    alone = [reward(seen[i : i + 1], [prompt]) for i, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(reward(seen, PROMPTS), torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(specs, name):
    reward = rewards.make(specs[name])
    assert reward.differentiable
    prompt = "a red cube"
    seen = next(  # whose cosine is above 0: below, `clip` is 0
        one[None] for one in images(20, 33, 40) if rewards.make(specs["clip"])(one[None], [prompt]) > 0.1
    )
    assert gradient_errors(lambda x: reward(x, [prompt]), seen).max() < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_near_and_its_scores_are_float32(specs, name):
    seen = images(3, 40, 40)
    near = rewards.make(f"{specs[name]},dtype=bfloat16")(seen, PROMPTS[:3])
    exact = rewards.make(specs[name])(seen, PROMPTS[:3])
    assert near.dtype == torch.float32 and not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0.1, atol=0.1 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("name", NAMES)
def test_a_first_call_in_inference_mode_leaves_gradients_possible(models, name, specs):
    rewards.weights.forget()
    reward, seen = rewards.make(specs[name]), images(1, 40, 40)
    with torch.inference_mode():
        reward(seen, ["a fox"])
    seen.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(seen, ["a fox"]).sum(), seen)
    assert gradient.isfinite().all()


# CLIP
# ----


def test_each_prompt_is_embedded_once(specs):
    rewards.weights.forget()
    reward, rows = rewards.make(specs["clip"]), []
    text = transformers.models.clip.modeling_clip.CLIPTextModel

    def count(module, inputs, options, output):
        if isinstance(module, text):
            rows.append(len(options["input_ids"]))

    handle = nn.modules.module.register_module_forward_hook(count, with_kwargs=True)
    try:
        reward(images(4, 40, 40), ["a", "b", "a", "b"])
        reward(images(3, 40, 40), ["b", "c", "a"])
        rewards.make(specs["pickscore"])  # another reward, with towers of its own
    finally:
        handle.remove()
    assert rows == [2, 1]


def test_the_scale_and_the_prefix_of_clip(specs):
    seen = images(4, 40, 40)
    plain = rewards.make(specs["clip"])
    torch.testing.assert_close(
        rewards.make(specs["clip"] + ",scale=100")(seen, PROMPTS[:4]), 40 * plain(seen, PROMPTS[:4])
    )
    before = rewards.make(specs["clip"] + ",prefix='A photo depicts '")
    assert torch.equal(before(seen, ["a fox"] * 4), plain(seen, ["A photo depicts a fox"] * 4))


def test_clip_is_the_score_of_torchmetrics(models, specs):
    """Its arithmetic: `get_image_features` gives it an object in transformers 5, at which it fails."""
    update = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")._clip_score_update
    model = transformers.CLIPModel.from_pretrained(models / "clip")
    for features in ("get_image_features", "get_text_features"):
        theirs = getattr(model, features)
        setattr(model, features, lambda *given, theirs=theirs: theirs(*given).pooler_output)
    seen, prompts = images(4, 40, 40), ["a red cube", "a dog", "a fox", "rain"]
    processor = transformers.AutoProcessor.from_pretrained(models / "clip")
    theirs, _ = update(list((seen * 255).round().byte()), prompts, model, processor)
    mine = rewards.make(specs["clip"] + ",scale=100")(seen, prompts)
    assert theirs.max() > 1
    torch.testing.assert_close(mine, theirs.detach().clamp(min=0), rtol=1e-4, atol=1e-4)


def test_clips_are_judged_by_their_frames(specs):
    frames = images(6, 40, 40).view(2, 3, 3, 40, 40)
    each = rewards.make(specs["pickscore"])(frames.flatten(0, 1), ["a fox"] * 3 + ["rain"] * 3).view(2, 3)
    last = rewards.make(specs["pickscore"] + ",frames=last")(frames, ["a fox", "rain"])
    torch.testing.assert_close(last, each[:, 2])


# PickScore's processor
# ---------------------


def test_pickscore_takes_the_processor_of_its_clip_where_it_has_none(tmp_path, models, monkeypatch):
    bare = clip_folder(tmp_path / "bare", 0)
    seen = images(2, 40, 50)
    wanted = rewards.make(f"pickscore:model={models / 'clip'}")(seen, PROMPTS[:2])
    given = rewards.make(f"pickscore:model={bare},processor={models / 'clip'}")
    given.check("a fox")
    torch.testing.assert_close(given(seen, PROMPTS[:2]), wanted)
    missing = rewards.make(f"pickscore:model={bare}")
    with pytest.raises(RequestError, match="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        missing.check("a fox")
    laion = tmp_path / "laion" / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    laion.mkdir(parents=True)
    clip_processor(laion)
    monkeypatch.setenv("ROLLFLOW_MODELS", str(tmp_path))
    missing.check("a fox")
    torch.testing.assert_close(missing(seen, PROMPTS[:2]), wanted)


# SigLIP
# ------


@pytest.mark.parametrize("name", ["siglip", "naflex"])
def test_siglip_reads_lower_case(specs, name):
    reward, seen = rewards.make(specs[name]), images(1, 40, 40)
    assert torch.equal(reward(seen, ["A Fox"]), reward(seen, ["a fox"]))
    assert not torch.equal(reward(seen, ["a box"]), reward(seen, ["a fox"]))


def test_siglip_is_no_clip(models):
    with pytest.raises(ModelError, match="is a model of type clip: give one of type siglip or siglip2") as error:
        rewards.make(f"siglip:model={models / 'clip'}")(images(1, 40, 40), ["a fox"])
    assert "\n" not in str(error.value)


# The aesthetic head
# ------------------


@pytest.mark.parametrize("form", ["pth", "quoted name", "without a prefix", "state_dict"])
def test_forms_of_the_aesthetic_head(tmp_path, models, specs, form):
    state = load_file(models / "head" / "model.safetensors")
    path = tmp_path / ("sac+logos.pth" if form == "quoted name" else "head.pth")
    if form == "without a prefix":
        path = tmp_path / "head.safetensors"
        save_file({name.removeprefix("layers."): tensor for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state} if form == "state_dict" else state, path)
    reward = rewards.make(f"aesthetic:model={models / 'clip'},head='{path}'")
    reward.check("a fox")
    seen = images(2, 40, 40)
    torch.testing.assert_close(reward(seen, ["", ""]), rewards.make(specs["aesthetic"])(seen, ["", ""]))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "is no head"),
        ({"layers.0.weight": torch.zeros(1, 12)}, "is no head"),
        ({"layers.0.weight": torch.zeros(3, 12), "layers.0.bias": torch.zeros(3)}, "is no head"),
        ({"layers.0.weight": torch.zeros(1, 768), "layers.0.bias": torch.zeros(1)}, "takes 768 numbers"),
    ],
)
def test_a_wrong_head_is_refused(tmp_path, models, state, said):
    torch.save(state, tmp_path / "head.pth")
    reward = rewards.make(f"aesthetic:model={models / 'clip'},head={tmp_path}")
    with pytest.raises(ModelError, match=said) as error:
        reward(images(1, 40, 40), [""])
    assert "\n" not in str(error.value)


def test_a_pickle_with_code_is_not_run(tmp_path, models):
    torch.save({"layers.0.weight": print}, tmp_path / "head.pth")
    with pytest.raises(ModelError, match="aesthetic cannot load"):
        rewards.make(f"aesthetic:model={models / 'clip'},head={tmp_path}")(images(1, 40, 40), [""])


def test_a_folder_must_say_which_head(tmp_path, models):
    reward = rewards.make(f"aesthetic:model={models / 'clip'},head={tmp_path}")
    with pytest.raises(ModelError, match="put one in"):
        reward(images(1, 40, 40), [""])
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"has a\.safetensors, b\.safetensors: give the path of one"):
        reward(images(1, 40, 40), [""])


# What is not there
# -----------------


def test_a_head_that_is_not_there_is_named_before_any_work(models):
    with pytest.raises(RequestError, match=r"aesthetic finds no file 'heads/none\.pth'"):
        rewards.make(f"aesthetic:model={models / 'clip'},head=heads/none.pth").check("a fox")


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("clip", "openai/clip-vit-large-patch14"),
        ("siglip", "google/siglip2-so400m-patch14-384"),
        ("pickscore", "yuvalkirstain/PickScore_v1"),
        ("aesthetic", "openai/clip-vit-large-patch14"),
        ("aesthetic", "ttj/sac-logos-ava1-l14-linearMSE"),
    ],
)
def test_missing_weights_are_named_in_one_line(tmp_path, monkeypatch, models, name, needs):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = f"aesthetic:model={models / 'clip'}" if needs.startswith("ttj") else name
    with pytest.raises(RequestError) as error:
        rewards.make(spec).check("a fox")
    said = str(error.value)
    assert needs in said and ".safetensors" in said and name in said.split("rollflow fetch ")[1] and "\n" not in said


def test_weights_that_are_incomplete_are_refused(tmp_path, models):
    folder = tmp_path / "clip"
    shutil.copytree(models / "clip", folder)
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"visual_projection\.weight") as error:
        rewards.make(f"clip:model={folder}")(images(1, 40, 40), ["a fox"])
    assert "\n" not in str(error.value)
