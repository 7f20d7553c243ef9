"""Pins the attention of a FLUX transformer to one of torch's kernels.

`torch.nn.attention.sdpa_kernel`, and with it `set_attention_backend` of diffusers, turns switches of the process: while
one thread has a transformer on flash attention, a float32 reward on another finds no kernel. Here each attention layer
gets a processor that calls its kernel by name, and no switch is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from rollflow.errors import ModelError, RequestError, shown

# From queries, keys, values, and a mask that is added to the scores; all and the result [row, head, token, channel].
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
_CUDNN = 91501  # 9.15.1: 9.13 and 9.14 fault under CUDA graphs for keys longer than 1024 (TransformerEngine #2344)
_WITHOUT = "any but cuDNN"


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        raise ModelError("attention='flash': its kernel takes no mask; choose efficient, cudnn or math")
    if query.shape[-1] % 8:
        raise ModelError(
            f"attention='flash': its kernel takes heads of a multiple of 8, these have {query.shape[-1]}; choose math"
        )
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    again = torch.is_grad_enabled()  # whether a backward pass may want the sums
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, again)[0]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    again = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, mask, again)[0]


def _math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask)[0]


def _without_cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The first of torch's other kernels that can do it, in torch's order."""
    asked = SDPAParams(query, key, value, mask, 0.0, False, False)
    if can_use_flash_attention(asked) and query.shape[-1] % 8 == 0:  # torch would pad others
        return _flash(query, key, value, mask)
    return (_efficient if can_use_efficient_attention(asked) else _math)(query, key, value, mask)


ATTENTION: dict[str, Kernel] = {"flash": _flash, "efficient": _efficient, "cudnn": _cudnn, "math": _math}


class Pinned:
    """Processor of diffusers' `FluxAttention`, which attends by `kernel`: what `FluxAttnProcessor` computes.

    In a double block text and image have projections of their own and attend to all tokens, text first (Esser et al.
    2024, arXiv 2403.03206); in a single block they are one sequence.

    Attributes:
        name: of the kernel.
        plain: the processor that was there before.
        holders: how many asked for this one.
    """

    def __init__(self, name: str, kernel: Kernel, plain: FluxAttnProcessor):
        self.name, self.kernel, self.plain, self.holders = name, kernel, plain, 0

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Of tokens [row, token, width]: theirs, and in a double block (image, text)."""
        layer: Any = attn
        own = [layer.to_qkv] if layer.fused_projections else [layer.to_q, layer.to_k, layer.to_v]
        query, key, value = _heads(layer, hidden_states, own, layer.norm_q, layer.norm_k)
        if encoder_hidden_states is not None:
            added = [layer.add_q_proj, layer.add_k_proj, layer.add_v_proj]
            added = [layer.to_added_qkv] if layer.fused_projections else added
            text = _heads(layer, encoder_hidden_states, added, layer.norm_added_q, layer.norm_added_k)
            query, key, value = (torch.cat(both, 1) for both in zip(text, (query, key, value), strict=True))
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = self.kernel(query, key, value, attention_mask).transpose(1, 2).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return mixed
        of_text, of_image = mixed.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return layer.to_out[1](layer.to_out[0](of_image)), layer.to_add_out(of_text)


def _heads(
    layer: Any, tokens: Tensor, projections: Sequence[nn.Module], norm_q: nn.Module, norm_k: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [row, token, head, channel]; one projection may give all three side by side."""
    parts = [project(tokens) for project in projections]
    parts = list(parts[0].chunk(3, -1)) if len(parts) == 1 else parts
    query, key, value = (part.unflatten(-1, (-1, layer.head_dim)) for part in parts)
    return norm_q(query), norm_k(key), value


def check_attention(backend: str | None) -> None:
    """Raises `RequestError` for an unknown backend."""
    if backend is not None and (not isinstance(backend, str) or backend not in ATTENTION):
        raise RequestError(f"attention={shown(backend)}: choose one of {', '.join(ATTENTION)}, or None")


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


class Pin:
    """What `pin` did, to be undone once."""

    def __init__(self, layers: Sequence[Any]):
        self._layers = layers
        for layer in layers:
            layer.processor.holders += 1

    def remove(self) -> None:
        """Gives a layer its processor back when nobody else holds it pinned."""
        for layer in self._layers:
            layer.processor.holders -= 1
            if not layer.processor.holders:
                layer.set_processor(layer.processor.plain)
        self._layers = ()


def pin(transformer: nn.Module, backend: str | None, device: torch.device) -> list[Pin]:
    """Has a FLUX transformer on a GPU attend by one kernel, in all threads, until the pins are removed.

    Without a backend the choice is torch's, but for cuDNN below 9.15.1, which some versions of torch would take: then
    it is the first of the others that can do it. Layers with processors of others' making keep them. On a CPU nothing
    is pinned.

    Raises:
        ModelError: layers have processors of others' making, or are pinned to another kernel.
    """
    if not _on_gpu(device) or (backend is None and (torch.backends.cudnn.version() or _CUDNN) >= _CUDNN):
        return []
    name, kernel = (_WITHOUT, _without_cudnn) if backend is None else (backend, ATTENTION[backend])
    found: list[Any] = [module for module in transformer.modules() if isinstance(module, FluxAttention)]
    for layer in found:
        of = layer.processor
        if isinstance(of, Pinned) and backend is not None and of.name != backend:
            raise ModelError(
                f"attention={backend!r}: another engine has this transformer on {of.name}: close it first, ask for the "
                "same, or load the pipeline once more"
            )
        if not isinstance(of, Pinned) and type(of) is not FluxAttnProcessor and backend is not None:
            raise ModelError(
                f"attention={backend!r}: the transformer's attention has processors of its own "
                f"({type(of).__name__}), which choose for themselves; leave it out"
            )
    for layer in found:
        own = type(layer.processor) is FluxAttnProcessor
        if own and (backend is not None or layer.processor._attention_backend is None):
            layer.set_processor(Pinned(name, kernel, layer.processor))
    return [Pin([layer for layer in found if isinstance(layer.processor, Pinned)])]


@contextmanager
def pinned(transformer: nn.Module, backend: str | None = None) -> Iterator[None]:
    """Within it, a FLUX transformer attends as it does in an engine; see `pin`."""
    pins = pin(transformer, backend, next(transformer.parameters()).device)
    try:
        yield
    finally:
        for one in pins:
            one.remove()
