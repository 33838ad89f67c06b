"""FakeDBAPI: a database that fails, is slow, and dies on command."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from sqla_poolkit import ManagedPool, PoolTimeout, PoolUnavailable, snapshot
from sqla_poolkit.testing import FakeClock, FakeDBAPI

SELECT = sa.text("SELECT 1")


@pytest.fixture
def fake() -> FakeDBAPI:
    return FakeDBAPI()


@pytest.fixture(params=[QueuePool, ManagedPool])
def engine(fake: FakeDBAPI, request: pytest.FixtureRequest) -> Iterator[sa.Engine]:
    engine = fake.create_engine(poolclass=request.param)
    yield engine
    if isinstance(engine.pool, ManagedPool):
        engine.pool.close()
    engine.dispose()


@pytest.fixture
def managed(fake: FakeDBAPI) -> Iterator[sa.Engine]:
    engine = fake.create_engine(poolclass=ManagedPool, max_size=2, pool_timeout=5, ping_after=0)
    yield engine
    engine.pool.close(timeout=5)


def test_statements_are_noted_and_answered(fake: FakeDBAPI, engine: sa.Engine):
    fake.answer("FROM users", [(1, "Ann"), (2, "Bob")], columns=["id", "name"])
    fake.answer("count(*)", [(2,)])
    with engine.begin() as connection:
        assert connection.scalar(SELECT) == 1
        rows = connection.execute(sa.text("SELECT id, name FROM users")).mappings().all()
        assert rows == [{"id": 1, "name": "Ann"}, {"id": 2, "name": "Bob"}]
        assert (
            connection.execute(sa.text("DELETE FROM logs WHERE id = :id"), {"id": 1}).rowcount == 1
        )
        many = [{"id": 1}, {"id": 2}, {"id": 3}]
        assert connection.execute(sa.text("DELETE FROM logs WHERE id = :id"), many).rowcount == 3
    with Session(engine) as session:
        users = sa.table("users")
        assert session.scalar(sa.select(sa.func.count()).select_from(users)) == 2
    assert fake.statements[:2] == ["SELECT 1", "SELECT id, name FROM users"]
    assert (fake.visits["connect"], fake.visits["commit"], len(fake.open)) == (1, 1, 1)


def test_a_site_fails_as_often_as_it_is_told(fake: FakeDBAPI, engine: sa.Engine):
    fake.fail("connect", times=1)
    with pytest.raises(exc.OperationalError, match="connect failed, as it was told to"):
        engine.connect()
    fake.fail("execute", fake.IntegrityError("already there"), times=1)
    with engine.connect() as connection:
        with pytest.raises(exc.IntegrityError, match="already there"):
            connection.execute(SELECT)
        assert connection.scalar(SELECT) == 1
    fake.fail("execute", fake.ProgrammingError)
    for _ in range(2):
        with engine.connect() as connection, pytest.raises(exc.ProgrammingError):
            connection.execute(SELECT)
    fake.heal()
    with engine.connect() as connection:
        assert connection.scalar(SELECT) == 1


def test_a_failing_rollback_costs_the_connection_and_a_failing_close_nothing_more(
    fake: FakeDBAPI, engine: sa.Engine
):
    engine.connect().close()
    fake.fail("rollback", times=1)
    fake.fail("close", times=1)
    engine.raw_connection().close()
    with engine.connect() as connection:
        assert connection.scalar(SELECT) == 1
    assert repr(fake.connections) == "[<Connection 1 closed>, <Connection 2>]"


def test_connections_that_were_killed_are_disconnects(fake: FakeDBAPI, engine: sa.Engine):
    with engine.connect() as connection:
        connection.execute(SELECT)
        fake.kill()
        with pytest.raises(
            exc.OperationalError, match="execute on a connection that is lost"
        ) as lost:
            connection.execute(SELECT)
        assert lost.value.connection_invalidated
        assert connection.invalidated


def test_pings_find_the_dead_and_callers_notice_nothing(fake: FakeDBAPI, managed: sa.Engine):
    with managed.connect(), managed.connect():
        pass
    fake.connections[0].kill()
    fake.connections[1].kill()
    with managed.connect() as connection:
        assert connection.scalar(SELECT) == 1
    assert snapshot(managed).ping_failures >= 1


def test_a_slow_site_takes_its_time(fake: FakeDBAPI, managed: sa.Engine):
    fake.slow("execute", 0.05, times=1)
    began_at = time.monotonic()
    with managed.connect() as connection:
        connection.execute(SELECT)
    assert 0.05 <= time.monotonic() - began_at < 3
    fake.slow("connect", 0.3)
    impatient = fake.create_engine(poolclass=ManagedPool, pool_timeout=0.05)
    with pytest.raises(PoolTimeout):
        impatient.connect()
    impatient.pool.close()


def test_an_outage_is_known_at_once_with_a_clock_of_the_test(fake: FakeDBAPI):
    with FakeClock() as clock:
        engine = fake.create_engine(poolclass=ManagedPool)
        fake.fail("connect")
        for _ in range(3):
            with pytest.raises(exc.OperationalError):
                engine.connect()
            clock.move(0.3)
        with pytest.raises(PoolUnavailable):
            engine.connect()
        fake.heal()
        clock.move(2)
        with engine.connect() as connection:
            assert connection.scalar(SELECT) == 1
        engine.pool.close()


def test_a_test_may_act_itself(fake: FakeDBAPI, engine: sa.Engine):
    seen: list[str] = []
    fake.act = seen.append
    with engine.connect() as connection:
        connection.execute(SELECT)
    assert seen == ["connect", "rollback", "execute", "rollback"]  # the first one is an engine's


def test_a_site_that_is_none_is_refused(fake: FakeDBAPI):
    with pytest.raises(exc.ArgumentError, match="'conect' is no site; there are connect, execute"):
        fake.fail("conect")
