"""Combined rewards: a term is called once for all that ask for it, and recorded; normalised terms; held-out judges."""

import math
import threading

import pytest
import torch
from test_retries import Unavailable, at_rest
from test_turns import Waiting, assert_all_sound, together
from tiny import PATIENCE, Clock, Driven, Hand, assert_sound, bon, brightness, engine, fingerprint, rbf

from rollflow import Draw, FunctionError, RequestError, rewards
from rollflow.methods import method
from rollflow.plan import PILOT


class Counted:
    """A reward that writes down its calls."""

    def __init__(self, name, score):
        self.__name__, self.score, self.calls = name, score, []

    def __call__(self, images, prompts):
        self.calls.append([*prompts])
        return self.score(images)


def bright():
    return Counted("bright", lambda images: images.mean((1, 2, 3)))


def varied():
    return Counted("varied", lambda images: images.std((1, 2, 3)))


def test_a_term_is_called_once_for_all_requests_that_ask_for_it():
    a, b = bright(), varied()
    combined = rewards.combine("a - 2*b", {"a": a, "b": b})
    with engine(Waiting()) as made:
        jobs = together(made, [bon(reward=a, seed=1), bon(reward=combined, seed=2), bon(reward=b, seed=3)])
        results = [job.result(PATIENCE) for job in jobs]
        first, second = max(a.calls, key=len), max(b.calls, key=len)
        assert len(first) == len(second) == 8, "four rows of its own request and four of the combined one"
        for result in (results[0], results[2]):
            assert result.terms is None and all(row.terms is None for row in result.history)
        for row in results[1].history:
            assert row.reward == pytest.approx(row.terms["a"] - 2 * row.terms["b"], abs=1e-6)
        assert results[1].reward == pytest.approx(results[1].terms["a"] - 2 * results[1].terms["b"], abs=1e-6)
        assert max(row.reward for row in results[1].history) == pytest.approx(results[1].reward, abs=0.01)
        assert_all_sound(made)


def test_company_changes_nothing_of_a_combined_reward():
    combined = rewards.combine("z(a) - 2*z(b) + min(a, b)", {"a": bright(), "b": varied()})
    with engine() as made:
        alone = [made.generate(rbf(30, reward=combined, seed=seed)) for seed in range(3)]
        requests = [rbf(30, reward=combined, seed=seed) for seed in range(3)] + [bon(20, seed=9)]
        for one, other in zip(alone, made.generate(requests), strict=False):
            assert fingerprint(one) == fingerprint(other)


