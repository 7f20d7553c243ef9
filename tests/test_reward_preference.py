"""The rewards `hps`, `hpsv3` and `imagereward`, against the arithmetic that their authors publish."""

import hashlib
import importlib.util
import math

import numpy as np
import published
import pytest
import tiny_text
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rollflow import ModelError, RequestError, rewards
from rollflow.rewards import hps, hpsv3, imagereward, openclip, weights
from rollflow.rewards.qwen_pixels import Patches

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a cat", "two red dogs &amp; a  Ball, 8k", "", "very long " * 60]
SIZES = [(64, 64), (71, 99), (61, 56), (57, 171)]
CPU = torch.device("cpu")
TEXT_OF_HPSV3 = "368655b668b400c5064dda9023169d682c5c5c4be165b1692ede9e222fcb70ac"  # of `hpsv3` 1.0.0, without a prompt


def pictures(rows, height, width, seed=0):
    """8-bit pictures, as arrays and as images in [0, 1]."""
    arrays = np.random.default_rng(seed).integers(0, 256, (rows, height, width, 3), np.uint8)
    return arrays, torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255


def centred(images, side):
    """The middle as torchvision's CenterCrop takes it."""
    top, left = (round((size - side) / 2.0) for size in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def proportionate(height, width, side):
    """To what torchvision's Resize brings an image whose shorter side shall be `side`."""
    return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)


# The networks, tiny: the authors' names and arithmetic, in a folder as it is published.


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    tokenizer = tiny_text.clip_tokenizer()
    shapes = published.open_clip(32, 56, 14, (160, 2), (128, 2), len(tokenizer))
    torch.save({"epoch": 1, "state_dict": published.filled(shapes, gain=1.5)}, folder / "HPS_v2.1_compressed.pt")
    torch.save({"state_dict": published.filled(shapes, seed=1)}, folder / "HPS_v2_compressed.pt")
    tokenizer.save_pretrained(folder)
    return folder


def hps_pixels(arrays):
    """As `hpsv2` prepares pictures: a tensor first, then resized, cropped and normalised."""
    x = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    size = proportionate(*x.shape[-2:], 56)
    x = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
    return (centred(x, 56) - published.MEAN) / published.DEVIATION


def hps_scores(folder, arrays, prompts, stem="HPS_v2.1_compressed"):
    tensors = torch.load(folder / f"{stem}.pt", weights_only=True)["state_dict"]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    texts = [" ".join(prompt.replace("&amp;", "&").split()) for prompt in prompts]
    ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return published.OpenClip(tensors, 2, 2).cosine(hps_pixels(arrays), ids)


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789,.;&"]
BERT += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]


@pytest.fixture(scope="module")
def imagereward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    (folder / "vocab.txt").write_text("\n".join(BERT))
    shapes = published.image_reward(48, 16, (192, 2), (128, 2), 96, len(BERT) + 2, 40)
    torch.save(published.filled(shapes, gain=1.2), folder / "ImageReward.pt")
    return folder


def imagereward_pixels(arrays):
    """As `image-reward` prepares pictures: resized by Pillow, cropped, and normalised."""
    high, wide = proportionate(*arrays.shape[1:3], 48)
    resized = [np.array(Image.fromarray(one).resize((wide, high), Image.Resampling.BICUBIC)) for one in arrays]
    x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    return (centred(x, 48) - published.MEAN) / published.DEVIATION


def imagereward_scores(folder, arrays, prompts):
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    given = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    net = published.ImageRewardNet(torch.load(folder / "ImageReward.pt", weights_only=True), 3, 2)
    return net.score(imagereward_pixels(arrays), given.input_ids, given.attention_mask)


