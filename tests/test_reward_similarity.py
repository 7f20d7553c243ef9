"""Rewards that compare with a reference image: DINOv2 against transformers, LPIPS against torchmetrics."""

import copy

import numpy as np
import pytest
import tiny_text
import torch
import transformers
from judging import SIZES, gradient_errors, images, picture, pictures
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from rollflow import ModelError, RequestError, rewards
from rollflow.rewards.lpips import ALEX, VGG, Distance, Lpips
from rollflow.rewards.reference import Reference
from rollflow.rewards.similarity import Similarity

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    config = transformers.Dinov2Config(**size, mlp_ratio=2, layerscale_value=1.0)
    tiny_text.tiny(transformers.Dinov2Model, config, gain=12.0).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    transformers.BitImageProcessorPil(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def target():
    return images(1, 45, 60, seed=5)[0]


@pytest.fixture(scope="module")
def file(tmp_path_factory, target):
    path = tmp_path_factory.mktemp("reference") / "target.png"
    picture(target).save(path)
    return path


def embeddings(folder, seen):
    model = transformers.AutoModel.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return model(**processor(pictures(seen), return_tensors="pt")).pooler_output


# DINOv2
# ------


@pytest.mark.parametrize("size", SIZES)
def test_similarity_is_the_cosine_of_class_tokens(dino, file, target, size):
    seen = images(3, *size)
    wanted = torch.cosine_similarity(embeddings(dino, seen), embeddings(dino, target[None]))
    scores = rewards.make(f"similarity:model={dino},image={file}")(seen, ["", "a", "b"])
    assert scores.dtype == torch.float32 and wanted.std() > 1e-2
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5)


def test_an_image_is_most_like_itself(dino, target):
    reward = Similarity(model=str(dino), image=target)
    seen = torch.stack([target, *images(5, 45, 60)])
    scores = reward(seen, [""] * 6)
    assert scores.argmax() == 0 and scores[0] == pytest.approx(1, abs=1e-6) and scores[1:].max() < 0.99


def test_gradients_of_similarity(dino, target):
    reward = Similarity(model=str(dino), image=target)
    assert reward.differentiable
    assert gradient_errors(lambda x: reward(x, [""]), images(1, 33, 40)).max() < 1e-2


def test_references_of_one_model_share_its_network(dino, target):
    rewards.weights.forget()
    seen = images(2, 40, 40)
    first, second = Similarity(model=str(dino), image=target), Similarity(model=str(dino), image=seen[0])
    scores = first(seen, ["", ""]), second(seen, ["", ""])
    cpu = torch.device("cpu")
    assert first.parts(cpu) is second.parts(cpu) and not torch.equal(*scores)
    assert scores[1][0] == pytest.approx(1, abs=1e-6)


def test_a_model_of_text_is_no_judge_of_similarity(tmp_path, target):
    tokenizer, encoder = tiny_text.clip()
    tokenizer.save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="CLIPTextModel reads text: give a model of images alone"):
        Similarity(model=str(tmp_path), image=target)(images(1, 40, 40), [""])


# References
# ----------


def test_files_pictures_tensors_and_bytes_are_the_same_reference(dino, file, target):
    seen = images(2, 40, 40)
    given = [str(file), picture(target), target, target[None], (target * 255).round().byte(), target.double()]
    scores = [Similarity(model=str(dino), image=one)(seen, ["", ""]) for one in given]
    assert all(torch.equal(scores[0], other) for other in scores)
    kept = [Similarity(image=one) for one in given[1:]]
    assert len({*kept}) == 1 and kept[0] != Similarity(image=target.flip(1)) and kept[0] != Similarity(image=str(file))
    assert rewards.make(kept[0]) is rewards.make(kept[1])
    assert "image=image-" in kept[0].name and "\n" not in kept[0].name


def test_pictures_are_upright_and_of_three_channels(tmp_path):
    seen = images(1, 20, 30)[0]
    turned = picture(seen).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    gray = Image.fromarray((np.arange(600, dtype=np.uint16) % 256).astype(np.uint8).reshape(20, 30))
    assert Similarity(image=Image.open(tmp_path / "turned.png")).image == Reference.of(seen)
    assert Similarity(image=gray).image.pixels.shape == (3, 20, 30)


