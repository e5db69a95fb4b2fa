"""Tests the dashboard's and the rules' queries with a real Prometheus, a prefilld and a decode worker under load.

    python3 tests/deploy/dashboards_live_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the client's packages or a Prometheus.
"""

import json
import sys
import unittest
from pathlib import Path

from alerts_processes import ROOT, Prometheus, reason_to_skip, running, temporary_folder, wait_until

if reason_to_skip():
    print(f"skipped: {reason_to_skip()}")
    sys.exit(77)

import metric_names  # noqa: E402
import yaml  # noqa: E402
from dashboards_load import Load, Shown, promising_clusters  # noqa: E402

DASHBOARD = json.loads((ROOT / "deploy" / "dashboards" / "prefilld.json").read_text())
RULES = yaml.safe_load((ROOT / "deploy" / "alerts" / "prefilld.rules.yaml").read_text())
WINDOW = "20s"



def live(expr: str) -> str:
    """Returns a query of the dashboard with its variables filled in."""
    return expr.replace("$__rate_interval", WINDOW).replace("$instance", ".*")


def values(result: list[dict]) -> list[float]:
    return [float(series["value"][1]) for series in result if series["value"][1] != "NaN"]


class Live(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(temporary_folder())
        cls.shown = Shown(BIN_DIR, folder, promising_clusters(folder))
        cls.prometheus = cls.enterClassContext(Prometheus(folder / "prometheus", cls.shown.servers, RULES))
        cls.enterClassContext(running(cls.shown.servers))
        cls.load = Load(cls.shown)
        cls.enterClassContext(cls.load)

    def test_every_metric_of_panels_and_rules_is_scraped(self):
        there = set().union(*(metric_names.on_page(server.page()) for server in self.shown.servers))
        named = metric_names.of_dashboard(DASHBOARD) | metric_names.of_rules(RULES)
        self.assertEqual(named - there, set())

    def test_every_metric_that_is_scraped_is_described_and_no_other(self):
        there = set().union(*(metric_names.on_page(server.page()) for server in self.shown.servers))
        described = metric_names.in_table((ROOT / "deploy" / "README.md").read_text())
        self.assertEqual(there - described, set(), "not described")
        self.assertEqual(described - there, set(), "not there")

    def test_every_query_returns_data_under_load(self):
        missing = {(title, legend): expr for title, expr, legend in metric_names.queries_of_dashboard(DASHBOARD)}
        self.assertGreater(len(missing), 60)

        def all_were_there() -> bool:
            for query, expr in list(missing.items()):
                if values(self.prometheus.query(live(expr))):
                    del missing[query]
            return not missing

        try:
            wait_until(all_were_there, "every query returns data", 120)
        except TimeoutError:
            self.fail(f"no data: {json.dumps(list(missing.items()), indent=1)}\n{self.load.errors}")
        self.assertEqual(self.load.errors, [])

    def test_labels_tell_lengths_and_policies_apart(self):
        counts = 'prefilld_time_to_first_token_seconds_count{policy="%s",length="%s"} > 0'
        for policy, length in [("share", "1k-4k"), ("share", "4k-16k"), ("dense", "0-1k"), ("vertical_slash", "1k-4k")]:
            wait_until(lambda: self.prometheus.query(counts % (policy, length)), f"{policy} {length}", 60)

    def test_every_recording_has_values(self):
        recordings = [rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule]
        for name in recordings:
            wait_until(lambda: self.prometheus.query(name), name, 60)

    def test_nothing_alerts_though_a_tenant_is_over_its_limit(self):
        refused = 'prefilld_refusals_total{cause="tenant_requests"} > 0'
        wait_until(lambda: self.prometheus.query(refused), "a tenant is refused", 60)
        self.assertEqual(self.prometheus.firing(), set())


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop()).resolve()
    unittest.main()
