"""The README tells the truth: its code runs and prints what it says, its tables are complete."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine, create_engine, exc, text
from sqlalchemy.pool import Pool

import sqla_poolkit
from sqla_poolkit import AsyncManagedPool, ManagedPool, PoolSnapshot
from sqla_poolkit.config import PoolConfig
from sqla_poolkit.pool import _sqlalchemy
from sqla_poolkit.watch.logs import LEVELS
from tests.servers import MariaDBServer, PgBouncer, PostgresServer, Server

pytestmark = pytest.mark.usefixtures("own_registry")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What a program of the README imports or asks for that the others do without.
PROGRAMS = {"asyncio": "asyncio", "server": "DATABASE_URL", "metrics": "sqla_poolkit.watch."}
# create_engine has names of its own for these.
NAMES_FOR_CREATE_ENGINE = {
    "name": "pool_name",
    "timeout": "pool_timeout",
    "use_lifo": "pool_use_lifo",
    "pre_ping": "pool_pre_ping",
}


class Block(NamedTuple):
    line: int
    code: str
    output: str | None

    def check(self, names: dict[str, Any]) -> None:
        """Run the code and compare what it prints."""
        printed = io.StringIO()
        # the README is one program; the empty lines make an error show its line
        code = compile("\n" * (self.line - 1) + self.code, "app.py", "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        where = f"README.md:{self.line}"
        assert masked(printed.getvalue()) == masked(self.output or ""), where


def blocks(program: str = "main") -> Iterator[Block]:
    """Yield each piece of Python with the output that follows it, if any does.

    Those of asyncio are a program apart, for they need greenlet and a driver; and those that need
    a server.
    """
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?"
    for found in re.finditer(pattern, README, re.MULTILINE | re.DOTALL):
        line = README.count("\n", 0, found.start()) + 2
        marks = (name for name, mark in PROGRAMS.items() if mark in found[1])
        if next(marks, "main") == program:
            yield Block(line, found[1], found[2])


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def masked(text: str) -> str:
    """Return a text without the figures that differ from run to run."""
    return re.sub(r"\d+(\.\d+)?", "#", text)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch) -> Iterator[list[Engine]]:
    """Collects the engines that the README's code makes, and closes them."""
    monkeypatch.chdir(tmp_path)
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        if isinstance(engine.pool, ManagedPool):
            engine.pool.close()
        else:
            engine.dispose()


def test_the_code_runs_and_prints_what_is_said(engines: list[Engine]):
    names: dict[str, Any] = {}
    assert len(list(blocks())) > 5
    for block in blocks():
        block.check(names)
        engines.append(names["engine"])


