"""The control plane, the pretended pools, and the kubernetes stand-in, all against real processes."""

import base64
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from control_plane import EXPANDER, ControlPlane, control_plane
from google.protobuf import empty_pb2
from google.rpc import status_pb2
from pools import Pool, node_of, pool_of
from pulumi.runtime.proto import provider_pb2, provider_pb2_grpc
from standin.cluster import ApiError, condition, is_true
from standin.kubernetes import MANAGER, KubernetesProvider
from standin.waiting import CAP
from standin.wire import UNKNOWN, is_secret, secret, to_plain, to_struct
from tools import Engines

from planner.errors import PlannerError

pytestmark = pytest.mark.e2e

REGION = "swedencentral"
# Standard_NC24ads_A100_v4: one A100, 24 vCPUs, 220 GiB (Azure's size table).
SPOT = {
    "agentPoolName": "gpuspot",
    "vmSize": "Standard_NC24ads_A100_v4",
    "scaleSetPriority": "Spot",
    "enableAutoScaling": True,
    "minCount": 0,
    "maxCount": 1,
    "count": 0,
    "nodeTaints": ["sku=gpu:NoSchedule"],
    "nodeLabels": {"tonnage.dev/role": "serve"},
    "osDiskSizeGB": 256,
}
ON_DEMAND = {key: value for key, value in SPOT.items() if key != "scaleSetPriority"} | {"agentPoolName": "gpu"}
SYSTEM = {
    "name": "system",
    "vmSize": "Standard_D4ds_v5",
    "count": 1,
    "mode": "System",
    "nodeTaints": ["CriticalAddonsOnly=true:NoSchedule"],
}
TOLERATIONS = [
    {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
]
GPU_SELECTOR = {"kubernetes.azure.com/accelerator": "nvidia"}
NAMESPACE = "case"
MADE = (
    ("apps/v1", "Deployment"),
    ("apps/v1", "DaemonSet"),
    ("batch/v1", "Job"),
    ("v1", "Pod"),
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
)
CANARY = "hf_canary_5b1f0c7e"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, programs: Engines) -> Iterator[ControlPlane]:
    with control_plane(tmp_path_factory.mktemp("plane"), programs=programs) as plane:
        plane.cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        yield plane


@pytest.fixture
def plane(running: ControlPlane) -> Iterator[ControlPlane]:
    yield running
    running.autoscale([])
    running.unavailable.clear()
    # One namespace for all: to delete one takes the controller ten seconds.
    for api_version, kind in MADE:
        for obj in running.cluster.list(api_version, kind, NAMESPACE):
            if obj["metadata"]["name"] != "kube-root-ca.crt":
                running.cluster.delete(obj, grace_s=0)
    running.wait_for(lambda: not running.pods(NAMESPACE), 30, "the pods to go")
    for node in running.nodes():
        running.cluster.delete(node)


def pools(*profiles: dict[str, Any]) -> list[Pool]:
    return [pool_of(profile, region=REGION) for profile in profiles]


def device_plugin() -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "nvidia-device-plugin", "namespace": NAMESPACE},
        "spec": {
            "selector": {"matchLabels": {"name": "nvidia-device-plugin"}},
            "template": {
                "metadata": {"labels": {"name": "nvidia-device-plugin"}},
                "spec": {
                    "tolerations": TOLERATIONS,
                    "nodeSelector": GPU_SELECTOR,
                    "containers": [
                        {
                            "name": "plugin",
                            "image": "nvcr.io/nvidia/k8s-device-plugin:v0.18.0",
                            "volumeMounts": [{"name": "sockets", "mountPath": "/var/lib/kubelet/device-plugins"}],
                        }
                    ],
                    "volumes": [{"name": "sockets", "hostPath": {"path": "/var/lib/kubelet/device-plugins"}}],
                },
            },
        },
    }


def gpu_spec(**more: Any) -> dict[str, Any]:
    container = {"name": "main", "image": "vllm/vllm-openai:v0.18.0", "resources": {"limits": {"nvidia.com/gpu": 1}}}
    return {"tolerations": TOLERATIONS, "nodeSelector": GPU_SELECTOR, "containers": [container]} | more


def server(replicas: int = 1) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "vllm", "namespace": NAMESPACE},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "vllm"}},
            "template": {"metadata": {"labels": {"app": "vllm"}}, "spec": gpu_spec()},
        },
    }


