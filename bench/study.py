"""Which search wins, on which path, at which budget: `rollflow study`.

Every contender runs on the same prompts with the same seeds and the same budget; all prompts of a set share forwards.
What has been computed is kept, so that a study that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from rollflow.bench import contenders
from rollflow.bench.contenders import PATHS, Contender
from rollflow.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from rollflow.bench.rows import Row, Rows
    from rollflow.engine import Engine

Part = Literal["methods", "fidelity", "diversity", "solvers", "noise", "paths", "all"]
SOLVER_SET, NOISE_SCALES, FINISHES = "medium", (0.5, 1.0, 2.0, 3.0, 4.0), (0, 2, 4)


@dataclass(frozen=True)
class Study:
    """Compares search methods at equal budgets; writes tables (Markdown, JSON, CSV) and plots (PNG, SVG).

    Parts: "methods" compares the contenders; "fidelity" says how well the reward of a posterior mean foretells the
    final reward, by point of the grid and path; "diversity" how far children of one initial latent differ; "solvers"
    compares solvers, grids and finishes, "noise" scales of the diffusion g; "paths" draws log-SNR and trajectories, for
    which no model is needed. What lies in the output folder is not computed again: a study that was stopped goes on.
    """

    part: Positional[Part] = "methods"
    """What to study; "all" is every part."""
    model: str = "shapes"
    """A built-in model, a folder that FluxPipeline.save_pretrained wrote, or a hub id."""
    reward: str = "count"
    """What images are judged by."""
    budgets: tuple[int, ...] = (50, 100, 200, 500)
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
    """One budget, 100, and the contenders that the paper's main table has."""
    out: Path = Path("out/study")
    """Folder for rows.jsonl, the tables and the plots; made if it is not there."""

    def __call__(self) -> None:
        """Runs the parts, prints the tables and writes everything."""
        from rich.console import Console

        from rollflow.bench import figures, probes
        from rollflow.bench.rows import Rows
        from rollflow.cli import silence
        from rollflow.engine import Engine

        asked, chosen = self._checked()
        sets = self._prompts()
        rows, console = Rows(self.out), Console()
        loaded: list[Engine] = []

        def engine() -> Engine:
            if not loaded:
                silence()
                loaded.append(Engine.from_pretrained(self.model))
            return loaded[0]

        parts: dict[str, Callable[[], Any]] = {
            "methods": lambda: asked._methods(rows, chosen, engine, sets, console),
            "fidelity": lambda: asked._probe(probes.fidelity, "fidelity", engine(), sets, console),
            "diversity": lambda: asked._probe(probes.diversity, "diversity", engine(), sets, console),
            "solvers": lambda: asked._variants(rows, "solvers", engine, sets, console),
            "noise": lambda: asked._variants(rows, "noise", engine, sets, console),
            "paths": lambda: figures.paths(self.out),
        }
        for name in parts if self.part == "all" else [self.part]:
            parts[name]()
        console.print(f"everything is in {self.out}")

    def _checked(self) -> tuple[Study, list[Contender]]:
        """The study with what `quick` stands for, and its contenders."""
        from rollflow import methods

        asked = replace(self, budgets=(100,)) if self.quick else self
        known = contenders.by_label()
        for name in self.methods:
            if name not in known and name not in methods.names():
                raise RequestError(
                    f"no contender {name!r}: choose labels ({'; '.join(known)}) or methods "
                    f"({', '.join(methods.names())})"
                )
        for path in self.paths:
            if path not in PATHS:
                raise RequestError(f"no path {path!r}: choose from {', '.join(PATHS)}")
        if min(self.budgets, default=0) < 1 or self.seeds < 1:
            raise RequestError(f"budgets={self.budgets}, seeds={self.seeds}: at least 1 each")
        wanted = self.methods or (contenders.QUICK if self.quick else tuple(known))
        return asked, [c for c in known.values() if c.label in wanted or c.method in wanted]

    def _prompts(self) -> dict[str, list[str]]:
        from rollflow.bench import prompt_sets

        if self.prompt_file is None:
            return {name: prompt_sets.load(name, self.prompts) for name in self.sets}
        try:
            lines = self.prompt_file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise RequestError(f"the prompts {str(self.prompt_file)!r} cannot be read: {error.strerror}") from error
        prompts = [line.strip() for line in lines if line.strip()][: self.prompts]
        if not prompts:
            raise RequestError(f"there is no prompt in {str(self.prompt_file)!r}: one a line is expected")
        return {self.prompt_file.stem: prompts}

    def _key(self, part: str, label: str, path: str, name: str, nfe: int, seed: int) -> Row:
        from rollflow.models import BUILT_IN

        model = self.model if self.model in BUILT_IN else Path(self.model).name
        return {
            "part": part, "model": model, "reward": self.reward, "label": label, "path": path, "set": name, "nfe": nfe,
            "seed": seed,
        }  # fmt: skip

    def _methods(
        self,
        rows: Rows,
        chosen: list[Contender],
        engine: Callable[[], Engine],
        sets: dict[str, list[str]],
        console: Console,
    ) -> None:
        from rich.progress import Progress

        from rollflow.bench.tables import report

        work = [
            (contender, path, name, nfe, seed)
            for nfe in self.budgets
            for name in sets
            for contender in chosen
            for path in contender.paths
            for seed in range(self.seeds)
            if path in self.paths and (contender.nfe is None or nfe == self.budgets[0])
        ]
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("study", total=len(work))
            for contender, path, name, nfe, seed in work:
                progress.update(task, description=f"{contender.label}, {path}, {name}, {nfe} NFE")
                key = self._key("methods", contender.label, path, name, contender.nfe or nfe, seed)
                rows.run(engine(), key, sets[name], contender.fields(path, nfe))
                progress.advance(task)
        report(rows, self.out, console)

    def _variants(
        self,
        rows: Rows,
        part: Literal["solvers", "noise"],
        engine: Callable[[], Engine],
        sets: dict[str, list[str]],
        console: Console,
    ) -> None:
        """Variants of RBF on one prompt set: solver, grid and finish, or the scale of the noise."""
        from rich.progress import Progress

        from rollflow.bench.tables import report

        name = SOLVER_SET if SOLVER_SET in sets else next(iter(sets))
        work = list(_solvers(self.paths) if part == "solvers" else _noises(self.paths))
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(part, total=len(work))
            for label, path, fields in work:
                progress.update(task, description=f"{label}, {path}")
                key = self._key(part, label, path, name, self.budgets[0], 0)
                given = {**PATHS[path], "method": "rbf", "nfe": self.budgets[0], "options": {}, **fields}
                rows.run(engine(), key, sets[name], given)
                progress.advance(task)
        report(rows, self.out, console)

    def _probe(
        self,
        probe: Callable[..., list[Row]],
        part: str,
        engine: Engine,
        sets: dict[str, list[str]],
        console: Console,
    ) -> None:
        from rollflow.bench import figures
        from rollflow.bench.tables import plain, save

        found = [
            {"model": self.model, "reward": self.reward, "path": path, "set": name, **row}
            for path in self.paths
            for name, prompts in sets.items()
            for row in probe(engine, self.reward, prompts, PATHS[path])
        ]
        save(self.out, part, found)
        console.print(plain(part, found))
        figures.probe(self.out, part, found)


def _solvers(paths: tuple[str, ...]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path in paths:
        for solver in ("euler", "cps"):
            for grid in ("paper", "uniform", "shifted"):
                for finish in FINISHES:
                    if path != contenders.ODE:
                        fields = {"solver": solver, "grid": grid, "finish": finish, "finalists": 1}
                        yield f"{solver}, {grid}, finish {finish}", path, fields


def _noises(paths: tuple[str, ...]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path in paths:
        for scale in NOISE_SCALES:
            if path != contenders.ODE:
                yield f"g = {scale:g} t^2", path, {"diffusion": scale, "finalists": 1}
