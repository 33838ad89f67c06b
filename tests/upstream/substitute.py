"""A pytest plugin: SQLAlchemy's own tests with other classes in its pools' places.

``sqlalchemy.QueuePool`` and ``sqlalchemy.pool.QueuePool`` become the class named by
``SQLA_QUEUEPOOL`` (``module:Class``), ``AsyncAdaptedQueuePool`` that of
``SQLA_ASYNCQUEUEPOOL``; the dialects, the engine and the tests look them up there, by name, when
they need them.
``sqlalchemy.pool.impl`` stays as it is, for classes derived from those in it.

``SQLA_EXPECTED_DIFFERENCES`` names a file of ``end of a test's id  # reason``: these tests must
fail.  Each process adds a line to the file ``SQLA_BUILT``: how many pools it built of the class.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import os
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

built = itertools.count()


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    # SQLAlchemy is importable by now; its test engine and test modules do not exist yet.
    import sqlalchemy
    from sqlalchemy.testing import engines, requirements

    classes = []
    for name in ("QueuePool", "AsyncAdaptedQueuePool"):
        module, _, attribute = os.environ[f"SQLA_{name.replace('Adapted', '').upper()}"].partition(
            ":"
        )
        substitute = getattr(importlib.import_module(module), attribute)
        _count_instances(substitute)
        for home in (sqlalchemy, sqlalchemy.pool):
            setattr(home, name, substitute)
        classes.append(substitute)
    # Both modules ask isinstance(pool, QueuePool), also of engines for asyncio.
    either = tuple(classes)
    requirements.QueuePool = either
    engines.pool = SimpleNamespace(QueuePool=either, base=sqlalchemy.pool.base)


def _count_instances(substitute: type[Any]) -> None:
    # Not by wrapping __init__, whose parameters create_engine() reads.
    def new(cls: type[Any], *_: Any, **__: Any) -> Any:
        next(built)
        return object.__new__(cls)

    substitute.__new__ = staticmethod(new)


def differences(path: Path) -> dict[str, str]:
    """Read the expected differences: end of a test's id -> reason."""
    lines = (line.partition("#") for line in path.read_text().splitlines())
    return {part.strip(): reason.strip() for part, _, reason in lines if part.strip()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    expected = differences(Path(os.environ["SQLA_EXPECTED_DIFFERENCES"]))
    for item in items:
        for part, reason in expected.items():
            if item.nodeid.endswith(part):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    yield
    if "InvalidateDuringResultTest" in item.nodeid:
        # it leaves an open cursor in a reference cycle, which locks the file its teardown needs;
        # with QueuePool as well, if the collector does not happen to run in between
        gc.collect()


def pytest_sessionfinish() -> None:
    with Path(os.environ["SQLA_BUILT"]).open("a") as file:
        file.write(f"{next(built)}\n")
