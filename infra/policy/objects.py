"""Rules for Kubernetes objects: images, limits, rights, where pods may land, and how many GPUs they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from infra.policy.kube import GPU, Nodes, Pods, api_group, may_land, metadata, named, nodes, pods, workload_kind
from infra.policy.nouns import UNKNOWN, Book, Context, Fault, Recorded, Severity, at, entry, holds, listed, says

DEVICE_AGENTS = ("k8s-device-plugin", "dcgm-exporter")  # parts of their images' names
CLUSTER_WIDE = frozenset(
    {
        "APIService",
        "ClusterQueue",
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "MutatingWebhookConfiguration",
        "Namespace",
        "PersistentVolume",
        "PriorityClass",
        "ResourceFlavor",
        "RuntimeClass",
        "StorageClass",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
        "ValidatingWebhookConfiguration",
        "VolumeSnapshotClass",
        "WorkloadPriorityClass",
    }
)
REGISTRY = ".azurecr.io"
INTERNAL = "service.beta.kubernetes.io/azure-load-balancer-internal"
ENFORCE = "pod-security.kubernetes.io/enforce"
SCRAPED = ("PodMonitor", "ServiceMonitor")
MANAGED_GROUP = "azmonitoring.coreos.com"
INSTANCE = "app.kubernetes.io/instance"

objects = Book("objects")


def is_device_agent(pod: Pods) -> bool:
    """Whether pods are the device plugin or the GPU exporter, which reach into the machine by their nature."""
    return any(part in image for image in pod.images for part in DEVICE_AGENTS)


def _of_containers(
    name: str, what: str, severity: Severity, *answers: str
) -> Callable[[Callable[[Pods, Mapping[str, Any]], str | None]], Callable[[Pods, Mapping[str, Any]], str | None]]:
    """A rule over each container of each pod: the sentence says what the container does."""

    def add(
        function: Callable[[Pods, Mapping[str, Any]], str | None],
    ) -> Callable[[Pods, Mapping[str, Any]], str | None]:
        def faults(resources: Sequence[Recorded], _: Context) -> list[Fault]:
            return [
                (pod.resource, f"its container {at(container, 'name')} {sentence}")
                for pod in pods(resources)
                for container in pod.containers
                if (sentence := function(pod, container))
            ]

        objects.over(name, what, severity, *answers)(faults)
        return function

    return add


@_of_containers("image-pinned", "images are pinned by a version or a digest", "high", "021f8078")
def image_pinned(_: Pods, container: Mapping[str, Any]) -> str | None:
    image = at(container, "image")
    if image == UNKNOWN or "@sha256:" in str(image):
        return None
    tag = str(image).rpartition("/")[2].partition(":")[2]
    if tag and tag != "latest":
        return None
    return f"runs whatever {image or 'its image'} is on that day: pin a version"


@objects.over("image-of-the-plan", "images are the plan's, or from the stack's own registry", "medium", "febd0533")
def image_of_the_plan(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    known = set(context.lock.platform.images.values())
    return [
        (pod.resource, f"{image} is not among the plan's images: plan it, or push it to the stack's registry")
        for pod in pods(resources)
        for image in pod.images
        if image not in known and UNKNOWN not in image and REGISTRY not in image.partition("/")[0]
    ]


@_of_containers(
    "resources-stated",
    "containers say what CPU and memory they need, and what memory they may take",
    "medium",
    "e345eecc",
    "03a4ecdb",
)
def resources_stated(_: Pods, container: Mapping[str, Any]) -> str | None:
    missing = [
        path
        for path in ("requests.cpu", "requests.memory", "limits.memory")
        if at(container, f"resources.{path}") is None
    ]
    return f"does not say its {' and '.join(missing)}: state them" if missing else None


@_of_containers("no-escalation", "no container gains rights, or is privileged", "high", "1c6e92c9", "95edb821")
def no_escalation(_: Pods, container: Mapping[str, Any]) -> str | None:
    if not says(at(container, "securityContext.privileged"), None, False):
        return "is privileged, which is the machine itself: set privileged to false"
    if not says(at(container, "securityContext.allowPrivilegeEscalation"), False):
        return "may gain rights: set allowPrivilegeEscalation to false"
    return None


@_of_containers("capabilities-dropped", "containers keep none of root's capabilities", "medium")
def capabilities_dropped(_: Pods, container: Mapping[str, Any]) -> str | None:
    capabilities = at(container, "securityContext.capabilities")
    added = [one for one in listed(at(capabilities, "add")) if one not in (UNKNOWN, "NET_BIND_SERVICE")]
    if added:
        return f"has the capabilities {', '.join(map(str, added))}: take them out"
    if not any(says(one, "ALL") for one in listed(at(capabilities, "drop"))):
        return "keeps some of root's capabilities: drop ALL"
    return None


@_of_containers("not-root", "no container runs as root", "high")
def not_root(pod: Pods, container: Mapping[str, Any]) -> str | None:
    for path in ("runAsNonRoot", "runAsUser"):
        own = at(container, f"securityContext.{path}")
        value = at(pod.spec, f"securityContext.{path}") if own is None else own
        if (path == "runAsNonRoot" and not says(value, True)) or (path == "runAsUser" and value == 0):
            return "may run as root: set runAsNonRoot to true, and a runAsUser that is not 0"
    return None


@_of_containers("seccomp", "containers may make only the system calls that programs need", "medium")
def seccomp(pod: Pods, container: Mapping[str, Any]) -> str | None:
    own = at(container, "securityContext.seccompProfile.type")
    value = at(pod.spec, "securityContext.seccompProfile.type") if own is None else own
    if says(value, "RuntimeDefault", "Localhost"):
        return None
    return "may make any system call: set seccompProfile to RuntimeDefault"


@objects.over("no-default-namespace", "objects live in a namespace of their own", "medium", "9f061a12")
def no_default_namespace(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (one, "it lives in the default namespace: name another in its metadata")
        for one in resources
        if (kind := workload_kind(one))
        and kind not in CLUSTER_WIDE
        and at(metadata(one), "namespace") in (None, "", "default")
    ]


@objects.over("no-host-namespaces", "pods do not share processes or network with the machine", "high", "47a1ee2f")
def no_host_namespaces(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (pod.resource, f"its pods share the machine's: take {path} out")
        for pod in pods(resources)
        for path in ("hostPID", "hostIPC", "hostNetwork")
        if not says(at(pod.spec, path), None, False)
    ]


@objects.over("no-host-paths", "pods do not mount folders of the machine", "medium")
def no_host_paths(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (pod.resource, f"its pods mount {at(volume, 'hostPath.path')} of the machine: use a volume")
        for pod in pods(resources)
        for volume in listed(at(pod.spec, "volumes"))
        if at(volume, "hostPath") not in (None, UNKNOWN)
    ]


@objects.over("service-inside", "no service has a public address", "high", "3fc4dc25")
def service_inside(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    found: list[Fault] = []
    for one in resources:
        if workload_kind(one) != "Service":
            continue
        kind = at(one.inputs, "spec.type")
        inside = says(entry(at(metadata(one), "annotations"), INTERNAL), "true")
        if kind == "LoadBalancer" and not inside:
            found.append((one, f'it gets a public address: annotate it with {INTERNAL}: "true"'))
        elif kind == "NodePort" or [ip for ip in listed(at(one.inputs, "spec.externalIPs")) if ip != UNKNOWN]:
            found.append((one, "it opens a port of every machine: make it a ClusterIP"))
    return found


@objects.over("no-secrets-in-objects", "secrets come from the vault, not from objects", "high")
def no_secrets_in_objects(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    found: list[Fault] = []
    for one in resources:
        if workload_kind(one) != "Secret":
            continue
        for part in ("data", "stringData"):
            entries = at(one.inputs, part)
            plain = [k for k, v in entries.items() if v != UNKNOWN] if isinstance(entries, dict) else []
            if plain:
                found.append((one, f"{', '.join(plain)} lies in it in plain text: mount it from the vault"))
    return found


@objects.over("budget-allows-drain", "a disruption budget does not keep a machine from being drained", "medium")
def budget_allows_drain(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    found: list[Fault] = []
    for one in resources:
        if workload_kind(one) != "PodDisruptionBudget":
            continue
        wanted = at(one.inputs, "spec.selector.matchLabels")
        space = at(metadata(one), "namespace") or "default"
        guarded = [
            pod
            for pod in pods(resources)
            if pod.namespace == space
            and isinstance(wanted, Mapping)
            and all(says(pod.labels.get(key), value) for key, value in wanted.items())
        ]
        counts = [pod.replicas for pod in guarded if pod.replicas is not None]
        if guarded and len(counts) == len(guarded) and sum(counts) <= 1:
            found.append((one, "with a single pod it blocks every upgrade of its machine: take it out"))
    return found


@objects.over("pod-security", "every namespace says what its pods may do to the machine", "high")
def pod_security(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    found: list[Fault] = []
    for one in resources:
        if workload_kind(one) != "Namespace":
            continue
        level = entry(at(metadata(one), "labels"), ENFORCE)
        if not says(level, "restricted", "baseline"):
            found.append((one, f"its pods may be {level or 'anything'}: label it {ENFORCE}: restricted"))
    return found


@objects.over("deny-first", "nobody reaches a pod, and it reaches nobody, but by a policy that says so", "medium")
def deny_first(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    """Of every namespace with pods: a NetworkPolicy for all of them, both ways."""
    closed = {
        at(metadata(one), "namespace")
        for one in resources
        if workload_kind(one) == "NetworkPolicy"
        and at(one.inputs, "spec.podSelector") in ({}, UNKNOWN)
        and all(holds(at(one.inputs, "spec.policyTypes"), way) for way in ("Ingress", "Egress"))
    }
    lived_in = {pod.namespace for pod in pods(resources)}
    return [
        (one, "its pods talk to whomever they like: add a NetworkPolicy for all of them, Ingress and Egress")
        for one in resources
        if workload_kind(one) == "Namespace" and named(one) in lived_in and not closed & {named(one), UNKNOWN}
    ]


@objects.over("stops-in-time", "a server that must stop has the time to finish what it answers", "medium")
def stops_in_time(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    """preStop + --shutdown-timeout < terminationGracePeriodSeconds, which is 30 where nobody says."""
    found: list[Fault] = []
    for pod in pods(resources):
        grace = at(pod.spec, "terminationGracePeriodSeconds")
        grace = 30 if grace is None else grace
        for container in pod.containers:
            before = at(container, "lifecycle.preStop.sleep.seconds") or 0
            for word in listed(at(container, "args")):
                flag, _sign, seconds = str(word).partition("=")
                if flag != "--shutdown-timeout" or not seconds.isdigit() or UNKNOWN in (grace, before):
                    continue
                if int(grace) <= int(before) + int(seconds):
                    sentence = f"it is killed after {grace} s and wants {before} + {seconds} s to stop: give it more"
                    found.append((pod.resource, sentence))
    return found


@objects.over("no-cluster-token", "pods have no key to the cluster's API unless they are an identity", "medium")
def no_cluster_token(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    """A pod's own word counts before its service account's; workload identity mounts a token of its own."""
    accounts = {
        (at(metadata(one), "namespace") or "default", named(one)): at(one.inputs, "automountServiceAccountToken")
        for one in resources
        if workload_kind(one) == "ServiceAccount"
    }
    found: list[Fault] = []
    for pod in pods(resources):
        mounted = at(pod.spec, "automountServiceAccountToken")
        if mounted is None:
            mounted = accounts.get((pod.namespace, str(at(pod.spec, "serviceAccountName") or "default")))
        if not says(mounted, False):
            found.append((pod.resource, "its pods can call the cluster: set automountServiceAccountToken to false"))
    return found


@objects.over("pod-has-a-place", "there is a pool on which a pod may run", "high")
def pod_has_a_place(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    found: list[Fault] = []
    pools = nodes(resources, context)
    for pod in pods(resources):
        if not any(may_land(pod, pool) for pool in pools):
            found.append(
                (pod.resource, "no pool takes its pods: check selectors, tolerations and GPUs against the plan")
            )
    return found


def _gpu_pods(resources: Sequence[Recorded], context: Context) -> Iterator[tuple[Pods, list[Nodes]]]:
    """Pods that ask for GPUs, and of the plan's workloads those without, each with the pools where it may land."""
    pools = nodes(resources, context)
    own = {work.name for work in context.lock.workloads}
    wanted = (pod for pod in pods(resources) if pod.gpus or pod.labels.get(INSTANCE) in own)
    yield from ((pod, [pool for pool in pools if may_land(pod, pool)]) for pod in wanted)


