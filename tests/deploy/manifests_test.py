"""Tests that the Kubernetes manifests are valid, and agree with each other and with the programs they start."""

import copy
import json
import pathlib
import re
import shutil
import subprocess
import sys
import unittest

import kubernetes_validate
import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import kustomize  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
KUSTOMIZATIONS = ["deploy/kubernetes/base", "deploy/kubernetes/overlays/cpu"]
KUBERNETES_VERSIONS = ["1.30.0", "1.37.0"]  # the oldest we say we need, the newest with a schema
OPTIONS = {"prefilld": "server/options.cc", "prefilld-decode-worker": "client/decode_worker/options.cc"}

# The API schemas do not cover the Prometheus operator. These are the fields of a ServiceMonitor that we use.
SERVICE_MONITOR_FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"selector", "endpoints", "namespaceSelector", "jobLabel", "targetLabels"},
    "endpoint": {"port", "path", "interval", "scrapeTimeout", "scheme", "honorLabels"},
}


def check_service_monitor(resource):
    endpoints = resource["spec"]["endpoints"]
    for place, value in [("", resource), ("spec", resource["spec"]), *[("endpoint", e) for e in endpoints]]:
        unknown = set(value) - SERVICE_MONITOR_FIELDS[place]
        if unknown:
            raise ValueError(f"ServiceMonitor {place}: unknown {sorted(unknown)}")
    if not endpoints or not all("port" in endpoint for endpoint in endpoints):
        raise ValueError("ServiceMonitor: every endpoint names a port of the Service")


def validate(resource):
    if resource["kind"] == "ServiceMonitor":
        check_service_monitor(resource)
        return
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(resource, version, strict=True)


def of_kind(resources, kind):
    return [resource for resource in resources if resource["kind"] == kind]


def pod_of(deployment):
    return deployment["spec"]["template"]["spec"]


def selects(selector, deployment):
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    return selector.items() <= labels.items()


def flag_value(container, name):
    for argument in container["args"]:
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    return None


