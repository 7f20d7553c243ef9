"""What tests of real rewards share: images, their pictures, and finite differences of scores."""

import numpy as np
import torch
from PIL import Image

SIZES = ((64, 64), (63, 121), (200, 51), (40, 40), (37, 300))  # square, odd and wide, tall, small, very wide


def images(count, height, width, seed=0):
    """Images of 8 bits, in [0, 1], smooth enough that a pixel is like its neighbours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, max(2, height // 6), max(2, width // 6), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).round() / 255


def picture(image):
    """An image as Pillow has it."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def pictures(images):
    return [picture(image) for image in images]


def gradient_errors(score, images, pixels=4, step=2e-2):
    """How far the gradient of a score is from its central differences, in units of the larger of both.

    Args:
        score: from images to one score each.
        images: one image.
        pixels: at how many of the pixels with the largest gradients; then along a random direction.
        step: of the difference of the first pixel, in brightness; the others change the score as much.
    """
    x = images.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(x).sum(), x)
    assert gradient.isfinite().all() and gradient.any()
    directions = [torch.zeros_like(gradient) for _ in range(pixels)]
    for direction, place in zip(directions, gradient.abs().flatten().topk(pixels).indices, strict=True):
        direction.view(-1)[place] = 1
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    directions.append((noise.sign() == gradient.sign()).double() * gradient.sign())  # half of all pixels

    def at(shift):
        return score((images.double() + shift).requires_grad_(True)).double().item()

    errors = []
    for direction in directions:
        slope = (gradient * direction).sum().item()
        h = step * gradient.abs().max().item() / abs(slope)
        difference = (at(h * direction) - at(-h * direction)) / (2 * h)
        errors.append(abs(slope - difference) / max(abs(slope), abs(difference)))
    return np.array(errors)
