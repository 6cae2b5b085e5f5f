"""`kilonova up` and `kilonova demo`: a cloud on this machine, in the foreground, until Ctrl-C."""

import argparse
import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import msgspec

from kilonova.cli import config as configuration
from kilonova.cli import images, setup
from kilonova.cli.state import Running, Secrets, StateDir, private, started, usual
from kilonova.companions.wires import userns
from kilonova.companions.wires.forward import Forward
from kilonova.kit import log as logs
from kilonova.kit.clock import Ids, WallClock
from kilonova.kit.errors import Invalid, Refused, Trouble, Unavailable, Unsupported
from kilonova.kit.http import listen
from kilonova.kit.memory import built
from kilonova.model import options

# What guests have where we make no networks, and what they have not.
APART = (
    "So each server is alone with QEMU: it has its address, metadata, and a port of this machine that leads to its ssh\n"
    "(`kilonova status` lists them). There are no security groups, routers and floating IPs, servers do not reach one\n"
    "another, and they {outside}.\n"
    "Metadata is on a second card: an image that asks only its first one needs a config drive."
)
OUTSIDE = {False: "do not get out (option network.forward)", True: "get out, and to this machine's loopback"}


def main(words: list[str], *, demo: bool) -> int:
    chosen = _parser(demo).parse_args(words)
    config = _configured(chosen)
    if chosen.sim_hosts is not None and config.compute.driver != "sim":
        raise Invalid("--sim-hosts goes with --driver sim.")
    if chosen.image:
        images.checked(chosen.image)
    state = StateDir(config.state.directory or usual(dict(os.environ)))
    with state.held():
        if chosen.tls and config.tls.cert_file is None:
            config = _certified(config, state)
        _furnish_machine(config, chosen)
        began = time.monotonic()
        secrets = state.secrets(Ids(), config.identity.admin_password.reveal())
        logs.setup(
            level=config.log.level,
            format=config.log.format,
            file=config.log.file or state.log,
            levels=config.log.levels,
            access=config.log.access,
        )
        for secret in (secrets.admin_password, secrets.service_password, secrets.metadata_secret):
            logs.hide(secret)
        return _serve(config, state, secrets, chosen, demo, began)


def _parser(demo: bool) -> argparse.ArgumentParser:
    what = (
        "a cloud, and a first server that boots before your eyes"
        if demo
        else "a cloud on this machine, in the foreground"
    )
    parser = argparse.ArgumentParser(f"kilonova {'demo' if demo else 'up'}", description=what)
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="where the cloud lives (under your state home)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="read this file instead of the usual ones")
    parser.add_argument(
        "--host", metavar="ADDRESS", help="listen there; others than loopback let the network in (127.0.0.1)"
    )
    parser.add_argument("--port", type=int, metavar="N", help="listen there (8774, or a free one where that is taken)")
    parser.add_argument(
        "--tls", action="store_true", help="https, with a certificate of its own making where [tls] names none"
    )
    parser.add_argument("--driver", choices=["libvirt", "sim"], help="real machines, or simulated ones")
    parser.add_argument("--sim-hosts", type=int, metavar="N", help="so many simulated hosts; goes with --driver sim")
    parser.add_argument(
        "--image", metavar="FILE|URL", help="a disk image for servers, instead of one built from Debian's packages"
    )
    parser.set_defaults(no_image=False)
    if not demo:
        parser.add_argument("--no-image", action="store_true", help="put no image there")
    parser.add_argument("--yes", "-y", action="store_true", help="install what is missing without asking")
    if demo:
        parser.add_argument(
            "--once", action="store_true", help="end it, and remove the server, when the login prompt was seen"
        )
    return parser


def _configured(chosen: argparse.Namespace) -> options.Config:
    said = {
        "state.directory": chosen.state_dir,
        "api.host": chosen.host,
        "api.port": chosen.port,
        "compute.driver": chosen.driver,
        "sim.hosts": chosen.sim_hosts,
    }
    given = {name: value for name, value in said.items() if value is not None}
    return configuration.read(chosen.config, given)


def _furnish_machine(config: options.Config, chosen: argparse.Namespace) -> None:
    """Debian packages that are missing, after saying so."""
    if config.compute.driver == "sim":
        return
    features = {"libvirt", "network"} | (set() if chosen.image or chosen.no_image else {"guest"})
    if os.geteuid() != 0:
        features.add("userns")
    quiet = chosen.yes or not sys.stdin.isatty()
    setup.ensure(features, say=_say, ask=(lambda _: True) if quiet else setup.agree)