def training() -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "train", "namespace": NAMESPACE},
        "spec": {
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
            },
            "template": {"metadata": {"labels": {"app": "train"}}, "spec": gpu_spec(restartPolicy="Never")},
        },
    }


def prefer_spot() -> dict[str, Any]:
    priorities = "20:\n  - .*gpuspot.*\n10:\n  - .*\n"
    metadata = {"name": EXPANDER, "namespace": "kube-system"}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"priorities": priorities}}


def on_pool(plane: ControlPlane, labels: str, pool: str) -> dict[str, Any] | None:
    """The running pod of those labels when it is on that pool."""
    found = [pod for pod in plane.pods(NAMESPACE, labels) if pod["status"]["phase"] == "Running"]
    return next((pod for pod in found if is_true(pod, "Ready") and plane.pool_of_pod(pod) == pool), None)


def unschedulable(plane: ControlPlane, labels: str) -> str:
    pods = plane.pods(NAMESPACE, labels)
    return next((str(condition(pod, "PodScheduled").get("message", "")) for pod in pods), "")


def job_status(plane: ControlPlane) -> dict[str, Any]:
    job = plane.cluster.get("batch/v1", "Job", "train", NAMESPACE)
    assert job is not None
    return dict(job["status"])


# --- pools, scheduling, eviction ---


def test_a_node_has_what_aks_gives_it_and_no_gpu_of_its_own() -> None:
    node = node_of(pools(SPOT)[0], 7)
    assert node["metadata"]["name"] == "aks-gpuspot-12345678-vmss000007"
    labels = node["metadata"]["labels"]
    assert labels["kubernetes.azure.com/agentpool"] == "gpuspot"
    assert labels["kubernetes.azure.com/accelerator"] == "nvidia"
    assert labels["kubernetes.azure.com/scalesetpriority"] == "spot"
    assert labels["tonnage.dev/role"] == "serve"
    assert labels["node.kubernetes.io/instance-type"] == "Standard_NC24ads_A100_v4"
    taints = {f"{taint['key']}={taint['value']}:{taint['effect']}" for taint in node["spec"]["taints"]}
    assert taints == {"sku=gpu:NoSchedule", "kubernetes.azure.com/scalesetpriority=spot:NoSchedule"}
    # 24 vCPUs less the 260 millicores that AKS keeps from 16 cores on; no nvidia.com/gpu before the device plugin.
    assert node["status"]["allocatable"]["cpu"] == "23740m"
    assert "nvidia.com/gpu" not in node["status"]["allocatable"]


def test_a_pool_may_not_use_the_labels_that_aks_keeps_for_itself() -> None:
    with pytest.raises(PlannerError, match=r"kubernetes\.azure\.com/role"):
        node_of(pools(SPOT | {"nodeLabels": {"kubernetes.azure.com/role": "x"}})[0], 0)


def test_a_gpu_pod_runs_only_on_the_tainted_pool_that_it_tolerates(plane: ControlPlane) -> None:
    plane.autoscale(pools(SYSTEM, ON_DEMAND))
    plane.cluster.create(device_plugin())
    plane.cluster.create(server())
    plane.wait_for(lambda: on_pool(plane, "app=vllm", "gpu"), 30, "the server on the GPU pool")
    intolerant = {"containers": [{"name": "main", "image": "busybox:1.37"}]}
    metadata = {"name": "plain", "namespace": NAMESPACE, "labels": {"app": "plain"}}
    plane.cluster.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": intolerant})
    message = plane.wait_for(lambda: unschedulable(plane, "app=plain"), 30, "the scheduler's word")
    assert "untolerated taint" in message


def test_no_gpu_pod_is_scheduled_before_the_device_plugin_runs(plane: ControlPlane) -> None:
    plane.autoscale(pools(ON_DEMAND))
    plane.cluster.create(server())
    plane.wait_for(lambda: plane.nodes("gpu"), 30, "the node")
    message = plane.wait_for(
        lambda: text if "Insufficient nvidia.com/gpu" in (text := unschedulable(plane, "app=vllm")) else "",
        30,
        "the scheduler to miss the GPU",
    )
    assert message.startswith("0/1 nodes are available")
    # The pool grows by one node only: what is missing is the plugin, not a machine.
    assert len(plane.nodes("gpu")) == 1
    plane.cluster.create(device_plugin())
    plane.wait_for(lambda: on_pool(plane, "app=vllm", "gpu"), 30, "the server once GPUs are registered")


