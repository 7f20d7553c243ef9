"""The engine's device hot path: fused operators with one contract on CPU (torch) and CUDA (Triton).

`propose` steps parents to children and writes the model's input, `finish` and `finish_flat` keep the model's output and
form the decoder's input, of patches and of elements in order, `noise` is the counter-based noise that `propose` draws.
"""

from importlib import import_module
from importlib.util import find_spec

if find_spec("triton") is not None:  # a machine without a GPU may do without
    for _name in ("noise", "propose", "finish", "finish_flat"):
        import_module(f"{__name__}.{_name}")  # registers the CUDA implementation

# After the submodules of the same names: here and ever after, these names are the functions.
from .operators import finish, finish_flat, noise, propose

__all__ = ["finish", "finish_flat", "noise", "propose"]
