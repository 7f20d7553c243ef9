"""Velocities are kept in the dtype that models give them in, and all variants of kernels that run are enumerated."""

import sys
from dataclasses import replace

import pytest
import torch

from rollflow import kernels
from rollflow.device.storage import Storage
from rollflow.engine import Engine
from rollflow.errors import ModelError
from rollflow.kernels import aot
from rollflow.kernels.launch import recorded
from rollflow.models import Capabilities, velocity_dtype
from rollflow.models.cfg import ClassifierFree
from rollflow.models.flux import FluxModel
from rollflow.models.loading import load
from rollflow.request import Request
from rollflow.settings import slots_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> FluxModel:
    return FluxModel(load("shapes", CPU, torch.bfloat16))


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


def test_velocities_are_kept_as_they_come(model: FluxModel) -> None:
    assert velocity_dtype(model) == velocity_dtype(ClassifierFree(model)) == torch.bfloat16
    storage = Storage(2, 4, 8, CPU, torch.bfloat16)
    u = torch.randn(2, 4, 8)
    assert storage.u.dtype == torch.bfloat16 and storage.x.dtype == storage.move.dtype == torch.float32
    assert torch.equal(storage.as_kept(u.bfloat16()), u.bfloat16())
    with pytest.raises(ModelError, match=r"velocities in torch\.float32 and declares the capability rounded"):
        storage.as_kept(u)
    assert torch.equal(
        Storage(2, 4, 8, CPU).as_kept(u.bfloat16()), u.bfloat16().float()
    )  # of one that declares nothing


def test_a_slot_takes_what_its_velocity_takes(model: FluxModel) -> None:
    geometry = replace(model.geometry(), token=2**14, channel=64)
    single, half = (slots_of(None, geometry, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half == single * 8 // 6


def test_every_variant_that_a_search_runs_is_enumerated(model: FluxModel, monkeypatch) -> None:
    """Of evaluations, of the images of searches, and of a model that declares nothing."""
    found = {}
    for name in ("propose", "finish"):
        operator, launcher = getattr(kernels, name), sys.modules[f"rollflow.kernels.{name}"]

        def run(*arguments, name=name, operator=operator, launcher=launcher):
            made = operator(*arguments)
            with recorded() as launches:
                if name == "propose":
                    launcher.launch_propose(*arguments[:-1], made)
                else:
                    launcher.launch_finish(*arguments[:5], *arguments[7:-1], made)
            found.setdefault(name, set()).add(launches[0].variant)
            return made

        monkeypatch.setattr(kernels, name, run)
    known = {launch.variant for launch in aot.launches().values()}
    requests = [
        Request("two red circles", method="rbf", nfe=6, steps=3, reward=brightness, seed=seed) for seed in (0, 1)
    ]
    Engine(model, buckets=(4,), lanes=1).generate(requests)
    assert len(found["finish"]) == 1, "images of searches are finished by another variant than evaluations"
    monkeypatch.setattr(model, "capabilities", Capabilities(**{**vars(model.capabilities), "rounded": False}))
    Engine(model, buckets=(4,), lanes=1).generate(requests)
    assert len(found["finish"]) == len(found["propose"]) == 2
    assert set.union(*found.values()) <= known
