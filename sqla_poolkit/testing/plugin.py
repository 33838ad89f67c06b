"""The pytest plugin ``poolkit``: a test that does not return its connections fails.

Off until asked for with ``--pool-leaks=fail`` or ``pool_leaks = fail`` in pytest's configuration:
to install a library must not turn a suite red.  Until then nothing but this file is loaded.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ._checkouts import Checkout

__all__ = ["LeakGuard"]

MODES = ("fail", "warn", "off")
SECTION = "Connections not returned, found at teardown"

_failed_in = pytest.StashKey[str]()
_found = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--pool-leaks`` and ``pool_leaks``."""
    meaning = (
        "what becomes of a test that does not return a connection to its SQLAlchemy pool: it "
        "fails, is listed at the end (warn), or is not looked at (off, the default)"
    )
    group = parser.getgroup("poolkit", "connection pools (sqla_poolkit)")
    group.addoption("--pool-leaks", choices=MODES, default=None, help=meaning)
    parser.addini("pool_leaks", meaning, default="off")


def pytest_configure(config: pytest.Config) -> None:
    """Look for leaks if that is asked for."""
    config.addinivalue_line(
        "markers",
        "pool_leaks_allowed: this test may end with connections out that it has taken",
    )
    mode = config.getoption("pool_leaks") or config.getini("pool_leaks")
    if mode not in MODES:
        raise pytest.UsageError(f"pool_leaks = {mode} is not possible; it is one of {MODES}")
    if mode != "off":
        config.pluginmanager.register(LeakGuard(fails=mode == "fail"), "poolkit-leaks")


class LeakGuard:
    """Judges each test by the connections that are out after its teardown.

    Excused are those that were out before, and those that a fixture of a wider scope took while it
    was set up, as long as that fixture lives.
    """

    def __init__(self, *, fails: bool) -> None:
        from . import leaks

        self._leaks = leaks
        self._fails = fails
        self._excused: dict[Checkout, object] = {}
        """With the fixture that holds it, if it is one."""
        self._reported: list[tuple[str, str]] = []
        leaks.checkouts.start()

    def pytest_unconfigure(self) -> None:
        """Listen no longer."""
        self._leaks.checkouts.stop()

    # -- who is excused ------------------------------------------------------------------------

    def _unexcused(self) -> list[Checkout]:
        unreturned = self._leaks.checkouts.unreturned()
        self._excused = {one: self._excused[one] for one in unreturned if one in self._excused}
        return [one for one in unreturned if one not in self._excused]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, object]:
        """Excuse what a fixture takes for more than one test."""
        began_at = self._leaks.checkouts.mark()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                for checkout in self._unexcused():
                    if checkout.number > began_at:
                        self._excused[checkout] = fixturedef

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """Excuse a fixture no longer that was torn down."""
        for checkout, owner in list(self._excused.items()):
            if owner is fixturedef:
                del self._excused[checkout]

    # -- a test --------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        """Excuse what is out before the test."""
        item.stash[_failed_in] = item.stash[_found] = ""
        self._excused.update(dict.fromkeys(self._unexcused()))
        self._leaks.checkouts.forget_dropped()
        yield

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        """Look what is out after everything was torn down."""
        try:
            yield
        except BaseException:
            self._look(item)
            item.stash[_failed_in] = "teardown"
            raise
        self._look(item)
        if item.stash[_found] and self._fails and not item.stash[_failed_in]:
            message, item.stash[_found] = item.stash[_found], ""
            pytest.fail(message, pytrace=False)

    def _look(self, item: pytest.Item) -> None:
        leaked = self._leaks.wait_for_tasks(self._unexcused)
        self._excused.update(dict.fromkeys(leaked))
        self._leaks.checkouts.forget_dropped()
        if leaked and item.get_closest_marker("pool_leaks_allowed") is None:
            item.stash[_found] = self._leaks.describe_leaks(leaked)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Show what is out beside the failure that the test has already."""
        report = yield
        if report.when != "teardown":
            if report.failed:
                item.stash[_failed_in] = report.when
            elif hasattr(report, "wasxfail"):
                item.stash[_failed_in] = "xfail"
        elif message := item.stash[_found]:
            if item.stash[_failed_in] in ("call", "teardown"):
                report.sections.append((SECTION, message))
            else:
                # an attribute travels with the report, also from one of xdist's processes
                report.pool_leaks = message  # type: ignore[attr-defined]
        return report

    # -- the end -------------------------------------------------------------------------------

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what is to be listed."""
        message = getattr(report, "pool_leaks", None)
        if message is not None:
            self._reported.append((report.nodeid, message))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List the tests that were not failed for what they did not return."""
        if not self._reported:
            return
        terminalreporter.section("connections that tests did not return", yellow=True)
        for nodeid, message in self._reported:
            terminalreporter.line(nodeid, bold=True)
            terminalreporter.line(message)
