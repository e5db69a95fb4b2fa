#!/usr/bin/env python3
"""Tests what the gateway reads in requests and writes in answers, and how tokens become text.

Exits with 77 (skipped, for CTest) without the client's packages, jinja2 or tokenizers.
"""

import hashlib
import json
import sys
import tempfile
import unittest
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import grpc
    import tokenizers
    from prefilld import PrefilldError, Sampling
    from prefilld.gateway.answer_text import AnswerText, StopStrings
    from prefilld.gateway.openai_answers import Answer, Failure, Usage
    from prefilld.gateway.openai_requests import BadRequest, read_request
    from prefilld.gateway.prompts import ChatRefused, ModelPrompts
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

HELLO = [{"role": "user", "content": "hello"}]
IDS = array("I", [1, 2])
# llm-d's sidecar adds these to a body, and max_tokens 1.
PREFILL_CALL = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
                "remote_block_ids": None, "remote_host": None, "remote_port": None}  # fmt: skip


class Requests(unittest.TestCase):
    def refused(self, body, is_chat=False):
        with self.assertRaises(BadRequest) as caught:
            read_request(body, is_chat)
        return caught.exception.field, str(caught.exception)

    def test_a_completion_has_openais_defaults(self):
        ask = read_request({"model": "m", "prompt": "hello", "seed": 3}, False)
        self.assertEqual((ask.prompt, ask.model, ask.max_tokens, ask.stream), ("hello", "m", 16, False))
        self.assertEqual(ask.sampling, Sampling(temperature=1.0, top_p=1.0, seed=3))
        self.assertFalse(ask.is_prefill_call)

    def test_every_supported_field_is_read(self):
        body = {"messages": HELLO, "max_completion_tokens": 5, "max_tokens": 9, "temperature": 0.5, "top_p": 0.25,
                "top_k": 40, "seed": -1, "stop": ["a", "b"], "stop_token_ids": [3], "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}, "cache_salt": "s",
                "chat_template_kwargs": {"x": 1}}  # fmt: skip
        ask = read_request(body, True)
        self.assertEqual((ask.prompt, ask.max_tokens, ask.stop, ask.stop_token_ids), (HELLO, 5, ["a", "b"], [3]))
        self.assertEqual(ask.sampling, Sampling(temperature=0.5, top_p=0.25, top_k=40, seed=2**64 - 1))
        self.assertTrue(ask.ignore_eos and ask.stream and ask.include_usage)
        self.assertEqual(ask.cache_salt, hashlib.sha256(b"s").hexdigest())  # as the vLLM connector makes it
        self.assertEqual(ask.template, {"x": 1})
        self.assertIsNone(read_request({"messages": HELLO}, True).max_tokens)
        self.assertEqual(read_request({"prompt": "a", "stop": "x", "top_k": -1}, False).stop, ["x"])

    def test_answers_without_a_seed_are_not_alike(self):
        seeds = {read_request({"prompt": "a"}, False).sampling.seed for _ in range(4)}
        self.assertEqual(len(seeds), 4)

    def test_prompts_may_be_texts_or_tokens_but_one_at_a_time(self):
        for given, read in (("a", "a"), (["a"], "a"), ([1, 2], IDS), ([[1, 2]], IDS)):
            self.assertEqual(read_request({"prompt": given}, False).prompt, read)
        for wrong in (None, "", [], [[]], 5, [1, "a"], [-1], [2**32], [True], ["a", "b"], "\ud800"):
            self.assertRegex(self.refused({"prompt": wrong})[0], r"^prompt")

    def test_messages_are_texts(self):
        parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        self.assertEqual(read_request({"messages": parts}, True).prompt[0]["content"], "ab")
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        self.assertEqual(self.refused({"messages": image}, True)[0], "messages[0].content")
        for wrong in (None, [], "a", [1], [{"content": "a"}], [{"role": "user", "content": 3}],
                      [{"role": "user", "content": "\udfff"}]):  # fmt: skip
            self.assertRegex(self.refused({"messages": wrong}, True)[0], r"^messages")

    def test_what_is_not_supported_is_refused_by_name(self):
        for name, value in (
            ("n", 2), ("n", True), ("best_of", 2), ("echo", True), ("suffix", "x"), ("logprobs", 0),
            ("logprobs", True), ("presence_penalty", 0.1), ("logit_bias", {"1": 2}), ("guided_json", {}),
            ("response_format", {"type": "json_object"}), ("tools", [{}]), ("nonsense", 0),
        ):  # fmt: skip
            field, message = self.refused({"prompt": "a", name: value})
            self.assertEqual(field, name)
            self.assertIn(name, message)
        neutral = {"n": 1, "presence_penalty": 0.0, "logit_bias": None, "echo": False, "user": "u", "tools": []}
        read_request({"prompt": "a", **neutral}, False)

    def test_values_out_of_range_are_refused_with_their_range(self):
        for name, value, limit in (
            ("max_tokens", 0, "1"), ("max_tokens", 1.5, "1"), ("max_tokens", True, "1"), ("temperature", -0.1, "100"),
            ("temperature", 101, "100"), ("temperature", float("nan"), "100"), ("temperature", "1", "100"),
            ("top_p", 0, "above 0"), ("top_p", 1.1, "1"), ("top_k", -2, "-1"), ("seed", 2**64, "whole number"),
            ("stop", "", "1 to 256"), ("stop", ["a"] * 17, "16"), ("stop", [1], "texts"),
            ("stop_token_ids", [0] * 65, "64"), ("stop_token_ids", 5, "list"), ("stream", 1, "true or false"),
            ("ignore_eos", "no", "true or false"), ("model", 5, "text"), ("cache_salt", 5, "text"),
        ):  # fmt: skip
            field, message = self.refused({"prompt": "a", name: value})
            self.assertEqual(field, name, message)
            self.assertIn(limit, message)
        self.assertEqual(self.refused({"prompt": "a", "stream_options": {"include_usage": True}})[0], "stream_options")
        self.assertIn("x", self.refused({"prompt": "a", "stream": True, "stream_options": {"x": 1}})[1])
        self.assertIn("object", self.refused([1])[1])

    def test_a_prefill_call_is_read_for_its_prompt_alone(self):
        body = {"prompt": "a", "max_tokens": 1, "max_completion_tokens": 1, "n": 7, "logprobs": 5, "guided_json": {},
                "kv_transfer_params": PREFILL_CALL, "model": "another"}  # fmt: skip
        ask = read_request(body, False)
        self.assertEqual((ask.is_prefill_call, ask.prompt), (True, "a"))
        chat = {"messages": HELLO, "tools": [{"type": "function"}], "kv_transfer_params": PREFILL_CALL}
        self.assertEqual(read_request(chat, True).template, {"tools": [{"type": "function"}]})
        image = [{"role": "user", "content": [{"type": "image_url"}]}]
        ask = read_request({"messages": image, "kv_transfer_params": PREFILL_CALL}, True)
        self.assertEqual((ask.is_prefill_call, ask.prompt), (True, None))  # vLLM may know what to do with it

    def test_other_transfers_are_refused(self):
        for params in ({"do_remote_prefill": True}, 5, {"x": 1}):
            self.assertEqual(self.refused({"prompt": "a", "kv_transfer_params": params})[0], "kv_transfer_params")
        self.assertFalse(read_request({"prompt": "a", "kv_transfer_params": None}, False).is_prefill_call)


