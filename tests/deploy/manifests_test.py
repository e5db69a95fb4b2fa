"""Tests that the Kubernetes manifests render, are valid, and agree with each other.

live_manifests_test.py compares them with the programs.
"""

import copy
import functools
import os
import re
import sys
import tempfile
import unittest
from pathlib import Path

import custom_resources
import jsonschema
import kubernetes_validate
import yaml
from rendering import (KUBERNETES, KUSTOMIZATIONS, OLDEST_KUSTOMIZE, ROOT, containers_of, flag_value, kustomize_version,
                       of_kind, of_the_environment, on_the_path, pod_of, program_of, render, render_text)  # fmt: skip

KUBERNETES_VERSIONS = ["1.30.0", "1.33.0", "1.37.0"]  # the oldest we say we need, to the newest with a schema
OVERLAYS = {folder.name: folder for folder in KUSTOMIZATIONS}
INVALID = (kubernetes_validate.ValidationError, jsonschema.ValidationError)
SECONDS = {"s": 1, "h": 3600}
RULES = KUBERNETES.parent / "alerts" / "prefilld.rules.yaml"
# A program may take so long after a drain that ran out. prefilld's are 5 s for requests that are cut off, 5 s each
# for connections and the memory of frames, 2 s for files that hang, and a little.
LAST_S = {"prefilld": 20, "prefilld-decode-worker": 10, "prefilld-gateway": 10}


def validate(resource):
    if custom_resources.is_custom(resource):
        custom_resources.validate(resource)
        if resource["kind"] == "ScaledObject":
            validate(autoscaler_of(resource))
        return
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(resource, version, strict=True)


def autoscaler_of(scaled_object):
    """Returns the HorizontalPodAutoscaler that KEDA makes of its own resource, without the metrics."""
    spec = scaled_object["spec"]
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "keda-hpa-" + scaled_object["metadata"]["name"]},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", **spec["scaleTargetRef"]},
            "minReplicas": spec["minReplicaCount"],
            "maxReplicas": spec["maxReplicaCount"],
            "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        },
    }


def selects(selector, deployment):
    return selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def named(resources, name):
    (resource,) = [r for r in resources if r["metadata"]["name"] == name]
    return resource


def by_name(resources):
    """Makes renderings comparable: the order of resources differs between versions."""
    return {(r["apiVersion"], r["kind"], r["metadata"]["name"]): r for r in resources}


def for_each_overlay(test):
    """Runs a test with the resources of each overlay, and with its deployments among them."""

    @functools.wraps(test)
    def run(self):
        for name, folder in OVERLAYS.items():
            with self.subTest(name):
                resources = render(folder)
                test(self, resources, of_kind(resources, "Deployment"))

    return run


class Rendering(unittest.TestCase):
    def test_there_is_an_overlay_for_each_use(self):
        self.assertEqual(set(OVERLAYS), {"base", "cpu", "tls", "hpa", "keda", "gateway", "vllm"})

    @unittest.skipUnless(on_the_path(), "the machine has no kubectl of its own")
    def test_another_kubectl_renders_the_same(self):
        version = kustomize_version(on_the_path())
        for folder in KUSTOMIZATIONS:
            with self.subTest(folder.name, kustomize=version):
                if version[0] < OLDEST_KUSTOMIZE and folder.name != "base":
                    # Debian 12's knows no components, and has patches of another form. The base needs neither.
                    self.assertRaises(RuntimeError, render_text, folder, on_the_path())
                    continue
                theirs = yaml.safe_load_all(render_text(folder, on_the_path()))
                self.assertEqual(by_name(theirs), by_name(render(folder)))

    def test_nothing_deprecated_is_used(self):
        for folder in KUSTOMIZATIONS:
            text = (folder / "kustomization.yaml").read_text(encoding="utf-8")
            for old in ("patchesStrategicMerge", "patchesJson6902", "commonLabels", "bases:", "vars:"):
                self.assertNotIn(old, text, folder.name)

    def test_components_combine(self):
        """An overlay of somebody's own: on CPUs, with TLS, scaled."""
        with tempfile.TemporaryDirectory() as own:
            where = {name: os.path.relpath(KUBERNETES / name, os.path.realpath(own))
                     for name in ("overlays/cpu", "components/tls", "components/hpa")}  # fmt: skip
            document = {"resources": [where.pop("overlays/cpu")], "components": list(where.values())}
            (Path(own) / "kustomization.yaml").write_text(yaml.safe_dump(document))
            resources = render(Path(own))
        prefill = named(of_kind(resources, "Deployment"), "prefilld")
        self.assertEqual(flag_value(pod_of(prefill)["containers"][0], "device"), "cpu")
        self.assertEqual(flag_value(pod_of(prefill)["containers"][0], "tls_cert"), "/tls/tls.crt")
        self.assertEqual([v["name"] for v in pod_of(prefill)["volumes"]], ["tls"])
        self.assertEqual(len(of_kind(resources, "HorizontalPodAutoscaler")), 1)


