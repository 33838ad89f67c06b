"""Imports point one way; private names of SQLAlchemy live in one module; nothing is left undone."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "sqla_poolkit"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

FOUNDATION = {"core", "config", "errors"}
# Who may import whom; a part that is not listed has no place in the package yet.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "core": {"config"},
    "pool": FOUNDATION,
    "watch": FOUNDATION | {"pool"},
    "sizing": FOUNDATION,
    "databases": FOUNDATION | {"pool"},
    "testing": FOUNDATION | {"pool", "watch"},
    "demo": FOUNDATION | {"pool", "watch"},
    "cli": FOUNDATION | {"pool", "watch", "sizing", "databases", "testing", "demo"},
    "__main__": {"cli"},
    "_public": FOUNDATION | {"pool", "watch", "sizing", "databases"},
    "__init__": {"_public"},
}
# An error carries a snapshot and so names its type, which is not needed at run time.
MAY_NAME = {"errors": {"core"}}

# What is allowed of other people's packages, in the parts that must not depend on everything.
MAY_USE = {"errors": ("sqlalchemy.exc",), "config": (), "core": ()}
# The state machine does no I/O, holds no thread and reads no clock.
IMPURE = {
    *("asyncio", "concurrent", "multiprocessing", "queue", "sched", "signal", "threading"),
    *("_thread", "time", "socket", "select", "selectors", "ssl", "subprocess", "logging"),
}
PRIVATE_NAMES_LIVE_IN = "pool/_sqlalchemy.py"


class Import(NamedTuple):
    line: int
    name: str  # the whole dotted path, ``sqlalchemy.exc`` also for ``from sqlalchemy import exc``
    bound: str  # the name it has in the file
    for_types: bool


def imports(tree: ast.Module, file: str) -> Iterator[Import]:
    package = [PACKAGE, *file.split("/")[:-1]]
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            base: list[str] = []
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package of the file itself.
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
        else:
            continue
        for alias in node.names:
            bound = alias.asname or alias.name.split(".")[0]
            yield Import(node.lineno, ".".join([*base, alias.name]), bound, id(node) in for_types)


def part_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def wrong_imports(source: str, file: str) -> list[str]:
    """Return what the file imports and must not, in words."""
    part = part_of(file)
    if part not in MAY_IMPORT:
        return [f"{file}: no rule says what {part} may import"]
    return [
        f"{file}:{one.line}: {part} must not import {one.name}"
        for one in imports(ast.parse(source), file)
        if not _is_allowed(one, part)
    ]


def _is_allowed(one: Import, part: str) -> bool:
    top, _, rest = one.name.partition(".")
    if top == PACKAGE:
        target = rest.split(".")[0]
        allowed = (
            MAY_IMPORT[part] | {part} | (MAY_NAME.get(part, set()) if one.for_types else set())
        )
        return target in allowed
    if top in sys.stdlib_module_names:
        return part != "core" or top not in IMPURE
    return part not in MAY_USE or any(
        f"{one.name}.".startswith(f"{allowed}.") for allowed in MAY_USE[part]
    )


def private_names(source: str, file: str) -> list[str]:
    """Return which names SQLAlchemy keeps for itself the file touches, in words."""
    if file == PRIVATE_NAMES_LIVE_IN:
        return []
    tree = ast.parse(source)
    theirs = [one for one in imports(tree, file) if one.name.split(".")[0] == "sqlalchemy"]
    touched = {(one.line, one.name) for one in theirs if any(map(_is_private, one.name.split(".")))}
    bound = {one.bound for one in theirs}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            path = ast.unparse(node)
            if path.split(".")[0] in bound:
                touched.add((node.lineno, path))
    return [f"{file}:{line}: {name} is private to SQLAlchemy" for line, name in sorted(touched)]


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def over_all_files(check: Callable[[str, str], list[str]]) -> list[str]:
    return [
        found
        for path in FILES
        for found in check(path.read_text(), path.relative_to(ROOT / PACKAGE).as_posix())
    ]


def test_imports_point_one_way():
    assert over_all_files(wrong_imports) == []


def test_private_names_of_sqlalchemy_live_in_one_module():
    assert over_all_files(private_names) == []


def test_the_package_says_nothing_of_work_left_undone():
    assert (
        over_all_files(
            lambda source, file: [
                f"{file}:{number}: {line.strip()}"
                for number, line in enumerate(source.splitlines(), 1)
                if re.search(r"\b(TODO|FIXME)\b", line)
            ]
        )
        == []
    )


@pytest.mark.parametrize(
    ("file", "source", "name"),
    [
        ("core/machine.py", "import threading", "threading"),
        ("core/machine.py", "from time import monotonic", "time.monotonic"),
        ("core/machine.py", "def late():\n    import socket", "socket"),
        ("core/machine.py", "import sqlalchemy.exc", "sqlalchemy.exc"),
        ("core/machine.py", "from ..errors import PoolTimeout", "sqla_poolkit.errors.PoolTimeout"),
        ("core/machine.py", "from .. import pool", "sqla_poolkit.pool"),
        ("core/deep/x.py", "from ...pool import y", "sqla_poolkit.pool.y"),
        ("core/machine.py", "from sqla_poolkit import snapshot", "sqla_poolkit.snapshot"),
        ("config.py", "from .core import slots", "sqla_poolkit.core.slots"),
        ("config.py", "from sqlalchemy import exc", "sqlalchemy.exc"),
        ("errors.py", "from .core.snapshot import X", "sqla_poolkit.core.snapshot.X"),
        ("errors.py", "from sqlalchemy import pool", "sqlalchemy.pool"),
        ("errors.py", "import sqlalchemy", "sqlalchemy"),
        ("pool/threads.py", "from ..watch import events", "sqla_poolkit.watch.events"),
        ("core/events.py", "from ..pool.threads import X", "sqla_poolkit.pool.threads.X"),
        ("sizing/replay.py", "import sqla_poolkit.databases", "sqla_poolkit.databases"),
    ],
)
def test_an_import_that_points_upward_is_found(file: str, source: str, name: str):
    line = source.count("\n") + 1
    assert wrong_imports(source, file) == [f"{file}:{line}: {part_of(file)} must not import {name}"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/machine.py", "import math\nfrom . import slots\nfrom ..config import PoolConfig"),
        ("config.py", "from .errors import ArgumentError"),
        ("errors.py", "from sqlalchemy import exc\nfrom sqlalchemy.exc import TimeoutError"),
        ("errors.py", "if TYPE_CHECKING:\n    from .core.snapshot import PoolSnapshot"),
        ("pool/threads.py", "import threading\nfrom sqlalchemy import pool\nfrom ..core import x"),
        ("databases/__init__.py", "from ..pool import ManagedPool"),
        ("cli.py", "import rich\nfrom .sizing import advice"),
        ("_public.py", "from .pool import ManagedPool"),
    ],
)
def test_an_import_that_points_downward_is_allowed(file: str, source: str):
    assert wrong_imports(source, file) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (
            "from sqlalchemy.pool.base import _ConnectionRecord",
            "sqlalchemy.pool.base._ConnectionRecord",
        ),
        ("import sqlalchemy.util._collections", "sqlalchemy.util._collections"),
        ("import sqlalchemy as sa\nsa.pool.base._finalize_fairy()", "sa.pool.base._finalize_fairy"),
        ("from sqlalchemy import pool\nx = pool.QueuePool._inc", "pool.QueuePool._inc"),
    ],
)
def test_a_private_name_is_found(source: str, name: str):
    line = source.count("\n") + 1
    assert private_names(source, "pool/threads.py") == [
        f"pool/threads.py:{line}: {name} is private to SQLAlchemy"
    ]
    assert private_names(source, PRIVATE_NAMES_LIVE_IN) == []


def test_a_private_name_of_ours_is_no_concern():
    source = "from sqlalchemy import Pool\nclass Ours(Pool):\n    def _do_get(self): return self._x"
    assert private_names(source, "pool/threads.py") == []
