"""What cannot be served is refused in a sentence when it is planned, before anything is deployed."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
from locks import planned, served

from planner.errors import PlannerError
from workloads.render import render, vllm_arguments

ADAPTER = {"name": "sql", "rank": 32, "base": "Qwen/Qwen3-8B", "folder": "sql"}
LARGE: dict[str, Any] = {"settings": {}, "checkpoint": None}  # 16 bits, 135 GiB
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a model that nobody knows": (
        {"model": "qwen3-8bb"},
        "'qwen3-8bb' is not in the model catalog: the nearest are qwen3-8b, qwen3-4b, qwen3-32b",
    ),
    "a rank above the largest": (
        {"workload": {"adapters": [ADAPTER], "settings": {"quantization": "awq", "max_lora_rank": 16}}},
        "serve: the adapter sql has rank 32, above max_lora_rank 16: raise max_lora_rank",
    ),
    "a rank that vLLM has no kernels for": (
        {"workload": {"settings": {"quantization": "awq", "enable_lora": True, "max_lora_rank": 17}}},
        "serve: vLLM has no kernels for max_lora_rank 17: choose one of 1, 8, 16, 32, 64, 128, 256, 320, 512",
    ),
    "an adapter of another base": (
        {"workload": {"adapters": [ADAPTER | {"base": "Qwen/Qwen3-4B"}]}},
        "serve: the adapter sql was trained on Qwen/Qwen3-4B and the server has qwen3-8b: serve its base, or take the"
        " adapter out",
    ),
    "adapters and no LoRA": (
        {"workload": {"adapters": [ADAPTER], "settings": {"quantization": "awq", "enable_lora": False}}},
        "serve has adapters and says enable_lora: false: take one of both out",
    ),
    "two adapters of one name": (
        {"workload": {"adapters": [ADAPTER, ADAPTER]}},
        "workloads.0 cannot be planned: two adapters have the same name: give each its own",
    ),
    "an adapter that lies in two places": (
        {"workload": {"adapters": [ADAPTER | {"hub_id": "someone/sql"}]}},
        "the adapter sql lies in a folder or on the hub: write folder or hub_id",
    ),
    "an adapter's folder that leaves its container": (
        {"workload": {"adapters": [ADAPTER | {"folder": "../models"}]}},
        "workloads.0.adapters.0.folder cannot be planned",
    ),
    "a context beyond the model": (
        {"workload": {"context": 200_000}},
        "serve: 200,000 tokens are beyond qwen3-8b's context of 40,960",
    ),
    "a quantisation that the card cannot run": (
        {"workload": {"settings": {"kv_cache_dtype": "fp8"}, "checkpoint": None}, "skus": ["NC4as_T4_v3"]},
        "NVIDIA T4 has no FP8: leave --kv-cache-dtype at auto, or take an Ada, Hopper or newer card",
    ),
    "a quantisation that the model has no use for": (
        {"workload": {"settings": {"quantization": "mxfp4"}}},
        "MXFP4 packs routed experts and qwen3-8b has none: choose w4a16, awq or gptq",
    ),
    "a gateway that is not named": (
        {"workload": {"expose": "gateway"}},
        "expose: gateway goes with a gateway, its name and its namespace: write both or neither",
    ),
    "stages beside machines": (
        {"workload": {"machines": 2, "settings": {"pipeline_parallel_size": 2}}},
        "machines are pipeline stages with GPUs: leave out pipeline_parallel_size and device: cpu",
    ),
    "machines of parts of cards": (
        {"workload": {"machines": 2}, "gpu_instance_profile": "MIG1g"},
        "serve asks for 2 GPUs, and MIG devices cannot be joined",
    ),
    "an extended context of which vLLM is not told": (
        {"rope_scaling": 2, "workload": {"context": 65536}},
        "serve: vLLM must be told how qwen3-8b gets from 40,960 to 65,536 tokens: write hf_overrides into its workload",
    ),
    "overrides that are no JSON": (
        {"workload": {"hf_overrides": "{max: 3}"}},
        "hf_overrides is a JSON object as text, such as",
    ),
    "weights that no disk holds": (
        {"model": "qwen2.5-72b", "skus": ["ND96asr_v4"], "workload": LARGE, "approved_usd_per_month": 90000},
        "serve: 135.4 GiB of weights do not fit on the disks of a ND96asr_v4: put them into the storage account and set"
        " weights: blob",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_what_to_do(case: str) -> None:
    wanted, sentence = CASES[case]
    with pytest.raises(PlannerError) as refused:
        planned(served(**wanted))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_adapter_fits_a_base_whatever_format_that_is_stored_in() -> None:
    _, lock = planned(served(workload={"adapters": [ADAPTER | {"base": "Qwen/Qwen3-8B-AWQ"}]}))
    assert lock.workloads[0].serving is not None
    assert [adapter.name for adapter in lock.workloads[0].serving.adapters] == ["sql"]


def test_an_extended_context_is_told_as_it_was_written() -> None:
    text = '{"max_position_embeddings": 65536, "rope_parameters": {"rope_type": "yarn", "factor": 1.6}}'
    _, lock = planned(served(rope_scaling=2, workload={"context": 65536, "hf_overrides": text}))
    assert f"--hf-overrides={text}" in vllm_arguments(lock.workloads[0])


def test_the_rank_of_the_slots_is_the_next_that_vllm_has_kernels_for() -> None:
    _, lock = planned(served(workload={"adapters": [ADAPTER | {"rank": 24}]}))
    assert "--max-lora-rank=32" in lock.workloads[0].arguments


def test_weights_beyond_the_system_disk_go_to_the_machine_s_own() -> None:
    wanted = served(model="qwen2.5-72b", skus=["NC96ads_A100_v4"], workload=LARGE, approved_usd_per_month=90000)
    _, lock = planned(wanted)
    serving = lock.workloads[0].serving
    assert serving is not None
    # 145 GB and a tenth, and 8 GiB: beyond 0.7 x 128 GiB, within 0.7 x 3,576 GiB
    assert (serving.cache, serving.cache_bytes >> 30) == ("nvme", 156)
    made = render(lock)
    (disk,) = [one for one in made if one["kind"] == "StorageClass"]
    assert disk["provisioner"] == "localdisk.csi.acstor.io"
    (deployment,) = [one for one in made if one["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    (cache,) = [volume for volume in pod["volumes"] if volume["name"] == "cache"]
    claim = cache["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("tonnage-nvme", "157Gi")
    assert pod["containers"][0]["resources"]["limits"]["ephemeral-storage"] == "8Gi"
    for one in (disk, deployment):
        kubernetes_validate.validate(one, lock.platform.kubernetes_version, strict=True)


def test_weights_that_no_disk_holds_are_read_from_the_storage_account() -> None:
    wanted = LARGE | {"weights": "blob"}
    _, lock = planned(served(model="qwen2.5-72b", skus=["ND96asr_v4"], workload=wanted, approved_usd_per_month=90000))
    serving = lock.workloads[0].serving
    assert serving is not None
    assert serving.stored_bytes > 128 << 30
    assert serving.cache_bytes == 8 << 30
    assert serving.read_bytes_per_second == 120_000_000  # assumptions.json, the low figure


def test_a_step_takes_at_most_the_time_to_read_the_whole_gpu() -> None:
    _, lock = planned(served(skus=["NC4as_T4_v3"]))
    serving = lock.workloads[0].serving
    assert serving is not None
    # 15,633,680,957 bytes (T4) / (320 GB/s x 0.5) = 0.0978 s, rounded up
    assert str(serving.token_seconds) == "0.098"
    assert lock.workloads[0].usable_bytes / (320e9 * 0.5) <= float(serving.token_seconds)


def test_an_address_in_the_network_is_on_the_bill() -> None:
    plain, exposed = (planned(served(workload={"expose": expose}))[1].lines_usd for expose in ("cluster", "internal"))
    assert set(exposed) - set(plain) == {"network/internal-load-balancer"}
    assert exposed["network/internal-load-balancer"] == plain["network/load-balancer"]  # another of the same kind
