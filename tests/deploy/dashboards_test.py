"""Tests that the committed dashboard and rules are what their sources make, and name only what is there.

    python3 tests/deploy/dashboards_test.py

Exits with 77 (skipped, for CTest) without grafana-foundation-sdk or promtool.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "deploy" / "dashboards"), str(ROOT / "deploy" / "alerts"), str(Path(__file__).parent)]

if not importlib.util.find_spec("grafana_foundation_sdk"):
    print("skipped: there is no grafana-foundation-sdk (tests/python/requirements.txt)")
    sys.exit(77)
if not shutil.which("promtool"):
    print("skipped: there is no promtool (deploy/install_packages.sh --tests)")
    sys.exit(77)

import make_dashboard  # noqa: E402
import make_manifest  # noqa: E402
import metric_names  # noqa: E402
import yaml  # noqa: E402

RULES = yaml.safe_load(make_manifest.RULES.read_text())
UNIT_TESTS = Path(__file__).parent / "alerts_rules_test.yaml"
README = ROOT / "deploy" / "alerts" / "README.md"


def rules(kind: str) -> list[dict]:
    return [rule for group in RULES["groups"] for rule in group["rules"] if kind in rule]


def described_metrics() -> set[str]:
    """Returns the metrics in the table of deploy/README.md."""
    return metric_names.in_table((ROOT / "deploy" / "README.md").read_text())


class Dashboard(unittest.TestCase):
    def test_the_committed_one_is_what_the_script_makes(self):
        self.assertEqual(make_dashboard.DASHBOARD.read_text(), make_dashboard.build_dashboard())

    def test_every_metric_is_described(self):
        named = metric_names.of_dashboard(json.loads(make_dashboard.DASHBOARD.read_text()))
        self.assertGreater(len(named), 40)
        self.assertEqual(named - described_metrics(), set())

    def test_what_other_programs_export_too_is_taken_of_ours_alone(self):
        queries = metric_names.queries_of_dashboard(json.loads(make_dashboard.DASHBOARD.read_text()))
        selectors = [found for _, expr, _ in queries for found in re.findall(r"\bprocess_[a-z_]+(?:{[^}]*})?", expr)]
        self.assertGreaterEqual(len(selectors), 3)
        for selector in selectors:
            self.assertRegex(selector, r"{.*\bjob=~?\"prefilld")

    def test_no_panels_overlap(self):
        taken = set()
        for panel in json.loads(make_dashboard.DASHBOARD.read_text())["panels"]:
            place = panel["gridPos"]
            self.assertLessEqual(place["x"] + place["w"], 24)
            cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
            self.assertFalse(taken & cells, panel["title"])
            taken |= cells


class Rules(unittest.TestCase):
    def test_the_manifest_is_made_of_the_rules(self):
        self.assertEqual(make_manifest.MANIFEST.read_text(), make_manifest.manifest(RULES))
        self.assertEqual(yaml.safe_load(make_manifest.MANIFEST.read_text())["spec"], RULES)

    def test_promtool_finds_no_fault(self):
        done = subprocess.run(["promtool", "check", "rules", make_manifest.RULES], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_every_metric_is_described(self):
        self.assertEqual(metric_names.of_rules(RULES) - described_metrics(), set())

    def test_every_alert_says_how_bad_it_is_and_where_to_read_on(self):
        sections = README.read_text().split("\n### ")[1:]
        described = {section.splitlines()[0]: section for section in sections}
        self.assertEqual(list(described), [rule["alert"] for rule in rules("alert")])
        for rule in rules("alert"):
            with self.subTest(rule["alert"]):
                self.assertIn(rule["labels"]["severity"], ("warning", "critical"))
                self.assertEqual(rule["annotations"]["runbook"], f"deploy/alerts/README.md#{rule['alert'].lower()}")
                self.assertEqual(set(rule["annotations"]), {"summary", "description", "runbook"})
                for part in ("**Means**", "**See**", "**Do**"):
                    self.assertEqual(described[rule["alert"]].count(part), 1, part)

    def test_every_alert_fires_and_clears_in_a_unit_test(self):
        fires, clears = set(), set()
        for case in yaml.safe_load(UNIT_TESTS.read_text())["tests"]:
            seen = []
            for step in case.get("alert_rule_test", []):
                if step["exp_alerts"]:
                    fires.add(step["alertname"])
                    seen.append(step["alertname"])
                elif step["alertname"] in seen:
                    clears.add(step["alertname"])
        self.assertEqual(fires, {rule["alert"] for rule in rules("alert")})
        self.assertEqual(clears, fires)

    def test_the_unit_tests_pass(self):
        done = subprocess.run(["promtool", "test", "rules", UNIT_TESTS], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


if __name__ == "__main__":
    unittest.main()
