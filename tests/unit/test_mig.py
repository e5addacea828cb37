"""GPUs cut by MIG: what a device has, what fits on it, how many pods a machine holds, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from planner.catalog import load_model, read_facts
from planner.catalog.hardware import gpu_of, sku, skus
from planner.catalog.mig import CutSku, Profile, card_of, cut
from planner.catalog.prices import load_sheet
from planner.errors import DoesNotFit, PlannerError
from planner.fit import Fit, Misfit, fit_size, gpu_options
from planner.memory.serving import ServingSettings
from planner.memory.training import FinetuneSettings
from planner.plan import Plan, make_plan, parse_intent
from planner.plan.lock import lock_of, parse_lock

SHEET = load_sheet("2026-11")
PROFILES: tuple[Profile, ...] = ("MIG1g", "MIG2g", "MIG3g", "MIG4g", "MIG7g")
CAPABLE = tuple(size for size in skus() if size.mig_capable)
SERVE = {"kind": "serve", "context": 2048, "schedule": "60h", "settings": {"quantization": "awq"}}


def part_of(name: str, profile: Profile) -> CutSku:
    part = cut(sku(name), profile)
    assert part is not None
    return part


def intent_of(*workloads: dict[str, Any], **fields: Any) -> Any:
    return parse_intent(
        {"model": "qwen3-8b", "workloads": workloads, "gpu_instance_profile": "MIG1g", **fields}, "test"
    )


def planned(*workloads: dict[str, Any], **fields: Any) -> Plan:
    return make_plan(intent_of(*workloads, **fields), SHEET)


# -------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("name", "profile", "devices"),
    [
        # GPUs of the machine x devices of a GPU: 7, 3, 2, 1, 1
        ("NC24ads_A100_v4", "MIG1g", 7),
        ("NC24ads_A100_v4", "MIG2g", 3),
        ("NC24ads_A100_v4", "MIG3g", 2),
        ("NC24ads_A100_v4", "MIG4g", 1),
        ("NC24ads_A100_v4", "MIG7g", 1),
        ("NC48ads_A100_v4", "MIG2g", 6),
        ("NC96ads_A100_v4", "MIG3g", 8),
        ("ND96asr_v4", "MIG1g", 56),
        ("ND96isr_H200_v5", "MIG1g", 56),
    ],
)
def test_a_machine_gives_so_many_devices(name: str, profile: Profile, devices: int) -> None:
    part = part_of(name, profile)
    assert part.gpu_count == devices
    assert part.name == sku(name).name  # it is bought and counted by its own name
    assert part.short_name == f"{name} ({profile})"


def test_a_device_has_the_memory_that_nvidia_lists_and_its_share_of_the_rest() -> None:
    card = card_of(part_of("NC24ads_A100_v4", "MIG1g"))
    assert card.usable_bytes == 10_200_547_328  # 9.50 GiB x 2^30
    assert card.bandwidth_bytes_per_s == 241_875_000_000  # 1,935 GB/s / 8
    assert card.fp16_tflops == pytest.approx(312 / 7)
    assert card.fp8_tflops is None
    assert card.link_bytes_per_s is None
    assert card.label.endswith("MIG 1g.10gb")
    three = card_of(part_of("NC40ads_H100_v5", "MIG3g"))
    assert three.usable_bytes == 49_520_972_922  # 46.12 GiB x 2^30, rounded down
    assert three.bandwidth_bytes_per_s == 3_900_000_000_000 * 4 // 8
    assert card_of(sku("NC24ads_A100_v4")) == gpu_of(sku("NC24ads_A100_v4"))


@pytest.mark.parametrize("size", CAPABLE, ids=lambda size: size.name)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_device_never_has_more_than_its_slices_of_the_card(size: Any, profile: Profile) -> None:
    shape = read_facts("mig.json")["profiles"][profile]
    assert shape["per_gpu"] * shape["memory_slices"] <= 8
    assert shape["per_gpu"] * shape["compute_slices"] <= 7
    whole, part = gpu_of(size), card_of(part_of(size.name, profile))
    assert 0.85 < part.usable_bytes / (whole.usable_bytes * shape["memory_slices"] / 8) <= 1


def test_every_size_that_can_be_cut_is_known_and_no_other_is_cut() -> None:
    for size in skus():
        assert (cut(size, "MIG1g") is not None) == size.mig_capable, size.name
    for record in read_facts("mig.json")["devices"]:
        assert record["source"]
        assert record["as_of"]
        assert set(record["names"]) == set(record["gib"]) == set(PROFILES)


# ---------------------------------------------------------------------------------------------------------------- fit


def test_a_workload_has_one_device_to_itself_and_never_two() -> None:
    part = part_of("NC48ads_A100_v4", "MIG1g")
    settings = ServingSettings(max_model_len=2048)
    assert gpu_options(settings, part) == (1,)
    assert gpu_options(settings, part, 2) == ()
    assert gpu_options(FinetuneSettings(seq_len=2048, n_gpus=2, parallelism="ddp"), part) == ()
    assert gpu_options(settings, sku("NC48ads_A100_v4")) == (1, 2)


def test_what_fits_the_card_need_not_fit_a_device() -> None:
    spec, part = load_model("qwen3-8b"), part_of("NC24ads_A100_v4", "MIG1g")
    # 16.4 GB of weights in 16 bits, 10.2 GB there
    whole = fit_size(spec, ServingSettings(max_model_len=2048), part)
    assert isinstance(whole, Misfit)
    assert whole.place.label == "NC24ads_A100_v4 (MIG1g)"
    small = fit_size(spec, ServingSettings(max_model_len=2048, quantization="awq"), part)
    assert isinstance(small, Fit)
    assert (small.usable_bytes, small.place.gpus, small.place.available) == (10_200_547_328, 1, 7)


# --------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize(("replicas", "machines"), [(1, 1), (7, 1), (8, 2), (14, 2), (15, 3)])
def test_a_machine_holds_as_many_replicas_as_devices(replicas: int, machines: int) -> None:
    plan = planned(SERVE | {"replicas": replicas}, skus=["NC24ads_A100_v4"])
    (pool,) = plan.pools
    assert (pool.max_nodes, pool.gpus_per_node) == (machines, 7)
    assert (plan.workloads[0].gpus, plan.workloads[0].usable_bytes) == (1, 10_200_547_328)


def test_only_sizes_that_can_be_cut_are_considered() -> None:
    plan = planned(SERVE)
    assert all(sku(pool.sku).mig_capable for pool in plan.pools)
    by_verdict = {row.sku: (row.verdict, row.reason) for row in plan.considered}
    assert by_verdict["NC4as_T4_v3"] == ("excluded", "its GPUs cannot be cut into MIG1g")
    assert by_verdict["NC24ads_A100_v4 (MIG1g)"][0] == "chosen"


def test_the_bill_is_of_whole_machines() -> None:
    cut_up, whole = planned(SERVE), planned(SERVE, gpu_instance_profile=None, skus=["NC24ads_A100_v4"])
    assert cut_up.pools[0].sku == whole.pools[0].sku
    assert cut_up.gpu_usd == whole.gpu_usd
    assert cut_up.quota == whole.quota


def test_the_lock_says_how_the_gpus_are_cut() -> None:
    intent = intent_of(SERVE)
    held = lock_of(make_plan(intent, SHEET), intent)
    assert {(pool.gpu_instance_profile, pool.gpus_per_node) for pool in held.pools} == {("MIG1g", 7)}
    assert parse_lock(held.plain(), "the plan") == held
    assert intent.digest != intent_of(SERVE, gpu_instance_profile=None).digest


@pytest.mark.parametrize("settings", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_a_server_over_several_devices_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PlannerError, match="serve asks for 2 GPUs, and MIG devices cannot be joined: leave out"):
        planned(SERVE | {"settings": settings})


def test_a_run_over_several_devices_is_refused() -> None:
    run = {"kind": "finetune", "context": 2048, "settings": {"n_gpus": 2, "parallelism": "ddp"}}
    with pytest.raises(PlannerError, match="finetune asks for 2 GPUs, and MIG devices cannot be joined"):
        planned(run)


def test_a_model_beyond_every_device_is_refused_with_what_it_needs() -> None:
    with pytest.raises(DoesNotFit, match=r"fits on no size that is allowed: on ND96isr_H200_v5 \(MIG1g\) it needs"):
        planned(SERVE | {"context": 32768, "concurrency": 8, "settings": {}})


def test_a_size_that_cannot_be_cut_is_refused_by_name() -> None:
    with pytest.raises(DoesNotFit, match="NC4as_T4_v3: its GPUs cannot be cut into MIG1g"):
        planned(SERVE, skus=["NC4as_T4_v3"])


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(PlannerError, match="gpu_instance_profile cannot be planned: it should be 'MIG1g', 'MIG2g'"):
        intent_of(SERVE, gpu_instance_profile="1g.10gb")
