"""Each way to let go of a connection without its loop, tried on the real driver."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sqla_poolkit.pool import _abandon
from sqla_poolkit.pool._abandon import abandon, native_connection
from tests.servers import PostgresServer
from tests.waiting import until

pytestmark = pytest.mark.extra

PATIENCE = 5.0


class Driver:
    """How to connect with one of the real drivers, and what is open then."""

    def __init__(self, name: str, server: PostgresServer, folder: Path) -> None:
        self.name = name
        self.server = server
        self.file = folder / "db.sqlite"

    async def connect(self) -> Any:
        if self.name == "asyncpg":
            import asyncpg

            return await asyncpg.connect(
                host="127.0.0.1", port=self.server.port, user="poolkit", database="postgres"
            )
        if self.name == "psycopg":
            import psycopg

            return await psycopg.AsyncConnection.connect(
                f"host=127.0.0.1 port={self.server.port} user=poolkit dbname=postgres"
            )
        import aiosqlite

        return await aiosqlite.connect(self.file)

    async def query(self, native: Any) -> None:
        if self.name == "asyncpg":
            assert await native.fetchval("SELECT 1") == 1
        else:
            await native.execute("SELECT 1")

    def ends(self) -> int:
        """Count the server's sessions, or the descriptors of the file."""
        if self.name != "aiosqlite":
            return self.server.sessions()
        paths = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        links = [os.readlink(path) for path in paths if os.path.lexists(path)]
        return sum(link == str(self.file) for link in links)

    def wait_until_gone(self) -> None:
        until(lambda: self.ends() == 0)


@pytest.fixture(params=["asyncpg", "psycopg", "aiosqlite"])
def driver(request: pytest.FixtureRequest, postgres: PostgresServer, tmp_path: Path) -> Driver:
    return Driver(request.param, postgres, tmp_path)


def connect_and_close_loop(driver: Driver) -> Any:
    """Return a connection whose loop is closed."""
    loop = asyncio.new_event_loop()

    async def main() -> Any:
        native = await driver.connect()
        await driver.query(native)
        return native

    native = loop.run_until_complete(main())
    loop.close()
    assert driver.ends() >= 1
    return native


def test_a_connection_of_a_closed_loop_goes_without_a_warning(driver: Driver):
    native = connect_and_close_loop(driver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        abandon(native)
        driver.wait_until_gone()
        del native
        gc.collect()


def test_a_connection_of_a_running_loop_goes_without_a_warning(driver: Driver):
    complaints: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, it: complaints.append(it))
        native = await driver.connect()
        abandon(native)
        await asyncio.to_thread(driver.wait_until_gone)
        del native
        await asyncio.sleep(0)
        gc.collect()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
    assert complaints == []


def test_a_connection_goes_from_another_thread_while_its_loop_runs(driver: Driver):
    async def main() -> None:
        native = await driver.connect()
        await asyncio.to_thread(abandon, native)
        await asyncio.to_thread(driver.wait_until_gone)

    asyncio.run(main())


def test_a_connection_goes_while_its_loop_rests(driver: Driver):
    loop = asyncio.new_event_loop()
    native = loop.run_until_complete(driver.connect())
    abandon(native)
    driver.wait_until_gone()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    del native
    gc.collect()


def test_a_connection_goes_from_a_thread_with_another_loop(driver: Driver):
    native = connect_and_close_loop(driver)

    async def main() -> None:
        abandon(native)

    asyncio.run(main())
    driver.wait_until_gone()


def test_a_connection_may_be_let_go_twice(driver: Driver):
    native = connect_and_close_loop(driver)
    abandon(native)
    abandon(native)
    driver.wait_until_gone()


def test_a_connection_may_be_let_go_after_it_was_closed(driver: Driver):
    loop = asyncio.new_event_loop()

    async def main() -> Any:
        native = await driver.connect()
        await native.close()
        abandon(native)
        return native

    native = loop.run_until_complete(main())
    loop.close()
    abandon(native)
    driver.wait_until_gone()


