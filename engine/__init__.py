"""rollflow: a sampler engine for inference-time scaling of flow models.

```python
engine = rollflow.Engine.from_pretrained("shapes")
result = engine.generate("two red circles", nfe=100)
result.image.save("two-red-circles.png")
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rollflow.errors import (
    BudgetError,
    Cancelled,
    EngineBusy,
    EngineClosed,
    EngineDead,
    FunctionError,
    ModelError,
    OutOfTime,
    RequestError,
    RewardUnavailable,
    RollflowError,
)

if TYPE_CHECKING:
    from rollflow.calls import Progress as Progress
    from rollflow.draw import Draw as Draw
    from rollflow.engine import Engine as Engine
    from rollflow.job import Job as Job
    from rollflow.job import Update as Update
    from rollflow.request import Record as Record
    from rollflow.request import Request as Request
    from rollflow.request import Result as Result
    from rollflow.search.particle import Particle as Particle
    from rollflow.stats import Stats as Stats

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "Cancelled",
    "Draw",
    "Engine",
    "EngineBusy",
    "EngineClosed",
    "EngineDead",
    "FunctionError",
    "Job",
    "ModelError",
    "OutOfTime",
    "Particle",
    "Progress",
    "Record",
    "Request",
    "RequestError",
    "Result",
    "RewardUnavailable",
    "RollflowError",
    "Stats",
    "Update",
]

_LAZY = {
    "Draw": "draw",
    "Engine": "engine",
    "Job": "job",
    "Particle": "search.particle",
    "Progress": "calls",
    "Record": "request",
    "Request": "request",
    "Result": "request",
    "Stats": "stats",
    "Update": "job",
}
_MODULES = {"draw", "engine", "interpolant", "kernels", "methods", "models", "rewards", "sde"}


def __getattr__(name: str) -> Any:
    """Imports what needs torch and diffusers when it is first used: the mathematics alone loads in an instant."""
    if name in _LAZY:
        return getattr(import_module(f"rollflow.{_LAZY[name]}"), name)
    if name in _MODULES:
        return import_module(f"rollflow.{name}")
    raise AttributeError(f"module 'rollflow' has no attribute {name!r}")
