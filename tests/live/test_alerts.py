"""The alert rules under Prometheus's own eyes: promtool reads them, and made-up series make them fire or not."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from infra.alerts import SCRAPED, Recording, RuleGroup, Watch, Watched, rule_groups

PROMTOOL = shutil.which("promtool") or ""
needs_promtool = pytest.mark.skipif(
    not PROMTOOL, reason="promtool is not on the PATH: install Debian's package prometheus, or Prometheus itself"
)

WATCH = Watch(
    namespace="tonnage",
    workloads=(
        Watched("chat", "serve"),
        Watched("tune", "train", gpu_memory_bytes=40 * 2**30, deadline_seconds=10 * 3600),
        Watched("tune-big", "train", gpu_memory_bytes=60 * 2**30, deadline_seconds=20 * 3600),
    ),
    pool_minimums={"a100spot": 0, "t4": 1},
    start_minutes=30,
    first_token_seconds=Decimal(2),
)

POD = 'cluster="c", namespace="tonnage", pod="{}"'
# as a PodMonitor stores them: the exporter's own pod in `pod`, the pod that holds the GPU in `exported_pod`
GPU = 'cluster="c", Hostname="n", gpu="0", UUID="u", namespace="gpu-system", pod="dcgm-exporter-1"'
HELD = f'{GPU}, exported_namespace="tonnage", exported_pod="{{}}"'
# the same where the exporter's labels are honoured
HONOURED = 'cluster="c", Hostname="n", gpu="0", UUID="u", namespace="tonnage", pod="{}"'
ENGINE = 'cluster="c", namespace="tonnage", pod="chat-1", model_name="m", engine="{}"'
SERVER = 'cluster="c", namespace="tonnage", deployment="{}"'
JOB = 'cluster="c", namespace="{}", job_name="{}"'
NODE = 'kube_node_info{{cluster="c", node="{}"}}'

XID_LABELS = {"cluster": "c", "Hostname": "n", "gpu": "0", "UUID": "u"}
IN_TONNAGE = {"cluster": "c", "namespace": "tonnage"}


def series(name: str, labels: str, values: str) -> dict[str, str]:
    return {"series": f"{name}{{{labels}}}", "values": values}


def asks(pod: str, gpus: int = 1) -> dict[str, str]:
    return series(
        "kube_pod_container_resource_requests", POD.format(pod) + ', resource="nvidia_com_gpu"', f"{gpus}x900"
    )


def in_prometheus_format(groups: tuple[RuleGroup, ...], *, annotated: bool) -> str:
    """The file that promtool reads. Azure's own fields, severity and action, have no place in it."""
    rendered = []
    for group in groups:
        rules: list[dict[str, object]] = []
        for rule in group.rules:
            if isinstance(rule, Recording):
                rules.append({"record": rule.name, "expr": rule.expression})
                continue
            alert: dict[str, object] = {"alert": rule.name, "expr": rule.expression, "for": f"{rule.minutes}m"}
            if annotated:
                alert["annotations"] = {"summary": rule.summary, "description": rule.action}
            rules.append(alert)
        rendered.append({"name": group.name, "interval": "1m", "rules": rules})
    return yaml.safe_dump({"groups": rendered}, sort_keys=False, width=10_000)


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def play(tmp_path: Path, given: list[dict[str, str]], expected: list[dict[str, object]], *, annotated: bool) -> None:
    rules, test = tmp_path / "rules.yaml", tmp_path / "test.yaml"
    rules.write_text(in_prometheus_format(rule_groups(WATCH), annotated=annotated))
    case = {"interval": "1m", "input_series": given, "alert_rule_test": expected}
    test.write_text(
        yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [case]}, sort_keys=False)
    )
    promtool("test", "rules", test)


