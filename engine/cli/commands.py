"""The command line: `rollflow generate | demo | study | bench`.

Commands are frozen dataclasses that tyro turns into parsers. What needs torch is imported when a command runs, so that
`rollflow --help` answers at once. Whatever a user can get wrong ends in one line and exit code 2.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import rollflow
from rollflow.errors import LONGEST, BudgetError, RequestError, RollflowError, line, shown

if TYPE_CHECKING:
    from rollflow.cli.output import Bar
    from rollflow.engine import Engine
    from rollflow.request import Request, Result

    class MethodOptions:
        """A field for each option that any method has; it is made when the command line is."""

else:
    from rollflow.cli.method_options import method_options

    MethodOptions = method_options()

DESCRIPTION = """Inference-time scaling of flow models: the best image for a prompt within a budget of function
evaluations (NFE).

`rollflow COMMAND --help` explains a command, `rollflow bench --help` lists the benchmarks, and `rollflow --version`
prints the version."""
DEMO_PROMPTS = (  # what the model's plain samples get wrong with seed 0
    "two blue circles, one red square and one yellow triangle",
    "show two green circles and four yellow triangles",
    "one green square and three red circles on a light canvas",
    "seven red circles",
)
BASE_STEPS = 10
DTYPES = ("float32", "bfloat16", "float16", "auto")


def _one_of(module: str, attribute: str, what: str = "one of", metavar: str = "NAME") -> object:
    """A help text that ends with the names that the code knows, looked up when it is printed."""

    def hint(default: str) -> str:
        names = getattr(import_module(module), attribute)
        usual = "what suits the method" if default == "None" else default
        return f"({what}: {', '.join(names() if callable(names) else names)}; default: {usual})"

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


def _by_default(what: str, **options: Any) -> object:
    """A help text that ends with what None stands for."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {what})", **options)


Reward = Annotated[str, _one_of("rollflow.rewards", "names")]
Method = Annotated[str, _one_of("rollflow.methods", "names")]
Interpolant = Annotated[str | None, _one_of("rollflow.interpolant", "_NAMED")]
Grid = Annotated[str | None, _one_of("rollflow.sde", "GRIDS")]
Steps = Annotated[int | None, _by_default("what suits the method and the model")]
Diffusion = Annotated[float | None, _by_default("what suits the method")]
Solver = Annotated[str, _one_of("rollflow.sde", "SOLVERS")]
Finalists = Annotated[int | None, _by_default("2 without a finish, 1 with one")]
Budget = Annotated[int | None, _by_default("100, or what the seconds pay for")]
Seconds = Annotated[float | None, _by_default("until the budget is spent")]
StopAt = Annotated[float | None, _by_default("none")]
Size = Annotated[int | None, _by_default("the model's own")]
Model = Annotated[str, _one_of("rollflow.models", "BUILT_IN", "built in", "NAME|FOLDER")]
Device = Annotated[str | None, _by_default("cuda where there is one, else cpu", metavar="NAME")]
Dtype = Annotated[str | None, _by_default("bfloat16 on cuda, float32 elsewhere", metavar="|".join(DTYPES))]
CompileMode = Annotated[str | None, _by_default("no compilation", metavar="regional")]
Prompts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...")]
Asked = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...", help_behavior_hint="(required)")]


