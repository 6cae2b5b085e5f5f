"""Why a server is where it is, or nowhere: what was chosen for it, and why. A view of the journal.

A run that looks for a host keeps what it was answered (`Chosen`), and what became of each host that was tried.
"""

from typing import Any

import msgspec
import sqlalchemy as sa

from kilonova.contracts.scheduler import Chosen
from kilonova.kit.clock import iso
from kilonova.kit.db import Tx
from kilonova.kit.errors import Fault
from kilonova.kit.journal import RUNS, STEPS
from kilonova.kit.ready import ready
from kilonova.model.host import Place

MOST = 50  # choices that are told of, the newest


class Candidate(msgspec.Struct, frozen=True):
    """A host that was thought of. `weights`: by taste; `refused`: what it said when it was tried."""

    place: Place
    weights: dict[str, float | None] = {}
    refused: str = ""

    @property
    def weight(self) -> float:
        return round(sum(w for w in self.weights.values() if w is not None), 4)


class Choice(msgspec.Struct, frozen=True):
    """One look at all hosts. `places`: the best first; none: `fault` is what the user was told."""

    action: str
    request_id: str
    at: float
    hosts: int
    turned_away: dict[str, int]
    places: list[Candidate]
    outside: bool = False
    fault: str = ""

    @property
    def explained(self) -> str:
        return Chosen(why=self.turned_away, hosts=self.hosts).explained()


def of_server(tx: Tx, id: str) -> list[Choice]:
    """The newest first."""
    found: list[Choice] = []
    for run in tx.execute(CHOOSING, {"of": id, "most": MOST}):
        steps = tx.execute(STEPS_OF, {"run": run.id}).all()
        refused = {s.host: _said(s.fault) for s in steps if s.host and s.fault}
        for s in steps:
            if s.step != "choose" or s.answer is None:
                continue
            chosen = _CHOSEN.decode(s.answer)
            weights = chosen.weights or [{}] * len(chosen.places)
            places = [Candidate(p, w, refused.get(p.host, "")) for p, w in zip(chosen.places, weights, strict=False)]
            if not places and not chosen.hosts and found and found[-1].request_id == run.request_id:
                continue  # as many hosts were tried as may be: nobody was asked any more
            told = "" if places else _said(run.fault)
            found.append(
                Choice(
                    run.action or run.workflow,
                    run.request_id,
                    s.started,
                    chosen.hosts,
                    chosen.why,
                    places,
                    chosen.outside,
                    told,
                )
            )
    return sorted(found, key=lambda c: -c.at)[:MOST]


def shown(choices: list[Choice]) -> list[dict[str, Any]]:
    """As programs read it."""
    return [
        {
            "action": c.action,
            "request_id": c.request_id,
            "chosen_at": iso(c.at),
            "hosts": c.hosts,
            "turned_away": c.turned_away,
            "places": [
                {
                    "host": p.place.host,
                    "node": p.place.node,
                    "zone": p.place.zone,
                    "weight": p.weight,
                    "weights": p.weights,
                    "refused": p.refused or None,
                }
                for p in c.places
            ],
            "asked_outside": c.outside,
            "fault": c.fault or None,
        }
        for c in choices
    ]


def _said(fault: str | None) -> str:
    return _FAULT.decode(fault).said if fault else ""


_CHOSEN, _FAULT = msgspec.json.Decoder(Chosen), msgspec.json.Decoder(Fault)
_r, _s, _b = RUNS.c, STEPS.c, sa.bindparam
CHOOSING = ready(
    sa.select(_r.id, _r.workflow, _r.action, _r.request_id, _r.fault)
    .where(_r.subject == _b("of"), sa.exists().where(_s.run == _r.id, _s.step == "choose"))
    .order_by(_r.started.desc())
    .limit(_b("most", type_=sa.Integer))
)
STEPS_OF = ready(sa.select(_s.step, _s.host, _s.answer, _s.fault, _s.started).where(_s.run == _b("run")).order_by(_s.n))
