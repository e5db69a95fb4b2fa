"""Tests that the manifests agree with the programs: flags, probes, metrics, the drain and renewed certificates.

    python_test.sh FOLDER live_manifests_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the client's packages or the gateway's.
"""

import importlib.util
import json
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import yaml
from rendering import KUBERNETES, flag_value, of_kind, pod_of, render

try:
    import jinja2  # noqa: F401
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
    from pods import PROBES, Pods, containers, health, is_tls, live_processes, page_of
    from prefilld import Layout, PrefillClient
    from prefilld.vllm.config import ConnectorConfig
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)
if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)
from secrets_folder import CertificateAuthority, SecretFolder  # noqa: E402

PATIENCE_S = 60


class Live(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="prefilld-manifests-")))
        cls.pods = cls.enterClassContext(Pods(BIN_DIR))
        authority = CertificateAuthority(folder / "authority")
        cls.secrets = {name: SecretFolder(folder / name, authority, name)
                       for name in ("prefilld", "prefilld-decode-worker")}  # fmt: skip
        plain, secure = sorted(containers("prefilld"), key=is_tls)
        cls.prefill = cls.pods.run(plain)
        cls.tls = str(cls.secrets["prefilld"].path)
        cls.secure_prefill = cls.pods.run(secure, cls.tls)

    def check_probes(self, pod, tls=""):
        asked = 0
        for name in PROBES:
            if name in pod.container:
                self.assertEqual(self.pods.ask(pod, pod.container[name], tls), "", f"{pod.container['name']} {name}")
                asked += 1
        self.assertGreaterEqual(asked, 2)

    def test_prefilld_takes_the_flags_and_answers_the_probes(self):
        self.check_probes(self.prefill)
        self.check_probes(self.secure_prefill, self.tls)

    def test_a_probe_can_fail(self):
        self.assertEqual(self.pods.ask(self.prefill, {"grpc": {"port": 50051, "service": "livness"}}), "NOT_FOUND")
        probe = self.secure_prefill.container["readinessProbe"]["exec"]["command"]
        for wrong in (
            [*probe, "--service=livness"],
            [a for a in probe if not a.startswith(("--tls_cert", "--tls_key"))],
            [a.replace("--tls_name=prefilld", "--tls_name=other") for a in probe],
        ):
            self.assertNotEqual(wrong, probe)
            self.assertNotEqual(self.pods.ask(self.secure_prefill, {"exec": {"command": wrong}}, self.tls), "", wrong)

    def test_the_decode_worker_takes_the_flags_and_answers_the_probes(self):
        plain, secure = sorted(containers("prefilld-decode-worker"), key=is_tls)
        self.check_probes(self.pods.run(plain, peer=self.prefill.ports["grpc"]))
        tls = str(self.secrets["prefilld-decode-worker"].path)
        # In the cluster the name is that of the address; here the address is a number.
        secure = {**secure, "args": [*secure["args"], "--prefill_tls_name=prefilld"]}
        worker = self.pods.run(secure, tls, peer=self.secure_prefill.ports["grpc"])
        self.check_probes(worker, tls)
        # A prompt goes from one certificate to the other, and its cache back.
        asked = subprocess.run(
            [BIN_DIR / "prefill-cli", "generate", f"--worker={worker.ports['grpc']}", "--token_ids=1,2,3", "--quiet",
             "--max_new_tokens=2", "--ignore_eos", "--tls", f"--tls_ca={tls}/ca.crt", f"--tls_cert={tls}/tls.crt",
             f"--tls_key={tls}/tls.key", "--tls_name=prefilld-decode-worker"],
            capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        self.assertEqual(asked.returncode, 0, asked.stderr)
        self.assertEqual(len(asked.stdout.split()), 2, asked.stdout)

    def test_the_gateway_takes_the_flags_answers_the_probes_and_has_the_picker_s_metrics(self):
        (container,) = containers("prefilld-gateway")
        gateway = self.pods.run(container, peer=self.prefill.ports["grpc"])
        self.check_probes(gateway)
        (config,) = of_kind(render(KUBERNETES / "overlays" / "gateway"), "ConfigMap")
        picker = yaml.safe_load(config["data"]["config.yaml"])
        (extractor,) = [p for p in picker["plugins"] if p["type"] == "core-metrics-extractor"]
        (engine,) = extractor["parameters"]["engineConfigs"]
        wanted = {value for key, value in engine.items() if key.endswith("Spec")}
        self.assertEqual(len(wanted), 2)
        page = page_of(gateway.ports["http"])
        for name in wanted:
            # One series: the picker reads one figure of each name.
            self.assertEqual(len(re.findall(rf"^{name}(?:{{.*}})? [0-9.]+$", page, re.M)), 1, name)

    def test_vllm_s_connector_takes_its_settings_and_may_call_the_server(self):
        for overlay, address in (("vllm", "prefilld:50051"), ("gateway", "10.244.1.7:50051")):
            (vllm,) = [d for d in of_kind(render(KUBERNETES / "overlays" / overlay), "Deployment")
                       if d["metadata"]["name"] == "vllm-decode"]  # fmt: skip
            text = flag_value(pod_of(vllm)["containers"][0], "kv-transfer-config")
            transfer = json.loads(text)
            config = ConnectorConfig.read(transfer["kv_connector_extra_config"])
            self.assertEqual(config.allowed(address), address)
            self.assertRaises(ValueError, config.allowed, "203.0.113.9:50051")
            self.assertIsNotNone(importlib.util.find_spec(transfer["kv_connector_module_path"]))

    def test_metrics_that_scale_are_exported(self):
        page = page_of(self.prefill.ports["metrics"])
        (hpa,) = of_kind(render(KUBERNETES / "overlays" / "hpa"), "HorizontalPodAutoscaler")
        (keda,) = of_kind(render(KUBERNETES / "overlays" / "keda"), "ScaledObject")
        wanted = {m["pods"]["metric"]["name"] for m in hpa["spec"]["metrics"]}
        for trigger in keda["spec"]["triggers"]:
            wanted |= set(re.findall(r"prefilld_\w+", trigger["metadata"]["query"]))
        self.assertTrue(wanted)
        for name in wanted:
            self.assertRegex(page, rf"(?m)^{name} 0$")
            self.assertRegex(page, rf"(?m)^# TYPE {name} gauge$")

    def test_a_renewed_secret_is_shown_without_a_restart(self):
        host, port = self.secure_prefill.ports["grpc"].rsplit(":", 1)
        before = ssl.get_server_certificate((host, int(port)))
        self.secrets["prefilld"].renew()
        until = time.monotonic() + PATIENCE_S
        while ssl.get_server_certificate((host, int(port))) == before:
            self.assertLess(time.monotonic(), until, "the old certificate is still shown")
            time.sleep(0.2)
        self.assertIsNone(self.secure_prefill.process.poll())
        self.check_probes(self.secure_prefill, self.tls)

    def test_the_drain_finishes_what_was_accepted_within_the_grace_period(self):
        (plain, _) = sorted(containers("prefilld"), key=is_tls)
        pod = self.pods.run(plain)
        (deployment,) = [d for d in of_kind(render(KUBERNETES / "base"), "Deployment")
                         if d["metadata"]["name"] == "prefilld"]  # fmt: skip
        accepted, ended = threading.Semaphore(0), []

        def ask(client):
            with client.prefill(list(range(256)) * 24, layout=Layout(block_tokens=64)) as stream:
                accepted.release()
                for _ in stream:
                    pass
                ended.append(stream.result.num_tokens)

        with PrefillClient(pod.ports["grpc"]) as client:
            threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for _ in threads:
                self.assertTrue(accepted.acquire(timeout=PATIENCE_S))
            began = time.monotonic()
            pod.process.send_signal(signal.SIGTERM)
            seen = set()
            while pod.process.poll() is None:
                seen.add((health(pod.ports["grpc"], ""), health(pod.ports["grpc"], "liveness")))
                time.sleep(0.05)
            for thread in threads:
                thread.join()
        self.assertEqual(ended, [6144] * 4)
        self.assertEqual(pod.process.returncode, 0)
        self.assertLess(time.monotonic() - began, pod_of(deployment)["terminationGracePeriodSeconds"])
        self.assertIn("NOT_SERVING", {readiness for readiness, _ in seen})
        self.assertNotIn("NOT_SERVING", {liveness for _, liveness in seen}, "a drain is no reason to restart")


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
