"""The manifests of a plan: placed where the plan means them, tied by names, limited by its numbers."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from locks import STACKS, planned, served, shipped

from infra.policy import Recorded
from infra.policy.kube import pods as pods_that_a_rule_sees
from infra.release import logical_name
from planner.cost.schedule import parse_schedule
from planner.plan.lock import Lock
from workloads.pods import GPU, GPU_NAMESPACE, NAMESPACE, SPOT_KEY, Manifest
from workloads.render import render, vllm_arguments
from workloads.server import cron


def objects(lock: Lock) -> list[Manifest]:
    return render(lock)


def found(made: list[Manifest], kind: str, name: str = "") -> Manifest:
    wanted = [m for m in made if m["kind"] == kind and m["metadata"]["name"].startswith(name)]
    assert len(wanted) == 1, [m["metadata"]["name"] for m in wanted]
    return wanted[0]


def pods(made: list[Manifest]) -> list[dict[str, Any]]:
    return [m["spec"]["template"]["spec"] for m in made if m["kind"] in ("Deployment", "Job")]


def selected(pod: dict[str, Any]) -> list[str]:
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    values: list[str] = terms[0]["matchExpressions"][0]["values"]
    return values


@pytest.mark.parametrize("stack", STACKS)
def test_every_pod_selects_the_pools_of_its_workload_and_no_other(stack: str) -> None:
    _, lock = shipped(stack)
    made = objects(lock)
    for workload, pod in zip(lock.workloads, pods(made), strict=True):
        assert selected(pod) == [pool.name for pool in lock.pools if workload.name in pool.workloads]


@pytest.mark.parametrize("stack", STACKS)
def test_spot_is_tolerated_where_the_plan_has_spot_and_nowhere_else(stack: str) -> None:
    _, lock = shipped(stack)
    priority = {pool.name: pool.priority for pool in lock.pools}
    for pod in pods(objects(lock)):
        keys = [toleration["key"] for toleration in pod["tolerations"]]
        assert "sku" in keys
        assert (SPOT_KEY in keys) == any(priority[name] == "spot" for name in selected(pod))


def test_a_fallback_is_second_choice_for_pods_and_for_the_autoscaler() -> None:
    _, lock = shipped("prod-standard")
    made = objects(lock)
    pod = pods(made)[0]
    preferred = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred[0]["preference"]["matchExpressions"][0]["values"] == ["a100spot"]
    order = yaml.safe_load(found(made, "ConfigMap", "cluster-autoscaler")["data"]["priorities"])
    assert order == {20: [".*-a100spot-.*"], 10: [".*-a100fb-.*"]}  # the highest number is tried first


def test_without_a_fallback_there_is_no_order_of_pools() -> None:
    names = [m["metadata"]["name"] for m in objects(shipped("dev-32k")[1]) if m["kind"] == "ConfigMap"]
    assert [name for name in names if "autoscaler" in name] == []


@pytest.mark.parametrize("stack", STACKS)
def test_the_gpu_quota_is_what_the_pools_can_have(stack: str) -> None:
    _, lock = shipped(stack)
    hard = found(objects(lock), "ResourceQuota")["spec"]["hard"]
    assert hard == {"requests.nvidia.com/gpu": str(sum(pool.max_nodes * pool.gpus_per_node for pool in lock.pools))}


def test_prod_standard_may_have_two_gpus_one_on_spot_and_one_in_its_stead() -> None:
    hard = found(objects(shipped("prod-standard")[1]), "ResourceQuota")["spec"]["hard"]
    assert hard == {"requests.nvidia.com/gpu": "2"}  # 1 machine x 1 GPU in each of two pools


@pytest.mark.parametrize("stack", STACKS)
def test_a_pod_asks_for_its_gpus_and_less_than_the_machine_has(stack: str) -> None:
    _, lock = shipped(stack)
    for workload, pod in zip(lock.workloads, pods(objects(lock)), strict=True):
        resources = pod["containers"][0]["resources"]
        pool = lock.pool(workload.pool)
        assert (
            resources["requests"].get(GPU)
            == resources["limits"].get(GPU)
            == (str(workload.gpus) if workload.gpus else None)
        )
        assert int(resources["requests"]["cpu"].removesuffix("m")) < pool.vcpus_per_node * 1000
        assert int(resources["limits"]["memory"].removesuffix("Gi")) < pool.ram_gib_per_node


def test_a_t4_machine_keeps_one_and_a_half_of_its_four_processors_for_the_system() -> None:
    _, lock = shipped("dev-2k")  # NC4as_T4_v3: 4 vCPUs, 28 GiB, one GPU
    requests = pods(objects(lock))[0]["containers"][0]["resources"]
    disk = requests["requests"].pop("ephemeral-storage")
    assert requests["requests"] == {"cpu": "2500m", "memory": "16Gi", GPU: "1"}  # 28 x 0.6 = 16.8
    assert requests["limits"] == {"memory": "22Gi", GPU: "1", "ephemeral-storage": disk}  # 28 x 0.8 = 22.4


@pytest.mark.parametrize("stack", STACKS)
def test_a_service_account_ties_each_pod_to_its_identity_and_its_secrets(stack: str) -> None:
    _, lock = shipped(stack)
    made = objects(lock)
    for workload, pod in zip(lock.workloads, pods(made), strict=True):
        account = found([m for m in made if m["metadata"]["name"] == workload.name], "ServiceAccount")
        provider = found([m for m in made if m["metadata"]["name"] == workload.name], "SecretProviderClass")
        client = "${CLIENT_ID_%s}" % workload.task.upper()  # noqa: UP031
        assert account["metadata"]["annotations"] == {"azure.workload.identity/client-id": client}
        assert provider["spec"]["parameters"]["clientID"] == client
        assert pod["serviceAccountName"] == workload.name
        listed = yaml.safe_load(provider["spec"]["parameters"]["objects"])["array"]
        own = {"serve": ["api-key", "hf-token"], "finetune": ["hf-token"]}  # training has no business with the key
        assert [yaml.safe_load(one)["objectName"] for one in listed] == own[workload.task]


def test_a_vault_without_secrets_leaves_an_empty_list_and_no_variables() -> None:
    _, lock = shipped("dev-32k")
    made = render(lock, secrets=())
    provider = next(m for m in made if m["kind"] == "SecretProviderClass")
    assert yaml.safe_load(provider["spec"]["parameters"]["objects"]) == {"array": []}
    assert "valueFrom" not in str(pods(made))


def test_workloads_are_held_to_the_restricted_standard() -> None:
    spaces = {m["metadata"]["name"]: m for m in objects(shipped("dev-32k")[1]) if m["kind"] == "Namespace"}
    assert spaces[NAMESPACE]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert spaces[GPU_NAMESPACE]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"


def test_the_server_gets_the_arguments_that_the_memory_was_worked_out_for() -> None:
    _, lock = shipped("prod-standard")
    container = found(objects(lock), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["vllm", "serve"]
    assert container["args"][0] == "Qwen/Qwen3-8B"
    assert set(lock.workloads[0].arguments) <= set(container["args"])
    assert "--max-model-len=32768" in container["args"]


def test_a_server_with_a_machine_for_sure_is_waited_for_and_one_on_spot_alone_is_not() -> None:
    sure = found(objects(shipped("prod-standard")[1]), "Deployment")["metadata"]["annotations"]
    assert sure == {"pulumi.com/timeoutSeconds": str(20 * 60 + 16 * 60)}
    unsure = found(objects(shipped("dev-32k")[1]), "Deployment")["metadata"]["annotations"]
    assert unsure == {"pulumi.com/skipAwait": "true"}


def test_plain_hours_start_no_server_until_somebody_does() -> None:
    assert found(objects(shipped("dev-32k")[1]), "Deployment")["spec"]["replicas"] == 0  # schedule: 60h
    assert found(objects(shipped("prod-standard")[1]), "Deployment")["spec"]["replicas"] == 1  # always


def test_windows_switch_the_server_on_and_off() -> None:
    _, lock = planned(served(workload={"schedule": "mon-tue 08:00-18:30; sun 22:00-02:00"}))
    made = objects(lock)
    assert "replicas" not in found(made, "Deployment")["spec"]  # KEDA's: nobody else may say
    scaled = found(made, "ScaledObject")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (0, 1)
    times = [(t["metadata"]["start"], t["metadata"]["end"]) for t in scaled["triggers"]]
    # Monday is 1 and Sunday 0; Sunday's window ends on Monday
    assert times == [("0 8 * * 1", "30 18 * * 1"), ("0 8 * * 2", "30 18 * * 2"), ("0 22 * * 0", "0 2 * * 1")]


@given(st.integers(0, 7 * 1440))
def test_cron_names_the_same_minute_of_the_week(minute: int) -> None:
    minutes, hours, _, _, day = cron(minute).split()
    assert ((int(day) - 1) % 7 * 1440 + int(hours) * 60 + int(minutes)) == minute % (7 * 1440)


def test_two_replicas_get_a_disruption_budget_and_one_does_not() -> None:
    one = [m["kind"] for m in objects(planned(served())[1])]
    two = objects(planned(served(workload={"replicas": 2}))[1])
    assert "PodDisruptionBudget" not in one  # it would keep every node from being drained
    assert found(two, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_a_server_that_fills_its_pool_is_replaced_by_stopping_it_first() -> None:
    assert found(objects(shipped("prod-standard")[1]), "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_what_a_server_reads_is_mounted_as_its_identity_without_keys() -> None:
    made = served_with(weights="blob", runtime_adapters=True)
    volumes = {m["metadata"]["name"]: m["spec"] for m in made if m["kind"] == "PersistentVolume"}
    assert {name.rpartition("-")[0] for name in volumes} == {"serve-models", "serve-adapters"}
    for volume in volumes.values():
        attributes = volume["csi"]["volumeAttributes"]
        assert volume["csi"]["readOnly"] is True
        assert attributes["clientID"] == "${CLIENT_ID_SERVE}"
        assert attributes["mountWithWorkloadIdentityToken"] == "true"
        assert volume["persistentVolumeReclaimPolicy"] == "Retain"


@pytest.mark.parametrize("stack", STACKS)
def test_metrics_are_of_the_group_that_managed_prometheus_reads(stack: str) -> None:
    monitors = [m for m in objects(shipped(stack)[1]) if m["kind"] in ("PodMonitor", "ServiceMonitor")]
    assert monitors
    assert {m["apiVersion"] for m in monitors} == {"azmonitoring.coreos.com/v1"}


@pytest.mark.parametrize("stack", STACKS)
def test_images_are_pinned_and_names_are_unique(stack: str) -> None:
    made = objects(shipped(stack)[1])
    images = [
        container["image"]
        for m in made
        if "template" in m.get("spec", {})
        for container in m["spec"]["template"]["spec"]["containers"]
    ]
    own = "${TRAIN_IMAGE}"  # from the stack's registry, tagged by what it is built from
    assert all(image == own or image.rpartition(":")[2] not in ("latest", image) for image in images)
    names = [logical_name(m) for m in made]
    assert len(set(names)) == len(names)


def test_the_agents_of_gpu_machines_run_on_spot_machines_too() -> None:
    made = objects(shipped("dev-32k")[1])
    agents = [m for m in made if m["kind"] == "DaemonSet"]
    assert {m["metadata"]["name"] for m in agents} == {"nvidia-device-plugin", "dcgm-exporter"}
    for agent in agents:
        keys = [toleration["key"] for toleration in agent["spec"]["template"]["spec"]["tolerations"]]
        assert keys == ["sku", SPOT_KEY]


# --- what can be chosen of a server


def server_of(made: list[Manifest]) -> dict[str, Any]:
    """The pod of the only server."""
    spec: dict[str, Any] = found(made, "Deployment")["spec"]["template"]["spec"]
    return spec


def served_with(**fields: Any) -> list[Manifest]:
    return objects(planned(served(workload=fields))[1])


ADAPTERS = [
    {"name": "sql", "rank": 32, "base": "Qwen/Qwen3-8B", "folder": "finetune-0123abcd-0"},
    {"name": "tone", "rank": 8, "base": "qwen/qwen3-8b", "hub_id": "someone/tone-lora"},
]


def test_adapters_are_loaded_at_the_start_and_their_slots_are_counted() -> None:
    made = served_with(adapters=ADAPTERS)
    args = server_of(made)["containers"][0]["args"]
    start = args.index("--lora-modules")
    assert args[start + 1 : start + 3] == ["sql=/adapters/finetune-0123abcd-0", "tone=someone/tone-lora"]
    assert {"--enable-lora", "--max-loras=2", "--max-lora-rank=32"} <= set(args)
    mounts = {mount["name"]: mount for mount in server_of(made)["containers"][0]["volumeMounts"]}
    assert mounts["adapters"] == {"name": "adapters", "mountPath": "/adapters", "readOnly": True}
    _, plain = planned(served())
    _, lock = planned(served(workload={"adapters": ADAPTERS}))
    assert lock.workloads[0].needed_bytes > plain.workloads[0].needed_bytes


def test_adapters_can_be_loaded_while_a_server_runs() -> None:
    container = server_of(served_with(runtime_adapters=True))["containers"][0]
    assert {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "1"} in container["env"]
    assert {"--enable-lora", "--max-loras=1", "--max-lora-rank=16"} <= set(container["args"])
    assert "/adapters" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in str(served_with(adapters=ADAPTERS))


def test_weights_of_the_storage_account_are_mounted_and_never_looked_for_at_the_hub() -> None:
    made = served_with(weights="blob")
    container = server_of(made)["containers"][0]
    assert container["args"][0] == "/models/Qwen/Qwen3-8B-AWQ"
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
    volume = found(made, "PersistentVolume", "serve-models")["spec"]
    assert volume["csi"]["volumeAttributes"]["containerName"] == "models"
    assert volume["accessModes"] == ["ReadOnlyMany"]
    assert "--block-cache" in volume["mountOptions"]  # weights of any size pass through, and fill no disk
    assert "HF_HUB_OFFLINE" not in str(served_with(weights="blob", adapters=ADAPTERS))  # one of them is on the hub


def test_tools_can_be_left_out_and_named() -> None:
    assert "--tool-call-parser=hermes" in server_of(served_with())["containers"][0]["args"]  # a Qwen3
    assert "tool" not in str(server_of(served_with(tool_call_parser="none"))["containers"][0]["args"])
    assert "--tool-call-parser=xlam" in server_of(served_with(tool_call_parser="xlam"))["containers"][0]["args"]


def test_a_server_for_the_network_gets_an_internal_address_and_its_callers_are_let_in() -> None:
    made = served_with(expose="internal")
    service = found(made, "Service")
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["metadata"]["annotations"]["service.beta.kubernetes.io/azure-load-balancer-internal"] == "true"
    callers = found(made, "NetworkPolicy", "serve")["spec"]["ingress"][0]["from"]
    assert {"ipBlock": {"cidr": "10.0.0.0/8"}} in callers
    assert found(served_with(), "Service")["spec"]["type"] == "ClusterIP"


def test_a_gateway_is_told_of_the_server_and_let_in() -> None:
    made = served_with(expose="gateway", gateway={"name": "front", "namespace": "gateways", "hostnames": ["llm.x.org"]})
    route = found(made, "HTTPRoute")["spec"]
    assert route["parentRefs"] == [{"name": "front", "namespace": "gateways"}]
    assert route["hostnames"] == ["llm.x.org"]
    assert route["rules"][0]["backendRefs"] == [{"name": "serve", "port": 80}]
    callers = found(made, "NetworkPolicy", "serve")["spec"]["ingress"][0]["from"]
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}} in callers


def test_a_server_that_can_sleep_is_told_so() -> None:
    container = server_of(served_with(sleep_level=1))["containers"][0]
    assert "--enable-sleep-mode" in container["args"]
    assert {"name": "VLLM_SERVER_DEV_MODE", "value": "1"} in container["env"]
    assert "DEV_MODE" not in str(served_with())


# ----------------------------------------------------------------------------------------------------------- its key


def test_a_server_with_a_key_asks_for_it_on_its_whole_port() -> None:
    made = served_with()
    guard = found(made, "ConfigMap", "serve-key-guard-")
    text = (Path(render.__code__.co_filename).parent / "key_guard.py").read_text(encoding="utf-8")
    assert (guard["immutable"], guard["data"]) == (True, {"key_guard.py": text})
    # another text is another object, so that a pod never reads another than its template means
    assert guard["metadata"]["name"] == f"serve-key-guard-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    assert logical_name(guard) == f"configmap-{guard['metadata']['name']}"
    assert made.index(guard) < made.index(found(made, "Deployment"))
    pod = server_of(made)
    container = pod["containers"][0]
    assert container["args"].count("--middleware=key_guard.KeyGuard") == 1
    assert {"name": "PYTHONPATH", "value": "/etc/tonnage"} in container["env"]
    assert {"name": "key-guard", "mountPath": "/etc/tonnage", "readOnly": True} in container["volumeMounts"]
    assert {"name": "key-guard", "configMap": {"name": guard["metadata"]["name"]}} in pod["volumes"]


@pytest.mark.parametrize("secrets", [(), ("hf-token",)])
def test_a_server_without_a_key_has_nothing_to_ask_for(secrets: tuple[str, ...]) -> None:
    made = render(shipped("prod-standard")[1], secrets)
    text = str(made)
    assert "key_guard" not in text
    assert "key-guard" not in text
    assert "PYTHONPATH" not in text


def test_of_several_machines_the_one_that_answers_asks_for_the_key() -> None:
    template = found(objects(over_machines()), "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    words = {part: template[part]["spec"]["containers"][0]["args"] for part in ("leaderTemplate", "workerTemplate")}
    assert "--middleware=key_guard.KeyGuard" in words["leaderTemplate"]
    assert "--middleware=key_guard.KeyGuard" not in words["workerTemplate"]
    assert "--headless" in words["workerTemplate"]


def test_training_has_no_key_and_asks_for_none() -> None:
    (job,) = [m for m in objects(shipped("dev-32k")[1]) if m["kind"] == "Job"]
    assert "guard" not in str(job)


def test_a_machine_s_metadata_is_out_of_reach() -> None:
    policy = found(objects(shipped("dev-32k")[1]), "NetworkPolicy", "names-and-tls")["spec"]["egress"]
    assert policy[1]["to"][0]["ipBlock"]["except"] == ["169.254.0.0/16", "168.63.129.16/32"]
    nothing = found(objects(shipped("dev-32k")[1]), "NetworkPolicy", "nothing")["spec"]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_readiness_asks_for_one_real_answer_by_the_name_that_clients_use() -> None:
    probe = server_of(served_with())["containers"][0]["readinessProbe"]["exec"]["command"]
    assert probe[:2] == ["python3", "-c"]
    assert probe[3:] == ["8000", "qwen3-8b"]
    compile(probe[2], "ready.py", "exec")


@pytest.mark.parametrize(
    ("replicas", "most", "expected"),
    [
        (1, 1, {"type": "Recreate"}),
        (2, 2, {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}),
        (1, 2, {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}),
        (2, 3, {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}),
    ],
)
def test_a_new_version_never_waits_for_gpus_that_the_old_one_holds(
    replicas: int, most: int, expected: dict[str, Any]
) -> None:
    _, lock = planned(served(workload={"replicas": replicas}))
    pools = tuple(pool.model_copy(update={"max_nodes": most, "gpus_per_node": 1}) for pool in lock.pools)
    changed = lock.model_copy(update={"pools": pools})
    assert found(objects(changed), "Deployment")["spec"]["strategy"] == expected


# --- for every plan

TEMPLATES = sorted((Path(render.__code__.co_filename).parent / "templates").glob("*.j2"))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_every_value_is_written_as_json(template: Path) -> None:
    for value in re.findall(r"\{\{(.*?)\}\}", template.read_text(encoding="utf-8")):
        assert value.rstrip().endswith("| tojson"), value


def memory_bytes(text: str) -> int:
    assert text.endswith("Gi")
    return int(text.removesuffix("Gi")) << 30


def allocatable_bytes(ram_gib: int) -> int:
    """Memory that AKS leaves to pods of a machine with at most 50 of them, 3 % of it the kernel's own.

    Reserved: the lesser of 20 MB a pod and 50 MB more, and a quarter; 100 MiB until it evicts.
    Source: MicrosoftDocs/azure-aks-docs, node-resource-reservations.md.
    """
    ram = ram_gib * (1 << 30) * 97 // 100
    return ram - min(50 * 20_000_000 + 50_000_000, ram // 4) - (100 << 20)


def over_machines() -> Lock:
    """A model of 756 GiB in 16 bits: two machines of eight 80 GB cards, and no one machine, hold it."""
    server = {"kind": "serve", "machines": 2, "context": 8192, "weights": "blob"}
    wanted = {"workloads": [server], "pricing": {"spot": False}, "regions": ["any"], "approved_usd_per_month": 90_000}
    return planned({"model": "llama-3.1-405b", **wanted})[1]


def test_a_model_that_no_machine_holds_is_served_by_several() -> None:
    lock = over_machines()
    assert (lock.workloads[0].gpus, lock.pools[0].max_nodes, lock.pools[0].gpus_per_node) == (16, 2, 8)
    made = objects(lock)
    spec = found(made, "LeaderWorkerSet")["spec"]
    group = spec["leaderWorkerTemplate"]
    assert (spec["replicas"], group["size"]) == (1, 2)
    pods = [group[part]["spec"]["containers"][0] for part in ("leaderTemplate", "workerTemplate")]
    shared = {"--tensor-parallel-size=8", "--pipeline-parallel-size=2", "--nnodes=2"}
    for pod, rank in zip(pods, ("0", "$(LWS_WORKER_INDEX)"), strict=True):
        assert shared | {f"--node-rank={rank}", "--master-addr=$(LWS_LEADER_ADDRESS)"} <= set(pod["args"])
        assert pod["resources"]["limits"][GPU] == "8"
    assert "--headless" in pods[1]["args"]
    assert "--headless" not in pods[0]["args"]
    assert "readinessProbe" in pods[0]
    assert "readinessProbe" not in pods[1]  # it answers nobody
    first = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
    assert first.items() <= found(made, "Service")["spec"]["selector"].items()
    among = {
        "podSelector": {"matchLabels": found(made, "NetworkPolicy", "serve")["spec"]["podSelector"]["matchLabels"]}
    }
    policy = found(made, "NetworkPolicy", "serve")["spec"]
    assert policy["ingress"][1]["from"] == policy["egress"][0]["to"] == [among]  # any port: NCCL chooses its own
    assert not [one for one in made if one["kind"] == "Deployment"]


def test_the_policy_sees_the_pods_of_every_machine() -> None:
    group = found(objects(over_machines()), "LeaderWorkerSet")
    kind = "kubernetes:leaderworkerset.x-k8s.io/v1:LeaderWorkerSet"
    seen = list(pods_that_a_rule_sees([Recorded(kind, "serve", "urn", "", group, ())]))
    assert [(pod.gpus, pod.replicas, pod.namespace) for pod in seen] == [(8, 1, NAMESPACE), (8, 1, NAMESPACE)]


def test_a_server_without_a_gpu_has_its_own_image_machine_and_memory() -> None:
    made = objects(shipped("dev-cpu")[1])
    pod = server_of(made)
    container = pod["containers"][0]
    assert container["image"] == "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo:v0.32.0"
    assert pod["tolerations"] == [{"key": "sku", "operator": "Equal", "value": "cpu", "effect": "NoSchedule"}]
    assert selected(pod) == ["cpuod"]
    # a D4s_v5 has 4 vCPUs and 16 GiB: the model lies in it, so what it may take (80 %) is asked for
    assert container["resources"]["requests"] | {"ephemeral-storage": ""} == {
        "cpu": "2500m",
        "memory": "12Gi",
        "ephemeral-storage": "",
    }
    assert "--kv-cache-memory-bytes=1073741824" in container["args"]
    assert not [one for one in container["args"] if "gpu" in one or "tensor" in one]
    kinds = [one["kind"] for one in made]
    assert "DaemonSet" not in kinds
    assert found(made, "ScaledObject")["spec"]["minReplicaCount"] == 0  # and its machine goes with it
    assert [one["metadata"]["name"] for one in made if one["kind"] == "Namespace"] == [NAMESPACE]


@st.composite
def plans(draw: st.DrawFn) -> Lock:
    """A plan with one server and machines of any shape that a server could be planned on."""
    _, lock = shipped(draw(st.sampled_from(["prod-standard", "prod-budget", "prod-enterprise"])))
    on_node, gpus = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (8, 4), (8, 8)]))
    replicas = draw(st.integers(1, 4))
    shape = {
        "gpus_per_node": on_node,
        "vcpus_per_node": on_node * draw(st.sampled_from([4, 6, 8, 24, 40])),
        "ram_gib_per_node": on_node * draw(st.sampled_from([28, 55, 110, 220, 320])),
        "max_nodes": -(-replicas * gpus // on_node) + draw(st.integers(0, 1)),
        "priority": draw(st.sampled_from(["spot", "on-demand", "reserved-1y"])),
    }
    server = lock.workloads[0]
    assert server.serving is not None
    serving = server.serving.model_copy(
        update={
            "stored_bytes": draw(st.integers(10**8, 10**12)),
            "weights": draw(st.sampled_from(["hub", "blob"])),
            "answer_tokens": draw(st.integers(1, 10**5)),
            "expose": draw(st.sampled_from(["cluster", "internal"])),
            "runtime_adapters": draw(st.booleans()),
        }
    )
    schedule = draw(st.sampled_from(["always", "60h", "mon-fri 08:00-18:00"]))
    arguments = [one for one in server.arguments if not one.startswith("--tensor-parallel-size")]
    changed = server.model_copy(
        update={
            "gpus": gpus,
            "replicas": replicas,
            "schedule": schedule,
            "windows": parse_schedule(schedule).windows,
            "serving": serving,
            "arguments": (*arguments, *([f"--tensor-parallel-size={gpus}"] if gpus > 1 else [])),
        }
    )
    pools = tuple(
        pool.model_copy(update=shape | ({"priority": "on-demand"} if pool.fallback else {})) for pool in lock.pools
    )
    return lock.model_copy(update={"pools": pools, "workloads": (changed,)})


quickly = settings(deadline=None, max_examples=30)


def tolerated(pod: dict[str, Any], taint: dict[str, str]) -> bool:
    return any(
        all(one.get(key) == taint[key] for key in ("key", "value", "effect")) and one["operator"] == "Equal"
        for one in pod["tolerations"]
    )


@quickly
@given(plans())
def test_whatever_is_planned_can_run_where_it_is_meant_to(lock: Lock) -> None:
    made = objects(lock)
    workload, pod = lock.workloads[0], server_of(made)
    for pool in lock.pools:
        taints = [{"key": "sku", "value": "gpu", "effect": "NoSchedule"}]
        if pool.priority == "spot":
            taints.append({"key": SPOT_KEY, "value": "spot", "effect": "NoSchedule"})
        assert all(tolerated(pod, taint) for taint in taints)
    pool = lock.pools[0]
    resources = pod["containers"][0]["resources"]
    on_a_node = pool.gpus_per_node // workload.gpus
    assert memory_bytes(resources["requests"]["memory"]) * on_a_node <= allocatable_bytes(pool.ram_gib_per_node)
    assert int(resources["requests"]["cpu"].removesuffix("m")) * on_a_node < (pool.vcpus_per_node - 1) * 1000
    args = pod["containers"][0]["args"]
    parallel = next((int(a.partition("=")[2]) for a in args if a.startswith("--tensor-parallel-size=")), 1)
    assert resources["limits"][GPU] == resources["requests"][GPU] == str(parallel)
    shm = next(volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
    assert memory_bytes(shm["sizeLimit"]) < memory_bytes(resources["limits"]["memory"])


@quickly
@given(plans())
def test_whatever_is_planned_has_time_to_start_and_to_stop(lock: Lock) -> None:
    deployment = found(objects(lock), "Deployment")["spec"]
    pod, serving = deployment["template"]["spec"], lock.workloads[0].serving
    assert serving is not None
    probe = pod["containers"][0]["startupProbe"]
    budget = probe["periodSeconds"] * probe["failureThreshold"]
    assert budget >= serving.stored_bytes / serving.read_bytes_per_second
    assert deployment["progressDeadlineSeconds"] > budget
    (drain,) = [int(a.partition("=")[2]) for a in pod["containers"][0]["args"] if a.startswith("--shutdown-timeout=")]
    pre_stop = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pre_stop + drain


@quickly
@given(plans())
def test_whatever_is_planned_leaves_to_others_what_is_theirs(lock: Lock) -> None:
    made = objects(lock)
    deployment = found(made, "Deployment")["spec"]
    scaled = [m for m in made if m["kind"] == "ScaledObject"]
    assert bool(scaled) == ("replicas" not in deployment)  # an autoscaler's field is written by nobody else
    text = json.dumps(made)
    assert ":latest" not in text
    assert not [m for m in made if m["kind"] == "Secret"]
    for variable in deployment["template"]["spec"]["containers"][0]["env"]:
        if re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"]):
            assert "value" not in variable
    budgets = [m for m in made if m["kind"] == "PodDisruptionBudget"]
    assert bool(budgets) == (lock.workloads[0].replicas > 1)


@quickly
@given(plans())
def test_whatever_is_planned_is_parsed_back_as_it_was_meant(lock: Lock) -> None:
    made = objects(lock)
    pod, workload = server_of(made), lock.workloads[0]
    assert pod["containers"][0]["args"] == vllm_arguments(workload, guarded=True)
    assert all(isinstance(word, str) for word in pod["containers"][0]["args"])


def native(manifest: Manifest) -> bool:
    """Whether Kubernetes itself defines the kind."""
    group = manifest["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and group.split(".")[0] in ("networking", "rbac", "storage"))


def valid(made: list[Manifest]) -> int:
    """How many objects were held against the schemas of the plan's Kubernetes, unknown fields refused."""
    checked = [one for one in made if native(one)]
    for one in checked:
        kubernetes_validate.validate(one, shipped("dev-32k")[1].platform.kubernetes_version, strict=True)
    return len(checked)


