"""Run the pool tests of SQLAlchemy's own suite with our pools in QueuePool's place.

``threads`` runs what builds engines and pools, ``asyncio`` the tests of asyncio on aiosqlite, and
``postgresql`` those that cancel tasks, on asyncpg and a real server.  The tests come with
SQLAlchemy's source, which is downloaded; nothing of it is changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "upstream"

# Everything in the suite that builds engines and pools.
THREADS = (
    "test/engine/test_pool.py",
    "test/engine/test_reconnect.py",
    "test/engine/test_execute.py",
    "test/engine/test_parseconnect.py",
    "test/engine/test_logging.py",
    "test/engine/test_transaction.py",
    "test/engine/test_deprecations.py",
    "test/aaa_profiling/test_threading.py",
    "test/ext/test_horizontal_shard.py",
)
ASYNCIO = ("test/ext/asyncio", "test/engine/test_pool.py", "test/engine/test_reconnect.py")
CANCELLATION = (
    "test/ext/asyncio/test_cancellation.py",
    "test/ext/asyncio/test_engine.py",
    "test/engine/test_reconnect.py",
)
MOST_DIFFERENCES = 12
FEWEST_POOLS = 20

# What the suite expects of a PostgreSQL server.
PREPARE = """
import asyncio, sys, asyncpg

async def prepare(url):
    for address, sql in (
        (url, "CREATE ROLE scott SUPERUSER LOGIN"),
        (url, "CREATE DATABASE test OWNER scott"),
        (url.rpartition("/")[0] + "/test", "CREATE SCHEMA test_schema AUTHORIZATION scott"),
    ):
        connection = await asyncpg.connect(address)
        await connection.execute(sql)
        await connection.close()

asyncio.run(prepare(sys.argv[1]))
"""


class Outcome(NamedTuple):
    passed: int
    failed: int
    differing: int
    skipped: int


def main() -> int:
    options = parse()
    folder = CACHE / options.sqlalchemy
    python = environment(folder)
    version, suite = download(options, folder, python)
    began = time.monotonic()
    with database(options.kind, python) as arguments:
        code, built = run(python, suite, folder, options, arguments)
    outcome = read(options.junitxml)
    complaints = [
        complaint
        for is_so, complaint in (
            (code and not outcome.failed, f"pytest ended with exit code {code}"),
            (built < FEWEST_POOLS, f"the pool was hardly used: {built} built"),
            (outcome.differing > MOST_DIFFERENCES, f"more than {MOST_DIFFERENCES} tests differ"),
            (not outcome.passed, "no test passed"),
        )
        if is_so
    ]
    print(
        f"SQLAlchemy {version} {options.kind}: {outcome.passed} passed,"
        f" {outcome.failed} failed, {outcome.differing} expected to differ,"
        f" {outcome.skipped} skipped; {built} pools built; {time.monotonic() - began:.0f} s"
        + "".join(f"; {complaint}" for complaint in complaints)
    )
    return 1 if outcome.failed or complaints else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sqlalchemy",
        default="2.0",
        metavar="VERSION",
        help="2.1.9, say, or 2.1 for the newest of 2.1 (default: %(default)s)",
    )
    parser.add_argument("--kind", default="threads", choices=("threads", "asyncio", "postgresql"))
    parser.add_argument(
        "--as-fetched", action="store_true", help="use the source that an earlier run has fetched"
    )
    parser.add_argument(
        "--pool",
        default="sqla_poolkit:ManagedPool",
        metavar="MODULE:CLASS",
        help="what takes QueuePool's place (default: %(default)s)",
    )
    parser.add_argument(
        "--async-pool",
        default="sqla_poolkit:AsyncManagedPool",
        metavar="MODULE:CLASS",
        help="what takes AsyncAdaptedQueuePool's place (default: %(default)s)",
    )
    parser.add_argument("--junitxml", type=Path, metavar="FILE", help="where the results go")
    # Several are faster, but tests that find other tests' leftovers then fail now and then.
    parser.add_argument("-n", default="0", metavar="N", help="worker processes (default: none)")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    options = parser.parse_args()
    if options.junitxml is None:
        options.junitxml = CACHE / options.sqlalchemy / f"{options.kind}.xml"
    options.junitxml = options.junitxml.absolute()
    return options


def environment(folder: Path) -> Path:
    """Return the Python of a virtual environment apart from the project's."""
    home = folder / f"venv-{sys.version_info[0]}.{sys.version_info[1]}"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True, clear=True)
    return python


