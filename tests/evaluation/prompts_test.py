"""Tests that every prompt has its exact length and its answer at its depth, and is made the same way twice."""

import random
import re
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import graded
import more_tasks
import prompts
import tasks

LENGTHS = (1024, 2048, 5000)


def text_of(tokens):
    return bytes(tokens[1:]).decode()


class Made(unittest.TestCase):
    def setUp(self):
        self.source = prompts.Prompts(prompts.ByteCodec(), None, depths=5, seed=3, limit=8192)

    def test_every_task_has_its_exact_length_at_every_depth(self):
        for task in prompts.AT_THE_END:
            for length in LENGTHS:
                for index in range(5):
                    prompt = self.source.make(task, length, index)
                    self.assertEqual(len(prompt.tokens), length, task)
                    self.assertEqual(prompt.tokens[0], tasks.BOS)
                    self.assertEqual(prompt.max_new_tokens, len(prompt.answer))

    def test_the_longest_prompt_leaves_room_for_an_answer_that_is_generated(self):
        for task in prompts.AT_THE_END:
            prompt = self.source.make(task, 8192, 0)
            self.assertEqual(len(prompt.tokens), 8192 - prompts.ANSWER_ROOM)
            self.assertLessEqual(prompt.max_new_tokens, prompts.ANSWER_ROOM)
        self.assertEqual(len(self.source.make("pass_key_within", 8192, 0).tokens), 8192)

    def test_depths_run_from_start_to_end_and_begin_again(self):
        self.assertEqual([self.source.depth(i) for i in range(6)], [0, 0.25, 0.5, 0.75, 1, 0])

    def test_needles_lie_at_their_depth(self):
        for index, depth in enumerate((0, 0.25, 0.5, 0.75, 1)):
            text = text_of(self.source.make("pass_key", 4096, index).tokens)
            self.assertAlmostEqual(text.index("The pass key is") / len(text), depth, delta=0.03)

    def test_every_task_counts_in_one_mean(self):
        self.assertEqual({t: prompts.group(t) for t in ("copy", "copy_within", "interleaved", "text")},
                         {"copy": "end", "copy_within": "within", "interleaved": "within", "text": None})  # fmt: skip

    def test_prompts_repeat_and_differ_by_index_and_seed(self):
        other = prompts.Prompts(prompts.ByteCodec(), None, depths=5, seed=4, limit=8192)
        for task in (t for t in prompts.TASKS if t != prompts.TEXT):
            first = self.source.make(task, 2048, 0)
            self.assertEqual(first, self.source.make(task, 2048, 0))
            self.assertNotEqual(first.tokens, self.source.make(task, 2048, 5).tokens)
            self.assertNotEqual(first.tokens, other.make(task, 2048, 0).tokens)


class AskedWithin(unittest.TestCase):
    def setUp(self):
        self.source = prompts.Prompts(prompts.ByteCodec(), None, depths=5, seed=3, limit=8192)

    def test_every_task_has_its_exact_length_wherever_it_is_asked(self):
        for task in prompts.WITHIN:
            for length in (2048, 5000):
                for index in range(20):
                    self.assertEqual(len(self.source.make(task, length, index).tokens), length, task)

    def test_the_span_is_the_answer_between_its_question_and_eos(self):
        for task in prompts.WITHIN:
            for index in range(10):
                prompt = self.source.make(task, 2048, index)
                ((begin, end),) = prompt.spans
                before, answer = tasks.decode(prompt.tokens[1:begin]), tasks.decode(prompt.tokens[begin:end])
                self.assertEqual(prompt.tokens[end], tasks.EOS)
                self.assertEqual(prompt.tokens.count(tasks.EOS), 1)
                self.assertIn(answer, before)  # it can be looked up
                self.assertAlmostEqual(begin / 2048, prompt.asked_at, delta=0.001)

    def test_needles_lie_at_their_depth_before_the_question(self):
        for index, depth in enumerate((0, 0.25, 0.5, 0.75, 1)):
            prompt = self.source.make("pass_key_within", 8192, index)
            place = text_of(prompt.tokens[: prompt.spans[0][0]]).index("The pass key is")
            self.assertAlmostEqual(place / prompt.spans[0][0], depth, delta=0.04)

    def test_questions_are_spread_evenly_at_every_depth(self):
        for remainder in range(5):
            places = sorted(self.source.make("copy_within", 2048, i).asked_at for i in range(remainder, 200, 5))
            gaps = [b - a for a, b in zip([graded.EARLIEST, *places], [*places, graded.LATEST])]
            self.assertEqual(len(set(places)), 40)
            self.assertLess(max(gaps), 0.05)  # 40 even steps would be 0.014

    def test_text_goes_on_after_the_question(self):
        for index in range(50):
            prompt = self.source.make("key_value_within", 2048, index)
            self.assertGreater(2048 - prompt.spans[0][1], 150)

    def test_interleaved_spans_are_values_stated_before(self):
        prompt = self.source.make(prompts.INTERLEAVED, 4096, 0)
        self.assertGreater(len(prompt.tokens), 4096 - 20)
        self.assertLessEqual(len(prompt.tokens), 4096)
        self.assertGreater(len(prompt.spans), 50)
        for begin, end in prompt.spans:
            line = tasks.decode(prompt.tokens[begin - 12 : end])  # key 4f9a2c: 58210
            self.assertIn(line, tasks.decode(prompt.tokens[1:begin]))

    def test_too_short_is_said(self):
        with self.assertRaisesRegex(ValueError, "too short"):
            graded.asked_within(tasks.pass_key, random.Random(1), 1000, tasks.sentence_filler, 0.5, 0.999)


