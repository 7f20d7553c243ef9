"""Copies between the host and a GPU that make no thread wait for the GPU: by pinned memory, in the order of a stream.

A copy from or to memory that is not pinned makes the host wait for all that the stream was asked before. Pinned memory
need not be held until such a copy is over: torch's allocator of it hands a block out again only when the copies that
torch started are over, which it knows by an event for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, in the order of the current stream; on a CPU the tensor itself."""
    return value if device.type == "cpu" else value.pin_memory().to(device, non_blocking=True)


class Download:
    """Tensors of one device on their way to the host, in the order of the device's current stream.

    Args:
        tensors: on a GPU or a CPU, where there is nothing to wait for.
    """

    def __init__(self, *tensors: Tensor):
        self._done: Any = None
        if not tensors[0].is_cuda:
            self._host = tuple(tensor.cpu() for tensor in tensors)
            return
        pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        self._host = tuple(host.copy_(tensor, non_blocking=True) for host, tensor in zip(pinned, tensors, strict=True))
        self._done = torch.cuda.Event(blocking=True)  # the thread that waits leaves its core to others
        self._done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the CPU, once they are there; of any thread, any number of times."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
