"""The command line: `rollflow generate | demo | probe | plan | models | rewards | fetch | profile | what-if | study |
serve | jobs | bench`.

Commands are frozen dataclasses that tyro turns into parsers. What needs torch is imported when a command runs, so that
`rollflow --help` answers at once. Whatever a user can get wrong ends in one line and exit code 2; a pipeline that
`rollflow probe` cannot use is its answer, with exit code 1.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import rollflow
from rollflow.cli.folders import writable
from rollflow.cli.options import Method, ModelOptions, SearchOptions, by_default
from rollflow.errors import LONGEST, BudgetError, RequestError, RollflowError, line

if TYPE_CHECKING:
    from rollflow.cli.output import Bar
    from rollflow.engine import Engine
    from rollflow.request import Request, Result

DESCRIPTION = """Inference-time scaling of flow models: the best image for a prompt within a budget of function
evaluations (NFE).

`rollflow COMMAND --help` explains a command, and `rollflow --version` prints the version."""
DEMO_PROMPTS = (  # what the model's plain samples get wrong with seed 0
    "two blue circles, one red square and one yellow triangle",
    "show two green circles and four yellow triangles",
    "one green square and three red circles on a light canvas",
    "seven red circles",
)
BASE_STEPS = 10
Format = Annotated[str | None, by_default("png, and gif for clips", metavar="SUFFIX")]
Prompts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...")]
Asked = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...", help_behavior_hint="(required)")]


@dataclass(frozen=True)
class Generate:
    """Search for the best image or clip of each prompt; write it and its history.

    Writes PROMPT-seedN.png, of a clip PROMPT-seedN.gif, and PROMPT-seedN.json for every prompt and overwrites files of
    these names. Prompts share the forwards of the model.
    """

    prompts: tyro.conf.Positional[Asked]
    """What the images should show, each prompt in quotes: "two red circles"."""
    out: Path = Path("out")
    """Folder for the images; made if it is not there."""
    format: Format = None
    """Suffix of the images or clips: png, jpg, webp, gif, mp4; of a clip, png and jpg are its middle frame."""
    fps: float = 16
    """Frames a second of a clip's file."""
    search: SearchOptions = field(default_factory=SearchOptions)
    runtime: ModelOptions = field(default_factory=ModelOptions)

    def __call__(self) -> None:
        """Runs the command."""
        if not self.prompts:
            raise RequestError('give at least one prompt, in quotes: rollflow generate "two red circles"')
        self.runtime.check()
        from rollflow.cli import output

        kinds = self._kinds()
        requests = [self.search.request(prompt) for prompt in self.prompts]
        names = output.names(requests)
        files = [f"{name}.{kind}" for name in names for kind in (*kinds, "json")]
        with writable(self.out, files):
            for name, result in zip(names, _run(requests, self.runtime), strict=True):
                clip = result.pixels.ndim == 4
                image, record = self.out / f"{name}.{kinds[clip]}", self.out / f"{name}.json"
                result.save(image, self.fps)
                found = output.record(result, image=self.search.image, mask=self.search.mask)
                content = {"model": self.runtime.model, **found}
                record.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
                print(f"{result.request.prompt}\n  {output.summary(result)}\n  {image}\n  {record}")

    def _kinds(self) -> tuple[str, str]:
        """The suffixes of an image and of a clip; raises `RequestError` before any work for what cannot be written."""
        from rollflow import saving

        if not 0 < self.fps <= 1000:
            raise RequestError(f"--fps {self.fps:g}: frames a second must be above 0 and at most 1000")
        if self.format is None:
            return "png", "gif"
        kind = self.format.removeprefix(".").lower()
        saving.check(Path(f"clip.{kind}"))
        return kind, kind


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
        self.runtime.check()
        plain = SearchOptions(method="bon", nfe=BASE_STEPS, steps=BASE_STEPS, seed=self.seed)
        search = SearchOptions(method=self.method, nfe=self.nfe, seed=self.seed)
        requests = [options.request(prompt) for prompt in self.prompts for options in (plain, search)]
        path = self.out / "demo.png"
        with writable(self.out, [path.name]):
            results = _run(requests, self.runtime)

            from rollflow.cli import output

            pairs = list(zip(results[::2], results[1::2], strict=True))
            output.print_table(pairs)
            output.grid(pairs).save(path)
        print(path)