class Manifests(unittest.TestCase):
    @staticmethod
    def for_each_kustomization():
        return [kustomize.render(ROOT / folder) for folder in KUSTOMIZATIONS]

    def test_every_field_is_in_the_kubernetes_api(self):
        for resources in self.for_each_kustomization():
            self.assertGreaterEqual(len(resources), 5)
            for resource in resources:
                with self.subTest(f"{resource['kind']}/{resource['metadata']['name']}"):
                    validate(resource)

    def test_a_misspelt_field_is_refused(self):
        for resource in kustomize.render(ROOT / KUSTOMIZATIONS[0]):
            misspelt = copy.deepcopy(resource)
            misspelt["spec"]["selectr"] = {}
            with self.subTest(resource["kind"]), self.assertRaises(Exception):
                validate(misspelt)

    def test_misspelt_fields_deep_in_a_pod_are_refused(self):
        deployment = of_kind(kustomize.render(ROOT / KUSTOMIZATIONS[0]), "Deployment")[0]
        for place in [
            lambda pod: pod["containers"][0]["livenessProbe"]["grpc"],
            lambda pod: pod["containers"][0]["securityContext"],
            lambda pod: pod["volumes"][0],
        ]:
            misspelt = copy.deepcopy(deployment)
            place(pod_of(misspelt))["servce"] = "x"
            with self.assertRaises(kubernetes_validate.ValidationError):
                validate(misspelt)

    @unittest.skipUnless(shutil.which("kubectl"), "kubectl is not installed")
    def test_kubectl_renders_the_same(self):
        for folder in KUSTOMIZATIONS:
            rendered = subprocess.run(
                ["kubectl", "kustomize", ROOT / folder], check=True, capture_output=True, text=True
            ).stdout
            theirs = {kustomize.identity(r): r for r in yaml.safe_load_all(rendered)}
            ours = {kustomize.identity(r): r for r in kustomize.render(ROOT / folder)}
            self.assertEqual(json.dumps(comparable(theirs)), json.dumps(comparable(ours)))

    def test_services_and_budgets_select_a_deployment(self):
        for resources in self.for_each_kustomization():
            deployments = of_kind(resources, "Deployment")
            for service in of_kind(resources, "Service"):
                targets = [d for d in deployments if selects(service["spec"]["selector"], d)]
                self.assertEqual(len(targets), 1, service["metadata"]["name"])
                names = {p["name"] for c in pod_of(targets[0])["containers"] for p in c["ports"]}
                self.assertLessEqual({p["targetPort"] for p in service["spec"]["ports"]}, names)
            for budget in of_kind(resources, "PodDisruptionBudget"):
                self.assertTrue(any(selects(budget["spec"]["selector"]["matchLabels"], d) for d in deployments))

    def test_the_service_monitor_scrapes_every_program(self):
        resources = kustomize.render(ROOT / KUSTOMIZATIONS[0])
        (monitor,) = of_kind(resources, "ServiceMonitor")
        wanted = monitor["spec"]["selector"]["matchLabels"]
        services = [s for s in of_kind(resources, "Service") if wanted.items() <= s["metadata"]["labels"].items()]
        for deployment in of_kind(resources, "Deployment"):
            with self.subTest(deployment["metadata"]["name"]):
                (service,) = [s for s in services if selects(s["spec"]["selector"], deployment)]
                ports = {p["name"] for p in service["spec"]["ports"]}
                self.assertLessEqual({e["port"] for e in monitor["spec"]["endpoints"]}, ports)

    def test_every_port_is_one_that_the_program_listens_on(self):
        for resources in self.for_each_kustomization():
            for deployment in of_kind(resources, "Deployment"):
                (container,) = pod_of(deployment)["containers"]
                flags = {"grpc": "listen", "metrics": "metrics_listen"}
                self.assertEqual({port["name"] for port in container["ports"]}, set(flags))
                for port in container["ports"]:
                    with self.subTest(f"{deployment['metadata']['name']} {port['name']}"):
                        listens = flag_value(container, flags[port["name"]]) or ""
                        self.assertEqual(listens, f"0.0.0.0:{port['containerPort']}")

    def test_pods_run_without_privileges(self):
        for resources in self.for_each_kustomization():
            for deployment in of_kind(resources, "Deployment"):
                self.assertTrue(pod_of(deployment)["securityContext"]["runAsNonRoot"])
                for container in pod_of(deployment)["containers"]:
                    context = container["securityContext"]
                    self.assertFalse(context["allowPrivilegeEscalation"])
                    self.assertTrue(context["readOnlyRootFilesystem"])
                    self.assertEqual(context["capabilities"], {"drop": ["ALL"]})

    def test_every_mount_has_its_volume(self):
        for resources in self.for_each_kustomization():
            for deployment in of_kind(resources, "Deployment"):
                volumes = {v["name"] for v in pod_of(deployment).get("volumes", [])}
                for container in pod_of(deployment)["containers"]:
                    self.assertEqual({m["name"] for m in container.get("volumeMounts", [])}, volumes)

    def test_the_grace_period_covers_the_drain(self):
        for resources in self.for_each_kustomization():
            (prefill,) = [d for d in of_kind(resources, "Deployment") if d["metadata"]["name"] == "prefilld"]
            container = pod_of(prefill)["containers"][0]
            pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            drain = int(flag_value(container, "drain_timeout_s"))
            self.assertGreater(pod_of(prefill)["terminationGracePeriodSeconds"], pre_stop + drain)

    def test_every_flag_is_one_of_the_program(self):
        for resources in self.for_each_kustomization():
            for deployment in of_kind(resources, "Deployment"):
                for container in pod_of(deployment)["containers"]:
                    (program,) = container["command"]
                    source = (ROOT / OPTIONS[program]).read_text(encoding="utf-8")
                    for argument in container["args"]:
                        name = re.fullmatch(r"--([a-z_]+)=.+", argument).group(1)
                        self.assertRegex(source, rf"ABSL_FLAG\(\s*[^\n]*[ >]{name},", f"{program} has no flag --{name}")

    def test_the_decode_worker_finds_the_prefill_service(self):
        for resources in self.for_each_kustomization():
            (decode,) = [d for d in of_kind(resources, "Deployment") if "decode" in d["metadata"]["name"]]
            host, port = flag_value(pod_of(decode)["containers"][0], "prefill_address").rsplit(":", 1)
            (service,) = [s for s in of_kind(resources, "Service") if s["metadata"]["name"] == host]
            self.assertIn(int(port), [p["port"] for p in service["spec"]["ports"]])


def comparable(resources):
    """Makes two renderings comparable: kubectl sorts keys and resources, and we do not."""
    return sorted(json.dumps(resource, sort_keys=True) for resource in resources.values())


if __name__ == "__main__":
    unittest.main()
