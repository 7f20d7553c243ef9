"""Latents as images: the model's decoders, in CUDA graphs where launching their kernels takes longer than they do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.device.cuda_graphs import Capture, Graphs
from rollflow.errors import ModelError

Decode = Callable[[Tensor], Tensor]

# Pixels of a batch up to which its decoding is captured. A decoder of 64 x 64 pixels took an H100 4 to 5 ms eagerly,
# whatever the batch, and 0.5 ms for one image or 1.2 ms for 64 in a graph; of 1024 x 1024 pixels the kernels take ten
# times as long as their launches, and a graph would hold gigabytes for nothing.
GRAPHED_PIXELS = 2**19


class Decoder:
    """Decodes batches of one geometry.

    Replays copy to static memory: they belong to one thread and to one stream, as those of `Graphs` do.

    Args:
        full: from latents to images in [0, 1].
        light: the same, by a decoder for previews; None where there is none.
        pixels: of an image.

    Attributes:
        total: bytes of device memory of the graphs.
    """

    def __init__(self, full: Decode, light: Decode | None, pixels: int):
        self._eager, self._pixels = {False: full, True: light}, pixels
        self._graphs: dict[bool, Graphs] = {}  # by whether it is the light decoder

    @property
    def total(self) -> int:
        return sum(graphs.total for graphs in [*self._graphs.values()])

    def record(
        self,
        light: bool,
        latents: Mapping[int, Tensor],
        capture: Capture | None = None,
    ) -> None:
        """Captures the decoding of those batches whose launches would take longer than their kernels.

        Args:
            light: whether by the light decoder.
            latents: of a batch of each size.
            capture: see `Graphs`.
        """
        small = [bucket for bucket in latents if self.pays(bucket)]
        graphs = Graphs(self._decode(light), capture, ("latents",), rows=0)
        try:
            graphs.record(small, lambda bucket: (latents[bucket],))
        except ModelError as error:
            with suppress(RuntimeWarning):  # where warnings are errors, this thread is nobody's to raise it to
                warnings.warn(f"the decoder runs without CUDA graphs: {error}", RuntimeWarning, stacklevel=2)
        else:
            self._graphs[light] = graphs

    def pays(self, bucket: int) -> bool:
        """Whether batches of this size are captured."""
        return bucket * self._pixels <= GRAPHED_PIXELS

    def __call__(self, latents: Float[Tensor, "bucket ..."], light: bool) -> Float[Tensor, "bucket ..."]:
        """Images in [0, 1]; by a replay on the current stream where one was captured and no gradients are wanted."""
        graphs = self._graphs.get(light)
        if graphs is None or torch.is_grad_enabled() or len(latents) not in graphs:
            return self._decode(light)(latents)
        return graphs.run(latents)

    def _decode(self, light: bool) -> Decode:
        decode = self._eager[light]
        assert decode is not None, "previews are asked for only where they are declared"
        return decode
