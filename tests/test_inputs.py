"""Odd inputs: a right result or one line that says what is wrong, in bounded time, and nothing is left behind."""

import itertools
import math
from dataclasses import fields
from enum import IntEnum

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow import methods, rewards, sde
from rollflow.checks import MOST_STEPS
from rollflow.draw import Draw
from rollflow.engine import Engine
from rollflow.errors import FunctionError, OutOfTime, RequestError, RollflowError, said, shown
from rollflow.interpolant import Interpolant, Linear
from rollflow.models import FlowModel, Geometry, Traits
from rollflow.models.layout import Layout
from rollflow.plan import plan
from rollflow.request import Request
from rollflow.values import flag, number, plain, whole

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers that are no fault of ours


@pytest.fixture(autouse=True)
def annotations_are_not_checked():
    """The test run's own checks of annotations would refuse what is to be refused here, with another error."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


class Tiny(FlowModel):
    """Data that is 0 in every latent element: the velocity is `x / tau`; a picture is the latent itself."""

    device, dtype, layout = torch.device("cpu"), torch.float32, Layout((1, 2, 2), (1.0,) * 3, (0.0,) * 3)

    def geometry(self, height=None, width=None):
        height, width = height or 4, width or 4
        if height % 2 or width % 2 or height > 16 or width > 16:
            raise RequestError(f"size {height}x{width}: multiples of 2 up to 16")
        return Geometry(height, width, height, width, height * width // 4, 12)

    def check_prompt(self, prompt):
        pass

    def encode(self, prompts):
        return [None for _ in prompts]

    def velocity(self, x, tau, conditioning, guidance, geometry):
        return x / tau[:, None, None]

    def decode(self, latents):
        return latents.sigmoid()


def brightness(images, prompts):
    return images.mean((1, 2, 3))


brightness.differentiable = True


def ask(prompt="a", **options):
    return Request(prompt, **{"reward": brightness, "nfe": 12, "steps": 3, "method": "rbf", **options})


@pytest.fixture(scope="module")
def engine():
    with Engine(Tiny(), lanes=1, threads=1, slots=64, buckets=(1, 4, 16)) as made:
        yield made


def is_one_line(error):
    text = str(error)
    return 0 < len(text) < 600 and text.isprintable()


# Values by themselves.


class Level(IntEnum):
    LOW = 3


class Raising:
    """Every question raises."""

    def _raise(self, *_):
        raise ZeroDivisionError("no\x00such\nluck")

    __repr__ = __str__ = __index__ = __int__ = __float__ = __bool__ = __len__ = __iter__ = _raise
    __lt__ = __gt__ = __le__ = __ge__ = __getitem__ = __contains__ = __add__ = __mul__ = _raise


class Unequal(Raising):
    __eq__ = Raising._raise
    __hash__ = object.__hash__


class Long:
    def __repr__(self):
        return "long\n\x00" * 100_000


class Liar:
    """Says that it is an int."""

    __class__ = property(lambda self: int)


class Scalar:
    """Looks like an array's scalar."""

    ndim, dtype, shape = 0, None, ()

    def item(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "value",
    [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16), Level.LOW],
)
def test_whole_numbers_become_plain_ints(value):
    assert type(whole("n", value, 0)) is int and whole("n", value, 0) == 3
    assert type(number("x", value)) is float and number("x", value) == 3.0


@pytest.mark.parametrize("value", [3.5, np.float32(3.5), np.float64(3.5), np.array(3.5), torch.tensor(3.5)])
def test_numbers_become_plain_floats_and_are_no_whole_numbers(value):
    assert type(number("x", value)) is float and number("x", value) == 3.5
    with pytest.raises(RequestError, match=r"n=.*: it must be a whole number of at least 0"):
        whole("n", value, 0)


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), torch.tensor(True), "3", b"3", None, 3j, torch.tensor(3j), np.datetime64(3, "ns"), [3], (3,),
     {3}, torch.zeros(1), np.zeros(1), torch.empty((), device="meta"), Raising(), Unequal(), Liar(), Scalar(), Long(),
     math.nan, math.inf, torch.tensor(math.nan), 10**400],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_no_number(value):
    with pytest.raises(RequestError, match=r"x=.*: it must be a finite number") as kept:
        number("x", value)
    assert is_one_line(kept.value)
    if type(value) is not int:
        with pytest.raises(RequestError, match=r"n=.*: it must be a whole number of at least 0"):
            whole("n", value, 0)
    if plain(value) is not True:
        with pytest.raises(RequestError, match=r"f=.*: it must be True or False"):
            flag("f", value)


