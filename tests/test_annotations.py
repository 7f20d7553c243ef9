"""The test run checks every annotation of the package: types everywhere, shapes where there are some."""

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import TypeCheckError

from rollflow import interpolant
from rollflow.kernels import reference
from rollflow.request import Record
from rollflow.rewards.count import CountReward


def test_types_of_functions_methods_and_dataclasses_are_checked():
    with pytest.raises(BeartypeCallHintParamViolation):
        interpolant.make(3)
    with pytest.raises(BeartypeCallHintParamViolation):
        interpolant.VP().alpha("0.5")
    with pytest.raises(BeartypeCallHintParamViolation):
        Record("0", 0, 1.0, None, None, "committed")
    assert interpolant.VP().alpha(1) < 1e-1  # an int stands for a float


def test_shapes_are_checked_across_arguments():
    with pytest.raises(TypeCheckError, match="images"):
        CountReward()(torch.zeros(2, 1, 64, 64), ["two red circles"] * 2)
    seed = torch.zeros(3, dtype=torch.int64)
    assert reference.noise(seed, seed, 4, 8).shape == (3, 4, 8)
    with pytest.raises(TypeCheckError, match="key"):
        reference.noise(seed, seed[:2], 4, 8)
