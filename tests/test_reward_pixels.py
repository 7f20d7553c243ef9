"""What processors do to pictures: on tensors, against Pillow and the processors of transformers; and its gradient."""

import json

import pytest
import torch
import transformers
from judging import SIZES, images, picture, pictures
from PIL import Image

from rollflow import ModelError
from rollflow.rewards.pixels import Preparation, cropped, resized
from rollflow.rewards.siglip import Patches

pytestmark = pytest.mark.usefixtures("one_thread")

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
FILES = {  # preprocessor_config.json as checkpoints on the hub have it; smaller, so that it is fast
    "clip": {
        **{"crop_size": 56, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 56},
        **{"feature_extractor_type": "CLIPFeatureExtractor", **CLIP},
    },
    "dinov2": {
        **{"crop_size": {"height": 56, "width": 56}, "do_center_crop": True, "do_convert_rgb": True, "resample": 3},
        **{"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 0.00392156862745098},
        **{"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 64}},
        **{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    },
    "siglip": {
        **{"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 0.00392156862745098},
        **{"image_processor_type": "SiglipImageProcessor", "resample": 3, "size": {"height": 56, "width": 56}, **HALF},
    },
    "siglip2": {
        **{"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 0.00392156862745098},
        **{"image_processor_type": "SiglipImageProcessor", "resample": 2, "size": {"height": 48, "width": 48}, **HALF},
    },
    "crop alone": {
        **{"crop_size": {"height": 57, "width": 130}, "do_center_crop": True, "do_resize": False, **CLIP},
        **{"image_processor_type": "CLIPImageProcessor"},
    },
}


def processor(folder, name):
    (folder / "preprocessor_config.json").write_text(json.dumps(FILES[name]))
    return transformers.AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FILES)
def test_a_preparation_is_its_processor(tmp_path, name, size):
    its = processor(tmp_path, name)
    seen = images(2, *size)
    mine, theirs = Preparation.of(its)(seen), its(pictures(seen), return_tensors="pt").pixel_values
    assert mine.dtype == torch.float32 and mine.shape == theirs.shape
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


SHAPES = [  # from and to
    ((64, 64), (30, 30)),
    ((63, 121), (24, 46)),
    ((200, 51), (40, 50)),
    ((60, 20), (12, 24)),  # new versions of Pillow begin with the columns
    ((9, 7), (64, 33)),
    ((40, 30), (40, 17)),
    ((31, 40), (50, 40)),
    ((5, 5), (5, 5)),
]


@pytest.mark.parametrize("resample", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("before", "after"), SHAPES)
def test_resizing_is_that_of_pillow_to_the_last_bit(before, after, resample):
    seen = images(2, *before, seed=resample)
    seen[1] = torch.rand(seen[1].shape, generator=torch.Generator().manual_seed(1))  # noise: the filters overshoot
    seen[1] = (seen[1] * 255).round() / 255
    mine = resized(seen, *after, resample)
    assert mine.dtype == torch.float32
    for one, given in zip(mine, seen, strict=True):
        theirs = picture(given).resize(after[::-1], Image.Resampling(resample))
        assert picture(one).tobytes() == theirs.tobytes()
        assert torch.equal((one * 255).round() / 255, one)


@pytest.mark.gpu
@pytest.mark.parametrize("resample", [1, 2, 3, 4, 5])
def test_resizing_is_the_same_on_a_gpu(resample):
    seen = images(2, 211, 130)
    there = resized(seen.cuda(), 64, 77, resample)
    assert there.is_cuda and torch.equal(there.cpu(), resized(seen, 64, 77, resample))


def test_images_that_are_not_of_8_bits_are_rounded_and_clamped_first():
    seen = images(1, 40, 30) + 0.3 / 255
    seen[0, :, :5] = 1.5
    seen[0, :, 5:9] = -0.5
    torch.testing.assert_close(resized(seen, 17, 20), resized((seen.clamp(0, 1) * 255).round() / 255, 17, 20))
    assert resized(seen.bfloat16(), 17, 20).dtype == torch.float32


@pytest.mark.parametrize("resample", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("before", "after"), [((9, 14), (5, 6)), ((14, 5), (6, 11)), ((6, 6), (9, 6))])
def test_the_gradient_of_resizing(before, after, resample):
    seen = images(1, *before, seed=3).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: resized(x, *after, resample), seen)


@pytest.mark.parametrize("name", FILES)
def test_the_gradient_of_a_preparation(tmp_path, name):
    """Along two directions; the preparation is linear where nothing is rounded, so that any step will do."""
    prepare = Preparation.of(processor(tmp_path, name))
    seen = images(1, 37, 50).double().requires_grad_(True)
    weights = torch.randn(prepare(seen).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((prepare(seen) * weights).sum(), seen)
    for seed in (1, 2):
        step = 0.1 * torch.randn(seen.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slope = ((prepare(seen + step) - prepare(seen - step)) * weights).sum() / 2
        torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_without_rounding_pixels_are_those_of_8_bits_but_for_rounding(tmp_path, size):
    """Two passes round by up to half a step each; the second weighs the first by a filter that overshoots by a fifth.

    Far from black and white: the filter's overshoot beyond those is cut off in 8 bits, but has its gradient here.
    """
    prepare = Preparation.of(processor(tmp_path, "clip"))
    seen = ((0.2 + 0.6 * images(2, *size)) * 255).round() / 255
    smooth = prepare(seen.clone().requires_grad_(True)).detach()
    most = 1.2 / 255 / min(CLIP["image_std"])
    assert 0 < (smooth - prepare(seen)).abs().max() < most


def test_what_is_around_a_crop_that_is_too_large():
    seen = images(1, 3, 5)
    around = cropped(seen, 6, 4)
    assert around.shape == (1, 3, 6, 4)
    assert (
        torch.equal(around[..., 2:5, :], seen[..., :4])
        and not around[..., :2, :].any()
        and not around[..., 5:, :].any()
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"do_pad": True}, "do_pad=True"),
        ({"size": {"longest_edge": 56}}, "longest_edge"),
        ({"rescale_factor": 0.5}, "rescales by 0.5"),
        ({"do_rescale": False}, "rescales by 1.0"),
    ],
)
def test_a_processor_that_is_not_known_is_refused(change, said):
    its = transformers.CLIPImageProcessorPil(**{"size": {"shortest_edge": 56}, **change})
    with pytest.raises(ModelError, match="CLIPImageProcessor") as error:
        Preparation.of(its)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_filter_that_is_not_known_is_refused():
    with pytest.raises(ModelError, match="resample=0: it must be one of 1, 2, 3, 4, 5"):
        resized(images(1, 8, 8), 4, 4, 0)


@pytest.mark.parametrize("size", [*SIZES, (16, 1000), (511, 513)])
@pytest.mark.parametrize(("side", "most"), [(16, 256), (8, 30), (14, 7)])
def test_patches_of_naflex_are_those_of_its_processor(size, side, most):
    its = transformers.Siglip2ImageProcessorPil(patch_size=side, max_num_patches=most)
    prepare = Patches.of(its)
    seen = images(1, *size)
    theirs = its(pictures(seen), return_tensors="pt")
    mine = prepare(seen)
    count = int(theirs.pixel_attention_mask.sum())
    assert [*prepare.grid(*size)] == theirs.spatial_shapes[0].tolist() and mine.shape[1] == count
    torch.testing.assert_close(mine, theirs.pixel_values[:, :count], rtol=0, atol=2e-6)
