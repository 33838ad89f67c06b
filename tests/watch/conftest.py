"""What the tests of what people see share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine

from sqla_poolkit import ManagedPool, snapshot
from sqla_poolkit.pool import _upkeep, _workers
from tests.waiting import until


@pytest.fixture(scope="module", autouse=True)
def idle_threads_leave_soon() -> Iterator[None]:
    """Spare each test the second for which a pool's idle threads stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_workers, "_LINGER_SECONDS", 0.01)
        patch.setattr(_upkeep, "_LINGER_SECONDS", 0.01)
        yield


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Makes engines named ``app`` on a file in the folder ``here``, and closes them."""
    with ExitStack() as stack:

        def make(**settings: Any) -> Engine:
            database = tmp_path / "here" / "app.db"
            database.parent.mkdir(exist_ok=True)
            settings = {"poolclass": ManagedPool, "pool_name": "app"} | settings
            engine = create_engine(settings.pop("url", f"sqlite:///{database}"), **settings)
            if isinstance(engine.pool, ManagedPool):
                stack.callback(lambda: engine.pool.close())
            else:
                stack.callback(lambda: engine.dispose())
            return engine

        yield make


@pytest.fixture
def wait() -> Iterator[Callable[[Engine], None]]:
    """Has callers wait for a connection of an engine until the test is over."""
    threads: list[threading.Thread] = []

    def ask(engine: Engine) -> None:
        with engine.connect():
            pass

    def wait(engine: Engine) -> None:
        before = snapshot(engine).waiting or 0
        threads.append(threading.Thread(target=ask, args=(engine,)))
        threads[-1].start()
        until(lambda: (snapshot(engine).waiting or 0) > before)

    yield wait
    for thread in threads:
        thread.join()


@pytest.fixture(autouse=True)
def _own_registry(own_registry: None) -> None:
    """Show no pool of another test."""