class Validity(unittest.TestCase):
    def test_every_field_is_in_the_api(self):
        for name, folder in OVERLAYS.items():
            resources = render(folder)
            self.assertGreaterEqual(len(resources), 5)
            for resource in resources:
                with self.subTest(f"{name}: {resource['kind']}/{resource['metadata']['name']}"):
                    validate(resource)

    def test_a_misspelt_field_is_refused(self):
        kinds = {r["kind"]: r for folder in KUSTOMIZATIONS for r in render(folder)}
        self.assertGreaterEqual(set(kinds), {"PodMonitor", "ScaledObject", "Certificate", "InferencePool"})
        for kind, resource in kinds.items():
            misspelt = copy.deepcopy(resource)
            misspelt["data" if kind == "ConfigMap" else "spec"]["selectr"] = {}
            with self.subTest(kind), self.assertRaises(INVALID):
                validate(misspelt)

    def test_misspelt_fields_deep_inside_are_refused(self):
        deployment = of_kind(render(OVERLAYS["base"]), "Deployment")[0]
        scaled, = of_kind(render(OVERLAYS["keda"]), "ScaledObject")
        for resource, place in [
            (deployment, lambda r: pod_of(r)["containers"][0]["livenessProbe"]["grpc"]),
            (deployment, lambda r: pod_of(r)["containers"][0]["securityContext"]),
            (deployment, lambda r: pod_of(r)["volumes"][0]),
            (scaled, lambda r: autoscaler_of(r) and r["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]),
            (scaled, lambda r: r["spec"]["triggers"][0]["metadata"]),
        ]:
            misspelt = copy.deepcopy(resource)
            place(misspelt)["servce"] = "x"
            with self.assertRaises(INVALID):
                validate(misspelt)


class Agreement(unittest.TestCase):
    @for_each_overlay
    def test_services_budgets_and_policies_select_a_deployment(self, resources, deployments):
        for service in of_kind(resources, "Service"):
            (target,) = [d for d in deployments if selects(service["spec"]["selector"], d)]
            # Names of a sidecar's ports are no targets.
            ports = {p["name"] for c in pod_of(target)["containers"] for p in c["ports"]}
            ports |= {p["containerPort"] for c in containers_of(target) for p in c["ports"]}
            self.assertLessEqual({p["targetPort"] for p in service["spec"]["ports"]}, ports)
        for budget in of_kind(resources, "PodDisruptionBudget"):
            self.assertTrue(any(selects(budget["spec"]["selector"]["matchLabels"], d) for d in deployments))
        for policy in of_kind(resources, "NetworkPolicy"):
            (target,) = [d for d in deployments if selects(policy["spec"]["podSelector"]["matchLabels"], d)]
            names = {p["name"] for c in containers_of(target) for p in c["ports"]}
            opened = {p["port"] for rule in policy["spec"]["ingress"] for p in rule["ports"]}
            self.assertLessEqual(opened, names)

    @for_each_overlay
    def test_the_network_policy_lets_decoders_in(self, resources, deployments):
        policy = named(of_kind(resources, "NetworkPolicy"), "prefilld")
        allowed = [f["podSelector"]["matchLabels"] for rule in policy["spec"]["ingress"] for f in rule["from"]
                   if rule["ports"][0]["port"] == "grpc"]  # fmt: skip
        decoders = [d for d in deployments if d["metadata"]["name"] != "prefilld"]
        self.assertTrue(decoders)
        for decoder in decoders:
            self.assertTrue(any(selects(labels, decoder) for labels in allowed))

    @for_each_overlay
    def test_every_program_has_a_policy_that_shows_its_metrics_to_the_monitoring_alone(self, resources, deployments):
        for deployment in (d for d in deployments if any(program_of(c) for c in containers_of(d))):
            policies = [p for p in of_kind(resources, "NetworkPolicy")
                        if selects(p["spec"]["podSelector"]["matchLabels"], deployment)]  # fmt: skip
            rules = [r for p in policies for r in p["spec"]["ingress"] if "metrics" in [o["port"] for o in r["ports"]]]
            (rule,) = rules
            self.assertEqual(rule["ports"], [{"port": "metrics", "protocol": "TCP"}])
            named_space = {"kubernetes.io/metadata.name": "monitoring"}
            self.assertEqual(rule["from"], [{"namespaceSelector": {"matchLabels": named_space}}])

    @for_each_overlay
    def test_policies_let_requests_and_pushes_through_at_both_ends(self, resources, deployments):
        ends = {}
        for deployment in (d for d in deployments if any(program_of(c) for c in containers_of(d))):
            for policy in of_kind(resources, "NetworkPolicy"):
                if selects(policy["spec"]["podSelector"]["matchLabels"], deployment):
                    ends.setdefault(deployment["metadata"]["name"], (deployment, policy))
        if len(ends) < 2:
            return
        for caller, called in (("prefilld", "prefilld-decode-worker"), ("prefilld-decode-worker", "prefilld")):
            (source, leaves), (target, takes) = ends[caller], ends[called]
            ports = {p["name"]: p["containerPort"] for c in containers_of(target) for p in c["ports"]}
            self.assertTrue([1 for rule in leaves["spec"]["egress"] if rule["ports"][0]["port"] == ports["grpc"]
                             and any(selects(to["podSelector"]["matchLabels"], target) for to in rule["to"])])  # fmt: skip
            self.assertTrue([1 for rule in takes["spec"]["ingress"] if rule["ports"][0]["port"] == "grpc"
                             and any(selects(f["podSelector"]["matchLabels"], source) for f in rule["from"])])  # fmt: skip

    @for_each_overlay
    def test_names_are_looked_up_at_pods_and_at_the_cache_of_the_node(self, resources, _):
        for policy in (p for p in of_kind(resources, "NetworkPolicy") if "Egress" in p["spec"]["policyTypes"]):
            (rule,) = [r for r in policy["spec"]["egress"] if 53 in [p["port"] for p in r["ports"]]]
            self.assertEqual({p["protocol"] for p in rule["ports"]}, {"TCP", "UDP"})
            self.assertIn({"ipBlock": {"cidr": "169.254.20.10/32"}}, rule["to"])
            self.assertIn("k8s-app", [k for to in rule["to"] for k in to.get("podSelector", {}).get("matchLabels", {})])

    @for_each_overlay
    def test_the_guide_names_the_labels_that_let_pods_in(self, resources, deployments):
        guide = (ROOT / "deploy" / "kubernetes" / "README.md").read_text()
        for policy in of_kind(resources, "NetworkPolicy"):
            for source in (f for rule in policy["spec"]["ingress"] for f in rule["from"] if f.get("podSelector")):
                labels = source["podSelector"]["matchLabels"]
                if not any(selects(labels, deployment) for deployment in deployments):
                    for name, value in labels.items():
                        self.assertIn(f'`{name}: "{value}"`', guide)

    @for_each_overlay
    def test_every_program_is_scraped_once_as_the_job_that_alerts_and_keda_ask_for(self, resources, deployments):
        monitors = of_kind(resources, "PodMonitor")
        if not monitors:
            return
        asked = set(re.findall(r'job=~?"([^"]*)"', RULES.read_text() + str(of_kind(resources, "ScaledObject"))))
        jobs = {job for alternatives in asked for job in alternatives.split("|")}
        for deployment in deployments:
            labels = deployment["spec"]["template"]["metadata"]["labels"]
            places = {p["name"] for c in containers_of(deployment) for p in c["ports"]}
            (scraped,) = [(m, e) for m in monitors for e in m["spec"]["podMetricsEndpoints"]
                          if selects(m["spec"]["selector"]["matchLabels"], deployment) and e["port"] in places]  # fmt: skip
            job = labels[scraped[0]["spec"]["jobLabel"]]
            self.assertEqual(job, deployment["metadata"]["name"])
            if any(program_of(c) for c in containers_of(deployment)):
                self.assertIn(job, jobs)

    @for_each_overlay
    def test_every_port_is_one_that_the_program_listens_on(self, _, deployments):
        for container in (c for d in deployments for c in containers_of(d) if program_of(c)):
            http = {"http": "listen"} if program_of(container) == "prefilld-gateway" else None
            flags = http or {"grpc": "listen", "metrics": "metrics_listen"}
            self.assertEqual({port["name"] for port in container["ports"]}, set(flags))
            for port in container["ports"]:
                listens = flag_value(container, flags[port["name"]])
                self.assertEqual(listens, f"0.0.0.0:{port['containerPort']}", container["name"])

    @for_each_overlay
    def test_probes_ask_a_port_of_the_container(self, _, deployments):
        for container in (c for d in deployments for c in pod_of(d)["containers"]):
            ports = {p["name"] for p in container["ports"]} | {p["containerPort"] for p in container["ports"]}
            for kind in ("readinessProbe", "livenessProbe"):
                probe = container[kind]
                asked = next((probe[how]["port"] for how in ("grpc", "httpGet", "tcpSocket") if how in probe), None)
                if asked is None:
                    (address,) = re.findall(r"--server=localhost:(\d+)", " ".join(probe["exec"]["command"]))
                    asked = int(address)
                self.assertIn(asked, ports, f"{container['name']} {kind}")

    @for_each_overlay
    def test_pods_run_without_privileges(self, resources, deployments):
        for deployment in deployments:
            self.assertTrue(pod_of(deployment)["securityContext"]["runAsNonRoot"])
            self.assertFalse(pod_of(deployment)["automountServiceAccountToken"])
            for container in containers_of(deployment):
                context = container["securityContext"]
                self.assertFalse(context["allowPrivilegeEscalation"])
                self.assertTrue(context["readOnlyRootFilesystem"])
                self.assertEqual(context["capabilities"], {"drop": ["ALL"]})
                self.assertIn("memory", container["resources"]["limits"])

    @for_each_overlay
    def test_every_mount_has_its_volume(self, _, deployments):
        for deployment in deployments:
            volumes = {v["name"] for v in pod_of(deployment).get("volumes") or []}
            mounts = [m for c in containers_of(deployment) for m in c.get("volumeMounts") or []]
            self.assertEqual({m["name"] for m in mounts}, volumes)
            self.assertFalse([m for m in mounts if "subPath" in m])  # such a file never changes

    @for_each_overlay
    def test_the_grace_period_covers_the_drain(self, _, deployments):
        for deployment in deployments:
            ours = [c for c in containers_of(deployment) if program_of(c)]
            self.assertEqual(bool(ours), deployment["metadata"]["name"] != "vllm-decode")
            for container in ours:
                pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
                drain = int(flag_value(container, "drain_timeout_s"))
                needed = pre_stop + drain + LAST_S[program_of(container)]
                self.assertGreaterEqual(pod_of(deployment)["terminationGracePeriodSeconds"], needed)

    @for_each_overlay
    def test_the_decode_worker_finds_the_prefill_service(self, resources, deployments):
        text = str(deployments)
        addresses = set(re.findall(r"prefill_address(?:=|\": \")(\w[\w.-]*):(\d+)", text))
        for host, port in addresses:
            service = named(of_kind(resources, "Service"), host)
            self.assertIn(int(port), [p["port"] for p in service["spec"]["ports"]])
        self.assertEqual(len(addresses), 0 if "--kv-connector" in text else 1)

    def test_scaling_down_waits_for_drains(self):
        for name in ("hpa", "keda"):
            resources = render(OVERLAYS[name])
            prefill = named(of_kind(resources, "Deployment"), "prefilld")
            self.assertNotIn("replicas", prefill["spec"])  # every apply would set it again
            grace = pod_of(prefill)["terminationGracePeriodSeconds"]
            (scaler,) = of_kind(resources, "HorizontalPodAutoscaler", "ScaledObject")
            scaler = scaler if name == "hpa" else autoscaler_of(scaler)
            self.assertEqual(scaler["spec"]["scaleTargetRef"]["name"], "prefilld")
            self.assertGreaterEqual(scaler["spec"]["minReplicas"], 1)
            down = scaler["spec"]["behavior"]["scaleDown"]
            (policy,) = down["policies"]
            self.assertEqual(policy["value"], 1)
            self.assertGreater(policy["periodSeconds"], grace)
            self.assertGreater(down["stabilizationWindowSeconds"], grace)

    def test_hpa_and_keda_scale_alike(self):
        (hpa,) = of_kind(render(OVERLAYS["hpa"]), "HorizontalPodAutoscaler")
        (keda,) = of_kind(render(OVERLAYS["keda"]), "ScaledObject")
        for field in ("behavior", "minReplicas", "maxReplicas"):
            self.assertEqual(hpa["spec"][field], autoscaler_of(keda)["spec"][field])
        target = hpa["spec"]["metrics"][0]["pods"]
        trigger = keda["spec"]["triggers"][0]["metadata"]
        self.assertEqual(target["target"]["averageValue"], trigger["threshold"])
        self.assertIn(target["metric"]["name"], trigger["query"])

    def test_certificates_fit_their_use(self):
        resources = render(OVERLAYS["tls"])
        for deployment in of_kind(resources, "Deployment"):
            name = deployment["metadata"]["name"]
            certificate = named(of_kind(resources, "Certificate"), name)
            (secret,) = [v["secret"] for v in pod_of(deployment)["volumes"] if v["name"] == "tls"]
            self.assertEqual(certificate["spec"]["secretName"], secret["secretName"])
            self.assertEqual(secret["defaultMode"], 0o440)
            self.assertEqual(pod_of(deployment)["securityContext"]["fsGroup"], 65532)
            self.assertGreaterEqual(set(certificate["spec"]["usages"]), {"server auth", "client auth"})
            # Callers use the Service's name, and probes this one.
            service = named(of_kind(resources, "Service"), name)
            self.assertIn(service["metadata"]["name"], certificate["spec"]["dnsNames"])
            container = pod_of(deployment)["containers"][0]
            self.assertIn(f"--tls_name={name}", container["readinessProbe"]["exec"]["command"])
            # An expired certificate must not end the pods.
            self.assertEqual(container["livenessProbe"]["httpGet"], {"path": "/live", "port": "metrics"})
            self.assertNotIn("exec", container["livenessProbe"])
            left = certificate["spec"]["renewBefore"]
            self.assertGreater(int(left[:-1]) * SECONDS[left[-1]], 14 * 86400)  # the programs warn from then on

    def test_the_pool_has_prefill_and_decode_pods(self):
        resources = render(OVERLAYS["gateway"])
        (pool,) = of_kind(resources, "InferencePool")
        (port,) = pool["spec"]["targetPorts"]
        roles = {}
        for deployment in of_kind(resources, "Deployment"):
            self.assertTrue(selects(pool["spec"]["selector"]["matchLabels"], deployment))
            self.assertIn(port["number"], [p["containerPort"] for c in containers_of(deployment) for p in c["ports"]])
            labels = deployment["spec"]["template"]["metadata"]["labels"]
            roles[labels["llm-d.ai/role"]] = labels["llm-d.ai/engine-type"]
        self.assertEqual(roles, {"prefill": "prefilld", "decode": "vllm"})
        (config,) = of_kind(resources, "ConfigMap")
        picker = yaml.safe_load(config["data"]["config.yaml"])
        plugins = {p.get("name", p["type"]): p.get("parameters", {}) for p in picker["plugins"]}
        for profile in picker["schedulingProfiles"]:
            self.assertLessEqual({p["pluginRef"] for p in profile["plugins"]}, set(plugins))
        self.assertEqual([e["name"] for e in plugins["core-metrics-extractor"]["engineConfigs"]], ["prefilld"])


if __name__ == "__main__":
    print(f"kustomize {kustomize_version(of_the_environment())}, the machine's own: "
          f"{kustomize_version(on_the_path()) if on_the_path() else 'none'}", file=sys.stderr)  # fmt: skip
    unittest.main()
