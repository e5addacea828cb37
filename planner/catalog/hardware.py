"""GPUs and Azure VM sizes: the facts of gpus.json and skus.json, read lazily, looked up forgivingly."""

from __future__ import annotations

import difflib
import re
from datetime import date
from fractions import Fraction
from functools import cache
from typing import Literal

from planner.catalog import read_facts
from planner.errors import PlannerError
from planner.model import Frozen

Topology = Literal["single", "pcie", "nvlink-pairs", "nvlink-mesh", "nvswitch", "infinity-fabric", "unknown"]
MemoryClass = Literal["very-large", "large", "standard"]

# Words that a GPU's name may carry or lack without becoming another GPU.
_NOISE = frozenset({"nvidia", "amd", "geforce", "tesla", "instinct", "radeon", "gpu", "dgx", "unspecified"})


class _Record(Frozen):
    name: str
    source: str
    as_of: date


class Gpu(_Record):
    """A graphics card, or the share of one that a VM sees.

    name: short id, e.g. `a100-80-pcie`; label: what people call it; aliases: other spellings, as logs and papers use
    nameplate_gb: the size that is advertised; usable_bytes: what CUDA reports, the lowest value met (usable_evidence)
    bandwidth_bytes_per_s: of its memory, by the data sheet
    fp16_tflops, bf16_tflops, fp8_tflops, int8_tops: dense tensor peaks (fp32 accumulation), None if lacking or unknown
    compute_capability: `8.6`, or AMD's target such as `gfx942`
    supports_fp8: `native` matmul, `weight-only` (Marlin unpacks to 16 bits), or `no`
    supports_flash_attention_2: None where FlashAttention 2 does not list the card and engines bring their own kernels
    supports_marlin: the int4/fp8 weight-only kernels of vLLM run on it
    link: its fastest link to another GPU, link_bytes_per_s each way; pcie_bytes_per_s: nominal, 16 lanes, each way
    cloud: an Azure size carries it (others are workstation cards and cards of other clouds)
    """

    label: str
    aliases: tuple[str, ...]
    nameplate_gb: int
    usable_bytes: int
    usable_evidence: str
    bandwidth_bytes_per_s: int
    fp16_tflops: float | None
    bf16_tflops: float | None
    fp8_tflops: float | None
    int8_tops: float | None
    compute_capability: str
    supports_bf16: bool
    supports_fp8: Literal["native", "weight-only", "no"]
    supports_flash_attention_2: bool | None
    supports_marlin: bool
    tdp_w: int | None
    link: Literal["pcie3", "pcie4", "pcie5", "nvlink2", "nvlink3", "nvlink4", "nvlink5", "infinity-fabric"]
    link_bytes_per_s: int | None
    pcie_bytes_per_s: int
    cloud: bool
    notes: str

    @property
    def is_cuda(self) -> bool:
        return self.compute_capability[0].isdigit()

    @property
    def capability(self) -> tuple[int, int]:
        """(major, minor) of a CUDA card. AMD cards count as Hopper class for vLLM's defaults."""
        if not self.is_cuda:
            return (9, 0)
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)


class VmSku(_Record):
    """An Azure VM size with GPUs.

    name: ARM name, `Standard_...`; aliases: other ARM names of the same size; quota_family: whose vCPU quota it uses
    gpu: name of a Gpu record, None where the card is not in the catalog; gpu_label: the card in Azure's words
    gpu_count: devices the VM sees, None where not published; gpu_fraction: share of a card behind each, `1/6` .. `1`
    temp_disk_gib, local_nvme_gib, network_gbps: None where not published; infiniband: None when it has none
    topology: how its GPUs are joined; driver: the kind AKS nodes need (`grid` for vGPU profiles, `rocm` for AMD)
    aks_supported: `unverified` where no AKS page says so; regions: those with a price on regions_as_of
    unplannable_reason: why a plan must not choose this size; empty when it may
    """

    aliases: tuple[str, ...] = ()
    series: str
    quota_family: str
    gpu: str | None
    gpu_label: str
    gpu_count: int | None
    gpu_fraction: str | None
    vcpu: int | None
    ram_gib: int | None
    temp_disk_gib: int | None
    local_nvme_gib: int | None
    network_gbps: float | None
    infiniband: str | None = None
    topology: Topology
    topology_source: str
    driver: Literal["cuda", "grid", "rocm"]
    cpu_arch: Literal["x64", "arm64"]
    spot_supported: bool
    aks_supported: Literal["yes", "no", "unverified"]
    mig_capable: bool
    status: Literal["available", "preview", "unlisted", "retired"]
    retirement_date: date | None
    regions: tuple[str, ...]
    regions_as_of: date
    unplannable_reason: str = ""
    notes: str

    @property
    def plannable(self) -> bool:
        """A plan may choose this size."""
        return not self.unplannable_reason

    @property
    def short_name(self) -> str:
        """The name without `Standard_`."""
        return self.name.removeprefix("Standard_")


