"""What a search method says and sees: it asks for draws, and knows of each particle its reward and its step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from rollflow.errors import RequestError, shown
from rollflow.values import flag, plain, real

Move = Literal["sde", "ode", "renoise", "rotate"]
MOVES: tuple[str, ...] = get_args(Move)
GUIDED_NFE = 2  # a forward, and a backward to the latent alone, which costs about as much


@runtime_checkable
class Evaluated(Protocol):
    """All that a search method knows of a particle; tests drive methods with objects of their own."""

    reward: float | None
    step: int


@dataclass(frozen=True)
class Note:
    """What a method may yield in place of draws, to be kept beside the history; it is sent None."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Guide:
    """How the gradient of a differentiable reward moves a particle's posterior mean, and with it its children.

    With `G` the gradient of the reward of the decoded posterior mean with respect to the state `x`, the mean moves by
    `scale (sigma^2 / alpha) G`: by Tweedie's formula of second order that is the posterior covariance of the data times
    the gradient with respect to the data, which is guidance by the score of `exp(scale r(x0_hat))` (DPS, Chung et al.
    2023, arXiv 2209.14687). It reaches the children as a change of the particle's `u`, so that steps stay affine in
    (x, u, z); the particle itself, its reward and its image stay unmoved. Where `alpha = 0` nothing moves: pure noise
    tells nothing of the image.

    Attributes:
        scale: 1 / temperature of the target `p(x0) exp(scale r(x0))`.
        normalised: give the move a root mean square of `scale` instead, whatever the gradient's size.
        clip: the largest root mean square of the move, in units of the latent.
    """

    scale: float = 1.0
    normalised: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        scale = real(self.scale)
        if scale is None or not 0 <= scale < math.inf:
            raise RequestError(f"a guide of scale {shown(self.scale)}: it must be a finite number and not negative")
        clip = None if self.clip is None else real(self.clip)
        if self.clip is not None and (clip is None or not clip > 0):
            raise RequestError(f"a guide clipped at {shown(self.clip)}: the largest move must be a number above 0")
        checked = (("scale", scale), ("normalised", flag("normalised", self.normalised)), ("clip", clip))
        for name, value in checked:
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Draw:
    """What a method asks for: children of one particle, or fresh samples of the prior.

    Every move is affine in the parent's state x, its velocity u and fresh noise z. A child costs one evaluation, a
    guided one `GUIDED_NFE`.

    Attributes:
        parent: the particle to move from; `None` draws from the prior at the first time of the grid.
        count: draw at most this many children, in order ...
        until: ... stopping after the first whose reward is strictly above this.
        scored: whether the children are decoded and judged; without it their reward is `None` (and `until` is moot).
        decides: whether anything that the method does depends on their rewards. Where nothing does (an only candidate
            is the best of one), the engine has them judged only if it compares them itself, or if the request asks for
            every reward; see `rollflow.Request.judge_all`. Otherwise their reward is `None`.
        move: "sde", a step of the request's solver and diffusion to a later point of the grid (`parent` None: the
            prior); "ode", the same without noise; "renoise", back to an earlier point by the Markov kernel of the
            interpolant, `x_t = (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) z`;
            "rotate", at the first point of the grid, `cos(angle) x + sin(angle) sigma z`, which is noise again.
        level: the children's point of the grid; by default the parent's next for "sde" and "ode", the one before for
            "renoise".
        angle: of "rotate", in radians.
        mix: further particles at the first point, whose sum with the parent, brought back to the parent's norm, is what
            "rotate" starts from.
        coarse: of "rotate": change only the mean of each patch of the latent that makes a token (with patches of 2x2,
            the low band of a one-level Haar wavelet), and keep what is finer.
        guide: move the children's own velocities by the reward's gradient; `None` does not.
        keep: how many of the children the method will keep: those with the best rewards, of equal ones the first drawn.
            The engine frees the place of any other as soon as that is known, and from then on the method may look at
            its reward but neither draw from it nor return it. `None` keeps all.
    """

    parent: Evaluated | None
    count: int = 1
    until: float = math.inf
    scored: bool = True
    decides: bool = True
    move: Move = "sde"
    level: int | None = None
    angle: float = 0.0
    mix: tuple[Evaluated, ...] = ()
    coarse: bool = False
    guide: Guide | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        count = plain(self.count)
        if type(count) is not int or count < 1:
            raise RequestError(f"a draw of {shown(self.count)} children: it must be a whole number of at least 1")
        if count is not self.count:
            object.__setattr__(self, "count", count)
        if not self.scored and self.until != math.inf:
            raise RequestError("a draw with `until` must be scored: its stopping rule looks at rewards")
        if self.keep is not None and (not isinstance(self.keep, int) or self.keep < 1):
            raise RequestError(f"a draw that keeps {self.keep!r} children: it must be a whole number of at least 1")
        if self.keep is not None and not self.scored:
            raise RequestError("a draw with `keep` must be scored: it keeps the children with the best rewards")
        if not self.decides and (self.until != math.inf or (self.keep or self.count) < self.count):
            raise RequestError("a draw with `until`, or that keeps some of its children, decides by their rewards")
        if self.guide is not None and not self.scored:
            raise RequestError("a guided draw must be scored: its gradient is that of the reward")
        if not isinstance(self.move, str) or self.move not in MOVES:
            raise RequestError(f"a draw by {shown(self.move)}: a move is one of {', '.join(MOVES)}")
        where = -1 if self.parent is None else self.parent.step
        allowed = {"sde": self.arrives > where, "ode": self.arrives > where >= 0}
        allowed |= {"renoise": 0 <= self.arrives < where, "rotate": where == self.arrives == 0}
        if not allowed[self.move] or (self.parent is None and self.arrives):
            raise RequestError(
                f"a draw by {self.move!r} from point {where} of the grid to {self.arrives}: sde and ode go to later "
                "points, renoise to earlier ones, rotate stays at 0, and the prior (parent None) is at 0"
            )
        if (self.angle or self.mix or self.coarse) and self.move != "rotate":
            raise RequestError("`angle`, `mix` and `coarse` belong to the move 'rotate'")
        if any(particle.step for particle in self.mix):
            raise RequestError("only particles at the first point of the grid, where all is noise, can be mixed")

    @property
    def arrives(self) -> int:
        """The children's point of the grid."""
        if self.level is not None:
            return self.level
        where = -1 if self.parent is None else self.parent.step
        return where + {"sde": 1, "ode": 1, "renoise": -1, "rotate": 0}[self.move]

    @property
    def nfe(self) -> int:
        """What one child costs."""
        return 1 if self.guide is None else GUIDED_NFE