QWEN_TEMPLATE = (  # the part of Qwen2-VL's that an image and a text take
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def hpsv3_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv3")
    tokenizer, model = tiny_text.qwen2_vl(width=32, template=hpsv3.AFTER)
    model.config.text_config.vocab_size += 5  # as Qwen's, which is larger than the tokenizer
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shapes = published.hpsv3(32, 64, 2, 16, len(tokenizer) + 1, (8, 1), 14, 2)
    save_file(published.filled(shapes, gain=1.5), folder / "HPSv3.safetensors")
    return folder


def hpsv3_scores(folder, arrays, prompts):
    """As `hpsv3` has it: the whole conversation, token after token, through Qwen2; the head's mean at the mark."""
    tensors = load_file(folder / "HPSv3.safetensors")
    config = transformers.Qwen2VLConfig.from_pretrained(folder)
    looks = Qwen2VLImageProcessorPil(size={"shortest_edge": 256 * 784, "longest_edge": 256 * 784})
    seen = looks(images=[Image.fromarray(one) for one in arrays], return_tensors="pt")
    tower = type(tiny_text.qwen2_vl(width=32)[1].model.visual)(config.vision_config).eval()
    tower.load_state_dict({k.removeprefix("visual."): v for k, v in tensors.items() if k.startswith("visual.")})
    text = transformers.Qwen2Config(**{**config.text_config.to_dict(), "rope_parameters": {"rope_theta": 1e6}})
    text.rope_parameters, text.vocab_size = {"rope_type": "default", "rope_theta": 1e6}, len(tensors["lm_head.weight"])
    reader = transformers.Qwen2Model(text).eval()
    reader.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|Reward|>"]}, replace_extra_special_tokens=False)
    mark, image = tokenizer.convert_tokens_to_ids(["<|Reward|>", "<|image_pad|>"])
    embeddings = tower(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output.chunk(len(arrays))
    scores = []
    for each, prompt in zip(embeddings, prompts, strict=True):
        asked = hpsv3.AFTER.removeprefix("<|vision_end|>").replace("{prompt}", prompt) + "\n\nEND\n"
        content = [{"type": "image"}, {"type": "text", "text": asked}]
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=QWEN_TEMPLATE,
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = tokenizer(chat.replace("<|image_pad|>", "<|image_pad|>" * len(each)), return_tensors="pt").input_ids
        given = reader.embed_tokens(ids).masked_scatter((ids == image)[..., None], each)
        x = reader(inputs_embeds=given).last_hidden_state[ids == mark]
        for place in (0, 3, 5):
            x = torch.nn.functional.linear(x, tensors[f"rm_head.{place}.weight"], tensors[f"rm_head.{place}.bias"])
            x = x if place == 5 else x.relu()
        scores.append(x[0, 0])
    return torch.stack(scores)


REFERENCES = {"hps": hps_scores, "imagereward": imagereward_scores, "hpsv3": hpsv3_scores}


@pytest.fixture(params=REFERENCES)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, request):
    return request.getfixturevalue(f"{kind}_folder")


# Scores.


@torch.no_grad()
def test_scores_are_the_authors(kind, folder):
    reward = rewards.make(f"{kind}:model={folder}")
    found = []
    for size in SIZES if kind != "hpsv3" else SIZES[:2]:
        prompts = PROMPTS if kind != "hpsv3" else PROMPTS[:2]
        arrays, images = pictures(len(prompts), *size)
        scores = reward(images, prompts)
        assert scores.dtype == torch.float32 and scores.shape == (len(prompts),)
        torch.testing.assert_close(scores, REFERENCES[kind](folder, arrays, prompts), atol=1e-4, rtol=1e-5)
        alone = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
        torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
        found.append(scores)
    assert torch.cat(found).std() > 0.01  # they differ by far more than the tolerance


@torch.no_grad()
def test_scores_depend_on_the_prompt_and_on_the_image(kind, folder):
    reward = rewards.make(f"{kind}:model={folder}")
    _, images = pictures(2, 64, 64)
    first = reward(images, ["a cat", "a cat"])
    assert (first - reward(images, ["a dog", "a cat"])).abs()[0] > 1e-3 and (first[0] - first[1]).abs() > 1e-3


@torch.no_grad()
def test_pixels_are_the_authors(hps_folder, imagereward_folder):
    of_imagereward = rewards.make(f"imagereward:model={imagereward_folder}").parts(CPU).prepare
    of_hps = hps.preparation(56)
    for size in [*SIZES, (333, 500), (59, 56), (48, 51)]:  # the last are cropped by 1.5 pixels a side
        arrays, images = pictures(2, *size)
        torch.testing.assert_close(of_hps(images), hps_pixels(arrays), atol=1e-4, rtol=0)
        torch.testing.assert_close(of_imagereward(images), imagereward_pixels(arrays), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (100, 333), (701, 530), (20, 800)])
def test_patches_are_those_of_the_processor(size):
    arrays, images = pictures(2, *size)
    for least, most in ((256 * 784, 256 * 784), (56 * 56, 784 * 1280), (56 * 56, 784 * 20)):
        looks = Qwen2VLImageProcessorPil(size={"shortest_edge": least, "longest_edge": most})
        wanted = looks(images=[Image.fromarray(one) for one in arrays], return_tensors="pt")
        pixels, grid = Patches.of(looks)(images)
        torch.testing.assert_close(pixels, wanted["pixel_values"], atol=1e-6, rtol=0)
        assert torch.equal(grid, wanted["image_grid_thw"])
        assert Patches.of(looks).tokens(*size) * 4 * 2 == len(pixels)


