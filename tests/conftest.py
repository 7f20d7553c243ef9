"""What holds for every test: no network, two threads, Triton's interpreter where there is no CUDA device."""

import os
import sys

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch

# rollflow itself must not be imported here: jaxtyping's hook (addopts) is to see every import of it. It is set by now.

if "triton" in sys.modules:
    raise RuntimeError("triton was imported before conftest.py could choose its interpreter")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before triton is imported

torch.set_num_threads(2)

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
