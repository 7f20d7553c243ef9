"""The text form of rewards: names with options, weighted sums, `min`, `max`, thresholds and `z`; nothing is executed.

    expression = ["-"] product { ("+" | "-") product } [ comparison ]
    product    = factor { ("*" | "/") factor }
    factor     = number | "min(" list ")" | "max(" list ")" | "z(" reward ")" | "(" expression ")" | "-" factor | reward
    comparison = (">" | ">=" | "<" | "<=") number            1 where it holds, else 0
    reward     = name [ ":" option "=" value { "," option "=" value } ]

A value ends at a space, a comma, a bracket, `+` or `*`; one with any of those stands in quotes. A minus sign within a
name or a value is part of it: `vqa:model=a-b`, but `vqa - 1`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import RequestError, shown

DEEPEST = 50  # brackets, functions and signs within one another
LONGEST = 10_000  # characters of an expression
_COMPARISONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    ">=": torch.ge,
    "<=": torch.le,
    ">": torch.gt,
    "<": torch.lt,
}
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_OPTION = re.compile(r"([A-Za-z_]\w*)=")
_VALUE = re.compile(r"'([^']*)'|\"([^\"]*)\"|([^\s,()+*'\"]+)")
_FUNCTIONS = ("min", "max", "z")


@dataclass(frozen=True)
class Named:
    """A reward by name.

    Attributes:
        name: of the reward.
        options: as they were written, in order of name.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        given = ",".join(f"{key}={_quoted(value)}" for key, value in self.options)
        return f"{self.name}:{given}" if given else self.name


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float

    def __str__(self) -> str:
        return _number(self.value)


@dataclass(frozen=True)
class Normalised:
    """A reward's deviation from the mean of the request's first particles, in their standard deviations."""

    of: Named

    def __str__(self) -> str:
        return f"z({self.of})"


@dataclass(frozen=True)
class Sum:
    """A sum of parts, each added or taken away."""

    parts: tuple[tuple[int, Node], ...]

    def __str__(self) -> str:
        text = "".join(f" {'+' if sign > 0 else '-'} {_bracketed(part, Sum)}" for sign, part in self.parts)
        return text[3:] if self.parts[0][0] > 0 else f"-{text[3:]}"


@dataclass(frozen=True)
class Product:
    """Factors, each multiplied or divided by."""

    parts: tuple[tuple[int, Node], ...]

    def __str__(self) -> str:
        text = [f"{'*' if power > 0 else '/'}{_bracketed(part, Sum, Product)}" for power, part in self.parts]
        return "".join(text)[1:]