def test_limits_of_numbers():
    assert whole("n", 5, 0, 5) == 5 and number("x", -2, 2) == -2
    with pytest.raises(RequestError, match="n=6: it must be a whole number of at most 5"):
        whole("n", 6, 0, 5)
    with pytest.raises(RequestError, match=r"x=-2\.5: it must be a finite number, from -2 to 2"):
        number("x", -2.5, 2)
    with pytest.raises(RequestError, match="f='no': it must be True or False"):
        flag("f", "no")
    with pytest.raises(RequestError, match=r"n=3\.0: it must be a whole number"):
        whole("n", 3.0, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("two", "'two'"),
        ("a\x00\x1b[31m\ud800\n", r"'a\x00\x1b[31m\ud800\n'"),
        ([1, 2.5, "a"], "[1, 2.5, 'a']"),
        ([1] * 100_000, "[1, 1, 1, 1, 1, 1, 1, 1, ...]"),
        (torch.zeros(2, 3), "Tensor of shape [2, 3] and type float32"),
        (torch.tensor(2.5), "tensor(2.5000)"),
        (10**5000, "an integer of 16610 bits"),
        (Raising(), "<Raising>"),
        ([Raising()], "<list>"),
    ],
    ids=range(9),
)
def test_what_was_given_is_quoted(value, text):
    assert shown(value) == text


def test_long_values_are_quoted_by_their_ends():
    for value in ("ab" * 100_000, b"ab" * 100_000, Long(), [["a" * 1000] * 1000] * 1000, dict.fromkeys(range(10**5)),
                  type("n" * 10_000, (), {}), np.zeros((1,) * 30), [[[[[[[]]]]]]], type("a\nb", (), {})()):  # fmt: skip
        assert len(shown(value)) <= 100 and shown(value).isprintable()
    assert shown("ab" * 100_000).startswith("'abab") and shown("x" * 500 + "end").endswith("end'")


def test_messages_are_one_short_line_whatever_is_in_them():
    error = RequestError(f"prompt={'a' * 200_000}\n\x00\ud800: too long")
    assert is_one_line(error) and str(error).startswith("prompt=aaa") and str(error).endswith("too long")
    assert str(OutOfTime("no\ntime\x1b")) == r"no time\x1b"
    assert said(ZeroDivisionError("no\nluck")) == "ZeroDivisionError: no luck" and said(KeyError()) == "KeyError"

    class Silent(Exception):
        def __str__(self):
            raise ZeroDivisionError

    assert said(Silent()) == "Silent: its message cannot be shown"


# Requests.

ODD = [
    None, True, False, 0, 1, 2, 3, -1, 7, 1.5, 3.0, 0.5, -0.5, 1e308, 5e-324, math.nan, math.inf, -math.inf, 10**30,
    -(10**30), 10**5000, 2**63, 2**20, 10**6, np.int64(3), np.uint8(2), np.float32(0.5), np.float64(math.nan),
    np.bool_(True), np.array(2), np.array([1, 2]), np.array("x"), torch.tensor(3), torch.tensor(0.5),
    torch.tensor(True), torch.tensor(1j), torch.zeros(4, 12), torch.zeros(2, 4, 12), torch.zeros(0, 4, 12),
    torch.zeros(4, 12, dtype=torch.int64), torch.zeros(4, 12, dtype=torch.complex64),
    torch.zeros(4, 12, device="meta"), torch.zeros(4, 12).to_sparse(), torch.full((4, 12), math.nan),
    torch.full((4, 12), 1e38), torch.full((4, 12), 1e300, dtype=torch.float64), torch.zeros(4, 12, dtype=torch.bool),
    torch.empty((), device="meta"), Level.LOW, 3j, b"3", b"", bytearray(b"3"), "", " ", "3", "no", "x" * 200_000,
    "a\x00b", "a\x1b[31m", "\ud800", "two\nlines", "linear", "vp", "paper", "cps", "rbf", "count", "systematic", [],
    [1], [0.9, 0.5], [0.9, math.nan], (1.0, 0.5, 0.0), [None], ["a"], [1.0] * 100_000, {}, {"initial": 2},
    {"initial": "2"}, {"nfe": 3}, {"method": 3}, {1: 2}, {"\ud800": 1}, {"x" * 100_000: 1}, {"initial": math.nan},
    {"gradient": np.float32(0)}, set(), range(3), range(10**9), itertools.count(), object(), Raising(), Unequal(),
    Liar(), Scalar(), Long(), int, Linear, Linear(), sde.Constant(2.0), sde.Zero(), sde.Memoryless(), lambda: None,
    lambda t: 2.0, lambda t: math.nan, lambda t: "2", lambda *_, **__: 3, print, Request("a"), Traits(), Draw(None),
    Exception("x"), ...,
]  # fmt: skip
FIELDS = [field.name for field in fields(Request)]


