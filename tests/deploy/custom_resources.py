"""The fields that we use of custom resources, which Kubernetes' own schemas do not cover."""

from __future__ import annotations

import jsonschema

TEXT = {"type": "string", "minLength": 1}
WHOLE = {"type": "integer", "minimum": 0}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
LABELS = {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string", "maxLength": 63}}


def of(required: str, **fields) -> dict:
    """Returns the schema of an object with these fields and no others; required: the names of those it must have."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def some(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


SPECS = {
    ("monitoring.coreos.com/v1", "PodMonitor"): of(
        "selector podMetricsEndpoints",
        jobLabel=TEXT,
        selector=of("matchLabels", matchLabels=LABELS),
        podMetricsEndpoints=some(of("port", port=TEXT, path=TEXT, interval=TEXT, scrapeTimeout=TEXT, scheme=TEXT)),
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): of(
        "scaleTargetRef triggers",
        scaleTargetRef=of("name", name=TEXT, kind=TEXT, apiVersion=TEXT),
        pollingInterval=WHOLE,
        minReplicaCount=WHOLE,
        maxReplicaCount=WHOLE,
        triggers=some(
            of(
                "type metadata",
                type={"const": "prometheus"},
                metricType={"enum": ["AverageValue", "Value"]},
                # All of them are text.
                metadata=of(
                    "serverAddress query threshold",
                    serverAddress=TEXT,
                    query=TEXT,
                    threshold={"type": "string", "pattern": r"^\d+(\.\d+)?$"},
                    ignoreNullValues={"enum": ["true", "false"]},
                ),
            )
        ),
        # Its behavior is that of Kubernetes' own autoscaler, and is checked as such.
        advanced=of("", horizontalPodAutoscalerConfig=of("", behavior={"type": "object"})),
    ),
    ("cert-manager.io/v1", "Certificate"): of(
        "secretName issuerRef dnsNames",
        secretName=TEXT,
        issuerRef=of("name", name=TEXT, kind={"enum": ["Issuer", "ClusterIssuer"]}, group=TEXT),
        commonName=TEXT,
        dnsNames=some(TEXT),
        usages=some({"enum": ["digital signature", "key encipherment", "server auth", "client auth"]}),
        privateKey=of(
            "", algorithm={"enum": ["RSA", "ECDSA"]}, size=WHOLE, rotationPolicy={"enum": ["Never", "Always"]}
        ),
        duration=TEXT,
        renewBefore=TEXT,
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): of(
        "selector targetPorts endpointPickerRef",
        selector=of("matchLabels", matchLabels=LABELS),
        targetPorts={**some(of("number", number=PORT)), "maxItems": 8},
        endpointPickerRef=of(
            "name", name=TEXT, port=of("number", number=PORT), failureMode={"enum": ["FailOpen", "FailClose"]}
        ),
    ),
}


def is_custom(resource: dict) -> bool:
    return (resource["apiVersion"], resource["kind"]) in SPECS


def validate(resource: dict) -> None:
    """Raises jsonschema.ValidationError."""
    spec = SPECS[resource["apiVersion"], resource["kind"]]
    metadata = of("name", name=TEXT, labels=LABELS)
    whole = of("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec)
    jsonschema.validate(resource, whole)
