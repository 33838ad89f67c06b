"""Prometheus: a web service with two connections tells how its pool fares, at `/metrics`.

The program serves itself a few requests, asks for its metrics as Prometheus would, and prints some
of them.

    python examples/prometheus_metrics.py
    python examples/prometheus_metrics.py postgresql+psycopg2://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.  It needs prometheus_client.

The same application under gunicorn, whose workers are processes.  Whichever is asked answers for
all; the folder has to be empty when gunicorn starts:

    cd examples
    export PROMETHEUS_MULTIPROC_DIR=$(mktemp -d) DATABASE_URL=sqlite:///example.db
    gunicorn --workers 2 --threads 4 'prometheus_metrics:make_application()'

`prometheus/` has the settings of a Prometheus server and alerts, `grafana/` a dashboard.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from socketserver import ThreadingMixIn
from tempfile import TemporaryDirectory
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import Engine, create_engine, text

from sqla_poolkit import ManagedPool, held_by
from sqla_poolkit.watch.prometheus import PoolCollector

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def make_engine(url: str) -> Engine:
    """Return an engine with two connections, so that somebody has to wait."""
    return create_engine(url, poolclass=ManagedPool, max_size=2, pool_timeout=5, pool_name="app")


def make_application(engine: Engine | None = None) -> Application:
    """Return a WSGI application; gunicorn calls this in each worker."""
    if engine is None:
        engine = make_engine(os.environ["DATABASE_URL"])
    registry = CollectorRegistry(support_collectors_without_names=True)
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        MultiProcessCollector(registry)  # for your own counters and histograms
    PoolCollector(registry=registry, labels=True)
    metrics: Application = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        # a label per route: one with numbers in it would make a series for each of them
        with held_by(f"GET {path}"), engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            time.sleep(0.5 if path == "/report" else 0.05)  # stands for your queries
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done\n"]

    return application


class Server(ThreadingMixIn, WSGIServer):
    """The standard library's server, with a thread for each request."""


class Quiet(WSGIRequestHandler):
    """One that does not write down each request."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def get(url: str) -> str:
    """Return what a server answers."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body.decode()


def main(url: str | None = None) -> None:
    """Serve requests, then show what Prometheus gets to see."""
    with TemporaryDirectory() as folder:
        engine = make_engine(url or f"sqlite:///{folder}/example.db")
        application = make_application(engine)
        server = make_server("127.0.0.1", 0, application, Server, Quiet)
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with ThreadPoolExecutor(9) as threads:
            list(threads.map(get, [f"{address}/report"] + [f"{address}/users"] * 8))
        for line in get(f"{address}/metrics").splitlines():
            if re.match(
                r"db_client_connection_(max|count|timeouts_total|wait_time_seconds_(count|sum))"
                r"|sqlalchemy_pool_label_wait_caused",
                line,
            ):
                print(line.replace("db_client_connection_pool_name", "..._pool_name"))
        server.shutdown()
        server.server_close()
        engine.pool.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