def test_a_file_that_changes_is_read_again(tmp_path, dino):
    path, (first, second) = tmp_path / "x.png", images(2, 40, 40)
    reward = Similarity(model=str(dino), image=str(path))
    for one in (first, second):
        picture(one).save(path)
        assert reward(one[None], [""]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", [Similarity, Lpips])
@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("", "compares with an image: give .*:image=FILE"),
        ("/nowhere/x.png", "is no image that can be read: FileNotFoundError"),
        (__file__, "is no image that can be read: UnidentifiedImageError"),
        (torch.zeros(1, 20, 20), r"must be \[3, height, width\]"),
        (torch.zeros(3, 20, 0), r"must be \[3, height, width\]"),
        (torch.zeros(2, 3, 20, 20), r"must be \[3, height, width\]"),
        (torch.zeros(3, 20, 20, dtype=torch.int64), r"must be \[3, height, width\]"),
        (torch.full((3, 20, 20), 2.0), r"outside of \[0, 1\]"),
        (torch.full((3, 20, 20), torch.nan), r"outside of \[0, 1\]"),
    ],
)
def test_what_is_no_reference_is_refused_before_any_work(kind, image, said):
    with pytest.raises(RequestError, match=said) as error:
        kind(image=image).check("a fox")
    assert "\n" not in str(error.value)


# LPIPS
# -----

SHIFT, SCALE = (torch.tensor(v).view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))


