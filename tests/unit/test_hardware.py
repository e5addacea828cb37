"""GPUs and Azure sizes: the look-ups, and the integrity of the data behind them."""

from __future__ import annotations

from datetime import date
from fractions import Fraction

import pytest

from planner.catalog.hardware import (
    Gpu,
    VmSku,
    fraction,
    gpu,
    gpu_of,
    gpus,
    link_bytes_per_s,
    link_note,
    memory_class,
    sku,
    skus,
    tensor_parallel_options,
)
from planner.errors import PlannerError
from planner.units import GIB

# fmt: off
# Every GPU size that Azure's size pages list and that is not retired (articles/virtual-machines/sizes/gpu-accelerated).
CURRENT = [
    "NC4as_T4_v3", "NC8as_T4_v3", "NC16as_T4_v3", "NC64as_T4_v3",
    "ND40rs_v2",
    "NV6ads_A10_v5", "NV12ads_A10_v5", "NV18ads_A10_v5", "NV36ads_A10_v5", "NV36adms_A10_v5", "NV72ads_A10_v5",
    "NC24ads_A100_v4", "NC48ads_A100_v4", "NC96ads_A100_v4",
    "ND96asr_v4", "ND96amsr_A100_v4",
    "NC40ads_H100_v5", "NC80adis_H100_v5", "NCC40ads_H100_v5",
    "ND96isr_H100_v5", "ND96isr_H200_v5", "ND96isr_MI300X_v5",
    "ND128isr_NDR_GB200_v6", "ND128isr_GB300_v6", "ND128isrG5_GB300_v6",
    "NC128ds_xl_RTXPRO6000BSE_v6", "NC128lds_xl_RTXPRO6000BSE_v6",
    "NC256ds_xl_RTXPRO6000BSE_v6", "NC256lds_xl_RTXPRO6000BSE_v6",
    "NC320ds_xl_RTXPRO6000BSE_v6", "NC320lds_xl_RTXPRO6000BSE_v6",
    "NV4ads_V710_v5", "NV8ads_V710_v5", "NV12ads_V710_v5", "NV24ads_V710_v5", "NV28adms_V710_v5",
]

RETIRED = [
    "NC6s_v3", "NC12s_v3", "NC24s_v3", "NC24rs_v3", "NV4as_v4", "NV8as_v4",
    "NV16as_v4", "NV32as_v4", "NV12s_v3", "NV24s_v3", "NV48s_v3",
]
# fmt: on