def download(options: argparse.Namespace, folder: Path, python: Path) -> tuple[str, Path]:
    """Fetch and unpack the newest source of that version, install the same version beside it."""
    wanted: str = options.sqlalchemy
    sources = folder / "source"
    if options.as_fetched:
        (suite,) = sources.glob("sqlalchemy-*/")
        return suite.name.rpartition("-")[2], suite
    shutil.rmtree(sources, ignore_errors=True)
    requirement = f"sqlalchemy=={wanted}" + (".*" if wanted.count(".") == 1 else "")
    fetch = ("download", "--no-deps", "--no-binary", "sqlalchemy", "-d", str(sources))
    pip(python, *fetch, requirement)
    (archive,) = sources.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        # An argument only since Python 3.11.4, and a warning without from 3.12 on.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(sources)
    suite = sources / archive.name.removesuffix(".tar.gz")
    version = suite.name.rpartition("-")[2]
    # The suite does not know pytest 9.
    drivers = ("aiosqlite", "asyncpg")
    pip(python, "install", f"sqlalchemy[asyncio]=={version}", "pytest<9", "pytest-xdist", *drivers)
    return version, suite


@contextmanager
def database(kind: str, python: Path) -> Iterator[tuple[str, ...]]:
    """Yield pytest's arguments for the database; a server runs as long as it is needed."""
    if kind != "postgresql":
        # SQLite in memory has no QueuePool.
        yield ("--db", "sqlite_file" if kind == "threads" else "aiosqlite_file")
        return
    sys.path.insert(0, str(ROOT))
    from tests.servers import PostgresServer

    with PostgresServer() as server:
        plain = server.url().replace("postgresql+psycopg2", "postgresql")
        subprocess.run([python, "-c", PREPARE, plain], check=True)
        yield ("--dburi", f"postgresql+asyncpg://scott@127.0.0.1:{server.port}/test")


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "-qq", *arguments], check=True)


def run(
    python: Path,
    suite: Path,
    folder: Path,
    options: argparse.Namespace,
    arguments: tuple[str, ...],
) -> tuple[int, int]:
    """Run the suite; return pytest's exit code and the number of pools built."""
    built = folder / f"built-{options.kind}.txt"
    for old in (built, options.junitxml):
        old.unlink(missing_ok=True)
    path = (str(HERE), str(ROOT), os.environ.get("PYTHONPATH"))
    tests = {"threads": THREADS, "asyncio": ASYNCIO, "postgresql": CANCELLATION}[options.kind]
    concurrency = sorted(suite.glob("test/base/test_concurrency*.py"))
    if options.kind == "asyncio":
        tests = (*tests, *(str(path.relative_to(suite)) for path in concurrency))
        # It makes an engine for threads from the URL of asyncio, and fails with any pool.
        unfit = "test/engine/test_pool.py::QueuePoolTest::test_recycle_pool_no_race"
        arguments = (*arguments, f"--deselect={unfit}")
    done = subprocess.run(
        [
            *(python, "-m", "pytest", "-p", "substitute", *tests),
            *(*arguments, "-q", "-rN", "-rfE", "-p", "no:logging", "-n", options.n),
            *(f"--junitxml={options.junitxml}", *options.pytest),
        ],
        cwd=suite,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            # The suite's conftest then takes the SQLAlchemy that is installed, and compiled.
            "PYTHONNOUSERSITE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "SQLA_QUEUEPOOL": options.pool,
            "SQLA_ASYNCQUEUEPOOL": options.async_pool,
            "SQLA_EXPECTED_DIFFERENCES": str(HERE / f"expected_differences_{options.kind}.txt"),
            "SQLA_BUILT": str(built),
        },
        check=False,
    )
    counts = built.read_text().split() if built.exists() else []
    return done.returncode, sum(map(int, counts))


def read(report: Path) -> Outcome:
    """Read how the tests ended; pytest reports a test expected to differ as skipped."""
    if not report.exists():
        return Outcome(0, 0, 0, 0)
    root = ElementTree.parse(report).getroot()
    tests = len(root.findall(".//testcase"))
    failed = len(root.findall(".//failure")) + len(root.findall(".//error"))
    skipped = [element.get("type") for element in root.iter("skipped")]
    differing = skipped.count("pytest.xfail")
    return Outcome(tests - failed - len(skipped), failed, differing, len(skipped) - differing)


if __name__ == "__main__":
    sys.exit(main())
