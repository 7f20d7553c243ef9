"""Classifier-free guidance against its closed forms, in 64 bits."""

import pytest
import torch

from rollflow.models.rule import Rule


@pytest.fixture
def velocities():
    generator = torch.Generator().manual_seed(0)
    c, noise = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64).unbind(0)
    return c, c * torch.linspace(0.3, 1.3, 5)[:, None] + 0.1 * noise  # guidance lengthens some vectors only


SCALES = torch.tensor([1.5, 4.0, 0.25], dtype=torch.float64)


def by_row(c, u, weight):
    return torch.stack([u[i] + w * (c[i] - u[i]) for i, w in enumerate(weight.tolist())])


@pytest.mark.parametrize(("base", "added"), [("without", 0.0), ("with", 1.0)])
def test_each_row_is_led_by_its_own_scale(velocities, base, added):
    c, u = velocities
    found = Rule(base).guided(c, u, SCALES)
    assert torch.allclose(found, by_row(c, u, SCALES + added), rtol=0, atol=1e-14)
    if base == "with":
        assert torch.allclose(found, c + SCALES.view(-1, 1, 1) * (c - u), rtol=0, atol=1e-14)


def test_the_scales_at_which_nothing_is_led(velocities):
    c, u = velocities
    assert torch.allclose(Rule().guided(c, u, torch.ones(3)), c, rtol=0, atol=1e-14)
    assert torch.allclose(Rule().guided(c, u, torch.zeros(3)), u, rtol=0, atol=1e-14)
    assert torch.allclose(Rule("with").guided(c, u, torch.zeros(3)), c, rtol=0, atol=1e-14)


@pytest.mark.parametrize("base", ["without", "with"])
def test_token_norms(velocities, base):
    c, u = velocities
    plain = Rule(base).guided(c, u, SCALES)
    kept, shortened = (Rule(base, norm).guided(c, u, SCALES) for norm in ("token", "token at most"))
    ratio = c.norm(dim=-1) / plain.norm(dim=-1)
    assert torch.allclose(kept.norm(dim=-1), c.norm(dim=-1), rtol=1e-13)
    assert torch.allclose(shortened.norm(dim=-1), torch.minimum(c.norm(dim=-1), plain.norm(dim=-1)), rtol=1e-13)
    assert (ratio < 1).any() and (ratio > 1).any()  # both branches are there
    for found in (kept, shortened):
        assert torch.allclose(torch.nn.functional.cosine_similarity(found, plain, dim=-1), torch.ones(3, 5).double())


def test_a_vector_of_zeros_stays_one():
    zero = torch.zeros(1, 2, 4, dtype=torch.float64)
    assert torch.equal(Rule("without", "token").guided(zero, zero, torch.ones(1)), zero)


def test_scales_are_differentiable_and_keep_the_dtype(velocities):
    c, u = (one.to(torch.bfloat16) for one in velocities)
    assert Rule().guided(c, u, SCALES).dtype == torch.bfloat16
    c, u = velocities
    scale = SCALES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: Rule("without", "token at most").guided(c, u, s), scale)


@pytest.mark.parametrize(
    ("rule", "scales"),
    [
        (Rule(), {1.0: False, 0.5: False, 0.0: False, 1.01: True, 7.0: True}),  # `> 1` in the pipeline
        (Rule(above=0.0), {1.0: False, 0.5: True, 0.0: False, 2.0: True}),
        (Rule("with", above=0.0), {0.0: False, 1.0: True, -1.0: False, 0.5: True}),
        (Rule("with", above=1.0), {1.0: False, 2.0: True}),
        (Rule(above=float("-inf")), {-1.0: True, 1.0: False, 0.0: True}),  # two rows always, but where w = 1
    ],
)
def test_two_rows_are_taken_where_the_scale_needs_them(rule, scales):
    assert {scale: rule.on(scale) for scale in scales} == scales
