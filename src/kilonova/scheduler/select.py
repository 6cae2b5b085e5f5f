"""Where could these servers live? Those who ask at the same time are answered in one pass over the columns.

There is no thread in here: of those who wait, one answers for all.  In one process a conductor calls `choose`; a
scheduler of its own is asked the same over the bus (`serve`), and nobody can tell the difference.
"""

import logging
import math
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import EllipsisType
from typing import Protocol

import msgspec
import numpy as np

from kilonova.contracts.scheduler import Choose, Chosen, scheduler
from kilonova.kit.ask import Answerer, Bus, asked
from kilonova.kit.clock import Clock
from kilonova.kit.db import Tx, ill
from kilonova.kit.errors import Unsupported
from kilonova.model.ask import Ask
from kilonova.model.host import Place
from kilonova.model.numa import WISHES
from kilonova.model.options import Scheduler as Options
from kilonova.scheduler.aggregates import least
from kilonova.scheduler.choice import NEGATIVE, WEIGHERS, Choice
from kilonova.scheduler.hosts import Floats, Hosts, Ints
from kilonova.scheduler.rules import FORCED, IN_PLACE, NEEDED, View

log = logging.getLogger(__name__)


class Reads(Protocol):
    """A `Db`, as far as a scheduler needs one."""

    def read(self) -> AbstractContextManager[Tx]: ...