class WordsAsTokens(unittest.TestCase):
    """Tests TokenizerCodec.fit_graded() with a tokenizer made here: BOS first, then a token per word with the blank
    before it.
    """

    class Tokenizer:
        def encode(self, text):
            words = list(re.finditer(r" ?[^ \n]+|\n| ", text))
            return SimpleNamespace(ids=[0, *(hash(w[0]) for w in words)], offsets=[(0, 0), *(w.span() for w in words)])

    def setUp(self):
        self.codec = prompts.TokenizerCodec.__new__(prompts.TokenizerCodec)
        self.codec._tokenizer = self.Tokenizer()

    def spans(self, text, *spans):
        length = len(self.Tokenizer().encode(text.decode()).ids)
        return self.codec.fit_graded(lambda size: graded.Graded(text, spans), length)[1]

    def test_a_token_with_part_of_the_answer_is_graded(self):
        text = b"The key is 48213\nand so on"
        self.assertEqual(self.spans(text, (11, 16)), ((4, 5),))
        self.assertEqual(self.spans(text, (8, 16)), ((3, 5),))
        self.assertEqual(self.spans(text, (21, 26)), ((7, 9),))  # to the end

    def test_characters_of_several_bytes_do_not_move_spans(self):
        text = "Größe, Öl: the key is 48213\n".encode()
        begin = text.index(b"48213")
        self.assertEqual(self.spans(text, (begin, begin + 5)), ((6, 7),))

    def test_prompts_are_at_most_and_nearly_the_length(self):
        source = prompts.Prompts(self.codec, None, depths=3, seed=1, limit=8192)
        for task in ("pass_key_within", prompts.INTERLEAVED):
            prompt = source.make(task, 1000, 1)
            self.assertTrue(990 <= len(prompt.tokens) <= 1000, len(prompt.tokens))
            self.assertTrue(all(0 < begin < end <= len(prompt.tokens) for begin, end in prompt.spans))


class MoreTasks(unittest.TestCase):
    def test_following_the_variables_gives_the_answer(self):
        for seed in range(20):
            example = more_tasks.variable_tracking(random.Random(seed), 3000, tasks.sentence_filler, 0.3)
            text = example.prompt.decode()
            value = dict(re.findall(r"VAR ([a-z-]+) = ([^.]+)\.", text))
            name, hops = re.search(r"value of VAR ([a-z-]+)\?", text)[1], 0
            while value[name].startswith("VAR "):
                name, hops = value[name].removeprefix("VAR "), hops + 1
            self.assertEqual(value[name], example.answer.decode())
            self.assertEqual(hops, more_tasks.HOPS)

    def test_every_variable_is_stated_before_it_is_used(self):
        for seed in range(20):
            text = more_tasks.variable_tracking(random.Random(seed), 3000, tasks.sentence_filler, 0).prompt.decode()
            for name, place in ((m[1], m.start()) for m in re.finditer(r"= VAR ([a-z-]+)\.", text)):
                self.assertLess(text.index(f"VAR {name} ="), place)

    def test_copy_goes_on_as_its_passage_did(self):
        for seed in range(30):
            example = more_tasks.copy(random.Random(seed), 2048, tasks.sentence_filler, seed % 3 / 2)
            cue = example.prompt[example.prompt.rindex(b"\n") + 1 :]
            self.assertTrue(more_tasks.CUE_BYTES / 2 < len(cue) <= more_tasks.CUE_BYTES, cue)
            self.assertEqual(example.prompt.count(cue), 2)
            # Both end between words.
            self.assertTrue(cue.endswith(b" "))
            self.assertIn(cue + example.answer + b" ", example.prompt)
            self.assertTrue(len(example.answer) > more_tasks.COPIED_BYTES / 3, example.answer)

    def test_too_short_is_said(self):
        for task in prompts.AT_THE_END.values():
            with self.assertRaisesRegex(ValueError, "too short"):
                task(random.Random(1), 60, tasks.sentence_filler, 0.5)


class HeldOutText(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        for number in range(5):
            text = tasks.sentence_filler(random.Random(number), 3000)
            (Path(folder.name) / f"{number}.txt").write_bytes(
                b"".join(text[i : i + 60] + b"\n" for i in range(0, 3000, 60))
            )

    def test_prompts_are_the_text_itself(self):
        text = prompts.load_text([], [self.folder])
        source = prompts.Prompts(prompts.ByteCodec(), text, depths=3, seed=1, limit=8192)
        whole = b"\n".join(text.blobs).replace(b"\xff", b"\n")
        for index in range(8):
            prompt = source.make(prompts.TEXT, 400, index)
            self.assertEqual((len(prompt.tokens), prompt.text_bytes), (400, 399))
            self.assertIn(bytes(prompt.tokens[-60:]), whole)

    def test_no_text_is_none(self):
        self.assertIsNone(prompts.load_text([], []))

    def test_an_empty_folder_is_an_error(self):
        with tempfile.TemporaryDirectory() as empty, self.assertRaisesRegex(ValueError, "no readable text"):
            prompts.load_text([], [self.folder, empty])
        with self.assertRaisesRegex(ValueError, "is no folder"):
            prompts.load_text([], ["no/such/folder"])


if __name__ == "__main__":
    unittest.main()
