"""Which rewards requests may name: names and expressions of names, never where something is."""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec

from rollflow import rewards
from rollflow.errors import RequestError, RollflowError, shown
from rollflow.rewards import expression, weights
from rollflow.serve.failures import Failure, wrong

REMOTE = ("http", "judge")  # rewards that call other servers, which the operator has to allow
STEERING = {  # options of rewards that say how to measure: none says where weights, files, servers or keys are
    "frames", "threshold", "text_threshold", "nms", "share", "sure", "strict", "scenes", "question", "answer",
    "confidence", "side", "quality", "sign", "grid", "scale", "prefix", "logit",
}  # fmt: skip
MOST_TERMS = 8  # rewards of an expression: each judges every particle
LONGEST = 1000  # characters of an expression


def usual() -> tuple[str, ...]:
    """The built-in rewards that work now: they call no other server, and have here what they take, packages and
    weights. One whose weights are to be fetched has to be allowed by the operator."""
    return tuple(name for name in rewards.names() if name not in REMOTE and _here(name))


@lru_cache
def meanings(names: tuple[str, ...]) -> dict[str, str]:
    """What each of some rewards measures, in a line; those that say nothing or cannot be made are left out."""
    found = {}
    for name in names:
        with suppress(RollflowError):
            found[name] = rewards.measures(rewards.make(name))
    return {name: text for name, text in found.items() if text}


def _here(name: str) -> bool:
    one = rewards.make(name)
    takes = one.wanted() if hasattr(one, "wanted") else ()
    packages = getattr(one, "packages", ())
    return all(map(find_spec, packages)) and all(weights.here(*wanted) is not None for wanted in takes)


def check_reward(name: str, text: object, allowed: tuple[str, ...] | None) -> None:
    """Refuses a reward that requests may not name.

    Args:
        name: of the field.
        text: what it says: a name or an expression of names.
        allowed: see `rollflow.serve.limits.ServeSettings.rewards`.

    Raises:
        Failure: an unknown name, an option that would say where something is, or an expression that is too long.
    """
    if not isinstance(text, str):
        raise wrong(name, text, "it must be the name of a reward, or an expression of names")
    known = usual() if allowed is None else allowed
    if text in known:
        return
    if len(text) > LONGEST:
        raise wrong(name, text, f"it has {len(text)} characters, at most {LONGEST} are read")
    try:
        named = [*dict.fromkeys(expression.rewards_of(expression.parse(text)))]
    except RequestError as error:
        raise Failure(str(error), 400, name, "unknown_reward") from error
    if len(named) > MOST_TERMS:
        raise wrong(name, text, f"it names {len(named)} rewards, at most {MOST_TERMS} may judge")
    for one in named:
        if str(one) in known:
            continue
        if one.name not in known:
            near = get_close_matches(one.name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"requests here may name {', '.join(known)}"
            raise Failure(f"{name}: there is no reward {shown(str(one))} here; {hint}", 400, name, "unknown_reward")
        for option, _ in one.options:
            if option not in STEERING:
                what = f"the option {option} is the server's to set; leave it out"
                raise Failure(f"{name}={shown(str(one))}: {what}", 400, name, "forbidden_option")