def test_normalised_terms_are_those_of_the_first_judged_particles():
    with engine() as made:
        result = made.generate(bon(48, steps=2, reward=rewards.combine("z(a)", {"a": bright()})))
    judged = [row for row in result.history if row.reward is not None]
    terms = [row.terms["a"] for row in judged]
    assert len(judged) == 24 and len(result.history) == 48 and len({*terms}) == 24
    pilot = torch.tensor(terms[:PILOT], dtype=torch.float64)
    mean, deviation = pilot.mean().item(), pilot.std().item()
    for row, term in zip(judged, terms, strict=True):
        assert row.reward == pytest.approx((term - mean) / deviation, abs=1e-9)
    assert result.reward == pytest.approx((result.terms["a"] - mean) / deviation, abs=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_what_the_pilot_is_does_not_depend_on_the_order_in_which_rows_come_back(reverse):
    combined = rewards.combine("z(a) + b", {"a": brightness, "b": brightness})
    found = []
    for backwards in (False, reverse):
        driven = Driven(Hand(lambda row: (float(row.number % 7), float(row.number % 3)), lanes=8, largest=4))
        told = driven.submit(bon(20, reward=combined))
        driven.settle()
        while driven.device.held:
            if backwards:
                driven.device.held.reverse()
            driven.device.answer()
            driven.settle()
        found.append([(row.index, row.reward) for row in told.finished.history.records])
        driven.assert_empty()
    assert found[0] == found[1] and len(found[0]) == 20


def test_a_search_that_waits_for_its_pilot_can_be_cancelled():
    driven = Driven(Hand(lambda row: (1.0, 2.0), lanes=8, largest=4))
    told = driven.submit(bon(20, reward=rewards.combine("z(a) + b", {"a": brightness, "b": brightness})))
    driven.settle()
    driven.device.answer()
    driven.settle()
    driven.cancel(told)
    driven.run()
    assert told.error is not None and told.finished is None
    driven.assert_empty()


def test_normalising_by_one_particle_is_refused_and_harms_nobody():
    with engine() as made:
        job = made.submit(bon(seed=3))
        with pytest.raises(RequestError, match=r"z\(...\) out, or take a method or an option that starts with more"):
            made.generate(bon(1, reward=rewards.combine("z(a)", {"a": bright()})))
        assert job.result(PATIENCE).committed_nfe == 4
        assert_sound(made)


def test_a_constant_term_is_not_blown_up():
    flat = Counted("flat", lambda images: torch.full((len(images),), 0.25))
    with engine() as made:
        result = made.generate(bon(8, reward=rewards.combine("z(a) + b", {"a": flat, "b": brightness})))
    assert all(row.reward == pytest.approx(row.terms["b"], abs=1e-9) for row in result.history)


def test_a_term_that_fails_fails_its_request_once_and_no_other():
    calls = threading.Semaphore(0)

    def broken(images, prompts):
        calls.release()
        raise ValueError("no such file")

    combined = rewards.combine("a + b", {"a": brightness, "b": broken})
    with engine(Waiting()) as made:
        bad, good = together(made, [bon(reward=combined, seed=1), bon(seed=2)])
        with pytest.raises(FunctionError, match="the reward broken raised ValueError for 4 images: no such file"):
            bad.result(PATIENCE)
        assert good.result(PATIENCE).committed_nfe == 4
        assert calls.acquire(timeout=PATIENCE)
        assert_all_sound(made)


@pytest.mark.parametrize("held_out", [False, True])
def test_scores_that_cannot_be_combined_fail_their_request_and_nobody_waits(held_out):
    class Broken(rewards.Combined):
        def of(self, scores, scales=()):
            raise ArithmeticError("no")

        def combine(self, scores, scales=()):
            raise ArithmeticError("no")

    node = rewards.combine("a + b", {"a": brightness, "b": brightness})
    broken = Broken(node._node, dict(zip(node._places, node.terms, strict=True)))
    with engine() as made:
        request = bon(4, held_out=broken) if held_out else bon(4, reward=broken)
        job = made.submit(request)
        with pytest.raises(FunctionError, match="ArithmeticError"):
            job.result(PATIENCE)
        assert_sound(made)


def test_a_held_out_judge_whose_name_cannot_be_read_any_more_fails_its_request():
    class Fickle:
        name, reads = "fickle", 0

        @property
        def held_out(self):
            self.reads += 1
            if self.reads > 1:
                raise OSError("gone")

        def check(self, prompt):
            pass

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

    with engine() as made:
        job = made.submit(bon(4, reward=Fickle()))
        with pytest.raises(FunctionError, match="OSError: gone"):
            job.result(PATIENCE)
        assert_sound(made)


def test_retries_are_those_of_the_term_that_fails():
    calls = []

    def once(images, prompts):
        calls.append(len(images))
        raise ValueError("bad image")

    def patient(images, prompts):
        return images.mean((1, 2, 3))

    once.differentiable = patient.differentiable = True
    patient.retry_on, patient.retries = (ValueError,), 4
    with engine() as made:
        reward = rewards.combine("a + b", {"a": once, "b": patient})
        with pytest.raises(FunctionError, match="bad image"):
            made.generate(rbf(12, method="dps", reward=reward))
        assert len(calls) == 1
        assert_sound(made)


def test_a_method_that_holds_what_it_declares_may_normalise():
    """Sixteen particles more are held back while the mean is not known."""

    def tight(nfe, steps):
        (parents,) = yield [Draw(None, 12, scored=False)]
        children = yield [Draw(parent, 3, keep=1) for parent in parents]
        return max((one for own in children for one in own if one.kept), key=lambda one: one.reward)

    tight = method(branches=True, holds=lambda nfe, steps, options: 24)(tight)
    with engine(slots=80) as made:
        options = {"method": tight, "reward": rewards.combine("z(a)", {"a": bright()})}
        jobs = [made.submit(rbf(48, seed=seed, **options)) for seed in range(4)]
        assert all(job.result(PATIENCE).committed_nfe == 48 for job in jobs)
        assert_sound(made)


def test_what_a_reward_was_normalised_by_is_noted():
    with engine() as made:
        result = made.generate(bon(48, steps=2, reward=rewards.combine("z(a) + 0*a", {"a": bright()})))
    (note,) = (one["normalised_by"] for one in result.notes if "normalised_by" in one)
    mean, deviation = note["a"]
    assert result.reward == pytest.approx((result.terms["a"] - mean) / deviation, abs=1e-9)


def test_what_is_paid_by_the_image_gets_no_copies():
    sizes = []

    def paid(images, prompts):
        sizes.append(len(images))
        return images.mean((1, 2, 3))

    paid.padded = False
    with engine(buckets=(8,)) as made:
        made.generate(bon(3, reward=paid))
    assert sizes == [3, 1]


def test_complex_scores_are_refused():
    with engine() as made:
        odd = rewards.combine("a + b", {"a": brightness, "b": Complex()})
        with pytest.raises(FunctionError, match="one real number an image"):
            made.generate(bon(4, reward=odd))
        assert_sound(made)


class Complex:
    name = "complex"

    def check(self, prompt):
        pass

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3)) + 1j