def left(engine):
    stats = engine.stats()
    return stats.live, stats.promised, stats.queued


def tried(engine, request):
    """The result of a request, or its error: one of rollflow's, in one line; and nothing is left of it."""
    try:
        job = engine.submit(request)
        if job.request.nfe > 1000:  # right, and long: that it ends well when it is cancelled will do
            job.cancel()
            job.best(60)
        result = job.result(60)
        assert result.committed_nfe <= result.request.nfe and result.pixels.shape[0] == 3
        found = result
    except RollflowError as error:
        assert is_one_line(error), str(error)
        found = error.with_traceback(None)
    assert left(engine) == (0, 0, 0) and engine.stats().healthy
    return found


def with_fields(**values):
    """A request that holds anything, without a look at it."""
    request = ask()
    for name, value in values.items():
        object.__setattr__(request, name, value)
    return request


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_takes_or_refuses_every_odd_value(engine, name):
    for value in ODD:
        tried(engine, with_fields(**{name: value}))


anything = st.recursive(
    st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.builds(torch.tensor, st.floats(width=32) | st.integers(-100, 100) | st.booleans()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
small = st.integers(-2, 40) | st.floats(-1, 5)  # more often right than the rest


@settings(max_examples=250)
@given(st.data())
def test_any_request_ends_well(engine, data):
    """Several odd fields and options at once."""

    def odd():
        place = data.draw(st.integers(0, 2 * len(ODD)))  # a place: not every value can be printed by hypothesis
        return ODD[place] if place < len(ODD) else data.draw(anything | small)

    method = data.draw(st.sampled_from(methods.names()))
    names = data.draw(st.lists(st.sampled_from([name for name in FIELDS if name != "method"]), max_size=2))
    values = {name: odd() for name in names}
    own = methods.options_of(method)
    if "options" not in values and own:
        values["options"] = {name: odd() for name in data.draw(st.lists(st.sampled_from(own), max_size=3))}
    tried(engine, with_fields(method=method, **values))


# Functions and objects of the user's own.


class Path(Interpolant):
    """The linear path, but for what a test replaces."""

    def __init__(self, **replaced):
        self.replaced = replaced

    def _at(self, name, t, usual):
        replaced = self.replaced.get(name)
        return usual if replaced is None else replaced(t) if callable(replaced) else replaced

    def alpha(self, t):
        return self._at("alpha", t, 1.0 - t)

    def sigma(self, t):
        return self._at("sigma", t, t)

    def alpha_dot(self, t):
        return self._at("alpha_dot", t, -1.0)

    def sigma_dot(self, t):
        return self._at("sigma_dot", t, 1.0)

    def linear_time(self, t):
        return self._at("linear_time", t, t)


def raises(*_, **__):
    raise ZeroDivisionError("no\nluck")


def only_at(time, value):
    """What is wrong at one time of the grid alone, where no check of the ends sees it."""
    return lambda t: value if t == time else 1.0 - t


RUBBISH = [math.nan, math.inf, -1.0, "0.5", None, True, 1j, torch.zeros(2), np.zeros(1), [0.5], object(), Raising()]


@pytest.mark.parametrize("value", RUBBISH, ids=lambda value: type(value).__name__)
def test_interpolants_that_return_rubbish_at_one_time_are_refused(engine, value):
    error = tried(engine, ask(interpolant=Path(alpha=only_at(0.75, value)), grid="uniform", steps=4))
    assert isinstance(error, RequestError) and "alpha of the interpolant" in str(error) and "t = 0.75" in str(error)
    assert isinstance(tried(engine, ask(interpolant=Path(), grid="uniform", steps=4)).reward, float)


def test_linear_time_must_increase(engine):
    error = tried(engine, ask(interpolant=Path(linear_time=lambda t: 0.5), grid="uniform"))
    assert isinstance(error, RequestError) and "it must increase in time" in str(error)
    error = tried(engine, ask(interpolant=Path(linear_time=lambda t: 1 + t), grid="uniform"))
    assert isinstance(error, RequestError) and "from 0 to 1" in str(error)


@pytest.mark.parametrize("name", ["alpha", "sigma", "alpha_dot", "sigma_dot", "linear_time"])
def test_what_an_interpolant_raises_is_the_cause(engine, name):
    error = tried(engine, ask(interpolant=Path(**{name: raises}), grid="uniform"))
    assert isinstance(error, FunctionError) and isinstance(error.__cause__, ZeroDivisionError)
    assert f"{name} of the interpolant" in str(error) and "ZeroDivisionError: no luck at t =" in str(error)


@pytest.mark.parametrize("value", [v for v in RUBBISH if v is not math.inf], ids=lambda value: type(value).__name__)
def test_diffusions_that_return_rubbish_at_one_time_are_refused(engine, value):
    class Own(sde.Diffusion):
        def g(self, t, interpolant=None):
            return value if t == 0.75 else 1.0

    for diffusion in (Own(), lambda t: value if t == 0.75 else 1.0):
        for solver in ("euler", "cps"):
            error = tried(engine, ask(diffusion=diffusion, grid="uniform", steps=4, solver=solver))
            assert isinstance(error, RequestError) and "t = 0.75" in str(error)


def test_what_a_diffusion_raises_is_the_cause(engine):
    class Own(sde.Diffusion):
        g = raises

    for diffusion, name in ((Own(), "g of the diffusion"), (raises, "the diffusion raises")):
        error = tried(engine, ask(diffusion=diffusion))
        assert isinstance(error, FunctionError) and isinstance(error.__cause__, ZeroDivisionError)
        assert name in str(error)


def judge(**attributes):
    """A reward of the user's own, with other attributes."""

    class Judge:
        name = "judge"

        def check(self, prompt):
            pass

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

    for name, value in attributes.items():
        setattr(Judge, name, value)
    return Judge()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": 3}, "the name of a reward is 3"),
        ({"name": "a\x00"}, "the name of a reward"),
        ({"size": (4,)}, r"size=\(4,\): it must be \(height, width\)"),
        ({"size": (4, "4")}, "size of the reward judge='4': it must be a whole number"),
        ({"held_out": 3}, "a reward is a name"),
        ({"differentiable": "no"}, "differentiable of the reward judge='no': it must be True or False"),
        ({"concurrent": 1}, "concurrent of the reward judge=1"),
        ({"timeout": "3"}, "timeout of the reward judge='3': it must be a finite number"),
        ({"timeout": 0}, "must be above 0 seconds"),
        ({"retries": 1.0}, "retries of the reward judge=1.0"),
        ({"retry_on": "ValueError"}, "must be a tuple of exception types"),
        ({"retry_on": (ValueError, 3)}, "must be a tuple of exception types"),
    ],
)
def test_attributes_of_rewards_are_checked_at_the_door(engine, attributes, message):
    with pytest.raises(RequestError, match=message):
        engine.submit(ask(reward=judge(**attributes)))
    assert left(engine) == (0, 0, 0)


