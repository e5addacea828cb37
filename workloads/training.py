"""A training run as values for its template: its configuration, and what a pod that may be evicted needs.

A run is a Job of its own. Its pod mounts nothing of Blob: the program fetches and keeps what is there, with checksums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, NamedTuple

import yaml

from planner.errors import PlannerError
from planner.plan.lock import Lock, LockedWorkload
from planner.plan.training import TrainingRun
from workloads.blobs import ACCOUNT, is_url, parse_place
from workloads.finetune import INTERRUPTED, REFUSED
from workloads.finetune.bundle import sources
from workloads.finetune.config import FinetuneConfig
from workloads.finetune.from_plan import Paths, config_of, training_of
from workloads.pods import (
    MOUNTS,
    NAMESPACE,
    USER,
    Manifest,
    digest,
    environment,
    labels_of,
    place,
    resources,
    volumes,
)
from workloads.timing import training_timing

PROGRAM, CONFIG = "/program", "/config"
CONFIG_FILE = "run.yaml"
RETRIES = 3  # of what may be cured by itself, for each machine of a run
MASTER_PORT = 29500  # on which the machines of a run find each other
RUN_LABEL = "tonnage/run"
TUNED = "tuned"  # the folder of the container `models` with models that were trained in full
QUEUE = "kueue.x-k8s.io/queue-name"


class Planned(NamedTuple):
    """A run with its configuration.

    config.run: of its checkpoints and its result, the same as long as it learns the same
    """

    run: TrainingRun
    config: FinetuneConfig


def planned_runs(lock: Lock, workload: LockedWorkload, *, desk: bool = False, trainer: str = "trl") -> list[Planned]:
    """Every run of a workload. PlannerError for a recipe that the program refuses, as config_of.

    desk: with folders beside the reader in place of Blob, for another trainer
    """
    return [_planned(lock, workload, run, desk=desk, trainer=trainer) for run in training_of(workload).runs]


def _planned(lock: Lock, workload: LockedWorkload, run: TrainingRun, *, desk: bool, trainer: str) -> Planned:
    training = training_of(workload)
    kept = f"models/{TUNED}" if workload.settings.get("method") == "full" else "adapters"
    at = "" if desk else "az://"
    choices = dict(run.recipe)
    data = choices.get("data", {})
    files: dict[str, Any] = {}
    if isinstance(data, dict):
        files = {name: data[name] for name in ("train", "evaluation") if data.get(name)}
        choices["data"] = {name: value for name, value in data.items() if name not in ("train", "evaluation")}
    train, evaluation = files.get("train", f"{run.name}/train.jsonl"), files.get("evaluation")

    def made(name: str) -> FinetuneConfig:
        paths = Paths(
            train=_dataset(run.name, train, at),
            evaluation=None if evaluation is None else _dataset(run.name, evaluation, at),
            checkpoints=f"checkpoints/{name}" if desk else "/cache/checkpoints",
            mirror=None if desk else f"az://checkpoints/{name}",
            result=f"{kept}/{name}" if desk else "/cache/result",
            upload=None if desk else f"az://{kept}/{name}",
        )
        model = f"az://models/{workload.hub_id}" if training.weights == "blob" and not desk else None
        return config_of(lock, workload, run=name, paths=paths, choices=choices, model=model, trainer=trainer)

    return Planned(run, made(f"{run.name}-{made(run.name).digest[:8]}"))


def _dataset(run: str, file: object, at: str) -> str:
    """A file of the container `datasets`, or one elsewhere at Blob. PlannerError for a path of the pod's own."""
    said = str(file)
    if not is_url(said) and (said.startswith("/") or ".." in said.split("/")):
        raise PlannerError(
            f"{run}: {said} is no file of the container `datasets`, and nothing of it is mounted: write its path in the"
            " container, or a Blob URL"
        )
    url = said if is_url(said) else f"{at}datasets/{said}"
    if is_url(url):  # what names no place is found here, and not by the pod
        parse_place(url.replace("az://", "https://account.blob.core.windows.net/", 1))
    return url


