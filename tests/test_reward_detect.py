"""Rewards that detect: prompts, detectors, masks and colours against the library, and GenEval's and Kim's rules."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_text import clip_tokenizer, tiny

from rollflow import rewards
from rollflow.errors import ModelError, RequestError
from rollflow.rewards import detectors, phrases, quantity, scenes
from rollflow.rewards.colours import Colours, crop
from rollflow.rewards.count import CountReward
from rollflow.rewards.detect import DetectReward
from rollflow.rewards.detectors import Detections
from rollflow.rewards.quantity import Parts, QuantityReward
from rollflow.rewards.scenes import COLOURS, Scene, Thing
from rollflow.rewards.segments import Segmenter

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SIZES = [(64, 64), (45, 131), (120, 77)]


def pictures(height, width, count=3):
    """8-bit pictures, and the same as a batch of tensors in [0, 1]."""
    noise = np.random.default_rng(height).integers(0, 256, (count, height, width, 3), np.uint8)
    noise[:, :, : width // 3] //= 3
    return [Image.fromarray(one) for one in noise], torch.from_numpy(noise).permute(0, 3, 1, 2) / 255


# What prompts ask for
# --------------------


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("three cats", {"cat": 3}),
        ("a photo of three red apples and two dogs on a table", {"red apple": 3, "dog": 2, "table": 1}),
        ("a photo of an orange", {"orange": 1}),
        ("A PHOTO OF FOUR BUSES, 2 Knives; twenty-one wine glasses.", {"bus": 4, "knife": 2, "wine glass": 21}),
        ("no people, 12 boxes and twenty two mice", {"person": 0, "box": 12, "mouse": 22}),
        ("a group of three dogs running in the park", {"dog": 3}),
        ("a pair of shoes, half a dozen eggs and two dozen roses", {"shoe": 2, "egg": 6, "rose": 24}),
        ("two sandwichs, two skises, two scissorses", {"sandwich": 2, "skis": 2, "scissors": 2}),  # GenEval's plurals
        ("a 3d render of four old parking meters standing by a house, 8k, 1990", {"old parking meter": 4, "house": 1}),
        ("a dog next to another dog and a dog", {"dog": 3}),
        ("seven sheep grazing, one of the sheep", {"sheep": 8}),
        ("a red sports ball left of a top hat", {"red sports ball": 1, "top hat": 1}),
        ("5 potatoes, 3 vases, 6 foxes, 4 berries, 3 pies", {"potato": 5, "vase": 3, "fox": 6, "berry": 4, "pie": 3}),
    ],
)
def test_prompts_name_numbers_of_objects(prompt, named):
    assert quantity.asked(prompt) == named


@pytest.mark.parametrize("prompt", ["dogs on grass", "", "a few dogs", "a lot of birds", "a photo", "!!! 3"])
def test_a_prompt_without_a_number_is_refused(prompt):
    reward = rewards.make("count:model=someone/something")
    with pytest.raises(RequestError, match="the reward count compares numbers of objects") as error:
        reward.check(prompt)
    assert "\n" not in str(error.value)


def test_singular():
    for plural, one in {"leaves": "leaf", "gloves": "glove", "dresses": "dress", "cherries": "cherry", "glass": "glass",
                        "tomatoes": "tomato", "canoes": "canoe", "bus": "bus", "houses": "house", "gases": "gas",
                        "children": "child", "peaches": "peach", "cookies": "cookie", "as": "as"}.items():  # fmt: skip
        assert phrases.singular(plural) == one


def test_prompts_compose_scenes():
    assert scenes.scene("a photo of a red apple left of a green cup") == Scene(
        (Thing("apple", 1, "red"), Thing("cup", 1, "green")), ((0, "left of", 1),)
    )
    assert scenes.scene("three dogs") == Scene((Thing("dog", 3, exact=True),))
    assert scenes.scene("two orange oranges to the right of one bird on top of an orange") == Scene(
        (Thing("orange", 2, "orange", True), Thing("bird", 1, exact=True), Thing("orange")),
        ((0, "right of", 1), (1, "above", 2)),
    )
    with pytest.raises(RequestError, match="the reward detect checks the objects"):
        scenes.scene("dogs on grass")
    with pytest.raises(RequestError, match="choose one of red, orange"):
        Thing("dog", colour="beige")
    with pytest.raises(RequestError, match="between the places of two things, 0 to 0"):
        Scene((Thing("dog"),), ((0, "above", 1),))


# Detectors
# ---------


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A tiny Grounding DINO whose words are "dog", "red", "apple" and letters; its folder, network and processor."""
    letters = [chr(code) for code in range(97, 123)]
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?"]
    pieces = [*marks, "dog", "cat", "red", "apple", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = transformers.BertTokenizer({piece: i for i, piece in enumerate(pieces)})
    swin = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4}
    size = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(**swin, out_indices=[2, 3, 4]),
        text_config=transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        **size, d_model=32, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=12,
    )  # fmt: skip
    network = tiny(transformers.GroundingDinoForObjectDetection, config, gain=2.0)
    image = transformers.GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 150})
    processor = transformers.GroundingDinoProcessor(image, tokenizer)
    folder = tmp_path_factory.mktemp("dino")
    network.save_pretrained(folder), processor.save_pretrained(folder)
    return folder, network, processor


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    """A tiny OWLv2; its folder, network and processor."""
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 32
    each = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Owlv2Config(
        text_config={**each, "vocab_size": len(tokenizer), "max_position_embeddings": 32},
        vision_config={**each, "image_size": 48, "patch_size": 16},
        projection_dim=16,
    )
    network = tiny(transformers.Owlv2ForObjectDetection, config)
    processor = transformers.Owlv2Processor(
        transformers.Owlv2ImageProcessorPil(size={"height": 48, "width": 48}), tokenizer
    )
    folder = tmp_path_factory.mktemp("owl")
    network.save_pretrained(folder), processor.save_pretrained(folder)
    return folder, network, processor


