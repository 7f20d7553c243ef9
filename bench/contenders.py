"""What the study compares: a label, the method, and how it runs on each path."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ODE, LINEAR, VP = "linear-ODE", "linear-SDE", "VP-SDE"
PATHS: dict[str, dict[str, Any]] = {
    ODE: {"interpolant": "linear", "diffusion": 0.0, "grid": "uniform"},
    LINEAR: {"interpolant": "linear", "diffusion": 3.0, "grid": "paper"},
    VP: {"interpolant": "vp", "diffusion": 3.0, "grid": "paper"},
}


@dataclass(frozen=True)
class Contender:
    """One row of the study's tables.

    Attributes:
        label: what it is called there.
        method: a name of `rollflow.methods.names()`.
        paths: those of `PATHS` on which it makes sense.
        request: further fields of its requests, such as the number of steps; by default what suits method and model.
        options: the method's own options.
        nfe: its budget, whatever the study's; None: the study's.
    """

    label: str
    method: str
    paths: tuple[str, ...]
    request: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    nfe: int | None = None

    @property
    def guided(self) -> bool:
        """Whether it follows the reward's gradient, so that the reward must have one."""
        return "gradient" in self.options

    def fields(self, path: str, nfe: int) -> dict[str, Any]:
        """The fields of its requests on a path, at a budget."""
        given = {"method": self.method, "nfe": self.nfe or nfe, "options": self.options}
        return {**PATHS[path], **given, **self.request}


BRANCHING = (LINEAR, VP)
FEW = {"steps": 3}  # evaluations a sample at which best-of-N is at its best on the built-in models
FOLLOW = {"gradient": 1.0, "clip": 0.05}  # the strength and the clip that did best on prompts of no set
AS_PUBLISHED = {"finalists": 1}  # the last level's best, whatever was seen before

CONTENDERS = (
    Contender("base, 1 step", "bon", (ODE,), {"steps": 1}, nfe=1),
    Contender("base, 10 steps", "bon", (ODE,), {"steps": 10}, nfe=10),
    Contender("BoN, 10 steps", "bon", (ODE, LINEAR, VP), {"steps": 10}),
    Contender("BoN, 5 steps", "bon", (ODE,), {"steps": 5}),
    Contender("BoN, 3 steps", "bon", (ODE,), FEW),
    Contender("BoN, 2 steps", "bon", (ODE,), {"steps": 2}),
    Contender("PSP", "psp", (ODE,)),
    Contender("PSP, 3 steps", "psp", (ODE,), FEW),
    Contender("sprout", "sprout", (ODE,)),
    Contender("ZO, 3 steps", "zo", (ODE,), FEW),
    Contender("SES, 3 steps", "ses", (ODE,), FEW),
    Contender("SoP", "sop", (ODE, VP), {"steps": 10}),
    Contender("SMC", "smc", BRANCHING),
    Contender("FK, max", "fk", BRANCHING),
    Contender("DAS", "das", BRANCHING),
    Contender("CoDe", "code", BRANCHING),
    Contender("SVDD", "svdd", BRANCHING),
    Contender("SVDD, as published", "svdd", BRANCHING, AS_PUBLISHED),
    Contender("beam", "beam", BRANCHING),
    Contender("EvoSearch", "evosearch", BRANCHING),
    Contender("DTS", "dts", BRANCHING),
    Contender("threshold", "threshold", BRANCHING),
    Contender("RBF", "rbf", BRANCHING),
    Contender("RBF, as published", "rbf", BRANCHING, AS_PUBLISHED),
    # for differentiable rewards
    Contender("DPS", "dps", (ODE, *BRANCHING), options=FOLLOW),
    Contender("SVDD + DPS", "svdd", BRANCHING, options=FOLLOW),
    Contender("RBF + DPS", "rbf", BRANCHING, options=FOLLOW),
)


_PAPER = ("SMC", "CoDe", "SVDD", "RBF")
CLAIMS: tuple[tuple[str, tuple[str, str], tuple[str, str]], ...] = (
    ("a search on an SDE beats best-of-N on the ODE", ("RBF, as published", VP), ("BoN, 10 steps", ODE)),
    ("... at its best step count", ("RBF, as published", VP), ("BoN, 3 steps", ODE)),
    *(("VP beats linear", (label, VP), (label, LINEAR)) for label in _PAPER),
    *(("RBF beats the rest", ("RBF", VP), (label, VP)) for label in ("SMC", "CoDe", "SVDD")),
    ("gradients add to the search", ("RBF + DPS", VP), ("RBF", VP)),
    ("gradients add to the search", ("SVDD + DPS", VP), ("SVDD", VP)),
    ("gradients add to best-of-N", ("DPS", ODE), ("BoN, 5 steps", ODE)),
    *(
        ("the best seen beats the last level's best", (label, VP), (f"{label}, as published", VP))
        for label in ("RBF", "SVDD")
    ),
)
SOLVERS = tuple(
    Contender(
        f"{solver}, {grid}, finish {finish}",
        "rbf",
        BRANCHING,
        {**AS_PUBLISHED, "solver": solver, "grid": grid, "finish": finish},
    )
    for solver in ("euler", "cps")
    for grid in ("paper", "uniform", "shifted")
    for finish in (0, 2, 4)
)
NOISES = tuple(
    Contender(f"g = {scale:g} t^2", "rbf", BRANCHING, {**AS_PUBLISHED, "diffusion": scale})
    for scale in (0.5, 1.0, 2.0, 3.0, 4.0)
)

OURS = "sprout"
FIXED = tuple(contender.label for contender in CONTENDERS if contender.nfe is not None)
QUICK = (
    "base, 1 step", "base, 10 steps", "BoN, 10 steps", "BoN, 3 steps", "PSP", "sprout", "SMC", "CoDe", "SVDD", "RBF",
    "RBF, as published",
)  # fmt: skip


def by_label() -> dict[str, Contender]:
    """The contenders by label."""
    return {contender.label: contender for contender in CONTENDERS}
