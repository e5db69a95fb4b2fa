#!/usr/bin/env python3
"""Tests prefilld-gateway beside two prefilld and a decode worker with the embedded model, each a process of its own.

    python3 tests/gateway/gateway_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the client's packages, the gateway's, or OpenAI's client.
"""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("client/python", "tests/evaluation", "tests/engines")]
import live_processes  # noqa: E402

try:
    import jinja2  # noqa: F401
    import openai
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
    from faulty_proxy import FaultyProxy
    from gateway_process import GatewayProcess, ask, wait_until
    from prefilld import AsyncPrefillClient, DecodeClient, Delivery, Layout, PrefillClient, PrefilldError
    from prefilld.text_tokens import open_tokens
    from prefilld.vllm.config import ConnectorConfig, Wish
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)
if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

MODEL = live_processes.MODEL
TOKENS = open_tokens(MODEL)
WATCH = "--cache_watchers=all"
PUSHES = "--deliver_to_allow=127.0.0.1:*"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
LLM_D = [json.loads(line) for line in (Path(__file__).parent / "llm_d_exchange.jsonl").read_text().splitlines()]


class Live(unittest.TestCase):
    """The processes, which all tests of this file share, are attributes of this class."""

    @classmethod
    def start(cls):
        def enter(context):
            return unittest.enterModuleContext(context)

        cls.programs = enter(live_processes.Programs())
        flags = ("--metrics_listen=", "--policy=dense", "--prefix_cache_bytes=200000000", WATCH, PUSHES)
        cls.servers = [cls.programs.start(BIN_DIR / "prefilld", MODEL, *flags) for _ in range(2)]
        worker_flags = (f"--prefill_address={cls.servers[0]}", "--max_new_tokens_limit=1000")
        cls.worker = cls.programs.start(BIN_DIR / "prefilld-decode-worker", MODEL, *worker_flags)
        # The gateway's folder has what only text needs: no weights, and a chat template.
        cls.folder = Path(enter(tempfile.TemporaryDirectory(prefix="prefilld-tokens-"))) / "tiny"
        cls.folder.mkdir()
        (cls.folder / "config.json").write_text((MODEL / "config.json").read_text())
        (cls.folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        cls.gateway = enter(GatewayProcess(cls.folder, f"--prefill={','.join(cls.servers)}", f"--decode={cls.worker}"))
        cls.gateway.wait_until_ready()
        cls.client = enter(openai.OpenAI(base_url=f"{cls.gateway.url}/v1", api_key="none", max_retries=0, timeout=60))

    def expected(self, tokens, count):
        """Returns the text that the decode worker gives when it is asked itself, and calls prefilld itself."""
        with DecodeClient(self.worker) as client, client.generate(tokens, count) as answer:
            return TOKENS.decode([token.id for token in answer])


def setUpModule():
    Live.start()


class Answers(Live):
    def test_a_completion_is_what_the_worker_gives_itself(self):
        prompt = FILLER * 4
        answer = self.client.completions.create(model="tiny", prompt=prompt, max_tokens=40, temperature=0)
        self.assertEqual(answer.choices[0].text, self.expected(TOKENS.encode(prompt), 40))
        self.assertEqual((answer.usage.prompt_tokens, answer.usage.completion_tokens), (len(prompt) + 1, 40))
        self.assertEqual((answer.choices[0].finish_reason, answer.model), ("length", "tiny"))
        again = self.client.completions.create(model="tiny", prompt=TOKENS.encode(prompt), max_tokens=40, temperature=0)
        self.assertEqual(again.choices[0].text, answer.choices[0].text)

    def test_an_openai_client_streams(self):
        prompt = "Remember this. " + FILLER * 2
        expected = self.expected(TOKENS.encode(prompt), 30)
        made = dict(model="tiny", prompt=prompt, max_tokens=30, temperature=0)
        chunks = list(self.client.completions.create(**made, stream=True, stream_options={"include_usage": True}))
        self.assertEqual("".join(c.choices[0].text for c in chunks if c.choices), expected)
        self.assertGreater(len(chunks), 10)
        self.assertEqual([c.choices[0].finish_reason for c in chunks if c.choices][-1], "length")
        self.assertEqual((chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens), (len(prompt) + 1, 30))

    def test_an_openai_client_chats_by_the_models_template(self):
        messages = [{"role": "system", "content": FILLER}, {"role": "user", "content": "What is green?"}]
        rendered = f"system: {FILLER}\nuser: What is green?\nassistant:"
        expected = self.expected(TOKENS.encode(rendered, special_tokens=False), 25)
        made = dict(model="tiny", messages=messages, max_completion_tokens=25, temperature=0)
        whole = self.client.chat.completions.create(**made)
        self.assertEqual((whole.choices[0].message.role, whole.choices[0].message.content), ("assistant", expected))
        chunks = list(self.client.chat.completions.create(**made, stream=True))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual("".join(c.choices[0].delta.content or "" for c in chunks), expected)

        async def asynchronous():
            async with openai.AsyncOpenAI(base_url=f"{self.gateway.url}/v1", api_key="none") as client:
                stream = await client.chat.completions.create(**made, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

        self.assertEqual(asyncio.run(asynchronous()), expected)

    def test_the_models_end_token_ends_an_answer_without_text(self):
        prompt = f"{FILLER}The pass key is 48213. Remember it. {FILLER * 3}\nWhat is the pass key? The pass key is "
        answer = self.client.completions.create(model="tiny", prompt=prompt, max_tokens=40, temperature=0)
        self.assertEqual((answer.choices[0].text, answer.choices[0].finish_reason), ("48213", "stop"))
        self.assertEqual(answer.usage.completion_tokens, 6)
        stopped = self.client.completions.create(model="tiny", prompt=prompt, max_tokens=40, temperature=0, stop=["21"])
        self.assertEqual((stopped.choices[0].text, stopped.choices[0].finish_reason), ("48", "stop"))
        ids = self.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=40, temperature=0, extra_body={"stop_token_ids": [ord("1")]}
        )
        self.assertEqual((ids.choices[0].text, ids.choices[0].finish_reason), ("482", "stop"))
        longer = self.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        self.assertEqual((longer.choices[0].text[:5], longer.usage.completion_tokens), ("48213", 12))

    def test_a_seed_makes_answers_alike_and_none_does_not(self):
        def answer(**more):
            made = dict(model="tiny", prompt=FILLER, max_tokens=40, temperature=2.0)
            return self.client.completions.create(**made, **more).choices[0].text

        self.assertEqual(answer(seed=5), answer(seed=5))
        self.assertGreater(len({answer() for _ in range(4)}), 1)
        self.assertEqual(len({answer(extra_body={"top_k": 1}) for _ in range(3)}), 1)

    def test_an_openai_client_gets_errors_of_its_own_kinds(self):
        made = dict(model="tiny", prompt="a", max_tokens=5)
        for wrong, kind, field in (
            ({"n": 2}, openai.BadRequestError, "n"), ({"max_tokens": 1001}, openai.BadRequestError, "max_tokens"),
            ({"prompt": [300]}, openai.BadRequestError, "prompt"), ({"model": "huge"}, openai.NotFoundError, "model"),
            ({"prompt": "a" * 33_000}, openai.BadRequestError, "prompt"),
        ):  # fmt: skip
            for stream in (False, True):
                with self.assertRaises(kind) as caught:
                    self.client.completions.create(**{**made, **wrong}, stream=stream)
                self.assertEqual(caught.exception.param, field, caught.exception)
        with self.assertRaises(openai.NotFoundError):
            self.client.embeddings.create(model="tiny", input="a")
        self.assertEqual(self.gateway.get("/v1/completions")[0], 405)
        self.assertEqual([model.id for model in self.client.models.list()], ["tiny"])

    def test_a_model_without_a_template_refuses_chats_but_not_completions(self):
        with GatewayProcess(MODEL, f"--prefill={self.servers[0]}", f"--decode={self.worker}") as gateway:
            gateway.wait_until_ready()
            reply = gateway.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
            self.assertEqual((reply.status, reply.error["param"]), (400, "messages"))
            self.assertIn("no chat template", reply.error["message"])
            self.assertEqual(gateway.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status, 200)

    def test_a_worker_that_prefilld_may_not_push_to_is_a_fault_of_the_setup(self):
        closed = self.programs.start(BIN_DIR / "prefilld", MODEL, "--metrics_listen=")
        with GatewayProcess(MODEL, f"--prefill={closed}", f"--decode={self.worker}") as gateway:
            gateway.wait_until_ready()
            reply = gateway.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
            self.assertEqual(reply.status, 502)
            self.assertIn("deliver_to", reply.error["message"])


class Pushes(Live):
    """A router of one's own, with the client alone."""

    def test_a_cache_is_pushed_to_a_worker_that_waits_for_it(self):
        expected = self.expected([256, 97, 98], 8)
        with DecodeClient(self.worker) as decode, PrefillClient(self.servers[1]) as prefill:
            with decode.generate([256, 97, 98], 8, pushed_transfer_id="a") as answer:
                started = answer.wait_started()
                pushed = dict(layout=Layout.from_wire(started.kv_layout), deliver_to=Delivery(self.worker, "a"))
                with prefill.prefill([256, 97, 98], model_fingerprint=started.model_fingerprint, **pushed) as push:
                    self.assertEqual(list(push), [])
                self.assertEqual(TOKENS.decode([token.id for token in answer]), expected)
            with decode.generate([300], 8, pushed_transfer_id="b") as answer:
                with self.assertRaises(PrefilldError) as caught:
                    answer.wait_started()
            self.assertEqual(caught.exception.code.name, "INVALID_ARGUMENT")

    def test_health_is_asked(self):
        async def ask_both():
            async with AsyncPrefillClient(self.servers[0]) as client, AsyncPrefillClient("127.0.0.1:1") as nobody:
                self.assertTrue(await client.is_serving())
                with self.assertRaises(PrefilldError) as caught:
                    await nobody.is_serving()
                self.assertEqual(caught.exception.code.name, "UNAVAILABLE")

        asyncio.run(ask_both())


class Choice(Live):
    def test_prompts_with_a_common_beginning_go_to_one_server_and_are_cached_there(self):
        def counts():
            return [self.gateway.metric(f"prefilld_gateway_{name}_total") for name in ("chosen", "prefix_hits")]

        before = counts()
        for subject in range(4):
            beginning = f"Subject {subject}. " + FILLER * 8
            cached = []
            for question in range(3):
                answer = self.client.completions.create(model="tiny", prompt=f"{beginning} {question}?", max_tokens=1)
                cached.append(answer.usage.prompt_tokens_details.cached_tokens)
            self.assertEqual(cached, [0, *[len(beginning) // 128 * 128] * 2])
        chosen, hits = (now - then for now, then in zip(counts(), before, strict=True))
        self.assertEqual((chosen, hits), (12, 8))
        by_server = [self.gateway.metric("prefilld_gateway_chosen_total", server=s) for s in self.servers]
        self.assertGreaterEqual(min(by_server), 3)  # each has subjects of its own

    def test_another_gateway_learns_from_the_servers_what_they_have(self):
        def asked(gateway, subject):
            call = {"prompt": f"Learnt {subject}. {FILLER * 8}", "kv_transfer_params": {"do_remote_decode": True}}
            return gateway.post("/v1/completions", call).json["kv_transfer_params"]["remote_port"]

        ports = []
        for subject in range(4):
            made = dict(model="tiny", prompt=f"Learnt {subject}. {FILLER * 8}", max_tokens=1)
            self.client.completions.create(**made)
            ports.append(asked(self.gateway, subject))
        self.assertEqual(len(set(ports)), 2)
        with GatewayProcess(self.folder, f"--prefill={','.join(self.servers)}") as other:
            told = "prefilld_gateway_told_blocks"
            wait_until(lambda: all(other.metric(told, server=s) for s in self.servers), "both servers have told")
            self.assertEqual([asked(other, subject) for subject in range(4)], ports)
            self.assertEqual(other.metric("prefilld_gateway_prefix_hits_total"), 4)

    def test_what_a_server_tells_of_its_cache_counts_for_the_tenant_who_filled_it(self):
        file = self.folder / "tenants.json"
        file.write_text(json.dumps({"tenants": [{"name": name} for name in ("search", "reports", "default")]}))
        tenants = ("--tenant_from=metadata", f"--tenants={file}")
        flags = ("--metrics_listen=", "--policy=dense", "--prefix_cache_bytes=200000000", WATCH, *tenants)
        server = self.programs.start(BIN_DIR / "prefilld", MODEL, *flags)
        prompt = "A tenant's own. " + FILLER * 8
        with PrefillClient(server) as client:
            with client.prefill(TOKENS.encode(prompt), metadata=[("x-tenant", "search")]) as stream:
                stream.read_all()
        call = {"prompt": prompt, "kv_transfer_params": {"do_remote_decode": True}}
        for tenant, hits in (("search", 1), ("reports", 0)):
            of = (f"--metadata=x-tenant={tenant}", f"--tenant={tenant}")
            with GatewayProcess(self.folder, f"--prefill={server}", *of) as gateway:
                wait_until(lambda: gateway.metric("prefilld_gateway_told_blocks") > 0, "the server has told")  # noqa: B023
                self.assertEqual(gateway.post("/v1/completions", call).status, 200)
                self.assertEqual(gateway.metric("prefilld_gateway_prefix_hits_total"), hits, tenant)

    def test_salts_keep_prompts_apart(self):
        def cached(salt):
            made = dict(model="tiny", prompt="Salted. " + FILLER * 8, max_tokens=1)
            answer = self.client.completions.create(**made, extra_body={"cache_salt": salt})
            return answer.usage.prompt_tokens_details.cached_tokens

        self.assertEqual(cached("a"), 0)
        self.assertGreater(cached("a"), 0)
        self.assertEqual(cached("b"), 0)

    def test_llm_ds_recorded_exchange_leads_vllm_to_the_right_prefilld(self):
        def answered():
            return self.gateway.metric("prefilld_gateway_requests_total", route="prefill_call", outcome="ok")

        before = answered()
        for recorded in LLM_D:
            reply = self.gateway.post(recorded["path"], recorded["prefill_request"])
            self.assertEqual(reply.status, 200, reply)
            params = reply.json["kv_transfer_params"]
            # The sidecar put into its request to vLLM what it had been given, and left all else as the client had it.
            given = recorded["prefill_answer"]["kv_transfer_params"]
            decode = {**recorded["client_request"], "kv_transfer_params": given}
            self.assertEqual(recorded["decode_request"], decode)
            self.assertEqual({**params, "remote_port": 0}, {**given, "remote_port": 0})
            # vLLM's connector calls this address, and finds a prefilld there.
            wish = Wish.of(params, ConnectorConfig(prefill_address=self.servers))
            self.assertIn(wish.address, self.servers)
            with PrefillClient(wish.address) as client, client.prefill([256, 97, 98], layout=Layout()) as stream:
                self.assertGreater(len(list(stream)), 0)
            # Until the server has said that it has no queue, the first prompt counts as one.
            wait_until(lambda: self.gateway.metric("prefilld_gateway_queued_tokens") == 0, "nothing is queued")
            again = self.gateway.post(recorded["path"], recorded["prefill_request"])
            self.assertEqual(again.json["kv_transfer_params"], params, "the same prompt, another server")
        self.assertEqual(answered() - before, 2 * len(LLM_D))

    def test_prefill_calls_are_answered_without_a_decode_worker(self):
        with GatewayProcess(self.folder, f"--prefill={self.servers[0]}") as gateway:
            gateway.wait_until_ready()
            asked = {"kv_transfer_params": {"do_remote_decode": True}, "max_tokens": 1}
            image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
            for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": image})):
                params = gateway.post(path, {**body, **asked}).json["kv_transfer_params"]
                self.assertEqual(f"{params['remote_host']}:{params['remote_port']}", self.servers[0])
            self.assertEqual(gateway.metric("prefilld_gateway_unread_prompts_total"), 1)
            reply = gateway.post("/v1/completions", {"prompt": "a"})
            self.assertEqual(reply.status, 400)
            self.assertIn("no decode worker", reply.error["message"])


class Lives(Live):
    """Servers that come and go."""

    def test_a_killed_prefilld_is_left_out_and_taken_back(self):
        def answer():
            reply = self.gateway.post("/v1/completions", {"prompt": FILLER, "max_tokens": 5, "temperature": 0})
            return reply.status, reply.text

        right = 200, self.expected(TOKENS.encode(FILLER), 5)
        process = self.programs.process_at(self.servers[1])
        process.kill()
        process.wait()
        self.assertEqual([answer() for _ in range(4)], [right] * 4)

        def up():
            return [server["up"] for server in json.loads(self.gateway.get("/health")[1])["servers"]]

        wait_until(lambda: up() == [True, False, True], "the gateway knows which server is gone")
        self.assertEqual(self.gateway.metric("prefilld_gateway_server_up", server=self.servers[1]), 0)
        flags = ("--metrics_listen=", "--policy=dense", PUSHES, f"--listen={self.servers[1]}")
        self.programs.start(BIN_DIR / "prefilld", MODEL, *flags)
        wait_until(lambda: self.gateway.metric("prefilld_gateway_server_up") == 3, "the server is back")
        self.assertEqual([answer() for _ in range(4)], [right] * 4)

    def test_connections_that_break_again_and_again_cost_no_answer(self):
        with FaultyProxy(self.servers[0], limit=1000) as proxy:
            prefill = f"--prefill=127.0.0.1:{proxy.port},{self.servers[1]}"
            with GatewayProcess(self.folder, prefill, f"--decode={self.worker}", "--tries=5") as gateway:
                gateway.wait_until_ready()

                async def ask_all():
                    # No two begin alike, so that both servers get their share.
                    bodies = [{"prompt": f"{i} {FILLER}", "max_tokens": 5, "temperature": 0} for i in range(40)]
                    return await asyncio.gather(*(ask(gateway.port, "/v1/completions", body) for body in bodies))

                replies = asyncio.run(ask_all())
                self.assertEqual([reply.status for reply in replies], [200] * 40)
                self.assertEqual(replies[7].text, self.expected(TOKENS.encode(f"7 {FILLER}"), 5))
                self.assertGreater(proxy.connections, 1)
                self.assertIn(f"prefilld 127.0.0.1:{proxy.port} is left out", gateway.log())

    def test_servers_behind_tls_want_the_gateways_certificate(self):
        with tempfile.TemporaryDirectory(prefix="prefilld-tls-") as folder:
            certificate, key = f"{folder}/cert.pem", f"{folder}/key.pem"
            command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                       "-keyout", key, "-out", certificate, "-days", "1", "-subj", "/CN=prefilld",
                       "-addext", "subjectAltName=IP:127.0.0.1"]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True)
            flags = (f"--tls_cert={certificate}", f"--tls_key={key}", f"--tls_client_ca={certificate}")
            server = self.programs.start(BIN_DIR / "prefilld", MODEL, "--metrics_listen=", *flags)
            call = {"prompt": "a", "kv_transfer_params": {"do_remote_decode": True}}
            with GatewayProcess(MODEL, f"--prefill={server}", f"--tls_ca={certificate}", *flags[:2]) as gateway:
                gateway.wait_until_ready()
                self.assertEqual(gateway.post("/v1/completions", call).status, 200)
            with GatewayProcess(MODEL, f"--prefill={server}") as gateway:
                self.assertEqual(gateway.post("/v1/completions", call).status, 503)

    def test_an_answer_that_has_begun_ends_after_sigterm(self):
        gateway = GatewayProcess(self.folder, f"--prefill={self.servers[0]}", f"--decode={self.worker}")
        with gateway:
            gateway.wait_until_ready()

            async def drained():
                body = {"prompt": FILLER, "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
                asking = asyncio.ensure_future(ask(gateway.port, "/v1/completions", body))
                while not await asyncio.to_thread(gateway.metric, "prefilld_gateway_first_token_seconds_count"):
                    await asyncio.sleep(0.01)
                gateway.process.send_signal(signal.SIGTERM)
                return await asking

            reply = asyncio.run(drained())
            self.assertTrue(reply.body.endswith(b"data: [DONE]\n\n"), reply)
            self.assertEqual(gateway.process.wait(30), 0)

    def test_wrong_flags_end_the_start_with_all_that_is_wrong(self):
        run = [sys.executable, "-B", "-m", "prefilld.gateway"]
        command = [*run, f"--model={MODEL}", "--prefill=a", "--tries=0", "--policy=x", "--max_pending_body_bytes=5"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "client" / "python")
        self.assertEqual(done.returncode, 2)
        for problem in ("--prefill: 'a' is not host:port", "--tries is 0", "--policy", "--max_pending_body_bytes"):
            self.assertIn(problem, done.stderr)
        command = [*run, "--model=/nowhere", "--prefill=a:1"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "client" / "python")
        self.assertEqual((done.returncode, done.stderr.count("Traceback")), (1, 0))
        self.assertIn("config.json cannot be read", done.stderr)


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