NAMES = [("dog", "apple"), ("cat",), ("apple", "cat", "dog")]


@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_grounding_dino_finds_what_the_library_finds(dino, height, width):
    folder, network, processor = dino
    detector = detectors.load("count", folder, CPU, torch.float32)
    given, images = pictures(height, width)
    pixels = processor.image_processor(given, return_tensors="pt").pixel_values
    torch.testing.assert_close(detector.pixels(images), pixels, rtol=0, atol=1e-5)
    encoded = [
        processor(images=picture, text=[[*names]], return_tensors="pt")
        for picture, names in zip(given, NAMES, strict=True)
    ]
    theirs = [network(**one) for one in encoded]
    likely = torch.cat([one.logits[..., 1::2].flatten() for one in theirs]).sigmoid()  # of the names' words
    likely = likely[likely > 0].sort().values
    middle = len(likely) // 2
    threshold = likely[middle : middle + 2].mean().item()  # some boxes are of one name, others of none or of several
    found = detector(images, NAMES, 0.3, threshold)
    several = 0
    for row, names in enumerate(NAMES):
        wanted = processor.post_process_grounded_object_detection(
            theirs[row], encoded[row].input_ids, 0.3, threshold, target_sizes=[(height, width)]
        )[0]
        words = [set(label.replace(".", " ").split()) & set(names) for label in wanted["text_labels"]]
        order = [i for i in wanted["scores"].argsort(descending=True).tolist() if len(words[i]) == 1]
        several += len(words) - len(order)
        assert [names[i] for i in found[row].classes] == [next(iter(words[i])) for i in order]
        torch.testing.assert_close(found[row].scores, wanted["scores"][order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[row].boxes, wanted["boxes"][order], rtol=1e-4, atol=1e-2)
    assert several and sum(len(one.scores) for one in found) > 3


@torch.no_grad()
def test_a_part_of_a_word_is_enough_for_grounding_dino(dino, monkeypatch):
    """Of "giraffe", which has seven tokens, some are below the threshold."""
    folder, network, _ = dino
    detector = detectors.load("count", folder, CPU, torch.float32)
    logits = torch.full((1, 2, 256), -9.0)
    logits[0, 0, 3] = 2.0  # [CLS] dog . g ##i ...
    logits[0, 0, 3 + 3] = 1.0
    logits[0, 1, [1, 4]] = 2.0  # of both
    network = type("Output", (), {"logits": logits, "pred_boxes": torch.full((1, 2, 4), 0.5)})
    usual = detector._network

    class Fixed:
        config, dtype = usual.config, usual.dtype

        def __call__(self, **_):
            return network

    monkeypatch.setattr(detector, "_network", Fixed())
    found = detector(pictures(64, 64, 1)[1], [("dog", "giraffe")], 0.3, 0.5)[0]
    assert found.classes.tolist() == [1]
    assert found.boxes.tolist() == [[16, 16, 48, 48]]


@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_owl_finds_what_the_library_finds(owl, height, width):
    folder, network, processor = owl
    detector = detectors.load("count", folder, CPU, torch.float32)
    given, images = pictures(height, width)
    pixels = processor.image_processor(given, return_tensors="pt").pixel_values
    torch.testing.assert_close(detector.pixels(images), pixels, rtol=0, atol=1e-4)
    texts = [[f"a photo of a {name}" for name in names] for names in NAMES]
    encoded = [processor(images=given[row], text=[texts[row]], return_tensors="pt") for row in range(3)]
    theirs = [network(**one) for one in encoded]
    scores = torch.cat([one.logits.amax(-1).flatten() for one in theirs]).sigmoid().sort().values
    threshold = scores[13:15].mean().item()
    found = detector(images, NAMES, threshold, 0.0)
    for row in range(3):
        wanted = processor.post_process_grounded_object_detection(
            theirs[row], threshold=threshold, target_sizes=[(height, width)]
        )[0]
        order = wanted["scores"].argsort(descending=True, stable=True)
        torch.testing.assert_close(found[row].scores, wanted["scores"][order], rtol=1e-4, atol=1e-5)
        assert found[row].classes.tolist() == wanted["labels"][order].tolist()
        torch.testing.assert_close(found[row].boxes, wanted["boxes"][order], rtol=1e-4, atol=1e-2)
    assert sum(len(one.scores) for one in found) == 13  # of 27


def test_sizes_are_those_of_detr():
    from transformers.image_transforms import get_size_with_aspect_ratio

    for size in np.random.default_rng(0).integers(1, 2000, (500, 2)).tolist():
        assert detectors.within(*size, 800, 1333) == get_size_with_aspect_ratio(size, 800, 1333)


def boxes(*rows):
    """Detections of (class, score, left, top, right, bottom)."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(rows[:, 2:], rows[:, 1], rows[:, 0].long())


def test_worse_boxes_of_the_same_object_are_dropped():
    found = boxes((0, 0.9, 0, 0, 10, 10), (0, 0.8, 1, 0, 11, 10), (1, 0.7, 0, 0, 10, 10), (0, 0.6, 6, 0, 16, 10))
    assert detectors.distinct(found, 0.5).scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert detectors.distinct(found, 0.2).scores.tolist() == pytest.approx([0.9, 0.7])
    assert len(detectors.distinct(found, 1.0).scores) == 4


# Masks
# -----


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A tiny Segment Anything; its folder, network and processor."""
    eyes = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 16}
    eyes |= {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8}
    network = tiny(
        transformers.SamModel,
        transformers.SamConfig(
            vision_config=eyes,
            prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8},
            mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        ),
        gain=8.0,
    )
    processor = transformers.SamProcessor(
        transformers.SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    )
    folder = tmp_path_factory.mktemp("sam")
    network.save_pretrained(folder), processor.save_pretrained(folder)
    return folder, network, processor


