#!/usr/bin/env python3
"""Tests the step that looks for heads worth computing exactly, on made-up runs, and with prefilld over the embedded
model.

exact_heads_test.py FOLDER_OF_PROGRAMS. The second part needs the Python client's packages (grpcio, protobuf, numpy,
xxhash); without them the script exits with 77, skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "model" / "tiny"
sys.path.insert(0, str(ROOT / "model" / "calibration"))
import cluster_file  # noqa: E402
import exact_heads  # noqa: E402
import served_runs  # noqa: E402
from cluster_file import ClusterFile  # noqa: E402

try:
    import google.protobuf  # noqa: F401
    import grpc  # noqa: F401
    import numpy  # noqa: F401
    import xxhash  # noqa: F401
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

PROGRAMS = Path(sys.argv.pop()) if len(sys.argv) > 1 else None
FILE = ClusterFile(
    {"0": [(1, 0), (2, 1)], "2": [(0, 0), (0, 1), (2, 0)], "3": [(2, 2)]}, ["0"], {"gamma": 0.8}, "0123456789abcdef" * 2
)


class Heads(unittest.TestCase):
    def test_a_head_a_layer_and_layers_can_be_named(self):
        self.assertEqual(exact_heads.parse_heads(["2.1"], 4, 3), [(2, 1)])
        self.assertEqual(exact_heads.parse_heads(["1", "1.2"], 4, 3), [(1, 0), (1, 1), (1, 2)])
        self.assertEqual(len(exact_heads.parse_heads(["0-3"], 4, 3)), 12)

    def test_heads_that_the_model_has_not_are_refused(self):
        for text in ("4", "0.3", "2-4", "3-2"):
            with self.assertRaisesRegex(ValueError, f"'{text}' is outside 4 layers of 3 heads"):
                exact_heads.parse_heads([text], 4, 3)
        for text in ("x", "1.", "1-2.0", "", "-1"):
            with self.assertRaisesRegex(ValueError, "neither a head"):
                exact_heads.parse_heads([text], 4, 3)


class ClusterFiles(unittest.TestCase):
    def test_the_head_moves_and_all_else_stays(self):
        made = exact_heads.with_exact(FILE, [(0, 1)])
        self.assertEqual(made.clusters, {"0": [(1, 0), (2, 1)], "2": [(0, 0), (2, 0)], "3": [(2, 2)], "1": [(0, 1)]})
        self.assertEqual(made.shared, ["0", "1"])
        self.assertEqual((made.thresholds, made.fingerprint), (FILE.thresholds, FILE.fingerprint))
        self.assertEqual(FILE.clusters["2"], [(0, 0), (0, 1), (2, 0)])

    def test_a_head_of_no_group_gets_one_and_an_emptied_group_goes(self):
        made = exact_heads.with_exact(FILE, [(3, 0), (2, 2)])
        self.assertEqual(set(made.clusters), {"0", "1", "2", "4"})
        self.assertEqual([made.clusters[name] for name in made.shared], [[(1, 0), (2, 1)], [(3, 0)], [(2, 2)]])

    def test_a_head_that_shares_is_left_where_it_is(self):
        with self.assertRaisesRegex(ValueError, "head 2.1 is in a group that shares"):
            exact_heads.with_exact(FILE, [(0, 0), (2, 1)])

    def test_taking_heads_keeps_what_the_file_says_and_drops_what_no_longer_holds(self):
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "a.json", Path(folder) / "b.json"
            statistics = {name: {"heads": len(group)} for name, group in FILE.clusters.items()}
            cluster_file.write(source, FILE, {"recall": 0.9, "exact_heads": ["3.0"]}, statistics)
            exact_heads.take(source, target, [(0, 1)], (4, 3))
            before, after = json.loads(source.read_text()), json.loads(target.read_text())
            self.assertEqual(after["calibration"], {"recall": 0.9, "exact_heads": ["3.0", "0.1"]})
            self.assertEqual(after["statistics"], {"0": {"heads": 2}, "3": {"heads": 1}})
            for name in ("format_version", "model_fingerprint", "thresholds"):
                self.assertEqual(after[name], before[name])

    def test_a_plain_file_stays_plain(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plain.json"
            cluster_file.write(path, ClusterFile(FILE.clusters, FILE.shared))
            exact_heads.take(path, path, [(0, 1)], (4, 3))
            self.assertEqual(set(json.loads(path.read_text())), {"clusters", "shared_clusters"})


def planted_run(name: str, density: float, *nats: float) -> dict:
    return {"run": name, "nats": {"64": list(nats)}, "density": {"64": density}}


class Ranking(unittest.TestCase):
    RUNS = {
        run["run"]: run
        for run in (
            planted_run("dense", 1.0, 0.50, 0.60),
            planted_run("before", 0.20, 0.52, 0.64),
            planted_run("1.0", 0.25, 0.51, 0.62),  # gains most, costs a lot
            planted_run("1.1", 0.21, 0.51, 0.63),
            planted_run("1.2", 0.19, 0.52, 0.638),  # seems to cost less than nothing
            planted_run("1.3", 0.21, 0.53, 0.65),  # does harm
        )
    }

    def test_heads_stand_by_gain_for_what_they_cost(self):
        rows = exact_heads.rank(self.RUNS, ["1.3", "1.0", "1.2", "1.1"], 64)
        self.assertEqual([row.head for row in rows], ["1.1", "1.2", "1.0", "1.3"])
        best, cheap = rows[:2]
        self.assertAlmostEqual(best.gain, 0.01)
        self.assertAlmostEqual(best.gain_error, 0.0)
        self.assertAlmostEqual(best.density_added, 0.01)
        self.assertAlmostEqual(best.gain_per_density, 1.0)
        self.assertAlmostEqual(best.perplexity_to_dense["64"], 2.718281828**0.02)
        self.assertAlmostEqual(cheap.gain_per_density, 0.001 / (0.1 / 64))

    def test_one_text_has_no_error(self):
        runs = {name: {**run, "nats": {"64": run["nats"]["64"][:1]}} for name, run in self.RUNS.items()}
        self.assertIsNone(exact_heads.rank(runs, ["1.0"], 64)[0].gain_error)


class Journals(unittest.TestCase):
    def test_finished_runs_come_back_and_a_torn_one_does_not(self):
        with tempfile.TemporaryDirectory() as folder:
            path, subject = Path(folder) / "runs.jsonl", {"model": "a", "texts_digest": "b"}
            served_runs.Journal(path, subject).add(planted_run("dense", 1.0, 0.5))
            path.write_text(path.read_text() + '{"run": "befo')
            self.assertEqual(served_runs.Journal(path, subject).runs, {"dense": planted_run("dense", 1.0, 0.5)})
            self.assertEqual(len(path.read_text().splitlines()), 2)
            with self.assertRaisesRegex(ValueError, "differ in texts_digest"):
                served_runs.Journal(path, {**subject, "texts_digest": "c"})


class OneHeadFails(unittest.TestCase):
    def test_those_that_finish_beside_it_are_kept(self):
        other_began, failed = threading.Event(), threading.Event()

        def measure(name: str, policy: str, address: str, texts: dict) -> dict:
            if name == "0.0":
                other_began.wait()
                failed.set()
                raise RuntimeError("out of memory")
            other_began.set()
            failed.wait()
            time.sleep(0.1)
            return planted_run(name, 0.2, 0.5)

        with tempfile.TemporaryDirectory() as folder, mock.patch.object(exact_heads, "measure", measure):
            path, file = Path(folder) / "runs.jsonl", ClusterFile({}, [], fingerprint="")
            server = mock.Mock(serving=lambda clusters: nullcontext("nowhere"))
            journal = served_runs.Journal(path, {})
            journal.add(planted_run("dense", 1.0, 0.5))
            with self.assertRaisesRegex(RuntimeError, "out of memory"):
                exact_heads.each_exact(server, file, [(0, 0), (0, 1)], {}, journal, at_once=2)
            self.assertEqual(set(served_runs.Journal(path, {}).runs), {"dense", "0.1"})


@unittest.skipUnless(PROGRAMS and (PROGRAMS / "prefilld").exists(), "prefilld is not built")
class Served(unittest.TestCase):
    def run_script(self, *arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "-B", exact_heads.__file__, "--model", TINY, *arguments]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def test_heads_are_measured_taken_and_served(self):
        clusters = cluster_file.read(TINY / "head_clusters.json", 8, 8)
        sharing = exact_heads.sharing_heads(clusters)
        pivot = exact_heads.name_of(min(sharing))
        with tempfile.TemporaryDirectory() as folder:
            out, written = Path(folder) / "exact.json", Path(folder) / "head_clusters.json"
            text = Path(folder) / "text"
            text.mkdir()
            # The text decides which heads attend to far tokens, and this text never changes.
            (text / "license.txt").write_text((ROOT / "LICENSE").read_text())
            few = ("--prefilld", PROGRAMS / "prefilld", "--text", text, "--lengths", "2048", "--texts", "1",
                   "--heads", "2.0", "6.2", pivot, "--device", "cpu", "--out", out)  # fmt: skip
            first = self.run_script(*few)
            self.assertEqual(first.returncode, 0, first.stderr)
            measured = json.loads(out.read_text())
            self.assertEqual({row["head"] for row in measured["heads"]}, {"2.0", "6.2"})
            for ratio in (measured["before"], *measured["heads"]):
                self.assertTrue(0.9 < ratio["perplexity_to_dense"]["2048"] < 1.2, ratio)
            for row in measured["heads"]:  # an exact head of 64, from a pattern of less than all blocks
                self.assertTrue(0 < row["density_added"] < 1.5 / 64, row)
                self.assertIn(row["head"], first.stdout)

            again = self.run_script(*few)
            self.assertEqual((again.returncode, again.stdout, again.stderr), (0, first.stdout, ""))

            taken = self.run_script("--take", "2.0", "6.2", "--write", written)
            self.assertEqual(taken.returncode, 0, taken.stderr)
            made = cluster_file.read(written, 8, 8)
            self.assertEqual(exact_heads.sharing_heads(made), sharing | {(2, 0), (6, 2)})
            server = served_runs.Server(PROGRAMS / "prefilld", TINY, "cpu", 2048)
            pivots = [self.pivots_of(server, file, text) for file in (TINY / "head_clusters.json", written)]
            self.assertEqual(pivots[1], pivots[0] + 2)

    def pivots_of(self, server: served_runs.Server, clusters: Path, text: Path) -> int:
        from prefilld import Attention, PrefillClient

        with server.serving(clusters) as address, PrefillClient(address) as client:
            tokens = served_runs.read_texts([str(text)], [2048], 1, None, 1)[2048][0]
            with client.prefill(tokens, attention=Attention("share")) as stream:
                stream.read_all()
            return stream.result.total.pivot_heads

    def test_a_server_that_does_not_start_says_why(self):
        server = served_runs.Server(PROGRAMS / "prefilld", TINY, "cpu", 2048)
        with tempfile.TemporaryDirectory() as folder:
            other = Path(folder) / "other.json"
            cluster_file.write(other, ClusterFile({"0": [(0, 0)]}, ["0"], fingerprint="0" * 32))
            with self.assertRaisesRegex(RuntimeError, "(?s)did not start.*fingerprint"), server.serving(other):
                pass


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