@dataclass(frozen=True)
class Extreme:
    """The least or the largest of its parts."""

    name: str
    parts: tuple[Node, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Threshold:
    """1 where a comparison with a number holds, else 0."""

    left: Node
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"({self.left} {self.sign} {_number(self.bound)})"


Node = Named | Number | Normalised | Sum | Product | Extreme | Threshold


def parse(text: str) -> Node:
    """The expression that a text stands for.

    Raises:
        RequestError: it is none; the message says where.
    """
    if len(text) > LONGEST:
        raise RequestError(f"the reward {shown(text)} has {len(text)} characters: at most {LONGEST} are read")
    return _Parser(text).whole()


def walk(node: Node) -> Iterator[Node]:
    """An expression and all of its parts, from left to right; of a `z`, the `z` before the reward in it."""
    yield node
    parts: tuple[Node, ...] = ()
    if isinstance(node, Sum | Product):
        parts = tuple(part for _, part in node.parts)
    elif isinstance(node, Extreme):
        parts = node.parts
    elif isinstance(node, Threshold):
        parts = (node.left,)
    elif isinstance(node, Normalised):
        parts = (node.of,)
    for part in parts:
        yield from walk(part)


def rewards_of(node: Node) -> Iterator[Named]:
    """The rewards of an expression, in order, repetitions included."""
    return (one for one in walk(node) if isinstance(one, Named))


def normalised_of(node: Node) -> Iterator[Named]:
    """The rewards of an expression that stand in a `z`."""
    return (one.of for one in walk(node) if isinstance(one, Normalised))


def has_threshold(node: Node) -> bool:
    """Whether an expression has a threshold, which has no gradient."""
    return any(isinstance(one, Threshold) for one in walk(node))


def evaluate(
    node: Node, score: Callable[[Named], Float[Tensor, " row"]], scale: Callable[[Named], tuple[float, float]]
) -> Float[Tensor, " row"]:
    """The value of an expression.

    Args:
        node: the expression.
        score: the scores of one of its rewards, floating; all of one shape, dtype and device.
        scale: mean and deviation of one in a `z`.
    """

    some = score(next(rewards_of(node)))

    def value(one: Node) -> Tensor:
        if isinstance(one, Number):
            return torch.full_like(some, one.value)
        if isinstance(one, Named):
            return score(one)
        if isinstance(one, Normalised):
            mean, deviation = scale(one.of)
            return (score(one.of) - mean) / deviation
        if isinstance(one, Threshold):
            left = value(one.left)
            return torch.where(left.isnan(), left, _COMPARISONS[one.sign](left, one.bound).to(left.dtype))
        if isinstance(one, Extreme):
            total = value(one.parts[0])
            for part in one.parts[1:]:
                total = (torch.minimum if one.name == "min" else torch.maximum)(total, value(part))
            return total
        (_, first), *others = one.parts
        found = value(first)
        if isinstance(one, Sum):
            found = found if one.parts[0][0] > 0 else -found
            for sign, part in others:
                found = found + value(part) if sign > 0 else found - value(part)
            return found
        for power, part in others:
            found = found * value(part) if power > 0 else found / value(part)
        return found

    return value(node)


class _Parser:
    """Reads one expression, from left to right."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def whole(self) -> Node:
        node = self.expression()
        if self.rest():
            raise self.error("an operator, or the end")
        if next(rewards_of(node), None) is None:
            raise RequestError(f"the reward {shown(self.text)} names no reward: a number alone judges nothing")
        return node

    def expression(self) -> Node:
        sign = -1 if self.takes("-") else 1
        parts = [(sign, self.product())]
        while operator := self.takes("+", "-"):
            parts.append((1 if operator == "+" else -1, self.product()))
        node: Node = parts[0][1] if len(parts) == 1 and sign > 0 else Sum(tuple(parts))
        if comparison := self.takes(*_COMPARISONS):
            sign = -1 if self.takes("-") else 1
            number = self.matches(_NUMBER)
            if number is None:
                raise self.error(f"a number after {comparison}")
            node = Threshold(node, comparison, sign * float(number[0]))
        return node

    def product(self) -> Node:
        parts = [(1, self.factor())]
        while operator := self.takes("*", "/"):
            parts.append((1 if operator == "*" else -1, self.factor()))
        if any(power < 0 and isinstance(part, Number) and part.value == 0 for power, part in parts):
            raise RequestError(f"the reward {shown(self.text)} divides by 0")
        return parts[0][1] if len(parts) == 1 else Product(tuple(parts))

    def factor(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise RequestError(f"the reward {shown(self.text)} has more than {DEEPEST} brackets within one another")
        node = self.inner()
        self.depth -= 1
        return node

    def inner(self) -> Node:
        if self.takes("("):
            node = self.expression()
            self.closes()
            return node
        if self.takes("-"):
            inner = self.factor()
            return Number(-inner.value) if isinstance(inner, Number) else Sum(((-1, inner),))
        if (number := self.matches(_NUMBER)) is not None:
            return Number(float(number[0]))
        name = self.matches(_NAME)
        if name is None:
            raise self.error("a number, the name of a reward, min(...), max(...), z(...) or a bracket")
        if name[0] in _FUNCTIONS and self.takes("("):
            return self.function(name[0])
        return self.named(name[0])

    def function(self, name: str) -> Node:
        if name == "z":
            inner = self.factor()
            if not isinstance(inner, Named):
                raise RequestError(f"the reward {shown(self.text)}: z(...) takes the name of one reward")
            self.closes()
            return Normalised(inner)
        parts = [self.expression()]
        while self.takes(","):
            parts.append(self.expression())
        self.closes()
        return Extreme(name, tuple(parts))

    def named(self, name: str) -> Named:
        options: dict[str, str] = {}
        if self.at < len(self.text) and self.text[self.at] == ":":
            self.at += 1
            more = True
            while more:
                option = self.matches(_OPTION)
                value = None if option is None else self.matches(_VALUE)
                if option is None or value is None:
                    raise self.error(f"an option of {name}, as in {name}:model=FOLDER")
                if option[1] in options:
                    raise RequestError(f"the reward {shown(self.text)} gives {option[1]} of {name} twice")
                options[option[1]] = next(found for found in value.groups() if found is not None)
                before = self.at
                more = bool(self.takes(",")) and _OPTION.match(self.rest()) is not None
                if not more:  # the comma of a list, as in min(...)
                    self.at = before
        return Named(name, tuple(sorted(options.items())))

    def rest(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at :]

    def matches(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        rest = self.rest()
        if (found := pattern.match(rest)) is not None:
            self.at += found.end()
        return found

    def takes(self, *tokens: str) -> str:
        rest = self.rest()
        for token in tokens:
            if rest.startswith(token):
                self.at += len(token)
                return token
        return ""

    def closes(self) -> None:
        if not self.takes(")"):
            raise self.error("a closing bracket")

    def error(self, wanted: str) -> RequestError:
        rest = self.rest()
        where = f"at {shown(rest)}" if rest else "at its end"
        return RequestError(
            f"the reward {shown(self.text)} cannot be read {where}: {wanted} was expected, as in '0.7*vqa + "
            "0.3*aesthetic' or 'min(vqa, count)'"
        )


def _quoted(value: str) -> str:
    found = _VALUE.fullmatch(value)
    if found is not None and found[3] is not None:
        return value
    return f'"{value}"' if '"' not in value else f"'{value}'"


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _bracketed(node: Node, *kinds: type) -> str:
    text = str(node)
    return f"({text})" if isinstance(node, kinds) and not isinstance(node, Threshold) else text


def labels(named: Sequence[Named]) -> tuple[str, ...]:
    """What to call each of several rewards: its name, or where two share one, all of it."""
    names = [one.name for one in named]
    return tuple(one.name if names.count(one.name) == 1 else str(one) for one in named)