@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_masks_are_those_of_the_library(sam, height, width):
    folder, network, processor = sam
    segmenter = Segmenter.load("count", folder, CPU, torch.float32)
    given, images = pictures(height, width, 1)
    where = torch.tensor([[3.0, 5.0, 30.0, 40.0], [10.0, 0.0, 60.0, 20.0]])
    encoded = processor(images=given[0], input_boxes=[where.tolist()], return_tensors="pt")
    torch.testing.assert_close(segmenter.pixels(images), encoded["pixel_values"], rtol=0, atol=1e-5)
    encoded["input_boxes"] = encoded["input_boxes"].float()
    sizes = encoded.pop("original_sizes"), encoded.pop("reshaped_input_sizes")
    masks = processor.post_process_masks(network(**encoded).pred_masks, *sizes)[0].any(1)
    ours = segmenter(images[0], where)
    assert ours.shape == (2, height, width)
    assert (ours == masks).float().mean() > 0.999
    assert 0 < ours.float().mean() < 1


def test_a_mask_that_others_cover_is_no_object():
    def mask(left, right):
        area = torch.zeros(4, 20, dtype=torch.bool)
        area[:, left:right] = True
        return area

    masks = torch.stack([mask(0, 10), mask(0, 4), mask(4, 9), mask(10, 20), mask(11, 20)])
    found = boxes(*((kind, score, 0, 0, 1, 1) for kind, score in ((0, 0.9), (0, 0.8), (0, 0.7), (0, 0.4), (1, 0.6))))
    # the first is covered by the next two, which are smaller; of the fourth most belongs to the fifth, which is better
    assert quantity.uncovered(masks, found).tolist() == [False, True, True, False, True]
    assert quantity.uncovered(masks[:1] & False, found.where(torch.tensor([0]))).tolist() == [False]


