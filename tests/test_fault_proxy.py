"""Each fault of the proxy is seen by plain sockets, and by a driver on a real server."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from sqla_poolkit.testing import FaultProxy
from sqla_poolkit.testing.__main__ import main, obey
from tests.servers import PostgresServer
from tests.waiting import until

ROOT = Path(__file__).parents[1]
# So long a socket is listened to before it counts as silent.
SILENCE_SECONDS = 0.05
PATIENCE_SECONDS = 10.0


class Network:
    """A proxy before a server that is nothing but a listening socket: the test speaks for it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.listener = self.listen()
        self.proxy = stack.enter_context(FaultProxy(*self.listener.getsockname()))

    def listen(self) -> socket.socket:
        return self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def client(self) -> socket.socket:
        address = (self.proxy.host, self.proxy.port)
        return self._stack.enter_context(socket.create_connection(address, PATIENCE_SECONDS))

    def server(self, listener: socket.socket | None = None) -> socket.socket:
        """The server's end of the next connection that the proxy makes."""
        server, _ = (listener or self.listener).accept()
        server.settimeout(PATIENCE_SECONDS)
        return self._stack.enter_context(server)

    def pair(self) -> tuple[socket.socket, socket.socket]:
        client = self.client()
        return client, self.server()


@pytest.fixture
def network() -> Iterator[Network]:
    with ExitStack() as stack:
        yield Network(stack)


def receive(end: socket.socket, count: int) -> bytes:
    """Return exactly so many bytes, fewer at the end of the stream."""
    received = bytearray()
    while len(received) < count and (data := end.recv(count - len(received))):
        received += data
    return bytes(received)


def send_until_held_up(end: socket.socket) -> int:
    """Return how many bytes found room between this end and the other."""
    sent = 0
    end.settimeout(0.1)
    while sent < 1 << 28:
        try:
            sent += end.send(bytes(1 << 20))
        except TimeoutError:
            return sent
    pytest.fail("any number of bytes finds room")


