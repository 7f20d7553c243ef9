"""What commands have in common: how to search, and what to run it on."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import rollflow
from rollflow.errors import RequestError, said, shown
from rollflow.names import check_model

if TYPE_CHECKING:
    import torch

    from rollflow.engine import Engine
    from rollflow.request import Request

    class MethodOptions:
        """A field for each option that any method has; it is made when the command line is."""

else:
    from rollflow.cli.method_options import method_options

    MethodOptions = method_options()

DTYPES = ("float32", "bfloat16", "float16", "auto")


def _one_of(module: str, attribute: str, what: str = "one of", metavar: str = "NAME") -> object:
    """A help text that ends with the names that the code knows, looked up when it is printed."""

    def hint(default: str) -> str:
        names = getattr(importlib.import_module(module), attribute)
        usual = "what suits the method" if default == "None" else default
        return f"({what}: {', '.join(names() if callable(names) else names)}; default: {usual})"

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


def by_default(what: str, **options: Any) -> object:
    """A help text that ends with what None stands for."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {what})", **options)


def grids() -> tuple[str, ...]:
    """The kinds of time grids, with that of the model's own sampler."""
    from rollflow import sde

    return (*sde.GRIDS, "model")


Reward = Annotated[str, _one_of("rollflow.rewards", "names", "built in", "NAME|FILE.py:NAME")]
Judge = Annotated[str | None, by_default("none", metavar="NAME|FILE.py:NAME")]
HeldOut = Annotated[str | None, by_default("what the reward names, if anything", metavar="NAME|FILE.py:NAME")]
Method = Annotated[str, _one_of("rollflow.methods", "names")]
Interpolant = Annotated[str | None, _one_of("rollflow.interpolant", "_NAMED")]
Grid = Annotated[str | None, _one_of("rollflow.cli.options", "grids")]
Steps = Annotated[int | None, by_default("what suits the method and the model")]
Diffusion = Annotated[float | None, by_default("what suits the method")]
Solver = Annotated[str, _one_of("rollflow.sde", "SOLVERS")]
Finalists = Annotated[int | None, by_default("2 without a finish, 1 with one")]
Budget = Annotated[int | None, by_default("100, or what the seconds pay for")]
Seconds = Annotated[float | None, by_default("until the budget is spent")]
StopAt = Annotated[float | None, by_default("none")]
Guidance = Annotated[float | None, by_default("the model's own")]
Negative = Annotated[str | None, by_default("the model's own, mostly the empty text")]
Start = Annotated[Path | None, by_default("noise alone", metavar="FILE")]
Strength = Annotated[float | None, by_default("0.6, of a search that starts from an image")]
Mask = Annotated[Path | None, by_default("everywhere", metavar="FILE")]
Size = Annotated[int | None, by_default("the model's own")]
File = Annotated[Path | None, by_default("none", metavar="FILE")]
Model = Annotated[str, _one_of("rollflow.names", "BUILT_IN", "built in", "NAME|FOLDER|ID|FILE")]
Pipeline = Annotated[str | None, by_default("what the model's folder says", metavar="CLASS")]
Device = Annotated[str | None, by_default("cuda where there is one, else cpu", metavar="NAME")]
Dtype = Annotated[str | None, by_default("bfloat16 on cuda, float32 elsewhere", metavar="|".join(DTYPES))]
CompileMode = Annotated[str | None, by_default("no compilation", metavar="regional|all")]


