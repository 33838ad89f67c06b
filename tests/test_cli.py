"""The ``poolkit`` command: what it measures adds up, and what goes wrong is said in a sentence."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sqla_poolkit.cli import main
from sqla_poolkit.demo.figures import (
    NOBODY,
    Request,
    Share,
    Summary,
    jain,
    percentile,
    shares,
)
from sqla_poolkit.demo.load import Plan
from sqla_poolkit.demo.report import Result, conclusions
from tests.servers import PostgresServer

ROOT = Path(__file__).parents[1]
SHORT = ("--seconds", "1", "--threads", "12")
ASYNC_POOLS = ("AsyncAdaptedQueuePool", "AsyncManagedPool")
UNREACHABLE = "postgresql+psycopg2://me:s3cret@127.0.0.1:1/db"


def command(*arguments: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "sqla_poolkit", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Return what a command printed that ended well."""
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    return output


def seconds(cell: str) -> float:
    number, unit = cell.split()
    return float(number.replace(",", "")) * {"s": 1.0, "ms": 0.001}[unit]


def rows(output: str, title: str) -> dict[str, list[str]]:
    """Return the rows of a table in the output: the first cell, and the others."""
    lines = output.partition(title)[2].partition("\n\n")[0].splitlines()[1:]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {first: others for first, *others in cells}


def check_demo(output: str, pools: tuple[str, str] = ("QueuePool", "ManagedPool")) -> None:
    """Check that both pools were measured and that the figures fit together."""
    figures = rows(output, "What the callers measured")
    assert figures.pop(pools[0]) == [pools[1]]
    assert {len(cells) for cells in figures.values()} == {2}
    labels = rows(output, "Who made whom wait")
    kinds = {"GET /users", "GET /orders", "POST /orders", "sync job", "report", "GET /offers"}
    heads = {"served", "Async", "Adapted", "QueuePool"}
    assert kinds == set(labels) - heads
    for pool in (0, 1):
        served = int(figures["requests served"][pool].replace(",", ""))
        assert served > 12
        by_label = [int(labels[kind][pool].replace(",", "")) for kind in kinds]
        assert sum(by_label) == served
        waits = [seconds(figures[f"wait {q}"][pool]) for q in ("p50", "p95", "p99", "max")]
        assert waits == sorted(waits)
        waited = sum(seconds(labels[kind][pool + 2]) for kind in kinds)
        caused = sum(seconds(labels[kind][pool + 4]) for kind in kinds)
        total = seconds(figures["all waits together"][pool])
        assert waited == pytest.approx(total, rel=0.02, abs=0.01)
        # nobody held a connection while the first ones were opened
        assert caused <= total * 1.02 + 0.01
        assert 1 <= int(figures["connections opened"][pool]) <= served
        least, most = figures["fairness: least / most served web worker"][pool].split(" / ")
        assert int(least) <= int(most)
        assert 0 < float(figures["fairness: Jain's index of web workers"][pool]) <= 1
        assert figures["timeouts"][pool] == "0"
    assert int(figures["connections opened"][1]) <= 10
    books = re.search(r"pool.snapshot\(\)\s+says:\s+([\d,]+)\s+checkouts", output)
    assert books is not None
    assert books[1] == figures["requests served"][1]


def test_the_demo_measures_both_pools_and_its_figures_add_up():
    output = finish(command("demo", "--plain", *SHORT))
    assert "SQLite, a file in a temporary folder" in output
    assert "simulated  how long queries take" in output
    check_demo(output)


def test_the_demo_runs_on_a_given_database(postgres: PostgresServer):
    output = finish(command("demo", "--plain", *SHORT, "--url", postgres.url("psycopg2")))
    assert f"PostgreSQL, 127.0.0.1:{postgres.port}/postgres" in output
    check_demo(output)


@pytest.mark.extra
def test_the_demo_runs_tasks():
    output = finish(command("demo", "--async", "--plain", *SHORT))
    assert "SQLite, a file in a temporary folder" in output
    assert "a task each, on one event loop" in output
    check_demo(output, ASYNC_POOLS)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_the_demo_runs_tasks_on_a_given_database(driver: str, postgres: PostgresServer):
    """What is a driver for threads only is replaced."""
    url = postgres.url(driver)
    output = finish(command("demo", "--async", "--plain", *SHORT, "--url", url))
    assert f"PostgreSQL, 127.0.0.1:{postgres.port}/postgres" in output
    check_demo(output, ASYNC_POOLS)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("options", "pools"),
    [((), ("QueuePool", "ManagedPool")), (("--async",), ASYNC_POOLS)],
    ids=["threads", "tasks"],
)
def test_a_terminal_shows_a_live_table(options: tuple[str, ...], pools: tuple[str, str]):
    reader, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sqla_poolkit", "demo", *options, *SHORT],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "50"},
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    output = b""
    try:
        while part := os.read(reader, 65536):
            output += part
    except OSError:  # Linux: the other end is closed
        pass
    os.close(reader)
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
    for shown in (
        *(f"{pool} runs: 1 of 1 s" for pool in pools),
        *("waiting", "checked out", "idle", "open", "p99 so far", "longest wait"),
        *("What the callers measured", "Who made whom wait", "pool.snapshot() says"),
    ):
        assert shown in text


