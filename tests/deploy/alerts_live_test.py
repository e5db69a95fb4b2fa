"""Tests that every alert fires for the reason it names, and clears: real processes get into trouble before a real Prometheus.

    python3 tests/deploy/alerts_live_test.py build/release/bin PRELOADED_FAULTS

PRELOADED_FAULTS: the library made of alerts_preloaded_faults.c. Exits with 77 (skipped, for CTest) without the client's
packages or a Prometheus. Windows and `for` of the rules are a thirtieth of what they say.
"""

import sys
import threading
import time
import unittest
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from alerts_processes import ROOT, Prometheus, Server, reason_to_skip, running, temporary_folder

if reason_to_skip():
    print(f"skipped: {reason_to_skip()}")
    sys.exit(77)

import alerts_faults as faults  # noqa: E402
import yaml  # noqa: E402
from dashboards_load import make_certificate  # noqa: E402
from scaled_rules import scaled  # noqa: E402

RULES = yaml.safe_load((ROOT / "deploy" / "alerts" / "prefilld.rules.yaml").read_text())
FACTOR = 1 / 30
FIRE_SECONDS, CLEAR_SECONDS = 180, 120


@dataclass
class Case:
    """A server, its trouble, and the alerts that it must raise. also: what may come with that, since the process ends."""

    server: Server
    trouble: object
    expected: set[str]
    also: set[str] = field(default_factory=set)


class Cases:
    """One case for each kind of trouble, in a folder."""

    def __init__(self, bin_dir: Path, preloaded: Path, folder: Path):
        self._bin_dir, self._preloaded, self._folder = bin_dir, preloaded, folder
        self.cases: list[Case] = []
        gone = {"PrefilldScrapeMissing"}
        self.add("healthy", faults.load, set(), ("--recall_audit_fraction=1",))
        self.add("stopped", faults.be_stopped, {"PrefilldScrapeMissing"})
        self.add("restarted", faults.restart, {"PrefilldRestarts"}, also=gone)
        few_left, none_left = (partial(faults.take_descriptors, left=left) for left in (4, 0))
        self.add("few_descriptors", few_left, {"PrefilldOutOfDescriptors"})
        # It cannot be scraped; afterwards the page tells more.
        more = {"PrefilldOutOfDescriptors", "PrefilldDeaf"}
        self.add("no_descriptors", none_left, {"PrefilldScrapeMissing"}, also=more)
        self.add_faulty("deaf", faults.be_deaf, {"PrefilldDeaf", "PrefilldOutOfDescriptors"})
        soon = ("--stall_timeout_s=1", "--resume_window_s=1", "--wedge_timeout_s=3")
        self.add_faulty("wedged", faults.stand_still, {"PrefilldWedged"}, soon)
        self.add_faulty("device", faults.fail_device, {"PrefilldDeviceFailed"}, also=gone)
        self.add_faulty("drain", faults.drain_slowly, {"PrefilldDrainTooLong"}, ("--drain_timeout_s=8",), gone)
        self.add_faulty("queue", faults.be_slow, {"PrefilldQueueGrows"}, ("--queue_capacity=5000", "--max_queued_tokens=9999999"))
        self.add_faulty("refuses", faults.be_slow, {"PrefilldRefuses"}, ("--queue_capacity=2",))
        little = ("--staging_bytes=8388608", "--frame_bytes=1048576")
        self.add("stalled", faults.take_nothing, {"PrefilldRequestsFail"}, (*little, "--stall_timeout_s=1"))
        for case, trouble, expected in (
            ("strangers", faults.call_without_right, "PrefilldStrangers"),
            ("files", partial(faults.have_a_wrong_file, file=folder / "files.json"), "PrefilldFilesRefused"),
        ):
            (folder / f"{case}.json").write_text('{"unknown": "refuse", "tenants": [{"name": "ours"}]}')
            tenants = ("--tenant_from=metadata", f"--tenants={folder}/{case}.json")
            self.add(case, trouble, {expected}, tenants)
        self.add("vanished", faults.vanish, {"PrefilldConsumersLost"}, little, {"PrefilldRequestsFail", "PrefilldStalls"})
        less = ("--staging_bytes=4194304", "--frame_bytes=1048576", "--min_consumer_mb_per_s=0")
        self.add("slow_consumer", faults.take_slowly, {"PrefilldStalls"}, less)
        self.add("recall", faults.load, {"PrefilldRecallLow"}, ("--recall_audit_fraction=1", "--gamma=0.05"))
        certificate, key = make_certificate(folder, days=7)
        expires = {"PrefilldCertificateExpires", "PrefilldCertificateExpiresNow"}
        trouble = partial(faults.let_certificate_expire, folder=folder)
        # The key comes after the certificate: for a moment they do not match.
        between = {"PrefilldFilesRefused"}
        self.add("certificate", trouble, expires, (f"--tls_cert={certificate}", f"--tls_key={key}"), between)
        source = self.add("source", faults.send_again, {"PrefilldKvDamaged"})
        self.proxy = faults.DamagingProxy(source.address)
        worker = partial(Server, bin_dir / "prefilld-decode-worker")
        damaged = worker("damaged", folder, f"--prefill_address={self.proxy.address}")
        self.cases.append(Case(damaged, faults.receive_damaged, {"PrefilldKvDamaged", "PrefilldTransfersFail"}))
        place, environment = self.faults_of("deaf_worker")
        deaf = worker("deaf_worker", folder, environment=environment)
        trouble = partial(faults.be_deaf, faults=place)
        self.cases.append(Case(deaf, trouble, {"PrefilldDeaf", "PrefilldOutOfDescriptors"}))

    def add(self, name: str, trouble, expected: set[str], flags=(), also=frozenset(), environment=None) -> Server:
        server = Server(self._bin_dir / "prefilld", name, self._folder, "--max_prompt_tokens=2048",
                        "--crossover_tokens=1024", *flags, environment=environment)  # fmt: skip
        self.cases.append(Case(server, trouble, expected, set(also)))
        return server

    def add_faulty(self, name: str, trouble, expected: set[str], flags=(), also=frozenset()) -> None:
        """The trouble is a fault of the process itself."""
        folder, environment = self.faults_of(name)
        self.add(name, partial(trouble, faults=folder), expected, flags, also, environment)

    def faults_of(self, name: str) -> tuple[Path, dict]:
        """Returns a folder that faults are put into, and the environment of a process that has them."""
        folder = self._folder / f"{name}.faults"
        folder.mkdir()
        return folder, {"LD_PRELOAD": str(self._preloaded), "PREFILLD_TEST_FAULTS": str(folder)}


