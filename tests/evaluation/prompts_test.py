"""Every prompt has its exact length, its answer at its depth, and is made the same way twice. Standard library only."""

import random
import re
import tempfile
import unittest
from pathlib import Path

import more_tasks
import prompts
import tasks

LENGTHS = (1024, 2048, 5000)


def text_of(prompt):
    return bytes(prompt.tokens[1:]).decode()


class Made(unittest.TestCase):
    def setUp(self):
        self.source = prompts.Prompts(prompts.ByteCodec(), None, depths=5, seed=3, limit=8192)

    def test_every_task_has_its_exact_length_at_every_depth(self):
        for task in prompts.TASKS:
            for length in LENGTHS:
                for index in range(5):
                    prompt = self.source.make(task, length, index)
                    self.assertEqual(len(prompt.tokens), length, task)
                    self.assertEqual(prompt.tokens[0], tasks.BOS)
                    self.assertEqual(prompt.max_new_tokens, len(prompt.answer))

    def test_the_longest_prompt_leaves_room_for_its_answer(self):
        for task in prompts.TASKS:
            prompt = self.source.make(task, 8192, 0)
            self.assertEqual(len(prompt.tokens), 8192 - prompts.ANSWER_ROOM)
            self.assertLessEqual(prompt.max_new_tokens, prompts.ANSWER_ROOM)

    def test_depths_run_from_start_to_end_and_begin_again(self):
        depths = [self.source.depth("pass_key", i) for i in range(6)]
        self.assertEqual(depths, [0, 0.25, 0.5, 0.75, 1, 0])

    def test_needles_lie_at_their_depth(self):
        for index, depth in enumerate((0, 0.25, 0.5, 0.75, 1)):
            text = text_of(self.source.make("pass_key", 4096, index))
            self.assertAlmostEqual(text.index("The pass key is") / len(text), depth, delta=0.03)

    def test_prompts_repeat_and_differ_by_index_and_seed(self):
        other = prompts.Prompts(prompts.ByteCodec(), None, depths=5, seed=4, limit=8192)
        for task in prompts.TASKS:
            first = self.source.make(task, 1024, 0)
            self.assertEqual(first, self.source.make(task, 1024, 0))
            self.assertNotEqual(first.tokens, self.source.make(task, 1024, 5).tokens)
            self.assertNotEqual(first.tokens, other.make(task, 1024, 0).tokens)


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
        for depth in (0, 0.5, 1):
            example = more_tasks.copy(random.Random(1), 2048, tasks.sentence_filler, depth)
            cue = example.prompt[example.prompt.rindex(b"\n") + 1 :]
            self.assertEqual(len(cue), more_tasks.CUE_BYTES)
            self.assertEqual(example.prompt.count(cue), 2)
            self.assertIn(cue + example.answer, example.prompt)

    def test_too_short_is_said(self):
        for task in prompts.TASKS.values():
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

    def test_next_token_follows_the_prompt_in_the_text(self):
        text = prompts.load_text([], [self.folder])
        source = prompts.Prompts(prompts.ByteCodec(), text, depths=3, seed=1, limit=8192)
        whole = b"\n".join(text.blobs).replace(b"\xff", b"\n")
        for index in range(8):
            prompt = source.make(prompts.TEXT, 400, index)
            self.assertEqual(len(prompt.tokens), 400)
            seen = bytes(prompt.tokens[-60:]) + bytes([prompt.next_token])
            self.assertIn(seen, whole)

    def test_no_text_is_none(self):
        self.assertIsNone(prompts.load_text([], []))

    def test_an_empty_folder_is_an_error(self):
        with tempfile.TemporaryDirectory() as empty, self.assertRaisesRegex(ValueError, "no readable text"):
            prompts.load_text([], [self.folder, empty])
        with self.assertRaisesRegex(ValueError, "is no folder"):
            prompts.load_text([], ["no/such/folder"])


if __name__ == "__main__":
    unittest.main()
