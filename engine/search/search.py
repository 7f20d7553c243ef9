"""One live request: its method, the turn that it waits for, its finalists and its history."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from weakref import ref

from rollflow.draw import Draw, Note
from rollflow.entries import Entry, Replay
from rollflow.errors import RequestError, shown
from rollflow.methods import title
from rollflow.methods.paths import shared
from rollflow.plan import Plan
from rollflow.profile.ledger import Ledger
from rollflow.rewards import Combined
from rollflow.row import NONE, Brief, Kind, Mixture, Outcome, Row, Score, Show
from rollflow.sde import Step
from rollflow.search.particle import Lease, Odds, Particle, Slot, rank
from rollflow.search.pilot import Pilot
from rollflow.search.record import History
from rollflow.search.refresh import Refresh
from rollflow.search.replay import Absent, Restoring, Unfit, room
from rollflow.search.turn import Flight, Turn

TIMED = ("seconds", "deadline")  # ends of a search that do not follow from its rewards
_CHILDREN, _DRAWS = 2**20, 2**20  # how many fit into a noise key
_KINDS: tuple[Kind, Kind] = ("committed", "guided")


class Final:
    """A finalist on its way: the particle that it has become and the steps that are left."""

    def __init__(self, particle: Particle, steps: tuple[Step, ...]):
        self.particle, self.steps, self.waiting = particle, steps, False
        self.flights: list[Flight] = []  # of the rows that led to it


class Search:
    """Runs one request's method: gives rows out, takes evaluated ones back in any order, commits them in draw order.

    What a method sees, and the history, is what the strictly sequential algorithm gives, however many rows run at once
    and however far some run ahead of the answer.

    Args:
        plan: the checked request.
        brief: what its rows carry to the device.
        lease: the slots that its particles live in.
        ledger: where rows that ran in vain are counted.
        odds: how often children succeed, learned over all searches.

    Attributes:
        history: what was committed so far.
        flying: the rows that are on their way, by number.
        stopped: why it ended: "budget", "stop_at" or what `stop` was given; None before the end.
        kinds: whether its rows are plain (False), run apart (True), or some of both. What runs apart are guided rows,
            or in a search with a cache those that are evaluated from it; no search has both.
        queued: for the scheduler: whether it stands in the queue of plain and of guided rows.
    """

    def __init__(self, plan: Plan, brief: Brief, lease: Lease, ledger: Ledger, odds: Odds):
        reward = plan.reward
        self._combined = reward if isinstance(reward, Combined) else None
        self.plan, self.brief = plan, brief
        self.history = History(() if self._combined is None else self._combined.labels)
        self.geometry, self.company, self.priority = brief.geometry, brief.company, plan.request.priority
        self.flying: dict[int, Flight] = {}
        self.queued = [False, False]
        self.kinds: tuple[bool, ...] = (False, True) if brief.geometry.kept else (False,)
        self.stopped: str | None = None
        self._lease, self._ledger, self._odds = lease, ledger, odds
        self._budget, self._stop_at, self._trusted = plan.nfe, plan.request.stop_at, plan.trusted_from + 1e-9
        self._title, self._method = title(plan.request.method), plan.search()
        request = plan.request  # whether rewards matter that the method does not decide by: all, or the trusted ones
        self._every = request.judge_all
        timed = request.seconds is not None or request.deadline is not None
        self._compares = plan.finalists > 1 or self._stop_at is not None or timed
        self._turn: Turn | None = None
        self._refresh: Refresh | None = None  # what it waits for before its next turn, or before its finalists' steps
        self._restoring: Restoring | None = None  # what was evaluated elsewhere, whose states it waits for
        self._finals: list[Final] | None = None
        self._best: list[Particle] = []  # those judged best where rewards can be trusted, one for each finalist
        self._bar = (-math.inf, 0)  # the rank of the last of them
        self._latest: Particle | None = None  # until there is one of those: the last particle, judged or not
        self._turns = self._rows = self._priors = 0
        self._pilot = None if self._combined is None else Pilot(self._combined)
        self._spares = False  # whether rows of this turn whose rewards decide nothing are left unjudged
        self._proceed(None)

    # What the scheduler asks.

    def waiting(self, guided: bool) -> int:
        """How many rows can run now and are needed whatever happens; with `guided`, of those that run apart."""
        if (before := self._before) is not None:
            return before.waiting(guided)
        if self._finals is not None:
            return 0 if guided else sum(bool(final.steps) and not final.waiting for final in self._finals)
        return self._turn.waiting[guided] if self._turn is not None else 0

    def take(self, guided: bool) -> Row | None:
        """The next of the waiting rows, in draw order; taking it issues it. None while there is no slot for it."""
        slot = self._lease.take()
        if slot is None:
            return None
        if (before := self._before) is not None:
            row, self.flying[self._rows] = before.issue(self._rows, slot)
            self._rows += 1
            return row
        if self._finals is not None:
            return self._finishing(slot)
        assert self._turn is not None, "only a search with waiting rows is asked for one"
        return self._issue(*self._turn.next(guided), slot)

    def may_run_ahead(self, guided: bool) -> bool:
        """Whether there are rows that could run before it is known whether they are needed."""
        turn = None if self._restoring is not None else self._turn
        return turn is not None and bool(turn.sequential) and turn.has_open(guided)

    def chances(self, guided: bool, least: float = 0.0) -> Iterator[tuple[float, int]]:
        """Of the rows that `take_ahead` would give, the chance of each to be needed, if at least `least`; its draw."""
        if self._finals is None and self._turn is not None and self._restoring is None:
            for i, asked in self._turn.open(guided):
                failure = 1 - self._odds.success(self._title, asked.draw.arrives)
                for ahead in range(asked.limit.children - asked.issued):
                    chance = failure ** (asked.unknown + ahead)
                    if chance < least:
                        break
                    yield chance, i

    def take_ahead(self, i: int) -> Row | None:
        """The next row of draw `i`, which waits for an answer, before it is known to be needed; None without a slot."""
        slot = self._lease.take(within=False)
        if slot is None:
            return None
        assert self._turn is not None
        return self._issue(i, self._turn.ahead(i), slot, ahead=True)

    # What the device answers.

    def failed(self, row: Row, error: BaseException) -> None:
        """Takes a row back that could not be evaluated.

        Raises:
            BaseException: the error, as soon as it is known that the row is needed; one that ran ahead may not be.
        """
        self.deliver(row, None, error=error)

    def deliver(self, row: Row, score: Score | None, invalid: bool = False, error: BaseException | None = None) -> None:
        """Takes an evaluated row back, and goes on as far as the rows that are back allow.

        Where terms of the reward are normalised, the first rows wait for those that they are normalised by.

        Raises:
            RequestError: the method broke a rule.
            Exception: whatever the method itself raises.
        """
        flight = self.flying.pop(row.number)
        if invalid or error is not None:
            flight = flight._replace(invalid=invalid, error=error)
        if self._pilot is None or flight.turn is None or flight.turn is not self._turn:
            self._deliver(flight, score)
        else:
            known = self._pilot.known
            ready = self._pilot.take(flight, score)
            if self._pilot.known and not known:
                self._normalised(self._pilot)
            for waiting, own in ready:
                self._deliver(waiting, own)

    def _deliver(self, flight: Flight, score: Score | None) -> None:
        error, particle = flight.error, flight.particle
        if isinstance(score, tuple):
            assert self._combined is not None and self._pilot is not None
            particle.terms = score
            particle.judge(self._combined.of(score, self._pilot.scales))
        else:
            particle.judge(score)
        turn = flight.turn
        if self._restoring is not None and self._restoring.takes(flight):
            self._restored(flight)
        elif flight.kind == "refresh":
            self._renew(flight)
        elif turn is None and self._finals:
            if error is not None:
                raise error
            self._finished(flight)
        elif self._finals is not None or turn is None or turn is not self._turn or turn.draws[flight.draw].closed:
            self._drop(flight)
        else:
            asked = turn.draws[flight.draw]
            needed, unneeded = turn.commit(flight)
            for one in needed:
                if one.error is not None:
                    raise one.error
                if asked.sequential:
                    self._odds.observe(self._title, one.particle.step, one.particle.value > asked.draw.until)
            for one in unneeded:
                self._drop(one)
            for one in turn.recordable():
                self._record(one)
                if self._finals is not None:
                    return
            if turn.complete:
                self._turn, sent = None, turn.children()
                turn.close()
                self._proceed(sent)

    def lost(self, row: Row) -> None:
        """A row of a search that is over came back, with or without an answer."""
        self._drop(self.flying.pop(row.number))

    # How it ends.

    @property
    def ending(self) -> bool:
        """Whether the method is over, and only finalists are still on their way."""
        return self._finals is not None

    @property
    def done(self) -> bool:
        """Whether every finalist is finished, and no row is still on the device."""
        begun = self._before is None and self._finals is not None
        left = not begun or any(final.steps for final in self._finals or ())
        return not left and not self.flying

    @property
    def excess(self) -> int:
        """How many slots it holds beyond what it was promised."""
        return self._lease.excess

    @property
    def best(self) -> Particle | None:
        """The best particle so far, where rewards can be trusted, or else the last one; None before the first."""
        if self._restoring is not None:  # it may have no state yet
            return None
        if self._finals:
            return max((final.particle for final in self._finals), key=rank)
        return self._best[0] if self._best else self._latest

    def stop(self, reason: str, finish: bool = True) -> bool:
        """Ends the search with its best so far, still to be finished or not; False if it has nothing to show yet."""
        if self._finals is not None:
            return True
        best = self.best
        if best is None:
            return False
        self._end_with(best, reason, self.plan.request.finish if finish else 0, finish)
        return True

    def cut(self) -> None:
        """Leaves the finalists as they are: no further steps."""
        self._wait_no_longer()
        for final in self._finals or ():
            final.steps = ()

    def show(self, every: bool) -> Show:
        """What is to become its image: the chosen finalist, or with `every` all of them, the chosen one first.

        The choice is the finalist with the best reward, on ties the least noisy one, then the method's own.
        """
        assert self._finals, "only a search that is over has finalists"
        finalists = sorted((final.particle for final in self._finals), key=rank, reverse=True)
        scales = () if self._pilot is None else self._pilot.scales
        return Show(self.brief, tuple(particle.candidate for particle in finalists[: None if every else 1]), scales)

    def shown(self, outcome: Outcome) -> None:
        """Its image was judged: of an only finalist that is the reward, where it was finished without one."""
        assert self._finals, "only a search that is over has an image"
        final = self._finals[0]
        if len(self._finals) == 1 and final.flights and final.particle.reward is None and final.particle.index >= 0:
            self.history.judge(final.particle.index, outcome.reward, outcome.terms)

    def discard(self) -> None:
        """Gives up: drops every particle but those of rows that are on the device, whose slots stay theirs."""
        unused = [] if self._turn is None else [*self._turn.leftover()]
        unused += [flight for final in self._finals or () for flight in final.flights]
        unused += [] if self._refresh is None else [flight for _, flight in self._refresh.back()]
        unused += [] if self._pilot is None else [flight for flight, _ in self._pilot.let_go()]
        for flight in unused:
            self._ledger.settle(self.brief.ticket, flight.number, False, flight.kind, flight.particle.reward)
        if self._turn is not None:
            self._turn.close()
        self._refresh = self._restoring = None
        self._finals, self._turn, self._best, self._latest = [], None, [], None
        self._method.close()

    def close(self) -> None:
        """Gives every slot back, whoever may still refer to them. None of its rows may be on the device."""
        try:
            self.discard()
        finally:
            self._lease.close()

    # How it goes on where another process left it.

    def replay(self, replay: Replay) -> None:
        """Takes evaluations that were committed elsewhere, before any row of its own; see `rollflow.search.replay`.

        Those of a finish, and what is evaluated anew for the final comparison, are made again: they are few.

        Raises:
            Unfit: they are of another search, or there is no room to make its states again. Begin it anew.
            Exception: whatever the method raises.
        """
        if replay.scales:
            if self._pilot is None or not self._pilot.given(replay.scales):
                raise Unfit(f"{len(replay.scales)} normalised terms: its reward has another number of them")
            if self._pilot.known:  # its first turn is judged
                self._normalised(self._pilot)
        places = list[tuple[Absent, ref[Particle]]]()
        taken = 0
        while taken < len(replay.entries) and self._finals is None:
            if self._refresh is not None:
                particles = self._refresh.particles
                if len(replay.entries) - taken < len(particles):
                    break
                for entry in replay.entries[taken : taken + len(particles)]:
                    _fits(entry, "refresh", None)
                taken += len(particles)
                self._take_refreshed(self._refresh)
            elif replay.stopped in TIMED and replay.entries[taken].kind in ("finish", "refresh"):
                break  # its time ended it here: what follows is of its finalists
            else:
                self._retake(replay.entries[taken], places)
                taken += 1
        self.history.resumed = taken
        if self._finals is None and taken < len(replay.entries) and replay.stopped in TIMED:
            self.stop(replay.stopped)
        living = [particle for place, known in places if not place.released and (particle := known()) is not None]
        restoring = Restoring(living)
        if restoring.left:
            room(self._lease, restoring)
            self._restoring = restoring

    def _retake(self, entry: Entry, places: list[tuple[Absent, ref[Particle]]]) -> None:
        """The next evaluation of its turn, by its score."""
        turn = self._turn
        assert turn is not None
        i, child = turn.following()
        asked = turn.draws[i]
        _fits(entry, _KINDS[asked.guided], asked.draw.arrives)
        place = Absent()
        row = self._issue(i, child, place)
        parents: Any = () if asked.draw.parent is None else (asked.draw.parent, *asked.draw.mix)
        place.made_by(row, parents)
        flight = self.flying.pop(row.number)
        places.append((place, ref(flight.particle)))
        if self._combined is None:
            fits = entry.score is None or isinstance(entry.score, float)
        else:
            fits = entry.score is None or (
                isinstance(entry.score, tuple) and len(entry.score) == len(self._combined.labels)
            )
        if not fits or (entry.score is None and row.scored):
            raise Unfit(f"a score {shown(entry.score)}: its reward gives others")
        self._deliver(flight._replace(invalid=entry.invalid), entry.score)

    def _take_refreshed(self, refresh: Refresh) -> None:
        """Particles that were evaluated anew, in full: that is how they are made again."""
        self._refresh = None
        for particle in refresh.particles:
            if isinstance(particle.slot, Absent):
                particle.slot.in_full()
            particle.cached = False
            anew = Particle(particle.step, particle.arrival, particle.slot)
            self._commit(particle, Flight("refresh", 1, anew, particle, None, 0, -1, None, NONE), refresh.scored)
        refresh.then()

    def _restored(self, flight: Flight) -> None:
        """A state is there again; it ran, and the history has it already."""
        if flight.error is not None:
            raise flight.error
        restoring = self._restoring
        assert restoring is not None
        self._ledger.settle(self.brief.ticket, flight.number, False, flight.kind, None)
        if restoring.deliver(flight):
            self._restoring = None

    # The rest is its own affair.

    @property
    def _before(self) -> Restoring | Refresh | None:
        """What is to be evaluated before it goes on."""
        return self._restoring if self._restoring is not None else self._refresh

    def _normalised(self, pilot: Pilot) -> None:
        """It is known what terms are normalised by."""
        self.history.scales = pilot.scales
        self.history.notes.append({"normalised_by": pilot.named})

    def _proceed(self, sent: Any) -> None:
        """Hands the children to the method, and takes its next draws or its choice."""
        try:
            yielded = self._method.send(sent)
            while isinstance(yielded, Note):
                self.history.notes.append(yielded.values)
                yielded = self._method.send(None)
        except StopIteration as stop:
            self._choose(stop.value)
            return
        self._begin(yielded)

    def _begin(self, draws: Any) -> None:
        if not isinstance(draws, list | tuple) or not draws or not all(isinstance(draw, Draw) for draw in draws):
            raise RequestError(
                f"the method {self._title} yielded {shown(draws)}: it must yield lists of at least one Draw"
            )
        for particle in (p for draw in draws for p in (draw.parent, *draw.mix)):
            if particle is not None and not (isinstance(particle, Particle) and particle.kept):
                raise RequestError(
                    f"the method {self._title} draws from {shown(particle)}: it may draw from the particles that it "
                    "was sent, but for those that a draw's `keep` let go"
                )
        if self.geometry.kept and any(draw.guide is not None for draw in draws):
            raise RequestError(
                f"the method {self._title} draws guided particles, and gradients take evaluations in full: leave cache "
                "out, or declare when it is guided (rollflow.methods.method)"
            )
        parents = dict.fromkeys(p for draw in draws for p in (draw.parent, *draw.mix) if p is not None)
        stale: list[Any] = [particle for particle in parents if particle.cached]
        if stale:
            self._refresh = Refresh(self.brief, stale, False, partial(self._open, draws))
        else:
            self._open(draws)

    def _open(self, draws: Sequence[Draw]) -> None:
        """A turn begins."""
        if len(self.kinds) == 1 and any(draw.guide is not None for draw in draws):
            self.kinds = (False, True)
        self._turns += 1
        self._spares = not self._every and (self._pilot is None or self._pilot.known)
        if self._pilot is not None:
            known = self._pilot.known
            self._pilot.begin(draws, self._title)
            if self._pilot.known and not known:
                self._normalised(self._pilot)
        self._turn = Turn([(d, *self._way(d), self._caches(d)) for d in draws], self._turns, self._priors)

    def _caches(self, draw: Draw) -> bool:
        """Whether a draw's children are evaluated from what was kept of their parent: those that compete."""
        wanted = draw.count > 1 and draw.scored and draw.move in ("sde", "ode")
        return bool(self.geometry.kept) and draw.parent is not None and draw.guide is None and wanted

    def _way(self, draw: Draw) -> tuple[Step, float]:
        """The coefficients of a draw's children, and of guided ones `sigma^2 / alpha` where they arrive."""
        step, path = self.plan.arrival(draw), self.plan.path
        if draw.guide is None or (alpha := path.alpha(step.time)) == 0.0:
            return step, 0.0
        return step, path.sigma(step.time) ** 2 / alpha

    def _issue(self, i: int, child: int, slot: Slot, ahead: bool = False) -> Row:
        turn = self._turn
        assert turn is not None
        asked = turn.draws[i]
        draw, step = asked.draw, asked.step
        prior = asked.prior + child if draw.parent is None else None
        parent: Any = draw.parent  # a particle of this search, as `_begin` made sure
        latents, mixture = self.brief.latents, None
        if draw.mix or draw.coarse:
            others: Any = draw.mix
            mixture = Mixture(tuple(other.slot.index for other in others), draw.coarse)
        row = Row(
            self.brief,
            self._rows,
            (turn.number * _DRAWS + i) * _CHILDREN + child,
            NONE if parent is None else parent.slot.index,
            slot.index,
            step,
            _KINDS[asked.guided],
            draw.nfe,
            self._judges(draw, step),
            ahead,
            prior if latents is not None and prior is not None and prior < len(latents) else None,
            mixture,
            parent is not None and parent.moved,
            draw.guide,
            asked.reach,
            draw.arrives,
            NONE if parent is None else parent.number,
            child,
            asked.limit,
            asked.cached,
        )
        particle = Particle(draw.arrives, step, slot, asked.guided, self._rows, asked.cached)
        self.flying[self._rows] = Flight(row.kind, row.nfe, particle, parent, turn, i, child, prior, row.number)
        self._rows += 1
        return row

    def _judges(self, draw: Draw, step: Step) -> bool:
        """Whether a draw's children are judged: the method asks for it, and something depends on their rewards."""
        if draw.decides or draw.guide is not None or not self._spares:
            return draw.scored
        return draw.scored and self._compares and step.tau <= self._trusted

    def _finishing(self, slot: Slot) -> Row:
        """The next step of a finalist; only what a last step leads to is judged, if it competes with another."""
        assert self._finals is not None
        i, final = next((i, f) for i, f in enumerate(self._finals) if f.steps and not f.waiting)
        step, *left = final.steps
        final.steps, final.waiting, parent = tuple(left), True, final.particle
        level = max(parent.step + 1, len(self.plan.steps))
        scored = not left and (self._every or len(self._finals) > 1)
        row = Row(
            self.brief, self._rows, 0, parent.slot.index, slot.index, step, "finish", scored=scored, level=level,
            origin=parent.number,
        )  # fmt: skip
        self.flying[self._rows] = Flight(
            row.kind, row.nfe, Particle(level, step, slot, number=self._rows), parent, None, i, -1, None, row.number
        )
        self._rows += 1
        return row

    def _finished(self, flight: Flight) -> None:
        """A step of a finalist is there; in the end they are recorded finalist by finalist, whichever came first."""
        assert self._finals is not None
        final = self._finals[flight.draw]
        before, final.particle, final.waiting = final.particle, flight.particle, False
        if final.flights:  # the step before was this one's parent, and nobody else's
            before.kept = False
        final.flights.append(flight)
        self._let_go(before)
        if all(not final.steps and not final.waiting for final in self._finals):
            for one in (one for final in self._finals for one in final.flights):
                self._record(one)

    def _renew(self, flight: Flight) -> None:
        """A particle was evaluated anew; once all are that the search waits for, it goes on."""
        refresh = self._refresh
        if refresh is None or not refresh.takes(flight):
            self._drop(flight)
            return
        if flight.error is not None:
            raise flight.error
        if refresh.deliver(flight):
            self._wait_no_longer()
            refresh.then()

    def _wait_no_longer(self) -> None:
        """Commits those that were evaluated anew; others that are on their way are not needed."""
        refresh, self._refresh = self._refresh, None
        if refresh is None:
            return
        for particle, flight in refresh.back():
            self._ledger.settle(self.brief.ticket, flight.number, True, flight.kind, flight.particle.reward)
            self._commit(particle, flight, refresh.scored)

    def _commit(self, particle: Particle, flight: Flight, scored: bool = True) -> None:
        self.history.add(particle, flight.parent, flight.kind, flight.nfe, flight.invalid, scored)
        if self.history.committed > self._budget:
            raise RequestError(f"the method {self._title} drew more than its budget of {self._budget} evaluations")

    def _record(self, flight: Flight) -> None:
        particle = flight.particle
        self._ledger.settle(self.brief.ticket, flight.number, True, flight.kind, particle.reward)
        self._commit(particle, flight)
        if flight.prior is not None:
            self._priors = max(self._priors, flight.prior + 1)
        if flight.turn is None:
            return
        if particle.reward is not None and particle.arrival.tau <= self._trusted:
            self._compete(particle)
            if self._finals is not None:
                return
        elif not self._best or self._leads(flight, particle):
            before, self._best, self._bar = [*self._best, self._latest], [], (-math.inf, 0)
            self._latest = particle
            for other in before:
                self._let_go(other)
        dismissed = flight.turn.draws[flight.draw].dismissed(particle)
        if dismissed is not None:
            dismissed.kept = False
            self._let_go(dismissed)

    def _leads(self, flight: Flight, particle: Particle) -> bool:
        """Whether the method went on to it from the best so far without its being judged: nothing compares them."""
        asked = flight.turn is not None and flight.turn.draws[flight.draw].draw.scored
        return asked and particle.reward is None and not self._compares and particle.step > self._best[0].step

    def _compete(self, particle: Particle) -> None:
        """A trusted reward: the particle may become a finalist, or be good enough to end the search."""
        finalists = self.plan.finalists
        if len(self._best) < finalists or rank(particle) > self._bar:  # of equal ones the first stays
            ranked = sorted([*self._best, particle], key=rank, reverse=True)
            before, self._latest = self._latest, None
            self._best = ranked[:finalists]
            self._bar = rank(self._best[-1])
            for other in (before, *ranked[finalists:]):
                self._let_go(other)
        stop_at = self._stop_at
        if stop_at is not None and particle.value >= stop_at:
            self._end_with(particle, "stop_at", self.plan.request.finish)

    def _let_go(self, particle: Particle | None) -> None:
        """Frees the slot of a particle that neither the method keeps nor the final comparison."""
        if particle is None or particle.kept or particle is self._latest or particle in self._best:
            return
        if self._finals is None or all(final.particle is not particle for final in self._finals):
            particle.slot.release()

    def _drop(self, flight: Flight) -> None:
        """Counts a row that ran and, for the search, does not exist; its slot is free."""
        self._ledger.settle(self.brief.ticket, flight.number, False, flight.kind, flight.particle.reward)
        flight.particle.slot.release()

    def _choose(self, chosen: Any) -> None:
        """The method is over: its choice competes with the best others that were judged."""
        if not isinstance(chosen, Particle) or not chosen.kept:
            raise RequestError(
                f"the method {self._title} returned {shown(chosen)}: it must return one of its particles"
            )
        finalists = [chosen, *(p for p in self._best if p is not chosen)][: self.plan.finalists]
        if not self.plan.request.finish and chosen.reward is None:
            finalists = [chosen]  # it cannot be compared, and is what the method wants
        self._end(finalists, shared(self.plan.finish_nfe, len(finalists)), "budget")

    def _end_with(self, particle: Particle, reason: str, finish: int, anew: bool = True) -> None:
        """Ends with one particle, which stays in the race should its finish be worse."""
        self._end([particle] * (2 if finish else 1), [finish, 0] if finish else [0], reason, anew)

    def _end(self, finalists: Sequence[Particle], finish: Sequence[int], reason: str, anew: bool = True) -> None:
        """Ends the search proper: each of those who compete is finished by as many evaluations as `finish` says.

        Before that, those whose rewards are of evaluations from a cache are evaluated and judged `anew`.
        """
        self._wait_no_longer()
        self._finals = [
            Final(particle, self.plan.finish(particle.time, count))
            for particle, count in zip(finalists, finish, strict=True)
        ]
        self.stopped = self.history.stopped = reason
        turn, self._turn = self._turn, None
        if turn is not None:
            for flight in turn.leftover():
                self._drop(flight)
            for flight, _ in () if self._pilot is None else self._pilot.let_go():
                self._drop(flight)
            turn.close()
        self._best, self._latest = [], None
        self._method.close()
        if anew and (stale := [particle for particle in dict.fromkeys(finalists) if particle.guessed]):
            self._refresh = Refresh(self.brief, stale, True, _nothing)


def _fits(entry: Entry, kind: str, level: int | None) -> None:
    """Raises `Unfit` where an evaluation is another than the one that comes next."""
    if entry.kind != kind or (level is not None and entry.level != level):
        raise Unfit(f"an evaluation {entry.kind!r} at point {entry.level}: the search goes on with {kind!r} at {level}")


def _nothing() -> None:
    pass