def test_attributes_of_rewards_that_are_right(engine):
    right = judge(size=[np.int64(4), 4], held_out=staticmethod(brightness), timeout=torch.tensor(60),
                  retries=np.int8(1), retry_on=ValueError, concurrent=np.bool_(True))  # fmt: skip
    assert rewards.size(right) == (4, 4) and rewards.timeout(right) == 60.0 and rewards.retries(right) == 1
    assert rewards.retry_on(right)[1:] == (ValueError,)
    result = tried(engine, ask(reward=right))
    assert result.held_out == pytest.approx(result.reward)


@pytest.mark.parametrize("name", ["name", "size", "held_out", "timeout", "retries", "retry_on", "differentiable"])
def test_attributes_of_rewards_that_raise_are_the_cause(engine, name):
    error = tried(engine, ask(reward=judge(**{name: property(raises)})))
    assert isinstance(error, FunctionError) and isinstance(error.__cause__, ZeroDivisionError)
    called = "Judge" if name == "name" else "judge"  # by its class, where it cannot say its name
    assert f"of the reward {called} raised ZeroDivisionError: no luck" in str(error)


def test_a_reward_whose_check_raises_and_one_whose_attributes_change(engine):
    error = tried(engine, ask(reward=judge(check=raises)))
    assert isinstance(error, FunctionError) and isinstance(error.__cause__, ZeroDivisionError)
    assert "check of the reward judge raised ZeroDivisionError: no luck" in str(error)
    answers = iter([None])
    error = tried(engine, ask(reward=judge(timeout=property(lambda self: next(answers, "soon")))))
    assert isinstance(error, RequestError) and "timeout of the reward judge='soon'" in str(error)