each_gpu = pytest.mark.parametrize("card", gpus(), ids=lambda card: card.name)
each_size = pytest.mark.parametrize("size", skus(), ids=lambda size: size.short_name)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("t4", "t4"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", "a10g"),
        ("A10 24GB", "a10"),
        ("NVIDIA A10-8Q", "a10-8q"),
        ("A100-80GB", "a100-80-pcie"),
        ("A100-40GB (SXM4)", "a100-40-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-80-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("h100-80gb sxm", "h100-80-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-80-sxm"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("H200", "h200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("GeForce RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("A6000", "rtx-a6000"),
        ("RTX 6000 Ada", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000-se"),
        ("B200", "b200"),
        ("GB200", "gb200"),
    ],
)
def test_a_gpu_is_found_however_it_is_written(written: str, expected: str) -> None:
    assert gpu(written).name == expected


@pytest.mark.parametrize(("written", "expected"), [("h100-pci", "h100-80-pcie"), ("RTX 6000", "rtx-6000-ada")])
def test_an_unknown_gpu_is_refused_with_the_nearest_names(written: str, expected: str) -> None:
    with pytest.raises(PlannerError, match=f"{written}.*did you mean.*{expected}"):
        gpu(written)


def test_a_gpu_that_resembles_none_is_refused_with_the_whole_list() -> None:
    with pytest.raises(PlannerError, match=r"'zzz' is not a GPU in the catalog: choose one of a10, .*, t4"):
        gpu("zzz")


@pytest.mark.parametrize(
    "written", ["Standard_NC24ads_A100_v4", "NC24ads_A100_v4", "standard_nc24ads_a100_v4", " nc24ads a100 v4 "]
)
def test_a_size_is_found_with_or_without_standard_in_any_case(written: str) -> None:
    assert sku(written).name == "Standard_NC24ads_A100_v4"


def test_both_arm_names_of_the_40_gb_a100_size_mean_the_same_size() -> None:
    assert sku("Standard_ND96asr_A100_v4") is sku("Standard_ND96asr_v4")


def test_an_unknown_size_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(PlannerError, match=r"NC48ads_A100_v5.*did you mean NC48ads_A100_v4"):
        sku("NC48ads_A100_v5")


def test_a_retired_size_is_known_but_refused_with_its_date() -> None:
    with pytest.raises(PlannerError, match=r"NC6s_v3 cannot be planned \(retired on 2025-09-30\): choose another size"):
        gpu_of(sku("NC6s_v3"))


def test_usable_memory_is_what_cuda_reports_and_not_the_nameplate() -> None:
    # GiB read in torch's out-of-memory lines: 14.56 (T4), 22.06 (A10), 79.15 (A100-80), 93.09 (H100 NVL), 139.80 (H200)
    measured = {"t4": 14.56, "a10": 22.06, "a100-80-pcie": 79.15, "h100-nvl": 93.09, "h200": 139.80}
    for name, gib in measured.items():
        assert gpu(name).usable_bytes == pytest.approx(gib * GIB, abs=1)


def test_a_fraction_of_an_a10_has_its_share_of_frame_buffer_and_bandwidth() -> None:
    for name, share, frame_buffer_gb in [("NV6ads", "1/6", 4), ("NV12ads", "1/3", 8), ("NV18ads", "1/2", 12)]:
        size = sku(f"{name}_A10_v5")
        card = gpu_of(size)
        assert (size.gpu_count, size.gpu_fraction, card.nameplate_gb) == (1, share, frame_buffer_gb)
        assert fraction(size) * gpu("a10").nameplate_gb == frame_buffer_gb
        assert card.bandwidth_bytes_per_s == fraction(size) * 600_000_000_000
        # vGPU keeps a part for itself: about 0.2 GiB in the guests where it was read
        assert frame_buffer_gb * GIB - card.usable_bytes == pytest.approx(0.18 * GIB, abs=0.03 * GIB)


@pytest.mark.parametrize(
    ("card", "expected"),
    # vLLM: 160 GiB and more; 70 GiB and more unless it is an A100; all others
    [
        ("gb200", "very-large"),
        ("mi300x", "very-large"),
        ("h200", "large"),
        ("h100-nvl", "large"),
        ("rtx-pro-6000-se", "large"),
        ("a100-80-sxm", "standard"),
        ("a100-80-pcie", "standard"),
        ("a10", "standard"),
    ],
)
def test_the_memory_class_follows_the_engine_where_no_a100_counts_as_large(card: str, expected: str) -> None:
    assert memory_class(card) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("NC24ads_A100_v4", (1,)),
        ("NC48ads_A100_v4", (1, 2)),
        ("NC96ads_A100_v4", (1, 2, 4)),
        ("ND96isr_H100_v5", (1, 2, 4, 8)),
        ("NV6ads_A10_v5", (1,)),
    ],
)
def test_tensor_parallel_goes_up_to_the_gpus_of_one_vm(name: str, options: tuple[int, ...]) -> None:
    assert tensor_parallel_options(sku(name)) == options


def test_tensor_parallel_beyond_the_vm_is_refused() -> None:
    with pytest.raises(PlannerError, match="tensor parallel 4 is not possible on NC48ads_A100_v4: choose one of 1, 2"):
        link_note(sku("NC48ads_A100_v4"), 4)


def test_nvlink_reaches_a_pair_on_nc96_and_pcie_carries_the_rest() -> None:
    size = sku("NC96ads_A100_v4")
    assert link_bytes_per_s(size, 1) is None
    assert link_bytes_per_s(size, 2) == 300_000_000_000  # NVLink 3 bridge: 600 GB/s both ways together
    assert link_bytes_per_s(size, 4) == 32_000_000_000  # PCIe 4.0, 16 lanes
    assert "pair" in link_note(size, 2).text
    assert "prefill suffers" in link_note(size, 4).text


def test_t4_and_a10_are_joined_by_pcie_only_and_the_note_warns_of_prefill() -> None:
    for name, tp in [("NC64as_T4_v3", 4), ("NV72ads_A10_v5", 2)]:
        assert "PCIe only" in link_note(sku(name), tp).text
        assert "prefill suffers" in link_note(sku(name), tp).text


def test_nd_sizes_are_joined_by_nvswitch() -> None:
    note = link_note(sku("ND96isr_H100_v5"), 8)
    assert note.text.startswith("NVSwitch (450 GB/s each way)")  # NVLink 4: 900 GB/s both ways together
    assert "ndh100v5-series.md" in note.source


