"""How kernels are launched: elements and warps of a program, and which variant of a kernel is compiled for that."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of a row each, read one at a time: their alignment, which follows the batch's size, is nothing to compile anew for.
TABLES = ("parent", "child", "slot", "coefficients", "seed", "key")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}

BLOCKS = (128, 256, 512, 2048)  # elements of a row that a program may take
FEW = 2**21  # elements of a batch: 8 rows of FLUX at 1024 x 1024 pixels


def block_of(rows: int, elements: int) -> int:
    """How many elements of a row a program takes, one of `BLOCKS`.

    16 elements a thread share the cost of the indices and have many loads in flight. A small batch is better spread
    over the multiprocessors, 4 a thread, and programs of a small row should not be larger than the row.
    """
    if rows * elements > FEW and elements > BLOCKS[-2]:
        return BLOCKS[-1]
    return next((block for block in BLOCKS[:-2] if elements <= block), BLOCKS[-2])


def warps_of(block: int) -> int:
    """Warps of a program of so many elements, each thread with at least four."""
    return max(1, min(4, block // 128))


@dataclass(frozen=True)
class Variant:
    """What Triton compiles a kernel for; launches of equal variants share a binary.

    Attributes:
        kernel: its name.
        types: of the arguments, in order: "*bf16", "i32" or "constexpr".
        constants: those of the kernel, and integers that are 1.
        aligned: arguments that are multiples of 16, addresses in bytes.
        warps: of a program.
    """

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int

    def compiled(self, kernel: Any, target: int) -> Any:
        """The kernel, compiled for a compute capability (times ten)."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = [name for name, _ in self.types]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(kernel, dict(self.types), constexprs=dict(self.constants), attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", target, 32), options=_options(self.warps))


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded: the kernel, its variant, and how many programs run."""

    kernel: Any
    variant: Variant
    grid: tuple[int, ...]


_recording: ContextVar[list[Launch] | None] = ContextVar("recording", default=None)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside run nothing and are collected: tensors may be of any device, or "meta"."""
    found: list[Launch] = []
    token = _recording.set(found)
    try:
        yield found
    finally:
        _recording.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Tensor | int],
    constants: Mapping[str, Any],
    warps: int,
    plain: tuple[str, ...] = (),
) -> None:
    """Runs a kernel on the device of its first argument.

    Args:
        kernel: a Triton function.
        grid: programs along each side.
        arguments: by name, in order.
        constants: what it is compiled for.
        warps: of a program.
        plain: integers that it does not specialise.
    """
    if (found := _recording.get()) is not None:
        found.append(Launch(kernel, _variant(kernel, arguments, constants, warps, plain), grid))
        return
    first = next(iter(arguments.values()))
    assert isinstance(first, Tensor)
    with torch.cuda.device_of(first):
        kernel[grid](*arguments.values(), **constants, **_options(warps))


def _variant(
    kernel: Any, arguments: Mapping[str, Tensor | int], constants: Mapping[str, Any], warps: int, plain: tuple[str, ...]
) -> Variant:
    types, known, aligned = [], dict(constants), []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            types.append((name, f"*{TYPES[value.dtype]}"))
            one, divisible = False, name not in TABLES
        else:
            one, divisible = value == 1 and name not in plain, value % 16 == 0 and name not in plain
            types.append((name, "constexpr" if one else "i32"))
        if one:
            known[name] = 1
        elif divisible:
            aligned.append(name)
    types += [(name, "constexpr") for name in constants]
    return Variant(kernel.__name__, tuple(types), tuple(known.items()), tuple(aligned), warps)


def _options(warps: int) -> dict[str, Any]:
    """What a kernel is compiled with. Fused multiply-adds are asked for by name: Triton's default changes in 3.10."""
    return {"num_warps": warps, "enable_fp_fusion": True}
