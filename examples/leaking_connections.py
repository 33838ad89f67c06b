"""Pitfall: connections that are taken and not returned, and the block that names who took them.

Nothing here needs a pool of this package: the engine is one as everybody has it. In a suite of
pytest's `pytest --pool-leaks=fail` does the same for every test.

    python examples/leaking_connections.py
    python examples/leaking_connections.py postgresql+psycopg2://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from tempfile import TemporaryDirectory

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from sqla_poolkit import held_by
from sqla_poolkit.testing import LeakedConnections, assert_no_leaks

SELECT = text("SELECT 1")


def careful(engine: Engine) -> None:
    """Return the connection whatever happens."""
    with engine.connect() as connection:
        connection.execute(SELECT)


def hasty(engine: Engine) -> None:
    """Close the connection, unless there is nothing to do."""
    connection = engine.connect()
    if connection.scalar(SELECT) == 1:
        return  # and nobody has closed the connection
    connection.close()


def forgetful(engine: Engine) -> None:
    """Leave a session to the garbage collector, which comes when it comes."""
    session = Session(engine)
    session.execute(SELECT)


def check(engine: Engine, handler: Callable[[Engine], None]) -> None:
    """Call a handler of requests, and print what it leaves behind."""
    name = handler.__name__
    try:
        with assert_no_leaks(engine), held_by(f"GET /{name}"):
            handler(engine)
    except LeakedConnections as leak:
        print(f"{name}: {leak}")
    else:
        print(f"{name}: everything was returned")


def main(url: str | None = None) -> None:
    """Check three handlers."""
    with TemporaryDirectory() as folder:
        engine = create_engine(url or f"sqlite:///{folder}/example.db", poolclass=QueuePool)
        for handler in (careful, hasty, forgetful):
            check(engine, handler)
        gc.collect()  # what was forgotten comes back only now, and can be closed
        engine.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:2])
