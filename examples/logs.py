"""What the pool says while a slow holder makes others wait in vain, as lines and as JSON.

structlog is used because this application configures it; without it the same lines go to the
standard library's logging.  Without a URL it runs on an SQLite file in a temporary folder.

    python examples/logs.py
    python examples/logs.py postgresql+psycopg2://user:password@localhost/db
"""

import sys
import tempfile
import threading
import time
from contextlib import suppress

import structlog
from sqlalchemy import Engine, create_engine, text

from sqla_poolkit import ManagedPool, PoolTimeout, held_by
from sqla_poolkit.watch import log_events, recent_events


def configure(renderer: object) -> None:
    """Configure structlog as an application would."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            renderer,  # type: ignore[list-item]
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
    )


def make_report(engine: Engine, is_begun: threading.Event) -> None:
    """Keep a connection over a slow call."""
    with held_by("report"), engine.connect() as connection:
        is_begun.set()
        time.sleep(1.4)
        connection.execute(text("SELECT 1"))


def trouble(url: str, name: str) -> None:
    """Let a report keep the only connection for longer than others can wait."""
    engine = create_engine(
        url,
        poolclass=ManagedPool,
        max_size=1,
        pool_timeout=0.2,
        hold_warning=0.3,
        pool_name=name,
    )
    with log_events(engine):
        is_begun = threading.Event()
        reporter = threading.Thread(target=make_report, args=(engine, is_begun), name="reporter")
        reporter.start()
        is_begun.wait()
        for _ in range(6):
            with suppress(PoolTimeout), held_by("GET /users"):
                engine.connect()
        reporter.join()
        time.sleep(0.2)
    kinds = {event.name for event in recent_events(engine)}
    print("remembered:", ", ".join(sorted(kinds)), flush=True)
    engine.pool.close()


def main() -> None:
    """Write the same twice, as lines and as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        url = sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/shop.db"
        configure(structlog.dev.ConsoleRenderer(colors=False))
        trouble(url, "shop")
        configure(structlog.processors.JSONRenderer())
        trouble(url, "shop, as JSON")


if __name__ == "__main__":
    main()