class CpuSize(Frozen):
    """An Azure size without GPUs, for system nodes and people."""

    name: str
    vcpus: int
    ram_gib: int
    quota_family: str
    source: str
    as_of: date


class LinkNote(Frozen):
    """What tensor parallelism over some GPUs of a VM rests on: a short phrase and where it comes from."""

    text: str
    source: str


@cache
def gpus() -> tuple[Gpu, ...]:
    """All GPUs, sorted by name."""
    records = (Gpu.model_validate(record) for record in read_facts("gpus.json")["gpus"])
    return tuple(sorted(records, key=lambda gpu: gpu.name))


@cache
def skus() -> tuple[VmSku, ...]:
    """All Azure GPU sizes, also those that cannot be planned, sorted by series and size."""
    sizes = []
    for series in read_facts("skus.json")["series"]:
        shared = {key: value for key, value in series.items() if key != "sizes"}
        sizes += [VmSku.model_validate(shared | size) for size in series["sizes"]]
    return tuple(sorted(sizes, key=lambda sku: _natural(sku.name)))


@cache
def gpu(name: str) -> Gpu:
    """The GPU of that name; case, blanks, `NVIDIA`, `GB` and SXM generations do not matter. Raises PlannerError."""
    found = _gpu_index().get(_words(name))
    if found is None:
        spellings = {spelling: g.name for g in gpus() for spelling in (g.name, g.label, *g.aliases)}
        otherwise = f"choose one of {', '.join(g.name for g in gpus())}"
        raise PlannerError(f"{name!r} is not a GPU in the catalog: {_did_you_mean(name, spellings, otherwise)}")
    return found


@cache
def sku(name: str) -> VmSku:
    """The Azure size of that ARM name, with or without `Standard_`, in any case. Raises PlannerError."""
    found = _sku_index().get(_bare(name))
    if found is None:
        otherwise = f"choose one of {', '.join(s.short_name for s in skus() if s.plannable)}"
        spellings = {_bare(s.name): s.short_name for s in skus()}
        raise PlannerError(
            f"{name!r} is not an Azure GPU size in the catalog: {_did_you_mean(_bare(name), spellings, otherwise)}"
        )
    return found


def select_skus(
    *, gpu_name: str | None = None, region: str | None = None, everything: bool = False
) -> tuple[VmSku, ...]:
    """The sizes a plan may choose (or all), by card and by region with a known price. PlannerError when none match."""
    card = gpu(gpu_name) if gpu_name else None
    regions = {name for size in skus() for name in size.regions}
    if region is not None and region not in regions:
        near = _did_you_mean(region, {name: name for name in regions}, "write it as Azure does, for example westeurope")
        raise PlannerError(f"{region!r} is not a region with a priced GPU size: {near}")
    found = tuple(
        size
        for size in skus()
        if (everything or size.plannable)
        and (card is None or size.gpu == card.name)
        and (region is None or region in size.regions)
    )
    if not found:
        raise PlannerError("no Azure GPU size matches: loosen a filter, or add --all for retired and unpublished ones")
    return found