@torch.no_grad()
def test_hpsv3_sees_about_256_tokens(hpsv3_folder):
    prepare = rewards.make(f"hpsv3:model={hpsv3_folder}").parts(CPU).prepare
    assert prepare.size(1024, 1024) == prepare.size(64, 64) == (448, 448) and prepare.tokens(1024, 1024) == 256
    assert prepare.size(701, 530) == (504, 364)  # as `smart_resize` of `hpsv3` has it


def test_the_text_of_hpsv3_is_the_published_one():
    text = hpsv3.AFTER.removeprefix("<|vision_end|>").replace("{prompt}", "") + "\n\nEND\n"
    assert hashlib.sha256(text.encode()).hexdigest() == TEXT_OF_HPSV3


@torch.no_grad()
def test_hpsv3_counts_tokens_where_qwen_counts_rows_and_columns(hpsv3_folder):
    reward = rewards.make(f"hpsv3:model={hpsv3_folder}")
    network = reward.parts(CPU).network
    seen = []
    hook = network.language_model.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    _, images = pictures(2, 64, 64)
    reward(images, ["a cat", "a longer prompt"])
    hook.remove()
    places = seen[0]["position_ids"]
    assert torch.equal(places, torch.arange(places.shape[2]).expand(3, 2, -1))


# Gradients.


def test_gradients_are_those_of_finite_differences(kind, folder):
    reward = rewards.make(f"{kind}:model={folder}")
    assert rewards.differentiable(reward)
    _, images = pictures(2, 60, 75, seed=3)
    images = images * 0.5 + 0.25
    prompts = ["a cat", "two red dogs"]

    def scores(at):
        return reward(at.requires_grad_(), prompts)  # nothing is rounded where a gradient is wanted

    at = images.clone()
    (slope,) = torch.autograd.grad(scores(at).sum(), at)
    draw = torch.Generator().manual_seed(0)
    for row in range(2):
        step = torch.zeros_like(images)
        step[row] = slope[row].sign() * (torch.rand(images[row].shape, generator=draw) < 0.3)
        size = 1e-4
        with torch.no_grad():
            moved = (scores(images + size * step).detach() - scores(images - size * step).detach()) / (2 * size)
        assert moved[row].item() == pytest.approx((slope * step).sum().item(), rel=1e-2)
        assert moved[1 - row].abs() < 1e-2 * moved[row].abs()  # no row depends on another


# The published checkpoints, of full size and without values: no tensor is missing, and none is too many.


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def test_names_and_shapes_of_the_published_hpsv2():
    tensors = published.meta(published.open_clip())
    assert len(tensors) == 686
    config = openclip.configuration(tensors, *hps.HEADS)
    with torch.device("meta"):
        network = transformers.CLIPModel(config)
    assert shapes(openclip.mapped(tensors)) == shapes(network.state_dict())
    assert config.vision_config.num_attention_heads == config.text_config.num_attention_heads == 16
    assert (config.vision_config.image_size, config.projection_dim) == (224, 1024)


def test_names_and_shapes_of_the_published_imagereward():
    tensors = published.meta(published.image_reward())
    assert len(tensors) == 625
    vision, text, head = imagereward.mapped(tensors)
    of_vision, of_text = imagereward.configurations(vision, text)
    with torch.device("meta"):
        networks = transformers.BlipVisionModel(of_vision), transformers.BlipTextModel(of_text, add_pooling_layer=False)
    assert shapes(vision) == shapes(networks[0].state_dict()) and shapes(text) == shapes(networks[1].state_dict())
    assert len(vision) + len(text) + len(head) == 625 - 5  # the projections and the places of tokens
    assert (of_vision.num_attention_heads, of_text.num_attention_heads, of_vision.image_size) == (16, 12, 224)


QWEN2_VL_7B = {  # as the configuration of the hub has it
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 3584},
}


def test_names_and_shapes_of_the_published_hpsv3():
    tensors = published.meta(published.hpsv3())
    assert len(tensors) == 736
    named, head = hpsv3.mapped(tensors)
    config = transformers.Qwen2VLConfig(**QWEN2_VL_7B)
    config.text_config.vocab_size = 151658
    with torch.device("meta"):
        network = transformers.Qwen2VLModel(config)
    assert shapes(named) == shapes(network.state_dict())
    assert len(named) + len(head) == 736 - 1  # what predicts words


