"""The order of what a GPU does for batches: which stream each part of a batch runs on, and what waits for what.

Proposals, forwards and finishes follow one another on the lane's own stream. Decoders run beside them on a second, and
rewards on a third. Those two go first where kernels compete for the device: the small kernels of a reward would queue
behind the large ones of a forward, and its search waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

FIRST = -1  # the higher of the two priorities that torch knows


class Streams:
    """The streams of a device. A CPU has none: each thread does its work in order.

    Args:
        device: where batches run.

    Attributes:
        side: decoding; None on a CPU.
        judging: rewards; None on a CPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.side: Any = None
        self.judging: Any = None
        if device.type == "cuda":
            self.side, self.judging = (torch.cuda.Stream(device, priority=FIRST) for _ in range(2))

    def mark(self) -> Any:
        """What the current stream was asked so far, for `after`."""
        return None if self.side is None else self._event(torch.cuda.current_stream(self._device))

    def after(self, mark: Any) -> None:
        """Has what the current stream is asked from now on wait for a mark; no thread waits."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def beside(self, *used: Tensor) -> AbstractContextManager[Any]:
        """Inside of it, the stream of decoding is the current one; it waits for those who make the tensors it uses."""
        if self.side is None:
            return nullcontext()
        if used:
            self.side.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in used:
            tensor.record_stream(self.side)  # or its memory might be somebody else's before it is read
        return torch.cuda.stream(self.side)

    def to_judges(self, images: Tensor) -> Callable[[], None] | None:
        """Lets rewards use what was decoded; returns what waits for it, on any thread, or None where it is there.

        A thread waits here, and not only a stream: a reward may hand its images to threads and streams of its own.
        """
        if self.side is None:
            return None
        images.record_stream(self.judging)
        return self._event(self.side).synchronize

    def _event(self, stream: Any) -> Any:
        event = torch.cuda.Event(blocking=True)  # a thread that waits leaves its core to others
        event.record(stream)
        return event