def test_a_pool_does_not_grow_beyond_its_maximum(plane: ControlPlane) -> None:
    plane.autoscale(pools(ON_DEMAND))
    plane.cluster.create(device_plugin())
    plane.cluster.create(server(replicas=2))
    plane.wait_for(lambda: on_pool(plane, "app=vllm", "gpu"), 30, "the first replica")
    waiting = plane.wait_for(
        lambda: [
            pod for pod in plane.pods(NAMESPACE, "app=vllm") if condition(pod, "PodScheduled")["status"] == "False"
        ],
        30,
        "the second replica to wait",
    )
    assert "Insufficient nvidia.com/gpu" in condition(waiting[0], "PodScheduled")["message"]
    assert len(plane.nodes("gpu")) == 1


@pytest.mark.parametrize("notice", [True, False], ids=["drained", "machine gone"])
def test_evicted_spot_work_goes_to_the_fallback_and_spends_no_failure_budget(plane: ControlPlane, notice: bool) -> None:
    """backoffLimit is 0: one counted failure would end the Job."""
    spot, fallback = SPOT | {"maxCount": 2}, ON_DEMAND | {"maxCount": 2}
    plane.cluster.apply(prefer_spot(), manager="test")
    plane.autoscale(pools(fallback, spot))
    for obj in (device_plugin(), server(), training()):
        plane.cluster.create(obj)
    on_spot = [
        plane.wait_for(functools.partial(on_pool, plane, labels, "gpuspot"), 30, f"{labels} on spot")
        for labels in ("app=vllm", "app=train")
    ]
    assert plane.nodes("gpu") == []
    plane.unavailable.add("gpuspot")
    for pod in on_spot:
        plane.evict_spot(pod["spec"]["nodeName"], notice=notice)
    seconds = 30 if notice else 120  # the garbage collector's quarantine of 40 s, its period of 20 s
    plane.wait_for(lambda: on_pool(plane, "app=vllm", "gpu"), seconds, "the server on the fallback")
    again = plane.wait_for(lambda: on_pool(plane, "app=train", "gpu"), seconds, "the Job's pod on the fallback")
    assert job_status(plane).get("failed", 0) == 0
    plane.finish_pod(again["metadata"]["name"], 0, namespace=NAMESPACE)
    plane.wait_for(lambda: job_status(plane).get("succeeded") == 1, 30, "the Job to complete")


def test_a_failure_of_its_own_spends_the_jobs_budget(plane: ControlPlane) -> None:
    plane.autoscale(pools(ON_DEMAND))
    plane.cluster.create(device_plugin())
    plane.cluster.create(training())
    pod = plane.wait_for(lambda: on_pool(plane, "app=train", "gpu"), 30, "the Job's pod")
    plane.finish_pod(pod["metadata"]["name"], 1, namespace=NAMESPACE)
    reason = plane.wait_for(lambda: condition({"status": job_status(plane)}, "Failed").get("reason"), 30, "failure")
    assert reason == "BackoffLimitExceeded"


def test_only_spot_nodes_can_be_evicted(plane: ControlPlane) -> None:
    name = plane.add_node(pools(ON_DEMAND)[0])
    with pytest.raises(ValueError, match="not a spot node"):
        plane.evict_spot(name)


def test_a_wait_in_vain_names_the_pods_and_why_they_wait(plane: ControlPlane) -> None:
    plane.cluster.create(server())
    plane.wait_for(lambda: unschedulable(plane, "app=vllm"), 30, "the scheduler's word")
    with pytest.raises(AssertionError, match=r"in vain for a node.*case/vllm-.*Pending.*no nodes available"):
        plane.wait_for(lambda: None, 0, "a node")


# --- admission ---


def test_pod_security_refuses_what_the_namespace_forbids(plane: ControlPlane) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = {"name": "restricted", "labels": labels}
    plane.cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    metadata = {"name": "root", "namespace": "restricted"}
    container = {"name": "main", "image": "busybox:1.37", "securityContext": {"privileged": True}}
    with pytest.raises(ApiError, match=r'violates PodSecurity "restricted:latest": privileged') as caught:
        plane.cluster.create(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}}
        )
    assert caught.value.status == 403


