"""A real Prometheus takes the metrics, the alerts and what the dashboard asks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sqla_poolkit.watch.prometheus import PoolCollector
from tests.servers import PostgresServer, _free_ports
from tests.waiting import until
from tests.watch.exporting import text_of
from tests.watch.service import ROOT, get, gunicorn

EXAMPLES = ROOT / "examples"
DASHBOARD = json.loads((EXAMPLES / "grafana" / "sqla_poolkit.json").read_text())
ALERTS = EXAMPLES / "prometheus" / "sqla_poolkit_alerts.yml"

# OpenTelemetry's convention has a gauge whose name ends in "count"; to name it otherwise would
# part those who come through OpenTelemetry from those who come here.
COMPLAINT = (
    'db_client_connection_count non-histogram and non-summary metrics should not have "_count" '
    "suffix"
)
# What a healthy service has nothing to say about.
SILENT = {"sqlalchemy_pool_closed_total"}


@pytest.fixture(scope="module")
def promtool() -> str:
    return program("promtool")


def program(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"no {name} was found (Debian: apt-get install prometheus)")
    return found


def answer_of(*command: str | Path, given: str = "") -> tuple[int, str]:
    done = subprocess.run(
        command,
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout


def test_the_metrics_are_named_as_prometheus_wants_them(promtool: str, make):
    make(pool_timeout=7).connect().close()
    answer = answer_of(
        promtool, "check", "metrics", given=text_of(PoolCollector(registry=None, labels=True))
    )
    assert answer == (3, f"{COMPLAINT}\n")


def test_the_alerts_are_valid_and_fire_when_they_should(promtool: str):
    folder = EXAMPLES / "prometheus"
    code, said = answer_of(promtool, "check", "config", folder / "prometheus.yml")
    assert (code, said.count("SUCCESS")) == (0, 3), said
    code, said = answer_of(promtool, "check", "rules", ALERTS)
    assert code == 0, said
    tests = folder / "sqla_poolkit_alerts_test.yml"
    code, said = answer_of(promtool, "test", "rules", tests)
    assert code == 0, said
    alerts = set(re.findall(r"- alert: (\w+)", ALERTS.read_text()))
    assert set(re.findall(r"alertname: (\w+)", tests.read_text())) == alerts


def expressions() -> list[str]:
    """Return what the dashboard asks, its variables filled in."""
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    filled = [
        expr.replace("$__rate_interval", "20s")
        .replace("$__range", "20s")
        .replace("$pool", ".*")
        .replace("$instance", ".*")
        for expr in asked
    ]
    assert not any("$" in expr for expr in filled)
    return filled


def names_in(text: str) -> set[str]:
    # what ends in a underscore would be half a name; the keys of labels are no metrics
    found = set(re.findall(r"\b(?:db_client_connection|sqlalchemy_pool)_\w+", text))
    return found - {"db_client_connection_pool_name", "db_client_connection_state"}


def test_dashboard_and_alerts_ask_for_what_there_is(make):
    make().connect().close()
    there_is = names_in(text_of(PoolCollector(registry=None, labels=True)))
    variables = " ".join(str(each.get("definition")) for each in DASHBOARD["templating"]["list"])
    asked = names_in(" ".join([*expressions(), variables, ALERTS.read_text()]))
    assert asked - there_is == set()
    assert len(asked) > 15


def test_the_panels_of_the_dashboard_lie_side_by_side():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        taken |= cells
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)


class Prometheus:
    """A running Prometheus that scrapes one service."""

    def __init__(self, folder: Path, target: str) -> None:
        port = next(_free_ports())
        self.address = f"http://127.0.0.1:{port}"
        settings = (EXAMPLES / "prometheus" / "prometheus.yml").read_text()
        settings = settings.replace("127.0.0.1:8000", target).replace("15s", "200ms")
        shutil.copy(ALERTS, folder)
        (folder / "prometheus.yml").write_text(settings)
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/data",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )

    def is_ready(self) -> bool:
        assert self.process.poll() is None
        try:
            return "Ready" in get(f"{self.address}/-/ready")
        except OSError:
            return False

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that are the answer."""
        asked = urllib.parse.urlencode({"query": expression})
        answer = json.loads(get(f"{self.address}/api/v1/query?{asked}"))
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def value(self, expression: str) -> float:
        """Return the one number that is the answer; -1 for none."""
        series = self.ask(expression)
        return float(series[0]["value"][1]) if series else -1.0

    def alerts(self) -> dict[str, dict[str, Any]]:
        answer = json.loads(get(f"{self.address}/api/v1/alerts"))
        return {alert["labels"]["alertname"]: alert for alert in answer["data"]["alerts"]}

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def service(postgres: PostgresServer, tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "shared"
    folder.mkdir()
    with gunicorn(postgres.url("psycopg2"), folder, "--threads", "8") as address:
        yield address


@pytest.fixture
def prometheus(service: str, tmp_path: Path) -> Iterator[Prometheus]:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    server = Prometheus(folder, service.removeprefix("http://"))
    try:
        until(server.is_ready, seconds=30)
        yield server
    finally:
        server.end()


@pytest.mark.usefixtures("promtool")
def test_a_real_prometheus_scrapes_a_real_service_and_answers_the_dashboard(
    service: str, prometheus: Prometheus
):
    until(lambda: prometheus.value("up") == 1)
    served = 0
    deadline = time.monotonic() + 5
    requests = [f"{service}/{path}" for path in ("report", *["users"] * 7) * 2]
    with ThreadPoolExecutor(16) as threads:
        while time.monotonic() < deadline:  # counters have to be seen to grow
            list(threads.map(get, requests))
            served += len(requests)
    # what a worker last said may be a second old
    until(lambda: prometheus.value("db_client_connection_use_time_seconds_count") == served)
    assert prometheus.value('sqlalchemy_pool_requests_total{outcome="ok"}') == served
    assert prometheus.value("db_client_connection_max") == 4  # two workers with two each
    assert (
        prometheus.value('sum(db_client_connection_count{db_client_connection_state="used"})') == 0
    )

    silent = {expr for expr in expressions() if not prometheus.ask(expr)}
    assert [expr for expr in silent if not names_in(expr) & SILENT] == []
    caused = prometheus.ask(
        'sum by (label) (sqlalchemy_pool_label_wait_caused_seconds_total{label=~"GET .*"}) > 0'
    )
    labels = sorted(series["metric"]["label"] for series in caused)
    assert labels == ["GET /report", "GET /users"]
    slowest = prometheus.value(
        "histogram_quantile(1, sum by (le)"
        " (rate(db_client_connection_use_time_seconds_bucket[20s])))"
    )
    assert 0.5 <= slowest <= 1
    # callers wait now and then, but none of it lasts
    assert [name for name, alert in prometheus.alerts().items() if alert["state"] == "firing"] == []
