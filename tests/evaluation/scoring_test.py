"""Tests intervals, settings, scores, the journal and the summary. Standard library only."""

import json
import math
import tempfile
import unittest
from pathlib import Path

import intervals
import scoring
import settings
import table
from journal import Journal, read


def answered(setting, index, right, *, task="pass_key", length=2048, **fields):
    return {
        "setting": setting, "policy": settings.parse(setting)[0].policy,
        "task": task, "length": length, "index": index, "depth": index % 3 / 2, "right": right,
        "density": 1.0, "heads": 64, "pivot_heads": 0, "shared_heads": 0, "vertical_slash_heads": 0,
        "ttft_us": 2000, "compute_us": 1000, "attention_us": 10, "pattern_us": 1, **fields,
    }  # fmt: skip


class Intervals(unittest.TestCase):
    def test_proportion_agrees_with_published_values(self):
        # These are from table I of Newcombe 1998: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                        (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):  # fmt: skip
            made = intervals.proportion(right, count)
            self.assertAlmostEqual(made.low, low, places=4)
            self.assertAlmostEqual(made.high, high, places=4)

    def test_proportion_of_all_right_ends_at_one(self):
        self.assertEqual(intervals.proportion(200, 200).high, 1.0)
        self.assertAlmostEqual(intervals.proportion(200, 200).low, 0.981, places=3)

    def test_paired_difference_counts_only_disagreement(self):
        both, only_first, only_second = (True, True), (True, False), (False, True)
        made = intervals.paired_difference([both] * 80 + [only_first] * 15 + [only_second] * 5)
        self.assertAlmostEqual(made.value, 0.10)
        # (16 - 6) / 102 -+ 1.96 sqrt((22/102 - (10/102)^2) / 102)
        self.assertAlmostEqual(made.low, 0.0099, places=3)
        self.assertAlmostEqual(made.high, 0.1861, places=3)

    def test_agreement_everywhere_still_has_an_interval(self):
        made = intervals.paired_difference([(True, True)] * 200)
        self.assertEqual(made.value, 0)
        self.assertTrue(-0.02 < made.low < 0 < made.high < 0.02)

    def test_mean_of_one_value_knows_nothing(self):
        self.assertEqual(intervals.mean([2.0]), intervals.Estimate(2.0, -math.inf, math.inf))

    def test_students_points_agree_with_the_tables(self):
        for freedom, point in ((1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (199, 1.972)):
            self.assertAlmostEqual(intervals.student_t(freedom) / point, 1, delta=0.002)

    def test_mean_over_tasks_is_narrower_than_each(self):
        one = intervals.Estimate(0.5, 0.4, 0.6)
        made = intervals.mean_of([one] * 4)
        self.assertAlmostEqual(made.low, 0.45)
        self.assertAlmostEqual(made.high, 0.55)


class Settings(unittest.TestCase):
    def test_values_are_combined(self):
        names = [s.name for s in settings.parse("share:tau=0.4,gamma=0.8/0.9")]
        self.assertEqual(names, ["share:gamma=0.8,tau=0.4", "share:gamma=0.9,tau=0.4"])

    def test_names_are_read_back(self):
        for text in ("dense", "share:gamma=0.9,same_layer_sharing=false", "baseline_random:density=0.2",
                     "vertical_slash:min_budget_tokens=64"):  # fmt: skip
            (setting,) = settings.parse(text)
            self.assertEqual(setting.name, text)
            self.assertEqual(settings.parse(setting.name), [setting])

    def test_family_leaves_gamma_out(self):
        (setting,) = settings.parse("share:gamma=0.9,tau=0.4")
        self.assertEqual(setting.family, "share:tau=0.4")
        self.assertEqual(settings.parse("baseline_random:density=0.3")[0].family, "baseline_random")

    def test_errors_name_what_is_wrong(self):
        for text, part in (("shared", "shared"), ("share:gama=1", "gama"), ("share:gamma=high", "high"),
                           ("share:same_layer_sharing=no", "no")):  # fmt: skip
            with self.assertRaisesRegex(ValueError, part):
                settings.parse(text)

    def test_a_setting_named_twice_runs_once(self):
        self.assertEqual(len(settings.parse_all(["dense", "dense", "share"])), 2)


class Scores(unittest.TestCase):
    def test_answer_has_to_come_first(self):
        self.assertTrue(scoring.is_right(b"123", b"12345"))
        self.assertFalse(scoring.is_right(b"123", b"0123"))
        self.assertFalse(scoring.is_right(b"123", b"12"))

    def test_questions_of_one_prompt_count_as_one_mean(self):
        # The share is 90 % of 400 questions, but half of the prompts have all right. 400 independent answers would hide
        # that spread.
        records = [answered("dense", i, 40 if i < 5 else 32, asked=40) for i in range(10)]
        made = scoring.score(records)
        self.assertAlmostEqual(made.value, 0.9)
        self.assertAlmostEqual(made.high - made.value, 2.262 * 0.1054 / math.sqrt(10), places=3)
        self.assertEqual(scoring.score(records[:1]), intervals.Estimate(1.0, 0.0, 1.0))

    def test_differences_of_many_questions_are_taken_prompt_by_prompt(self):
        pairs = [(answered("share", i, 30 + i, asked=40), answered("dense", i, 32 + i, asked=40)) for i in range(8)]
        made = scoring.difference(pairs)
        self.assertAlmostEqual(made.value, -0.05)
        self.assertAlmostEqual(made.low, -0.05)  # the prompts differ, the settings alike on each

    def test_one_question_a_prompt_has_wilsons_interval_wherever_it_stands(self):
        records = [answered("dense", i, int(i < 15), asked=1) for i in range(20)]
        self.assertEqual(scoring.score(records), intervals.proportion(15, 20))

    def test_pivots_weigh_less_among_1024_heads(self):
        # There are 6 pivots and 58 heads of density 0.25.
        density = (6 + 58 * 0.25) / 64
        self.assertAlmostEqual(scoring.density_in_large_model(density, 64, 6), 6 / 1024 + (1 - 6 / 1024) * 0.25)
        self.assertEqual(scoring.density_in_large_model(0.3, 1024, 12), 0.3)
        self.assertEqual(scoring.density_in_large_model(1.0, 4, 4), 1.0)

    def test_interpolation_stays_within_the_curve(self):
        curve = [(0.4, 0.8), (0.2, 0.5), (0.5, 0.9)]
        self.assertEqual(scoring.interpolate(curve, 0.2), (0.5, True))
        value, within = scoring.interpolate(curve, 0.3)
        self.assertAlmostEqual(value, 0.65)
        self.assertTrue(within)
        self.assertEqual(scoring.interpolate(curve, 0.1), (0.5, False))
        self.assertAlmostEqual(scoring.interpolate(curve, 0.45)[0], 0.85)
        self.assertEqual(scoring.interpolate(curve, 0.9), (0.9, False))
        self.assertEqual(scoring.interpolate([(0.4, 0.8)], 0.4), (0.8, True))


class Summary(unittest.TestCase):
    def setUp(self):
        records = [answered("dense", i, True) for i in range(20)]
        records += [answered("vertical_slash:gamma=0.8", i, i < 8, density=0.2) for i in range(20)]
        records += [answered("vertical_slash:gamma=0.9", i, i < 16, density=0.4) for i in range(20)]
        records += [answered("share:gamma=0.9", i, i < 19, density=0.3, pivot_heads=6) for i in range(20)]
        records += [answered("dense", i, True, task="copy") for i in range(20)]
        records += [answered("share:gamma=0.9", i, i < 15, task="copy", density=0.5) for i in range(20)]
        records += [answered("dense", i, 9, task="interleaved", asked=10) for i in range(20)]
        records += [answered("share:gamma=0.9", i, 8, task="interleaved", asked=10, density=0.2) for i in range(20)]
        for i in range(20):
            for setting, worse in (("dense", 0), ("share:gamma=0.9", 0.01)):
                nats = [10 * (1 + i / 100 + worse)] * 7 + [10 * (1 + i / 100)]
                records.append(answered(setting, i, None, task="text", nats=nats, part_tokens=[10] * 8, bytes=160))
        self.summary = scoring.summarize(records, ["dense", "vertical_slash:gamma=0.8", "share:gamma=0.9"])
        self.tasks = {(c["setting"], c["task"]): c for c in self.summary["tasks"]}

    def test_cells_hold_score_difference_and_cost(self):
        cell = self.tasks["share:gamma=0.9", "pass_key"]
        self.assertEqual(cell["prompts"], 20)
        self.assertEqual(cell["score"]["value"], 0.95)
        self.assertEqual(cell["minus_dense"]["value"], -0.05)
        self.assertEqual((cell["density"], cell["pivot_heads"], cell["ttft_ms"]), (0.3, 6.0, 2.0))
        self.assertIsNone(self.tasks["dense", "pass_key"]["minus_dense"])

    def test_depths_are_counted_apart(self):
        depths = self.tasks["share:gamma=0.9", "pass_key"]["by_depth"]
        self.assertEqual([d["depth"] for d in depths], [0, 0.5, 1])
        self.assertEqual([d["prompts"] for d in depths], [7, 7, 6])
        self.assertEqual([d["right"] for d in depths], [7, 6, 6])  # index 19 is wrong

    def test_overall_counts_every_task_alike(self):
        rows = {(r["setting"], r["asked"]): r for r in self.summary["overall"]}
        row = rows["share:gamma=0.9", "end"]
        self.assertEqual(row["tasks"], 2)
        self.assertAlmostEqual(row["score"]["value"], (0.95 + 0.75) / 2)
        self.assertAlmostEqual(row["minus_dense"]["value"], -0.15)
        self.assertAlmostEqual(row["density"], 0.4)

    def test_what_is_asked_within_has_a_mean_of_its_own(self):
        rows = {(r["setting"], r["asked"]): r for r in self.summary["overall"]}
        row = rows["share:gamma=0.9", "within"]
        self.assertEqual((row["tasks"], row["score"]["value"], row["density"]), (1, 0.8, 0.2))
        self.assertAlmostEqual(row["minus_dense"]["value"], -0.1)
        cell = self.tasks["dense", "interleaved"]
        self.assertEqual((cell["prompts"], cell["questions"]), (20, 200))

    def test_perplexity_is_compared_prompt_by_prompt(self):
        cell = next(c for c in self.summary["text"] if c["setting"] == "share:gamma=0.9")
        ratio = cell["perplexity_to_dense"]
        # Every text is worse by 0.01 nats except in its last eighth, so there is no spread, though the texts differ.
        self.assertAlmostEqual(ratio["value"], math.exp(0.01 * 7 / 8), places=4)
        self.assertAlmostEqual(ratio["high"] - ratio["low"], 0, places=4)
        self.assertEqual([round(p["to_dense"]["value"], 4) for p in cell["by_part"]], [1.0101] * 7 + [1.0])

    def test_bits_are_of_bytes_not_of_tokens(self):
        cell = next(c for c in self.summary["text"] if c["setting"] == "dense")
        self.assertAlmostEqual(cell["perplexity"]["value"], math.exp(1.095), places=3)
        self.assertAlmostEqual(cell["bits_per_byte"], 1.095 / 2 / math.log(2), places=3)
        self.assertIsNone(cell["perplexity_to_dense"])

    def test_share_stands_beside_vertical_slash_of_its_density(self):
        (row,) = [r for r in self.summary["equal_density"] if r["task"] == "pass_key"]
        self.assertEqual(row["beside"], "vertical_slash")
        self.assertAlmostEqual(row["beside_score"], 0.6)
        self.assertAlmostEqual(row["difference"], 0.35)
        self.assertTrue(row["within_curve"])

    def test_the_mean_over_tasks_stands_beside_others_too(self):
        records = []
        for task in ("pass_key", "copy"):
            records += [answered("vertical_slash", 0, 0, task=task, density=0.3)]
            records += [answered("share", 0, 1, task=task, density=0.3)]
        rows = scoring.summarize(records, [])["equal_density"]
        self.assertEqual({r["task"]: r["difference"] for r in rows}, {"pass_key": 1, "copy": 1, "mean, end": 1})

    def test_each_family_of_baselines_is_a_curve(self):
        records = [answered("share", 0, True, density=0.3)]
        for setting, density, right in (
            ("baseline_query_aware:gamma=0.8,tau=0.1", 0.2, False),
            ("baseline_query_aware:gamma=0.9,tau=0.1", 0.4, True),
            ("baseline_query_aware:gamma=0.9,tau=1.0", 0.3, True),
            ("baseline_random:density=0.3", 0.3, False),
        ):
            records.append(answered(setting, 0, right, density=density))
        rows = {r["beside"]: r for r in scoring.summarize(records, [])["equal_density"]}
        self.assertEqual(rows["baseline_query_aware:tau=0.1"]["beside_score"], 0.5)
        self.assertEqual(rows["baseline_query_aware:tau=1.0"]["beside_score"], 1.0)
        self.assertEqual(rows["baseline_random"]["difference"], 1.0)

    def test_recall_is_over_all_heads_of_all_measured_prompts(self):
        recall = [{"shared": [0.9, 0.8], "vertical_slash": [0.7]}, {"shared": [1.0]}]
        records = [answered("share", i, True, recall=r, compute_us=10**6) for i, r in enumerate(recall)]
        records += [answered("share", 2, True), answered("share", 3, True, task="copy")]
        summary = scoring.summarize(records, [])
        rows = {r["kind"]: r for r in summary["recall"]}
        self.assertEqual(rows["shared"]["heads"], 3)
        self.assertEqual(rows["shared"]["prompts"], 2)
        self.assertAlmostEqual(rows["shared"]["mean"], 0.9)
        self.assertEqual(rows["shared"]["fifth_percentile"], 0.8)
        self.assertEqual(rows["vertical_slash"]["lowest"], 0.7)
        self.assertIn("5th percentile", table.render(summary))
        # Times are those of the prompt whose recall was not measured.
        self.assertEqual(summary["tasks"][0]["compute_ms"], 1.0)

    def test_percentile_is_one_of_the_values(self):
        values = [float(i) for i in range(100, 0, -1)]
        self.assertEqual(scoring.percentile(values, 0.05), 5.0)
        self.assertEqual(scoring.percentile([2.0, 1.0], 0.05), 1.0)

    def test_a_prompt_noted_twice_counts_once(self):
        records = [answered("dense", 0, True), answered("dense", 0, True)]
        self.assertEqual(scoring.summarize(records, ["dense"])["tasks"][0]["prompts"], 1)

    def test_a_file_has_a_line_per_cell(self):
        text = table.as_json({"model": "tiny", **self.summary})
        self.assertEqual(json.loads(text), {"model": "tiny", **self.summary})
        self.assertEqual(sum('"by_depth"' in line for line in text.splitlines()), len(self.summary["tasks"]))

    def test_table_shows_every_setting(self):
        text = table.render(self.summary)
        for name in ("dense", "vertical_slash:gamma=0.8", "share:gamma=0.9", "pass_key", "copy", "held-out text",
                     "interleaved", "2048 tokens, asked within"):  # fmt: skip
            self.assertIn(name, text)

    def test_the_two_means_and_perplexity_are_one_row(self):
        row = next(line for line in table.render(self.summary).splitlines() if line.startswith("share:gamma=0.9"))
        for number in ("85.0 [", "-15.0 [", "0.400", "80.0 [", "-10.0 [", "0.200", "1.0088 ["):
            self.assertIn(number, row)

    def test_text_alone_has_a_table(self):
        records = [answered("dense", 0, None, task="text", nats=[1.0] * 8, part_tokens=[1] * 8, bytes=8)]
        self.assertIn("held-out text", table.render(scoring.summarize(records, [])))


class Resuming(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def journal(self, **subject):
        journal = Journal(self.folder, subject)
        self.addCleanup(journal.close)
        return journal

    def test_finished_prompts_are_known_again(self):
        self.journal(seed=1).add(answered("dense", 3, True))
        again = self.journal(seed=1)
        self.assertTrue(again.has(("dense", "pass_key", 2048, 3)))
        self.assertFalse(again.has(("dense", "pass_key", 2048, 4)))
        self.assertEqual(len(again.records), 1)

    def test_a_line_cut_off_is_dropped_and_the_next_one_is_whole(self):
        self.journal(seed=1).add(answered("dense", 0, True))
        with (self.folder / "results.jsonl").open("a") as file:
            file.write('{"setting": "den')
        self.journal(seed=1).add(answered("dense", 1, True))
        self.assertEqual([r["index"] for r in read(self.folder / "results.jsonl")], [0, 1])

    def test_another_model_is_refused(self):
        self.journal(model="a")
        with self.assertRaisesRegex(ValueError, "model"):
            self.journal(model="b")

    def test_a_folder_of_other_questions_is_refused(self):
        self.journal(model="a")
        with self.assertRaisesRegex(ValueError, "asked_within"):
            self.journal(model="a", asked_within=[0.35, 0.9])

    def test_subject_is_kept_for_the_reader(self):
        self.journal(model="a", seed=1)
        self.assertEqual(json.loads((self.folder / "subject.json").read_text()), {"model": "a", "seed": 1})


if __name__ == "__main__":
    unittest.main()