class Answers(unittest.TestCase):
    def test_forms_of_a_completion(self):
        form = Answer("cmpl-1", "m", False, include_usage=True)
        whole = form.whole("hi", "length", Usage(3, 2, 1))
        self.assertEqual((whole["object"], whole["choices"][0]["text"]), ("text_completion", "hi"))
        self.assertEqual(whole["usage"], {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
                                          "prompt_tokens_details": {"cached_tokens": 1}})  # fmt: skip
        self.assertIsNone(form.first_event())
        self.assertEqual(form.text_event("hi")["choices"][0]["text"], "hi")
        last, usage = form.last_events("stop", Usage(3, 2))
        self.assertEqual((last["choices"][0]["finish_reason"], last["usage"]), ("stop", None))
        self.assertEqual((usage["choices"], usage["usage"]["total_tokens"]), ([], 5))
        self.assertNotIn("prompt_tokens_details", usage["usage"])

    def test_forms_of_a_chat(self):
        form = Answer("chatcmpl-1", "m", True)
        self.assertEqual(form.whole("hi", "stop", Usage(1, 1))["choices"][0]["message"]["content"], "hi")
        self.assertEqual(form.first_event()["choices"][0]["delta"]["role"], "assistant")
        self.assertEqual(form.text_event("hi")["choices"][0]["delta"], {"content": "hi"})
        (last,) = form.last_events("length", Usage(1, 1))
        self.assertEqual((last["choices"][0]["delta"], last["choices"][0]["finish_reason"]), ({}, "length"))
        self.assertNotIn("usage", last)

    def test_statuses_of_servers_become_codes_of_http(self):
        code = grpc.StatusCode
        for status, expected in ((code.INVALID_ARGUMENT, 400), (code.RESOURCE_EXHAUSTED, 429), (code.UNAVAILABLE, 503),
                                 (code.ABORTED, 503), (code.DEADLINE_EXCEEDED, 504), (code.DATA_LOSS, 502),
                                 (code.PERMISSION_DENIED, 502), (code.INTERNAL, 502)):  # fmt: skip
            self.assertEqual(Failure.of(PrefilldError(status, "x")).status, expected)
        full = Failure.of(PrefilldError(code.RESOURCE_EXHAUSTED, "queue is full", 2.2))
        self.assertEqual((full.retry_after, full.body()["error"]["type"]), (3, "rate_limit_error"))
        self.assertEqual(Failure.of(PrefilldError(code.RESOURCE_EXHAUSTED, "full", 0.01)).retry_after, 1)
        wrong = Failure.of(PrefilldError(code.INVALID_ARGUMENT, "max_new_tokens is 9000, allowed: 1 to 4096"))
        self.assertEqual((wrong.field, wrong.retry_after), ("max_tokens", None))
        self.assertIn("1 to 4096", wrong.body()["error"]["message"])
        refused = Failure.of(BadRequest("no", "seed", code="c")).body()["error"]
        self.assertEqual((refused["type"], refused["param"], refused["code"]), ("invalid_request_error", "seed", "c"))