def test_methods_of_ones_own_that_are_none(engine):
    error = tried(engine, ask(method=raises))
    assert isinstance(error, FunctionError) and isinstance(error.__cause__, ZeroDivisionError)
    assert str(error) == "the method raises raised ZeroDivisionError: no luck when it was made"
    error = tried(engine, ask(method=lambda nfe, steps: 3))
    assert isinstance(error, RequestError) and "made 3: it must make a generator" in str(error)

    def counts(nfe, steps):
        (particles,) = yield [Draw(None, np.int64(nfe))]
        return particles[0]

    assert tried(engine, ask(method=counts)).committed_nfe == 12


# Numbers of NumPy's and torch's, times, and what else the issue names.


def test_scalars_of_every_kind_give_the_same_request(engine):
    same = {"nfe": 12, "steps": 3, "seed": 5, "finish": 2, "priority": 1, "finalists": 2, "height": 4, "width": 4}
    plainly = tried(engine, ask(**same, shift=3.0, guidance=2.0, options={"initial": 3}))
    for kind in (np.int64, np.array, torch.tensor, np.int16):
        odd = {name: kind(value) for name, value in same.items()}
        found = tried(engine, ask(**odd, shift=kind(3), guidance=kind(2), options={"initial": kind(3)}))
        assert torch.equal(found.pixels, plainly.pixels) and found.history == plainly.history
        assert all(type(getattr(found.request, name)) is int for name in same)
        assert type(found.request.options["initial"]) is int


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shift": b"3"}, "shift=b'3': it must be a finite number"),
        ({"method": "dps", "options": {"normalise": "no"}}, "normalised='no': it must be True or False"),
        ({"seconds": 0}, "the time of a request must be above 0"),
        ({"seconds": "2"}, "seconds='2': it must be a finite number"),
        ({"deadline": math.nan}, "deadline=nan: it must be a finite number"),
        ({"steps": MOST_STEPS + 1}, "steps=10001: it must be a whole number of at most 10000"),
        ({"nfe": 10**30}, "at most 1048576"),
        ({"height": 10**9}, "height=1000000000: it must be a whole number of at most 65536"),
        ({"prompt": "a\x00b"}, r"prompt='a\\x00b': the character '\\x00' in it is no text"),
        ({"prompt": "\ud800"}, r"the character '\\ud800' in it is no text"),
        ({"latents": torch.zeros(4, 12, dtype=torch.int64)}, "a dense tensor of floating-point numbers"),
        ({"latents": torch.zeros(0, 4, 12)}, "a finite tensor, of the shape of one state"),
        ({"options": {"nfe": 3}}, "'nfe' is no option of a method"),
        ({"solver": ["euler"]}, r"unknown solver \['euler'\]: choose"),
        ({"times": "0.9"}, "a list of decreasing numbers"),
    ],
)
def test_what_was_taken_before_is_refused(engine, values, message):
    with pytest.raises(RequestError, match=message):
        engine.submit(with_fields(**values))


def test_a_deadline_in_the_past_and_times_that_are_never_over(engine):
    now = engine.clock()
    with pytest.raises(OutOfTime):
        engine.submit(ask(deadline=now - 1)).result(60)
    assert tried(engine, ask(deadline=now + 1e9, seconds=1e8)).stopped in ("budget", "seconds", "deadline")
    assert left(engine) == (0, 0, 0)


def test_latents_are_taken_as_they_were_given(engine):
    latents = torch.ones(4, 12, dtype=torch.float64)
    made = plan(ask(latents=latents))
    latents.zero_()
    assert made.latents.dtype == torch.float32 and made.latents.shape == (4, 12) and made.latents.min() == 1


