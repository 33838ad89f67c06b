"""``?plugin=poolkit`` on a URL watches an engine, or gives it another pool."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import plugins
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool, QueuePool

from sqla_poolkit import ManagedPool, MonitoredQueuePool, held_by, monitor, snapshot
from sqla_poolkit.watch.plugin import Plugin

ALEMBIC = """
import logging, threading
logging.basicConfig(level=logging.INFO)
from sqlalchemy import engine_from_config, pool, text

engine = engine_from_config({"sqlalchemy.url": URL}, "sqlalchemy.", poolclass=pool.NullPool)
with engine.connect() as connection:
    connection.execute(text("SELECT 1"))
print(type(engine.pool).__name__, threading.active_count())
"""


@pytest.fixture
def create(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Makes engines on a file, with these arguments in their URL."""
    made: list[Engine] = []

    def make(query: str = "", **settings: Any) -> Engine:
        url = f"sqlite:///{tmp_path / 'app.db'}?plugin=poolkit{query}"
        made.append(sa.create_engine(url, **settings))
        return made[-1]

    yield make
    for engine in made:
        if isinstance(engine.pool, ManagedPool):
            engine.pool.close(timeout=1.0)
        else:
            engine.dispose()


def test_it_is_an_entry_point():
    assert plugins.load("poolkit") is Plugin


def test_an_engine_is_watched(create: Callable[..., Engine]):
    engine = create()
    assert type(engine.pool) is QueuePool
    with held_by("job"), engine.connect() as connection:
        assert connection.execute(sa.text("SELECT 1")).scalar() == 1
        assert snapshot(engine).checked_out == 1
    assert snapshot(engine).labels["job"].checkouts == 1
    assert monitor(engine).snapshot().checkouts == 1


def test_arguments_are_those_of_monitor(create: Callable[..., Engine]):
    engine = create("&poolkit_track=label&poolkit_pool_name=by%20url")
    reading = snapshot(engine)
    assert (reading.name, reading.settings["track"]) == ("by url", "label")


def test_nothing_of_it_reaches_the_driver(create: Callable[..., Engine]):
    engine = create("&poolkit_track=label&timeout=7")
    assert dict(engine.url.query) == {"timeout": "7"}


@pytest.mark.parametrize(
    ("pool", "poolclass"), [("managed", ManagedPool), ("monitored", MonitoredQueuePool)]
)
def test_the_pool_can_be_another(pool: str, poolclass: Any, create: Callable[..., Engine]):
    engine = create(f"&poolkit_pool={pool}&poolkit_track=label&poolkit_pool_name={pool}-by-url")
    assert type(engine.pool) is poolclass
    engine.connect().close()
    reading = snapshot(engine)
    assert (reading.name, reading.settings["track"], reading.checkouts) == (
        f"{pool}-by-url",
        "label",
        1,
    )
    assert monitor(engine).snapshot().checkouts == 1


def test_the_arguments_of_queue_pool_go_on(create: Callable[..., Engine]):
    engine = create("&poolkit_pool=managed", pool_size=2, max_overflow=1)
    assert snapshot(engine).max_size == 3


@pytest.mark.extra
def test_asyncio_gets_the_pool_for_asyncio(tmp_path: Path):
    pytest.importorskip("aiosqlite")
    from sqlalchemy.ext.asyncio import create_async_engine

    from sqla_poolkit import AsyncManagedPool

    url = f"sqlite+aiosqlite:///{tmp_path / 'app.db'}?plugin=poolkit&poolkit_pool=managed"
    assert type(create_async_engine(url).pool) is AsyncManagedPool


def test_a_pool_class_given_in_the_program_comes_before(create: Callable[..., Engine]):
    engine = create("&poolkit_pool=managed", poolclass=NullPool)
    assert type(engine.pool) is NullPool
    assert snapshot(engine).pool_class == "NullPool"


def test_settings_may_come_from_a_file(tmp_path: Path):
    settings = {
        "sqlalchemy.url": f"sqlite:///{tmp_path / 'a.db'}?plugin=poolkit&poolkit_pool=managed",
        "sqlalchemy.pool_size": "3",
        "sqlalchemy.max_overflow": "0",
    }
    engine = sa.engine_from_config(settings)
    assert snapshot(engine).max_size == 3
    engine.dispose()


@pytest.mark.parametrize("query", ["", "&poolkit_pool=managed"])
def test_alembic_gets_no_thread_and_no_output(query: str, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'a.db'}?plugin=poolkit{query}"
    program = ALEMBIC.replace("URL", repr(url))
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (ran.stdout, ran.stderr) == ("NullPool 1\n", "")


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("&poolkit_size=1", "poolkit_size is no argument of .plugin=poolkit; there are poolkit_"),
        ("&poolkit_pool=null", "poolkit_pool='null' is not possible; it must be one of managed"),
        ("&poolkit_track=all", "track='all' is not possible"),
        ("&poolkit_track=label&poolkit_track=stack", "poolkit_track stands in the URL more than"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(
    query: str, sentence: str, create: Callable[..., Engine]
):
    threads = threading.active_count()
    with pytest.raises(exc.ArgumentError, match=sentence):
        create(query)
    assert threading.active_count() == threads


def test_secrets_of_the_url_are_not_in_its_errors():
    url = "sqlite:///app.db?plugin=poolkit&password=hunter2&poolkit_x=hunter3"
    with pytest.raises(exc.ArgumentError) as refusal:
        sa.create_engine(url)
    assert "hunter" not in str(refusal.value)