@cache
def program_map() -> Manifest:
    """The ConfigMap of the program, named by what it says: another text is another object for other pods."""
    return {
        "name": f"tonnage-program-{digest(sources())[:8]}",
        "namespace": NAMESPACE,
        "data": {_key(path): source for path, source in sources().items()},
        "items": [{"key": _key(path), "path": path} for path in sources()],
    }


def _key(path: str) -> str:
    return path.replace("/", ".")


def values(lock: Lock, workload: LockedWorkload, planned: Planned, name: str, secrets: Collection[str]) -> Manifest:
    """What run.yaml.j2 asks for. name: of the Job."""
    training, program = training_of(workload), program_map()
    timing = training_timing(workload, training)
    labels = labels_of(workload) | {RUN_LABEL: planned.run.name}
    several = training.machines > 1
    text = config_text(planned.config)
    config_name = f"{planned.run.name}-config-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    files = [
        {"name": "program", "mountPath": PROGRAM, "readOnly": True},
        {"name": "config", "mountPath": CONFIG, "readOnly": True},
    ]
    return {
        "name": name,
        "run": planned.run.name,
        "namespace": NAMESPACE,
        "machines": training.machines,
        "several": several,
        "port": MASTER_PORT,
        "config_name": config_name,
        "config": {CONFIG_FILE: text},
        "job_labels": {RUN_LABEL: planned.run.name} | ({QUEUE: training.queue} if training.queue else {}),
        "labels": labels,
        "retries": RETRIES * training.machines,
        "deadline_seconds": timing.deadline_seconds,
        "refused": REFUSED,
        "interrupted": INTERRUPTED,
        "pod_labels": labels | {"azure.workload.identity/use": "true"},
        "pod": place(lock, workload)
        | {
            "account": workload.name,
            "user": USER,
            "labels": labels,
            "spread": False,
            "subdomain": planned.run.name if several else None,
            "grace_seconds": timing.grace_seconds,
            "restart": "Never",
            "container": "trainer",
            "image": "${TRAIN_IMAGE}",
            "command": ["python", "-m", "workloads.finetune"],
            "args": [f"{CONFIG}/{CONFIG_FILE}"],
            "env": _environment(workload, planned, name, secrets),
            "port": None,
            "health": None,
            "resources": resources(lock, workload),
            "mounts": [*MOUNTS, *files],
            "volumes": [
                *volumes(workload, []),
                {"name": "program", "configMap": {"name": program["name"], "items": program["items"]}},
                {"name": "config", "configMap": {"name": config_name}},
            ],
        },
    }


def _environment(workload: LockedWorkload, planned: Planned, name: str, secrets: Collection[str]) -> list[Manifest]:
    found = [
        *environment(workload, secrets),
        {"name": "PYTHONPATH", "value": PROGRAM},
        {"name": ACCOUNT, "value": "${STORAGE_ACCOUNT}"},
    ]
    if is_url(planned.config.model):
        found.append({"name": "HF_HUB_OFFLINE", "value": "1"})
    if training_of(workload).machines > 1:  # the first pod of an Indexed Job has this name, whatever its address
        found += [
            {"name": "MASTER_ADDR", "value": f"{name}-0.{planned.run.name}"},
            {"name": "MASTER_PORT", "value": str(MASTER_PORT)},
        ]
    return found


def config_text(config: FinetuneConfig) -> str:
    """The configuration as the program reads it."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def plain(config: FinetuneConfig) -> dict[str, Any]:
    """What a configuration says, defaults too: it is what was decided."""
    return config.model_dump(mode="json", exclude_none=True)


def flat(said: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration line by line: `data.train` and its value."""
    found: dict[str, Any] = {}
    for name, value in said.items():
        found |= {f"{name}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {name: value}
    return found
