"""When pulumi-kubernetes counts an object as ready, and how long it waits for that.

Ten minutes, unless the resource option `customTimeouts` or the annotation `pulumi.com/timeoutSeconds` says otherwise;
not at all with `pulumi.com/skipAwait`; for other things with `pulumi.com/waitFor`.
TONNAGE_E2E_AWAIT_SECONDS caps every wait, so that a test of a wait in vain takes seconds.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from standin.cluster import ApiError, Cluster, Object, condition, is_true
from standin.objects import annotation, identifier

DEFAULT_S = 600.0
CAP = "TONNAGE_E2E_AWAIT_SECONDS"
_PAUSE_S = 0.2


class NotReady(Exception):
    """The object is there but did not become ready; the text says what is missing."""


def limit_s(obj: Mapping[str, Any], option_s: float) -> float:
    """How long to wait for an object, in seconds. Raises ValueError for an annotation that is no number."""
    text = annotation(obj, "timeoutSeconds")
    if text and not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise ValueError(f'the annotation pulumi.com/timeoutSeconds is {text!r}: write whole seconds, such as "1800"')
    limit = option_s or (float(text) if text else DEFAULT_S)
    cap = os.environ.get(CAP)
    return min(limit, float(cap)) if cap else limit


def until_ready(cluster: Cluster, obj: Object, seconds: float, cancelled: threading.Event) -> Object:
    """The live object once it is ready. Raises NotReady."""
    checks = _wanted(obj)
    until = time.monotonic() + seconds
    while True:
        live = cluster.get(obj["apiVersion"], obj["kind"], obj["metadata"]["name"], obj["metadata"].get("namespace"))
        if live is None:
            raise NotReady(f"{obj['kind']} {identifier(obj)} was deleted while it was waited for")
        missing = next((text for check in checks for text in [check(cluster, live)] if text), "")
        if not missing:
            return live
        if cancelled.is_set():
            raise NotReady(f"the wait was cancelled: {missing}")
        if time.monotonic() > until:
            raise NotReady(f"timed out after {seconds:g} s: {missing}")
        time.sleep(_PAUSE_S)


def until_gone(cluster: Cluster, obj: Object, seconds: float, cancelled: threading.Event) -> None:
    """Returns once the object is deleted. Raises NotReady."""
    until = time.monotonic() + seconds
    while True:
        live = cluster.get(obj["apiVersion"], obj["kind"], obj["metadata"]["name"], obj["metadata"].get("namespace"))
        if live is None:
            return
        if cancelled.is_set() or time.monotonic() > until:
            held = ", ".join(live["metadata"].get("finalizers") or ()) or "nothing that it names"
            raise NotReady(f"{obj['kind']} {identifier(obj)} is being deleted but still there, held by {held}")
        time.sleep(_PAUSE_S)


def check_wait_for(obj: Mapping[str, Any]) -> None:
    """Raises ValueError for an annotation `pulumi.com/waitFor` that is not understood."""
    _wait_for(annotation(obj, "waitFor"))


Check = Callable[[Cluster, Object], str]


def _wanted(obj: Object) -> tuple[Check, ...]:
    if annotation(obj, "skipAwait") == "true":
        return ()
    if annotation(obj, "waitFor"):
        return _wait_for(annotation(obj, "waitFor"))
    check = _CHECKS.get((obj["apiVersion"], obj["kind"]))
    return (check,) if check else ()


def _wait_for(text: str) -> tuple[Check, ...]:
    """`condition=Ready`, `jsonpath={.status.phase}=Running`, or a JSON list of such."""
    if not text:
        return ()
    expressions = json.loads(text) if text.startswith("[") else [text]
    return tuple(_expression(str(expression)) for expression in expressions)


def _expression(text: str) -> Check:
    kind, _, rest = text.partition("=")
    if kind == "condition" and rest:
        name, _, value = rest.partition("=")
        wanted = (value or "True").lower()

        def by_condition(_: Cluster, live: Object) -> str:
            found = str(condition(live, name).get("status", "")).lower()
            return "" if found == wanted else f"condition {name} is {found or 'not set'}"

        return by_condition
    match = re.fullmatch(r"\{\.([A-Za-z0-9_.\[\]-]+)\}(?:=(.*))?", rest)
    if kind == "jsonpath" and match is not None:
        keys = [part for part in re.split(r"[.\[\]]+", match[1]) if part]

        def by_path(_: Cluster, live: Object) -> str:
            found = _at(live, keys)
            fits = found is not None and (match[2] is None or str(found) == match[2])
            return "" if fits else f"{rest} is {found!r}"

        return by_path
    raise ValueError(f"the annotation pulumi.com/waitFor has {text!r}: write condition=NAME or jsonpath={{.a.b}}=VALUE")


def _at(value: Any, keys: list[str]) -> Any:
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def _behind(live: Object) -> str:
    """Says so where the controller has not seen the newest version yet."""
    seen = (live.get("status") or {}).get("observedGeneration", 0)
    return "" if seen >= live["metadata"].get("generation", 0) else "the controller has not seen the newest version"


def _deployment(cluster: Cluster, live: Object) -> str:
    status, wanted = live.get("status") or {}, live["spec"].get("replicas", 1)
    progressing = condition(live, "Progressing")
    if progressing.get("reason") == "ProgressDeadlineExceeded":
        raise NotReady(f"the Deployment exceeded its progress deadline: {_pods(cluster, live)}")
    if _behind(live):
        return _behind(live)
    updated, available = status.get("updatedReplicas", 0), status.get("availableReplicas", 0)
    rolled = updated >= wanted and available >= wanted and status.get("replicas", 0) <= updated
    if rolled and is_true(live, "Available"):
        return ""
    return f"{available} of {wanted} replicas are available, {updated} updated: {_pods(cluster, live)}"


def _stateful_set(cluster: Cluster, live: Object) -> str:
    status, wanted = live.get("status") or {}, live["spec"].get("replicas", 1)
    ready = status.get("readyReplicas", 0)
    if not _behind(live) and ready >= wanted and status.get("currentRevision") == status.get("updateRevision"):
        return ""
    return _behind(live) or f"{ready} of {wanted} replicas are ready: {_pods(cluster, live)}"


def _daemon_set(cluster: Cluster, live: Object) -> str:
    status = live.get("status") or {}
    wanted, updated = status.get("desiredNumberScheduled", 0), status.get("updatedNumberScheduled", 0)
    available = status.get("numberAvailable", 0)
    if not _behind(live) and updated >= wanted and available >= wanted:
        return ""
    return _behind(live) or f"{available} of {wanted} pods are available: {_pods(cluster, live)}"


def _job(cluster: Cluster, live: Object) -> str:
    failed = condition(live, "Failed")
    if failed.get("status") == "True":
        raise NotReady(f"the Job failed: {failed.get('reason', '')} {failed.get('message', '')}".rstrip())
    if is_true(live, "Complete"):
        return ""
    return f"the Job is not complete: {_pods(cluster, live)}"


def _pod(cluster: Cluster, live: Object) -> str:
    phase = (live.get("status") or {}).get("phase")
    if phase == "Failed":
        raise NotReady("the Pod failed")
    return "" if phase == "Succeeded" or is_true(live, "Ready") else f"the Pod is {phase}: {_why_waiting(live)}"


def _service(cluster: Cluster, live: Object) -> str:
    spec = live["spec"]
    if spec.get("type") == "ExternalName" or spec.get("clusterIP") == "None" or not spec.get("selector"):
        return ""
    if spec.get("type") == "LoadBalancer" and not _at(live, ["status", "loadBalancer", "ingress"]):
        return "the load balancer has no address yet"
    selector = f"kubernetes.io/service-name={live['metadata']['name']}"
    slices = cluster.list("discovery.k8s.io/v1", "EndpointSlice", live["metadata"]["namespace"], labelSelector=selector)
    endpoints = [endpoint for item in slices for endpoint in item.get("endpoints") or ()]
    if any((endpoint.get("conditions") or {}).get("ready") for endpoint in endpoints):
        return ""
    return "no pod that is ready stands behind the Service"


def _claim(cluster: Cluster, live: Object) -> str:
    phase = (live.get("status") or {}).get("phase")
    if phase == "Bound":
        return ""
    name = live["spec"].get("storageClassName")
    found = cluster.get("storage.k8s.io/v1", "StorageClass", name) if name else None
    if found is not None and found.get("volumeBindingMode") == "WaitForFirstConsumer":
        return ""
    return f"the claim is {phase}, not Bound"


def _definition(_: Cluster, live: Object) -> str:
    return "" if is_true(live, "Established") else "the definition is not established"


_CHECKS: Mapping[tuple[str, str], Check] = {
    ("apps/v1", "Deployment"): _deployment,
    ("apps/v1", "StatefulSet"): _stateful_set,
    ("apps/v1", "DaemonSet"): _daemon_set,
    ("batch/v1", "Job"): _job,
    ("v1", "Pod"): _pod,
    ("v1", "Service"): _service,
    ("v1", "PersistentVolumeClaim"): _claim,
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition"): _definition,
}


def _pods(cluster: Cluster, live: Object) -> str:
    """The pods of a workload that do not run, with the reason."""
    labels = ((live["spec"].get("selector") or {}).get("matchLabels")) or {}
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    if not selector:
        return "it names no pods"
    try:
        found = cluster.list("v1", "Pod", live["metadata"]["namespace"], labelSelector=selector)
    except ApiError as error:
        return f"its pods cannot be listed ({error})"
    waiting = [f"[Pod {identifier(pod)}] {_why_waiting(pod)}" for pod in found if not is_true(pod, "Ready")]
    return "; ".join(waiting) or f"{len(found)} pods, none waits"


def _why_waiting(pod: Object) -> str:
    unscheduled = condition(pod, "PodScheduled")
    if unscheduled.get("status") == "False":
        return f"{unscheduled.get('reason', '')}: {unscheduled.get('message', '')}"
    return str((pod.get("status") or {}).get("phase"))