def test_latents_of_a_request_with_a_time_are_those_that_were_given(engine):
    noise = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    with Engine(Tiny(), slots=16, buckets=[1, 4]) as made:
        fields = {"method": "bon", "steps": 1, "latents": noise, "finalists": 1}
        plain = made.generate(ask(nfe=1, **fields))
        timed = made._door.check(ask(nfe=None, seconds=1e4, **fields), {})
        assert torch.equal(timed.plan.latents, noise[None]) and torch.equal(timed.resize(3).latents, noise[None])
        assert plain.pixels.isfinite().all()


def test_latents_may_have_a_batch_dimension_or_be_flat(engine):
    latents = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    shapes = [latents, latents[None], latents.flatten(), latents.flatten()[None]]
    one, *others = (tried(engine, ask(method="bon", nfe=3, steps=3, latents=given)) for given in shapes)
    assert all(torch.equal(other.pixels, one.pixels) for other in others)
    for wrong in (torch.zeros(12, 4), torch.zeros(47), torch.zeros(1, 1, 4, 12)):
        with pytest.raises(RequestError, match=r"this model and size need \[4, 12\]"):
            engine.generate(ask(latents=wrong))


# The engine's own arguments.


@pytest.mark.parametrize(
    "options",
    [{name: value} for name in ("lanes", "threads", "slots", "max_queued") for value in (0, -1, 1.5, "2", True, 10**30)
     if (name, value) not in (("slots", 10**30), ("max_queued", 10**30))]
    + [{name: "no"} for name in ("preview", "reproducible", "graphs", "traits", "clock", "buckets")]
    + [{"buckets": value} for value in ([], [0], [2, 1], [1.5], [True], b"12", 3, {1: 2}, itertools.count(1), [10**9])]
    + [{"traits": Traits(steps=0)}, {"traits": Traits(trusted_from=2.0)}],
    ids=shown,
)  # fmt: skip
def test_arguments_of_an_engine_that_are_refused(options):
    with pytest.raises(RequestError) as kept:
        Engine(Tiny(), **{"lanes": 1, **options})
    assert is_one_line(kept.value)


@pytest.mark.parametrize(
    "options",
    [{"name_or_path": value} for value in (None, 3, b"shapes", "no\x00where", "\ud800", "x" * 5000, "/dev/null", [])]
    + [{"device": value} for value in ("tpu", "", -1, b"cpu", [], "cuda:x", 3.5)]
    + [{"dtype": value} for value in ("float", torch.int32, 3, [])] + [{"preview": value} for value in (3, [], b"x")],
    ids=shown,
)  # fmt: skip
def test_arguments_of_from_pretrained_that_are_refused(options):
    with pytest.raises(RollflowError) as kept:
        Engine.from_pretrained(**options)
    assert is_one_line(kept.value)


@pytest.mark.parametrize("value", [3, None, b"ab", {"a": 1}, object(), Raising(), [None], [3], [b"a"], ["a", ""]])
def test_lists_of_requests_that_are_none(engine, value):
    for call in (engine.generate, engine.encode, lambda given: list(engine.map(given))):
        with pytest.raises(RollflowError) as kept:
            call(value)
        assert is_one_line(kept.value)
    assert left(engine) == (0, 0, 0)


def test_other_arguments_of_its_methods(engine):
    def breaks():
        yield ask()
        raise ZeroDivisionError

    for call in (
        lambda: engine.map("abc"),
        lambda: engine.map([ask()], concurrency=0),
        lambda: engine.map([ask()], return_exceptions="no"),
        lambda: engine.generate([ask()], return_exceptions=2),
        lambda: engine.generate([ask()], on_progress=3),
        lambda: engine.generate("a", options=3),
        lambda: engine.generate("a", method=3, wings=2),
        lambda: engine.warm_up("4", 4),
        lambda: engine.buckets(4, 3.5),
        lambda: list(engine.map(breaks())),
    ):
        with pytest.raises(RollflowError) as kept:
            call()
        assert is_one_line(kept.value)
    assert engine.generate(ask(prompt) for prompt in "ab")[1].committed_nfe == 12
    assert left(engine) == (0, 0, 0)


def test_a_pool_that_finds_no_memory_fails_its_requests_alone():
    with Engine(Tiny(), lanes=1, threads=1, slots=10**14, buckets=(1, 4)) as engine:
        with pytest.raises(RollflowError, match="there is no room for 100000000000000 particles of 4x4"):
            engine.generate(ask())
        assert engine.stats().healthy and left(engine) == (0, 0, 0)
        with pytest.raises(RollflowError):
            engine.generate(ask())