@objects.over("gpu-pod-placed", "a GPU pod lands on the pools that the plan made for it, and on no other", "high")
def gpu_pod_placed(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    found: list[Fault] = []
    for pod, places in _gpu_pods(resources, context):
        planned = [place.planned for place in places if place.planned]
        workload = pod.labels.get(INSTANCE)
        if workload in {work.name for work in context.lock.workloads}:
            wanted = {pool.name for pool in context.lock.pools if workload in pool.workloads}
        else:
            wanted = {pool.name for pool in context.lock.pools if planned and pool.workloads == planned[0].workloads}
        got = {pool.name for pool in planned}
        if astray := sorted(got - wanted):
            found.append((pod.resource, f"its pods may land on {', '.join(astray)}, made for others: select its pools"))
        elif missing := sorted(wanted - got):
            found.append(
                (
                    pod.resource,
                    f"its pods cannot land on {', '.join(missing)}, made for them: select that pool and tolerate its"
                    " taints",
                )
            )
    return found


@objects.over("gpus-fit", "pods ask for no more GPUs than their pools can have", "high")
def gpus_fit(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    """GPUs of a pod x pods at once <= most machines of its largest pool x GPUs of one."""
    found: list[Fault] = []
    for pod, places in _gpu_pods(resources, context):
        room = max((place.planned.max_nodes * place.gpus for place in places if place.planned), default=0)
        asked = pod.gpus * (1 if pod.replicas is None else pod.replicas)
        if places and asked > room:
            found.append((pod.resource, f"its pods ask for {asked} GPUs at once and its pool has {room}: plan again"))
    return found


@objects.over("gpu-quota", "the cluster's quota of GPUs is what the pools can have", "medium")
def gpu_quota(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    """Of a namespace: most machines x GPUs of one, over all pools. Of a Kueue flavor: of the pool of that name."""
    room = {place.name: place.planned.max_nodes * place.gpus for place in nodes(resources, context) if place.planned}
    found: list[Fault] = []
    for one in resources:
        kind = workload_kind(one)
        if kind == "ResourceQuota":
            hard = at(one.inputs, "spec.hard")
            stated = hard.get(f"requests.{GPU}") if isinstance(hard, Mapping) else None
            if stated not in (None, UNKNOWN, str(sum(room.values()))) and stated != sum(room.values()):
                found.append((one, f"it allows {stated} GPUs and the pools have {sum(room.values())}: take the pools'"))
        elif kind == "ClusterQueue":
            for name, stated in _flavors(one):
                if name in room and stated not in (UNKNOWN, room[name], str(room[name])):
                    found.append((one, f"it allows {stated} GPUs of {name}, which has {room[name]}: take the pool's"))
    return found


def _flavors(queue: Recorded) -> Iterator[tuple[str, Any]]:
    """Kueue's GPU quota by flavor."""
    for group in listed(at(queue.inputs, "spec.resourceGroups")):
        for flavor in listed(at(group, "flavors")):
            for amount in listed(at(flavor, "resources")):
                if says(at(amount, "name"), GPU):
                    yield str(at(flavor, "name")), at(amount, "nominalQuota")


@objects.over(
    "device-agents-everywhere", "device plugin and GPU exporter run on every GPU machine, spot ones too", "high"
)
def device_agents_everywhere(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    found: list[Fault] = []
    for pod in pods(resources):
        if pod.kind == "DaemonSet" and is_device_agent(pod):
            missed = [place.name for place in nodes(resources, context) if place.gpus and not may_land(pod, place)]
            if missed:
                found.append((pod.resource, f"it does not run on {', '.join(missed)}: tolerate that pool's taints"))
    return found


@objects.over("scraped", "what is to be scraped is said in the group that AKS's managed Prometheus reads", "medium")
def scraped(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (one, f"managed Prometheus does not read {api_group(one)}: say it in {MANAGED_GROUP}/v1")
        for one in resources
        if workload_kind(one) in SCRAPED and not api_group(one).startswith(f"{MANAGED_GROUP}/")
    ]


RULES = tuple(objects.rules)
