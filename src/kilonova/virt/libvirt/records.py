"""What a server's directory says of it: which machine it is, where its disks lie, which port leads to its ssh."""

import contextlib
import logging
import os
import re
from pathlib import Path

import msgspec

from kilonova.kit.errors import Refused
from kilonova.model.machine import Machine
from kilonova.virt.libvirt.xml import Laid

logger = logging.getLogger(__name__)

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
SSH_PORT = "ssh.port"


def machine_in(directory: Path) -> Machine | None:
    """None where there is none (yet), or one that nobody can read."""
    try:
        return msgspec.json.decode((directory / "machine.json").read_bytes(), type=Machine)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.MsgspecError as e:
        logger.error("the machine in %s cannot be read: %s", directory, e)
        return None


def remember(directory: Path, machine: Machine) -> None:
    """Without the password: it stands on the config drive, and nowhere else."""
    put(directory / "machine.json", msgspec.json.encode(msgspec.structs.replace(machine, admin_password="")))


def laid_in(directory: Path) -> dict[str, Laid]:
    """Where its disks lie, by the names that the guest has for them. Raises Refused."""
    try:
        return msgspec.json.decode((directory / "disks.json").read_bytes(), type=dict[str, Laid])
    except OSError:
        raise Refused("The disks of the server are missing on this host.") from None


def lay(directory: Path, laid: dict[str, Laid]) -> None:
    put(directory / "disks.json", msgspec.json.encode(laid))


def ssh_port(directory: Path) -> int:
    """The port of the machine's loopback that leads to the ssh of a server with this directory; 0: none does."""
    try:
        return int((directory / SSH_PORT).read_text())
    except (OSError, ValueError):
        return 0


def doors(state_dir: Path) -> dict[str, int]:
    """Of a host: server → the port of the machine's loopback that leads to its ssh. Asks nobody, files tell."""
    found = {path.parent.name: ssh_port(path.parent) for path in (state_dir / "instances").glob(f"[!.]*/{SSH_PORT}")}
    return {id: port for id, port in sorted(found.items()) if port and UUID.fullmatch(id)}


def put(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as out:
        out.write(content)
    part.replace(path)


def written(*paths: Path) -> None:
    """These are on the disk, should the power fail now: files with what is in them, directories with their names."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
