"""The README tells the truth: its code runs and prints what it says, its tables are complete."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine, create_engine, exc
from sqlalchemy.pool import Pool

import sqla_poolkit
from sqla_poolkit import AsyncManagedPool, ManagedPool, PoolSnapshot
from sqla_poolkit.config import PoolConfig
from sqla_poolkit.pool import _sqlalchemy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
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


def blocks(*, of_asyncio: bool = False) -> Iterator[Block]:
    """Yield each piece of Python with the output that follows it, if any does.

    Those of asyncio are a program apart, for they need greenlet and a driver.
    """
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?"
    for found in re.finditer(pattern, README, re.MULTILINE | re.DOTALL):
        line = README.count("\n", 0, found.start()) + 2
        if ("asyncio" in found[1]) is of_asyncio:
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
    (block,) = blocks(of_asyncio=True)
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
    known = {NAMES_FOR_CREATE_ENGINE.get(f.name, f.name) for f in fields(PoolConfig)}
    named = set(re.findall(r"`(\w+)`", section("Settings")))
    assert known - named == set()


def test_every_field_of_a_snapshot_is_named():
    named = set(re.findall(r"`(\w+)`", section("Snapshots")))
    assert {field.name for field in fields(PoolSnapshot)} - named == set()


def test_every_default_is_the_real_one():
    """The table's defaults of settings that stand alone in their row."""
    defaults = PoolConfig()
    rows = dict(re.findall(r"^\| `(\w+)`[^|]* \| ([^|]*) \|", section("Settings"), re.MULTILINE))
    for field in fields(PoolConfig):
        given = rows.get(NAMES_FOR_CREATE_ENGINE.get(field.name, field.name), "")
        if field.name in ("name", "max_size", "pool_size", "pre_ping"):
            continue  # said in words, as they depend on other arguments
        default = getattr(defaults, field.name)
        shown = f'"{default}"' if isinstance(default, str) else f"{default:g}" if default else "0"
        if default is None or isinstance(default, bool):
            shown = str(default)
        assert given.strip("`") == shown, field.name


def test_every_public_name_is_told():
    untold = {name for name in sqla_poolkit.__all__ if name not in README}
    # nothing raises it yet
    assert untold <= {"PoolUnavailable", "PoolInterval"}


def test_every_file_that_is_named_exists():
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / "examples" / name).exists(), name
