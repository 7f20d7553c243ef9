"""Rewards by the names that a user at a command line gives, functions in files included."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from rollflow import names
from rollflow.errors import RequestError, shown
from rollflow.rewards import catalog

_TERM = re.compile(r"'[^']*'|\"[^\"]*\"|(?<![\w./\\~-])([\w./\\~][\w./\\~-]*\.py):([^\W\d]\w*)")  # or a quoted value


@lru_cache
def reward_of(text: str) -> Any:
    """What a text stands for, one object a text: as `rollflow.names.reward_of`, and in expressions too.

    In an expression, as in "count - 0.1*scores.py:redness", each FILE.py:NAME stands for its function. A path with
    other characters than letters, digits and `_./~-`, or one that begins with a minus sign, stands alone.

    Raises:
        RequestError: a function cannot be loaded, or two are called the same, or one as a built-in reward is; of names
            and of what cannot be read, `rollflow.rewards.make` says so.
    """
    found = names.reward_of(text)
    if found is not text:
        return found
    own: dict[str, str] = {}
    for term in _TERM.finditer(text):
        place, attribute = term.groups()
        if attribute is None:
            continue
        if own.setdefault(attribute, place) != place:
            raise RequestError(f"the reward {shown(text)} takes two functions called {attribute}: rename one")
        if attribute in catalog.names():
            raise RequestError(
                f"the reward {shown(text)} takes a function called {attribute}, as a built-in reward is: rename it"
            )
    if not own:
        return text
    functions = {attribute: names.reward_of(f"{place}:{attribute}") for attribute, place in own.items()}
    return catalog.combine(_TERM.sub(lambda term: term[2] or term[0], text), functions)
