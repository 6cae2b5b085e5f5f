"""Private servers for tests: RabbitMQ, PostgreSQL, MariaDB from Debian's packages, each in a directory of its own,
bound to loopback or to a socket file, and ended by process id."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def free_port() -> int:
    """A TCP port of loopback that nobody listens on, and that no connection is given for its own end meanwhile: those
    are from above (`net.ipv4.ip_local_port_range`), and with hundreds of them one in a thousand was taken that way."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


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

    def __init__(self, directory: Path, tls: tuple[Path, Path] | None = None) -> None:
        """`tls`: its certificate and key; then it takes no other connections."""
        self.directory, self.tls = directory, tls
        self.port, dist, self.epmd = free_port(), free_port(), free_port()
        for name in ("mnesia", "log"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "enabled").write_text("[].\n")
        said = "disk_free_limit.absolute = 50MB\nlog.console = false\n"
        if tls is not None:
            said += f"listeners.tcp = none\nlisteners.ssl.1 = 127.0.0.1:{self.port}\nssl_options.verify = verify_none\n"
            said += f"ssl_options.certfile = {tls[0]}\nssl_options.keyfile = {tls[1]}\n"
        (directory / "rabbitmq.conf").write_text(said)
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
        return f"{'amqp' if self.tls is None else 'amqps'}://guest:guest@127.0.0.1:{self.port}//"

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
def rabbit(directory: Path, tls: tuple[Path, Path] | None = None) -> Iterator[Rabbit]:
    one = Rabbit(directory, tls)
    try:
        one.start()
        yield one
    finally:
        one.close()


class Postgres:
    """A database that can be stopped and started again, at the same address."""

    def __init__(self, directory: Path) -> None:
        self.data, self.bin = directory / "data", max(Path("/usr/lib/postgresql").glob("*/bin"))
        directory.mkdir(parents=True, exist_ok=True)
        # It refuses root; in a user namespace root is somebody else, and files stay root's.
        self.other = ["unshare", "-U", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
        if not self.data.exists():
            words = ["-A", "trust", "-U", "kilonova", "-E", "UTF8", "-N", "-D", str(self.data)]
            subprocess.run([*self.other, str(self.bin / "initdb"), *words], check=True, **QUIET)
        self.port = free_port()
        self.url = f"postgresql+psycopg://kilonova@127.0.0.1:{self.port}/postgres"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["-D", str(self.data), "-h", "127.0.0.1", "-p", str(self.port), "-k", ""]
        words += ["-c", "max_connections=300", "-c", "fsync=off"]  # processes are killed in tests, machines are not
        self.process = subprocess.Popen(
            [*self.other, str(self.bin / "postgres"), *words],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            **QUIET,
        )
        waited(lambda: answers(self.port), 30, "PostgreSQL answers")

    def stop(self) -> None:
        """Its connections are cut."""
        if self.process is not None:
            ended(self.process, signal.SIGINT)
            self.process = None


class MariaDb:
    """The same of MariaDB."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.data, self.port = directory, directory / "data", free_port()
        self.root = ["--user=root"] if os.geteuid() == 0 else []
        directory.mkdir(parents=True, exist_ok=True)
        if not self.data.exists():
            how = [
                "--no-defaults", f"--datadir={self.data}", "--auth-root-authentication-method=normal", "--skip-test-db",
            ]  # fmt: skip
            subprocess.run(["mariadb-install-db", *how, *self.root], check=True, **QUIET)
        self.url = f"mysql+pymysql://kilonova@127.0.0.1:{self.port}/kilonova?charset=utf8mb4"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = [
            "--no-defaults", f"--datadir={self.data}", f"--socket={self.directory}/s",
            f"--pid-file={self.directory}/pid", "--bind-address=127.0.0.1", f"--port={self.port}",
            "--max-connections=300", "--innodb-flush-log-at-trx-commit=2", "--skip-innodb-doublewrite", *self.root,
        ]  # fmt: skip
        server = shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin") or "mariadbd"
        self.process = subprocess.Popen([server, *words], start_new_session=True, stdin=subprocess.DEVNULL, **QUIET)
        waited(lambda: answers(self.port), 30, "MariaDB answers")
        client = ["mariadb", "--no-defaults", f"--socket={self.directory}/s", "-u", "root", "-e"]
        for what in (
            "CREATE DATABASE IF NOT EXISTS kilonova CHARACTER SET utf8mb4",
            "CREATE USER IF NOT EXISTS 'kilonova'@'127.0.0.1'; GRANT ALL ON *.* TO 'kilonova'@'127.0.0.1'",
        ):
            subprocess.run([*client, what], check=True, **QUIET)

    def stop(self) -> None:
        if self.process is not None:
            ended(self.process)
            self.process = None


@contextmanager
def served(made: Callable[[Path], "Postgres | MariaDb"], directory: Path) -> Iterator["Postgres | MariaDb"]:
    one = made(directory)
    try:
        one.start()
        yield one
    finally:
        one.stop()


@contextmanager
def postgres(directory: Path) -> Iterator[str]:
    """SQLAlchemy's URL of an empty database."""
    with served(Postgres, directory) as one:
        yield one.url


@contextmanager
def mariadb(directory: Path) -> Iterator[str]:
    """SQLAlchemy's URL of an empty database."""
    with served(MariaDb, directory) as one:
        yield one.url