@pytest.mark.skipif(not importlib.util.find_spec("open_clip"), reason="open_clip is not installed")
@torch.no_grad()
def test_hps_is_open_clips_own_arithmetic(hps_folder):
    try:
        from open_clip.model import CLIP
    except ImportError as error:
        pytest.skip(f"open_clip cannot be imported: {error}")
    tensors = torch.load(hps_folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    towers = [{"width": width, "layers": 2} for width in (160, 128)]
    towers[0] |= {"head_width": 80, "image_size": 56, "patch_size": 14}
    model = CLIP(32, towers[0], towers[1] | {"heads": 2, "vocab_size": len(tensors["token_embedding.weight"])}).eval()
    model.load_state_dict(tensors)
    arrays, images = pictures(2, 64, 90)
    ids = transformers.CLIPTokenizer.from_pretrained(hps_folder)(PROMPTS[:1], padding="max_length", return_tensors="pt")
    image, text = model.encode_image(hps_pixels(arrays), True), model.encode_text(ids.input_ids, True)
    scores = rewards.make(f"hps:model={hps_folder}")(images, [PROMPTS[0]] * 2)
    torch.testing.assert_close(scores, image @ text[0], atol=1e-5, rtol=0)


# Files.


@torch.no_grad()
def test_versions_and_suffixes_of_hps(hps_folder, tmp_path):
    arrays, images = pictures(1, 64, 64)
    for version in ("2", "2.0"):
        scores = rewards.make(f"hps:model={hps_folder},version={version}")(images, ["a cat"])
        expected = hps_scores(hps_folder, arrays, ["a cat"], "HPS_v2_compressed")
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    tensors = torch.load(hps_folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    save_file(tensors, tmp_path / "HPS_v2.1_compressed.safetensors")
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"what is not read")
    elsewhere = rewards.make(f"hps:model={tmp_path},tokenizer={hps_folder}")
    elsewhere.check("a cat")
    same = rewards.make(f"hps:model={hps_folder}")(images, ["a cat"])
    torch.testing.assert_close(elsewhere(images, ["a cat"]), same)


def spoilt(tensors, how):
    name = [name for name in tensors if name.endswith("weight") and tensors[name].ndim > 1][-1]
    if how == "missing":
        return {key: value for key, value in tensors.items() if key != name}
    if how == "unknown":
        return {**tensors, name.replace("weight", "wait"): tensors[name].clone()}
    return {**tensors, name: tensors[name][..., :1].clone()}


@pytest.mark.parametrize("how", ["missing", "unknown", "of another shape"])
@pytest.mark.parametrize("stem", ["HPS_v2.1_compressed", "ImageReward", "HPSv3"])
def test_a_checkpoint_that_does_not_fit_is_refused(stem, how, tmp_path, hps_folder, imagereward_folder, hpsv3_folder):
    name, source = {
        "HPS_v2.1_compressed": ("hps", hps_folder),
        "ImageReward": ("imagereward", imagereward_folder),
        "HPSv3": ("hpsv3", hpsv3_folder),
    }[stem]
    for file in source.iterdir():
        if not file.name.startswith(("HPS", "Image")):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = source / f"{stem}.pt"
    tensors = torch.load(path, weights_only=True) if path.is_file() else load_file(source / f"{stem}.safetensors")
    save_file(spoilt(tensors.get("state_dict", tensors), how), tmp_path / f"{stem}.safetensors")
    with pytest.raises(ModelError) as caught:
        rewards.make(f"{name}:model={tmp_path}").parts(CPU)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_pickle_that_would_run_code_is_not_read(hps_folder, tmp_path):
    for file in hps_folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"state_dict": {"logit_scale": math.sqrt}}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ModelError) as caught:
        rewards.make(f"hps:model={tmp_path}").parts(CPU)
    assert "\n" not in str(caught.value) and "HPS_v2.1_compressed.pt" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("hps", ["xswu/HPSv2", "HPS_v2.1_compressed", "fetch hps"]),
        ("imagereward", ["zai-org/ImageReward", "ImageReward", "fetch imagereward"]),
        ("hpsv3", ["MizzenAI/HPSv3", "HPSv3.safetensors", "fetch hpsv3"]),
    ],
)
def test_missing_weights_are_named_in_one_line(spec, parts, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ROLLFLOW_MODELS", raising=False)
    with pytest.raises(RequestError) as caught:
        rewards.make(spec).check("a cat")
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(RequestError) as caught:
        rewards.make(f"{spec}:model={tmp_path}").check("a cat")
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in (*parts[1:], str(tmp_path)))