def gpu_of(size: VmSku) -> Gpu:
    """The GPU record behind a size. Raises PlannerError where the size cannot be planned, with the reason."""
    if size.unplannable_reason or size.gpu is None or size.gpu_count is None:
        reason = size.unplannable_reason or f"its GPU ({size.gpu_label}) is not in the catalog"
        raise PlannerError(f"{size.short_name} cannot be planned ({reason}): choose another size")
    return gpu(size.gpu)


def fraction(size: VmSku) -> Fraction:
    """The share of a physical card behind each GPU of the VM: 1/6 .. 1. Raises PlannerError where not published."""
    if size.gpu_fraction is None:
        raise PlannerError(f"{size.short_name} has no published GPU share: choose another size")
    return Fraction(size.gpu_fraction)


@cache
def cpu_size(name: str) -> CpuSize:
    """The CPU size of that ARM name: its family's facts, its vCPUs from the name. Raises PlannerError for others."""
    for family in read_facts("cpu.json")["families"]:
        match = re.fullmatch(family["pattern"], name)
        if match is not None:
            vcpus = int(match["vcpu"])
            return CpuSize(
                name=name,
                vcpus=vcpus,
                ram_gib=vcpus * family["ram_gib_per_vcpu"],
                quota_family=family["quota_family"],
                source=family["source"],
                as_of=family["as_of"],
            )
    known = ", ".join(family["name"] for family in read_facts("cpu.json")["families"])
    raise PlannerError(f"{name!r} is not a CPU size in the catalog: take one of the families {known}, such as D4s_v5")


@cache
def cpu_machine(name: str) -> VmSku:
    """A CPU size as a size without GPUs. PlannerError as cpu_size."""
    size = cpu_size(name)
    return VmSku(
        name=name,
        source=size.source,
        as_of=size.as_of,
        series=name.removeprefix("Standard_")[:1],
        quota_family=size.quota_family,
        gpu=None,
        gpu_label="no GPU",
        gpu_count=0,
        gpu_fraction=None,
        vcpu=size.vcpus,
        ram_gib=size.ram_gib,
        temp_disk_gib=None,
        local_nvme_gib=None,
        network_gbps=None,
        topology="single",
        topology_source=size.source,
        driver="cuda",
        cpu_arch="x64",
        spot_supported=True,
        aks_supported="yes",
        mig_capable=False,
        status="available",
        retirement_date=None,
        regions=(),
        regions_as_of=size.as_of,
        notes="",
    )


def machine(name: str) -> VmSku:
    """The size of a plan's pool: one with GPUs, or without. PlannerError for neither."""
    return cpu_machine(name) if is_cpu_size(name) else sku(name)


def is_cpu_size(name: str) -> bool:
    """Whether the catalog has a family of CPU sizes with that name."""
    return any(re.fullmatch(family["pattern"], name) for family in read_facts("cpu.json")["families"])


@cache
def quota_families() -> tuple[str, ...]:
    """The quota families of all GPU and CPU sizes in the catalog, as Azure writes them."""
    names = {size.quota_family for size in skus()}
    return tuple(sorted(names | {family["quota_family"] for family in read_facts("cpu.json")["families"]}))


@cache
def memory_class(name: str) -> MemoryClass:
    """The class by which vLLM chooses its default batch: by device memory, where no A100 counts as large.

    Raises PlannerError for an unknown GPU. Source: gpus.json, memory_classes.
    """
    card = gpu(name)
    for entry in read_facts("gpus.json")["memory_classes"]["classes"]:
        excepted = any(part in card.label.lower() for part in entry["except_name_contains"])
        if card.usable_bytes >= entry["at_least_bytes"] and not excepted:
            return entry["name"]  # type: ignore[no-any-return]
    raise PlannerError(f"{card.name} has no memory class: check memory_classes in planner/catalog/gpus.json")


def tensor_parallel_options(size: VmSku) -> tuple[int, ...]:
    """Tensor-parallel sizes that one VM allows: the powers of two up to its GPU count, and that count itself."""
    gpu_of(size)  # refuses a size that cannot be planned
    count = size.gpu_count or 0
    powers = {1 << exponent for exponent in range(count.bit_length()) if 1 << exponent <= count}
    return tuple(sorted(powers | {count}))


