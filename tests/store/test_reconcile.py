"""Reconcilers: each has its turn, whatever becomes of the others."""

import random
import threading

import pytest

from kilonova.kit.clock import WallClock
from kilonova.kit.reconcile import Reconciler, Reconcilers, reconciler


class StillClock:
    at = 1000.0

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


@reconciler(every_s=60)
def lost(world: list[str]) -> list[str]:
    world.append("lost")
    return ["h1 is silent", "h2 is silent"]


@reconciler(every_s=10, at_once=True)
def broken(world: list[str]) -> list[str]:
    world.append("broken")
    raise ZeroDivisionError


def made(*all: Reconciler) -> tuple[Reconcilers, StillClock, list[str]]:
    clock, world = StillClock(), list[str]()
    return Reconcilers(world, all, clock=clock, dice=random.Random(0)), clock, world


def test_each_has_its_turn_in_its_own_rhythm_and_a_failure_is_nobody_elses() -> None:
    rounds, clock, world = made(lost, broken)
    assert rounds.due() == ["broken"]
    assert rounds.turn() == [] and rounds.turn() == [] and world == ["broken"]
    for _ in range(600):
        clock.at += 1
        rounds.turn()
    assert 9 <= world.count("lost") <= 11 and 54 <= world.count("broken") <= 67
    assert rounds.failed == {"broken": world.count("broken")} and rounds.mended == {"lost": 2 * world.count("lost")}


def test_one_alone_can_be_called_and_its_error_is_seen() -> None:
    rounds, _, world = made(lost, broken)
    assert rounds.run_once("lost") == ["h1 is silent", "h2 is silent"] and world == ["lost"]
    with pytest.raises(ZeroDivisionError):
        rounds.run_once("broken")


def test_the_same_seed_has_the_same_rhythm() -> None:
    assert made(lost, broken)[0].next == made(broken, lost)[0].next


def test_a_thread_does_it_and_ends() -> None:
    seen = threading.Event()

    @reconciler(every_s=0.01, at_once=True)
    def quick(world: None) -> list[str]:
        seen.set()
        return []

    rounds = Reconcilers(None, [quick], clock=WallClock(), dice=random.Random(0))
    rounds.start()
    assert seen.wait(5)
    rounds.close()
    assert rounds.thread is not None and not rounds.thread.is_alive()
