"""The size that a model takes where none is asked for: told before it is run there."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from rollflow.errors import ModelError
from rollflow.models.pipeline import PipelineModel
from rollflow.models.pipeline.recording import Call, Over, Script
from rollflow.models.text import Size, Text

LARGE = 512 * 512  # pixels of all frames, beyond which a CPU takes its time
PROMPT = "a cat"


def tell(model: Any, asked: Size, own: Size | None = None) -> None:
    """Prints one line that says which size is taken and what chooses another, unless all of it is asked for.

    Args:
        model: a `rollflow.models.FlowModel` of a pipeline.
        asked: what the command line asks for.
        own: of a built-in model, what it takes in place of its pipeline's own.

    Raises:
        RequestError: the model does not make it.
    """
    fields = Size._fields if model.capabilities.frames else Size._fields[:2]
    left = [name for name in fields if getattr(asked, name) is None]
    if not left:
        return
    whole, options = len(left) == len(fields), _listed([f"--{name}" for name in left])
    choose = f"{options} {'choose' if len(left) > 1 else 'chooses'} another"
    found = taken(model, Size(*(mine if one is None else one for one, mine in zip(asked, own or Size(), strict=True))))
    if found is None:
        print(f"the {_listed(left)} of what is made: the model's own; {choose}", flush=True)
        return
    clip = f", {found.frames} frames" if model.capabilities.frames else ""
    mine = "the model's own size" if whole else f"its {_listed(left)} the model's own"
    pixels = (found.height or 0) * (found.width or 0) * (found.frames or 1)
    slow = "; on a CPU this may take minutes" if model.device.type == "cpu" and pixels > LARGE else ""
    print(f"{found.height}x{found.width}{clip} is taken, {mine}: {choose}{slow}", flush=True)


def taken(model: Any, asked: Size) -> Size | None:
    """The size that a model makes of what is asked; None where it cannot be told without learning the model.

    A pipeline is run up to the first call of its network, where its `__call__` has filled in what was left out.

    Raises:
        RequestError: the model does not make it.
    """
    try:
        if not isinstance(model, PipelineModel):
            geometry = model.geometry(asked.height, asked.width)
            return Size(geometry.height, geometry.width)
        found: list[Size] = []

        def reached(call: Call) -> NoReturn:
            found.append(_of_running(type(model.pipeline)))
            raise Over

        model.driver.run([Text(PROMPT)], asked, None, Script(outputs=reached))
    except ModelError:  # it is told when the model is learned
        return None
    size = found[0] if found else Size()
    return None if None in size[:2] or (model.capabilities.frames and size.frames is None) else size


def _of_running(pipeline: type) -> Size:
    """The size in the pipeline's `__call__` that runs now: its variables of these names."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame, names = caller, caller.f_locals
        if caller.f_code.co_name == "__call__" and isinstance(names.get("self"), pipeline):
            given = (names.get("height"), names.get("width"), names.get("num_frames", names.get("frames")))
            return Size(*(one if isinstance(one, int) else None for one in given))
    return Size()


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
