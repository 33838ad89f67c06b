"""The third pitfall: connections that died while nobody used them.

Firewalls drop quiet connections, servers are restarted, administrators end sessions.  Here all
idle connections are killed, with `pg_terminate_backend` on PostgreSQL; on SQLite, which has no
server, they are closed behind the pool's back.  Then callers come, once without and once with
pre-ping.

    python examples/stale_connections.py
    python examples/stale_connections.py postgresql+psycopg2://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from threading import Barrier

from sqlalchemy import Connection, Engine, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from sqla_poolkit import ManagedPool, snapshot

CALLERS = 4


def open_and_kill(engine: Engine) -> None:
    """Let the pool have four idle connections, and kill them all."""
    with ExitStack() as stack:
        connections = [stack.enter_context(engine.connect()) for _ in range(CALLERS)]
        is_postgresql = engine.dialect.name == "postgresql"
        victims = [backend(each) if is_postgresql else driver(each) for each in connections]
    if not is_postgresql:
        for victim in victims:
            victim.close()
        return
    administrator = create_engine(engine.url, poolclass=NullPool)
    with administrator.connect() as connection:
        for victim in victims:
            connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": victim})


def backend(connection: Connection) -> int:
    """Return the number of the server's process for this connection."""
    return connection.execute(text("SELECT pg_backend_pid()")).scalar_one()


def driver(connection: Connection) -> object:
    """Return the driver's own connection, which knows nothing of the pool."""
    return connection.connection.dbapi_connection


def serve(engine: Engine) -> list[str]:
    """Let four callers each hold a connection at the same time; return how they fared."""
    together = Barrier(CALLERS, timeout=10)

    def work(_number: int) -> str:
        try:
            with engine.connect() as connection:
                together.wait()
                connection.execute(text("SELECT 1"))
        except DBAPIError as error:
            return str(error.orig).strip().partition("\n")[0]
        return "served"

    with ThreadPoolExecutor(CALLERS) as threads:
        return list(threads.map(work, range(CALLERS)))


def show(url: str, *, pre_ping: bool) -> None:
    """Print how callers fare after all connections died."""
    engine = create_engine(url, poolclass=ManagedPool, max_size=CALLERS, pool_pre_ping=pre_ping)
    open_and_kill(engine)
    print(f"pool_pre_ping={pre_ping}, all {snapshot(engine).idle} idle connections have died:")
    for number, end in enumerate(serve(engine), 1):
        print(f"  caller {number}: {end}")
    ends = serve(engine)
    reading = snapshot(engine)
    print(f"  four more callers: {ends.count('served')} served")
    print(
        f"  found dead before they were handed out: {reading.ping_failures}, "
        f"connections opened in all: {reading.connects}, closed: {dict(reading.closes)}\n"
    )
    engine.pool.close()


def main(url: str | None = None) -> None:
    """Show both."""
    with TemporaryDirectory() as folder:
        url = url or f"sqlite:///{folder}/example.db"
        show(url, pre_ping=False)
        show(url, pre_ping=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