def test_scrape_objects_are_taken_in_azures_group_and_no_other(plane: ControlPlane) -> None:
    spec = {"selector": {"matchLabels": {"app": "vllm"}}, "podMetricsEndpoints": [{"port": "http"}]}
    monitor = {
        "apiVersion": "azmonitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "vllm", "namespace": NAMESPACE},
        "spec": spec,
    }
    plane.cluster.apply(monitor, manager="test")
    with pytest.raises(ApiError, match=r'no matches for kind "PodMonitor" in version "monitoring\.coreos\.com/v1"'):
        plane.cluster.apply(monitor | {"apiVersion": "monitoring.coreos.com/v1"}, manager="test")
    with pytest.raises(ApiError, match="field not declared in schema"):
        plane.cluster.apply(monitor | {"spec": spec | {"endpoints": []}}, manager="test")


def test_service_account_tokens_are_issued_by_the_issuer_that_was_asked_for(plane: ControlPlane) -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "server", "namespace": NAMESPACE}}
    plane.cluster.create(account)
    request = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"audiences": ["api://AzureADTokenExchange"]},
    }
    answer = plane.cluster.request("POST", plane.cluster.path_of(account, subresource="token"), body=request)
    claims = answer["status"]["token"].split(".")[1]
    decoded = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    assert decoded["iss"] == plane.issuer
    assert decoded["sub"] == f"system:serviceaccount:{NAMESPACE}:server"
    assert decoded["aud"] == ["api://AzureADTokenExchange"]


def test_no_process_outlives_a_test_that_is_killed(tmp_path: Path, running: ControlPlane) -> None:
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from control_plane import control_plane\n"
        "with control_plane(Path(sys.argv[2]), crds=()) as plane:\n"
        "    print('up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "plane")], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    try:
        with child.stdout:
            assert child.stdout.readline() == b"up\n"
        assert len(_processes_of(tmp_path)) == 5
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    until = time.monotonic() + 20
    while _processes_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert _processes_of(tmp_path) == []


def _processes_of(folder: Path) -> list[str]:
    """The command lines that name the folder, without the script's own: etcd, server, controllers, scheduler, KWOK."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(folder) in line and "import control_plane" not in line:
            found.append(line)
    return found


# --- the kubernetes stand-in ---


class Engine:
    """What Pulumi's engine does with a provider, over gRPC."""

    def __init__(self, stub: Any, kubeconfig: dict[str, Any], journal: Path) -> None:
        self.stub, self.kubeconfig, self.journal = stub, kubeconfig, journal

    def configure(self, kubeconfig: dict[str, Any] | None = None, **settings: str) -> None:
        text = yaml.safe_dump(kubeconfig or with_kubelogin(self.kubeconfig))
        args = to_struct({"kubeconfig": secret(text), **settings})
        self.stub.Configure(provider_pb2.ConfigureRequest(args=args, acceptSecrets=True))

    def check(self, token: str, news: dict[str, Any], olds: dict[str, Any] | None = None) -> Any:
        return self.stub.Check(
            provider_pb2.CheckRequest(
                urn=_urn(token),
                type=token,
                name="it",
                news=to_struct(news),
                olds=to_struct(olds or {}),
                randomSeed=b"abcd",
            )
        )

    def create(self, token: str, inputs: dict[str, Any], *, preview: bool = False) -> tuple[str, dict[str, Any]]:
        request = provider_pb2.CreateRequest(
            urn=_urn(token), type=token, name="it", properties=to_struct(inputs), preview=preview
        )
        answer = self.stub.Create(request)
        return answer.id, to_plain(answer.properties, keep_secrets=True)

    def diff(
        self, token: str, identity: str, old: dict[str, Any], new: dict[str, Any], outputs: dict[str, Any] | None = None
    ) -> Any:
        news, olds = to_struct(new), to_struct(outputs or {})
        return self.stub.Diff(
            provider_pb2.DiffRequest(
                urn=_urn(token), type=token, id=identity, old_inputs=to_struct(old), news=news, olds=olds
            )
        )

    def update(
        self, token: str, identity: str, outputs: dict[str, Any], new: dict[str, Any], *, preview: bool = False
    ) -> dict[str, Any]:
        request = provider_pb2.UpdateRequest(
            urn=_urn(token), type=token, id=identity, olds=to_struct(outputs), news=to_struct(new), preview=preview
        )
        return to_plain(self.stub.Update(request).properties, keep_secrets=True)

    def read(self, token: str, identity: str, inputs: dict[str, Any]) -> Any:
        return self.stub.Read(
            provider_pb2.ReadRequest(urn=_urn(token), type=token, id=identity, inputs=to_struct(inputs))
        )

    def delete(self, token: str, identity: str) -> None:
        self.stub.Delete(provider_pb2.DeleteRequest(urn=_urn(token), type=token, id=identity))


