"""The server fixture does what the tests that use it rely on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tests import servers
from tests.servers import PostgresError, PostgresServer

ROOT = Path(__file__).parents[1]
DRIVERS = ("psycopg2", "psycopg")


def answer(server: PostgresServer, driver: str) -> int:
    engine = sa.create_engine(server.url(driver), poolclass=NullPool)
    with engine.connect() as connection:
        return connection.scalar(sa.text("SELECT 6 * 7"))


@pytest.mark.parametrize("driver", DRIVERS)
def test_both_drivers_reach_it(postgres: PostgresServer, driver: str):
    assert answer(postgres, driver) == 42


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_immediate_restart_cuts_every_session_and_keeps_the_address(
    postgres: PostgresServer, driver: str
):
    engine = sa.create_engine(postgres.url(driver), poolclass=NullPool)
    with engine.connect() as connection:
        postgres.restart("immediate")
        with pytest.raises(sa.exc.OperationalError):
            connection.execute(sa.text("SELECT 1"))
        connection.invalidate()
    assert answer(postgres, driver) == 42


def test_sessions_are_counted_without_its_own_and_can_be_terminated(postgres: PostgresServer):
    engine = sa.create_engine(postgres.url(), poolclass=NullPool)
    with engine.connect() as connection, engine.connect() as other:
        assert postgres.sessions() == 2
        assert postgres.terminate_sessions() == 2
        for one in (connection, other):
            with pytest.raises(sa.exc.OperationalError):
                one.execute(sa.text("SELECT 1"))
            one.invalidate()


def test_a_stopped_server_starts_on_the_same_port(postgres: PostgresServer):
    port = postgres.port
    postgres.stop()
    with pytest.raises(sa.exc.OperationalError):
        answer(postgres, "psycopg2")
    postgres.start()
    assert (postgres.port, answer(postgres, "psycopg2")) == (port, 42)


@pytest.mark.extra
def test_two_servers_run_side_by_side():
    with PostgresServer() as one, PostgresServer() as other:
        one.query("CREATE TABLE here ()")
        assert other.query("SELECT to_regclass('here')") == [(None,)]


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
    program = (
        "import os; from tests.servers import PostgresServer\n"
        "server = PostgresServer().__enter__()\n"
        "print(server._home, server.sessions(), flush=True)\n"
        "os._exit(1)"
    )
    # Ends when its error output does, which the guardian shares until it has done its work.
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    home, sessions = run.stdout.split()
    assert (run.returncode, sessions, run.stderr) == (1, "0", "")
    assert not Path(home).exists()
