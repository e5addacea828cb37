"""A fine-tuning run as a Job: what it brings along, when it is tried again, and when it ends."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from locks import planned, shipped, tuned

from infra.release import logical_name
from planner.errors import PlannerError
from planner.plan.intent import parse_intent
from planner.plan.lock import Lock, LockedWorkload
from planner.plan.training import Training, TrainingRun
from workloads.explain import explain
from workloads.finetune.bundle import sources
from workloads.finetune.config import FinetuneConfig, parse_config
from workloads.pods import GPU, Manifest
from workloads.render import render
from workloads.timing import KILL_SECONDS, training_timing
from workloads.training import QUEUE, planned_runs


def jobs(lock: Lock) -> list[Manifest]:
    return [one for one in render(lock) if one["kind"] == "Job"]


def job(lock: Lock) -> Manifest:
    (one,) = jobs(lock)
    return one


def container(one: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = one["spec"]["template"]["spec"]["containers"][0]
    return found


def env(one: Manifest) -> dict[str, Any]:
    return {variable["name"]: variable.get("value") for variable in container(one)["env"]}


def config_of(lock: Lock, one: Manifest) -> FinetuneConfig:
    """What the pod of a Job is going to read, found by the way that its mounts say."""
    pod = one["spec"]["template"]["spec"]
    (argument,) = container(one)["args"]
    mount = next(mount for mount in container(one)["volumeMounts"] if argument.startswith(mount["mountPath"] + "/"))
    volume = next(volume for volume in pod["volumes"] if volume["name"] == mount["name"])
    maps = {m["metadata"]["name"]: m["data"] for m in render(lock) if m["kind"] == "ConfigMap"}
    text = maps[volume["configMap"]["name"]][argument.removeprefix(mount["mountPath"] + "/")]
    return parse_config(yaml.safe_load(text), "the mounted file")


def lock_of(**workload: Any) -> Lock:
    return planned(tuned(workload=workload))[1]


# --- what it is told --------------------------------------------------------------------------------------------------


def test_the_run_trains_what_the_plan_holds_memory_for() -> None:
    lock = shipped("dev-32k")[1]
    made = config_of(lock, job(lock))
    assert (made.model, made.max_length, made.method) == ("Qwen/Qwen3-8B", 32_768, "qlora")
    assert (made.precision, made.lora_dropout, made.micro_batch) == ("bf16", 0.0, 1)
    # A100 80 GB PCIe: 312 TFLOPS of bf16, dense, by its data sheet; the MFU is counted against it
    assert made.predicted.flops_per_second == 312e12
    old = shipped("dev-2k")[1]
    turing = config_of(old, job(old))
    assert (turing.weights, turing.precision) == ("fp16", "fp16")  # a T4 has no bfloat16
    assert turing.predicted.flops_per_second == 65e12  # its fp16


def test_data_model_checkpoints_and_results_are_at_blob_and_the_disk_is_the_pods_own() -> None:
    lock = lock_of(weights="blob")
    made, one = config_of(lock, job(lock)), job(lock)
    assert made.data.train == "az://datasets/finetune/train.jsonl"
    assert made.model == "az://models/Qwen/Qwen3-8B"
    assert made.checkpoints.mirror == f"az://checkpoints/{made.run}"
    assert made.upload == f"az://adapters/{made.run}"
    assert env(one)["AZURE_STORAGE_ACCOUNT_NAME"] == "${STORAGE_ACCOUNT}"
    assert env(one)["HF_HUB_OFFLINE"] == "1"  # nothing is asked of the hub
    for folder in (made.checkpoints.folder, made.result, made.scratch):
        assert folder.startswith("/cache/")
    assert not [m for m in render(lock) if m["kind"].startswith("PersistentVolume")]


def test_a_model_that_was_trained_in_full_goes_where_servers_read_models() -> None:
    made = config_of(lock := lock_of(method="full", context=1024, model="qwen3-0.6b"), job(lock))
    assert made.upload == f"az://models/tuned/{made.run}"


def test_the_recipe_of_the_intent_is_what_the_program_is_told() -> None:
    recipe = {
        "epochs": 3,
        "learning_rate": 1e-4,
        "data": {"train": "support.jsonl", "evaluation": "az://datasets/held-out.jsonl", "packing": True},
        "evaluation": {"every_steps": 20, "patience": 2},
    }
    made = config_of(lock := lock_of(recipe=recipe), job(lock))
    assert (made.epochs, made.learning_rate, made.data.packing) == (3, 1e-4, True)
    assert (made.data.train, made.data.evaluation) == ("az://datasets/support.jsonl", "az://datasets/held-out.jsonl")
    assert made.evaluation is not None
    assert (made.evaluation.every_steps, made.evaluation.patience) == (20, 2)


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"learningrate": 1}, "there is no field learningrate: take it out or correct its name"),
        ({"learning_rate": 2}, "learning_rate: input should be less than 1"),
        ({"lora_rank": 64}, r"lora_rank is decided by the plan \(16\): change the intent and plan again"),
        ({"checkpoints": {"keep": 9}}, r"checkpoints.keep is decided by the plan \(2\)"),
        ({"upload": "az://elsewhere/x"}, "upload is decided by the plan"),
        ({"epochs": 1, "max_steps": 5}, "give epochs or max_steps, exactly one of them"),
        ({"data": "train.jsonl"}, "data: input should be a valid dictionary"),
        (
            {"data": {"train": "/datasets/x.jsonl"}},
            "finetune: /datasets/x.jsonl is no file of the container `datasets`",
        ),
        ({"data": {"train": "../models/x"}}, "is no file of the container `datasets`, and nothing of it is mounted"),
        ({"data": {"evaluation": "https://a.blob.core.windows.net/d/x?sig=1"}}, "must not carry a signature"),
        ({"data": {"train": "az://"}}, "names no container"),
    ],
)
def test_a_recipe_that_the_program_would_refuse_is_refused_before_anything_is_made(
    recipe: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PlannerError, match=sentence):
        render(lock_of(recipe=recipe))


def test_several_runs_are_jobs_of_their_own_with_their_own_data_checkpoints_and_results() -> None:
    lock = lock_of(recipe={"epochs": 2}, runs={"support": {}, "legal": {"epochs": 1, "data": {"train": "law.jsonl"}}})
    made = [config_of(lock, one) for one in jobs(lock)]
    assert [one.epochs for one in made] == [2, 1]
    assert [one.data.train for one in made] == ["az://datasets/finetune-support/train.jsonl", "az://datasets/law.jsonl"]
    assert [logical_name(one) for one in jobs(lock)] == ["job-finetune-support", "job-finetune-legal"]
    assert len({one.upload for one in made}) == len({one.checkpoints.mirror for one in made}) == 2


def test_replicas_without_names_are_runs_by_number() -> None:
    lock = lock_of(replicas=2)
    assert [config_of(lock, one).data.train for one in jobs(lock)] == [
        "az://datasets/finetune-1/train.jsonl",
        "az://datasets/finetune-2/train.jsonl",
    ]


@pytest.mark.parametrize(
    ("workload", "sentence"),
    [
        ({"replicas": 3, "runs": {"a": {}}}, "3 runs at the same time are asked for and 1 are named"),
        ({"machines": 2}, "machines of one run share the batch: write settings"),
        ({"machines": 2, "settings": {"parallelism": "ddp", "n_gpus": 2}}, "leave out n_gpus"),
        ({"runs": {"Über": {}}}, "runs"),
        ({"queue": "No"}, "queue"),
    ],
)
def test_an_intent_that_cannot_be_run_so_is_refused(workload: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlannerError, match=sentence):
        parse_intent(tuned(workload=workload), "the test's intent")


def test_a_run_and_a_workload_of_the_same_name_are_refused() -> None:
    wanted = tuned(workload={"runs": {"law": {}}})
    wanted["workloads"].append({"kind": "finetune", "name": "finetune-law", "context": 2048})
    with pytest.raises(PlannerError, match="a run of finetune and a workload are both finetune-law: rename one"):
        parse_intent(wanted, "the test's intent")


# --- its name, and that of what it keeps ------------------------------------------------------------------------------


def test_the_job_is_named_after_what_it_does_and_not_after_what_it_costs() -> None:
    intent, lock = shipped("dev-32k")
    name = job(lock)["metadata"]["name"]
    assert re.fullmatch("finetune-[0-9a-f]{8}", name)
    assert job(lock.model_copy(update={"usd": lock.usd + 1, "lines_usd": {}}))["metadata"]["name"] == name
    other = planned({**intent.model_dump(mode="json", exclude_defaults=True), "model": "qwen3-4b"})[1]
    assert job(other)["metadata"]["name"] != name


def test_another_deadline_is_another_job_that_goes_on_with_the_same_checkpoints() -> None:
    before, after = lock_of(schedule="80h"), lock_of(schedule="90h")
    assert job(before)["metadata"]["name"] != job(after)["metadata"]["name"]
    assert config_of(before, job(before)).checkpoints.mirror == config_of(after, job(after)).checkpoints.mirror


def test_what_learns_otherwise_has_other_checkpoints() -> None:
    before, after = lock_of(), lock_of(recipe={"seed": 7})
    assert config_of(before, job(before)).checkpoints.mirror != config_of(after, job(after)).checkpoints.mirror


# --- when it is tried again, and when it ends -------------------------------------------------------------------------


def test_the_exit_codes_of_the_program_decide_what_the_job_does() -> None:
    spec = job(shipped("dev-32k")[1])["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"  # never two trainers at the same time
    evicted, refused, interrupted = spec["podFailurePolicy"]["rules"]
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    # docs/finetune.md: 2 will be refused again, 75 was stopped with a checkpoint, 1 and all others are counted
    assert (refused["action"], refused["onExitCodes"]["values"]) == ("FailJob", [2])
    assert (interrupted["action"], interrupted["onExitCodes"]["values"]) == ("Ignore", [75])
    assert spec["backoffLimit"] == 3


def test_a_run_that_hangs_costs_at_most_twice_the_hours_of_the_plan() -> None:
    assert job(shipped("dev-32k")[1])["spec"]["activeDeadlineSeconds"] == 120 * 2 * 3600


def test_a_run_waits_until_somebody_starts_it() -> None:
    assert job(shipped("dev-32k")[1])["spec"]["suspend"] is True


def test_a_run_in_a_queue_is_kueues_to_start() -> None:
    labels = job(lock_of(queue="team-a"))["metadata"]["labels"]
    assert labels[QUEUE] == "team-a"
    assert QUEUE not in job(lock_of())["metadata"]["labels"]


def test_a_stop_has_time_for_a_micro_batch_and_the_checkpoint() -> None:
    (workload,) = lock_of().workloads
    training = Training(
        runs=(TrainingRun(name="finetune"),),
        disk_bytes=1,
        micro_batch_seconds=Decimal("13.5"),
        write_bytes_per_second=60_000_000,
        save_seconds=30,
        flops_per_second=None,
    )
    small = workload.model_copy(update={"checkpoint_bytes": 300_000_000})
    # 13.5 s + 30 s + 2 x 300 MB / 60 MB/s = 10 s + 10 s to end: 63.5 s, in tens
    assert training_timing(small, training).grace_seconds == 70
    unknown = training.model_copy(update={"micro_batch_seconds": None})
    assert training_timing(small, unknown).grace_seconds == 170  # two minutes in their place


# --- several machines -------------------------------------------------------------------------------------------------


def test_machines_of_a_run_find_the_first_by_its_name_and_talk_among_themselves_alone() -> None:
    lock = lock_of(machines=2, settings={"parallelism": "ddp"}, context=8192)
    one, made = job(lock), render(lock)
    (workload,) = lock.workloads
    spec, pod = one["spec"], one["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["parallelism"], spec["completions"]) == ("Indexed", 2, 2)
    assert spec["backoffLimit"] == 6  # three attempts of each machine
    (service,) = [m for m in made if m["kind"] == "Service"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    # the pods of an Indexed Job are called JOB-INDEX, in the subdomain of a Service without an address
    assert pod["subdomain"] == service["metadata"]["name"]
    assert env(one)["MASTER_ADDR"] == f"{one['metadata']['name']}-0.{service['metadata']['name']}"
    labels = spec["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    (policy,) = [m for m in made if m["kind"] == "NetworkPolicy" and m["metadata"]["name"] == "finetune"]
    among = [{"podSelector": {"matchLabels": service["spec"]["selector"]}}]
    assert (policy["spec"]["ingress"], policy["spec"]["egress"]) == ([{"from": among}], [{"to": among}])
    told = config_of(lock, one)
    assert (told.nodes, told.gpus * told.nodes) == (2, workload.gpus)
    assert container(one)["resources"]["limits"][GPU] == str(told.gpus)
    assert lock.pool(workload.pool).max_nodes == 2


def test_a_run_on_one_machine_needs_no_service() -> None:
    made = render(lock_of())
    assert not [m for m in made if m["kind"] == "Service"]
    assert "subdomain" not in job(lock_of())["spec"]["template"]["spec"]


# --- its disk ---------------------------------------------------------------------------------------------------------


def test_the_disk_holds_the_model_the_checkpoints_and_the_result() -> None:
    lock = lock_of()
    (workload,) = lock.workloads
    assert workload.training is not None
    # Qwen3-8B in 16 bits has 8,190,735,360 x 2 bytes; two checkpoints stay and one is written; 20 GiB to work in
    parts = 16_381_470_720 + 3 * workload.checkpoint_bytes + workload.checkpoint_bytes + (20 << 30)
    assert workload.training.disk_bytes == parts
    cache = next(v for v in job(lock)["spec"]["template"]["spec"]["volumes"] if v["name"] == "cache")
    assert int(cache["emptyDir"]["sizeLimit"].removesuffix("Gi")) << 30 >= parts


def test_what_the_system_disk_cannot_hold_goes_to_the_machines_nvme_disks() -> None:
    # 8.19 G parameters in bf16 with two bf16 states: 49 GB a checkpoint, three of them; an A100 machine has 894 GiB
    lock = lock_of(method="full", context=2048, settings={"weights_dtype": "bf16"})
    (workload,) = lock.workloads
    assert workload.training is not None
    assert workload.training.cache == "nvme"
    cache = next(v for v in job(lock)["spec"]["template"]["spec"]["volumes"] if v["name"] == "cache")
    assert cache["ephemeral"]["volumeClaimTemplate"]["spec"]["storageClassName"] == "tonnage-nvme"
    assert [m for m in render(lock) if m["kind"] == "StorageClass"]
    assert container(job(lock))["resources"]["limits"]["ephemeral-storage"] == "8Gi"


def test_runs_that_share_a_machine_share_its_disk() -> None:
    wanted = {"skus": ["Standard_NC96ads_A100_v4"]}  # four A100, a system disk of 128 GiB of which pods may have 89
    for replicas, place in ((1, "disk"), (2, "disk"), (4, "nvme")):
        (workload,) = planned(tuned(workload={"replicas": replicas}, **wanted))[1].workloads
        assert workload.training is not None
        assert round(workload.training.disk_bytes / (1 << 30)) == 36
        assert workload.training.cache == place


def test_more_checkpoints_than_a_machine_holds_are_refused_with_what_to_do() -> None:
    wanted = tuned(workload={"method": "full", "model": "qwen3-0.6b"}, storage={"checkpoints_kept": 2000})
    with pytest.raises(
        PlannerError, match=r"keep fewer \(storage.checkpoints_kept\), train an adapter, or name a size"
    ):
        planned(wanted)


# --- what must always hold --------------------------------------------------------------------------------------------


def test_the_program_is_mounted_as_the_modules_that_it_is_made_of() -> None:
    lock = shipped("dev-2k")[1]
    pod = job(lock)["spec"]["template"]["spec"]
    brought = next(volume["configMap"] for volume in pod["volumes"] if volume["name"] == "program")
    (data,) = [m["data"] for m in render(lock) if m["kind"] == "ConfigMap" and m["metadata"]["name"] == brought["name"]]
    assert {item["path"]: data[item["key"]] for item in brought["items"]} == sources()
    mount = next(mount for mount in container(job(lock))["volumeMounts"] if mount["name"] == "program")
    assert env(job(lock))["PYTHONPATH"] == mount["mountPath"]


def test_every_setting_of_a_run_is_explained_with_its_value() -> None:
    lock = lock_of(recipe={"epochs": 2, "seed": 7}, runs={"a": {}, "b": {"seed": 8}})
    rows = explain(lock, lock.workloads[0])
    told = {row.value: row.why for row in rows if row.part == "setting"}
    assert told["max_length: 2048"] == "the workload's context: the memory receipt rests on it"
    assert (told["seed: 7"], told["seed: 8"]) == ("the recipe's", "the recipe's")
    assert told["warmup_steps: 0"] == "the program's default"
    assert [row.value for row in rows if row.part == "run"] == [
        p.config.run for p in planned_runs(lock, lock.workloads[0])
    ]


def test_a_plan_of_before_is_planned_anew_and_not_guessed_at() -> None:
    lock = lock_of()
    old = tuple(workload.model_copy(update={"training": None}) for workload in lock.workloads)
    with pytest.raises(PlannerError, match="was made by an older Tonnage: run `planner plan --stack"):
        render(lock.model_copy(update={"workloads": old}))


RECIPES = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(1, 10),
        "learning_rate": st.sampled_from([1e-5, "0.0002"]),
        "seed": st.integers(0, 99),
        "data": st.fixed_dictionaries({}, optional={"train": st.sampled_from(["a.jsonl", "b/c.jsonl"])}),
    },
)
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,14}[a-z0-9])?", fullmatch=True)


@st.composite
def locks(draw: st.DrawFn) -> Lock:
    """A plan that trains, with runs, machines and bytes of every kind."""
    lock = shipped(draw(st.sampled_from(["dev-2k", "dev-32k"])))[1]
    workload = next(one for one in lock.workloads if one.task == "finetune")
    machines, each = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 8]))
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    assert workload.training is not None
    training = workload.training.model_copy(
        update={
            "machines": machines,
            "runs": tuple(TrainingRun(name=f"{'w' * 32}-{name}", recipe=draw(RECIPES)) for name in names),
            "weights": draw(st.sampled_from(["hub", "blob"])),
            "queue": draw(st.sampled_from([None, "team"])),
            "disk_bytes": draw(st.integers(10**9, 9 * 10**10)),
            "cache": draw(st.sampled_from(["disk", "nvme"])),
            "micro_batch_seconds": draw(st.none() | st.decimals("0.001", "900", places=3)),
        }
    )
    changed = workload.model_copy(
        update={
            "training": training,
            "gpus": machines * each,
            "settings": workload.settings | ({"parallelism": "ddp"} if machines * each > 1 else {}),
            "hours_per_month": Decimal(draw(st.integers(1, 730))),
            "checkpoint_bytes": draw(st.integers(1, 10**11)),
        }
    )
    pools = tuple(pool.model_copy(update={"gpus_per_node": each, "max_nodes": machines}) for pool in lock.pools)
    return lock.model_copy(update={"pools": pools, "workloads": (changed,)})


def trained(lock: Lock) -> tuple[LockedWorkload, Training]:
    (workload,) = lock.workloads
    assert workload.training is not None
    return workload, workload.training


@settings(deadline=None, max_examples=30)
@given(locks())
def test_whatever_is_trained_is_a_job_that_kubernetes_takes_and_that_can_end(lock: Lock) -> None:
    workload, training = trained(lock)
    made = render(lock)
    maps = {m["metadata"]["name"]: m for m in made if m["kind"] == "ConfigMap"}
    found = [one for one in made if one["kind"] == "Job"]
    assert len(found) == len(training.runs)
    assert len({logical_name(one) for one in made}) == len(made)
    for one, run in zip(found, training.runs, strict=True):
        kubernetes_validate.validate(one, lock.platform.kubernetes_version, strict=True)
        spec, pod = one["spec"], one["spec"]["template"]["spec"]
        assert one["metadata"]["name"].startswith(run.name)
        assert len(f"{one['metadata']['name']}-{training.machines}") <= 63  # a pod's host name
        assert spec["suspend"] is True
        assert spec["parallelism"] == spec["completions"] == training.machines
        assert spec["activeDeadlineSeconds"] > workload.hours_per_month * 3600
        assert pod["terminationGracePeriodSeconds"] >= training.save_seconds + KILL_SECONDS
        assert pod["terminationGracePeriodSeconds"] >= (training.micro_batch_seconds or 0)
        limits = container(one)["resources"]["limits"]
        assert int(limits[GPU]) * training.machines == workload.gpus
        told = config_of(lock, one)
        assert (told.gpus, told.nodes) == (int(limits[GPU]), training.machines)
        assert told.max_length == workload.context
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert maps[volume["configMap"]["name"]]["immutable"] is True


@settings(deadline=None, max_examples=30)
@given(locks())
def test_whatever_is_trained_no_two_runs_write_to_the_same_place(lock: Lock) -> None:
    _, training = trained(lock)
    made = [config_of(lock, one) for one in jobs(lock)]
    for field in ("run", "upload"):
        assert len({getattr(one, field) for one in made}) == len(training.runs)
    assert len({one.checkpoints.mirror for one in made}) == len(training.runs)
