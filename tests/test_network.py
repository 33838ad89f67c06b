"""The lossy network loses packets, and tells nobody."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.network import LossyLink, NotPermitted, interfaces

ROOT = Path(__file__).parents[1]
# So long a socket is listened to before it counts as silent.
SILENCE_SECONDS = 0.1
PATIENCE_SECONDS = 20.0


def connect(link: LossyLink, **options: object) -> Any:
    import psycopg2

    return closing(
        psycopg2.connect(
            host=link.host, port=link.port, user="poolkit", dbname="postgres", **options
        )
    )


def ask(connection: Any) -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 42")
        return cursor.fetchone()[0]


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        yield listener


@pytest.fixture(scope="module")
def permitted() -> None:
    """For tests that make links of their own: a skip where they cannot."""
    try:
        with LossyLink(Path("/tmp/nobody")):
            pass
    except NotPermitted as refused:
        pytest.skip(str(refused))


def test_a_sound_link_is_a_way_to_the_server(lossy_link: LossyLink):
    with connect(lossy_link) as connection:
        assert ask(connection) == 42


def test_a_query_hangs_while_packets_are_lost_and_is_answered_after_that(lossy_link: LossyLink):
    with connect(lossy_link) as connection, ThreadPoolExecutor(1) as threads:
        assert ask(connection) == 42
        lossy_link.drop()
        answer = threads.submit(ask, connection)
        time.sleep(SILENCE_SECONDS)
        assert not answer.done()
        lossy_link.restore()
        assert answer.result(PATIENCE_SECONDS) == 42


def test_a_connect_is_lost_without_an_error(lossy_link: LossyLink):
    lossy_link.drop()
    with socket.socket() as client:
        client.settimeout(SILENCE_SECONDS)
        with pytest.raises(TimeoutError, match="timed out"):
            client.connect((lossy_link.host, lossy_link.port))
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has it")
def test_bytes_are_not_acknowledged_which_the_user_timeout_notices(lossy_link: LossyLink):
    import psycopg2

    with connect(lossy_link, tcp_user_timeout=300) as connection:
        assert ask(connection) == 42
        lossy_link.drop()
        with pytest.raises(psycopg2.OperationalError, match="timed out"):
            ask(connection)


def test_the_end_of_the_link_ends_connections_and_leaves_no_interface(
    permitted: None, listener: socket.socket
):
    with LossyLink(Path(listener.getsockname())) as link:
        assert link.device in interfaces()
        listener.accept()[0].close()  # the trial of the link itself
        client = socket.create_connection((link.host, link.port), PATIENCE_SECONDS)
        server, _ = listener.accept()
        link.drop()
    with client, server:
        assert (client.recv(1), server.recv(1)) == (b"", b"")
    assert link.device not in interfaces()


def test_a_set_up_that_fails_leaves_no_interface(
    permitted: None, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments: object) -> None:
        assert link.device in interfaces()
        raise ConnectionRefusedError("by the test")

    link = LossyLink(Path(listener.getsockname()))
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(NotPermitted, match="do not pass to a network namespace: by the test"):
        link.__enter__()
    assert link.device not in interfaces()


def test_a_process_that_dies_without_goodbye_takes_its_link_along(permitted: None):
    program = (
        "import os; from pathlib import Path; from tests.network import LossyLink\n"
        "print(LossyLink(Path('/tmp/nobody')).__enter__().device, flush=True)\n"
        "os._exit(0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    device = run.stdout.strip()
    assert device.startswith("poolkit")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while device in interfaces():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_only_root_may_make_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPermitted, match="Only root may"):
        LossyLink(Path("/tmp/nobody")).__enter__()


def test_a_missing_program_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(NotPermitted) as caught:
        LossyLink(Path("/tmp/nobody")).__enter__()
    assert str(caught.value) == (
        "There is no ip here. Install it (Debian: apt-get install iproute2)."
    )


def test_a_machine_that_permits_no_namespace_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    refusal = tmp_path / "unshare"
    refusal.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2; exit 1\n")
    refusal.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: program)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(NotPermitted, match="can be made: unshare failed: Operation not permitted"):
        LossyLink(Path("/tmp/nobody")).__enter__()


def test_a_machine_that_permits_no_interface_says_so(
    monkeypatch: pytest.MonkeyPatch, permitted: None, tmp_path: Path
):
    refusal = tmp_path / "ip"
    refusal.write_text("#!/bin/sh\necho 'RTNETLINK answers: Operation not permitted' >&2; exit 2\n")
    refusal.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(NotPermitted, match=r"ip link add .*: RTNETLINK answers"):
        LossyLink(Path("/tmp/nobody")).__enter__()
