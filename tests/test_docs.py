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
from sqlalchemy import Engine

import sqla_poolkit
from sqla_poolkit import ManagedPool, PoolSnapshot
from sqla_poolkit.config import PoolConfig

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


def blocks() -> Iterator[Block]:
    """Yield each piece of Python with the output that follows it, if any does."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?"
    for found in re.finditer(pattern, README, re.MULTILINE | re.DOTALL):
        line = README.count("\n", 0, found.start()) + 2
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
        printed = io.StringIO()
        # the README is one program; the empty lines make an error show its line
        code = compile("\n" * (block.line - 1) + block.code, "app.py", "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        engines.append(names["engine"])
        where = f"README.md:{block.line}"
        assert masked(printed.getvalue()) == masked(block.output or ""), where


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
