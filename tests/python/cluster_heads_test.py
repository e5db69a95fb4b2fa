#!/usr/bin/env python3
"""Tests the clustering step on planted heads, and on what prefill-calibrate records of the embedded model.

cluster_heads_test.py FOLDER_OF_PROGRAMS. Needs NumPy, SciPy and safetensors; without them it exits with 77, skipped.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tempfile
import unittest
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

try:
    import numpy as np
    import scipy  # noqa: F401
    from safetensors.numpy import save_file
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "model" / "calibration"))
import benefit  # noqa: E402
import cluster_file  # noqa: E402
import cluster_heads  # noqa: E402
import dumps as recorded  # noqa: E402
import grouping  # noqa: E402
import scored_groups  # noqa: E402
import simulation  # noqa: E402
import tuning  # noqa: E402

PROGRAMS = Path(sys.argv.pop()) if len(sys.argv) > 1 else None
LAYERS, HEADS, BLOCK, BLOCKS = 3, 8, 64, 32
FINGERPRINT = "0123456789abcdef" * 2
# These are the planted heads, as layer * HEADS + head.
LOCAL = (0, 1, 2, 3, 9, 10)  # the first key and the neighbourhood: vertical-slash has all of it
TOPICS = (4, 5, 8, 11, 12, 16, 17)  # earlier blocks about the same topic: the last row tells little of the others
STRIDED = (6, 7, 13, 18, 19)  # every fourth block
LONERS = (14, 15, 20, 21, 22, 23)  # columns of their own


def planted_map(head: int, prompt: int) -> np.ndarray:
    """Makes mass [BLOCKS, BLOCKS] whose rows sum to 1."""
    row, column = np.indices((BLOCKS, BLOCKS))
    if head in LOCAL:
        mass = 8.0 * (column == 0) + 2.0 ** (column - row)
    elif head in STRIDED:
        mass = np.where((row - column) % 4 == 0, 1.0, 0.002)
    elif head in TOPICS:
        topic = np.random.default_rng(prompt).integers(5, size=BLOCKS)
        mass = np.where(topic[row] == topic[column], 1.0, 0.002)
    else:
        mass = np.broadcast_to(np.random.default_rng((7, head)).gamma(0.05, size=BLOCKS) + 1e-4, row.shape)
    own = np.random.default_rng((head, prompt)).uniform(0.8, 1.2, mass.shape)  # heads of a group differ a little
    mass = np.tril(mass * own)
    return (mass / mass.sum(1, keepdims=True)).astype(np.float32)


def vertical_slash_by_definition(vertical, slash, gamma: float, min_budget: int) -> np.ndarray:
    """Makes the pattern token by token, as bool [BLOCKS, BLOCKS]."""
    kept = []
    for mass in (vertical, slash):
        order, chosen, held = sorted(range(len(mass)), key=lambda i: (-mass[i], i)), {0}, 0.0
        for rank, index in enumerate(order):
            if held >= gamma * mass.sum(dtype=np.float64) and rank >= min_budget:
                break
            chosen.add(index)
            held += float(mass[index])
        kept.append(chosen)
    pattern = np.zeros((BLOCKS, BLOCKS), bool)
    for row in range(BLOCKS):
        for column in kept[0]:
            pattern[row, column // BLOCK] = True
        for offset in kept[1]:
            for query in (row * BLOCK, row * BLOCK + BLOCK - 1):
                if query - offset >= 0:
                    pattern[row, (query - offset) // BLOCK] = True
    return np.tril(pattern)


def write_dump(path: Path, domain: str, prompt: int, spoil: bool = False) -> None:
    tensors, tokens = {}, BLOCK * BLOCKS
    for layer in range(LAYERS):
        mass = np.stack([planted_map(layer * HEADS + head, prompt) for head in range(HEADS)])
        last = mass[:, -1]
        vertical = np.repeat(last, BLOCK, 1) / BLOCK
        slash = vertical[:, ::-1].copy()  # of the very last query
        figures = []
        for head in range(HEADS):
            pattern = vertical_slash_by_definition(vertical[head], slash[head], 0.9, 128)
            figures.append((mass[head][pattern].sum() / BLOCKS, pattern.sum() / (BLOCKS * (BLOCKS + 1) / 2)))
        held, density = np.array(figures, np.float32).T
        if spoil:
            held = held - 0.1
        for name, value in (
            ("estimate", last),
            ("vertical", vertical),
            ("slash", slash),
            ("block_mass", mass),
            ("vertical_slash_mass", held),
            ("vertical_slash_density", density),
        ):
            tensors[f"layers.{layer}.{name}"] = np.ascontiguousarray(value)
    facts = dict(
        format=recorded.FORMAT, model_fingerprint=FINGERPRINT, domain=domain, prompt=str(prompt), num_layers=LAYERS,
        num_heads=HEADS, num_tokens=tokens, block_tokens=BLOCK, cell_blocks=1, gamma=0.9, min_budget_tokens=128,
    )  # fmt: skip
    save_file(tensors, str(path), metadata={name: str(value) for name, value in facts.items()})


def run(*arguments: object) -> str:
    """Runs cluster_heads.py and returns what it printed."""
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", ["cluster_heads.py", *map(str, arguments)]), redirect_stdout(printed):
        cluster_heads.main()
    return printed.getvalue()


class PlantedHeads(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.dumps = Path(cls.folder.name)
        for number in range(6):
            domain = "even" if number % 2 == 0 else "odd"
            write_dump(cls.dumps / f"{domain}.{number}.safetensors", domain, number)
        cls.out = cls.dumps / "head_clusters.json"
        cls.printed = run(cls.dumps, "--out", cls.out, "--pivot_cost", 0.1, "--smallest", 3)
        cls.written = json.loads(cls.out.read_text())

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def groups(self, data: dict) -> set[tuple[int, ...]]:
        return {tuple(layer * HEADS + head for layer, head in heads) for heads in data["clusters"].values()}

    def test_finds_the_groups_and_leaves_out_the_loners(self):
        self.assertEqual(self.groups(self.written), {LOCAL, TOPICS, STRIDED})

    def test_shares_where_vertical_slash_fails_and_not_where_it_does_not(self):
        shared = {name: self.written["clusters"][name] for name in self.written["shared_clusters"]}
        found = self.groups({"clusters": shared})
        self.assertIn(TOPICS, found)
        self.assertNotIn(LOCAL, found)

    def test_what_shares_saves_something_by_the_files_own_figures(self):
        shared = self.written["shared_clusters"]
        self.assertTrue(shared)
        for name in shared:
            self.assertGreater(self.written["statistics"][name]["saved"], 0, name)

    def test_a_group_that_gains_no_more_at_the_tuned_thresholds_does_not_share(self):
        dumps = recorded.load([self.dumps])
        goal, thresholds = tuning.Goal(0.9, 0.8, 0.85, pivot_cost=0.1), simulation.Thresholds(tau=1.0)
        kept = tuning.paying(dumps, [LOCAL, TOPICS], thresholds, goal)
        self.assertEqual(kept.shared, [TOPICS])
        self.assertIsNone(tuning.paying(dumps, [LOCAL], thresholds, goal))

    def test_overlap_within_is_that_of_groups_that_share(self):
        dumps = recorded.load([self.dumps])
        within, between = grouping.pattern_overlap(dumps, [TOPICS], [TOPICS, LONERS], 0.9)
        self.assertGreater(within, between)
        self.assertEqual(within, grouping.pattern_overlap(dumps, [TOPICS], [TOPICS, STRIDED], 0.9)[0])
        self.assertTrue(np.isnan(grouping.pattern_overlap(dumps, [], [TOPICS, LONERS], 0.9)[0]))

    def test_thresholds_reach_the_recall_that_is_asked_for(self):
        thresholds, calibration = self.written["thresholds"], self.written["calibration"]
        self.assertTrue(calibration["recall_reached"])
        self.assertGreaterEqual(calibration["measured"]["written"]["recall"], 0.9)
        self.assertGreater(calibration["measured"]["written"]["shared"], 0)
        for name in ("gamma", "vertical_slash_gamma", "tau", "delta", "coverage"):
            self.assertTrue(0 < thresholds[name] <= 1, name)
        self.assertIn(thresholds["min_budget_tokens"], recorded.BUDGETS)

    def test_of_a_group_only_the_heads_that_another_pattern_serves_share(self):
        dumps = recorded.load([self.dumps])
        thresholds, prices = simulation.Thresholds(gamma=0.9, tau=1.0), benefit.Prices(recall=1.5, pivot=0.1)
        mixed = tuple(sorted((*TOPICS, *STRIDED, *LONERS)))
        parts = benefit.parts_that_save(dumps, mixed, thresholds, prices)
        self.assertIn(TOPICS, parts)
        self.assertIn(STRIDED, parts)
        self.assertFalse(set(LONERS) & {head for part in parts for head in part})
        dear = benefit.Prices(recall=1.5, pivot=len(TOPICS))
        self.assertEqual(benefit.parts_that_save(dumps, TOPICS, thresholds, dear), [])

    def test_shared_heads_have_to_hold_at_every_length(self):
        short, long = (mock.Mock(num_tokens=tokens) for tokens in (8192, 16384))
        recall, shared = np.array([[0.95], [0.95], [0.95], [0.7]]), np.ones((4, 1), bool)
        self.assertTrue(benefit.shared_heads_hold([short] * 3, recall[:3], shared[:3], 0.9))
        self.assertFalse(benefit.shared_heads_hold([short] * 3 + [long], recall, shared, 0.9))
        shared[3] = False
        self.assertTrue(benefit.shared_heads_hold([short] * 3 + [long], recall, shared, 0.9))

    def test_vertical_slash_has_a_gamma_of_its_own_and_patterns_keep_theirs(self):
        dump = recorded.load([self.dumps])[0]
        served = lambda **gammas: simulation.serve(  # noqa: E731
            dump, [TOPICS], simulation.Thresholds(tau=1.0, coverage=1.0, min_budget_tokens=16, **gammas)
        )
        plain, own = served(gamma=0.9), served(gamma=0.9, vertical_slash_gamma=0.5)
        alone = plain.role == simulation.VERTICAL_SLASH
        np.testing.assert_array_equal(own.density[alone], served(gamma=0.5).density[alone])
        self.assertLess(own.density[alone].mean(), plain.density[alone].mean())
        np.testing.assert_array_equal(own.density[~alone], plain.density[~alone])

    def test_heads_that_may_share_scores_are_found(self):
        prompts = [scored_groups.Maps.read(path) for path in sorted(self.dumps.glob("*.*.safetensors"))]
        fit = scored_groups.fits(prompts, threshold=0.9, holds=0.95, size=1.2)
        self.assertFalse(np.tril(fit).any(), "a pivot comes before its members")
        groups = scored_groups.groups_of(fit)
        for group in (LOCAL, TOPICS, STRIDED):
            self.assertIn(group, groups)
        heads = [head for group in groups for head in group]
        self.assertEqual(len(heads), len(set(heads)))
        self.assertFalse(scored_groups.fits(prompts, threshold=0.9, holds=1.0, size=0.1).any(), "too many blocks")

    def test_the_file_of_scored_groups_says_how_they_share(self):
        out = self.dumps / "scored.json"
        arguments = [sys.executable, "-B", scored_groups.__file__, self.dumps, "--out", out, "--holds", "0.9", "--size", "1.2"]
        done = subprocess.run([*map(str, arguments)], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        file = cluster_file.read(out, LAYERS, HEADS)
        self.assertTrue(file.shared)
        self.assertEqual(file.sharing, {name: "scored" for name in file.shared})
        self.assertEqual(file.fingerprint, FINGERPRINT)

    def test_says_what_model_it_is_for_and_that_domains_agree(self):
        self.assertEqual(self.written["format_version"], 1)
        self.assertEqual(self.written["model_fingerprint"], FINGERPRINT)
        self.assertGreater(self.written["calibration"]["adjusted_rand_index"]["even/odd"], 0.9)
        overlap = self.written["calibration"]["pattern_overlap"]["even"]
        self.assertGreater(overlap["within"], overlap["between"])
        self.assertIn("adjusted Rand index", self.printed)

    def test_takes_the_groups_of_a_plain_file_and_writes_one(self):
        given, plain = self.dumps / "given.json", self.dumps / "plain.json"
        pairs = [[head // HEADS, head % HEADS] for head in (*TOPICS, LONERS[0])]
        given.write_text(json.dumps({"clusters": {"7": pairs, "9": [[2, 7]]}, "shared_clusters": ["7"]}))
        printed = run(self.dumps, "--clusters", given, "--out", plain, "--plain", "--pivot_cost", 0.1)
        written = json.loads(plain.read_text())
        self.assertEqual(set(written), {"clusters", "shared_clusters"})
        self.assertEqual(self.groups(written), {tuple(sorted((*TOPICS, LONERS[0]))), (2 * HEADS + 7,)})
        self.assertIn("the given file as it is", printed)

    def test_refuses_heads_that_the_model_has_not(self):
        given = self.dumps / "given.json"
        given.write_text(json.dumps({"clusters": {"7": [[3, 0]]}, "shared_clusters": []}))
        with self.assertRaisesRegex(ValueError, "head 3.0, outside 3 layers of 8 heads"):
            cluster_file.read(given, LAYERS, HEADS)
        given.write_text(json.dumps({"format_version": 2, "clusters": {}, "shared_clusters": []}))
        with self.assertRaisesRegex(ValueError, "format_version 2 unsupported"):
            cluster_file.read(given, LAYERS, HEADS)

    def test_notices_when_the_program_measured_something_else(self):
        with tempfile.TemporaryDirectory() as folder:
            write_dump(Path(folder) / "a.safetensors", "even", 0, spoil=True)
            with self.assertRaisesRegex(ValueError, "vertical-slash of layer .* head .* has"):
                recorded.load([Path(folder)])

    def test_pooling_keeps_the_mass_of_every_row(self):
        for many, few in ((100, 64), (64, 64), (10, 64), (130, 64)):
            share = grouping.overlap_of_intervals(many, few)
            np.testing.assert_allclose(share.sum(0), 1, err_msg=f"{many} to {few}")
            np.testing.assert_allclose(share.sum(1), many / few)

    def test_adjusted_rand_index_of_known_tables(self):
        same = np.array([1, 1, 2, 2, 3])
        self.assertEqual(grouping.adjusted_rand_index(same, np.array([3, 3, 1, 1, 2])), 1.0)
        crossed = grouping.adjusted_rand_index(np.array([1, 1, 2, 2]), np.array([1, 2, 1, 2]))
        self.assertAlmostEqual(crossed, -0.5)
        one = np.ones(5, int)
        self.assertTrue(np.isnan(grouping.adjusted_rand_index(one, one)), "chance alone makes these the same")


@unittest.skipUnless(PROGRAMS and (PROGRAMS / "prefill-calibrate").exists(), "prefill-calibrate is not built")
class RecordedHeads(unittest.TestCase):
    def test_the_two_commands_calibrate_the_embedded_model(self):
        words = "the lantern crossed the meadow while a clerk counted keys in every drawer of the house ".split()
        with tempfile.TemporaryDirectory() as folder:
            prompts, dumps, out = (Path(folder) / name for name in ("prompts", "dumps", "head_clusters.json"))
            for domain, seed in (("prose", 1), ("lists", 2)):
                (prompts / domain).mkdir(parents=True)
                for number in range(2):
                    rng = random.Random(f"{seed} {number}")
                    text = (" " if domain == "prose" else "\n").join(rng.choices(words, k=400))[:1500]
                    (prompts / domain / f"{number}.txt").write_text(text)
            subprocess.run(
                [PROGRAMS / "prefill-calibrate", f"--model={ROOT / 'model' / 'tiny'}", "--device=cpu",
                 "--block_tokens=64", "--min_budget_tokens=16", f"--out={dumps}", prompts],
                check=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"}, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            printed = run(dumps, "--out", out)  # refuses dumps whose vertical-slash it cannot reproduce
            written = json.loads(out.read_text())
            self.assertIn("served, by simulation", printed)
            self.assertRegex(written["model_fingerprint"], "^[0-9a-f]{32}$")
            heads = [tuple(head) for group in written["clusters"].values() for head in group]
            self.assertEqual(len(heads), len(set(heads)))
            self.assertTrue(all(layer < 8 and head < 8 for layer, head in heads))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
