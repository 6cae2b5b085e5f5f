"""Who may what: oslo.policy's language and files, so that operators' `policy.yaml` works unchanged.

Rules are declared as data (name, check string, description), the defaults of the spec.  A judgement depends only
on the credentials and the target, so it is remembered; editing the file empties the memory.
"""

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from oslo_config import cfg
from oslo_policy import _checks
from oslo_policy import policy as oslo

from kilonova.kit.routes import Context, Route
from kilonova.kit.versions import NEWEST

REMEMBERED = 50_000  # judgements
NO_FILE = "/nonexistent/policy.yaml"  # else oslo.policy would go and look for one of its own


class Rule(NamedTuple):
    """`check` is oslo.policy's check string; `scopes` the token scopes that it lets through, none said: any."""

    name: str
    check: str
    description: str = ""
    scopes: tuple[str, ...] = ()


class Policy:
    """The judge of one service. `file` is an operator's YAML or JSON of overrides; it need not exist."""

    def __init__(self, rules: Iterable[Rule], file: Path | None = None) -> None:
        self.rules = list(rules)
        judge = _learned(tuple(self.rules), file) if file else _born(tuple(self.rules))
        self.file, self.enforcer, self.lock = file, judge.enforcer, judge.lock
        self.names = {r.name for r in self.rules}
        self.scopes = {r.name: r.scopes for r in self.rules if r.scopes}
        self.memory: dict[tuple[Any, ...], bool] = {}
        self.stamp = self._stamp()

    def allows(self, context: Context, rule: str, target: dict[str, Any]) -> bool:
        """A rule nobody declared allows nothing."""
        key = (
            rule,
            context.user_id,
            context.project_id,
            context.roles,
            context.system,
            context.domain_id,
            *target.values(),
        )
        known = self.memory.get(key)
        if known is None:
            known = self._judge(context, rule, target)
            if len(self.memory) > REMEMBERED:
                self.memory.clear()
            self.memory[key] = known
        return known

    def refresh(self) -> None:
        """Look whether the operator changed the file; called by a reconciler, not by requests."""
        if (now := self._stamp()) != self.stamp:
            with self.lock:
                self.enforcer.load_rules(force_reload=True)
            self.stamp = now
            self.memory.clear()

    def _judge(self, context: Context, rule: str, target: dict[str, Any]) -> bool:
        if context.scope not in self.scopes.get(rule, (context.scope,)):
            return False
        if rule not in self.names and rule not in self.enforcer.rules:
            return False
        who = {
            "user_id": context.user_id,
            "project_id": context.project_id,
            "tenant_id": context.project_id,
            "tenant": context.project_id,
            "domain_id": context.domain_id,
            "user_domain_id": context.user_domain_id,
            "project_domain_id": context.project_domain_id,
            "roles": sorted(context.roles),
            "system_scope": context.system,
            "is_admin": context.is_admin,
            "is_admin_project": True,
        }
        about = {**target, "tenant_id": target.get("project_id"), "tenant": target.get("project_id")}
        with self.lock:
            return bool(self.enforcer.enforce(rule, about, who))

    def _stamp(self) -> float:
        return self.file.stat().st_mtime if self.file and self.file.exists() else 0.0


class _Judge(NamedTuple):
    enforcer: Any
    lock: threading.Lock


def _learned(rules: tuple[Rule, ...], file: Path | None) -> _Judge:
    conf = cfg.ConfigOpts()
    conf([], project="kilonova", default_config_files=[], default_config_dirs=[])
    enforcer = oslo.Enforcer(conf, policy_file=str(file or NO_FILE))
    enforcer.suppress_deprecation_warnings = True
    enforcer.suppress_default_change_warnings = True
    with _no_plugins():
        for r in rules:
            enforcer.register_default(oslo.RuleDefault(r.name, r.check, r.description))
    with _no_plugins() if file is None else nullcontext():
        enforcer.load_rules()
    return _Judge(enforcer, threading.Lock())


@contextmanager
def _no_plugins() -> Iterator[None]:
    """Rules of our own speak oslo.policy's own words.

    An operator's may ask a server of his, say, by a plugin; to look for those takes half a second and 10 MB.
    """
    found, _checks.extension_checks = _checks.extension_checks, _checks.extension_checks or {}
    try:
        yield
    finally:
        _checks.extension_checks = found


@functools.lru_cache(32)
def _born(rules: tuple[Rule, ...]) -> _Judge:
    """One that no file will ever tell otherwise: the same for all who ask with the same rules."""
    return _learned(rules, None)


def reference(rules: Iterable[Rule], routes: Iterable[Route], major: int = 2) -> str:
    """A `policy.yaml` that says what holds anyhow, every line commented out: each rule with what it is asked for.

    Versions are those of `major`.
    """
    asked: dict[str, list[str]] = {}
    for r in routes:
        if r.policy and not r.gone:
            asked.setdefault(r.policy, []).append(_place(r, major))
    return "\n".join(_said(rule, sorted(set(asked.get(rule.name, [])))) for rule in rules)


def _place(r: Route, major: int) -> str:
    first, last = r.versions
    since = f"  since {major}.{first}" if first else ""
    until = f"  until {major}.{last}" if last < NEWEST else ""
    return f"{r.method} {r.path}{f' ({r.action})' if r.action else ''}{since}{until}"


def _said(rule: Rule, places: list[str]) -> str:
    told = [rule.description, *places, f"Scope: {', '.join(rule.scopes)}" if rule.scopes else ""]
    return "".join(f"# {line}\n" for line in told if line) + f'#"{rule.name}": "{rule.check}"\n'