@pytest.mark.extra
def test_the_code_for_asyncio_runs_and_prints_what_is_said(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("asyncio")
    block.check({})


@pytest.mark.extra
def test_the_code_for_metrics_runs_and_prints_what_is_said(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    assert len(list(blocks("metrics"))) == 3
    for block in blocks("metrics"):
        block.check(names)
    from prometheus_client import REGISTRY

    REGISTRY.unregister(names["collector"])
    names["exporter"].stop()


def test_the_code_for_a_server_runs_and_prints_what_is_said(
    postgres: PostgresServer, tmp_path: Path, monkeypatch
):
    (tmp_path / "password").write_text("first\n")
    monkeypatch.setenv("DATABASE_URL", postgres.url("psycopg2"))
    monkeypatch.setenv("PASSWORD_FILE", str(tmp_path / "password"))
    assert len(list(blocks("server"))) == 2
    for block in blocks("server"):
        block.check({})


@pytest.mark.extra
@pytest.mark.parametrize(
    ("driver", "pool_class", "is_old"),
    [
        ("asyncpg", ManagedPool, False),
        ("psycopg2", AsyncManagedPool, False),
        ("asyncpg", AsyncManagedPool, True),
    ],
)
def test_refusals_are_quoted_in_their_own_words(
    driver: str, pool_class: type[Pool], is_old: bool, monkeypatch
):
    monkeypatch.setattr(_sqlalchemy, "leaks_on_cancellation", lambda: is_old)
    with pytest.raises(exc.ArgumentError) as refusal:
        create_engine(f"postgresql+{driver}://", poolclass=pool_class)
    quoted = re.findall(r"`(\w+Pool\s[^`]+)`", section("asyncio"))
    assert len(quoted) == 3
    assert any(str(refusal.value).startswith(" ".join(each.split())) for each in quoted)


def test_every_setting_is_named():
    of_pools = inspect.signature(ManagedPool).parameters.keys()
    known = {NAMES_FOR_CREATE_ENGINE.get(name, name) for name in of_pools}
    known -= {"creator", "recycle", "_driver", "kw"}
    named = set(re.findall(r"`(\w+)`", section("Settings")))
    assert known - named == set()


def test_every_field_of_a_snapshot_is_named():
    named = set(re.findall(r"`(\w+)`", section("Snapshots")))
    assert {field.name for field in fields(PoolSnapshot)} - named == set()


def test_every_event_is_named_with_its_level():
    rows = re.findall(
        r"^\| (`[a-z_`, ]+`) \| .* \| ([a-z, ]+) \|$", section("Events and logs"), re.MULTILINE
    )
    told = {}
    for names, levels in rows:
        of_each = levels.split(", ")
        for number, name in enumerate(re.findall(r"`(\w+)`", names)):
            told[name] = of_each[min(number, len(of_each) - 1)]
    assert told == {
        kind.name: logging.getLevelName(level).lower() for kind, level in LEVELS.items()
    }


def test_every_default_is_the_real_one():
    """The table's defaults of settings that stand alone in their row."""
    defaults = PoolConfig()
    rows = dict(re.findall(r"^\| `(\w+)`[^|]* \| ([^|]*) \|", section("Settings"), re.MULTILINE))
    for field in fields(PoolConfig):
        given = rows.get(NAMES_FOR_CREATE_ENGINE.get(field.name, field.name), "")
        if field.name in ("name", "max_size", "pool_size", "pre_ping"):
            continue  # said in words, as they depend on other arguments
        default = getattr(defaults, field.name)
        if isinstance(default, tuple):
            default = ", ".join(default)
            assert given.strip("`") == default
            continue
        shown = f'"{default}"' if isinstance(default, str) else f"{default:g}" if default else "0"
        if default is None or isinstance(default, bool):
            shown = str(default)
        assert given.strip("`") == shown, field.name


def test_every_public_name_is_told():
    untold = {name for name in sqla_poolkit.__all__ if name not in README}
    # nobody has to write it
    assert untold <= {"PoolInterval"}


def recommended(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the drivers of this kind of server, with the connect arguments recommended for it."""
    rows = re.findall(r"^\| ([^|]*) \| `(\{[^`]*\})` \|", README, re.MULTILINE)
    found = []
    for drivers, arguments in rows:
        names, _, bouncer = drivers.partition(" behind ")
        for name in names.split(", "):
            server = bouncer or ("MySQL" if "mysql" in name.lower() else "PostgreSQL")
            if server == kind:
                found.append((name.lower(), ast.literal_eval(arguments)))
    assert len(found) > 1
    return found


@pytest.mark.parametrize(("driver", "arguments"), recommended("PostgreSQL"))
def test_drivers_of_postgresql_take_what_is_recommended(
    driver: str, arguments: dict[str, Any], postgres: PostgresServer
):
    use(postgres, driver, arguments)


@pytest.mark.usefixtures("pgbouncer")  # which skips where there is none
@pytest.mark.parametrize(("driver", "arguments"), recommended("PgBouncer"))
def test_what_is_recommended_for_pgbouncer_works_in_transaction_mode(
    driver: str, arguments: dict[str, Any], postgres: PostgresServer
):
    with PgBouncer(postgres, pool_mode="transaction", default_pool_size=2) as server:
        use(server, driver, arguments)


@pytest.mark.parametrize(("driver", "arguments"), recommended("MySQL"))
def test_drivers_of_mysql_take_what_is_recommended(
    driver: str, arguments: dict[str, Any], mariadb: MariaDBServer
):
    if driver != "mysqlclient":  # which takes a compiler to install
        use(mariadb, driver, arguments)


def use(server: Server, driver: str, arguments: dict[str, Any]) -> None:
    """Run transactions on three connections in turns, two of them open at a time.

    A bouncer then has to serve each now with one session, now with another.
    """
    if driver == "asyncpg":
        asyncio.run(use_on_loop(server.url(driver), arguments))
        return
    engine = create_engine(server.url(driver), poolclass=ManagedPool, connect_args=arguments)
    held = [engine.connect() for _ in range(3)]
    for number in range(150):
        connection, before = held[number % 3], held[number % 3 - 1]
        assert connection.scalar(text(f"SELECT {number % 5} + :one"), {"one": 1}) == number % 5 + 1
        before.commit()
    for connection in held:
        connection.close()
    engine.pool.close()


async def use_on_loop(url: str, arguments: dict[str, Any]) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine  # which needs greenlet

    engine = create_async_engine(url, poolclass=AsyncManagedPool, connect_args=arguments)
    held = [await engine.connect() for _ in range(3)]
    for number in range(150):
        connection, before = held[number % 3], held[number % 3 - 1]
        assert await connection.scalar(text(f"SELECT {number % 5}")) == number % 5
        await before.commit()
    for connection in held:
        await connection.close()
    await engine.pool.close()


def test_every_file_that_is_named_exists():
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / "examples" / name).exists(), name
