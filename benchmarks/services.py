"""A real PostgreSQL and a real S3-compatible server (SeaweedFS), each for one test or benchmark, in
a temporary folder, on local ports, and with passwords of its own.

PostgreSQL is the system's (Debian: `apt-get install postgresql`); SeaweedFS comes with the extra
`dev`. Only the addresses of this machine are listened on.
"""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import measuring

START_S = 60
BIN = Path(sys.executable).parent


def find_postgres() -> Path | None:
    """Find the folder of PostgreSQL's programs; None if it is not installed."""
    # Debian keeps them apart, since several versions may be installed
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    for folder in (*map(Path, os.environ["PATH"].split(os.pathsep)), *reversed(debian)):
        if all((folder / name).exists() for name in ("initdb", "pg_ctl", "postgres", "psql")):
            return folder.resolve()
    return None


def find_weed() -> str | None:
    """Find SeaweedFS' program; None if it is not installed."""
    return shutil.which("weed", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")


class Postgres:
    """A running PostgreSQL."""

    def __init__(self, folder: Path) -> None:
        """Create it in `folder` and start it."""
        programs = find_postgres()
        assert programs is not None
        self.programs, self.folder, self.port = programs, folder, measuring.free_port()
        self.password = secrets.token_hex(16)
        self.user = _find_user()
        if self.user:
            # PostgreSQL refuses to run as root
            shutil.chown(folder, self.user, self.user)
        secret = folder / "password"
        secret.write_text(self.password)
        if self.user:
            shutil.chown(secret, self.user, self.user)
        auth = ("--auth=scram-sha-256", f"--pwfile={secret}", "--username=postgres")
        self._run("initdb", f"--pgdata={folder}/data", "--encoding=UTF8", "--locale=C", *auth)
        with (folder / "data/postgresql.conf").open("a") as file:
            file.write(f"listen_addresses = '127.0.0.1'\nport = {self.port}\n")
            file.write("unix_socket_directories = ''\n")
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log = f"--log={self.folder}/log"
        self._run("pg_ctl", "start", "--wait", f"--pgdata={self.folder}/data", log)

    def stop(self) -> None:
        """Stop it at once, as a crash would: what was not committed is lost."""
        self._run("pg_ctl", "stop", "--mode=immediate", f"--pgdata={self.folder}/data")

    def run_file(self, file: Path, **environment: str) -> None:
        """Run a file of SQL as the superuser, who sees the variables of `environment`."""
        copy = self.folder / file.name
        shutil.copyfile(file, copy)
        self._psql("--file", str(copy), **environment)

    def _psql(self, *words: str, **environment: str) -> None:
        where = {"PGPASSWORD": self.password, "PGHOST": "127.0.0.1", "PGPORT": str(self.port)}
        words = ("--no-psqlrc", "--username=postgres", "--set=ON_ERROR_STOP=1", *words)
        self._run("psql", *words, **where, **environment)

    def create(self, database: str) -> str:
        """Create an empty database of a new role, which is no superuser; return its address."""
        password = secrets.token_hex(16)
        self._psql("-c", f"CREATE ROLE {database} LOGIN PASSWORD '{password}'")
        self._psql("-c", f"CREATE DATABASE {database} OWNER {database}")
        return f"postgresql://{database}:{password}@127.0.0.1:{self.port}/{database}"

    def _run(self, program: str | Path, *words: str | Path, **environment: str) -> None:
        as_user: dict[str, Any] = {}
        if self.user:
            as_user = {"user": self.user, "group": self.user, "extra_groups": []}
        # pg_ctl sends what its server says to the log: the pipes end with it
        done = subprocess.run(
            [self.programs / program, *words],
            capture_output=True,
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", **environment},
            text=True,
            check=False,
            timeout=START_S,
            **as_user,
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")


def _find_user() -> str | None:
    """Return the user as which PostgreSQL runs; None for the present one."""
    if os.geteuid() != 0:
        return None
    with suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return "nobody"


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Run PostgreSQL until the block ends."""
    # not below a folder that only its owner may enter
    with TemporaryDirectory(prefix="har-postgres-") as name:
        found = Postgres(Path(name))
        try:
            yield found
        finally:
            with suppress(RuntimeError):
                found.stop()


# Ports of SeaweedFS' parts; each has a second one for gRPC.
WEED_PORTS = ("master.port", "volume.port", "filer.port", "s3.port")


@contextmanager
def running_objects(words: Sequence[str], key: str, secret: str) -> Iterator[str]:
    """Run `weed WORDS` until the block ends, on local ports; yield the address of its S3."""
    weed = find_weed()
    assert weed is not None
    with TemporaryDirectory(prefix="har-objects-") as name:
        ports = {
            f"{part}{suffix}": measuring.free_port()
            for part in WEED_PORTS
            for suffix in ("", ".grpc")
        }
        # a flag that is given again replaces the first
        command = [weed, *words, f"-dir={name}", *(f"-{k}={v}" for k, v in ports.items())]
        command.append("-s3.ip.bind=127.0.0.1")
        keys = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
        with (Path(name) / "log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **keys}, start_new_session=True
            )
        address = f"http://127.0.0.1:{ports['s3.port']}"
        try:
            _wait(process, f"{address}/healthz", Path(name) / "log")
            yield address
        finally:
            measuring.stop_server(process, signal.SIGKILL)
            for port in ports.values():
                # it has sockets outside of its folder
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink()


def _wait(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            urllib.request.urlopen(address, timeout=2)
            return
        time.sleep(0.1)
    measuring.stop_server(process, signal.SIGKILL)
    sys.exit(f"no answer from {address}:\n{log.read_text()}")