def test_a_folder_without_a_tokenizer_is_named(kind, folder, tmp_path):
    stem = {"hps": "HPS_v2.1_compressed.pt", "imagereward": "ImageReward.pt", "hpsv3": "HPSv3.safetensors"}[kind]
    (tmp_path / stem).write_bytes((folder / stem).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')  # as in the repository of HPSv3
    other = "base" if kind == "hpsv3" else "tokenizer"
    with pytest.raises(RequestError) as caught:
        rewards.make(f"{kind}:model={tmp_path},{other}={tmp_path}").check("a cat")
    assert "\n" not in str(caught.value) and "tokenizer.json" in str(caught.value)
    rewards.make(f"{kind}:model={tmp_path},{other}={folder}").check("a cat")
    reward = rewards.make(f"{kind}:model={tmp_path},{other}={folder}")
    if kind == "hpsv3":
        (tmp_path / "tokenizer.json").write_text("{}")  # of another model
    _, images = pictures(1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(reward(images, ["a"]), rewards.make(f"{kind}:model={folder}")(images, ["a"]))


def test_a_cache_with_other_files_of_a_model_is_no_answer(monkeypatch, tmp_path):
    asked = []

    def download(model, revision, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        if not local_files_only:
            (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"fetched")
        return str(tmp_path)

    (tmp_path / "HPS_v2_compressed.pt").write_bytes(b"cached")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(weights, "reachable", lambda: True)
    found = weights.folder("hps", "some/model", None, ("HPS_v2.1_compressed.*",))
    assert asked == [True, False] and (found / "HPS_v2.1_compressed.pt").is_file()
    assert weights.folder("hps", "some/model", None, ("HPS_v2_compressed.*",)) == found and asked == [True, False, True]


def test_what_is_wanted_of_the_hub():
    for spec, other in (("hps", "laion/"), ("imagereward", "google-bert/"), ("hpsv3", "Qwen/")):
        own, tokenizer = rewards.make(spec).wanted()
        assert own.model == rewards.make(spec).model and tokenizer.model.startswith(other)
        assert not any("safetensors" in pattern for pattern in tokenizer.patterns)  # no weights of the other model
    assert rewards.make("hps:version=2").wanted()[0].patterns == ("HPS_v2_compressed.*",)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [("hps:version=3", ["hpsv3", "2.1"]), ("hps:version=1", ["'1'", "2.1"]), ("hps:vers=2", ["version"])],
)
def test_versions_that_cannot_be(spec, parts):
    with pytest.raises(RequestError) as caught:
        rewards.make(spec)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts)


def test_prompts_that_cannot_be_judged(hpsv3_folder, hps_folder, monkeypatch):
    with pytest.raises(RequestError, match=r"image_pad.*leave it out"):
        rewards.make(f"hpsv3:model={hpsv3_folder}").check("a <|image_pad|> cat")
    rewards.make(f"hpsv3:model={hpsv3_folder}").check("a {prompt} <b> | cat")
    monkeypatch.setattr("rollflow.rewards.network.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"hps takes ftfy: pip install"):
        rewards.make(f"hps:model={hps_folder}").check("naïve")
    rewards.make(f"hps:model={hps_folder}").check("plain")


@pytest.mark.skipif(not importlib.util.find_spec("ftfy"), reason="ftfy is not installed")
def test_prompts_beyond_ascii_are_mended():
    assert hps.clean("  schÃ¶n “Q”\n &amp;lt; ") == 'schön "q" <'


def test_images_that_are_too_long_for_qwen():
    with pytest.raises(RequestError, match=r"10x2001.*200 times"):
        Patches(4, 8).size(10, 2001)


@torch.no_grad()
def test_clips_and_bfloat16(kind, folder):
    _, images = pictures(4, 64, 64)
    reward = rewards.make(f"{kind}:model={folder},frames=last")
    scores = reward(images.unflatten(0, (2, 2)), ["a cat", "a dog"])
    torch.testing.assert_close(scores, reward(images[1::2], ["a cat", "a dog"]))
    coarse = rewards.make(f"{kind}:model={folder},dtype=bfloat16")(images[1::2], ["a cat", "a dog"])
    assert coarse.dtype == torch.float32 and not torch.equal(coarse, scores)
    torch.testing.assert_close(coarse, scores, atol=0.2, rtol=0.1)
