"""Makes networks faster by what libraries provide: compiled blocks and decoders, 8-bit weights."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from rollflow.errors import ModelError, RequestError, shown

Backend = str | Callable[..., Any]
COMPILE = ("regional", "all")
QUANTIZE = ("fp8",)
_RECOMPILES = 512  # of a function: batch sizes, times image sizes, times what else it is guarded by; torch's is 8


def compile_blocks(transformer: nn.Module, how: str | None, backend: Backend = "inductor") -> None:
    """Compiles the blocks that a diffusers transformer repeats, each kind once for each batch size.

    Raises:
        RequestError: an unknown `how`.
        ModelError: the transformer does not say which blocks it repeats.
    """
    if not _compiles(how):
        return
    if not getattr(transformer, "_repeated_blocks", None):
        raise ModelError(f"compile={shown(how)}: a {type(transformer).__name__} does not say which blocks it repeats")
    repeated: Any = transformer  # diffusers' own method
    repeated.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    allow_recompiles()


def compile_decoder(autoencoder: nn.Module, how: str | None, backend: Backend = "inductor") -> None:
    """Compiles an autoencoder's decoder, where `how` is "all": a normalisation and its activation become one kernel.

    Once for one image and once for any number of them. Without CUDA graphs of its own: it runs beside the replays of
    the transformer's, so that it could not share their memory, and its kernels are long where its time matters.

    Raises:
        RequestError: an unknown `how`.
    """
    if _compiles(how) and how == "all":
        whole: Any = autoencoder
        whole.decoder.compile(backend=backend)
        allow_recompiles()


def _compiles(how: str | None) -> bool:
    if how is not None and (not isinstance(how, str) or how not in COMPILE):
        raise RequestError(f"compile={shown(how)}: choose {' or '.join(COMPILE)}, or None for no compilation")
    return how is not None


def allow_recompiles() -> None:
    """Lets this thread compile a function for as many batch sizes as there may be.

    Torch's setting for that is a thread's own (of 2.13; of the process in earlier versions), so that each that runs
    batches has to call this. Where nothing was compiled it does nothing: torch's compiler takes seconds to import.
    """
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        for limit, least in (("recompile_limit", _RECOMPILES), ("accumulated_recompile_limit", 4 * _RECOMPILES)):
            setattr(dynamo.config, limit, max(getattr(dynamo.config, limit), least))


class _Eager:
    """Torch's stance, which is the process's: the first of those who want it eager sets it, the last resets it."""

    def __init__(self) -> None:
        self._lock, self._holders = threading.Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._holders += 1
            if self._holders == 1:
                self._stance = torch.compiler.set_stance("force_eager")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._stance.__exit__(None, None, None)


_EAGER = _Eager()


def eagerly() -> AbstractContextManager[None]:
    """Within it nothing is compiled, and what was runs as if it were not; in all threads, as the switch is torch's."""
    return _EAGER if "torch._dynamo" in sys.modules else nullcontext()


def quantize(transformer: nn.Module, how: str | None) -> None:
    """Stores weights in 8-bit floats and multiplies by them, with activations scaled as they come (torchao).

    Raises:
        RequestError: an unknown `how`.
        ModelError: torchao is not installed, or the transformer is not on a GPU that multiplies 8-bit floats.
    """
    if how is None:
        return
    if not isinstance(how, str) or how not in QUANTIZE:
        raise RequestError(f"quantize={shown(how)}: choose {', '.join(QUANTIZE)}, or None for the weights as they are")
    device = next(transformer.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ModelError(
            f"quantize={shown(how)}: it takes a GPU of compute capability 8.9 or later, and this is {device}"
        )
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_
    except ImportError as error:
        raise ModelError(
            f"quantize={shown(how)}: it takes torchao, which is not installed: pip install torchao"
        ) from error
    matrices = block_matrices(transformer)
    if not matrices:
        raise ModelError(f"quantize={shown(how)}: a {type(transformer).__name__} has no blocks with large matrices")
    quantize_(transformer, Float8DynamicActivationFloat8WeightConfig(), lambda module, name: name in matrices)


def block_matrices(transformer: nn.Module) -> set[str]:
    """The names of the large matrices: those of the blocks that it repeats, whose sides are multiples of 16."""
    repeated = getattr(transformer, "_repeated_blocks", None) or ()
    found: set[str] = set()
    for name, block in transformer.named_modules():
        if type(block).__name__ in repeated:
            for inner, module in block.named_modules(prefix=name):
                if isinstance(module, nn.Linear) and all(side % 16 == 0 for side in module.weight.shape):
                    found.add(inner)
    return found