def vanish(end: socket.socket) -> None:
    """Go without a farewell."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def is_silent(end: socket.socket) -> bool:
    end.settimeout(SILENCE_SECONDS)
    try:
        end.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        end.settimeout(PATIENCE_SECONDS)
    return False


def is_reset(end: socket.socket) -> bool:
    try:
        end.recv(1)
    except ConnectionResetError:
        return True
    return False


def test_bytes_pass_in_both_directions(network: Network):
    client, server = network.pair()
    client.sendall(b"question")
    assert receive(server, 8) == b"question"
    server.sendall(b"answer")
    assert receive(client, 6) == b"answer"


def test_much_data_passes_unchanged_to_a_slow_reader(network: Network):
    client, server = network.pair()
    data = os.urandom(1 << 16) * 100
    with ThreadPoolExecutor(2) as threads:
        up = threads.submit(receive, server, len(data))
        down = threads.submit(receive, client, len(data))
        threads.submit(client.sendall, data)
        server.sendall(data)
        assert up.result() == down.result() == data


def test_a_receiver_that_does_not_read_holds_up_the_sender(network: Network):
    client, server = network.pair()
    sent = send_until_held_up(client)
    assert len(receive(server, sent)) == sent


def test_the_end_of_a_stream_passes_and_the_other_direction_stays(network: Network):
    client, server = network.pair()
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    server.sendall(b"late")
    assert receive(client, 4) == b"late"
    assert network.proxy.connections == 1
    server.close()
    assert client.recv(1) == b""
    until(lambda: network.proxy.connections == 0)


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_reset_passes(network: Network, leaver: int):
    pair = network.pair()
    leaves, stays = pair[leaver], pair[1 - leaver]
    vanish(leaves)
    assert is_reset(stays)
    assert network.proxy.connections == 0


def test_the_server_may_be_a_unix_socket(tmp_path: Path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with FaultProxy(path) as proxy:
            with socket.create_connection((proxy.host, proxy.port)) as client:
                server, _ = listener.accept()
                with server:
                    client.sendall(b"x")
                    assert server.recv(1) == b"x"
                    assert proxy.reset() == 1
                    assert is_reset(client)
            assert f"-> {path}," in repr(proxy)


def test_a_unix_socket_without_room_is_tried_again(tmp_path: Path):
    path = str(tmp_path / "socket")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        proxy = stack.enter_context(FaultProxy(path))
        for _ in range(4):
            client = stack.enter_context(socket.create_connection((proxy.host, proxy.port)))
            client.sendall(b"x")
        for _ in range(4):
            server = stack.enter_context(listener.accept()[0])
            assert server.recv(1) == b"x"


def test_a_server_that_refuses_resets_the_client(network: Network):
    network.listener.close()
    # The reset may come before the client noticed that it is connected.
    with pytest.raises(ConnectionResetError):
        network.client().recv(1)


def test_the_other_address_of_a_name_is_tried(network: Network, monkeypatch: pytest.MonkeyPatch):
    nobody = network.listen()
    both = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", one.getsockname())
        for one in (nobody, network.listener)
    ]
    nobody.close()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: both)
    network.proxy.retarget("database.example", 5432)
    client, server = network.pair()
    client.sendall(b"x")
    assert server.recv(1) == b"x"


def test_delay_is_added_to_each_direction(network: Network):
    client, server = network.pair()
    network.proxy.delay(0.05)
    began = time.monotonic()
    client.sendall(b"x")
    server.recv(1)
    half = time.monotonic()
    server.sendall(b"x")
    client.recv(1)
    assert half - began >= 0.05
    assert time.monotonic() - half >= 0.05


def test_delay_keeps_order_and_throughput(network: Network):
    client, server = network.pair()
    network.proxy.delay(0.1)
    data = os.urandom(1 << 22)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(client.sendall, data)
        assert receive(server, len(data)) == data
    # A proxy that waits for each piece of 64 KiB before it reads the next takes 6 seconds.
    assert 0.1 <= time.monotonic() - began < 3


def test_less_delay_overtakes_nothing(network: Network):
    client, server = network.pair()
    network.proxy.delay(0.1)
    client.sendall(b"first")
    assert is_silent(server)
    network.proxy.delay(0)
    client.sendall(b"second")
    assert receive(server, 11) == b"firstsecond"


def test_throttle_limits_bytes_a_second(network: Network):
    client, server = network.pair()
    network.proxy.throttle(200_000)
    began = time.monotonic()
    client.sendall(bytes(60_000))
    receive(server, 60_000)
    assert 0.2 <= time.monotonic() - began < 2


def test_throttle_holds_up_the_sender(network: Network):
    client, _ = network.pair()
    network.proxy.throttle(1)
    send_until_held_up(client)


def test_a_black_hole_accepts_all_and_forwards_nothing_until_it_is_healed(network: Network):
    client, server = network.pair()
    network.proxy.black_hole()
    client.sendall(bytes(1 << 20))
    server.sendall(b"x")
    assert is_silent(server)
    assert is_silent(client)
    network.proxy.heal()
    assert receive(server, 1 << 20) == bytes(1 << 20)
    assert client.recv(1) == b"x"


def test_a_black_hole_accepts_new_connections_and_lets_them_hang(network: Network):
    network.proxy.black_hole()
    client = network.client()
    client.sendall(b"hello")
    assert is_silent(client)
    assert (network.proxy.accepted, network.proxy.connections) == (1, 1)
    assert is_silent_listener(network.listener)
    network.proxy.heal()
    assert receive(network.server(), 5) == b"hello"


def is_silent_listener(listener: socket.socket) -> bool:
    listener.settimeout(SILENCE_SECONDS)
    try:
        listener.accept()[0].close()
    except TimeoutError:
        return True
    finally:
        listener.settimeout(PATIENCE_SECONDS)
    return False


def test_a_black_hole_for_answers_lets_requests_through(network: Network):
    network.proxy.black_hole("down")
    client, server = network.pair()
    client.sendall(b"commit")
    assert receive(server, 6) == b"commit"
    server.sendall(b"done")
    assert is_silent(client)
    network.proxy.heal()
    assert receive(client, 4) == b"done"


def test_a_black_hole_for_requests_lets_answers_through(network: Network):
    client, server = network.pair()
    network.proxy.black_hole("up")
    server.sendall(b"notice")
    assert receive(client, 6) == b"notice"
    client.sendall(b"x")
    assert is_silent(server)


def test_a_second_black_hole_replaces_the_direction_of_the_first(network: Network):
    client, server = network.pair()
    network.proxy.black_hole("up")
    client.sendall(b"x")
    assert is_silent(server)
    network.proxy.black_hole("down")
    assert server.recv(1) == b"x"


def test_a_black_hole_hides_that_a_client_went(network: Network):
    client, server = network.pair()
    network.proxy.black_hole()
    client.close()
    assert is_silent(server)
    assert network.proxy.connections == 1
    network.proxy.heal()
    assert server.recv(1) == b""


@pytest.mark.parametrize("is_noticed_in_sending", [False, True])
def test_a_black_hole_hides_that_a_server_died(network: Network, is_noticed_in_sending: bool):
    client, server = network.pair()
    network.proxy.black_hole("down")
    vanish(server)
    if is_noticed_in_sending:
        client.sendall(b"x")
    assert is_silent(client)
    network.proxy.heal()
    assert is_reset(client)


def test_a_black_hole_hides_that_a_server_refuses(network: Network):
    network.proxy.black_hole("down")
    network.listener.close()
    client = network.client()
    assert is_silent(client)
    network.proxy.heal()
    assert is_reset(client)


def test_reset_strikes_all_present_connections_at_both_ends(network: Network):
    ends = [*network.pair(), *network.pair()]
    assert network.proxy.reset() == 2
    assert all(map(is_reset, ends))
    assert network.proxy.connections == 0
    client, server = network.pair()
    client.sendall(b"x")
    assert server.recv(1) == b"x"


def test_reset_strikes_a_connection_of_this_moment(network: Network):
    for _ in range(50):
        client = network.client()
        assert network.proxy.reset() == 1
        assert is_reset(client)


def test_half_close_ends_the_stream_to_the_client_alone(network: Network):
    client, server = network.pair()
    assert network.proxy.half_close() == 1
    assert client.recv(1) == b""
    client.sendall(b"x")
    assert server.recv(1) == b"x"
    server.sendall(b"dropped")
    assert network.proxy.connections == 1
    client.close()
    assert server.recv(1) == b""
    server.close()
    until(lambda: network.proxy.connections == 0)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_cut_comes_after_so_many_bytes_of_one_direction(network: Network, direction: str):
    client, server = network.pair()
    giver, taker = (server, client) if direction == "down" else (client, server)
    network.proxy.cut_after(3, direction)
    taker.sendall(b"any number")
    assert receive(giver, 10) == b"any number"
    giver.sendall(b"ab")
    assert receive(taker, 2) == b"ab"
    giver.sendall(b"cdef")
    assert receive(taker, 1) == b"c"
    assert is_reset(taker)
    assert is_reset(giver)


def test_a_cut_counts_anew_for_each_connection_until_it_is_healed(network: Network):
    network.proxy.cut_after(1)
    for _ in range(2):
        client, server = network.pair()
        server.sendall(b"ab")
        assert receive(client, 1) == b"a"
        assert is_reset(client)
    client, server = network.pair()
    network.proxy.heal()
    server.sendall(b"ab")
    assert receive(client, 2) == b"ab"


def test_a_cut_after_nothing_comes_in_place_of_the_first_byte(network: Network):
    client, server = network.pair()
    network.proxy.cut_after(0)
    assert is_silent(client)
    server.sendall(b"a")
    assert is_reset(client)


def test_refuse_turns_connects_away_and_keeps_what_is_there(network: Network):
    client, server = network.pair()
    network.proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        network.client()
    client.sendall(b"x")
    assert server.recv(1) == b"x"
    port = network.proxy.port
    network.proxy.heal()
    assert network.proxy.port == port
    network.pair()


def test_the_port_of_a_refusing_proxy_goes_to_nobody_else(network: Network):
    network.proxy.refuse()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((network.proxy.host, network.proxy.port))


def test_retarget_leads_new_connections_elsewhere(network: Network):
    client, server = network.pair()
    elsewhere = network.listen()
    network.proxy.retarget(*elsewhere.getsockname())
    other, other_server = network.client(), network.server(elsewhere)
    for one, its_server in ((client, server), (other, other_server)):
        one.sendall(b"x")
        assert its_server.recv(1) == b"x"
    network.proxy.heal()
    network.client()
    network.server(elsewhere)


def test_faults_combine_and_the_representation_tells_them(network: Network):
    proxy = network.proxy
    begin = f"<FaultProxy 127.0.0.1:{proxy.port} -> 127.0.0.1:{network.listener.getsockname()[1]}, "
    network.pair()
    assert repr(proxy) == begin + "1 connection, passing>"
    proxy.delay(0.05)
    proxy.throttle(1e6)
    proxy.black_hole("down")
    proxy.cut_after(100, "up")
    proxy.refuse()
    assert repr(proxy) == (
        begin + "1 connection, delay 0.05 s, throttle 1e+06 bytes/s, black hole down,"
        " cut after 100 bytes up, refusing>"
    )
    proxy.heal()
    network.pair()
    assert repr(proxy) == begin + "2 connections, passing>"
    proxy.close()
    assert repr(proxy) == begin + "closed>"
    assert repr(FaultProxy("::1", 5432)) == "<FaultProxy 127.0.0.1:0 -> [::1]:5432, not started>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda proxy: proxy.delay(-1), "a delay is 0 or more seconds, not -1"),
        (lambda proxy: proxy.throttle(0), "a throttle is above 0 bytes a second, not 0"),
        (lambda proxy: proxy.cut_after(-1), "a cut is after 0 or more bytes, not -1"),
        (
            lambda proxy: proxy.cut_after(1, "both"),
            "the direction of a cut is 'up' or 'down', not 'both'",
        ),
        (
            lambda proxy: proxy.black_hole("left"),
            "a direction is 'both', 'up' or 'down', not 'left'",
        ),
    ],
)
def test_a_wrong_value_is_named(network: Network, call: Callable[[FaultProxy], None], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(network.proxy)


def test_an_unknown_name_is_an_error_of_who_gives_it(
    network: Network, monkeypatch: pytest.MonkeyPatch
):
    def know_nothing(*arguments: object, **options: object):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", know_nothing)
    with pytest.raises(socket.gaierror, match="not known"):
        network.proxy.retarget("nowhere", 1)
    with pytest.raises(socket.gaierror, match="not known"):
        FaultProxy("nowhere", 1)


def test_an_address_of_another_machine_cannot_be_listened_on():
    with pytest.raises(OSError, match="assign"):
        FaultProxy("127.0.0.1", 1, listen="192.0.2.1").start()


def test_close_ends_connections_and_thread_and_may_come_twice(network: Network):
    client, server = network.pair()
    proxy = network.proxy
    proxy.close()
    proxy.close()
    assert (client.recv(1), server.recv(1)) == (b"", b"")
    assert "FaultProxy" not in {thread.name for thread in threading.enumerate()}
    assert (proxy.connections, proxy.accepted) == (0, 1)
    with pytest.raises(RuntimeError, match="closed> does not run"):
        proxy.heal()
    with pytest.raises(RuntimeError, match="was started before"):
        proxy.start()
    with pytest.raises(ConnectionRefusedError):
        network.client()


def test_close_ends_what_hangs_or_is_under_way(network: Network):
    network.proxy.black_hole()
    clients = [network.client() for _ in range(3)]
    clients[0].sendall(b"x")
    network.proxy.close()
    for client in clients[1:]:
        assert client.recv(1) == b""


def test_any_thread_may_turn_any_knob(network: Network):
    knobs: list[Callable[[], object]] = [
        lambda: network.proxy.delay(0.001),
        lambda: network.proxy.black_hole("down"),
        lambda: network.proxy.cut_after(5),
        lambda: network.proxy.throttle(1000),
        network.proxy.refuse,
        network.proxy.reset,
        network.proxy.half_close,
        network.proxy.heal,
        lambda: repr(network.proxy),
    ]

    def turn(first: int) -> None:
        for number in range(200):
            knobs[(first + number * (first + 1)) % len(knobs)]()

    network.pair()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(turn, range(8)))
    network.proxy.heal()
    client, server = network.pair()
    client.sendall(b"x")
    assert server.recv(1) == b"x"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_neither_keeps_connections_nor_runs_the_proxy(network: Network):
    client, server = network.pair()
    child = os.fork()
    if not child:
        try:
            network.proxy.close()
            network.proxy.heal()
        except RuntimeError:
            signal.pause()
        finally:
            os._exit(1)
    try:
        network.proxy.reset()
        assert is_reset(client)
        assert is_reset(server)
        network.proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            network.client()
    finally:
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM


def test_lines_of_text_turn_the_knobs(network: Network):
    port = network.listener.getsockname()[1]
    state = f"<FaultProxy 127.0.0.1:{network.proxy.port} -> 127.0.0.1:{port}, 0 connections"
    lines = ("delay 0.5", "black_hole up", "cut_after 3 up", "fly", "", "heal 1", "delay x", "heal")
    known = "black_hole, cut_after, delay, half_close, heal, refuse, reset, retarget, throttle"
    assert list(obey(network.proxy, lines)) == [
        f"{state}, delay 0.5 s>",
        f"{state}, delay 0.5 s, black hole up>",
        f"{state}, delay 0.5 s, black hole up, cut after 3 bytes up>",
        f"error: 'fly' is none of {known}",
        f"error: '' is none of {known}",
        "error: heal takes at most 0 arguments",
        "error: could not convert string to float: 'x'",
        f"{state}, passing>",
    ]


def test_a_process_of_its_own_runs_until_its_input_ends(network: Network):
    host, port = network.listener.getsockname()
    command = [sys.executable, "-m", "sqla_poolkit.testing", host, str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        with socket.create_connection((host, int(process.stdout.readline()))) as client:
            client.settimeout(PATIENCE_SECONDS)
            client.sendall(b"x")
            assert network.server().recv(1) == b"x"
            process.stdin.write("reset\n")
            process.stdin.flush()
            assert process.stdout.readline().endswith("0 connections, passing>\n")
            assert is_reset(client)
        assert process.communicate() == ("", None)
        assert process.returncode == 0


def test_a_process_of_its_own_tells_how_to_use_it(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.startswith("usage: python -m sqla_poolkit.testing ")


def test_a_process_of_its_own_takes_the_path_of_a_unix_socket(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("heal\n"))
    assert main(["/tmp/nobody"]) == 0
    assert capsys.readouterr().out.endswith(" -> /tmp/nobody, 0 connections, passing>\n")


class Client:
    """A psycopg2 connection to PostgreSQL through a proxy."""

    def __init__(self, stack: ExitStack, proxy: FaultProxy) -> None:
        self._stack = stack
        self.proxy = proxy
        self.connection = self.connect()

    def connect(self):
        import psycopg2

        return self._stack.enter_context(
            closing(
                psycopg2.connect(
                    host=self.proxy.host,
                    port=self.proxy.port,
                    user="poolkit",
                    dbname="postgres",
                    connect_timeout=2,
                )
            )
        )

    def ask(self, sql: str = "SELECT 42") -> object:
        with self.connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchone()[0]


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[Client]:
    with ExitStack() as stack:
        yield Client(stack, stack.enter_context(FaultProxy("127.0.0.1", postgres.port)))


def test_a_driver_works_through_the_proxy(database: Client):
    assert database.ask() == 42


def test_a_driver_waits_longer_for_a_delayed_answer(database: Client):
    database.proxy.delay(0.05)
    began = time.monotonic()
    assert database.ask() == 42
    assert time.monotonic() - began >= 0.1


def test_a_driver_receives_a_throttled_answer_slowly(database: Client):
    database.proxy.throttle(100_000)
    began = time.monotonic()
    assert database.ask("SELECT repeat('x', 20000)") == "x" * 20_000
    assert time.monotonic() - began >= 0.1


@pytest.mark.parametrize("direction", ["both", "up", "down"])
def test_a_driver_hangs_in_a_black_hole_and_gets_its_answer_after_it(
    database: Client, direction: str
):
    assert database.ask() == 42
    database.proxy.black_hole(direction)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(database.ask)
        time.sleep(0.1)
        assert not answer.done()
        database.proxy.heal()
        assert answer.result(PATIENCE_SECONDS) == 42


@pytest.mark.parametrize("strike", [FaultProxy.reset, FaultProxy.half_close])
def test_a_driver_loses_a_connection_that_is_struck(
    database: Client, strike: Callable[[FaultProxy], int]
):
    import psycopg2

    assert database.ask() == 42
    assert strike(database.proxy) == 1
    with pytest.raises(psycopg2.OperationalError):
        database.ask()


def test_a_driver_loses_a_connection_in_the_middle_of_a_message(database: Client):
    import psycopg2

    database.proxy.cut_after(10)
    with pytest.raises(psycopg2.OperationalError):
        database.ask("SELECT repeat('x', 20000)")


def test_a_driver_is_refused_and_comes_back(database: Client):
    import psycopg2

    database.proxy.refuse()
    with pytest.raises(psycopg2.OperationalError, match="refused"):
        database.connect()
    assert database.ask() == 42
    database.proxy.heal()
    database.connect()


def test_a_driver_follows_to_another_address(database: Client, postgres: PostgresServer):
    where = "SELECT host(inet_server_addr())"  # none for who comes by the Unix socket
    database.proxy.retarget(str(postgres.socket))
    assert database.ask(where) == "127.0.0.1"
    database.connection = database.connect()
    assert database.ask(where) is None