def test_a_term_that_is_away_is_called_again_and_the_other_is_not():
    clock, away, steady = Clock(), Unavailable(1), bright()
    with engine(clock=clock) as made:
        job = made.submit(bon(reward=rewards.combine("a + b", {"a": away, "b": steady}), seed=4))
        away.wait()
        at_rest(made)
        clock.pass_in(made, 1.0)
        result = job.result(PATIENCE)
        assert away.calls == 3 and len(steady.calls) == 2  # both judged the search and its image
        assert all(row.terms["a"] == pytest.approx(row.terms["b"]) for row in result.history)
        assert_sound(made)


def test_a_guided_search_follows_the_gradient_of_a_combined_reward():
    def smooth(images, prompts):
        return images.square().mean((1, 2, 3))

    def flat(images, prompts):
        return images.mean((1, 2, 3))

    smooth.differentiable = flat.differentiable = True
    whole = lambda images, prompts: smooth(images, prompts) - 0.5 * flat(images, prompts)  # noqa: E731
    whole.differentiable = True
    with engine() as made:
        options = {"method": "dps", "seed": 3}
        split = made.generate(rbf(12, reward=rewards.combine("a - 0.5*b", {"a": smooth, "b": flat}), **options))
        one = made.generate(rbf(12, reward=whole, **options))
        assert [row.reward for row in split.history] == pytest.approx([row.reward for row in one.history], abs=1e-5)
        assert len({row.reward for row in one.history}) > 3
        plain = rewards.combine("a - b", {"a": smooth, "b": brightness})
        assert not plain.differentiable
        with pytest.raises(RequestError, match="follows the gradient of the reward, and a - b has none"):
            made.generate(rbf(12, reward=plain, **options))
        with pytest.raises(RequestError, match="has none"):
            made.generate(rbf(12, reward=rewards.combine("z(a)", {"a": smooth}), **options))
        assert_sound(made)


def test_the_held_out_judge_of_a_request():
    a, b = bright(), varied()
    with engine() as made:
        result = made.generate(bon(8, reward=a, held_out=rewards.combine("a - b", {"a": a, "b": b})))
        seen = (result.pixels.clamp(0, 1) * 255).round()[None] / 255
        assert result.held_out == pytest.approx((seen.mean() - seen.flatten().std()).item(), abs=1e-6)
        assert len(b.calls) == 1, "it sees the final image and nothing else"
        assert result.terms is None
        assert made.generate(bon(8, reward=a)).held_out is None
        with pytest.raises(RequestError, match="a held-out judge does not see"):
            made.generate(bon(8, held_out=rewards.combine("z(a)", {"a": a})))
        with pytest.raises(RequestError, match="there is no reward 'pickscroe'"):
            made.generate(bon(8, held_out="pickscroe"))
        assert_sound(made)


def test_a_reward_that_takes_few_images_is_called_with_few():
    sizes = []

    def few(images, prompts):
        sizes.append(len(images))
        return images.mean((1, 2, 3))

    few.batch = 3
    with engine(buckets=(8,)) as made:
        result = made.generate(bon(8, reward=few))
        assert sizes == [3] * 4, "eight images, of which the last two are padded to three, and the final one"
        assert fingerprint(result) == fingerprint(made.generate(bon(8)))
        cost = made.stats().rewards["few"]
        assert cost.images == 9 and cost.calls == 2 and [*cost.curve] == [1, 8]
    few.batch = 0
    with engine() as made, pytest.raises(RequestError, match="batch of the reward few=0"):
        made.generate(bon(8, reward=few))


def test_a_reward_that_runs_out_of_memory_is_called_with_fewer_images():
    sizes = []

    def heavy(images, prompts):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("no room")
        return images.mean((1, 2, 3))

    with engine() as made:
        with pytest.warns(RuntimeWarning, match="it is called with at most 2 from now on"):
            result = made.generate(bon(8, reward=heavy))
        assert fingerprint(result) == fingerprint(made.generate(bon(8)))
        assert sizes[:3] == [8, 4, 2]
        sizes.clear()
        made.generate(bon(8, reward=heavy))
        assert max(sizes) == 2, "it has learned"


def test_a_term_that_is_no_number_makes_the_reward_none():
    def sometimes(images, prompts):
        scores = images.mean((1, 2, 3))
        scores[0] = math.nan
        return scores

    with engine() as made, pytest.warns(RuntimeWarning, match="no finite number"):
        result = made.generate(bon(4, reward=rewards.combine("max(a, b)", {"a": brightness, "b": sometimes})))
    assert result.invalid_rewards == 1
