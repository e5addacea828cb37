"""GPUs cut into MIG devices: how many a profile gives, and what each has of memory and of compute."""

from __future__ import annotations

from decimal import Decimal
from functools import cache
from typing import Any, Literal

from planner.catalog import read_facts
from planner.catalog.hardware import Gpu, VmSku, gpu_of
from planner.units import GIB

Profile = Literal["MIG1g", "MIG2g", "MIG3g", "MIG4g", "MIG7g"]


class CutSku(VmSku):
    """A size whose GPUs are all cut by one profile. gpu_count: MIG devices of the VM; profile: as AKS calls it."""

    profile: Profile

    @property
    def short_name(self) -> str:
        """`NC24ads_A100_v4 (MIG1g)`."""
        return f"{super().short_name} ({self.profile})"


@cache
def cut(size: VmSku, profile: Profile) -> CutSku | None:
    """The size with every GPU cut by the profile, GPUs x devices a GPU; None where that cannot be or is not known."""
    if not size.mig_capable or size.gpu_fraction != "1" or _device(size) is None:
        return None
    count = (size.gpu_count or 0) * int(read_facts("mig.json")["profiles"][profile]["per_gpu"])
    return CutSku(**size.model_dump() | {"gpu_count": count}, profile=profile)


@cache
def card_of(size: VmSku) -> Gpu:
    """The GPU that a workload sees on a size: a card, or a MIG device of it. PlannerError as gpu_of.

    usable bytes: what nvidia-smi lists for the profile, which is below slices / 8 of the card, and never more than
    CUDA reports of the whole card; bandwidth x memory slices / 8, peaks x compute slices / 7. No link: MIG devices
    cannot reach each other. Source: mig.json.
    """
    card = gpu_of(size)
    if not isinstance(size, CutSku):
        return card
    device, shape = _device(size), read_facts("mig.json")["profiles"][size.profile]
    assert device is not None
    listed = int(Decimal(device["gib"][size.profile]) * GIB)
    peaks = {name: getattr(card, name) for name in ("fp16_tflops", "bf16_tflops", "fp8_tflops", "int8_tops")}
    compute = {name: None if peak is None else peak * shape["compute_slices"] / 7 for name, peak in peaks.items()}
    label = f"{card.label} MIG {device['names'][size.profile]}"
    return card.model_copy(
        update=compute
        | {
            "name": f"{card.name}-{device['names'][size.profile]}",
            "label": label,
            "aliases": (),
            "usable_bytes": min(listed, card.usable_bytes),
            "usable_evidence": device["source"],
            "bandwidth_bytes_per_s": card.bandwidth_bytes_per_s * shape["memory_slices"] // 8,
            "link_bytes_per_s": None,
            "source": f"{card.source}; {read_facts('mig.json')['source']}; {device['source']}",
        }
    )


def _device(size: VmSku) -> dict[str, Any] | None:
    """What is known of the MIG devices of a size's card."""
    return next((record for record in read_facts("mig.json")["devices"] if size.gpu in record["gpus"]), None)