def test_without_a_command_it_helps(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_it_helps_when_asked(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "usage: poolkit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--seconds", "0"],
        ["demo", "--seconds", "nan"],
        ["demo", "--seconds", "soon"],
        ["demo", "--threads", "0"],
        ["demo", "--threads", "2.5"],
        ["demo", UNREACHABLE],
        ["nothing"],
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert "s3cret" not in printed.out + printed.err


def test_missing_rich_is_said_in_a_sentence(capsys, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["demo"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "pip install 'sqla_poolkit[cli]'" in printed.err


def test_plain_needs_no_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["demo", "--plain", "--seconds", "0.5", "--threads", "2"]) == 0
    assert "Who made whom wait" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3cret", "is no URL of a database"),
        ("nonsense://me:s3cret@127.0.0.1/db", "is no URL of a database"),
        ("postgresql://me:s3cret@127.0.0.1:port/db", "is no URL of a database"),
        ("postgresql+psycopg2://me:s3@cret@127.0.0.1/db", "two '@'"),
        ("mysql+pymysql://me:s3cret@127.0.0.1/db", "not to mysql"),
        ("sqlite:///:memory:", "in-memory SQLite"),
        ("sqlite:////no/such/folder/file.db", "no connection to SQLite, /no/such/folder/file.db"),
        pytest.param(UNREACHABLE, "no connection to PostgreSQL", marks=pytest.mark.extra),
        pytest.param(
            "postgresql+psycopg://me:s3cret@127.0.0.1:1/db",
            "no connection to PostgreSQL",
            marks=pytest.mark.extra,
        ),
        pytest.param(
            "postgresql+psycopg2://me@127.0.0.1:1/db?password=s3cret",
            "no connection to PostgreSQL",
            marks=pytest.mark.extra,
        ),
    ],
)
def test_a_database_that_cannot_be_used_is_said_in_a_sentence(url: str, said: str, capsys):
    check_refusal(["--url", url], said, capsys)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3cret", "is no URL of a database"),
        ("mysql+aiomysql://me:s3cret@127.0.0.1/db", "not to mysql"),
        ("sqlite:///:memory:", "in-memory SQLite"),
        ("sqlite:////no/such/folder/file.db", "no connection to SQLite, /no/such/folder/file.db"),
        (UNREACHABLE, "no connection to PostgreSQL"),
        ("postgresql+asyncpg://me:s3cret@127.0.0.1:1/db", "no connection to PostgreSQL"),
        ("postgresql+asyncpg://me:s3cret@127.0.0.1:1/db?sslmode=disable", "argument 'sslmode'"),
        ("postgresql+psycopg://me:s3cret@127.0.0.1:1/db", "no connection to PostgreSQL"),
    ],
)
def test_a_database_that_tasks_cannot_use_is_said_in_a_sentence(url: str, said: str, capsys):
    check_refusal(["--async", "--url", url], said, capsys)


