"""A real PostgreSQL for the benchmarks that ask for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from sqlalchemy.engine import make_url

DRIVER = "postgresql+psycopg2"


def server_for(where: str) -> Callable[[], AbstractContextManager[str]] | None:
    """Return what opens the server named on the command line: a URL, ``auto`` or ``none``.

    Nothing is started before a benchmark asks for it.
    """
    if where == "none":
        return None
    return _started if where == "auto" else lambda: _given(where)


@contextmanager
def _given(url: str) -> Iterator[str]:
    # The driver is fixed, so that figures of two machines can be compared.
    yield make_url(url).set(drivername=DRIVER).render_as_string(hide_password=False)


@contextmanager
def _started() -> Iterator[str]:
    from tests.servers import PostgresServer  # late: the other ways need no tests

    with PostgresServer() as server:
        yield make_url(str(server.url("psycopg2"))).render_as_string(hide_password=False)