def _certified(config: options.Config, state: StateDir) -> options.Config:
    """With a certificate for what this machine is called by itself."""
    from kilonova.cli.certificates import own

    names = {"localhost", "127.0.0.1", "::1", socket.gethostname()}
    names |= {config.api.host} - {"0.0.0.0", "::"}  # noqa: S104
    names |= {urllib.parse.urlsplit(config.api.public_url).hostname or ""} if config.api.public_url else set()
    made, ca = own(state.path / "tls", names - {""}, WallClock().now())
    return msgspec.structs.replace(config, tls=options.Tls(made.cert_file, made.key_file, ca))


def _serve(
    config: options.Config, state: StateDir, secrets: Secrets, chosen: argparse.Namespace, demo: bool, began: float
) -> int:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    asked = chosen.port is not None or config.api.port != options.Api().port
    listener, way_in, consoles = _doors(config, state, secrets, asked)
    port = listener.getsockname()[1]
    if secrets.port != port and not asked:
        secrets.port = port
        state.keep(secrets)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.api.host, config.api.host)  # noqa: S104 (what clients call)
    url = config.api.public_url or f"{'https' if config.tls.cert_file else 'http'}://{host}:{port}"

    inner = listen("127.0.0.1", port) if way_in is not None else None  # there, it is another loopback
    with built():
        from kilonova.cli.cloud import Cloud  # the whole house: imported when all that can be refused was

        cloud = Cloud(config, state, secrets, listener, url, inner, consoles)
        cloud.start()
    try:
        credentials(state, secrets, url, config.tls.ca_file)
        if cloud.ground is not None and cloud.ground.kind == "qemu":
            _say(cloud.ground.why)
            _say(APART.format(outside=OUTSIDE[config.network.forward]))
        state.tell(Running(os.getpid(), started(os.getpid()), url, time.time(), str(config.tls.ca_file or "")))
        _say(f"The cloud is up at {url} after {time.monotonic() - began:.1f} s; its home is {state.path}.")
        if demo:
            return _demo(cloud, state, secrets, chosen, url, stop, way_in)
        _say(f"Consoles of servers are at {cloud.console_url}.")
        _say(
            f"Next:  export OS_CLIENT_CONFIG_FILE={shlex.quote(str(state.clouds))} OS_CLOUD=kilonova; openstack flavor list"
        )
        _when_ready(cloud.health.reasons, stop)
        if not chosen.no_image and not stop.is_set():
            _in_background(lambda: _image(url, secrets, state, chosen.image, config, _say))
        stop.wait()
    finally:
        _say("Stopping …")
        cloud.close()
    _say("Stopped. Servers go on; `kilonova up` finds them again.")
    return 0


def _doors(
    config: options.Config, state: StateDir, secrets: Secrets, asked: bool
) -> tuple[socket.socket, socket.socket | None, socket.socket]:
    """The sockets of the API and of consoles, and for an ordinary user one more that can lead to a guest (the second).

    All are made on the machine itself; then an ordinary user's process goes into a user namespace of his own, where
    it has its networks as root has, and finds them there.
    """
    if handed := userns.inherited():
        return handed[0], handed[1], handed[2]
    try:
        listener = listen(config.api.host, config.api.port if asked else secrets.port or config.api.port)
    except Unavailable as e:
        if asked:
            raise
        try:
            listener = listen(config.api.host, 0)
        except Unavailable:
            raise e from None  # it is not the port
        _say(f"{e.said} A free port is taken instead.")
    try:
        consoles = listen(config.api.host, config.console.port)
    except Unavailable:
        consoles = listen(config.api.host, 0)
    if config.compute.driver != "sim" and os.geteuid() != 0 and config.network.plane in ("auto", "user"):
        try:
            argv = [sys.executable, "-P", "-m", "kilonova.main", *sys.argv[1:]]
            userns.reexec_if_needed(argv, [listener, listen("127.0.0.1", 0), consoles], state.path)
        except Unsupported as e:
            if config.network.plane == "user":
                raise
            _say(f"No user namespace: {e.said}")
    return listener, None, consoles


