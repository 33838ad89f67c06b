"""Run every leg of the CI, tell how each one ended, and fail if any of them failed.

The README's test command, lint and types; then, ``JOBS`` (2) at a time, SQLAlchemy's own suite,
each Python found here with the newest SQLAlchemy, the oldest and the newest with 2.0 and 2.1, one
without the extras, and a load while network and server fail at random.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".cache" / "ci"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SQLALCHEMYS = ("2.0", "2.1")
LIMIT_SECONDS = 900
LINES_SHOWN = 150
CHAOS_SEED = "20"

# A test that is skipped proves nothing.
STRICT = ("--no-skips", "-rs")
# What no other Python or SQLAlchemy would change runs once, by make test, as do the longest tests.
ONCE = (
    *("-k", "not three_sites"),
    *("--ignore=tests/test_fault_proxy.py", "--ignore=tests/test_network.py"),
    *("--ignore=tests/test_servers.py", "--ignore=tests/test_examples.py"),
    *("--ignore=tests/test_cli.py", "--ignore=tests/realtime/test_signals.py"),
    "--ignore=tests/watch/test_prometheus_server.py",
)
# Real outages and other processes take real time: they come with the oldest of both and the newest
# of both, and in make test.
SHORTER = (
    *("--ignore=tests/pool/test_outages.py", "--ignore=tests/testing"),
    *("--ignore=tests/watch/test_last_rollback.py", "--ignore=tests/watch/test_multiprocess.py"),
)


@dataclass
class Leg:
    """Commands that run one after the other until one fails."""

    name: str
    commands: Sequence[Sequence[str]]
    environment: dict[str, str] = field(default_factory=dict)
    is_ok: bool = False
    seconds: float = 0.0

    @property
    def folder(self) -> Path:
        return WORK / self.name.replace(" ", "-")

    @property
    def report(self) -> Path:
        """Where a command writes how its tests ended; further ones write beside it."""
        return self.folder / "report.xml"

    @property
    def reports(self) -> list[Path]:
        return sorted(self.folder.glob("*.xml"))

    def run(self) -> None:
        """Run the commands; print how they ended, and on failure the end of what they printed."""
        self.folder.mkdir(parents=True)
        log = self.folder / "log"
        began = time.monotonic()
        with log.open("wb") as output:
            self.is_ok = all(self._call(command, output) for command in self.commands)
        self.seconds = time.monotonic() - began
        lines = [str(self)]
        if not self.is_ok:
            text = log.read_text(errors="replace").splitlines()
            lines += [f"    {line}" for line in text[-LINES_SHOWN:]]
        print("\n".join(lines), flush=True)

    def _call(self, command: Sequence[str], output: IO[bytes]) -> bool:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(LIMIT_SECONDS) == 0
        except subprocess.TimeoutExpired:
            output.write(f"stopped after {LIMIT_SECONDS} s\n".encode())
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def counts(self) -> tuple[int, int]:
        """Count the tests that passed and that failed; a leg broken otherwise is one failure."""
        passed = failed = 0
        for report in self.reports:
            for case in ElementTree.parse(report).iter("testcase"):
                ends = {element.tag for element in case}
                failed += bool(ends & {"failure", "error"})
                passed += not ends & {"failure", "error", "skipped"}
        return passed, failed or int(not self.is_ok)

    def __str__(self) -> str:
        passed, failed = self.counts()
        tests = f"{passed:6} passed {failed:4} failed" if self.reports else ""
        return f"{'ok' if self.is_ok else 'FAILED':8}{self.seconds:6.0f} s  {self.name:28}{tests}"


def main() -> int:
    began = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "PYTEST_ADDOPTS"):
        os.environ.pop(name, None)
    pythons = dict(find_pythons())
    for version in PYTHONS:
        if version not in pythons:
            print(f"Python {version} is not installed here", flush=True)
    if not pythons:
        return 1

    legs: list[Leg] = []
    legs += run(house())
    legs += run(wheel(pythons))
    legs += run(
        [*upstream(pythons), chaos(pythons), *matrix(pythons)], int(os.environ.get("JOBS", "2"))
    )

    print(f"\n{time.monotonic() - began:.0f} s in all", *legs, sep="\n")
    passed, failed = map(sum, zip(*(leg.counts() for leg in legs), strict=True))
    print(f"{passed} passed, {failed} failed")
    return 0 if all(leg.is_ok for leg in legs) else 1


def run(legs: Iterable[Leg], at_a_time: int = 1) -> list[Leg]:
    legs = list(legs)
    with ThreadPoolExecutor(at_a_time) as executor:
        list(executor.map(Leg.run, legs))
    return legs


def find_pythons() -> Iterator[tuple[str, str]]:
    """Yield version and path of each wanted Python, from the PATH or from pyenv."""
    homes = {Path.home() / ".pyenv", Path(os.environ.get("PYENV_ROOT", "/nonexistent"))}
    for version in PYTHONS:
        candidates = [shutil.which(f"python{version}")]
        for home in homes:
            candidates += sorted(map(str, home.glob(f"versions/{version}.*/bin/python")))
        for candidate in filter(None, candidates):
            if _is_usable(candidate, version):
                yield version, candidate
                break


def _is_usable(python: str, version: str) -> bool:
    # A shim of pyenv answers with an error, Debian's own Python may lack ensurepip.
    question = "import ensurepip, sqlite3, ssl, sys; print('%d.%d' % sys.version_info[:2])"
    answer = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
    return answer.stdout.strip() == version


def house() -> Iterator[Leg]:
    test = Leg("make test", [["make", "test"]])
    test.environment = {"PYTEST_ADDOPTS": " ".join((*STRICT, f"--junitxml={test.report}"))}
    yield test
    yield Leg("make lint", [["make", "lint"]])
    yield Leg("make type", [["make", "type"]])


def wheel(pythons: dict[str, str]) -> Iterator[Leg]:
    """Build what the matrix installs.

    Editable installations of two legs at a time would write to the same folder of the tree.
    """
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    venv = str(WORK / "wheel" / "venv")
    pip = [f"{venv}/bin/python", "-m", "pip", "-qq"]
    yield Leg(
        "wheel",
        [
            [pythons[newest(pythons)], "-m", "venv", venv],
            [*pip, "wheel", "--no-deps", "-w", str(WORK), "."],
        ],
    )


def is_that_of_make_test(version: str, sqlalchemy: str) -> bool:
    """Tell whether ``make test`` has run these two already: its Python, the newest SQLAlchemy."""
    about = ROOT / ".venv" / "pyvenv.cfg"
    lines = about.read_text().splitlines() if about.exists() else []
    is_its_python = any(
        line.startswith("version") and f" {version}." in line.replace("=", " ") for line in lines
    )
    return is_its_python and sqlalchemy == SQLALCHEMYS[-1]


def newest(pythons: dict[str, str]) -> str:
    return list(pythons)[-1]


def fits(python: str, sqlalchemy: str) -> bool:
    return sqlalchemy == "2.0" or python != "3.10"


def matrix(pythons: dict[str, str]) -> Iterator[Leg]:
    ends = (next(iter(pythons)), SQLALCHEMYS[0]), (newest(pythons), SQLALCHEMYS[-1])
    for version, python in pythons.items():
        for sqlalchemy in SQLALCHEMYS:
            if not fits(version, sqlalchemy) or is_that_of_make_test(version, sqlalchemy):
                continue
            is_between = version not in (ends[0][0], ends[1][0])
            if is_between and sqlalchemy != SQLALCHEMYS[-1]:
                continue
            packages = [f"{our_wheel()}[test]", f"sqlalchemy=={sqlalchemy}.*"]
            options = () if (version, sqlalchemy) in ends else SHORTER
            yield pytest_leg(f"py{version} sqlalchemy{sqlalchemy}", python, packages, *options)
    # The newest SQLAlchemy, which does without greenlet.
    version = newest(pythons)
    bare = [our_wheel(), "pytest", "pytest-timeout", "hypothesis"]
    yield pytest_leg(f"py{version} without extras", pythons[version], bare, "-m", "not extra")


def our_wheel() -> str:
    return next(map(str, WORK.glob("*.whl")), ".")


def pytest_leg(name: str, python: str, packages: list[str], *options: str) -> Leg:
    leg = Leg(name, [], {"HYPOTHESIS_PROFILE": "ci-short"})
    venv = str(leg.folder / "venv")
    own = [f"{venv}/bin/python", "-m"]
    leg.commands = [
        [python, "-m", "venv", venv],
        [*own, "pip", "-qq", "install", *packages],
        [*own, "pip", "list", "--disable-pip-version-check"],
        [*own, "pytest", *STRICT, *ONCE, f"--junitxml={leg.report}", *options],
    ]
    return leg


def chaos(pythons: dict[str, str]) -> Leg:
    """Load pools while network and server fail; ahead of the matrix, as the longest leg."""
    version = newest(pythons)
    sqlalchemy = SQLALCHEMYS[-1] if fits(version, SQLALCHEMYS[-1]) else SQLALCHEMYS[0]
    leg = Leg("chaos", [])
    venv = str(leg.folder / "venv")
    own = [f"{venv}/bin/python", "-m"]
    leg.commands = [
        [pythons[version], "-m", "venv", venv],
        [*own, "pip", "-qq", "install", f"{our_wheel()}[test]", f"sqlalchemy=={sqlalchemy}.*"],
        [*own, "pip", "list", "--disable-pip-version-check"],
        [*own, "tests.chaos", "--seconds", "180", "--seed", CHAOS_SEED],
    ]
    return leg


def upstream(pythons: dict[str, str]) -> Iterator[Leg]:
    version = newest(pythons)
    for sqlalchemy in SQLALCHEMYS:
        if fits(version, sqlalchemy):
            leg = Leg(f"upstream {sqlalchemy}", [])
            suite = [pythons[version], "tests/upstream/run.py", "--sqlalchemy", sqlalchemy]
            leg.commands = [
                [*suite, "--kind", kind, f"--junitxml={leg.folder / kind}.xml", *options]
                for kind, *options in (
                    ["threads"],
                    ["asyncio", "--as-fetched"],
                    ["postgresql", "--as-fetched"],
                )
            ]
            yield leg


if __name__ == "__main__":
    sys.exit(main())
