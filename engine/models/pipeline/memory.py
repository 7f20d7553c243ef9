"""What was learned of pipelines in this process: a second engine on the same parts need not learn it again.

Nothing of it is kept on disk. A size takes 5 to 17 forwards of the network, of 7 to 20 rows together, and in 16 bits 7
to 19, of 13 to 31 rows, counted on the tiny pipelines of the tests: Flux 5, Stable Diffusion 3 and LTX 9, Wan 12. All
else is done by stand-ins. That is about what an image of ten guided steps takes: a file would save little, and a
comparison with the pipeline that was not run on these very weights proves nothing of them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import diffusers
from torch import nn

from rollflow.models import Geometry
from rollflow.models.loaded import loaded
from rollflow.models.pipeline.decoding import Decoding
from rollflow.models.pipeline.drive import Driver
from rollflow.models.pipeline.families import Family
from rollflow.models.pipeline.replay import Replay


@dataclass(frozen=True)
class Space:
    """What was learned for one size.

    Attributes:
        geometry: the size.
        replay: evaluates the network.
        decoding: how states are decoded.
        errors: by what the replay differs from the pipeline, by what was compared.
    """

    geometry: Geometry
    replay: Replay
    decoding: Decoding
    errors: dict[str, float]

    def kept(self) -> Callable[[Driver], Space]:
        """Makes the same for a driver of the same pipeline; holds nothing of this one's pipeline."""
        geometry, decoding, errors, learned = self.geometry, self.decoding, self.errors, self.replay.learned
        exact, texts = self.replay.exact, (self.replay.ragged, self.replay.masks, self.replay.grouped)

        def again(driver: Driver) -> Space:
            made = Replay(learned, driver, exact)
            made.ragged, made.masks, made.grouped = texts
            return Space(geometry, made, decoding, errors)

        return again


_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Callable[[Driver], Space]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def known(network: nn.Module) -> dict[Hashable, Callable[[Driver], Space]]:
    """What was learned of pipelines with a network, by `key`; see `Space.kept`."""
    with _lock:
        return _known.setdefault(network, {})


def key(pipeline: Any, family: Family, *asked: Hashable) -> Hashable:
    """Tells pipelines apart: by class, version of diffusers, the very networks, configurations and plain attributes.

    The same networks are others with LoRA, quantized or compiled, see `rollflow.models.loaded`.

    Raises:
        ModelError: an engine cannot work with it as it is by now.
    """
    parts: list[Hashable] = []
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, nn.Module):
            own = next(part.parameters(), None)
            parts.append((name, weakref.ref(part), None if own is None else (str(own.dtype), str(own.device))))
        else:
            config = vars(part) if name.endswith("guider") and part is not None else getattr(part, "config", None)
            parts.append((name, type(part), repr(config)))
    plain = {
        name: value
        for name, value in vars(pipeline).items()
        if isinstance(value, bool | int | float | str | list | tuple | dict) and not name.startswith("_")
    }
    return (
        type(pipeline),
        diffusers.__version__,
        repr(family),
        tuple(parts),
        repr(dict(pipeline.config)),
        repr(plain),
        loaded(pipeline),
        asked,
    )