class Alerts(unittest.TestCase):
    def test_every_alert_fires_for_its_reason_and_clears(self):
        folder = self.enterContext(temporary_folder())
        all_cases = Cases(BIN_DIR, PRELOADED_FAULTS, folder)
        self.enterContext(all_cases.proxy)
        cases = all_cases.cases
        servers = [case.server for case in cases]
        rules = scaled(RULES, FACTOR)
        expected = {(name, case.server.instance) for case in cases for name in case.expected}
        named = {rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
        self.assertEqual({name for name, _ in expected} | {"PrefilldAbsent"}, named, "each alert has its case")
        allowed = expected | {(name, case.server.instance) for case in cases for name in case.also}

        with running(servers):
            lonely = self.enterContext(Prometheus(folder / "lonely", [], rules))
            prometheus = self.enterContext(Prometheus(folder / "prometheus", servers, rules))
            stop, errors = threading.Event(), []

            def run(case: Case) -> None:
                try:
                    case.trouble(case.server, stop)
                except Exception as error:  # noqa: BLE001: a thread's failure is the test's
                    errors.append(f"{case.server.instance}: {error!r}")

            begin = time.monotonic()
            self.wait_until_all_scraped(prometheus, servers)
            self.assertEqual(prometheus.firing(), set(), "before there is any trouble")
            threads = [threading.Thread(target=run, args=(case,)) for case in cases]
            for thread in threads:
                thread.start()
            try:
                fired = self.gather(lambda: prometheus.firing(), expected, begin)
                fired |= self.gather(lambda: lonely.firing(), {("PrefilldAbsent", "")}, begin)
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            self.assertEqual(errors, [])
            self.assertEqual(fired - allowed - {("PrefilldAbsent", "")}, set(), "alerts without a reason")

            for server in servers:
                if server.process.poll() is not None:
                    server.start()
            self.wait_until_clear(prometheus)

    def wait_until_all_scraped(self, prometheus: Prometheus, servers: list[Server]) -> None:
        deadline = time.monotonic() + FIRE_SECONDS
        while len(prometheus.query("up == 1")) < len(servers):
            self.assertLess(time.monotonic(), deadline, "not all servers are scraped")
            time.sleep(0.2)

    def gather(self, firing, expected: set, begin: float) -> set:
        """Waits until all that is expected has fired; returns everything that did."""
        fired = set()
        deadline = time.monotonic() + FIRE_SECONDS
        while not expected <= fired:
            for alert in sorted(firing() - fired):
                print(f"{time.monotonic() - begin:5.1f} s  {alert[0]} fires at {alert[1] or 'nobody'}", flush=True)
                fired.add(alert)
            self.assertLess(time.monotonic(), deadline, f"did not fire: {sorted(expected - fired)}")
            time.sleep(0.2)
        return fired

    def wait_until_clear(self, prometheus: Prometheus) -> None:
        begin = time.monotonic()
        while left := prometheus.firing():
            self.assertLess(time.monotonic() - begin, CLEAR_SECONDS, f"still fire: {sorted(left)}")
            time.sleep(0.2)
        print(f"all clear {time.monotonic() - begin:.1f} s after the last trouble", flush=True)


if __name__ == "__main__":
    PRELOADED_FAULTS = Path(sys.argv.pop()).resolve()
    BIN_DIR = Path(sys.argv.pop()).resolve()
    unittest.main()