@dataclass(frozen=True)
class SearchOptions:
    """How to search: the fields of `rollflow.Request`, with its defaults."""

    reward: Reward = "count"
    """What an image is judged by."""
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
    """Kind of time grid."""
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
    guidance: float = 3.5
    """Embedded guidance scale of guidance-distilled models (FLUX.1-dev); others ignore it."""
    height: Size = None
    """Image height in pixels."""
    width: Size = None
    """Image width in pixels."""
    own: MethodOptions = field(default_factory=lambda: MethodOptions())

    def request(self, prompt: str) -> Request:
        """The request for one prompt."""
        from rollflow.request import Request

        given = {f.name: getattr(self, f.name) for f in fields(self)}
        own = vars(given.pop("own"))
        return Request(prompt, **given, options={name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class ModelOptions:
    """What to run it on."""

    model: Model = "shapes"
    """A built-in model, a folder that FluxPipeline.save_pretrained wrote, or a hub id."""
    device: Device = None
    """Where to run: cpu, cuda, cuda:1, ..."""
    dtype: Dtype = None
    """Precision of the networks ("auto": the faster of float32 and bfloat16); particles are float32 always."""
    preview: bool = False
    """Judge particles by the model's light decoder, and decode in full only those that compete in the end."""
    reproducible: bool = False
    """One batch size, always padded: the same image, bit for bit, under any load on this device."""
    compile: CompileMode = None
    """Compile the transformer's repeated blocks."""

    def load(self) -> Engine:
        """An engine on this model; raises `RollflowError` where there is no such model, device or dtype."""
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
        dtype: Any = getattr(torch, self.dtype) if self.dtype not in (None, "auto") else self.dtype
        return rollflow.Engine.from_pretrained(
            self.model, device, dtype, preview=self.preview, compile=self.compile, reproducible=self.reproducible
        )


@dataclass(frozen=True)
class Generate:
    """Search for the best image of each prompt; write it and its history.

    Writes PROMPT-seedN.png and PROMPT-seedN.json for every prompt and overwrites files of these names. Prompts share
    the forwards of the model.
    """

    prompts: tyro.conf.Positional[Asked]
    """What the images should show, each prompt in quotes: "two red circles"."""
    out: Path = Path("out")
    """Folder for the images; made if it is not there."""
    search: SearchOptions = field(default_factory=SearchOptions)
    runtime: ModelOptions = field(default_factory=ModelOptions)

    def __call__(self) -> None:
        """Runs the command."""
        if not self.prompts:
            raise RequestError('give at least one prompt, in quotes: rollflow generate "two red circles"')
        from rollflow.cli import output

        requests = [self.search.request(prompt) for prompt in self.prompts]
        names = output.names(requests)
        results = _run(
            requests, self.runtime, self.out, [f"{name}.{kind}" for name in names for kind in ("png", "json")]
        )
        for name, result in zip(names, results, strict=True):
            image, record = self.out / f"{name}.png", self.out / f"{name}.json"
            result.image.save(image)
            content = {"model": self.runtime.model, **output.record(result)}
            record.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            print(f"{result.request.prompt}\n  {output.summary(result)}\n  {image}\n  {record}")


@dataclass(frozen=True)
class Demo:
    """Compare a plain sample with a search on a few prompts; write a picture of both.

    The plain sample is one path of the ODE. Writes demo.png.
    """

    prompts: Prompts = DEMO_PROMPTS
    """What the images should show."""
    method: Method = "sprout"
    """The search."""
    nfe: int = 100
    """Its budget for each prompt."""
    seed: int = 0
    """Seed of all noise."""
    out: Path = Path("out")
    """Folder for demo.png; made if it is not there."""
    runtime: ModelOptions = field(default_factory=ModelOptions)

    def __call__(self) -> None:
        """Runs the command."""
        if not self.prompts:
            raise RequestError('give at least one prompt, in quotes: rollflow demo --prompts "two red circles"')
        plain = SearchOptions(method="bon", nfe=BASE_STEPS, steps=BASE_STEPS, seed=self.seed)
        search = SearchOptions(method=self.method, nfe=self.nfe, seed=self.seed)
        requests = [options.request(prompt) for prompt in self.prompts for options in (plain, search)]
        results = _run(requests, self.runtime, self.out, ["demo.png"])

        from rollflow.cli import output

        pairs = list(zip(results[::2], results[1::2], strict=True))
        output.print_table(pairs)
        path = self.out / "demo.png"
        output.grid(pairs).save(path)
        print(path)


def commands() -> dict[str, Callable[..., Any]]:
    """The commands by name."""
    from rollflow.bench.study import Study

    return {"generate": Generate, "demo": Demo, "study": Study}


def _run(requests: list[Request], runtime: ModelOptions, out: Path, files: Sequence[str]) -> list[Result]:
    """Checks what it can before it loads the model, then searches under a progress bar."""
    from rollflow.cli.output import progress_bar
    from rollflow.models import traits
    from rollflow.plan import plan

    known, budgets = traits(runtime.model), list[int]()
    for request in requests:
        try:
            budgets.append(plan(request, known, runtime.preview).nfe)
        except BudgetError:
            if request.nfe is not None or request.seconds is None:  # otherwise the engine takes the smallest
                raise
    timed = any(request.nfe is None and request.seconds is not None for request in requests)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):  # find out now, not after the work
            pass
        folders = [file for file in files if (out / file).is_dir()]
    except (OSError, ValueError) as error:  # a ValueError: of a path that is none
        reason = line(str(getattr(error, "strerror", None) or error), 100)
        raise RequestError(
            f"the folder {shown(str(out))} cannot be made or written to ({reason}): choose another --out"
        ) from error
    if folders:
        raise RequestError(f"{shown(str(out / folders[0]))} is a folder: take it away, or choose another --out")
    with progress_bar() as bar:
        return _search(requests, runtime.load(), bar, None if timed else sum(budgets))


def _search(requests: list[Request], engine: Engine, bar: Bar, nfe: int | None) -> list[Result]:
    bar.start(nfe)
    return engine.generate(requests, on_progress=bar.update)


def _parse(arguments: Sequence[str]) -> Any:
    """The command of the arguments; raises `RequestError` with tyro's reason, SystemExit after printing a help."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands(),
                prog="rollflow",
                description=DESCRIPTION,
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise RequestError(_reason(said.getvalue())) from None


def _reason(box: str) -> str:
    """tyro's error box as one line: its sections, rules and frame left out."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections = [" ".join(part.split()).rstrip(".") for part in re.split("─{3,}", "\n".join(lines))]
    sections = [section.removeprefix("Error parsing ").removeprefix("Argument helptext: ") for section in sections]
    return "; ".join(section[:1].lower() + section[1:] for section in sections if section)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 for what cannot be honoured, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("DIFFUSERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if list(arguments) == ["--version"]:
        print(f"rollflow {rollflow.__version__}")
        return 0
    if list(arguments[:1]) == ["bench"]:
        from rollflow.bench.__main__ import main as bench

        return bench(arguments[1:], "rollflow bench")
    try:
        _parse(arguments)()
    except SystemExit as stop:  # a help was printed
        return int(stop.code or 0)
    except (RollflowError, OSError) as error:  # an OSError: of a file that could not be written
        print(f"rollflow: error: {line(str(error), LONGEST)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