def test_whoever_uses_a_connection_that_was_let_go_gets_an_error(driver: Driver):
    async def main() -> None:
        native = await driver.connect()
        await asyncio.to_thread(abandon, native)
        with pytest.raises(Exception):  # noqa: B017, PT011 - each driver has its own
            await asyncio.wait_for(driver.query(native), PATIENCE)

    asyncio.run(main())
    driver.wait_until_gone()


def test_letting_go_cuts_no_descriptor_that_was_opened_since(driver: Driver):
    native = connect_and_close_loop(driver)
    abandon(native)
    driver.wait_until_gone()
    pairs = [socket.socketpair() for _ in range(8)]
    abandon(native)
    for one, other in pairs:
        one.send(b"x")
        assert other.recv(1) == b"x"
        one.close()
        other.close()


def test_an_adapter_of_sqlalchemy_leads_to_the_drivers_connection():
    native = object()
    assert native_connection(SimpleNamespace(driver_connection=native)) is native
    assert native_connection(native) is native


@pytest.mark.parametrize("where", ["", "_writer", "transport"])
def test_the_socket_of_an_unknown_driver_is_shut_down(where: str):
    one, other = socket.socketpair()
    with contextlib.closing(one), contextlib.closing(other):
        owner = SimpleNamespace(get_extra_info=lambda name: one if name == "socket" else None)
        abandon(SimpleNamespace(**{where: owner}) if where else owner)
        other.settimeout(PATIENCE)
        assert other.recv(1) == b""


def test_an_unknown_driver_without_a_socket_is_left_alone():
    abandon(SimpleNamespace())
    abandon(SimpleNamespace(get_extra_info=lambda name: None))


# -- the drivers' private names --------------------------------------------------------------


def test_asyncpg_has_the_names_that_are_used(postgres: PostgresServer, tmp_path: Path):
    native = connect_and_close_loop(Driver("asyncpg", postgres, tmp_path))
    transport = native._transport
    assert native._loop.is_closed()
    assert native._aborted is False
    assert native._protocol is not None
    assert callable(native.terminate)
    assert type(native).__module__.partition(".")[0] == "asyncpg"
    assert transport.get_extra_info("socket").fileno() == transport._sock.fileno() >= 0
    abandon(native)
    assert native.is_closed()
    assert transport._sock is None


def test_psycopg_has_the_names_that_are_used(postgres: PostgresServer, tmp_path: Path):
    native = connect_and_close_loop(Driver("psycopg", postgres, tmp_path))
    assert type(native).__module__.partition(".")[0] == "psycopg"
    assert callable(native.pgconn.finish)
    abandon(native)
    assert native.closed


def test_aiosqlite_has_the_names_that_are_used(postgres: PostgresServer, tmp_path: Path):
    native = connect_and_close_loop(Driver("aiosqlite", postgres, tmp_path))
    assert type(native).__module__.partition(".")[0] == "aiosqlite"
    assert hasattr(sys.modules["aiosqlite.core"], "_STOP_RUNNING_SENTINEL")
    assert native._running is True
    assert native._connection is not None
    assert callable(native._tx.put_nowait)
    thread = native._thread
    abandon(native)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert native._connection is None


def test_asyncio_has_the_names_of_a_tls_transport_that_are_used():
    from asyncio import selector_events, sslproto

    assert "_ssl_protocol" in sslproto._SSLProtocolTransport.__init__.__code__.co_names
    assert "_closed" in sslproto._SSLProtocolTransport.__init__.__code__.co_names
    assert "_transport" in sslproto.SSLProtocol.__init__.__code__.co_names
    assert "_sock" in selector_events._SelectorTransport.__init__.__code__.co_names


def test_every_adapter_is_tried_here():
    assert set(_abandon._ADAPTERS) == {"asyncpg", "psycopg", "aiosqlite"}