# Colours
# -------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP; its folder, network and processor."""
    tokenizer = clip_tokenizer()
    each = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        text_config={**each, **ids, "vocab_size": len(tokenizer), "initializer_factor": 3.0},
        vision_config={**each, "image_size": 28, "patch_size": 14},
        projection_dim=16,
    )
    network = tiny(transformers.CLIPModel, config, gain=3.0)
    image = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.CLIPProcessor(image, tokenizer)
    folder = tmp_path_factory.mktemp("clip")
    network.save_pretrained(folder), processor.save_pretrained(folder)
    return folder, network, processor


@torch.no_grad()
def test_colours_are_told_as_geneval_does(clip):
    folder, network, processor = clip
    colours = Colours("detect", folder, CPU, torch.float32)
    given, images = pictures(60, 90, 1)
    where = torch.tensor([[3.4, 5.6, 30.0, 40.0], [60.0, 0.0, 90.0, 60.0], [10.0, 20.0, 80.0, 31.0]])
    masks = torch.zeros(3, 60, 90, dtype=torch.bool)
    masks[:, 8:30, 20:70] = True

    def told(picture, box):
        pixels = processor(images=picture.crop([round(edge) for edge in box]), return_tensors="pt").pixel_values
        seen = network.get_image_features(pixel_values=pixels).pooler_output
        each = []
        for colour in COLOURS:
            texts = [f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog"]
            texts.append(f"a photo of a {colour} object")
            encoded = processor(text=texts, padding=True, return_tensors="pt")
            text = network.get_text_features(**encoded).pooler_output
            text = torch.nn.functional.normalize(text, dim=-1).mean(0)
            each.append(torch.nn.functional.cosine_similarity(text, seen[0], dim=0))
        return COLOURS[int(torch.stack(each).argmax())]

    wanted = [told(given[0], box) for box in where.tolist()]
    assert colours(images[0], where, "dog") == wanted
    grey = Image.new("RGB", given[0].size, "#999")
    cut = [Image.composite(given[0], grey, Image.fromarray(mask.numpy())) for mask in masks]
    assert colours(images[0], where, "dog", masks) == [told(*row) for row in zip(cut, where.tolist(), strict=True)]


def test_crops_have_a_pixel_at_least():
    image = torch.rand(3, 6, 8)
    shapes = {(1.4, 2.6, 3, 5): (2, 2), (-5, -5, 99, 99): (6, 8), (9, 9, 12, 12): (1, 1), (3, 3, 3, 3): (1, 1)}
    for box, shape in shapes.items():
        assert crop(image, torch.tensor(box, dtype=torch.float32)).shape[1:] == shape


# The rewards
# -----------


def test_count_without_a_model_is_the_toy_reward():
    assert isinstance(rewards.make("count"), CountReward)
    assert rewards.make("count") is rewards.make("count")
    with pytest.raises(RequestError, match="has batch, nms without a model"):
        rewards.make("count:nms=0.3,batch=4")
    made = rewards.make("count:model=IDEA-Research/grounding-dino-base,masks=facebook/sam-vit-base,nms=1,share=0.5")
    assert made == QuantityReward(masks="facebook/sam-vit-base", nms=1.0, share=0.5)
    with pytest.raises(RequestError, match=r"threshold=1\.5: it must be from 0 to 1"):
        rewards.make("count:model=a/b,threshold=1.5")


@pytest.mark.parametrize("kind", ["dino", "owl"])
def test_count_is_minus_the_residual_sum_of_squares(kind, request):
    """With a true network; batches of mixed prompts equal one image after the other."""
    folder, *_ = request.getfixturevalue(kind)
    reward = rewards.make(f"count:model={folder},threshold=0.4,text_threshold=0.45,nms=1,share=0")
    prompts = ["two dogs and an apple", "three cats", "one apple, no cats and 4 dogs"]
    _, images = pictures(64, 90)
    scores = reward(images, prompts)
    detector = detectors.load("count", folder, CPU, torch.float32)
    for row, wanted in enumerate(({"dog": 2, "apple": 1}, {"cat": 3}, {"apple": 1, "cat": 0, "dog": 4})):
        with torch.no_grad():
            found = detector(images[row : row + 1], [tuple(wanted)], 0.4, 0.45)[0]
        counts = [int((found.classes == i).sum()) for i in range(len(wanted))]
        assert scores[row] == -sum((a - b) ** 2 for a, b in zip(counts, wanted.values(), strict=True))
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    assert scores.dtype == torch.float32 and scores.tolist() == alone.tolist()
    clips = reward(images.expand(2, -1, -1, -1, -1), ["two dogs and an apple"] * 2)
    torch.testing.assert_close(clips, reward(images, ["two dogs and an apple"] * 3).mean().expand(2))


class Found:
    """A detector that finds what it is told to, by name."""

    threshold = 0.2

    def __init__(self, **found):
        self.found = found

    def __call__(self, images, names, threshold, text_threshold):
        rows = []
        for those in names:
            each = [(i, *box) for i, name in enumerate(those) for box in self.found.get(name.replace(" ", "_"), ())]
            rows.append(boxes(*sorted(each, key=lambda box: -box[1])))
        return rows


def at(x, y, score=0.9, side=10):
    return (score, x, y, x + side, y + side)


@pytest.fixture
def fake(monkeypatch):
    """Makes rewards find what is given."""

    def told(kind, found, **options):
        reward = kind(model="told/by-hand", **options)
        monkeypatch.setattr(kind, "parts", lambda self, device: Parts(CPU, Found(**found), None))
        return lambda prompt: reward(torch.rand(1, 3, 64, 64), [prompt]).item()

    return told


def test_count_takes_clear_boxes_alone(fake):
    found = {"dog": [at(0, 0, 0.5), at(20, 0, 0.33), at(40, 0, 0.31), at(0, 20, 0.29)], "cat": [at(0, 40, 0.25)]}
    score = fake(QuantityReward, found)
    assert score("three dogs and one cat") == 0  # of dogs those above 0.32, or above 0.6 of 0.5
    assert score("five dogs") == -(2**2)
    assert score("four dogs, two cats and a bird") == -(1 + 1 + 1)
    assert fake(QuantityReward, found, sure=0.0)("four dogs") == 0


def test_relations_are_those_of_geneval():
    def by_numpy(one, other):
        pairs = np.array([one, other]).reshape(2, 2, 2)
        middle, size = pairs.mean(1), np.abs(np.diff(pairs, axis=1))[:, 0]
        offset = middle[0] - middle[1]
        free = np.maximum(np.abs(offset) - 0.1 * size.sum(0), 0) * np.sign(offset)
        if (np.abs(free) < 1e-3).all():
            return set()
        x, y = free / np.linalg.norm(offset)
        said = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
        return {name for name, holds in said.items() if holds}

    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        corners = rng.uniform(0, 50, (2, 2))
        pair = np.concatenate([corners, corners + rng.uniform(1, 40, (2, 2))], 1).tolist()
        assert scenes.relations(*pair) == by_numpy(*pair)
        seen |= {frozenset(scenes.relations(*pair))}
    assert {frozenset(), frozenset({"left of"}), frozenset({"above", "right of"})} <= seen
    assert scenes.relations((0, 0, 1, 1), (0, 0, 1, 1)) == set()


def test_detect_is_the_share_of_checks(fake, monkeypatch):
    found = {"dog": [at(0, 0), at(20, 0, 0.8), at(40, 0, 0.7)], "cat": [at(0, 40)], "wine_glass": [at(45, 45)]}
    colours = {"dog": ["red", "red", "blue"], "cat": ["black"], "wine glass": ["green"]}
    monkeypatch.setattr(DetectReward, "_coloured", lambda self, parts, image, boxes, name: colours[name][: len(boxes)])
    score = fake(DetectReward, found)
    assert score("a photo of a dog") == 1
    assert score("three dogs") == 1
    assert score("two dogs") == 0.5  # there, but not two
    assert score("a bird") == 0
    assert score("no birds") == 1
    assert score("no dogs") == 0
    assert score("three red dogs") == pytest.approx(2 / 3)
    assert score("a red dog above a black cat") == 1  # there, red; there, black; above
    assert score("a red dog below a black cat") == pytest.approx(4 / 5)
    assert score("a white dog left of a wine glass") == pytest.approx(2 / 4)  # no dog of that colour to be left of it
    assert score("a red dog and a blue dog") == pytest.approx(5 / 6)  # of the best two none is blue
    assert score("a dog left of a bird") == pytest.approx(1 / 3)
    strict = fake(DetectReward, found, strict=True)
    assert (strict("three dogs"), strict("two dogs")) == (1, 0)
    given = DetectReward(model="a/b", scenes=(("all", Scene((Thing("dog", 3, exact=True), Thing("bird", 0)))),))
    assert fake(DetectReward, found, scenes=given.scenes)("all") == 1
    assert given.name == "detect:model=a/b" and hash(given) != hash(DetectReward(model="a/b"))
    with pytest.raises(RequestError, match="no option 'scenes'"):
        rewards.make("detect:scenes=1")


@pytest.mark.parametrize("masks", [False, True])
def test_detect_works_with_true_networks(dino, clip, sam, masks):
    spec = f"detect:model={dino[0]},colours={clip[0]},threshold=0.3,text_threshold=0.45"
    reward = rewards.make(spec + f",masks={sam[0]}" * masks)
    prompts = ["a red dog left of a blue apple", "two cats", "a green cat above a dog"]
    for prompt in prompts:
        reward.check(prompt)
    _, images = pictures(64, 90)
    scores = reward(images, prompts)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    assert scores.tolist() == alone.tolist()
    passed = scores * torch.tensor([5.0, 2.0, 4.0])
    torch.testing.assert_close(passed, passed.round())
    assert 0 < scores.sum() < 3


def test_weights_that_are_missing_are_named(monkeypatch, dino):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for spec, missing in {
        "count:model=IDEA-Research/grounding-dino-base": "IDEA-Research/grounding-dino-base",
        f"count:model={dino[0]},masks=facebook/sam-vit-base": "facebook/sam-vit-base",
        "detect": "IDEA-Research/grounding-dino-base",
        f"detect:model={dino[0]}": "openai/clip-vit-large-patch14",
    }.items():
        with pytest.raises(RequestError, match=rf"needs the model {missing}, .* put its files") as error:
            rewards.make(spec).check("two red dogs")
        assert "\n" not in str(error.value)
    rewards.make(f"detect:model={dino[0]}").check("two dogs")  # no colour is asked for


def test_other_models_are_refused(clip, dino):
    _, images = pictures(64, 64, 1)
    with pytest.raises(ModelError, match="'clip': the reward count takes grounding-dino"):
        rewards.make(f"count:model={clip[0]}")(images, ["two dogs"])
    with pytest.raises(ModelError, match="'clip': the reward count takes sam"):
        rewards.make(f"count:model={dino[0]},masks={clip[0]}")(images, ["two dogs"])
