"""What a newcomer mistypes, and what his machine does not give him: a sentence and an exit status, never a trace."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from kilonova.cli import images
from kilonova.cli.state import StateDir
from kilonova.kit.clock import Ids
from kilonova.kit.errors import Conflict, Invalid

SOURCE = Path(images.__file__).parents[2]


def said(home: Path, *words: str, status: int = 1) -> str:
    """What `kilonova …` says on its way out."""
    return run(home, *words, status=status)[-1]


def run(home: Path, *words: str, status: int = 0) -> list[str]:
    """The lines that `kilonova …` says."""
    env = os.environ | {"HOME": str(home), "PYTHONPATH": str(SOURCE), "TMPDIR": str(home)}
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "kilonova.main", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
        stdin=subprocess.DEVNULL,
        cwd=home,
        check=False,
    )
    assert done.returncode == status, done
    assert "Traceback" not in done.stdout + done.stderr
    return (done.stdout + done.stderr).strip().splitlines()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With a cloud in it that was up once."""
    state = StateDir(tmp_path / "state")
    state.secrets(Ids())
    return tmp_path


UP = ("up", "--driver", "sim", "--port", "0", "--state-dir", "state")


def test_words_that_cannot_be(home: Path) -> None:
    assert "there is no command 'upp'" in said(home, "upp", status=2)
    assert "unrecognized arguments: --wrong" in said(home, "up", "--wrong", status=2)
    assert "--sim-hosts goes with --driver sim" in said(home, "up", "--sim-hosts", "3")
    assert "api.port" in said(home, "up", "--port", "99999")
    assert "hours are more than none" in said(home, "sim", "--hours", "-1", status=2)
    assert "Cannot read /nonexistent.toml" in said(home, "up", "--config", "/nonexistent.toml")


def test_an_address_that_is_not_ours_is_no_matter_of_the_port(home: Path) -> None:
    line = said(home, "up", "--driver", "sim", "--host", "192.0.2.1", "--state-dir", "state")
    assert "Cannot listen on 192.0.2.1:8774" in line
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "already in use" in said(home, *UP, "--port", port)


def test_images_that_cannot_be_are_told_before_anything_begins(home: Path) -> None:
    (home / "empty").touch()
    assert "is empty" in said(home, *UP, "--image", "empty")
    assert "No such file" in said(home, *UP, "--image", "absent")
    with pytest.raises(Invalid, match="http and https"):
        images.checked("ftp://example.org/x")


def test_a_directory_of_something_else_is_neither_lived_in_nor_purged(home: Path) -> None:
    (home / "photos").mkdir()
    (home / "photos/cat").touch()
    for words in (("up", "--driver", "sim"), ("down", "--purge"), ("down",)):
        line = said(home, *words, "--state-dir", "photos")
        assert "no cloud lives" in line.lower()
    assert (home / "photos/cat").exists()
    with pytest.raises(Conflict):
        StateDir(home / "photos")
    assert "it is no directory" in said(home, *UP[:-1], "photos/cat")
    assert said(home, "status", "--state-dir", "photos", status=3) == "It is not up."


def test_what_was_spoiled_is_told_and_can_be_purged(home: Path) -> None:
    secrets = (home / "state/secrets.json").read_text()
    (home / "state/secrets.json").write_text("junk")
    assert "secrets.json cannot be understood" in said(home, *UP)
    (home / "state/secrets.json").write_text(secrets)
    (home / "state/kilonova.db").write_text("this is no database, but long enough to be the header of one " * 9)
    assert "not a database" in said(home, *UP)
    assert "is gone" in said(home, "down", "--purge", "--state-dir", "state", status=0)
    assert not (home / "state").exists()


def test_another_versions_database_is_told_and_left_alone(home: Path) -> None:
    base = sqlite3.connect(home / "state/kilonova.db")
    base.execute("CREATE TABLE servers (id TEXT, colour TEXT)")
    base.commit()
    base.close()
    line = said(home, *UP)
    assert "another version of Kilonova" in line and "servers has no" in line


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a small disk needs root")
def test_a_full_disk_is_told(home: Path) -> None:
    small = home / "small"
    small.mkdir()
    script = f'mount -t tmpfs -o size=200k none {small}; exec "$@"'
    argv = [sys.executable, "-m", "kilonova.main", *UP[:-1], str(small / "state")]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "sh", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(SOURCE), "HOME": str(home)},
        check=False,
    )
    assert done.returncode == 1 and "disk is full" in done.stderr and "Traceback" not in done.stderr, done
