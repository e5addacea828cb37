"""How training is run beside its memory: what an intent may choose, and what its times and its disk follow from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from planner.model import Amount, Frozen
from planner.plan.serving import Cache, Weights

RunName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,14}[a-z0-9])?$")]
Recipe = dict[str, Any]


class TrainingRun(Frozen):
    """One run of a workload, a Job of its own.

    name: of its Job, before its digits; recipe: fields of the program's configuration that no plan decides
    """

    name: str
    recipe: Recipe = Field(default_factory=dict)


class Training(Frozen):
    """What a lock keeps of a fine-tuning workload, beside its memory and the trainer's settings.

    machines: of one run, each with gpus / machines of its GPUs; runs: what is trained, each by itself
    weights: where the base model is read from; queue: Kueue's LocalQueue, None without
    disk_bytes: of the machine's disk: the model's files, checkpoints and the result before they are at Blob
    cache: the system disk, or the machine's own NVMe disks where that is too small
    micro_batch_seconds: at most, None where no speed is known; write_bytes_per_second, save_seconds: of a checkpoint,
    pessimistic, by assumptions.json; flops_per_second: of one GPU in 16 bits, dense, None where it is not published
    """

    machines: int = 1
    runs: tuple[TrainingRun, ...]
    weights: Weights = "hub"
    queue: str | None = None
    disk_bytes: int
    cache: Cache = "disk"
    micro_batch_seconds: Amount | None
    write_bytes_per_second: int
    save_seconds: int
    flops_per_second: int | None


def runs_of(name: str, replicas: int, recipe: Recipe, runs: Mapping[str, Recipe]) -> tuple[TrainingRun, ...]:
    """The runs of a workload: those that are named, else one for each replica.

    A run's own recipe goes over the workload's, field by field.
    """
    if runs:
        return tuple(TrainingRun(name=f"{name}-{run}", recipe=over(recipe, own)) for run, own in runs.items())
    if replicas == 1:
        return (TrainingRun(name=name, recipe=recipe),)
    return tuple(TrainingRun(name=f"{name}-{number}", recipe=recipe) for number in range(1, replicas + 1))


def over(under: Mapping[str, Any], own: Mapping[str, Any]) -> Recipe:
    """One mapping over another, inner mappings too."""
    found = dict(under)
    for key, value in own.items():
        inner = found.get(key)
        found[key] = over(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return found


def check_runs(replicas: int, runs: Mapping[str, Recipe]) -> None:
    """ValueError where more runs at the same time are paid for than there are."""
    if runs and replicas > len(runs):
        raise ValueError(f"{replicas} runs at the same time are asked for and {len(runs)} are named: name as many")