@dataclass(frozen=True)
class SearchOptions:
    """How to search: the fields of `rollflow.Request`, with its defaults."""

    reward: Reward = "count"
    """What an image is judged by: a name, an expression such as "0.7*vqa + 0.3*aesthetic" (see `rollflow rewards`), or
    a function of images and prompts, FILE.py:NAME or MODULE:NAME."""
    held_out: HeldOut = None
    """A second judge, of the final image alone, which no search sees."""
    method: Method = "sprout"
    """The search."""
    nfe: Budget = None
    """Budget: function evaluations for each prompt, finish included."""
    seconds: Seconds = None
    """Time for each prompt: when it is up, the best so far is finished."""
    steps: Steps = None
    """Points of the time grid that are evaluated."""
    interpolant: Interpolant = None
    """The path that the particles follow."""
    seed: int = 0
    """Seed of all noise."""
    grid: Grid = None
    """Kind of time grid; "model" is that of the model's own sampler."""
    shift: float = 3.0
    """Shift of the grid "shifted"."""
    diffusion: Diffusion = None
    """Scale s of the noise g(t) = s t^2; 0 is the ODE, under which methods that branch cannot work."""
    solver: Solver = "euler"
    """How a step is taken."""
    finish: int = 0
    """Deterministic steps from the chosen particle towards the image, paid out of the budget."""
    finalists: Finalists = None
    """Particles that compete in the end, each finished: the method's choice and the best others that it judged."""
    stop_at: StopAt = None
    """A reward that is good enough: the first particle that reaches it ends the search."""
    judge_all: bool = False
    """Judge particles on whose rewards nothing depends, too."""
    cache: bool = False
    """Evaluate candidates by the transformer's first block and what the others added to their parent; what the search
    goes on from and returns is evaluated in full, too."""
    guidance: Guidance = None
    """Guidance scale: of classifier-free guidance, or the embedded one of guidance-distilled models (FLUX.1-dev)."""
    negative: Negative = None
    """What classifier-free guidance leads away from, where the model has it."""
    image: Start = None
    """An image, or for a clip a GIF, that the search starts from."""
    strength: Strength = None
    """How much of it is replaced, above 0 to 1."""
    mask: Mask = None
    """An image that is white where it is drawn anew; the rest stays as it was."""
    height: Size = None
    """Image height in pixels."""
    width: Size = None
    """Image width in pixels."""
    frames: Size = None
    """Frames of a clip, of a model of video."""
    own: MethodOptions = field(default_factory=lambda: MethodOptions())

    def request(self, prompt: str) -> Request:
        """The request for one prompt.

        Raises:
            RequestError: a reward or an image that cannot be loaded.
        """
        from rollflow.request import Request
        from rollflow.rewards.own import reward_of

        given = {f.name: getattr(self, f.name) for f in fields(self)}
        own = vars(given.pop("own"))
        given["reward"] = reward_of(self.reward)
        given["held_out"] = None if self.held_out is None else reward_of(self.held_out)
        for name, file in (("image", self.image), ("mask", self.mask)):
            given[name] = None if file is None else _picture(file)
        return Request(prompt, **given, options={name: value for name, value in own.items() if value is not None})


def _picture(path: Path) -> Any:
    """An image, or the frames of what moves."""
    from PIL import Image, ImageSequence

    try:
        with Image.open(path) as image:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    except (OSError, ValueError) as error:
        raise RequestError(f"the image {shown(str(path))} cannot be read ({said(error)})") from error
    return frames[0] if len(frames) == 1 else frames


@dataclass(frozen=True)
class Place:
    """Which model, where, and in which precision."""

    model: Model = "shapes"
    """A built-in model, a folder that save_pretrained of a diffusers pipeline wrote, a hub id, or a .safetensors file
    with --pipeline."""
    pipeline: Pipeline = None
    """The pipeline's class in diffusers, which a single file does not say of itself."""
    device: Device = None
    """Where to run: cpu, cuda, cuda:1, ..."""
    dtype: Dtype = None
    """Precision of the networks ("auto": the faster of float32 and bfloat16); particles are float32 always."""

    def check(self) -> None:
        """Refuses the name of a model that can be none, before anything that takes seconds is imported."""
        check_model(self.model)

    def chosen(self) -> tuple[torch.device | None, Any]:
        """The device and the dtype as torch has them, None where they were left open; "auto" stays as it is.

        Raises:
            RequestError: there is no such device or dtype.
        """
        import torch

        if self.dtype is not None and self.dtype not in DTYPES:
            raise RequestError(f"unknown dtype {shown(self.dtype)}: choose one of {', '.join(DTYPES)}")
        try:
            device = None if self.device is None else torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without CUDA asserts
            raise RequestError(
                f"device {shown(self.device)}: choose cpu, or cuda or cuda:N where torch finds one"
            ) from error
        from rollflow.models import silence

        silence()
        return device, self.dtype if self.dtype in (None, "auto") else getattr(torch, self.dtype)

    def placed(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype, with the defaults.

        Raises:
            RequestError: there is no such device or dtype, or it is "auto", which is measured by an engine.
        """
        import torch

        from rollflow.settings import on_device

        device, dtype = self.chosen()
        if dtype == "auto":
            raise RequestError("dtype='auto': it is measured when an engine is made; choose float32 or bfloat16 here")
        device = on_device(device)
        return device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


@dataclass(frozen=True)
class ModelOptions(Place):
    """What to run it on."""

    preview: bool = False
    """Judge particles by the model's light decoder, and decode in full only those that compete in the end."""
    reproducible: bool = False
    """One batch size, always padded: the same image, bit for bit, under any load on this device."""
    compile: CompileMode = None
    """Compile the transformer's repeated blocks; all: also the decoders, of a FluxPipeline."""

    def load(self, **options: Any) -> Engine:
        """An engine on this model, with these options of `Engine`.

        Raises:
            RollflowError: there is no such model, device or dtype.
        """
        device, dtype = self.chosen()
        return rollflow.Engine.from_pretrained(
            self.model, device, dtype, preview=self.preview, compile=self.compile, pipeline=self.pipeline,
            reproducible=self.reproducible, **options,
        )  # fmt: skip