def torchvisions(widths):
    """`torchvision.models.vgg16().features` or `alexnet().features`, of random weights of the size of trained ones."""
    layers, before = [], 3
    if widths == VGG:
        for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
            layers += [nn.MaxPool2d(2, 2)] if width == "M" else [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(True)]
            before = before if width == "M" else width
    else:
        for width, side, stride, padding in (
            (64, 11, 4, 2),
            (192, 5, 1, 2),
            (384, 3, 1, 1),
            (256, 3, 1, 1),
            (256, 3, 1, 1),
        ):
            layers += [nn.Conv2d(before, width, side, stride, padding), nn.ReLU(True)]
            layers += [nn.MaxPool2d(3, 2)] if before in (3, 64) else []
            before = width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.normal_(layer.bias, std=0.1)
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture(scope="module", params=[VGG, ALEX], ids=["vgg", "alex"])
def backbone(request, tmp_path_factory):
    """Widths, features, and where their weights and random heads are."""
    folder, widths = tmp_path_factory.mktemp("lpips"), request.param
    features = torchvisions(widths)
    save_file({f"features.{name}": w for name, w in features.state_dict().items()}, folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    heads = [torch.rand(1, width, 1, 1, generator=generator) / width for width in widths]
    torch.save({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, folder / "heads.pth")
    return widths, features, folder, heads


def by_hand(features, widths, heads, image, other):
    """Equation 1 of the paper, with the 1e-8 of torchmetrics."""
    compared = {3, 8, 15, 22, 29} if widths == VGG else {1, 4, 7, 9, 11}
    found = []
    for x in (image, other):
        x, kept = ((2 * x - 1 - SHIFT) / SCALE)[None], []
        for place, layer in enumerate(features):
            x = layer(x)
            if place in compared:
                kept.append(x / (x.pow(2).sum(1, keepdim=True) + 1e-8).sqrt())
        found.append(kept)
    return sum(((a - b) ** 2 * head).sum(1).mean() for a, b, head in zip(*found, heads, strict=True))


def lpips(folder, image):
    return Lpips(model=str(folder / "model.safetensors"), head=str(folder / "heads.pth"), image=image)


@pytest.mark.parametrize("size", [(40, 40), (64, 64), (37, 90)])
def test_lpips_is_the_distance_of_the_paper(backbone, size):
    widths, features, folder, heads = backbone
    other, *seen = images(3, *size)
    wanted = [by_hand(features, widths, heads, image, other) for image in seen]
    scores = lpips(folder, other)(torch.stack(seen), ["", ""])
    assert min(wanted) > 1e-3
    torch.testing.assert_close(-scores, torch.stack(wanted), rtol=1e-4, atol=1e-6)


def test_lpips_is_that_of_torchmetrics(backbone, monkeypatch):
    """With the authors' heads, which it ships, on a backbone that it would take from torchvision."""
    widths, features, folder, _ = backbone
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: features)
    name = "vgg" if widths == VGG else "alex"
    other, *seen = images(3, 50, 60)
    wanted = theirs._LPIPS(net=name)(torch.stack(seen), other.expand(2, -1, -1, -1), normalize=True)[:, 0, 0, 0]
    head = theirs.__file__.replace("lpips.py", f"lpips_models/{name}.pth")
    reward = Lpips(model=str(folder / "model.safetensors"), head=head, image=other)
    scores = reward(torch.stack(seen), ["", ""])
    torch.testing.assert_close(-scores, wanted, rtol=1e-4, atol=1e-6)


def test_lpips_of_an_image_with_itself_is_0_and_its_gradients_are_finite(backbone):
    _, _, folder, _ = backbone
    black = torch.zeros(1, 3, 40, 40)
    black[..., :20] = 1  # whole regions where few features are active
    black.requires_grad_(True)
    score = lpips(folder, black[0].detach())(black, [""])
    assert score == 0
    (gradient,) = torch.autograd.grad(score.sum(), black)
    assert gradient.isfinite().all()


def test_gradients_of_lpips(backbone):
    """In double precision, with steps that cross no kink of an activation; what the reward gives agrees with it."""
    _, _, folder, heads = backbone
    one, other = images(2, 40, 48)
    reward = lpips(folder, other)
    assert reward.differentiable
    layers = copy.deepcopy(reward.parts(torch.device("cpu"))._layers).double()
    exact = Distance(layers, [head.flatten().double() for head in heads])
    other = other[None].double()
    assert gradient_errors(lambda x: exact(x, other), one[None], step=1e-5).max() < 1e-4
    x, y = one[None].requires_grad_(True), one[None].double().requires_grad_(True)
    mine, wanted = torch.autograd.grad(-reward(x, [""]).sum(), x), torch.autograd.grad(exact(y, other).sum(), y)
    torch.testing.assert_close(mine[0].double(), wanted[0], rtol=1e-2, atol=1e-3 * wanted[0].abs().max().item())


def test_the_reference_of_lpips_is_resized(backbone):
    _, _, folder, _ = backbone
    small, large = images(1, 48, 48), images(1, 96, 144)[0]
    shrunk = torch.from_numpy(np.array(picture(large).resize((48, 48), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert torch.equal(lpips(folder, large)(small, [""]), lpips(folder, shrunk)(small, [""]))


def test_rows_of_lpips_are_judged_by_themselves(backbone):
    _, _, folder, _ = backbone
    other, *seen = images(4, 40, 40)
    reward = lpips(folder, other)
    alone = torch.cat([reward(one[None], [""]) for one in seen])
    torch.testing.assert_close(reward(torch.stack(seen), [""] * 3), alone, rtol=0, atol=1e-5)


def test_images_that_are_too_small_for_lpips_are_refused(backbone):
    widths, _, folder, _ = backbone
    smallest = 16 if widths == VGG else 31
    reward = lpips(folder, images(1, 40, 40)[0])
    assert reward(images(1, smallest, 40), [""]).isfinite().all()
    with pytest.raises(RequestError, match=f"{smallest - 1}x40 pixels are too small for its network: .* {smallest}"):
        reward(images(1, smallest - 1, 40), [""])


def test_heads_of_another_network_are_refused(backbone, tmp_path, target):
    _, _, folder, _ = backbone
    torch.save({f"lin{i}.model.1.weight": torch.ones(1, 7, 1, 1) for i in range(5)}, tmp_path / "heads.pth")
    reward = Lpips(model=str(folder / "model.safetensors"), head=str(tmp_path), image=target)
    with pytest.raises(ModelError, match=r"has \(7, 7, 7, 7, 7\) numbers: the heads of VGG-16 have") as error:
        reward(images(1, 40, 40), [""])
    assert "\n" not in str(error.value)


def test_a_backbone_of_other_heads_is_refused_in_one_line(tmp_path, target):
    for name, widths in (("vgg", VGG), ("alex", ALEX)):
        torch.save(
            {f"{i}.weight": torch.ones(1, width, 1, 1) for i, width in enumerate(widths)}, tmp_path / f"{name}.pth"
        )
    save_file({f"features.{k}": v for k, v in torchvisions(ALEX).state_dict().items()}, tmp_path / "alex.safetensors")
    reward = Lpips(model=str(tmp_path / "alex.safetensors"), head=str(tmp_path / "vgg.pth"), image=target)
    with pytest.raises(ModelError, match=r"lpips cannot load .*alex\.safetensors") as error:
        reward(images(1, 40, 40), [""])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "needs"),
    [
        ("similarity", "facebook/dinov2-base"),
        ("lpips", "timm/vgg16.tv_in1k"),
        ("lpips:model={model}", "vivym/lpips"),
    ],
)
def test_missing_weights_are_named_in_one_line(tmp_path, monkeypatch, backbone, file, spec, needs):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = spec.format(model=backbone[2] / "model.safetensors")
    with pytest.raises(RequestError) as error:
        rewards.make(f"{spec}{',' if ':' in spec else ':'}image={file}").check("a fox")
    said = str(error.value)
    assert needs in said and ".safetensors" in said and "rollflow fetch" in said and "\n" not in said
