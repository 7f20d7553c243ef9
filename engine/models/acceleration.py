"""Makes a transformer faster by what libraries provide: compiled blocks, 8-bit weights, a pinned attention kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rollflow.errors import ModelError, RequestError, shown

COMPILE = ("regional",)
QUANTIZE = ("fp8",)
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# What a GPU may choose from where nothing is pinned. cuDNN's is left out: its versions 9.13 and 9.14 fault under CUDA
# graphs for keys longer than 1024 (TransformerEngine #2344).
_USUAL = [ATTENTION["flash"], ATTENTION["efficient"], ATTENTION["math"]]
_RECOMPILES = 64  # batch sizes times kinds of block; torch gives up at 8


def compile_blocks(transformer: nn.Module, how: str | None) -> None:
    """Compiles the blocks that a diffusers transformer repeats, each kind once for each batch size.

    Raises:
        RequestError: an unknown `how`.
        ModelError: the transformer does not say which blocks it repeats.
    """
    if how is None:
        return
    if not isinstance(how, str) or how not in COMPILE:
        raise RequestError(f"compile={shown(how)}: choose {', '.join(COMPILE)}, or None for no compilation")
    if not getattr(transformer, "_repeated_blocks", None):
        raise ModelError(f"compile={shown(how)}: a {type(transformer).__name__} does not say which blocks it repeats")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILES)
    repeated: Any = transformer  # diffusers' own method
    repeated.compile_repeated_blocks(fullgraph=True, dynamic=False)


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


def check_attention(backend: str | None) -> None:
    """Raises `RequestError` for an unknown backend."""
    if backend is not None and (not isinstance(backend, str) or backend not in ATTENTION):
        raise RequestError(f"attention={shown(backend)}: choose one of {', '.join(ATTENTION)}, or None")


def attention(backend: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """Within it, a GPU's attention runs on this backend; without one, on any that CUDA graphs can hold."""
    if device.type != "cuda":  # torch's switches are the process's, and lanes of a CPU would get into each other's way
        return nullcontext()
    return sdpa_kernel(_USUAL if backend is None else ATTENTION[backend])
