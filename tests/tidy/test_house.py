"""Rules of the house that no tool knows. Each says why it is one; an exception says why it is one, too."""

import ast
import re
import runpy
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import kilonova

ROOT = Path(__file__).resolve().parents[2]
HOUSE = Path(kilonova.__file__).parent
MODULES = sorted(p for p in HOUSE.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(HOUSE).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def committed() -> list[Path]:
    """The files of this checkout that git knows, or would: not what a run leaves behind."""
    asked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this is no git checkout")
    return [path for line in done.stdout.split("\0") if line and (path := ROOT / line).is_file()]


def test_every_file_says_what_it_is_about() -> None:
    """A file is a chapter: who opens it must see in one line whether to read on."""
    silent = []
    for path in MODULES:
        said = (ast.get_docstring(tree(path)) or "").strip().splitlines()
        if path.read_text().strip() and (not said or len(said[0]) < 12):
            silent.append(name(path))
    assert not silent


def test_every_folder_is_a_package() -> None:
    """A folder without `__init__.py` is not packed into a wheel, and import-linter does not look into it."""
    assert not [name(p.parent) for p in MODULES if not (p.parent / "__init__.py").exists()]


# ---- what is handed in

# The simulator holds time, dice and ids: whoever asks the machine for them himself cannot be replayed from a seed.
ASKED: dict[str, set[str]] = {
    "time": {"time", "time_ns", "sleep", "monotonic", "monotonic_ns", "localtime", "gmtime", "ctime"},
    "datetime.datetime": {"now", "utcnow", "today"},
    "datetime.date": {"today"},
    "uuid": {"uuid1", "uuid4", "getnode"},
    "random": {
        "random",
        "randint",
        "randrange",
        "uniform",
        "choice",
        "choices",
        "shuffle",
        "sample",
        "seed",
        "SystemRandom",
    },
    "secrets": {"token_bytes", "token_hex", "token_urlsafe", "choice", "randbelow", "randbits"},
    "os": {"urandom", "environ", "getenv", "environb"},
}

# The rim of the house: what touches the real machine, and has no place in a simulation.
RIM = ("main.py", "cli/", "console/", "virt/libvirt/", "companions/wires/", "companions/guest/")

# fmt: off
EXCEPTIONS = {
    "kit/clock.py":         "this is where they are handed out",
    "companions/tokens.py": "salts must be beyond guessing, and nothing is decided by them",
    "kit/db.py":            "how long a refused transaction waits before the next try; in a simulation no transaction is refused",
}
# fmt: on


def asks(path: Path) -> Iterator[str]:
    """`line: time.sleep`, for each thing of ASKED that the module names, however it imported it."""
    module, known = tree(path), {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute | ast.Name):
            left, _, right = ast.unparse(node).partition(".")
            full = f"{known[left]}{'.' * bool(right)}{right}" if left in known else ""
            whose, _, what = full.rpartition(".")
            if what in ASKED.get(whose, ()):
                yield f"{name(path)}:{node.lineno}: {full}"


def test_time_dice_and_ids_are_handed_in() -> None:
    inside = [p for p in MODULES if not name(p).startswith(RIM) and name(p) not in EXCEPTIONS]
    assert not [found for path in inside for found in asks(path)]


def test_an_exception_that_nobody_needs_is_gone() -> None:
    assert not [e for e in EXCEPTIONS if not (HOUSE / e).exists() or not any(asks(HOUSE / e))]


# ---- what a stranger would stumble over


def test_nothing_committed_knows_the_machine_it_was_written_on() -> None:
    """A path or a tool that only one workplace has is a riddle, or a broken command, to everybody else."""
    only_here = re.compile(r"/[w]ork/(main|shared)|/tmp/[k]venv|\b[f]arm-[a-z]+|\b[i]ssues show|/root/[.]pyenv")
    found = []
    for path in committed():
        if path.suffix in (".py", ".md", ".toml", ".sh", ".yaml", ".json", ".lock", ""):
            for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
                if only_here.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_links_in_the_docs_lead_somewhere() -> None:
    links = [
        (page, link)
        for page in committed()
        if page.suffix == ".md"
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
        if "://" not in link and not link.startswith("mailto:")
    ]
    broken = [f"{page.relative_to(ROOT)}: {link}" for page, link in links if not (page.parent / link).exists()]
    assert not broken


def test_the_lock_holds_what_the_project_asks_for() -> None:
    """What is not in the lock comes in whatever version is newest on the day: another cloud each week."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    locked = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert not {re.split(r"[<>=!~;\[ ]", r)[0].lower().replace("_", "-") for r in asked} - locked


def test_tests_lie_in_the_rooms_they_belong_to() -> None:
    rooms = {"pure", "store", "cloud", "chaos", "contracts", "clients", "fleet", "metal", "tidy"}
    stray = [p for p in (ROOT / "tests").rglob("test_*.py") if p.relative_to(ROOT / "tests").parts[0] not in rooms]
    assert not stray


def test_every_mutant_can_be_planted() -> None:
    """`tests/chaos/mutants.py` runs seldom: what it takes out must be there once, or its table says nothing."""
    mutants = runpy.run_path(str(ROOT / "tests/chaos/mutants.py"))["MUTANTS"]
    cuts = [(name, *cut) for name, mutant in mutants.items() for cut in mutant.cuts]
    assert [(name, file) for name, file, old, _ in cuts if (HOUSE / file).read_text("utf-8").count(old) != 1] == []
    assert [file for m in mutants.values() for file in m.tests if not (ROOT / file.partition("::")[0]).exists()] == []
