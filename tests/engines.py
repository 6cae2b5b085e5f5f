"""Private servers for tests: RabbitMQ, PostgreSQL, MariaDB from Debian's packages, each in a directory of its own,
bound to loopback or to a socket file, and ended by process id."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def waited(true: Callable[[], object], timeout_s: float, what: str) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, f"{what} within {timeout_s} s"
        time.sleep(0.05)


def answers(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


def ended(process: "subprocess.Popen[bytes]", number: int = signal.SIGTERM) -> None:
    """The process and those that it started (they are a session of their own)."""
    for how in (number, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            continue
        break


class Rabbit:
    """A broker that can be stopped and started again, with what it kept on its disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, dist, self.epmd = free_port(), free_port(), free_port()
        for name in ("mnesia", "log"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "enabled").write_text("[].\n")
        (directory / "rabbitmq.conf").write_text("disk_free_limit.absolute = 50MB\nlog.console = false\n")
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "RABBITMQ_NODENAME": f"kn{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(dist),
            "ERL_EPMD_PORT": str(self.epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none",
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def start(self) -> None:
        with (self.directory / "out").open("ab") as out:
            self.process = subprocess.Popen(
                ["/usr/lib/rabbitmq/bin/rabbitmq-server"],
                env=self.env,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        waited(lambda: answers(self.port), 60, "the broker answers")

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            ended(self.process, number)
            self.process = None

    def close(self) -> None:
        self.stop()
        subprocess.run(["epmd", "-port", str(self.epmd), "-kill"], capture_output=True, check=False)


@contextmanager
def rabbit(directory: Path) -> Iterator[Rabbit]:
    one = Rabbit(directory)
    try:
        one.start()
        yield one
    finally:
        one.close()


@contextmanager
def postgres(directory: Path) -> Iterator[str]:
    """SQLAlchemy's URL of an empty database."""
    data, bin = directory / "data", max(Path("/usr/lib/postgresql").glob("*/bin"))
    directory.mkdir(parents=True, exist_ok=True)
    # It refuses root; in a user namespace root is somebody else, and files stay root's.
    other = ["unshare", "-U", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if not data.exists():
        subprocess.run(
            [*other, str(bin / "initdb"), "-A", "trust", "-U", "kilonova", "-E", "UTF8", "-N", "-D", str(data)],
            check=True,
            **quiet,
        )
    port = free_port()
    words = ["-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", ""]
    words += ["-c", "max_connections=300", "-c", "fsync=off"]  # processes are killed in tests, machines are not
    process = subprocess.Popen(
        [*other, str(bin / "postgres"), *words], start_new_session=True, stdin=subprocess.DEVNULL, **quiet
    )
    try:
        waited(lambda: answers(port), 30, "PostgreSQL answers")
        yield f"postgresql+psycopg://kilonova@127.0.0.1:{port}/postgres"
    finally:
        ended(process, signal.SIGINT)


@contextmanager
def mariadb(directory: Path) -> Iterator[str]:
    """SQLAlchemy's URL of an empty database."""
    data, port = directory / "data", free_port()
    directory.mkdir(parents=True, exist_ok=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if not data.exists():
        how = ["--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run(
            ["mariadb-install-db", *how, *(["--user=root"] if os.geteuid() == 0 else [])], check=True, **quiet
        )
    words = [
        "--no-defaults", f"--datadir={data}", f"--socket={directory}/s", f"--pid-file={directory}/pid",
        "--bind-address=127.0.0.1", f"--port={port}", "--max-connections=300",
        "--innodb-flush-log-at-trx-commit=2", "--skip-innodb-doublewrite",
        *(["--user=root"] if os.geteuid() == 0 else []),
    ]  # fmt: skip
    server = shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin") or "mariadbd"
    process = subprocess.Popen([server, *words], start_new_session=True, stdin=subprocess.DEVNULL, **quiet)
    try:
        waited(lambda: answers(port), 30, "MariaDB answers")
        client = ["mariadb", "--no-defaults", f"--socket={directory}/s", "-u", "root", "-e"]
        subprocess.run([*client, "CREATE DATABASE IF NOT EXISTS kilonova CHARACTER SET utf8mb4"], check=True, **quiet)
        subprocess.run(
            [*client, "CREATE USER IF NOT EXISTS 'kilonova'@'127.0.0.1'; GRANT ALL ON *.* TO 'kilonova'@'127.0.0.1'"],
            check=True,
            **quiet,
        )
        yield f"mysql+pymysql://kilonova@127.0.0.1:{port}/kilonova?charset=utf8mb4"
    finally:
        ended(process)
