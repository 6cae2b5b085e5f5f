"""Luggage: how the disks of a machine that was turned off reach another host (`moves.py`).

The source serves the files as they lie, to read only, by NBD in TLS; whoever has the key that is made for this one move
may read them, and nobody else (TLS-PSK: https://www.qemu.org/docs/master/system/tls.html).  The target copies them and is
then alone with them.  Keys stand in files of their owner's, never on a command line.

Who serves is a process of its own, so that a restart of ours does not matter; one that is gone is started again with the
next life, at the same port.  What is needed for that lies in the machine's directory, under `serving`.
"""

import contextlib
import ipaddress
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kilonova.contracts.compute import Luggage
from kilonova.kit.errors import NotFound, Refused, Trouble, Unavailable, Unsupported
from kilonova.model.machine import Disk, ImageSource, Machine, VolumeSource
from kilonova.virt.driver import Progress
from kilonova.virt.libvirt import disks, volumes, xml
from kilonova.virt.libvirt.copies import grow, mates_of, new
from kilonova.virt.libvirt.disks import PATH
from kilonova.virt.libvirt.keeper import started
from kilonova.virt.libvirt.records import laid_in, machine_in, put

logger = logging.getLogger(__name__)

SERVING = "serving"
USER = "kilonova"
PORTS = 64  # that are tried, from the first on
READERS = 4
SLOWEST_BYTES_PER_S = 1 << 20  # that a copy may be; then the way between the hosts counts as broken
ENDING_S = 5.0
AWAY = ("Connection refused", "Connection reset", "Connection timed out", "No route to host", "Network is unreachable")
Files = dict[str, Path]  # by the name under which they are served


class Serving(msgspec.Struct, frozen=True):
    """Who serves the files of a directory. `since`: in the kernel's own count, so that another process is not taken for it."""

    pid: int
    since: str
    address: str
    port: int
    key: str

    def __repr__(self) -> str:
        return f"Serving({self.pid}, {self.port})"


# ---- the source


def packed(directory: Path, owner: str, address: str, first_port: int) -> Luggage:
    """What the machine in this directory, which is off, leaves with. Without an address only this host can use it."""
    if not address:
        return Luggage(more={"owner": owner})
    machine = machine_in(directory)
    assert machine is not None
    now = _served(directory) or _serve(directory, address, first_port)
    host = f"[{address}]" if ":" in address else address
    own = [d for d in machine.disks if not isinstance(d.source, VolumeSource)]
    more = {
        "owner": owner,
        "key": now.key,
        "disks": msgspec.json.encode(own).decode(),
        "laid": msgspec.json.encode({d.device: laid_in(directory)[d.device] for d in own}).decode(),
        "files": " ".join(files_of(directory)),
    }
    return Luggage(uri=f"nbd://{host}:{now.port}", more=more)


def files_of(directory: Path) -> Files:
    """What is to be had: `vda.0` the file that the guest wrote to, `vda.1` what is below it, `config` the config drive."""
    machine, found = machine_in(directory), dict[str, Path]()
    for disk in machine.disks if machine else ():
        if not isinstance(disk.source, VolumeSource):
            for number, layer in enumerate(laid_in(directory)[disk.device].layers):
                path = Path(layer.path)
                here = directory / path.name  # it may have another name just now
                found[f"{disk.device}.{number}"] = here if path.name.startswith("disk.") else path
    if (directory / xml.CONFIG_DRIVE).exists():
        found["config"] = directory / xml.CONFIG_DRIVE
    return found


