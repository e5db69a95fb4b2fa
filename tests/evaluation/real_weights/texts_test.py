"""Tests sources, texts and their scores on small made-up ones.

Needs numpy; exits with 77 (skipped, for CTest) without it.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import struct
import sys
import tempfile
import unittest
import zlib
from pathlib import Path

if importlib.util.find_spec("numpy") is None:
    print("skipped: numpy is not here")
    sys.exit(77)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402
import sources  # noqa: E402
import text_scores  # noqa: E402
import texts  # noqa: E402
from sources import Document  # noqa: E402


def r_object(strings: list[str]) -> bytes:
    """Serialises a character vector as R 4 does, in the form of an .rdb."""
    data = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8" + struct.pack(">ii", 16, len(strings))
    for string in strings:
        data += struct.pack(">ii", 0x40009, len(string.encode())) + string.encode()
    return struct.pack(">I", len(data)) + zlib.compress(data)


class Sources(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def read(self, *files: str, parts=()) -> dict[str, str]:
        source = sources.Source("judging", "prose", "package=1", "", "", 1, list(files), list(parts))
        return {d.name: d.text for d in sources.documents(source, self.folder)}

    def test_the_manifest_has_enough_texts_of_each_kind(self):
        count = {}
        for source in sources.manifest():
            count[source.role, source.kind] = count.get((source.role, source.kind), 0) + source.texts
        kinds = ("prose", "manuals", "code")
        self.assertEqual(count, {**{("judging", k): 16 for k in kinds}, **{("calibration", k): 8 for k in kinds}})

    def test_no_pattern_of_a_package_is_both_for_judging_and_for_calibration(self):
        taken: dict[str, dict[str, set]] = {}
        for source in sources.manifest():
            what = set(source.parts) or set(source.files)
            taken.setdefault(source.package, {}).setdefault(source.role, set()).update(what)
        both = {package: roles for package, roles in taken.items() if len(roles) == 2}
        self.assertEqual(len(both), 2)  # two packages whose files are divided
        for roles in both.values():
            self.assertFalse(roles["judging"] & roles["calibration"])

    def test_text_is_read_plain_packed_and_out_of_html(self):
        (self.folder / "a.txt").write_text("one\n")
        (self.folder / "b.txt.gz").write_bytes(gzip.compress(b"two\n"))
        page = "<head><title>no</title></head><p>A <b>bold</b>\nword &amp; more</p><script>x()</script><li>item"
        (self.folder / "c.html").write_text(page)
        self.assertEqual(
            self.read("*.txt", "*.gz", "*.html"),
            {"a.txt": "one\n", "b.txt.gz": "two\n", "c.html": "A bold word & more\n\nitem\n"},
        )

    def test_the_books_named_are_read_out_of_an_r_database(self):
        (self.folder / "x.rdb").write_bytes(r_object(["EMMA", "", "Émilie"]) + r_object(["OTHER", "text"]))
        self.assertEqual(self.read("*.rdb", parts=["EMMA"]), {"x.rdb#EMMA": "EMMA\n\nÉmilie"})

    def test_an_r_object_that_is_no_text_is_refused(self):
        numbers = r_object(["EMMA"])
        changed = zlib.decompress(numbers[4:]).replace(struct.pack(">i", 16), struct.pack(">i", 14), 1)
        with self.assertRaisesRegex(ValueError, "character vector"):
            sources.r_character_vectors(numbers[:4] + zlib.compress(changed))

    def test_the_order_is_mixed_and_does_not_depend_on_the_folder(self):
        for name in "abcdef":
            (self.folder / name).write_text(name)
        names = list(self.read("*"))
        self.assertNotEqual(names, sorted(names))
        self.assertEqual(names, list(self.read("[d-f]", "[a-c]")))


def encode(text: str) -> list[int]:
    return list(text.encode())


class Cutting(unittest.TestCase):
    def test_texts_are_full_and_no_token_is_in_two(self):
        documents = [Document(str(i), chr(97 + i) * (40 + i)) for i in range(9)]
        made = texts.cut(documents, encode, 3, 100)
        self.assertEqual([len(ids) for ids, _ in made], [100] * 3)
        self.assertEqual([names for _, names in made], [["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"]])
        letters = [set(ids) - set(b"\n") for ids, _ in made]
        self.assertFalse(letters[0] & letters[1] or letters[1] & letters[2])

    def test_a_long_document_fills_several_only_where_there_are_few(self):
        book, short = Document("book", "x" * 350), Document("short", "y" * 120)
        self.assertEqual([names for _, names in texts.cut([book], encode, 3, 100)], [["book"]] * 3)
        self.assertEqual([names for _, names in texts.cut([book, short], encode, 2, 100)], [["book"], ["short"]])

    def test_too_little_text_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "fill 1 texts of 100 tokens; 2 are asked for"):
            texts.cut([Document("a", "x" * 150)], encode, 2, 100)

    def test_kinds_take_turns(self):
        self.assertEqual(texts.in_turns([[1, 2, 3], ["a", "b", "c"]]), [1, "a", 2, "b", 3, "c"])
        self.assertEqual(texts.in_turns([[1, 2, 3, 4], ["a", "b"]]), [1, "a", 2, 3, "b", 4])

    def test_the_end_of_a_run_seen_before_is_a_repeat(self):
        run = list(range(20))
        marked = texts.ends_repeat(run + [99] + run)
        self.assertEqual(np.flatnonzero(marked).tolist(), list(range(21 + 11, 41)))
        self.assertFalse(texts.ends_repeat([7] * 12).any())
        self.assertEqual(texts.ends_repeat([7] * 14).tolist(), [False] * 12 + [True] * 2)
        self.assertFalse(texts.ends_repeat([1, 2]).any())

    def test_a_repeat_begins_at_a_token_and_not_within_one(self):
        # As bytes, the second run has the first one a byte later.
        first = np.frombuffer(b"\1\2\3\4\5\6\7\x08" * 3, np.uint16).tolist()
        second = np.frombuffer(b"\2\3\4\5\6\7\x08\1" * 3, np.uint16).tolist()
        self.assertFalse(texts.ends_repeat(first[:12] + [500] + second[:12]).any())

    def test_runs_shared_by_two_sets_are_counted(self):
        one, other = np.arange(30, dtype=np.uint16)[None], np.arange(20, 50, dtype=np.uint16)[None]
        self.assertEqual(texts.shared_runs(one, other, 4), 7)
        self.assertEqual(texts.shared_runs(one, other + 30, 4), 0)

    def test_what_is_kept_comes_back_and_a_change_is_noticed(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for role in sources.ROLES:
                texts.save(folder, role, [([1, 2, 49151], {"kind": "code"}), ([4, 5, 6], {"kind": "prose"})])
            held = texts.load(folder, "judging")
            self.assertEqual((held.ids(0, 2), held.ids(0, 3)), ([1, 2], [1, 2, 49151]))
            self.assertEqual([about["kind"] for about in held.about], ["code", "prose"])
            np.save(folder / "judging.npy", held.tokens + np.uint16(1))
            with self.assertRaisesRegex(ValueError, "sha256"):
                texts.load(folder, "judging")


def record(setting, index, repeated, other, *, length=2048, density=1.0, kind="prose", next_token=5):
    return {"setting": setting, "task": "text", "length": length, "index": index, "kind": kind, "density": density,
            "tokens_repeated": 10, "tokens_other": 90, "nats_repeated": repeated, "nats_other": other,
            "next_token": next_token, "compute_us": 1000}  # fmt: skip


class Scores(unittest.TestCase):
    def cell(self, records, setting="share", length=2048):
        summary = text_scores.summarize(records, ["dense", "share"])
        return next(c for c in summary["text"] if (c["setting"], c["length"]) == (setting, length))

    def test_perplexity_is_compared_text_by_text(self):
        dense = [record("dense", i, 20, 180 + 50 * i) for i in range(3)]
        share = [record("share", i, 21 + i, 180 + 50 * i, density=0.25) for i in range(3)]
        cell = self.cell(dense + share)
        self.assertAlmostEqual(cell["perplexity_to_dense"]["value"], math.exp(0.02), places=4)
        self.assertAlmostEqual(cell["standard_error"], 0.01 / math.sqrt(3), places=5)
        self.assertEqual(cell["worst_text"], {"perplexity_to_dense": 1.0305, "index": 2, "kind": "prose"})
        self.assertEqual(cell["density"], 0.25)

    def test_what_repeats_is_apart_from_the_rest(self):
        dense = [record("dense", i, 20, 180) for i in range(2)]
        share = [record("share", i, 22 + i, 180.9) for i in range(2)]
        cell = self.cell(dense + share)
        self.assertEqual((cell["lost_by_repeated"]["nats"], cell["lost_by_repeated"]["tokens"]), (0.25, 20))
        self.assertEqual(cell["lost_by_other"], {"tokens": 180, "nats": 0.01, "standard_error": 0.0})
        self.assertAlmostEqual(cell["lost_by_repeated"]["standard_error"], 0.05)

    def test_kinds_and_the_next_token_are_told(self):
        dense = [record("dense", i, 20, 180, kind=k) for i, k in enumerate(("prose", "code"))]
        share = [record("share", 0, 20, 180), record("share", 1, 30, 180, kind="code", next_token=6)]
        cell = self.cell(dense + share)
        self.assertEqual(cell["by_kind"]["prose"]["perplexity_to_dense"], 1.0)
        self.assertAlmostEqual(cell["by_kind"]["code"]["perplexity_to_dense"], math.exp(0.1), places=4)
        self.assertEqual(cell["same_next_token"], 0.5)

    def test_only_texts_that_dense_has_too_are_compared(self):
        cell = self.cell([record("dense", 0, 20, 180), record("share", 0, 21, 180), record("share", 1, 90, 180)])
        self.assertEqual((cell["texts"], cell["compared_texts"]), (2, 1))
        self.assertAlmostEqual(cell["perplexity_to_dense"]["value"], math.exp(0.01), places=4)
        self.assertIsNone(cell["standard_error"])

    def test_dense_and_what_has_no_dense_beside_it_are_not_compared(self):
        records = [record("dense", 0, 20, 180), record("share", 0, 21, 180, length=8192)]
        self.assertIsNone(self.cell(records, "dense")["perplexity_to_dense"])
        self.assertIsNone(self.cell(records, length=8192)["perplexity_to_dense"])
        self.assertIn("8192 share", text_scores.table(text_scores.summarize(records, ["dense", "share"])))

    def test_text_without_repeats_has_no_figure_of_them(self):
        records = [{**record(s, 0, 0, 180 + n), "tokens_repeated": 0} for n, s in enumerate(("dense", "share"))]
        self.assertIsNone(self.cell(records)["lost_by_repeated"])
        self.assertIn("nan", text_scores.table(text_scores.summarize(records, ["dense", "share"])))


if __name__ == "__main__":
    unittest.main()