@pytest.mark.parametrize("stack", STACKS)
def test_every_object_of_a_shipped_stack_is_one_that_kubernetes_knows(stack: str) -> None:
    made = objects(shipped(stack)[1])
    others = {one["kind"] for one in made if not native(one)}
    assert others <= {"PodMonitor", "SecretProviderClass", "ScaledObject"}
    assert valid(made) + sum(not native(one) for one in made) == len(made)


def test_objects_of_every_choice_are_such_that_kubernetes_knows_them() -> None:
    for fields in (
        {"weights": "blob", "adapters": ADAPTERS, "runtime_adapters": True},
        {"expose": "internal", "replicas": 3, "schedule": "mon-fri 08:00-18:00"},
        {"expose": "gateway", "gateway": {"name": "front", "namespace": "gateways"}, "sleep_level": 2},
    ):
        assert valid(served_with(**fields)) > 10


def test_an_unknown_field_would_be_seen() -> None:
    made = [one for one in objects(shipped("dev-32k")[1]) if one["kind"] == "Service"]
    made[0]["spec"]["typ"] = "ClusterIP"
    with pytest.raises(kubernetes_validate.ValidationError):
        valid(made)


@pytest.mark.parametrize("stack", STACKS)
def test_what_cannot_be_edited_has_digits_of_itself_in_its_name(stack: str) -> None:
    for one in objects(shipped(stack)[1]):
        if one["kind"] in ("Job", "PersistentVolume", "PersistentVolumeClaim"):
            assert re.search(r"-[0-9a-f]{6,8}$", one["metadata"]["name"])


@pytest.mark.parametrize("stack", STACKS)
def test_every_object_says_what_it_belongs_to(stack: str) -> None:
    for one in objects(shipped(stack)[1]):
        assert one["metadata"]["labels"]["app.kubernetes.io/part-of"] == "tonnage"
        if one["metadata"]["name"].split("-")[0] in ("serve", "finetune"):
            assert one["metadata"]["labels"]["app.kubernetes.io/instance"] in ("serve", "finetune")
