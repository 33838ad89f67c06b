"""The second pitfall: the pool is too large, so connections are wasted or refused.

On SQLite it shows what connections cost that nobody needs, and that they go after `idle_timeout`.
On PostgreSQL it also shows a pool that may open more connections than the server allows: a role
with a CONNECTION LIMIT of 4 under 12 callers, with QueuePool and with ManagedPool.  That needs the
right to create roles, and a server that lets the role in (`trust`, or the password given here).

    python examples/too_large.py
    python examples/too_large.py postgresql+psycopg2://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import URL, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import Pool, QueuePool

from sqla_poolkit import ManagedPool, snapshot

TOO_MANY = 60
LIMIT = 4
CALLERS = 12


def main(url: str | None = None) -> None:
    """Show what too many connections cost, and what a server says to them."""
    with TemporaryDirectory() as folder:
        database = make_url(url or f"sqlite:///{folder}/example.db")
        show_waste(database)
        if database.get_backend_name() == "postgresql":
            show_refusals(database)


# -- wasted ----------------------------------------------------------------------------------


def show_waste(url: URL) -> None:
    """Open far more connections than are used afterwards."""
    engine = create_engine(url, poolclass=ManagedPool, max_size=TOO_MANY, idle_timeout=1.0)
    before = snapshot(engine).open, *process_costs()
    with ExitStack() as stack:
        for _ in range(TOO_MANY):
            connection = stack.enter_context(engine.connect())
            connection.execute(text("SELECT 1"))
    show_costs(f"after a burst of {TOO_MANY} callers", engine, before)
    if url.get_backend_name() == "postgresql":
        with engine.connect() as connection:
            show_server(connection.execute(text(COUNT_SESSIONS)).one())
    began = time.monotonic()
    while snapshot(engine).closes.get("idle", 0) < TOO_MANY - 1 and time.monotonic() < began + 10:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        time.sleep(0.02)
    show_costs("then one caller at a time", engine, before)
    print(f"closed for being idle: {snapshot(engine).closes.get('idle', 0)}")
    engine.pool.close()


COUNT_SESSIONS = """
    SELECT count(*), current_setting('max_connections')
    FROM pg_stat_activity WHERE backend_type = 'client backend'
"""


def show_server(row: tuple[int, str]) -> None:
    """Print what the server sees."""
    print(f"the server counts {row[0]} sessions of at most {row[1]}, a process for each")


def process_costs() -> tuple[int | None, int | None]:
    """Return this process' open descriptors and its memory in bytes, None where not to be had."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        return None, None
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(list(descriptors.iterdir())), pages * os.sysconf("SC_PAGE_SIZE")


def show_costs(when: str, engine: Engine, before: tuple[int, int | None, int | None]) -> None:
    """Print how much more there is than before."""
    reading = snapshot(engine)
    descriptors, memory = process_costs()
    parts = [f"{reading.open} connections open", f"{reading.idle} idle"]
    if descriptors is not None and before[1] is not None:
        parts.append(f"{descriptors - before[1]:+} descriptors")
    if memory is not None and before[2] is not None:
        parts.append(f"{(memory - before[2]) / 1024:+,.0f} KiB of memory")
    print(f"{when + ':':30} {', '.join(parts)}")


# -- refused ---------------------------------------------------------------------------------


def show_refusals(url: URL) -> None:
    """Let a pool of 12 meet a server that allows 4."""
    try:
        with limited_role(url) as limited:
            print(f"\na server that allows {LIMIT} connections, and pools that may open {CALLERS}:")
            for pool_class in (QueuePool, ManagedPool):
                wait_until_gone(url, limited.username)
                rush(limited, pool_class)
    except DBAPIError as error:
        print(f"\nno role with a connection limit could be tried: {error.orig}")


@contextmanager
def limited_role(url: URL) -> Iterator[URL]:
    """Give the URL of a role that may have few connections, as long as the block lasts."""
    name, password = f"poolkit_example_{os.getpid()}", secrets.token_hex(8)
    admin = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(
            text(f"CREATE ROLE {name} LOGIN PASSWORD '{password}' CONNECTION LIMIT {LIMIT}")
        )
    try:
        limited = url.set(username=name, password=password)
        create_engine(limited, poolclass=NullPool).connect().close()
        yield limited
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP ROLE {name}"))


def wait_until_gone(url: URL, role: str | None) -> None:
    """Wait until the server has ended the role's last session, which it does after the client."""
    administrator = create_engine(url, poolclass=NullPool)
    with administrator.connect() as connection:
        count = text("SELECT count(*) FROM pg_stat_activity WHERE usename = :role")
        while connection.execute(count, {"role": role}).scalar():
            connection.rollback()  # the server's view of its sessions lasts for a transaction
            time.sleep(0.01)


def rush(url: URL, pool_class: type[Pool]) -> None:
    """Let more callers work at once than the server has connections for."""
    engine = create_engine(url, poolclass=pool_class, pool_size=CALLERS, max_overflow=0)

    def work(_number: int) -> str:
        try:
            with engine.connect() as connection:
                connection.execute(text("SELECT pg_sleep(0.3)"))
        except OperationalError as error:
            return str(error.orig).strip().rpartition("FATAL:")[2].strip()
        return "served"

    with ThreadPoolExecutor(CALLERS) as threads:
        ends = list(threads.map(work, range(CALLERS)))
    errors = {end for end in ends if end != "served"}
    print(f"{pool_class.__name__}: {ends.count('served')} of {CALLERS} callers served", end="")
    print(f", the others failed: {'; '.join(sorted(errors))}" if errors else "")
    if isinstance(engine.pool, ManagedPool):
        reading = snapshot(engine)
        print(
            f"  it opened {reading.connects} connections, {reading.connect_failures} attempts were "
            f"refused; {reading.waits} callers waited for those that it had"
        )
        engine.pool.close()
    else:
        engine.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:2])