def link_bytes_per_s(size: VmSku, tp: int) -> int | None:
    """Bytes per second, each way, of the slowest link inside a tensor-parallel group; None for tp 1 or if not known."""
    card = gpu_of(size)
    _check_tp(size, tp)
    if tp == 1:
        return None
    match size.topology:
        case "pcie":
            return card.pcie_bytes_per_s
        case "nvlink-pairs":
            return card.link_bytes_per_s if tp == 2 else card.pcie_bytes_per_s
        case "nvswitch" | "infinity-fabric":
            return card.link_bytes_per_s
        case _:  # in a mesh a group gets some of each GPU's links, and which is not published
            return None


def link_note(size: VmSku, tp: int) -> LinkNote:
    """What the link between the GPUs of a tensor-parallel group means for speed. Raises PlannerError for a wrong tp."""
    card = gpu_of(size)
    _check_tp(size, tp)
    speed = link_bytes_per_s(size, tp)
    rate = "" if speed is None else f" ({speed / 1e9:g} GB/s each way)"
    if tp == 1:
        text = "one GPU, no link needed"
    elif size.topology == "pcie":
        text = f"PCIe only{rate}: decode tolerates it, prefill suffers"
    elif size.topology == "nvlink-pairs":
        pair = f"an NVLink pair{rate}: full speed inside the pair"
        text = pair if tp == 2 else f"NVLink pairs joined by PCIe{rate}: prefill suffers, tp 2 stays inside a pair"
    elif size.topology == "nvlink-mesh":
        text = f"an NVLink mesh{rate}: not every GPU is a neighbour of every other"
    elif size.topology == "nvswitch":
        text = f"NVSwitch{rate}: every GPU reaches every other at full speed"
    elif size.topology == "infinity-fabric":
        text = f"Infinity Fabric{rate}: every GPU is linked to every other"
    else:
        text = "link not documented: measure before relying on tensor parallelism"
    return LinkNote(text=text, source=f"{size.topology_source}; {card.source}")


def _check_tp(size: VmSku, tp: int) -> None:
    options = tensor_parallel_options(size)
    if tp not in options:
        allowed = ", ".join(map(str, options))
        raise PlannerError(f"tensor parallel {tp} is not possible on {size.short_name}: choose one of {allowed}")


@cache
def _gpu_index() -> dict[frozenset[str], Gpu]:
    return {_words(spelling): card for card in gpus() for spelling in (card.name, card.label, *card.aliases)}


@cache
def _sku_index() -> dict[str, VmSku]:
    return {_bare(spelling): size for size in skus() for spelling in (size.name, *size.aliases)}


def _words(name: str) -> frozenset[str]:
    """The words and numbers that tell GPUs apart: `NVIDIA A100-SXM4-80GB` -> {a, 100, sxm, 80}."""
    text = name.lower()
    text = re.sub(r"(?<=[0-9])\s*gi?b\b", " ", text)  # 80GB, 80 GiB -> 80
    text = re.sub(r"\bsxm[0-9]\b", "sxm", text)
    return frozenset(re.findall(r"[a-z]+|[0-9]+", text)) - _NOISE


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower().removeprefix("standard")


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key that puts NC8 before NC16."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name.lower()))


def _did_you_mean(name: str, spellings: dict[str, str], otherwise: str) -> str:
    """`did you mean a, b or c?` from the nearest spellings, each by the name to type; `otherwise` when none is near."""
    wanted = name.strip().lower()
    lowered = {spelling.lower(): target for spelling, target in spellings.items()}
    near = difflib.get_close_matches(wanted, lowered, n=8, cutoff=0.5)
    inside = [spelling for spelling in lowered if wanted and wanted in spelling]
    names = list(dict.fromkeys(lowered[spelling] for spelling in near + inside))[:3]
    if not names:
        return otherwise
    return f"did you mean {' or '.join(filter(None, (', '.join(names[:-1]), names[-1])))}?"