@needs_promtool
def test_prometheus_reads_every_rule(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    groups = rule_groups(WATCH)
    path.write_text(in_prometheus_format(groups, annotated=True))
    said = promtool("check", "rules", "--lint-fatal", path)
    assert f"{sum(len(group.rules) for group in groups)} rules found" in said


FIRES = [
    pytest.param(
        "GpuFault",
        3,
        [series("DCGM_FI_DEV_XID_ERRORS", GPU, "0 79x10")],  # 79: the GPU has fallen off the bus
        [XID_LABELS],
        id="a GPU that fell off the bus",
    ),
    pytest.param(
        "GpuProgramFault",
        3,
        [series("DCGM_FI_DEV_XID_ERRORS", GPU, "0 31x10")],
        [XID_LABELS],
        id="a program that read where it must not",
    ),
    pytest.param(
        "GpuIdle",
        31,
        [asks("chat-1"), series("DCGM_FI_DEV_GPU_UTIL", HELD.format("chat-1"), "2x60")],
        [IN_TONNAGE | {"pod": "chat-1"}],
        id="half an hour at 2 %",
    ),
    pytest.param(
        "GpuIdle",
        31,
        [asks("chat-1"), series("DCGM_FI_DEV_GPU_UTIL", HONOURED.format("chat-1"), "2x60")],
        [IN_TONNAGE | {"pod": "chat-1"}],
        id="the same where the exporter's labels are honoured",
    ),
    pytest.param(
        "GpuMemoryAboveReceipt",
        7,
        # 41,000 MiB = 42,991,616,000 bytes; 40 GiB = 42,949,672,960
        [
            asks("tune-0a1b2c3d-0-xyz12"),
            series("DCGM_FI_DEV_FB_USED", HELD.format("tune-0a1b2c3d-0-xyz12"), "41000x10"),
        ],
        [IN_TONNAGE | {"pod": "tune-0a1b2c3d-0-xyz12"}],
        id="41,000 MiB where the receipt says 40 GiB",
    ),
    pytest.param(
        "GpuMetricsMissing",
        16,
        [series("kube_node_status_capacity", 'cluster="c", node="n", resource="nvidia_com_gpu"', "1x20")],
        [{"cluster": "c"}],
        id="a GPU node and no exporter",
    ),
    pytest.param(
        "ServerNotReady",
        31,
        [
            series("kube_deployment_spec_replicas", SERVER.format("chat"), "1x40"),
            series("kube_deployment_status_replicas_available", SERVER.format("chat"), "0x40"),
        ],
        [IN_TONNAGE | {"deployment": "chat"}],
        id="a server that never gets ready",
    ),
    pytest.param(
        "ServerMetricsMissing",
        16,
        [series("kube_deployment_status_replicas_available", SERVER.format("chat"), "1x40")],
        [IN_TONNAGE],
        id="a ready server without metrics",
    ),
    pytest.param(
        "RequestsWaiting",
        11,
        # (12 + 10) / 2 engines = 11, above 10
        [
            series("vllm:num_requests_waiting", ENGINE.format(0), "12x20"),
            series("vllm:num_requests_waiting", ENGINE.format(1), "10x20"),
        ],
        [IN_TONNAGE | {"model_name": "m"}],
        id="11 requests wait per engine",
    ),
    pytest.param(
        "KvCacheAlmostFull",
        16,
        [series("vllm:kv_cache_usage_perc", ENGINE.format(0), "0.97x20")],
        [IN_TONNAGE | {"pod": "chat-1", "model_name": "m"}],
        id="97 % of the cache",
    ),
    pytest.param(
        "FirstTokenLate",
        25,
        # ten requests a minute, all between 2.5 and 5 seconds: the 95th percentile is 2.5 + 0.95 x 2.5 = 4.875
        [
            series("vllm:time_to_first_token_seconds_bucket", ENGINE.format(0) + f', le="{le}"', f"0+{step}x30")
            for le, step in (("2.5", 0), ("5.0", 10), ("+Inf", 10))
        ],
        [IN_TONNAGE | {"model_name": "m"}],
        id="first tokens after almost 5 seconds",
    ),
    pytest.param(
        "TrainingFailed",
        3,
        [series("kube_job_failed", JOB.format("tonnage", "tune-0a1b2c3d") + ', condition="true"', "0 1x10")],
        [IN_TONNAGE | {"job_name": "tune-0a1b2c3d"}],
        id="a job that gave up",
    ),
    pytest.param(
        "TrainingLate",
        602,  # ten hours and two minutes
        [
            series("kube_job_status_start_time", JOB.format("tonnage", "tune-0a1b2c3d"), "0x700"),
            series("kube_job_status_active", JOB.format("tonnage", "tune-0a1b2c3d"), "1x700"),
            # has 20 hours, although its name begins as the other's
            series("kube_job_status_start_time", JOB.format("tonnage", "tune-big-0a1b2c3d"), "0x700"),
            series("kube_job_status_active", JOB.format("tonnage", "tune-big-0a1b2c3d"), "1x700"),
        ],
        [IN_TONNAGE | {"job_name": "tune-0a1b2c3d"}],
        id="ten hours are over",
    ),
    pytest.param(
        "PoolBelowMinimum",
        16,
        [{"series": NODE.format("aks-system-12345678-vmss000000"), "values": "1x20"}],
        [{"cluster": "c", "pool": "t4"}],
        id="a pool of at least one without any",
    ),
    pytest.param(
        "GpuPodPending",
        21,
        [asks("chat-1"), series("kube_pod_status_phase", POD.format("chat-1") + ', phase="Pending"', "1x30")],
        [IN_TONNAGE | {"pod": "chat-1"}],
        id="a pod that nobody has a GPU for",
    ),
    pytest.param(
        "NodeNotReady",
        11,
        [series("kube_node_status_condition", 'cluster="c", node="n", condition="Ready", status="true"', "0x20")],
        [{"cluster": "c", "node": "n"}],
        id="a node that is not ready",
    ),
]


@needs_promtool
@pytest.mark.parametrize(("alert", "minute", "given", "labels"), FIRES)
def test_an_alert_fires(
    alert: str, minute: int, given: list[dict[str, str]], labels: list[dict[str, str]], tmp_path: Path
) -> None:
    expected = [{"exp_labels": found} for found in labels]
    play(
        tmp_path,
        given,
        [{"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": expected}],
        annotated=False,
    )


QUIET = [
    pytest.param("GpuFault", 10, [series("DCGM_FI_DEV_XID_ERRORS", GPU, "0x20")], id="a GPU without errors"),
    pytest.param("GpuFault", 10, [series("DCGM_FI_DEV_XID_ERRORS", GPU, "43x20")], id="a program's fault is no GPU's"),
    pytest.param("GpuProgramFault", 10, [series("DCGM_FI_DEV_XID_ERRORS", GPU, "79x20")], id="and the other way round"),
    pytest.param(
        "GpuIdle",
        29,
        [asks("chat-1"), series("DCGM_FI_DEV_GPU_UTIL", HELD.format("chat-1"), "2x60")],
        id="idle for 29 minutes only",
    ),
    pytest.param(
        "GpuIdle",
        50,
        [asks("chat-1"), series("DCGM_FI_DEV_GPU_UTIL", HELD.format("chat-1"), "2x25 60 2x40")],
        id="busy for a moment half way",
    ),
    pytest.param(
        "GpuIdle",
        50,
        [
            asks("tune-1", 2),
            series("DCGM_FI_DEV_GPU_UTIL", HELD.format("tune-1"), "0x60"),
            series("DCGM_FI_DEV_GPU_UTIL", HELD.format("tune-1").replace('gpu="0"', 'gpu="1"'), "90x60"),
        ],
        id="one of the pod's two GPUs is busy",
    ),
    pytest.param(
        "GpuIdle", 50, [asks("chat-1"), series("DCGM_FI_DEV_GPU_UTIL", GPU, "0x60")], id="a GPU that nobody holds"
    ),
    pytest.param(
        "GpuMemoryAboveReceipt",
        9,
        # 40,000 MiB = 41,943,040,000 bytes, below 40 GiB; 50,000 MiB = 52,428,800,000, below the other's 60 GiB
        [
            asks("tune-0a1b2c3d-0-xyz12"),
            asks("tune-big-0a1b2c3d-0-xyz12"),
            series("DCGM_FI_DEV_FB_USED", HELD.format("tune-0a1b2c3d-0-xyz12"), "40000x10"),
            series("DCGM_FI_DEV_FB_USED", HELD.format("tune-big-0a1b2c3d-0-xyz12"), "50000x10"),
        ],
        id="each below its own receipt",
    ),
    pytest.param(
        "GpuMetricsMissing",
        30,
        [
            series("kube_node_status_capacity", 'cluster="c", node="n", resource="nvidia_com_gpu"', "1x40"),
            series("DCGM_FI_DEV_GPU_UTIL", GPU, "0x40"),
        ],
        id="a GPU node with its exporter",
    ),
    pytest.param(
        "GpuMetricsMissing",
        30,
        [series("kube_node_status_capacity", 'cluster="c", node="n", resource="cpu"', "4x40")],
        id="no GPU node at all",
    ),
    pytest.param(
        "ServerNotReady",
        60,
        [
            series("kube_deployment_spec_replicas", SERVER.format("chat"), "0x70"),
            series("kube_deployment_status_replicas_available", SERVER.format("chat"), "0x70"),
        ],
        id="a server that its schedule switched off",
    ),
    pytest.param(
        "ServerNotReady",
        29,
        [
            series("kube_deployment_spec_replicas", SERVER.format("chat"), "1x70"),
            series("kube_deployment_status_replicas_available", SERVER.format("chat"), "0x70"),
        ],
        id="a server that is starting",
    ),
    pytest.param(
        "ServerNotReady",
        60,
        [
            series("kube_deployment_spec_replicas", SERVER.format("other"), "1x70"),
            series("kube_deployment_status_replicas_available", SERVER.format("other"), "0x70"),
        ],
        id="a deployment that is not the plan's",
    ),
    pytest.param(
        "ServerMetricsMissing",
        30,
        [
            series("kube_deployment_status_replicas_available", SERVER.format("chat"), "1x40"),
            series("vllm:num_requests_waiting", ENGINE.format(0), "0x40"),
        ],
        id="a server that reports its queue",
    ),
    pytest.param(
        "RequestsWaiting",
        15,
        # (20 + 0) / 2 engines = 10, not above 10
        [
            series("vllm:num_requests_waiting", ENGINE.format(0), "20x20"),
            series("vllm:num_requests_waiting", ENGINE.format(1), "0x20"),
        ],
        id="10 requests wait per engine",
    ),
    pytest.param(
        "KvCacheAlmostFull",
        19,
        [series("vllm:kv_cache_usage_perc", ENGINE.format(0), "0.95x20")],
        id="95 % of the cache",
    ),
    pytest.param(
        "FirstTokenLate",
        25,
        [
            series("vllm:time_to_first_token_seconds_bucket", ENGINE.format(0) + f', le="{le}"', "7x30")
            for le in ("2.5", "5.0", "+Inf")
        ],
        id="no request for a while",
    ),
    pytest.param(
        "TrainingFailed",
        9,
        [
            series("kube_job_failed", JOB.format("tonnage", "tune-0a1b2c3d") + ', condition="true"', "0x10"),
            series("kube_job_failed", JOB.format("tonnage", "tune-0a1b2c3d") + ', condition="false"', "1x10"),
            series("kube_job_failed", JOB.format("other", "tune-0a1b2c3d") + ', condition="true"', "1x10"),
        ],
        id="a job that goes on, and another namespace's",
    ),
    pytest.param(
        "TrainingLate",
        620,
        [
            series("kube_job_status_start_time", JOB.format("tonnage", "tune-0a1b2c3d"), "0x700"),
            series("kube_job_status_active", JOB.format("tonnage", "tune-0a1b2c3d"), "0x700"),
        ],
        id="a job that is over",
    ),
    pytest.param(
        "PoolBelowMinimum",
        30,
        [{"series": NODE.format("aks-t4-12345678-vmss000000"), "values": "1x40"}],
        id="the pool's one machine is there, the spot pool may have none",
    ),
    pytest.param("PoolBelowMinimum", 30, [], id="nothing is reported at all"),
    pytest.param(
        "GpuPodPending",
        40,
        [series("kube_pod_status_phase", POD.format("web") + ', phase="Pending"', "1x50")],
        id="a pod that asks for no GPU",
    ),
    pytest.param(
        "NodeNotReady",
        15,
        [series("kube_node_status_condition", 'cluster="c", node="n", condition="Ready", status="true"', "1x20")],
        id="a node that is ready",
    ),
]


@needs_promtool
@pytest.mark.parametrize(("alert", "minute", "given"), QUIET)
def test_an_alert_stays_quiet(alert: str, minute: int, given: list[dict[str, str]], tmp_path: Path) -> None:
    play(tmp_path, given, [{"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": []}], annotated=False)


@needs_promtool
def test_the_text_of_an_alert_names_the_pod_and_the_number_in_units_people_read(tmp_path: Path) -> None:
    (gpus,) = [group for group in rule_groups(WATCH) if group.name == "gpus"]
    (alert,) = [rule for rule in gpus.rules if rule.name == "GpuMemoryAboveReceipt"]
    assert not isinstance(alert, Recording)
    # 41,000 MiB / 1024 = 40.04 GiB
    summary = "tune-1 uses 40.04GiB of a GPU, more than the plan's receipt says"
    expected = {
        "exp_labels": IN_TONNAGE | {"pod": "tune-1"},
        "exp_annotations": {"summary": summary, "description": alert.action},
    }
    play(
        tmp_path,
        [asks("tune-1"), series("DCGM_FI_DEV_FB_USED", HELD.format("tune-1"), "41000x10")],
        [{"eval_time": "7m", "alertname": alert.name, "exp_alerts": [expected]}],
        annotated=True,
    )


def test_every_metric_of_vllm_that_a_rule_uses_is_one_that_the_installed_vllm_exports() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed: run make live")
    source = (Path(found.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py").read_text()
    for metric in SCRAPED["vllm"]:
        assert f'"{metric.removesuffix("_bucket")}"' in source, metric