class Scheduler:
    """Any number of threads may ask. `down_after_s`: a host that was silent for longer is down.

    Raises Invalid for a rule or taste in `options` that nobody knows.
    """

    def __init__(
        self,
        db: Reads,
        *,
        clock: Clock,
        dice: random.Random,
        options: Options | None = None,
        down_after_s: float = 60.0,
        default_zone: str = "nova",
        build_failures_max: int = 10,
    ) -> None:
        self.db, self.clock, self.down_after_s = db, clock, down_after_s
        self.options = options or Options()
        choice = Choice(self.options)
        self.rules, self.tastes = choice.rules, choice.tastes
        self.tasted = {name for name, _, _ in self.tastes}
        self.dice = np.random.default_rng(dice.getrandbits(64))
        self.hosts = Hosts(default_zone, build_failures_max, choice.more)
        self.noise: Floats = np.zeros(0)
        self.guard, self.turn = threading.Lock(), threading.Lock()
        self.waiting: list[_Waiting] = []

    def choose(self, m: Choose) -> Chosen:
        """The best places for this server; none, with the reasons, where there are none.

        Raises Unsupported where it is in a group whose policy nobody here looks after.
        """
        self._keeps(m.ask)
        mine = _Waiting(m)
        with self.guard:
            self.waiting.append(mine)
        with self.turn:
            if mine.answer is None:
                with self.guard:
                    all, self.waiting = self.waiting, []
                self._answer(all)
        assert mine.answer is not None
        return mine.answer

    def serve(self, bus: Bus, address: str = "scheduler", threads: int = 4) -> Callable[[], None]:
        """Answer those who ask over the bus. Returned: what ends that."""

        def choose(me: Scheduler, m: Choose) -> Chosen:
            try:
                return me.choose(m)
            except Exception as e:
                raise (ill(e) or e) from e  # without a database there is no answer yet, rather than a refusal

        return bus.serve(asked(address), Answerer(scheduler, [choose], self, bus.send).receive, threads)

    def explain(self, ask: Ask) -> dict[str, list[str]]:
        """By host, as it is now: the rules that would turn this away there. None of them: it could live there."""
        now = self.clock.now()
        with self.db.read() as tx:
            self.hosts.load(tx, now)
            self.hosts.cells.refresh(tx)
        view, against = View(now, self.down_after_s, self.options), dict[str, list[str]]()
        names = [f"{p.host}" if p.node == p.host else f"{p.host} {p.node}" for p in self.hosts.places]
        for name in names:
            against[name] = []
        for name, lets in self.rules.items():
            mask = lets(self.hosts, ask, view)
            if not isinstance(mask, EllipsisType):
                for row in np.flatnonzero(~mask):
                    against[names[row]].append(name)
        return against

    def _keeps(self, ask: Ask) -> None:
        if ask.company is None or ask.forced:
            return
        needed = NEEDED[ask.company.policy]
        if needed not in self.rules and needed not in self.tasted:
            raise Unsupported(f"ServerGroup policy is not supported: {ask.company.policy} is switched off.")

    # -- a pass

    def _answer(self, all: "list[_Waiting]") -> None:
        """A no is only said after a look at everything: what we know may be old, what we chose may not be claimed."""
        try:
            now = self.clock.now()
            with self.db.read() as tx:
                self.hosts.refresh(
                    tx, now, at_once=any(w.m.fresh for w in all), seats=(seats := any(map(_seated, all)))
                )
                left = self._place(all, now)
                if left:
                    self.hosts.load(tx, now)
                    if seats:
                        self.hosts.cells.refresh(tx)
            for w in self._place(left, now):
                w.answer = self._nowhere(w.m.ask, now)
        except BaseException:
            with self.guard:  # they will ask for themselves
                self.waiting += [w for w in all if w.answer is None]
            raise

    def _place(self, all: "list[_Waiting]", now: float) -> "list[_Waiting]":
        """Answer who can be; who cannot is returned."""
        left: list[_Waiting] = []
        for same in _alike(all):
            left += self._place_alike(same, now) if same[0].m.ask.company is None else self._place_company(same, now)
        return left

    def _place_company(self, same: "list[_Waiting]", now: float) -> "list[_Waiting]":
        """Requests of one server group, one by one: where the last one went counts for the next."""
        left: list[_Waiting] = []
        company = same[0].m.ask.company
        assert company is not None
        for w in same:
            ask = msgspec.structs.replace(w.m.ask, company=company)
            one = _Waiting(msgspec.structs.replace(w.m, ask=ask))
            if self._place_alike([one], now) or one.answer is None:
                left.append(w)
                continue
            w.answer, host = one.answer, one.answer.places[0].host
            company = msgspec.structs.replace(company, at=company.at | {host: company.at.get(host, 0) + 1})
        return left

    def _place_alike(self, same: "list[_Waiting]", now: float) -> "list[_Waiting]":
        """Requests that ask the same: one pass gives a host at most one of them, so that a burst spreads.

        Where hosts share what is asked for, one by one: what one takes is missing elsewhere.
        """
        ask, todo = same[0].m.ask, same
        amounts, pooled = self._amounts(ask), self.hosts.pooled(ask)
        while todo and amounts is not None:
            rows, why = self._candidates(ask, now)
            if not len(rows):
                break
            most, view = max(w.m.most for w in todo), View(now, self.down_after_s, self.options)
            best, told = self._best(rows, ask, view, min(len(rows), len(todo) + most - 1))
            why = {name: n for name, n in why.items() if n}
            some = todo[: 1 if pooled else len(best)]
            for j, w in enumerate(some):
                order = [int(best[(j + k) % len(best)]) for k in range(min(w.m.most, len(best)))]
                some_rows = [int(rows[i]) for i in order]
                places = [self._place_of(i, ask) if pooled else self.hosts.places[i] for i in some_rows]
                self.hosts.take(some_rows[0], amounts, now)
                weights = [{name: _short(part[i]) for name, part in told} for i in order]
                w.answer = Chosen(places, why, self.hosts.n, weights=weights)
            todo = todo[len(some) :]
        return todo

    def _place_of(self, row: int, ask: Ask) -> Place:
        place = self.hosts.places[row]
        return msgspec.structs.replace(place, shared=True) if self.hosts.shared(row, ask) else place

    def _candidates(self, ask: Ask, now: float) -> tuple[Ints, dict[str, int]]:
        """The rows that no rule refuses, and how many each rule turned away."""
        view, fit, why = View(now, self.down_after_s, self.options), np.ones(self.hosts.n, bool), dict[str, int]()
        left = self.hosts.n
        for name, lets in self.rules.items():
            if (ask.forced and name not in FORCED) or (ask.in_place and name not in IN_PLACE):
                continue
            mask = lets(self.hosts, ask, view)
            if isinstance(mask, EllipsisType):
                continue
            fit &= mask
            before, left = left, int(np.count_nonzero(fit))
            why[name] = before - left
        return np.flatnonzero(fit), why

    def _best(self, rows: Ints, ask: Ask, view: View, k: int) -> tuple[Ints, list[tuple[str, Floats]]]:
        """Where among these rows the k best are, the best first; and what each taste gave them all.

        Equals are told apart by dice: schedulers must not agree.
        """
        n, score = len(rows), self._noise(len(rows))
        told: list[tuple[str, Floats]] = []
        if n > 1:
            for name, tells, weight in self.tastes:
                said = tells(self.hosts, ask, view)
                if isinstance(said, EllipsisType):
                    continue
                values = np.asarray(said, float)
                scaled = _scaled(values if n == self.hosts.n else values[rows])
                if scaled is not None:
                    scaled *= self._weights(name, weight, rows)
                    score += scaled
                    told.append((name, scaled))
        best = _highest(score, k)
        if (among := min(self.options.shuffle_best, len(best))) > 1:
            best[:among] = self.dice.permutation(best[:among])
        return best, told

    def _noise(self, n: int) -> Floats:
        """So little that it only tells equals apart: a piece of a long row of dice, from anywhere on."""
        if len(self.noise) < 2 * n:
            self.noise = self.dice.random(4 * n + 1024) * 1e-6
        at = int(self.dice.integers(len(self.noise) - n))
        return self.noise[at : at + n].copy()

    def _weights(self, name: str, weight: float, rows: Ints) -> Floats | float:
        """A taste's weight; where aggregates say another, one for each row."""
        key = WEIGHERS.get(name, "")
        if key not in self.hosts.keys:
            return weight
        sign = -1 if name in NEGATIVE else 1
        of = [sign * least(g, key, sign * weight) for g in self.hosts.groups]
        return np.asarray(np.asarray(of, float)[self.hosts.group[rows]])

    def _amounts(self, ask: Ask) -> Floats | None:
        """As a row of the columns; None: nobody has that class."""
        row = np.zeros(len(self.hosts.classes))
        for name, n in ask.amounts.items():
            i = self.hosts.column(name)
            if i is None:
                return None
            row[i] = n
        return row

    def _nowhere(self, ask: Ask, now: float) -> Chosen:
        why = {name: n for name, n in self._candidates(ask, now)[1].items() if n}
        log.info("no valid host: of %d hosts %s", self.hosts.n, why)
        return Chosen(why=why, hosts=self.hosts.n)


