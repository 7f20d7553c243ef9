"""How kernels are launched: elements and warps of a program, and what they are compiled with."""

from typing import Any

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


def options(warps: int) -> dict[str, Any]:
    """What a kernel is compiled with. Fused multiply-adds are asked for by name: Triton's default changes in 3.10."""
    return {"num_warps": warps, "enable_fp_fusion": True}