@dataclass(frozen=True)
class Bench:
    """Measure on this machine: throughput, scaling, overhead, latency and more, one benchmark each.

    `rollflow bench --help` lists them, and `rollflow bench NAME --help` explains one.
    """

    arguments: tyro.conf.Positional[tuple[str, ...]] = ()
    """The benchmark's name and its options."""

    def __call__(self) -> int:
        """Runs the benchmark; returns its exit code."""
        from rollflow.bench.__main__ import main as bench

        return bench(self.arguments, "rollflow bench")


def commands() -> dict[str, Callable[..., Any]]:
    """The commands by name."""
    from rollflow.bench.study import Study
    from rollflow.cli.catalogue import Models
    from rollflow.cli.comparing import ProfileDiff
    from rollflow.cli.fetching import Fetch
    from rollflow.cli.jobs import Jobs
    from rollflow.cli.judging import Rewards
    from rollflow.cli.memory import Plan
    from rollflow.cli.probe import Probe
    from rollflow.cli.profiling import Profile
    from rollflow.cli.serving import Serve
    from rollflow.cli.what_if import WhatIf

    return {
        "generate": Generate, "demo": Demo, "probe": Probe, "plan": Plan, "models": Models, "rewards": Rewards,
        "fetch": Fetch, "profile": Profile, "profile-diff": ProfileDiff, "what-if": WhatIf, "study": Study,
        "serve": Serve, "jobs": Jobs, "bench": Bench,
    }  # fmt: skip


def _run(requests: list[Request], runtime: ModelOptions) -> list[Result]:
    """Checks what it can before it loads the model, then searches under a progress bar."""
    from rollflow.cli.judging import check_weights
    from rollflow.cli.output import progress_bar
    from rollflow.models import traits
    from rollflow.plan import plan

    check_weights(requests)
    known, budgets = traits(runtime.model), list[int]()
    for request in requests:
        try:
            budgets.append(plan(_without_model(request, known.steps), known, runtime.preview).nfe)
        except BudgetError:
            if request.nfe is not None or request.seconds is None:  # otherwise the engine takes the smallest
                raise
    timed = any(request.nfe is None and request.seconds is not None for request in requests)
    with progress_bar() as bar:
        return _search(requests, runtime.load(), bar, None if timed else sum(budgets))


def _without_model(request: Request, steps: int) -> Request:
    """The request as it can be checked before the model is there: on a grid of as many steps as that of the model."""
    if request.grid != "model":
        return request
    return replace(request, grid="uniform", steps=steps if request.steps is None else request.steps)


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


def _warning(message: Warning | str, category: type[Warning], *place: Any) -> str:
    """A warning of ours as one line; any other as Python has it."""
    if str(place[0]).startswith(str(Path(rollflow.__file__).parent)):
        return f"rollflow: warning: {line(str(message), LONGEST)}\n"
    return f"{place[0]}:{place[1]}: {category.__name__}: {message}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: that of the command, 2 for what cannot be honoured, 130 after
    Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("DIFFUSERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if list(arguments) == ["--version"]:
        print(f"rollflow {rollflow.__version__}")
        return 0
    if [*arguments[:2]] == ["profile", "diff"]:
        arguments = ["profile-diff", *arguments[2:]]
    warnings.formatwarning = _warning  # type: ignore[assignment]
    try:
        bench = list(arguments[:1]) == ["bench"]  # whose options are not parsed here
        return (Bench((*arguments[1:],)) if bench else _parse(arguments))() or 0
    except SystemExit as stop:  # a help was printed
        return int(stop.code or 0)
    except (RollflowError, OSError) as error:  # an OSError: of a file that could not be written
        print(f"rollflow: error: {line(str(error), LONGEST)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
