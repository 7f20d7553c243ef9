"""Which search wins, on which path, at which budget: `rollflow study`.

Every contender runs on the same prompts with the same seeds and the same budget; all prompts of a set share forwards.
What has been computed is kept, so that a study that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from rollflow.bench import contenders
from rollflow.bench.contenders import PATHS, Contender
from rollflow.errors import RequestError, shown
from rollflow.names import BUILT_IN, check_model

if TYPE_CHECKING:
    from rich.console import Console

    from rollflow.bench.rows import Job, Row, Rows

Part = Literal["methods", "fidelity", "diversity", "solvers", "noise", "paths", "all"]
Pixels = Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: the model's own)")]
BUDGETS = (50, 100, 200, 500)
VARIANTS_ON = "medium"  # the prompt set on which the parts "solvers" and "noise" run


@dataclass(frozen=True)
class Study:
    """Compares search methods at equal budgets; writes tables (Markdown, JSON, CSV) and plots (PNG, SVG).

    Parts: "methods" compares the contenders; "fidelity" says how well the reward of a posterior mean foretells the
    final reward, by point of the grid and path; "diversity" how far children of one initial latent differ; "solvers"
    compares solvers, grids and finishes, "noise" scales of the diffusion g; "paths" draws log-SNR and trajectories, for
    which no model is needed. Rows of methods, solvers and noise that lie in the output folder are not computed again: a
    study that was stopped goes on.
    """

    part: Positional[Part] = "methods"
    """What to study; "all" is every part."""
    model: str = "shapes"
    """A built-in model, a folder that save_pretrained of a diffusers pipeline wrote, or a hub id."""
    reward: Annotated[str, tyro.conf.arg(metavar="NAME|FILE.py:NAME")] = "count"
    """What images are judged by: a name, an expression such as "count + 0.1*jpeg", or a function of images and prompts,
    FILE.py:NAME or MODULE:NAME."""
    height: Pixels = None
    """Image height in pixels."""
    width: Pixels = None
    """Image width in pixels."""
    frames: Pixels = None
    """Frames of a clip, of a model of video."""
    budgets: tuple[int, ...] = BUDGETS
    """Function evaluations a prompt."""
    sets: tuple[str, ...] = ("easy", "medium", "hard")
    """Prompt sets: easy, medium, hard."""
    prompt_file: Path | None = None
    """Your own prompts, one a line, in place of the sets."""
    prompts: int = 100
    """How many prompts of each set, from the first on."""
    seeds: int = 1
    """How often each prompt is searched, with other noise."""
    methods: tuple[str, ...] = ()
    """Labels of contenders, or names of methods; none is all of them."""
    paths: tuple[str, ...] = tuple(PATHS)
    """Paths: linear-ODE, linear-SDE, VP-SDE."""
    quick: bool = False
    """One budget, 100 unless --budgets says otherwise, and the contenders that the paper's main table has."""
    jobs: int = 1
    """Processes that compute at the same time, each with its share of the cores."""
    traits: Path | None = None
    """With "fidelity": a file for what was measured. As rollflow.json in the model's folder, engines read it."""
    out: Path = Path("out/study")
    """Folder for rows.jsonl, the tables and the plots; made if it is not there."""

    def __call__(self) -> None:
        """Runs the parts, prints the tables and writes everything."""
        check_model(self.model)
        from rich.console import Console

        from rollflow.bench import figures, probes
        from rollflow.bench.rows import Rows

        asked, chosen = self._checked()
        sets, rows, console = self._prompts(), Rows(self.out), Console()
        parts: dict[str, Callable[[], Any]] = {
            "methods": lambda: asked._rows(rows, asked._methods(chosen, sets), console),
            "fidelity": lambda: asked._probe(probes.fidelity, "fidelity", sets, console),
            "diversity": lambda: asked._probe(probes.diversity, "diversity", sets, console),
            "solvers": lambda: asked._rows(rows, asked._variants("solvers", sets), console),
            "noise": lambda: asked._rows(rows, asked._variants("noise", sets), console),
            "paths": lambda: figures.paths(self.out),
        }
        for name in parts if self.part == "all" else [self.part]:
            parts[name]()
        console.print(f"everything is in {self.out}")

    def _checked(self) -> tuple[Study, list[Contender]]:
        """The study with what `quick` stands for, and its contenders."""
        from rollflow import checks, methods, rewards
        from rollflow.bench import outputs
        from rollflow.rewards.own import reward_of

        asked = replace(self, budgets=(100,)) if self.quick and self.budgets == BUDGETS else self
        known = contenders.by_label()
        for name in self.methods:
            if name not in known and name not in methods.names():
                raise RequestError(
                    f"no contender {shown(name)}: choose labels ({'; '.join(known)}) or methods "
                    f"({', '.join(methods.names())})"
                )
        for path in self.paths:
            if path not in PATHS:
                raise RequestError(f"no path {shown(path)}: choose from {', '.join(PATHS)}")
        if min((*self.budgets, self.seeds, self.jobs)) < 1 or not self.budgets:
            raise RequestError(f"budgets={self.budgets}, seeds={self.seeds}, jobs={self.jobs}: at least 1 each")
        if self.traits is not None and (self.part not in ("fidelity", "all") or contenders.ODE not in self.paths):
            raise RequestError(
                f"--traits {shown(str(self.traits))}: part {self.part} on {', '.join(self.paths)} measures none: it "
                f"takes the part fidelity, on {contenders.ODE}"
            )
        there = self.traits is None or self.traits.exists()
        outputs.check_file(self.traits, "--traits")
        if self.traits is not None and not there:
            self.traits.unlink()  # an empty one in the model's folder would be read before it is written
        wanted = {*self.methods} or {*(contenders.QUICK if self.quick else known)}
        gradient = rewards.differentiable(rewards.make(reward_of(self.reward)))
        checks.size(**self._size)
        return asked, [c for c in known.values() if wanted & {c.label, c.method} and (gradient or not c.guided)]

    @property
    def _size(self) -> dict[str, int | None]:
        return {"height": self.height, "width": self.width, "frames": self.frames}

    @property
    def _judge(self) -> str:
        """The reward's name in tables and files: of FILE.py:NAME the name, marked where it is that of a built-in."""
        from rollflow import rewards
        from rollflow.rewards.own import reward_of

        if isinstance(reward := reward_of(self.reward), str):
            return self.reward
        if isinstance(reward, rewards.Combined):
            return reward.name
        name = self.reward.rpartition(":")[2]
        return f"own-{name}" if name in rewards.names() else name

    def _prompts(self) -> dict[str, list[str]]:
        from rollflow import checks
        from rollflow.bench import outputs, prompt_sets

        if self.prompt_file is None:
            return {name: prompt_sets.load(name, self.prompts) for name in self.sets}
        try:
            lines = self.prompt_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:  # a ValueError: bytes that are no UTF-8, or a path that is none
            why = outputs.reason(error)
            raise RequestError(f"the prompts {shown(str(self.prompt_file))} cannot be read: {why}") from error
        prompts = [checks.prompt(line.strip()) for line in lines if line.strip()][: self.prompts]
        if not prompts:
            raise RequestError(f"there is no prompt in {shown(str(self.prompt_file))}: one a line is expected")
        return {self.prompt_file.stem: prompts}

    def _job(
        self, part: str, contender: Contender, path: str, name: str, nfe: int, seed: int, prompts: list[str]
    ) -> Job:
        from rollflow.bench.rows import Job

        key = {
            "part": part, "model": self.model if self.model in BUILT_IN else Path(self.model).name,
            "reward": self._judge, "label": contender.label, "path": path, "set": name, "nfe": contender.nfe or nfe,
            "seed": seed, "prompts": len(prompts),
        }  # fmt: skip
        size = {name: pixels for name, pixels in self._size.items() if pixels is not None}
        return Job(key, self.model, prompts, {**contender.fields(path, nfe), **size}, self.reward)

    def _methods(self, chosen: list[Contender], sets: dict[str, list[str]]) -> list[Job]:
        return [
            self._job("methods", contender, path, name, nfe, seed, prompts)
            for nfe in self.budgets
            for name, prompts in sets.items()
            for contender in chosen
            for path in contender.paths
            for seed in range(self.seeds)
            if path in self.paths and (contender.nfe is None or nfe == self.budgets[0]) and self._pays(contender, nfe)
        ]

    def _pays(self, contender: Contender, nfe: int) -> bool:
        """Whether the budget is enough for the contender; those for which it is not are left out of the tables."""
        from rollflow import methods
        from rollflow.models import traits

        given = {"steps": traits(self.model).steps, **methods.defaults(contender.method), **contender.request}
        try:
            methods.make(contender.method, contender.nfe or nfe, given["steps"], **contender.options)
        except RequestError:
            return False
        return True

    def _variants(self, part: Literal["solvers", "noise"], sets: dict[str, list[str]]) -> list[Job]:
        """Variants of RBF on one prompt set: solver, grid and finish, or the scale of the noise."""
        name = VARIANTS_ON if VARIANTS_ON in sets else next(iter(sets))
        variants = contenders.SOLVERS if part == "solvers" else contenders.NOISES
        return [
            self._job(part, variant, path, name, self.budgets[0], 0, sets[name])
            for path in self.paths
            for variant in variants
            if path in variant.paths
        ]

    def _rows(self, rows: Rows, jobs: list[Job], console: Console) -> None:
        from rich.progress import Progress

        from rollflow.bench.tables import report

        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("study", total=len(jobs))
            for row in rows.run(jobs, self.jobs):
                progress.update(task, advance=1, description=f"{row['label']}, {row['path']}, {row['set']}")
        report(rows, self.out, console)

    def _probe(
        self,
        probe: Callable[..., list[Row]],
        part: str,
        sets: dict[str, list[str]],
        console: Console,
    ) -> None:
        from rollflow.bench import figures, probes
        from rollflow.bench.rows import engine_of
        from rollflow.bench.tables import plain, save
        from rollflow.rewards.own import reward_of

        found = [
            {"model": self.model, "reward": self._judge, "path": path, "set": name, **row}
            for path in self.paths
            for name, prompts in sets.items()
            for row in probe(engine_of(self.model), reward_of(self.reward), prompts, {**PATHS[path], **self._size})
        ]
        if not found:
            raise RequestError(f"{part} needs rewards that vary on at least two prompts, and there are none here")
        name = f"{part}-{Path(self.model).name}"
        save(self.out, name, found)
        console.print(plain(name, found))
        figures.probe(self.out, name, part, found)
        if part == "fidelity" and contenders.ODE in self.paths:
            time = probes.trusted_from(found)
            console.print(f"rewards foretell the image from linear time {time:.2f} on: Traits(trusted_from={time:.2f})")
            if self.traits is not None:
                self._write_traits(time, sets, console)

    def _write_traits(self, time: float, sets: dict[str, list[str]], console: Console) -> None:
        """Writes the measured time, beside what was known of the model before."""
        from rollflow.bench import probes
        from rollflow.models import known, traits

        assert self.traits is not None, "asked for"
        found = replace(traits(self.model), trusted_from=round(time, 4))
        prompts = sum(map(len, sets.values()))
        measured = {"model": Path(self.model).name, "reward": self._judge, "prompts": prompts, "points": probes.STEPS}
        known.write_traits(self.traits, found, **measured)
        console.print(f"traits are in {self.traits}; in the model's folder the file is called {known.FILE}")
