"""The noise stream: Philox against its authors' vectors, the normals against float64 and against the normal law."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
import triton
import triton.language as tl
from torch import Tensor

from rollflow import kernels
from rollflow.kernels.noise import launch_noise
from rollflow.kernels.philox import box_muller as box_muller_on_device
from rollflow.kernels.philox import philox4x32 as philox_on_device
from rollflow.kernels.reference import box_muller, philox4x32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = (0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x0123456789ABCDEF)

KNOWN_ANSWERS = (  # Random123, kat_vectors, philox4x32 10: counter, key, answer
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@triton.jit
def known_answer_kernel(words, out):
    lane = tl.arange(0, 1)
    c0 = tl.load(words + lane).to(tl.uint32)
    c1 = tl.load(words + 1 + lane).to(tl.uint32)
    c2 = tl.load(words + 2 + lane).to(tl.uint32)
    c3 = tl.load(words + 3 + lane).to(tl.uint32)
    k0 = tl.load(words + 4 + lane).to(tl.uint32)
    k1 = tl.load(words + 5 + lane).to(tl.uint32)
    c0, c1, c2, c3 = philox_on_device(c0, c1, c2, c3, k0, k1)
    tl.store(out + lane, c0.to(tl.int64))
    tl.store(out + 1 + lane, c1.to(tl.int64))
    tl.store(out + 2 + lane, c2.to(tl.int64))
    tl.store(out + 3 + lane, c3.to(tl.int64))


@triton.jit
def box_muller_kernel(radius, angle, out):
    lane = tl.arange(0, 128)
    x, y = box_muller_on_device(tl.load(radius + lane).to(tl.uint32), tl.load(angle + lane).to(tl.uint32))
    tl.store(out + lane, x)
    tl.store(out + 128 + lane, y)


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def uniform(word: np.ndarray) -> np.ndarray:
    """The stream's uniform in (0, 1]: rounded to float32 by definition, exact from there on."""
    return (word.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)


def exact(seed: int, key: int, elements: int) -> np.ndarray:
    """A row of the stream in float64, written once more from its definition."""
    words = [np.array([w], np.uint64) for w in (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF, 0)]
    quad = np.arange(-(-elements // 4), dtype=np.uint64)
    keys = tuple(np.array([w], np.uint64) for w in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    bits = philox4x32((quad, *words), keys)
    z = np.empty((len(quad), 4))
    for lane in (0, 2):
        radius = np.sqrt(-2 * np.log(uniform(bits[lane])))
        angle = 2 * math.pi * bits[lane + 1] / 2**32
        z[:, lane], z[:, lane + 1] = radius * np.cos(angle), radius * np.sin(angle)
    return z.reshape(-1)[:elements]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    words = [np.array([word], dtype=np.uint64) for word in (*counter, *key)]
    assert tuple(int(word[0]) for word in philox4x32(tuple(words[:4]), tuple(words[4:]))) == answer
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    known_answer_kernel[(1,)](rows(*counter, *key).to(DEVICE), out)
    assert tuple(out.tolist()) == answer


def test_errors_against_float64() -> None:
    """The Triton kernel may be wrong by at most twice what torch is wrong by, plus one float32 rounding of 1."""
    seed, key = rows(*SEEDS), rows(*reversed(SEEDS))
    out = torch.full((len(SEEDS), 37, 64), math.nan, device=DEVICE)
    launch_noise(seed.to(DEVICE), key.to(DEVICE), out)
    truth = np.stack([exact(s, k, 37 * 64) for s, k in zip(SEEDS, reversed(SEEDS), strict=True)]).reshape(out.shape)
    torch_error = np.abs(kernels.noise(seed, key, 37, 64).numpy() - truth).max()
    triton_error = np.abs(out.cpu().numpy() - truth).max()
    assert torch_error < 2e-6
    assert triton_error <= 2 * torch_error + 2**-24


def test_extreme_words() -> None:
    """The largest radius words round to 1 (z = 0), the smallest gives the largest |z|; angles at quadrants' edges."""
    radius = [0, 1, 2**31, 2**32 - 129, 2**32 - 1]
    angle = [quarter * 2**30 + step for quarter in range(4) for step in (0, 1, 2**29 - 1, 2**29, 2**29 + 1, 2**30 - 1)]
    words = [np.array(list(pair), np.uint64) for pair in zip(*itertools.product(radius, angle), strict=True)]
    half_turns = words[1].astype(np.float64) / 2**31
    length = np.sqrt(-2 * np.log(uniform(words[0])))
    truth = np.stack([length * np.cos(math.pi * half_turns), length * np.sin(math.pi * half_turns)])

    out = torch.full((2, 128), math.nan, device=DEVICE)
    padded = [torch.from_numpy(np.pad(word, (0, 8)).astype(np.int64)).to(DEVICE) for word in words]
    box_muller_kernel[(1,)](*padded, out)
    for z in (np.stack(box_muller(*words)), out[:, : len(words[0])].cpu().numpy()):
        assert np.isfinite(z).all() and 6.7 < np.abs(z).max() < 6.8
        assert np.abs(z - truth).max() < 4e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 3), (3, 5), (7, 37), (1, 1024), (5, 205), (16, 32)])
