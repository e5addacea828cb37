"""Servers without a GPU: on which CPU sizes one fits, smallest first."""

from __future__ import annotations

from collections.abc import Sequence

from planner.catalog import read_facts
from planner.catalog.hardware import Gpu, VmSku, cpu_machine, gpus, is_cpu_size
from planner.catalog.platform import platform
from planner.errors import PlannerError
from planner.fit import Fit, Misfit, Place, limiting_component, slack_bytes
from planner.memory.cpu import cpu_serving_memory
from planner.memory.serving import ServingSettings
from planner.model import ModelSpec
from planner.units import GIB


def memory_of(size: VmSku) -> Gpu:
    """A machine's memory in the form of a card's: what pods may take of it, and how fast it is read.

    RAM x memory_limit of platform.json; vCPUs x bandwidth of one (cpu.json)
    """
    rate = read_facts("cpu.json")["serving"]["bandwidth_bytes_per_s_per_vcpu"]
    usable = int((size.ram_gib or 0) * GIB * platform().shares["memory_limit"])
    return gpus()[0].model_copy(
        update={
            "name": "cpu",
            "label": f"{size.vcpu} vCPUs",
            "usable_bytes": usable,
            "bandwidth_bytes_per_s": rate["value"] * (size.vcpu or 0),
            "supports_bf16": True,
            "source": f"{size.source}; {rate['source']}",
        }
    )


def cpu_outcomes(
    spec: ModelSpec, settings: ServingSettings, skus: Sequence[str], headroom: float
) -> tuple[tuple[VmSku, Fit | Misfit | str], ...]:
    """Every CPU size that a plan may choose, with how the server fares there. skus: those that the intent names."""
    named = [name for name in skus if is_cpu_size(name)]
    sizes = [cpu_machine(name) for name in named or read_facts("cpu.json")["serving"]["sizes"]["value"]]
    sizes.sort(key=lambda size: (size.ram_gib or 0, size.vcpu or 0, size.name))
    return tuple((size, _fit(spec, settings, size, headroom)) for size in sizes)


def _fit(spec: ModelSpec, settings: ServingSettings, size: VmSku, headroom: float) -> Fit | Misfit:
    card = memory_of(size)
    place = Place(gpu=card, sku=size, gpus=1, available=1)
    common = {"place": place, "usable_bytes": card.usable_bytes, "largest_context": 0}
    try:
        memory = cpu_serving_memory(spec, settings, usable_bytes=card.usable_bytes)
    except PlannerError as error:
        return Misfit(**common, component="", needed_bytes=0, missing_bytes=0, reason=str(error))
    needed, slack = memory.estimate.expected_bytes, slack_bytes(memory, card.usable_bytes, headroom)
    if slack < 0:
        component = limiting_component(memory)
        return Misfit(**common, component=component, needed_bytes=needed, missing_bytes=-slack, memory=memory)
    return Fit(**common, settings=settings, memory=memory, needed_bytes=needed)