def _demo(
    cloud: object,
    state: StateDir,
    secrets: Secrets,
    chosen: argparse.Namespace,
    url: str,
    stop: threading.Event,
    way_in: socket.socket | None,
) -> int:
    from kilonova.cli import demo
    from kilonova.cli.client import Client
    from kilonova.cli.cloud import Cloud
    from kilonova.virt.libvirt.records import doors

    assert isinstance(cloud, Cloud)
    client = Client(url, secrets.admin_password, ca_file=cloud.config.tls.ca_file)
    client.login()
    image = _image(url, secrets, state, chosen.image, cloud.config, _say)
    _when_ready(cloud.health.reasons, stop)
    if stop.is_set():
        return 130
    if why := cloud.health.reasons():
        raise Refused(f"{'; '.join(why.values())} The log says more: {state.log}")
    if cloud.driver is not None:
        facts = cloud.driver.host()
        _say(f"Machines run under {facts.virt_type}: {facts.virt_why}")
    found = demo.run(client, state, image, _say, tidy=chosen.once)
    where = ""
    if cloud.driver is not None and found["floating"]:
        where = f"kilonova@{found['floating']}"
        if way_in is not None:  # the guest is in a namespace of this user's own: a port of the machine leads there
            Forward(way_in, found["floating"], 22)
            where = f"-p {way_in.getsockname()[1]} kilonova@127.0.0.1"
    elif port := doors(state.path / "hosts" / cloud.name).get(found["id"]):
        where = f"-p {port} kilonova@127.0.0.1"
    demo.farewell(found, state, url, where, _say)
    if chosen.once:
        demo.remove(client, found["id"], _say)
        return 0
    _say("Ctrl-C ends the cloud.")
    stop.wait()
    return 0


def _when_ready(reasons: Callable[[], dict[str, str]], stop: threading.Event, most_s: float = 60) -> None:
    """Waits; says for what when it takes long."""
    began, told = time.monotonic(), False
    while (why := reasons()) and time.monotonic() < began + most_s and not stop.wait(0.05):
        if not told and time.monotonic() > began + 8:
            told = True
            _say(f"Waiting for a host … ({'; '.join(why.values())})")


def _in_background(work: Callable[[], object]) -> None:
    def guarded() -> None:
        try:
            work()
        except Trouble as e:
            _say(f"No image yet: {e.said}")
        except Exception:
            logging.getLogger(__name__).exception("no image")

    threading.Thread(target=guarded, name="image", daemon=True).start()


def _image(
    url: str, secrets: Secrets, state: StateDir, given: str | None, config: options.Config, say: Callable[[str], None]
) -> str:
    """The id of an image that servers can be made of: the given one, or our own guest; put there where it is not yet."""
    from kilonova.cli.client import Client

    client = Client(url, secrets.admin_password, ca_file=config.tls.ca_file)
    client.login()
    if given:
        return images.given(client, given, state, say)
    if config.compute.driver == "sim":
        return images.pretended(client, say)
    return images.guest(client, say)


def credentials(state: StateDir, secrets: Secrets, url: str, ca_file: Path | None = None) -> None:
    """clouds.yaml for openstacksdk and its clients, openrc for shells; readable by their owner only."""
    ca = str(ca_file.absolute()) if ca_file is not None else ""
    auth = f"{url}/identity/v3"
    clouds = f"""# Written by kilonova up.
clouds:
  kilonova:
    auth:
      auth_url: {auth}
      username: admin
      password: {secrets.admin_password}
      project_name: admin
      user_domain_name: Default
      project_domain_name: Default
    region_name: RegionOne
    identity_api_version: "3"
"""
    clouds += f"    cacert: {json.dumps(ca)}\n" if ca else ""
    names = ("OS_CLOUD", "OS_TOKEN")
    rc = {
        "OS_AUTH_URL": auth,
        "OS_USERNAME": "admin",
        "OS_PASSWORD": secrets.admin_password,
        "OS_PROJECT_NAME": "admin",
        "OS_USER_DOMAIN_NAME": "Default",
        "OS_PROJECT_DOMAIN_NAME": "Default",
        "OS_REGION_NAME": "RegionOne",
        "OS_IDENTITY_API_VERSION": "3",
    } | ({"OS_CACERT": ca} if ca else {})
    private(state.clouds, clouds)
    private(
        state.openrc,
        "".join(f"unset {n}\n" for n in names) + "".join(f"export {k}={shlex.quote(v)}\n" for k, v in rc.items()),
    )


def _say(line: str) -> None:
    print(line, flush=True)
