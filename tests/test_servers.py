"""The servers do what the tests that use them rely on."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from sqla_poolkit.testing import FaultProxy
from tests import servers
from tests.servers import (
    Daemon,
    MariaDBServer,
    NotInstalled,
    PgBouncer,
    PostgresError,
    PostgresServer,
    Server,
    ServerError,
)

ROOT = Path(__file__).parents[1]
DRIVERS = ("psycopg2", "psycopg")
# So long a frozen server is asked before it counts as silent.
SILENCE_SECONDS = 0.1
PATIENCE_SECONDS = 10.0

Ask = Callable[[], int]


@contextmanager
def session(server: Server, url: str | None = None) -> Iterator[Ask]:
    """Connect to the server; give what asks it a question, and may be dead at the end."""
    engine = sa.create_engine(url or server.url(), poolclass=NullPool)
    connection = engine.connect()
    try:
        yield lambda: connection.scalar(sa.text("SELECT 6 * 7"))
    finally:
        connection.invalidate()
        connection.close()


def answer(server: Server, driver: str | None = None) -> int:
    with session(server, server.url(driver) if driver else None) as ask:
        return ask()


def is_dead(ask: Ask) -> bool:
    try:
        ask()
    except sa.exc.DBAPIError as error:
        return error.connection_invalidated
    return False


def check_restart(server: Server, mode: str) -> None:
    """See that a restart cuts every session and keeps the address."""
    port = server.port
    with session(server) as ask, session(server) as other:
        assert (ask(), other()) == (42, 42)
        server.restart(mode)
        assert is_dead(ask)
        assert is_dead(other)
    assert (server.port, answer(server)) == (port, 42)


def check_stop_and_start(server: Server) -> None:
    port = server.port
    server.stop()
    with pytest.raises(sa.exc.OperationalError):
        answer(server)
    server.start()
    assert (server.port, answer(server)) == (port, 42)


def check_freeze(server: Server) -> None:
    """See that sessions and connects hang while the server is frozen, and go on after that."""
    with session(server) as ask, ThreadPoolExecutor(2) as threads:
        assert ask() == 42
        server.freeze()
        answers = [threads.submit(ask), threads.submit(answer, server)]
        time.sleep(SILENCE_SECONDS)
        assert [one.done() for one in answers] == [False, False]
        server.thaw()
        assert [one.result(PATIENCE_SECONDS) for one in answers] == [42, 42]


def check_terminate(server: Server) -> None:
    """See that single sessions can be cut off: the oldest, and chosen ones."""
    with ExitStack() as stack:
        asks = []
        known: list[int] = []
        for _ in range(4):
            asks.append(stack.enter_context(session(server)))
            assert asks[-1]() == 42
            (new,) = set(server.clients()) - set(known)
            known.append(new)
        assert server.terminate(1) == 1
        assert server.terminate([known[2]]) == 1
        assert list(map(is_dead, asks)) == [True, False, True, False]


def check_terminate_sessions(server: Server) -> None:
    with session(server) as ask, session(server) as other:
        assert (ask(), other()) == (42, 42)
        assert server.sessions() == 2
        assert server.terminate_sessions() == 2
        assert is_dead(ask)
        assert is_dead(other)


def check_proxy(server: Server) -> None:
    with (
        FaultProxy(server.host, server.port) as proxy,
        session(server, server.url(through=proxy)) as ask,
    ):
        assert ask() == 42
        assert proxy.reset() == 1
        assert is_dead(ask)


def check_goodbye(expression: str, first: str = "") -> None:
    """See that a process that dies takes a server along that it started, even a frozen one."""
    program = (
        f"import os; from tests.servers import *; {first}\n"
        f"server = {expression}.__enter__()\n"
        "print(server._home, server.sessions(), *server._processes(), flush=True)\n"
        "server.freeze()\n"
        "os._exit(1)"
    )
    # Ends when its error output does, which the guardian shares until it has done its work.
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    home, sessions, *processes = run.stdout.split()
    assert (run.returncode, sessions, run.stderr) == (1, "0", "")
    assert not Path(home).exists()
    assert processes
    until_gone(map(int, processes))


def until_gone(processes: Iterator[int]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    for pid in processes:
        while servers._state(pid)[0] not in {"gone", "Z"}:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("driver", DRIVERS)
def test_both_drivers_reach_it(postgres: PostgresServer, driver: str):
    assert answer(postgres, driver) == 42


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_immediate_restart_cuts_the_session_of_any_driver(postgres: PostgresServer, driver: str):
    with session(postgres, postgres.url(driver)) as ask:
        postgres.restart()
        assert is_dead(ask)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_cuts_every_session_and_keeps_the_address(postgres: PostgresServer, mode: str):
    check_restart(postgres, mode)


def test_a_stopped_server_starts_on_the_same_port(postgres: PostgresServer):
    check_stop_and_start(postgres)


def test_sessions_are_counted_without_its_own_and_can_be_terminated(postgres: PostgresServer):
    check_terminate_sessions(postgres)


def test_single_sessions_can_be_terminated(postgres: PostgresServer):
    check_terminate(postgres)


def test_a_frozen_server_is_silent_until_it_is_thawed(postgres: PostgresServer):
    check_freeze(postgres)


def test_a_frozen_server_stands_still_with_all_its_processes(postgres: PostgresServer):
    with session(postgres) as ask:
        ask()
        processes = list(postgres._processes())
        postgres.freeze()
        states = [servers._state(pid)[0] for pid in processes]
        standing = [state for state in states if state not in ("Z", "gone")]
        assert len(standing) > 3
        assert set(standing) == {"T"}
        postgres.thaw()
        assert "T" not in {servers._state(pid)[0] for pid in processes}


def test_what_a_test_left_undone_is_mended_and_told(postgres: PostgresServer):
    assert postgres.mend() == []
    postgres.freeze()
    assert postgres.mend() == ["frozen"]
    postgres.stop()
    assert postgres.mend() == ["stopped"]
    assert answer(postgres) == 42


def test_a_frozen_server_can_be_stopped(postgres: PostgresServer):
    postgres.freeze()
    postgres.restart("fast")
    assert answer(postgres) == 42


def test_it_is_reached_through_a_proxy(postgres: PostgresServer):
    check_proxy(postgres)


def test_it_has_a_unix_socket(postgres: PostgresServer):
    with (
        FaultProxy(str(postgres.socket)) as proxy,
        session(postgres, postgres.url(through=proxy)) as ask,
    ):
        assert ask() == 42


def test_two_servers_with_settings_of_their_own_run_side_by_side(postgres: PostgresServer):
    with PostgresServer(max_connections=7) as other:
        other.query("CREATE TABLE here ()")
        assert postgres.query("SELECT to_regclass('here')") == [(None,)]
        assert [other.query(f"SHOW {it}") for it in ("max_connections", "fsync")] == [
            [("7",)],
            [("off",)],
        ]


@pytest.mark.extra
def test_the_wheel_alone_is_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(servers.VARIABLE, raising=False)
    monkeypatch.setattr(servers, "_system_folders", lambda: iter(()))
    assert servers.find_binaries().parent.parent.name == servers.WHEEL
    with PostgresServer() as server:
        assert answer(server, "psycopg") == 42


@pytest.mark.extra
def test_the_wheel_works_from_a_folder_closed_to_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    binaries = next(iter(servers._wheel_folders()))
    packages = binaries.parents[2]
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    for name in (servers.WHEEL, f"{servers.WHEEL}.libs"):
        (private / name).symlink_to(packages / name)
    monkeypatch.setenv(servers.VARIABLE, str(private / binaries.relative_to(packages)))
    with PostgresServer() as server:
        assert answer(server, "psycopg2") == 42


def test_a_variable_that_leads_nowhere_is_an_error_that_tells_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv(servers.VARIABLE, str(tmp_path))
    with pytest.raises(PostgresError) as caught:
        PostgresServer()
    assert str(caught.value) == (
        f"SQLA_POOLKIT_PG_BIN={tmp_path} lacks one of initdb, pg_ctl, postgres."
        " Install a PostgreSQL server (Debian: apt-get install postgresql), or its binaries from a"
        " wheel (pip install 'sqla_poolkit[test]'), or set SQLA_POOLKIT_PG_BIN to the folder that"
        " holds initdb, pg_ctl, postgres."
    )


def test_a_machine_without_a_server_is_an_error_that_tells_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv(servers.VARIABLE, raising=False)
    monkeypatch.setattr(servers, "_system_folders", lambda: iter(()))
    monkeypatch.setattr(servers, "_wheel_folders", lambda: iter(()))
    with pytest.raises(PostgresError, match="No PostgreSQL server was found"):
        servers.find_binaries()


def test_the_variable_goes_before_the_system_and_the_system_before_the_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    told, system, wheel = (tmp_path / name for name in ("told", "system", "wheel"))
    for folder in (told, system, wheel):
        folder.mkdir()
        for program in servers.PROGRAMS:
            (folder / program).touch()
    monkeypatch.setenv(servers.VARIABLE, str(told))
    monkeypatch.setattr(servers, "_system_folders", lambda: iter((tmp_path / "absent", system)))
    monkeypatch.setattr(servers, "_wheel_folders", lambda: iter((wheel,)))
    found = [servers.find_binaries()]
    monkeypatch.delenv(servers.VARIABLE)
    found.append(servers.find_binaries())
    monkeypatch.setattr(servers, "_system_folders", lambda: iter(()))
    found.append(servers.find_binaries())
    assert found == [told, system, wheel]


def test_a_newer_version_goes_before_an_older_one():
    folders = [Path(f"/usr/lib/postgresql/{version}/bin") for version in ("9.6", "15", "18")]
    assert max(folders, key=servers._version) == folders[-1]


@pytest.mark.extra
def test_a_process_that_dies_without_goodbye_takes_its_server_along():
    check_goodbye("PostgresServer()")


@pytest.mark.parametrize("driver", DRIVERS)
def test_both_drivers_reach_pgbouncer(pgbouncer: PgBouncer, driver: str):
    assert answer(pgbouncer, driver) == 42


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_of_pgbouncer_cuts_every_session_and_keeps_the_address(
    pgbouncer: PgBouncer, mode: str
):
    check_restart(pgbouncer, mode)


def test_a_stopped_pgbouncer_starts_on_the_same_port(pgbouncer: PgBouncer):
    check_stop_and_start(pgbouncer)


def test_sessions_of_pgbouncer_are_counted_and_can_be_terminated(
    pgbouncer: PgBouncer, postgres: PostgresServer
):
    check_terminate_sessions(pgbouncer)
    assert postgres.sessions() == 0
    assert answer(pgbouncer) == 42


def test_single_sessions_of_pgbouncer_can_be_terminated(pgbouncer: PgBouncer):
    check_terminate(pgbouncer)


def test_a_frozen_pgbouncer_is_silent_until_it_is_thawed(pgbouncer: PgBouncer):
    check_freeze(pgbouncer)


def test_pgbouncer_is_reached_through_a_proxy(pgbouncer: PgBouncer):
    check_proxy(pgbouncer)


def test_pgbouncer_comes_back_with_the_server_behind_it(
    pgbouncer: PgBouncer, postgres: PostgresServer
):
    with session(pgbouncer) as ask:
        ask()
        postgres.restart()
        assert is_dead(ask)
    assert answer(pgbouncer) == 42


def test_pgbouncer_in_transaction_mode_serves_two_clients_with_one_session(
    pgbouncer: PgBouncer, postgres: PostgresServer
):
    with (
        PgBouncer(postgres, pool_mode="transaction", default_pool_size=1) as server,
        ExitStack() as stack,
    ):
        backends = set()
        for _ in range(2):
            engine = sa.create_engine(server.url(), poolclass=NullPool)
            connection = stack.enter_context(engine.connect())
            backends.add(connection.scalar(sa.text("SELECT pg_backend_pid()")))
            connection.commit()
        assert (server.sessions(), len(backends), postgres.sessions()) == (2, 1, 0)


def test_a_process_that_dies_without_goodbye_takes_its_pgbouncer_along(
    pgbouncer: PgBouncer, postgres: PostgresServer
):
    known = f"known = PostgresServer.__new__(PostgresServer); known.port = {postgres.port}"
    check_goodbye("PgBouncer(known)", known)


def test_mariadb_is_reached_by_a_driver_for_threads(mariadb: MariaDBServer):
    assert answer(mariadb) == 42


def test_mariadb_is_reached_by_a_driver_for_asyncio(mariadb: MariaDBServer):
    from sqlalchemy.ext.asyncio import create_async_engine  # late: it needs greenlet

    async def ask() -> int:
        engine = create_async_engine(mariadb.url("aiomysql"), poolclass=NullPool)
        async with engine.connect() as connection:
            return await connection.scalar(sa.text("SELECT 6 * 7"))

    assert asyncio.run(ask()) == 42


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_of_mariadb_cuts_every_session_and_keeps_the_address(
    mariadb: MariaDBServer, mode: str
):
    check_restart(mariadb, mode)


def test_a_stopped_mariadb_starts_on_the_same_port(mariadb: MariaDBServer):
    check_stop_and_start(mariadb)


def test_sessions_of_mariadb_are_counted_and_can_be_terminated(mariadb: MariaDBServer):
    check_terminate_sessions(mariadb)


def test_single_sessions_of_mariadb_can_be_terminated(mariadb: MariaDBServer):
    check_terminate(mariadb)


def test_terminating_a_session_that_is_gone_is_no_error(mariadb: MariaDBServer):
    assert mariadb.terminate([10**6]) == 0


def test_a_frozen_mariadb_is_silent_until_it_is_thawed(mariadb: MariaDBServer):
    check_freeze(mariadb)


def test_mariadb_is_reached_through_a_proxy(mariadb: MariaDBServer):
    check_proxy(mariadb)


def test_settings_of_mariadb_are_options_of_its_program(mariadb: MariaDBServer):
    with MariaDBServer(wait_timeout=7) as server:
        assert server.query("SHOW VARIABLES LIKE 'wait_timeout'") == [("wait_timeout", "7")]


def test_a_wrong_setting_is_an_error_with_what_the_server_says(mariadb: MariaDBServer):
    with pytest.raises(ServerError, match="unknown variable 'no-such-thing=1'"):
        MariaDBServer(**{"no-such-thing": 1})


def test_a_server_that_does_not_start_is_an_error_with_what_it_says(
    pgbouncer: PgBouncer, postgres: PostgresServer
):
    with (
        pytest.raises(ServerError, match=r"PgBouncer did not start:\n(.*\n)*.*no_such_thing"),
        PgBouncer(postgres, no_such_thing=1),
    ):
        pass


def test_a_process_that_dies_without_goodbye_takes_its_mariadb_along(mariadb: MariaDBServer):
    check_goodbye("MariaDBServer()")


@pytest.mark.parametrize(
    ("kind", "package"), [(PgBouncer, "pgbouncer"), (MariaDBServer, "mariadb-server-core")]
)
def test_a_program_that_is_missing_is_an_error_that_tells_what_to_install(
    monkeypatch: pytest.MonkeyPatch, kind: type[Daemon], package: str
):
    monkeypatch.setattr(shutil, "which", lambda program, path: None)
    with pytest.raises(NotInstalled) as caught:
        kind._find(kind.program)
    assert str(caught.value) == (
        f"No {kind.name} was found. Install it (Debian: apt-get install {package}),"
        f" or put the folder of {kind.program} on the PATH."
    )