def check_refusal(options: list[str], said: str, capsys) -> None:
    assert main(["demo", "--plain", *options]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("poolkit: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert "s3cret" not in printed.err
    assert "s3@cret" not in printed.err


def test_a_missing_driver_is_said_in_a_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    assert main(["demo", "--plain", "--url", UNREACHABLE]) == 1
    assert "pip install 'sqla_poolkit[postgres]'" in capsys.readouterr().err


def test_an_asyncio_driver_is_refused(capsys):
    assert main(["demo", "--plain", "--url", "sqlite+aiosqlite:///file.db"]) == 1
    printed = capsys.readouterr().err
    assert "is for asyncio" in printed
    assert "--async" in printed


@pytest.mark.parametrize(
    ("missing", "options", "extra"),
    [
        ("greenlet", [], "asyncio"),
        pytest.param("aiosqlite", [], "aiosqlite", marks=pytest.mark.extra),
        pytest.param(
            "asyncpg",
            ["--url", "postgresql+asyncpg://me:s3cret@127.0.0.1:1/db"],
            "asyncpg",
            marks=pytest.mark.extra,
        ),
        pytest.param(
            "psycopg",
            ["--url", "postgresql+psycopg://me:s3cret@127.0.0.1:1/db"],
            "psycopg",
            marks=pytest.mark.extra,
        ),
    ],
)
def test_what_is_missing_for_tasks_is_said_in_a_sentence(
    missing: str, options: list[str], extra: str, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, missing, None)
    check_refusal(["--async", *options], f"pip install 'sqla_poolkit[{extra}]'", capsys)


def test_without_asyncpg_it_says_which_url_to_write(capsys, monkeypatch):
    monkeypatch.setattr("sqla_poolkit.demo.run.find_spec", lambda name: None)
    said = "write postgresql+asyncpg://... (pip install 'sqla_poolkit[asyncpg]')"
    check_refusal(["--async", "--url", UNREACHABLE], said, capsys)


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--async"], marks=pytest.mark.extra)], ids=["threads", "tasks"]
)
def test_ctrl_c_ends_the_demo_without_a_traceback(options: list[str]):
    process = command("demo", *options, "--plain", "--seconds", "30", "--threads", "4")
    assert process.stdout is not None
    for line in process.stdout:
        if "waiting" in line:
            break
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "poolkit: stopped\n")
    assert time.monotonic() - began < 10


# -- the figures -----------------------------------------------------------------------------


def test_waiting_is_split_over_those_who_hold():
    requests = [
        Request("a", asked_at=0.0, had_at=1.0, ended_at=5.0),
        Request("b", asked_at=2.0, had_at=2.0, ended_at=4.0),
        Request("c", asked_at=3.0, had_at=5.0, ended_at=6.0),
        Request("d", asked_at=4.0, ended_at=6.0, failure="timeout"),
    ]
    assert shares(requests) == {
        "a": Share(1, wait_seconds=1.0, wait_caused_seconds=0.5 + 2.0),
        "b": Share(1, wait_seconds=0.0, wait_caused_seconds=0.5),
        "c": Share(1, wait_seconds=2.0, wait_caused_seconds=1.0),
        "d": Share(0, wait_seconds=2.0, wait_caused_seconds=0.0),
        NOBODY: Share(0, 0.0, wait_caused_seconds=1.0),
    }


def test_percentiles_are_values_that_occurred():
    waits = [1.0, 2.0, 3.0, 4.0]
    assert [percentile(waits, q) for q in (0, 0.5, 0.51, 0.99, 1)] == [1.0, 2.0, 3.0, 4.0, 4.0]
    assert percentile([], 0.5) == 0.0


def test_jains_index_is_one_for_equal_shares_and_one_nth_for_a_single_winner():
    assert jain([7, 7, 7, 7]) == 1.0
    assert jain([9, 0, 0, 0]) == 0.25
    assert jain([]) == 0.0


def test_a_plan_asks_for_the_same_each_time():
    one, other = (
        [(caller.group, caller.random.random()) for caller in Plan(threads=3).callers()]
        for _ in range(2)
    )
    assert one == other


def test_a_caller_of_the_burst_comes_when_it_is_due_and_asks_as_often_as_planned():
    caller = next(each for each in Plan().callers() if each.group == "burst")
    steps = []
    for step in caller.steps(began_at=100.0):
        steps.append(step)
        caller.requests.append(Request(step.kind.label, step.at))
    assert steps[0].at == 106.0
    assert [step.kind.label for step in steps] == ["GET /offers"] * 3


@pytest.mark.parametrize(
    ("waits_before", "waits_after", "said"),
    [
        ([0.4] * 10, [0.1] * 10, "the longest wait 100 ms instead of 400 ms (4.0 times shorter)"),
        ([0.1] * 10, [0.4] * 10, "the longest wait 400 ms instead of 100 ms (4.0 times longer)"),
        ([0.1] * 10, [0.102] * 10, "the longest wait 102 ms instead of 100 ms (about the same)"),
        ([0.0] * 10, [0.0] * 10, "(about the same)"),
    ],
)
def test_the_conclusion_follows_the_figures(waits_before, waits_after, said):
    results = [
        Result(name, summary(waits), None)
        for name, waits in (("QueuePool", waits_before), ("ManagedPool", waits_after))
    ]
    assert said in next(conclusions(*results))


def summary(waits: list[float]) -> Summary:
    return Summary(
        served=len(waits),
        timeouts=0,
        errors=0,
        waits=waits,
        least_served=1,
        most_served=1,
        jain=1.0,
        luckiest_wait=0.0,
        unluckiest_wait=0.0,
        opened=1,
        labels={"a": Share(len(waits), sum(waits), sum(waits))},
    )
