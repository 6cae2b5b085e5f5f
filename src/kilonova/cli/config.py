"""`kilonova config`: what can be chosen, and what was; who may what. And where every command reads it from."""

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from kilonova.kit.config import load, reference, sample, written
from kilonova.kit.policy import Rule
from kilonova.kit.policy import reference as of
from kilonova.kit.routes import Routes
from kilonova.model.options import Config


def read(file: Path | None = None, given: Mapping[str, object] | None = None) -> Config:
    """The configuration of this process: `file`, or the files of `places` that exist; environment; `given` by full name.

    Raises Invalid, with a sentence for each mistake.
    """
    paths = [file] if file else [p for p in places(os.environ) if p.exists()]
    return load(paths, os.environ, Config, given)


def places(env: Mapping[str, str]) -> list[Path]:
    """Where an operator writes, and where a user does; the user's wins."""
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/")) / ".config")
    return [Path("/etc/kilonova/kilonova.toml"), home / "kilonova/kilonova.toml"]


def main(words: list[str]) -> int:
    """`sample`, `reference`, `policy`, or `show`: the choices that hold now, secrets as `***`."""
    parser = argparse.ArgumentParser("kilonova config", description=__doc__)
    parser.add_argument(
        "what",
        choices=["sample", "reference", "policy", "show"],
        help="a file to begin with, a page, a policy.yaml to begin with, or what holds now",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="read this file instead of the usual ones")
    chosen = parser.parse_args(words)
    match chosen.what:
        case "sample":
            print(sample(Config), end="")
        case "reference":
            print(reference(Config), end="")
        case "policy":
            print(policies(), end="")
        case "show":
            print(written(read(chosen.config)), end="")
    return 0


def policies() -> str:
    """The rules of all services, as one `policy.yaml`; each with the requests in which it is asked."""
    return "\n".join(f"# ---- {name}\n\n{of(rules, routes, major)}" for name, rules, routes, major in _services())


def _services() -> Iterator[tuple[str, list[Rule], Routes, int]]:
    """(name, rules, routes, number of its version); the chapters of a service fill its registry when they are imported."""
    from kilonova import placement  # noqa: F401
    from kilonova.api import app, policies, registry  # noqa: F401
    from kilonova.companions import identity, image, network, realm, share, volume  # noqa: F401
    from kilonova.companions.network import frame as ports
    from kilonova.companions.network import rules as wires
    from kilonova.companions.volume import frame as disks
    from kilonova.companions.volume import rules as volumes
    from kilonova.placement import frame as rooms
    from kilonova.placement import policies as inventories

    yield "Compute", policies.RULES, registry.R, 2
    yield "Placement", inventories.RULES, rooms.R, 1
    yield "Identity", realm.RULES, realm.R, 3
    yield "Image", image.RULES, image.R, 2
    yield "Network", wires.RULES, ports.R, 2
    yield "Block storage", volumes.RULES, disks.R, 3
    yield "Shared file systems", share.POLICY, share.R, 2