def ended(directory: Path) -> None:
    """Nobody serves the files of this directory any more. Nobody did: nothing to do."""
    if now := _served(directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(now.pid, signal.SIGTERM)
        end = time.monotonic() + ENDING_S
        while started(now.pid) == now.since:
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(now.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
    shutil.rmtree(directory / SERVING, ignore_errors=True)


def served_again(instances: Path, names: set[str]) -> None:
    """After the machine under us was off, say: what was served is served."""
    for name in sorted(names):
        directory = instances / name
        now = _kept(directory)
        if now is not None and started(now.pid) != now.since:
            try:
                _serve(directory, now.address, now.port, now.key)
            except Trouble as e:
                logger.warning("the disks in %s are not served any longer: %s", directory, e.why or e.said)


def _served(directory: Path) -> Serving | None:
    now = _kept(directory)
    return now if now is not None and started(now.pid) == now.since else None


def _kept(directory: Path) -> Serving | None:
    try:
        return msgspec.json.decode((directory / SERVING / "serving.json").read_bytes(), type=Serving)
    except (OSError, msgspec.MsgspecError):
        return None


def _serve(directory: Path, address: str, first_port: int, key: str = "") -> Serving:
    program = shutil.which("qemu-storage-daemon", path=PATH)
    if not program:
        raise Unsupported("There is no qemu-storage-daemon on this host (Debian: qemu-system-common).")
    where, key = directory / SERVING, key or secrets.token_hex(32)
    where.mkdir(mode=0o700, exist_ok=True)
    put(where / "keys.psk", f"{USER}:{key}\n".encode())
    with _listening(address, first_port) as door:
        command = [program, "--object", _creds("server", where)]
        for number, (name, path) in enumerate(files_of(directory).items()):
            file = {"driver": "file", "filename": str(path), "read-only": True, "locking": "off"}
            node = {"driver": "raw", "node-name": f"n{number}", "read-only": True, "file": file}
            command += ["--blockdev", msgspec.json.encode(node).decode()]
            command += ["--export", f"type=nbd,id=e{number},node-name=n{number},name={name}"]
        server = f"addr.type=fd,addr.str={door.fileno()},tls-creds=tls,max-connections={READERS}"
        at = command.index("--blockdev") if "--blockdev" in command else len(command)
        command[at:at] = ["--nbd-server", server]
        with (where / "log").open("wb") as log:
            process = subprocess.Popen(
                command, pass_fds=[door.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, env={"PATH": PATH, "LC_ALL": "C"},
            )  # fmt: skip
        port = door.getsockname()[1]
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.2)  # it ends at once where it does not like what it was told
    if process.poll() is not None:
        raise Refused("The disks of the server cannot be served.", why=(where / "log").read_text()[-500:])
    now = Serving(process.pid, started(process.pid), address, port, key)
    put(where / "serving.json", msgspec.json.encode(now))
    return now


def _listening(address: str, first_port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    why = ""
    for port in range(first_port, first_port + PORTS) if first_port else [0]:
        try:
            return socket.create_server((address, port), family=family, backlog=READERS)
        except OSError as e:
            why = f"{address}: {e}"
    raise Refused("The disks of the server cannot be served at the address of this host.", why=why)


def _creds(end: str, where: Path) -> str:
    doubled = str(where).replace(",", ",,")
    user = f",username={USER}" if end == "client" else ""
    return f"tls-creds-psk,id=tls,endpoint={end},dir={doubled}{user}"


# ---- the target


def unpacked(
    workshop: disks.Workshop, machine: Machine, luggage: Luggage, into: Path, of: Path, progress: Progress
) -> dict[str, xml.Laid]:
    """Its disks, fetched into `into`, where they will lie when that is called `of`. They grow, never shrink."""
    try:
        before = msgspec.json.decode(luggage.more.get("disks", ""), type=list[Disk])
        was = msgspec.json.decode(luggage.more.get("laid", ""), type=dict[str, xml.Laid])
        at = urllib.parse.urlsplit(luggage.uri)
        address, port = str(ipaddress.ip_address(at.hostname or "")), at.port
        assert port is not None
    except (msgspec.MsgspecError, ValueError, AssertionError) as e:
        raise Refused("The other host does not say how its disks are to be had.", why=str(e)) from None
    mates, laid = mates_of(machine.disks, before), dict[str, xml.Laid]()
    with _key(luggage.more.get("key", "")) as key:

        def get(name: str, to: Path) -> None:
            _fetched(key, address, port, name, to, progress)
            to.chmod(workshop.mode)

        for number, disk in enumerate(machine.disks):
            progress("copying disks")
            mate = mates.get(disk.device)
            if isinstance(disk.source, VolumeSource):
                laid[disk.device] = volumes.laid(disk.source)
            elif mate is None:
                laid[disk.device] = new(workshop, disk, number, into, of)
            else:
                found = was[mate.device]
                layers = list[xml.Layer]()
                if not found.read_only:
                    path = into / f"disk.{disk.device}"
                    get(f"{mate.device}.0", path)
                    layers.append(xml.Layer(str(of / path.name), found.layers[0].format))
                if below := found.layers[len(layers) :]:
                    layer = _below(workshop, disk, into, of, progress)
                    if layer is None:
                        own = into / f"disk.{disk.device}.base"
                        get(f"{mate.device}.{len(layers)}", own)
                        layer = xml.Layer(str(of / own.name), below[0].format)
                    if layers:
                        seen = into / Path(layer.path).name if Path(layer.path).parent == of else Path(layer.path)
                        _stands_on(path, str(seen), layer)
                        grow(path, "qcow2", disk.size_bytes)
                        _stands_on(path, layer.path, layer)
                    layers.append(layer)
                elif layers:
                    grow(path, layers[0].format, disk.size_bytes)
                laid[disk.device] = msgspec.structs.replace(found, layers=layers)
        if machine.config_drive and "config" in luggage.more.get("files", "").split():
            get("config", into / xml.CONFIG_DRIVE)
    return laid


def _stands_on(path: Path, below: str, layer: xml.Layer) -> None:
    """-u: the header is written without opening what lies below; we know it."""
    disks.qemu_img("rebase", "-q", "-u", "-f", "qcow2", "-F", layer.format, "-b", below, str(path))


def _below(workshop: disks.Workshop, disk: Disk, into: Path, of: Path, progress: Progress) -> xml.Layer | None:
    """The image that it stands on, as this host has it, or gets it; None where it is not to be had any more."""
    if not isinstance(disk.source, ImageSource):
        return None
    try:
        base = workshop.cache.base(disk.source, progress)
    except (NotFound, Refused):
        return None
    return xml.Layer(str(workshop.cache.path(base)), base.format)


def _fetched(key: Path, address: str, port: int, name: str, to: Path, progress: Progress) -> None:
    """One file, with its holes, and safe from a power cut. Raises Refused, Unavailable."""
    program = shutil.which("qemu-img", path=PATH)
    if not program:
        raise Refused("There is no qemu-img on this host.")
    server = f"file.server.type=inet,file.server.host={address},file.server.port={port}"
    source = f"driver=raw,file.driver=nbd,{server},file.export={name},file.tls-creds=tls"
    command = [program, "convert", "-q", "--object", _creds("client", key), "--image-opts", source]
    command += ["-O", "raw", "-t", "writeback", str(to)]
    began, size = time.monotonic(), 0
    env = {"PATH": PATH, "LC_ALL": "C", "MALLOC_ARENA_MAX": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                    break
                progress("copying disks")
                size = to.stat().st_size if to.exists() else 0  # it is as long as it will be from the start
                if time.monotonic() - began > 60 + size / SLOWEST_BYTES_PER_S:
                    raise Refused("The disks of the server could not be fetched from its host in time.", why=name)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            log.seek(0)
            why = log.read()[-500:].decode(errors="replace").strip()
            if "No space left on device" in why:
                raise OSError(28, "No space left on device")
            if any(word in why for word in AWAY):
                raise Unavailable("The host that the server comes from does not answer.", why=why)
            raise Refused("The disks of the server could not be fetched from its host.", why=why)
    with to.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _key(key: str) -> Iterator[Path]:
    """In a directory that nobody else may read."""
    with tempfile.TemporaryDirectory(prefix="kilonova-luggage-") as where:
        put(Path(where) / "keys.psk", f"{USER}:{key}\n".encode())
        yield Path(where)