DEPLOYMENT, CONFIG_MAP, JOB = "kubernetes:apps/v1:Deployment", "kubernetes:core/v1:ConfigMap", "kubernetes:batch/v1:Job"
SECRET, NAMESPACE_TYPE = "kubernetes:core/v1:Secret", "kubernetes:core/v1:Namespace"
SAME, CHANGED = provider_pb2.DiffResponse.DIFF_NONE, provider_pb2.DiffResponse.DIFF_SOME


def _urn(token: str) -> str:
    return f"urn:pulumi:dev::tonnage::{token}::it"


def with_kubelogin(kubeconfig: dict[str, Any], login: str = "azurecli", server: str = "") -> dict[str, Any]:
    """The kubeconfig as AKS gives it: no token in it, but kubelogin to get one."""
    entry = dict(kubeconfig["clusters"][0]["cluster"])
    arguments = ["get-token", "--login", login, "--server-id", "6dae42f8-4368-4678-94ff-3960e28e3630"]
    command = {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": "kubelogin", "args": arguments}
    return kubeconfig | {
        "clusters": [{"name": "test", "cluster": entry | ({"server": server} if server else {})}],
        "users": [{"name": "admin", "user": {"exec": command}}],
    }


@pytest.fixture
def engine(plane: ControlPlane, tmp_path: Path) -> Iterator[Engine]:
    grpc_server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    provider = KubernetesProvider(plane.kubeconfig, tmp_path / "state.json")
    provider_pb2_grpc.add_ResourceProviderServicer_to_server(provider, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        found = Engine(provider_pb2_grpc.ResourceProviderStub(channel), plane.kubeconfig, provider.journal.path)
        found.stub.Handshake(provider_pb2.ProviderHandshakeRequest(engine_address="127.0.0.1:1"))
        found.configure()
        yield found
    grpc_server.stop(0).wait()
    provider.close()


def config_map(**data: str) -> dict[str, Any]:
    metadata = {"name": "settings", "namespace": NAMESPACE}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def skip_await(obj: dict[str, Any]) -> dict[str, Any]:
    return obj | {"metadata": obj["metadata"] | {"annotations": {"pulumi.com/skipAwait": "true"}}}


def test_a_deployment_is_made_awaited_found_unchanged_and_deleted(plane: ControlPlane, engine: Engine) -> None:
    plane.autoscale(pools(ON_DEMAND))
    plane.cluster.create(device_plugin())
    identity, outputs = engine.create(DEPLOYMENT, server())
    assert identity == "case/vllm"
    assert outputs["status"]["availableReplicas"] == 1
    assert outputs["__inputs"] == server()
    assert engine.diff(DEPLOYMENT, identity, server(), server(), outputs).changes == SAME
    engine.delete(DEPLOYMENT, identity)
    assert plane.cluster.get("apps/v1", "Deployment", "vllm", NAMESPACE) is None
    assert plane.pods(NAMESPACE, "app=vllm") == []


def test_server_side_apply_of_the_same_object_changes_nothing(plane: ControlPlane, engine: Engine) -> None:
    identity, outputs = engine.create(CONFIG_MAP, config_map(a="1"))
    again = engine.update(CONFIG_MAP, identity, outputs, config_map(a="1"))
    assert again["metadata"]["resourceVersion"] == outputs["metadata"]["resourceVersion"]


def test_a_changed_image_updates_and_a_changed_selector_replaces(plane: ControlPlane, engine: Engine) -> None:
    old = skip_await(server())
    identity, _ = engine.create(DEPLOYMENT, old)
    image = json.loads(json.dumps(old))
    image["spec"]["template"]["spec"]["containers"][0]["image"] = "vllm/vllm-openai:v0.19.0"
    answer = engine.diff(DEPLOYMENT, identity, old, image)
    assert list(answer.detailedDiff) == ["spec.template.spec.containers[0].image"]
    assert list(answer.replaces) == []
    selector = json.loads(json.dumps(old))
    selector["spec"]["selector"]["matchLabels"] = {"app": "other"}
    selector["spec"]["template"]["metadata"]["labels"] = {"app": "other"}
    answer = engine.diff(DEPLOYMENT, identity, old, selector)
    assert any(path.startswith("spec.selector") for path in answer.replaces)
    assert answer.deleteBeforeReplace


def test_a_jobs_template_and_a_config_maps_data_replace(plane: ControlPlane, engine: Engine) -> None:
    old = skip_await(training())
    identity, _ = engine.create(JOB, old)
    new = json.loads(json.dumps(old))
    new["spec"]["template"]["spec"]["containers"][0]["image"] = "vllm/vllm-openai:v0.19.0"
    assert list(engine.diff(JOB, identity, old, new).replaces) != []
    longer = json.loads(json.dumps(old))
    longer["spec"]["backoffLimit"] = 3
    answer = engine.diff(JOB, identity, old, longer)
    assert (list(answer.detailedDiff), list(answer.replaces)) == (["spec.backoffLimit"], [])
    identity, _ = engine.create(CONFIG_MAP, config_map(a="1"))
    assert list(engine.diff(CONFIG_MAP, identity, config_map(a="1"), config_map(a="2")).replaces) == ["data.a"]
    engine.configure(enableConfigMapMutable="true")
    assert list(engine.diff(CONFIG_MAP, identity, config_map(a="1"), config_map(a="2")).replaces) == []


def test_the_type_must_be_that_of_the_object(engine: Engine) -> None:
    failures = engine.check(CONFIG_MAP, config_map() | {"apiVersion": "core/v1"}).failures
    assert [(failure.property, failure.reason) for failure in failures] == [
        ("apiVersion", "is 'core/v1', but the resource's type says 'v1'")
    ]
    with pytest.raises(grpc.RpcError, match=r"helm\.sh"):
        engine.check("kubernetes:helm.sh/v4:Chart", {})


def test_a_name_is_made_up_once_and_a_namespace_filled_in(engine: Engine) -> None:
    nameless = {"apiVersion": "v1", "kind": "ConfigMap"}
    first = to_plain(engine.check(CONFIG_MAP, nameless).inputs)
    # The resource's name and the first four bytes of the engine's seed, "abcd", in hexadecimal.
    assert first["metadata"]["name"] == "it-61626364"
    assert first["metadata"]["namespace"] == "default"
    second = to_plain(engine.check(CONFIG_MAP, nameless, first).inputs)
    assert second["metadata"] == first["metadata"]
    cluster_wide = to_plain(engine.check(NAMESPACE_TYPE, {"apiVersion": "v1", "kind": "Namespace"}).inputs)
    assert "namespace" not in cluster_wide["metadata"]


def test_a_preview_makes_nothing_and_stands_unknown_values(plane: ControlPlane, engine: Engine) -> None:
    _, outputs = engine.create(CONFIG_MAP, config_map(a=UNKNOWN), preview=True)
    assert outputs["data"] == {"a": UNKNOWN}
    _, outputs = engine.create(DEPLOYMENT, server(), preview=True)
    assert outputs["spec"]["strategy"]["type"] == "RollingUpdate"  # the server's own default, by the dry run
    elsewhere = config_map(a="1")
    elsewhere["metadata"] = {"name": "settings", "namespace": "made-later"}
    engine.create(CONFIG_MAP, elsewhere, preview=True)
    assert plane.cluster.get("apps/v1", "Deployment", "vllm", NAMESPACE) is None
    identity, _ = engine.create(CONFIG_MAP, config_map(a="1"))
    assert engine.diff(CONFIG_MAP, identity, config_map(a="1"), config_map(a=UNKNOWN)).changes == CHANGED


def test_a_bad_object_is_refused_in_the_preview_already(engine: Engine) -> None:
    bad = server()
    bad["spec"]["replicaz"] = 2
    with pytest.raises(grpc.RpcError, match=r"\.spec\.replicaz: field not declared in schema"):
        engine.create(DEPLOYMENT, bad, preview=True)


@pytest.mark.parametrize(
    ("kubeconfig", "message"),
    [
        ({"login": "devicecode"}, "'devicecode', which waits for a person"),
        ({"server": "https://127.0.0.1:1"}, "https://127.0.0.1:1 does not answer"),
    ],
    ids=["devicecode", "other cluster"],
)
def test_a_kubeconfig_that_leads_nowhere_is_refused(engine: Engine, kubeconfig: dict[str, str], message: str) -> None:
    with pytest.raises(grpc.RpcError, match=message):
        engine.configure(with_kubelogin(engine.kubeconfig, **kubeconfig))


def test_a_kubeconfig_without_cluster_and_the_default_provider_are_refused(engine: Engine) -> None:
    with pytest.raises(grpc.RpcError, match="no configuration has been provided"):
        engine.configure({"apiVersion": "v1", "kind": "Config"})
    with pytest.raises(grpc.RpcError, match="give every resource the explicit provider"):
        engine.stub.Configure(provider_pb2.ConfigureRequest(args=to_struct({})))
    failures = engine.stub.CheckConfig(
        provider_pb2.CheckRequest(news=to_struct({"kubeconfig": "{}", "cluster_identifier": "x"}))
    ).failures
    assert {failure.property for failure in failures} == {"kubeconfig", "cluster_identifier"}


def test_only_the_cluster_identifier_replaces_the_provider(engine: Engine) -> None:
    def replaces(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
        request = provider_pb2.DiffRequest(old_inputs=to_struct(old), news=to_struct(new))
        return list(engine.stub.DiffConfig(request).replaces)

    here, there = (
        yaml.safe_dump(with_kubelogin(engine.kubeconfig, server=f"https://{host}:443")) for host in ("a.test", "b.test")
    )
    one = {"kubeconfig": here, "clusterIdentifier": "1"}
    assert replaces(one, one | {"kubeconfig": there}) == []
    assert replaces(one, one | {"clusterIdentifier": "2"}) == ["clusterIdentifier"]
    assert replaces({"kubeconfig": here}, {"kubeconfig": there}) == ["kubeconfig"]


def test_what_the_server_will_not_change_is_refused_in_the_preview_already(plane: ControlPlane, engine: Engine) -> None:
    """A DaemonSet's selector: the real provider has it in no list of replacements."""
    old = skip_await(device_plugin())
    identity, outputs = engine.create("kubernetes:apps/v1:DaemonSet", old)
    new = json.loads(json.dumps(old))
    new["spec"]["selector"]["matchLabels"]["name"] = new["spec"]["template"]["metadata"]["labels"]["name"] = "other"
    with pytest.raises(grpc.RpcError, match="field is immutable"):
        engine.update("kubernetes:apps/v1:DaemonSet", identity, outputs, new, preview=True)


def test_a_field_of_another_owner_is_a_conflict_unless_forced(plane: ControlPlane, engine: Engine) -> None:
    plane.cluster.apply(config_map(a="theirs"), manager="keda")
    engine.configure(upsertExistingObjects="true")
    with pytest.raises(grpc.RpcError, match=r'conflict with "keda".*\.data\.a'):
        engine.create(CONFIG_MAP, config_map(a="ours"))
    forced = config_map(a="ours")
    forced["metadata"]["annotations"] = {"pulumi.com/patchForce": "true"}
    _, outputs = engine.create(CONFIG_MAP, forced)
    assert outputs["data"] == {"a": "ours"}


def test_a_create_does_not_take_over_what_is_there(plane: ControlPlane, engine: Engine) -> None:
    plane.cluster.create(config_map(a="theirs"))
    with pytest.raises(grpc.RpcError, match="a ConfigMap of that name already exists"):
        engine.create(CONFIG_MAP, config_map(b="ours"))


def test_what_does_not_become_ready_keeps_its_state_and_is_finished_by_the_next_run(
    plane: ControlPlane, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CAP, "2")
    with pytest.raises(grpc.RpcError) as caught:
        engine.create(DEPLOYMENT, server())
    assert "'case/vllm' failed to fully initialize" in caught.value.details()
    assert "Unschedulable: no nodes available" in caught.value.details()
    carried = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    detail = provider_pb2.ErrorResourceInitFailed()
    assert status_pb2.Status.FromString(carried).details[0].Unpack(detail)
    assert detail.id == "case/vllm"
    monkeypatch.delenv(CAP)
    plane.autoscale(pools(ON_DEMAND))
    plane.cluster.create(device_plugin())
    outputs = engine.update(DEPLOYMENT, detail.id, to_plain(detail.properties), server())
    assert outputs["status"]["availableReplicas"] == 1


def test_a_cancelled_wait_leaves_the_object_and_its_state(engine: Engine) -> None:
    with futures.ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(engine.create, DEPLOYMENT, server())
        deadline = time.monotonic() + 20
        while not any('"Create"' in line for line in engine.journal.read_text().splitlines()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        engine.stub.Cancel(empty_pb2.Empty())
        with pytest.raises(grpc.RpcError, match="the wait was cancelled"):
            waiting.result(timeout=30)


def test_a_failed_job_is_an_error_and_skip_await_waits_for_nothing(plane: ControlPlane, engine: Engine) -> None:
    plane.autoscale(pools(ON_DEMAND))
    plane.cluster.create(device_plugin())
    with futures.ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(engine.create, JOB, training())
        pod = plane.wait_for(lambda: on_pool(plane, "app=train", "gpu"), 30, "the Job's pod")
        plane.finish_pod(pod["metadata"]["name"], 1, namespace=NAMESPACE)
        with pytest.raises(grpc.RpcError, match="the Job failed: BackoffLimitExceeded"):
            waiting.result(timeout=30)
    engine.delete(JOB, "case/train")
    _, outputs = engine.create(JOB, skip_await(training()))
    assert "succeeded" not in outputs["status"]


def test_a_refresh_without_changes_is_clean_and_one_with_drift_shows_it(plane: ControlPlane, engine: Engine) -> None:
    inputs = skip_await(server())
    # Half a core is written 500m by the server; the list of ports gets a protocol that the program did not set.
    inputs["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"] = {"cpu": "0.5"}
    inputs["spec"]["template"]["spec"]["containers"][0]["ports"] = [{"name": "http", "containerPort": 8000}]
    identity, outputs = engine.create(DEPLOYMENT, inputs)
    assert engine.diff(DEPLOYMENT, identity, inputs, inputs, outputs).changes == SAME
    assert to_plain(engine.read(DEPLOYMENT, identity, inputs).inputs) == inputs
    scaled = json.loads(json.dumps(inputs))
    scaled["spec"]["replicas"] = 3
    plane.cluster.apply(scaled, manager=MANAGER)
    drifted = to_plain(engine.read(DEPLOYMENT, identity, inputs).inputs)
    assert drifted["spec"]["replicas"] == 3
    assert list(engine.diff(DEPLOYMENT, identity, drifted, inputs).detailedDiff) == ["spec.replicas"]
    engine.delete(DEPLOYMENT, identity)
    assert engine.read(DEPLOYMENT, identity, inputs).id == ""


def test_a_secret_is_marked_in_every_output_and_shown_nowhere(engine: Engine) -> None:
    metadata = {"name": "hf", "namespace": NAMESPACE}
    inputs = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"token": CANARY}}
    identity, outputs = engine.create(SECRET, inputs)
    assert is_secret(outputs["data"])
    assert is_secret(outputs["__inputs"]["stringData"])
    read = engine.read(SECRET, identity, inputs)
    for shown in (to_plain(read.inputs, keep_secrets=True), to_plain(read.properties, keep_secrets=True), outputs):
        visible = json.dumps(_without_secrets(shown))
        assert CANARY not in visible
        assert base64.b64encode(CANARY.encode()).decode() not in visible
    # A label that is no label makes the server repeat it: marked as secret by the program, it is cut out.
    bad = config_map()
    bad["metadata"] = {"name": "bad", "namespace": NAMESPACE, "labels": {"token": secret(f"{CANARY} ")}}
    with pytest.raises(grpc.RpcError) as caught:
        engine.create(CONFIG_MAP, bad)
    assert "[secret]" in caught.value.details()
    assert CANARY not in caught.value.details()
    assert CANARY not in engine.journal.read_text()


def _without_secrets(value: Any) -> Any:
    if is_secret(value):
        return "[secret]"
    if isinstance(value, dict):
        return {key: _without_secrets(part) for key, part in value.items()}
    return [_without_secrets(part) for part in value] if isinstance(value, list) else value


def test_a_kind_without_definition_is_refused_by_name(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("standin.kubernetes._CRD_WAIT_S", 0)
    queue = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "ClusterQueue", "metadata": {"name": "gpus"}, "spec": {}}
    engine.create("kubernetes:kueue.x-k8s.io/v1beta1:ClusterQueue", queue, preview=True)
    with pytest.raises(grpc.RpcError, match='no matches for kind "ClusterQueue"'):
        engine.create("kubernetes:kueue.x-k8s.io/v1beta1:ClusterQueue", queue)


def test_functions_are_not_passed_on(engine: Engine) -> None:
    with pytest.raises(grpc.RpcError, match="kubernetes:yaml:decode is not passed on"):
        engine.stub.Invoke(provider_pb2.InvokeRequest(tok="kubernetes:yaml:decode"))
