"""A web service to be watched: the example under gunicorn."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import _free_ports
from tests.waiting import until

ROOT = Path(__file__).parents[2]
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


@contextmanager
def gunicorn(database: str, folder: Path, *options: str) -> Iterator[str]:
    port = next(_free_ports())
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "gunicorn", "--workers", "2", "--threads", "2"),
            *("--bind", f"127.0.0.1:{port}", "--no-control-socket", *options),
            "prometheus_metrics:make_application()",
        ],
        cwd=ROOT / "examples",
        env=os.environ | {"DATABASE_URL": database, VARIABLE: str(folder), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: process.poll() is not None or listens(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        written = process.communicate()[1]
    assert "Error" not in written, written


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()
