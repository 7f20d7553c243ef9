"""Counts the floating-point operations of any work, by torch's counter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops(work: Callable[[], object], device: torch.device) -> int:
    """Floating-point operations of what work does: matrix products, convolutions and attention, two for each product of
    numbers that are added up.

    Args:
        work: is run once; on the device "meta" it computes nothing.
        device: where.
    """
    # The counter knows the matrix products, and of attention's own kernels those of a GPU.
    plain = nullcontext() if device.type == "cuda" else sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