class _Waiting:
    __slots__ = ("answer", "m")

    def __init__(self, m: Choose) -> None:
        self.m = m
        self.answer: Chosen | None = None


def _seated(w: _Waiting) -> bool:
    """Does it ask for a part of its host's cells?"""
    return any(k.startswith(WISHES) for k in (*w.m.ask.extra_specs, *w.m.ask.properties))


def _alike(all: "Sequence[_Waiting]") -> "list[list[_Waiting]]":
    if len(all) == 1:
        return [list(all)]
    groups: dict[bytes, list[_Waiting]] = {}
    for w in all:
        groups.setdefault(msgspec.json.encode(w.m.ask), []).append(w)
    return list(groups.values())


def _short(weight: float) -> float | None:
    """As it is kept: an operator's own taste may say what is no number in JSON."""
    return round(float(weight), 4) if math.isfinite(weight) else None


def _scaled(values: Floats) -> Floats | None:
    """To 0…1; None: all the same, nothing to say. The lower bound is 0 where no value is below it."""
    least, high = float(values.min()), float(values.max())
    if high == least:
        return None
    low = min(0.0, least)
    scaled: Floats = values - low if low else values.copy()
    scaled *= 1 / (high - low)
    return scaled


def _highest(score: Floats, k: int) -> Ints:
    """Where the k highest are, the highest first."""
    if k > 4:
        part = np.argpartition(-score, k - 1)[:k] if k < len(score) else np.arange(len(score))
        return np.asarray(part[np.argsort(-score[part])])
    best = []
    for _ in range(min(k, len(score))):
        best.append(int(score.argmax()))
        score[best[-1]] = -np.inf
    return np.asarray(best, np.int64)
