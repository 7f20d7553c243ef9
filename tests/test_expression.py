"""The text form of rewards: what is read, what it evaluates to, and what is refused, in one line each."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollflow import RequestError, rewards
from rollflow.rewards import expression
from rollflow.rewards.expression import Named, evaluate, parse, rewards_of

A, B, C = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.25, 4.0, -1.0]), torch.tensor([3.0, 3.0, 3.0])
SCORES = {"a": A, "b": B, "c": C}


def value(text, scale=(0.0, 1.0)):
    return evaluate(parse(text), lambda one: SCORES[one.name], lambda one: scale)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a", A),
        ("0.7*a + 0.3*b", 0.7 * A + 0.3 * B),
        ("a - b - c", A - B - C),
        ("a - (b - c)", A - (B - C)),
        ("-a + 2", 2 - A),
        ("- a * -2", 2 * A),
        ("a/4*b", A / 4 * B),
        ("1e-1*a+.5", 0.1 * A + 0.5),
        ("a/(b*c)", A / (B * C)),
        ("a/(b/c)*2", A / (B / C) * 2),
        ("a*0.123456789", A * 0.123456789),
        ("a + 1/(1 - 1)", torch.tensor([math.inf] * 3)),
        ("min(a, b)", torch.minimum(A, B)),
        ("max(a, b, 1)", torch.maximum(A, B).clamp(min=1)),
        ("max(0, a) * b", A.clamp(min=0) * B),
        ("min( a ,(b+c) / 2 )", torch.minimum(A, (B + C) / 2)),
        ("a > 0.5", torch.tensor([1.0, 0.0, 0.0])),
        ("(a >= 0.5) + 2*(b < -0.5)", torch.tensor([1.0, 0.0, 3.0])),
        ("a + b <= 1.25", torch.tensor([1.0, 0.0, 1.0])),
        ("z(a)", (A - 3) / 2),
        ("z(a) - 0.5*b", (A - 3) / 2 - 0.5 * B),
    ],
)
def test_an_expression_evaluates_as_arithmetic_does(text, wanted):
    torch.testing.assert_close(value(text, (3.0, 2.0)), wanted)
    again = str(parse(text))
    torch.testing.assert_close(value(again, (3.0, 2.0)), wanted)
    assert str(parse(again)) == again


@given(st.recursive(
    st.sampled_from(["a", "b", "c"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(inner, st.integers(1, 9)).map(lambda p: f"{p[0]}/{p[1]}"),
        inner.map(lambda one: f"(-{one})"),
    ), max_leaves=12,
))  # fmt: skip
def test_nested_expressions_are_what_python_makes_of_them(text):
    wanted = eval(text, {"__builtins__": {}}, {k: v.double() for k, v in SCORES.items()})
    found = evaluate(parse(text), lambda one: SCORES[one.name].double(), lambda one: (0.0, 1.0))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        evaluate(parse(str(parse(text))), lambda one: SCORES[one.name].double(), lambda one: (0.0, 1.0)), wanted
    )


def test_a_score_that_is_no_number_stays_none():
    """A threshold, a minimum or a maximum must not hide that a term failed."""
    nothing = torch.tensor([math.nan])
    for text in ("a > 0", "min(a, 1)", "max(a, 1)", "0*a", "a + 1"):
        assert evaluate(parse(text), lambda one: nothing, lambda one: (0.0, 1.0)).isnan().all(), text


def test_options_of_a_reward():
    node = parse("min(vqa:model=Qwen/Qwen2.5-VL-3B-Instruct,batch=4, count:model='a, (b)') - 0.5*x:k=\"it's\"")
    assert [*rewards_of(node)] == [
        Named("vqa", (("batch", "4"), ("model", "Qwen/Qwen2.5-VL-3B-Instruct"))),
        Named("count", (("model", "a, (b)"),)),
        Named("x", (("k", "it's"),)),
    ]
    assert parse(str(node)) == node


def test_gradients_pass_through_an_expression():
    a = A.clone().requires_grad_()
    total = evaluate(parse("0.5*a + min(a, b) * 2"), lambda one: {"a": a, "b": B}[one.name], lambda one: (0.0, 1.0))
    (gradient,) = torch.autograd.grad(total.sum(), a)
    torch.testing.assert_close(gradient, torch.tensor([0.5, 2.5, 0.5]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "at its end: a number, the name of a reward"),
        ("0.5", "names no reward"),
        ("count +", "at its end"),
        ("count count", "at 'count': an operator, or the end"),
        ("min(count", "at its end: a closing bracket"),
        ("z(count + 1)", "a closing bracket"),
        ("z(2)", r"z\(...\) takes the name of one reward"),
        ("count > count", "a number after >"),
        ("count:", "an option of count, as in count:model=FOLDER"),
        ("count:model=", "an option of count"),
        ("count:model=a,model=b", "gives model of count twice"),
        ("count / 0", "divides by 0"),
        ("__import__('os')", r"at .*an operator, or the end"),
        ("(" * 60 + "count" + ")" * 60, "more than 50 brackets"),
        ("-" * 3000 + "count", "more than 50 brackets"),
        ("z(" * 300 + "count", "more than 50 brackets"),
        ("count" + " + count" * 3000, "has 24005 characters: at most 10000 are read"),
        ("count + cuont", "there is no reward 'cuont': did you mean count"),
        ("count:speed=3", "the reward count has no option"),
        ("count + motion", "judge images of different sizes: 32x32, 64x64"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text, said):
    with pytest.raises(RequestError, match=said) as found:
        rewards.make(text)
    assert "\n" not in str(found.value)


def test_equal_texts_are_one_reward():
    """Or requests that say the same would not share a call."""
    assert rewards.make("0.5*count+soft_count") is rewards.make("0.5*count+soft_count")
    one, other = rewards.make("count - soft_count"), rewards.make("2*count")
    assert one.terms[0] is other.terms[0] is rewards.make("count")
    assert one.labels == ("count", "soft_count") and one.name == "count - soft_count" and one.size == (64, 64)


def test_an_expression_with_rewards_of_ones_own():
    made = rewards.combine("0.5*mine + count", {"mine": lambda images, prompts: images.mean((1, 2, 3))})
    assert made.labels == ("mine", "count")
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(
        made(images, ["one red circle"] * 2),
        0.5 * images.mean((1, 2, 3)) + rewards.make("count")(images, ["one red circle"] * 2),
    )


def test_own_rewards_that_cannot_be_terms():
    mean = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    with pytest.raises(RequestError, match="a built-in reward is called count"):
        rewards.combine("count + 1", {"count": mean})
    with pytest.raises(RequestError, match="does not name 'other'"):
        rewards.combine("mine + 1", {"mine": mean, "other": mean})
    with pytest.raises(RequestError, match="mine=3: it must be a reward or a function"):
        rewards.combine("mine + 1", {"mine": 3})
    with pytest.raises(RequestError, match=r"mine stands for 'z\(count\)', an expression itself"):
        rewards.combine("mine + 1", {"mine": "z(count)"})


def test_a_threshold_has_no_gradient_and_one_held_out_judge_is_taken_over():
    assert rewards.make("2*soft_count").differentiable
    assert not rewards.make("soft_count + (soft_count > -1)").differentiable
    assert rewards.held_out(rewards.make("2*count + 1")) is rewards.make("classifier")
    assert rewards.held_out(rewards.make("count + soft_count")) is None


def test_labels_tell_terms_apart():
    node = parse("vqa:model=a/b + vqa + clip")
    assert expression.labels([*rewards_of(node)]) == ("vqa:model=a/b", "vqa", "clip")