def test_cards_without_bf16_or_fp8_say_so() -> None:
    assert not gpu("t4").supports_bf16
    assert gpu("t4").bf16_tflops is None
    assert gpu("a100-80-sxm").supports_fp8 == "weight-only"
    assert gpu("h100-nvl").supports_fp8 == "native"


@pytest.mark.parametrize("name", CURRENT)
def test_every_current_azure_gpu_size_is_listed(name: str) -> None:
    assert sku(name).status in ("available", "preview")


def test_nothing_is_listed_as_available_that_the_size_pages_do_not_have() -> None:
    assert {s.short_name for s in skus() if s.status in ("available", "preview")} == set(CURRENT)


@pytest.mark.parametrize("name", RETIRED)
def test_every_retired_size_is_marked_and_not_plannable(name: str) -> None:
    size = sku(name)
    assert size.status == "retired"
    assert size.retirement_date is not None
    assert not size.plannable


@each_gpu
def test_a_gpu_record_is_complete_and_believable(card: Gpu) -> None:
    assert card.source
    assert card.usable_evidence
    assert date(2026, 1, 1) <= card.as_of
    # sellers say GB for what is GiB on the board; at least 90 % of it reaches CUDA
    assert 0.90 * card.nameplate_gb * GIB < card.usable_bytes < card.nameplate_gb * GIB
    assert 50e9 < card.bandwidth_bytes_per_s < 10e12
    assert card.pcie_bytes_per_s in (16_000_000_000, 32_000_000_000, 64_000_000_000)
    assert card.fp16_tflops is not None


@each_gpu
def test_what_a_gpu_supports_agrees_with_its_peaks_and_its_generation(card: Gpu) -> None:
    assert card.supports_bf16 == (card.bf16_tflops is not None)
    assert (card.supports_fp8 == "native") == (card.fp8_tflops is not None)
    if card.compute_capability.startswith("gfx"):
        assert not card.supports_marlin
        return
    capability = tuple(map(int, card.compute_capability.split(".")))
    assert card.supports_bf16 == (capability >= (8, 0))
    assert (card.supports_fp8 == "native") == (capability >= (8, 9))
    assert card.supports_marlin == (capability >= (7, 5))
    assert card.supports_flash_attention_2 == (None if capability >= (10, 0) else capability >= (8, 0))


@each_size
def test_a_size_record_says_where_it_comes_from(size: VmSku) -> None:
    assert size.name.startswith("Standard_")
    assert size.source
    assert size.quota_family
    assert date(2026, 1, 1) <= size.as_of
    assert list(size.regions) == sorted(set(size.regions))


@each_size
def test_a_plannable_size_has_a_known_gpu_and_all_its_numbers(size: VmSku) -> None:
    if not size.plannable:
        assert size.unplannable_reason
        return
    card = gpu_of(size)
    assert card.cloud
    assert card.name == size.gpu
    assert size.gpu_count is not None
    assert size.gpu_count > 0
    assert 0 < fraction(size) <= 1
    assert fraction(size) == 1 or size.gpu_count == 1
    assert size.vcpu is not None
    assert size.vcpu > 0
    assert size.ram_gib is not None
    assert size.ram_gib * GIB > card.usable_bytes * Fraction(1, 2)  # a model must pass through the host's memory
    assert size.regions
    assert size.topology != "unknown"
    assert (size.topology == "single") == (size.gpu_count == 1)
    assert size.aks_supported in ("yes", "unverified")


@each_size
def test_the_vcpu_count_of_a_size_is_the_number_in_its_name(size: VmSku) -> None:
    if size.vcpu is not None:
        digits = size.short_name.lstrip("NCDV").split("_")[0]
        assert digits.startswith(str(size.vcpu))


def test_names_and_aliases_are_unique_and_sorted() -> None:
    names = [card.name for card in gpus()]
    assert names == sorted(set(names))
    sizes = [size.name for size in skus()]
    assert len(sizes) == len(set(sizes))


@each_gpu
def test_no_spelling_of_a_gpu_leads_to_another(card: Gpu) -> None:
    for spelling in (card.name, card.label, *card.aliases):
        assert gpu(spelling) is card


def test_every_gpu_that_azure_carries_is_behind_some_size() -> None:
    # the 16 GB V100 is only behind retired sizes and the GB300 behind sizes without a price
    behind = {size.gpu for size in skus() if size.gpu}
    assert {card.name for card in gpus() if card.cloud} == behind
