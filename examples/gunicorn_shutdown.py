"""Gunicorn: a worker ends without a lost request and without a connection left behind.

On SIGTERM gunicorn takes no more requests and finishes those in flight, for `graceful_timeout`
seconds.  Then it calls `worker_exit`, which closes the pool.  On SIGQUIT and SIGINT it wants to
end at once: `worker_int` cuts the connections off, so no thread waits for a slow query any more.

In your project the settings stand in `gunicorn.conf.py`, which gets the engine by
`from app import engine`.  Here all is in one file:

    cd examples
    gunicorn -c python:gunicorn_shutdown
    DATABASE_URL=postgresql+psycopg2://user:password@localhost/db \
        gunicorn -c python:gunicorn_shutdown

Without DATABASE_URL it runs on an SQLite file, `example.db`.  It needs gunicorn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import create_engine, text

from sqla_poolkit import ManagedPool, held_by

engine = create_engine(
    os.environ.get("DATABASE_URL", "sqlite:///example.db"),
    poolclass=ManagedPool,
    max_size=8,
    pool_name="web",
)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer a request that works with the database for a second."""
    with held_by(environ["PATH_INFO"]), engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        time.sleep(1.0)  # stands for your queries
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done\n"]


# -- gunicorn.conf.py ------------------------------------------------------------------------

wsgi_app = "gunicorn_shutdown:application"
worker_class = "gthread"
workers = 2
threads = 8
graceful_timeout = 20


def worker_exit(_server: object, worker: Any) -> None:
    """Close the pool when the requests of this worker are done."""
    # gunicorn's master calls this too, for a worker that has vanished
    if worker.pid == os.getpid():
        engine.pool.close(timeout=5)


def worker_int(_worker: object) -> None:
    """Cut off who still holds a connection; with one thread per worker there is no need to."""
    engine.pool.close(timeout=0)