class Text(unittest.TestCase):
    def test_stop_strings_cut_whatever_the_pieces(self):
        text = "one, two; STOP three"
        for stops, expected in ((["STOP"], "one, two; "), (["; ST", "STOP"], "one, two"), (["two", "one"], ""),
                                (["stop"], text), ([], text), (["three!"], text)):  # fmt: skip
            for size in range(1, len(text) + 1):
                cut = StopStrings(stops)
                pieces = [cut.add(text[i : i + size]) for i in range(0, len(text), size)]
                self.assertEqual("".join(pieces) + cut.rest(), expected, (stops, size))
                self.assertEqual(cut.found, expected != text)

    def test_what_may_begin_a_stop_string_waits_and_nothing_else_does(self):
        cut = StopStrings(["</end>"])
        self.assertEqual((cut.add("a<"), cut.add("b"), cut.add("</e"), cut.add("m")), ("a", "<b", "", "</em"))
        self.assertEqual((cut.add("x</end"), cut.rest()), ("x", "</end"))

    def test_characters_come_whole_and_tokens_that_end_an_answer_have_no_text(self):
        def decode(ids):
            return bytes(i for i in ids if i < 256).decode(errors="replace")

        text = AnswerText(decode, {257, ord("!")}, ["ß"])
        pieces = [text.add(b) for b in "aé灯".encode()]
        self.assertEqual(pieces, ["a", "", "é", "", "", "灯"])
        self.assertEqual((text.add(257), text.add(ord("!")), text.has_stopped), ("", "", False))
        self.assertEqual([text.add(b) for b in "bßc".encode()], ["b", "", "", ""])
        self.assertTrue(text.has_stopped)
        cut = AnswerText(decode, set(), [])
        self.assertEqual((cut.add(0xC3), cut.rest()), ("", "\N{REPLACEMENT CHARACTER}"))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Prompts(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="prefilld-gateway-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.write("config.json", {"byte_tokens": True, "bos_token_id": 256})

    def write(self, name, content):
        (self.folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    def rendered(self, messages=HELLO, **variables):
        return bytes(ModelPrompts(self.folder).of_messages(messages, variables)).decode()

    def test_texts_get_the_beginning_token_and_chats_what_their_template_writes(self):
        self.write("tokenizer_config.json", {"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}})
        prompts = ModelPrompts(self.folder)
        self.assertEqual(prompts.of_text("hé"), [256, *"hé".encode()])
        self.assertEqual(prompts.chat_refusal, "")
        self.assertEqual(self.rendered(), "<s>[user]hello\n[assistant]")
        self.assertEqual(self.rendered(add_generation_prompt=False), "<s>[user]hello\n")
        self.assertIn('{"a": "<é>"}', self.rendered(tools=[{"a": "<é>"}]))  # not escaped for HTML

    def test_a_template_may_stand_in_a_file_or_among_others(self):
        self.write("tokenizer_config.json", {"chat_template": [{"name": "tool_use", "template": "no"},
                                                               {"name": "default", "template": "yes"}]})  # fmt: skip
        self.assertEqual(self.rendered(), "yes")
        self.write("chat_template.jinja", "file")
        self.assertEqual(self.rendered(), "file")

    def test_a_model_without_a_template_refuses_chats_and_says_why(self):
        prompts = ModelPrompts(self.folder)
        self.assertIn("no chat template", prompts.chat_refusal)
        with self.assertRaises(ChatRefused):
            prompts.of_messages(HELLO, {})
        self.write("chat_template.jinja", "{% for %}")
        self.assertIn("cannot be read", ModelPrompts(self.folder).chat_refusal)

    def test_what_a_template_refuses_or_may_not_do_is_an_error_of_the_request(self):
        self.write("chat_template.jinja", TEMPLATE)
        with self.assertRaisesRegex(ChatRefused, "no such role"):
            self.rendered([{"role": "bad", "content": "x"}])
        with self.assertRaisesRegex(ChatRefused, "surrogates not allowed"):
            self.rendered([{"role": "\ud800", "content": "x"}])
        self.write("chat_template.jinja", "{{ messages.append(1) }}")
        with self.assertRaises(ChatRefused):
            self.rendered()
        self.write("chat_template.jinja", "{{ ''.__class__.__mro__ }}")
        with self.assertRaises(ChatRefused):
            self.rendered()

    def test_a_tokenizer_file_adds_its_beginning_token_to_texts_but_not_to_chats(self):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "hello": 1, "?": 2}, unk_token="?"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        tokenizer.add_special_tokens(["<s>"])
        tokenizer.save(str(self.folder / "tokenizer.json"))
        self.write("config.json", {})
        self.write("chat_template.jinja", "<s>{{ messages[0].content }}")
        prompts = ModelPrompts(self.folder)
        self.assertEqual(prompts.of_text("hello"), [0, 1])
        self.assertEqual(prompts.of_messages(HELLO, {}), [0, 1])


if __name__ == "__main__":
    unittest.main()