def test_every_element_is_written_and_equals_the_reference(shape: tuple[int, int]) -> None:
    seed, key = rows(3, 3, 2**40), rows(5, 6, 5)
    out = torch.full((3, *shape), math.nan, device=DEVICE)
    launch_noise(seed.to(DEVICE), key.to(DEVICE), out)
    torch.testing.assert_close(out.cpu(), kernels.noise(seed, key, *shape), rtol=0, atol=4e-6)


def test_bits_depend_on_seed_key_and_element_alone() -> None:
    seed, key = rows(*SEEDS).to(DEVICE), rows(*range(len(SEEDS))).to(DEVICE)
    whole = torch.full((len(SEEDS), 9, 61), math.nan, device=DEVICE)
    launch_noise(seed, key, whole)
    for block in (64, 256):
        out = torch.full_like(whole, math.nan)
        launch_noise(seed, key, out, block=block)
        assert torch.equal(out, whole)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4], device=DEVICE)
    permuted = torch.full_like(whole, math.nan)
    launch_noise(seed[order], key[order], permuted)
    assert torch.equal(permuted, whole[order])
    single = torch.full_like(whole[:1], math.nan)
    launch_noise(seed[4:5], key[4:5], single)
    assert torch.equal(single, whole[4:5])
    for cut in (1, 2, 3, 100):  # a longer row begins with the shorter one
        short = kernels.noise(rows(7), rows(8), 1, cut)
        assert torch.equal(short.flatten(), kernels.noise(rows(7), rows(8), 1, 101).flatten()[:cut])


def test_reference_rows_do_not_depend_on_each_other() -> None:
    seed, key = rows(*SEEDS), rows(*range(len(SEEDS)))
    together = kernels.noise(seed, key, 9, 61)
    apart = torch.cat([kernels.noise(seed[i : i + 1], key[i : i + 1], 9, 61) for i in range(len(SEEDS))])
    assert torch.equal(together, apart)


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    """10^7 draws: 160 rows (16 seeds x 10 keys) of 62,500 elements."""
    seed = torch.arange(16).repeat_interleave(10) * 1_000_003
    key = torch.arange(10).repeat(16)
    return kernels.noise(seed, key, 625, 100).numpy().reshape(160, -1)


def test_moments(draws: np.ndarray) -> None:
    """Mean, variance, skew and kurtosis within five standard errors; so is each lane of a quad by itself."""
    for sample in (draws.ravel(), *(draws[:, lane::4].ravel() for lane in range(4))):
        n = sample.size
        x = sample.astype(np.float64)
        centred = x - x.mean()
        second = (centred**2).mean()
        assert abs(x.mean()) < 5 / math.sqrt(n)
        assert abs(second - 1) < 5 * math.sqrt(2 / n)
        assert abs((centred**3).mean() / second**1.5) < 5 * math.sqrt(6 / n)
        assert abs((centred**4).mean() / second**2 - 3) < 5 * math.sqrt(24 / n)


def test_kolmogorov_smirnov(draws: np.ndarray) -> None:
    """The empirical distribution function is as near to the normal one as 10^7 independent draws' would be."""
    x = np.sort(draws.ravel())
    n = x.size
    cdf = scipy.stats.norm.cdf(x.astype(np.float64))
    distance = max((np.arange(1, n + 1) / n - cdf).max(), (cdf - np.arange(n) / n).max())
    assert scipy.stats.kstwobign.sf(distance * math.sqrt(n)) > 1e-6


def test_independence(draws: np.ndarray) -> None:
    """Correlations of values and of squares: between neighbours, lags, keys, seeds, and seed against key."""
    for sample in (draws, (draws**2 - 1) / math.sqrt(2)):
        for lag in (1, 2, 3, 4, 5, 8, 64, 1024):
            product = sample[:, lag:] * sample[:, :-lag]
            assert abs(product.mean(dtype=np.float64)) < 5 / math.sqrt(product.size)
        between_rows = np.corrcoef(sample)[np.triu_indices(160, 1)]  # every pair of a seed and a key
        assert np.abs(between_rows).max() < 6 / math.sqrt(sample.shape[1])  # the largest of 12,720
        assert abs((between_rows**2).mean() * sample.shape[1] - 1) < 5 * math.sqrt(2 / between_rows.size)


def test_all_64_bits_of_seed_and_key_count() -> None:
    bit = torch.tensor([1 << i if i < 63 else -(1 << 63) for i in range(64)])
    zero = torch.zeros_like(bit)
    streams = torch.cat([kernels.noise(bit, zero, 16, 64), kernels.noise(zero, bit, 16, 64)]).view(128, 1024)
    assert len(torch.unique(streams, dim=0)) == 128
    assert torch.corrcoef(streams).triu(1).abs().max() < 6 / math.sqrt(1024)
