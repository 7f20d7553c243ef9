"""What holds for every test: no network, two threads, Triton's interpreter where there is no CUDA device."""

import dataclasses
import functools
import gc
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is: two processes share the cores, none may spin

import torch

# rollflow itself must not be imported here: jaxtyping's hook (addopts) is to see every import of it. It is set by now.

if "triton" in sys.modules:
    raise RuntimeError("triton was imported before conftest.py could choose its interpreter")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before triton is imported

torch.set_num_threads(2)
if sys.version_info < (3, 12):  # which asks a protocol for its members anew in each isinstance; beartype does many
    typing._get_protocol_attrs = functools.cache(typing._get_protocol_attrs)  # type: ignore[attr-defined]


class Checked:
    """jaxtyping's decorator where an annotation has a shape, beartype alone elsewhere.

    jaxtyping binds the arguments of each call anew, which costs more than most functions do. It stays where beartype
    would change what is tested: a generator that beartype wraps holds what it is sent for longer than it would by
    itself, and the command line names types that only type checkers import.
    """

    shaped = staticmethod(jaxtyping.jaxtyped)
    kinds = tuple(
        f"{name}["
        for name, kind in vars(jaxtyping).items()
        if isinstance(kind, type) and issubclass(kind, jaxtyping.AbstractDtype)
    )

    def __init__(self, *, typechecker: Callable[..., Any]):
        self.typechecker = typechecker

    def __call__(self, thing: Any) -> Any:
        if not isinstance(thing, type):
            return self.function(thing)
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = self.function(thing.__init__)
        return thing

    def function(self, function: Any) -> Any:
        if "<locals>" in function.__qualname__:  # made anew in each call; beartype would keep them all
            return function
        text = " ".join(str(annotation) for annotation in function.__annotations__.values())
        text += " ".join(str(function.__globals__.get(word)) for word in set(re.findall(r"\w+", text)))  # of aliases
        special = inspect.isgeneratorfunction(function) or function.__module__.startswith("rollflow.cli")
        if special or any(kind in text for kind in self.kinds):
            return self.shaped(function, typechecker=self.typechecker)
        checked = self.typechecker(function)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return (function if jaxtyping.config.jaxtyping_disable else checked)(*args, **options)

        return call


jaxtyping.jaxtyped = Checked  # what the hook's decorators call

# The same examples in every run, and no limit on the time of one: a busy machine is no failure.
settings.register_profile("rollflow", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("explore", deadline=None, max_examples=2000)  # pytest --hypothesis-profile=explore
settings.load_profile("rollflow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny operations gain nothing from a second thread, and lose much to waiting for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def little_garbage():
    """What is timed is timed after a collection, which would go through all that was imported, each time."""
    gc.freeze()
    yield
    gc.unfreeze()


# What tests report for a reader, such as the kernels' registers: at the end of the run, from whichever process.
REPORTED: list[str] = []


@pytest.fixture
def reported():
    """Takes a text that is shown at the end of the run."""
    return REPORTED.append


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["reported"] = [*REPORTED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    REPORTED.extend(getattr(node, "workeroutput", {}).get("reported", []))


def pytest_terminal_summary(terminalreporter):
    for text in REPORTED:
        terminalreporter.write_line(text)
