"""What a person asks for: the intent. Everything else of a plan follows from it, the catalog and a price sheet."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from ipaddress import IPv4Network
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from planner.catalog import load_model
from planner.catalog.hardware import is_cpu_size, quota_families, sku
from planner.catalog.mig import Profile
from planner.catalog.prices import Priority
from planner.cost.cluster import Cluster, Developers, Posture, Storage
from planner.cost.schedule import Schedule, parse_schedule
from planner.errors import PlannerError
from planner.fit import Settings
from planner.memory.serving import ServingSettings
from planner.memory.training import FinetuneSettings
from planner.model import Frozen, ModelSpec
from planner.plan.serving import Adapter, Device, Expose, Gateway, Weights, check_overrides, check_server, lora_settings
from planner.plan.training import Recipe, RunName, check_runs, runs_of
from planner.size import rope_factor
from planner.units import parse_tokens

ANY_REGION = "any"
_NAME = r"^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"


def _tokens(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a context is a number of tokens, such as 32768 or 32k")
    return parse_tokens(value) if isinstance(value, str) else value


def _schedule(value: object) -> str:
    """YAML reads `80` as a number, and hours are what it means."""
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise ValueError("a schedule is always, hours a month such as 80h, or windows such as mon-fri 08:00-18:00")
    return parse_schedule(str(value)).text


def quota_family(name: str) -> str:
    """A quota family as Azure writes it; case and blanks do not matter. Raises PlannerError for an unknown one."""
    known = {plain_family(family): family for family in quota_families()}
    found = known.get(plain_family(name))
    if found is None:
        near = difflib.get_close_matches(plain_family(name), known, n=2, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(known[n] for n in near)}?"
            if near
            else "`planner skus` lists them, at 120 columns"
        )
        raise PlannerError(f"{name[:80]!r} is not a quota family: {hint}")
    return found


def plain_family(name: str) -> str:
    return name.replace(" ", "").replace("_", "").lower()


Vcpus = Annotated[int, Field(ge=0, le=10**7)]
Tokens = Annotated[int, BeforeValidator(_tokens), Field(ge=1, le=1 << 26)]
ScheduleText = Annotated[str, BeforeValidator(_schedule)]
Share = Annotated[Decimal, Field(ge=0, lt=1, decimal_places=6)]
Email = Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$", max_length=254)]
# Azure's limits; these characters it refuses in names
TagName = Annotated[str, Field(pattern=r"^[^<>%&\\?/]+$", max_length=128)]
TagValue = Annotated[str, Field(max_length=256)]
Reason = Annotated[str, Field(pattern=r"\S+\s+\S+", max_length=500)]
Commitment = Literal["savings-plan-1y", "savings-plan-3y", "reserved-1y", "reserved-3y"]


class ServeWorkload(Frozen):
    """A vLLM server.

    context: tokens (max_model_len); concurrency: sequences at the full context at once; replicas: pods
    schedule: `always`, `80h` a month, or windows; model: in place of the intent's
    settings: any other field of ServingSettings, under vLLM's own name; spot: False keeps it off spot machines
    checkpoint: hub id of the weights as they are served, where settings.quantization asks for others than the model's
    machines: of one replica, for a model that no machine holds: its layers are spread over them
    device: `cpu` serves a small model without a GPU
    weights: read from the `hub` at each start, or from the container models (`blob`), where somebody has put them
    answer_tokens: of the longest answer that a server that stops still finishes (None: the catalog's assumption)
    tool_call_parser: vLLM's name for how the model writes tool calls (None: the catalog's), `none` for no tools
    adapters: LoRA adapters loaded at the start; runtime_adapters: others may be loaded while it runs
    expose: to the cluster alone, to the network by an internal load balancer, or by a gateway of the cluster
    hf_overrides: JSON that vLLM puts over the model's config.json; needed where rope_scaling extends the context
    sleep_level: it can be put to sleep and woken: 1 keeps the weights in the machine's memory, 2 drops them
    """

    kind: Literal["serve"]
    name: str = Field(default="serve", pattern=_NAME)
    model: str | None = None
    checkpoint: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")
    context: Tokens
    concurrency: int = Field(default=1, ge=1, le=1 << 16)
    replicas: int = Field(default=1, ge=1, le=1000)
    schedule: ScheduleText = "always"
    settings: dict[str, Any] = Field(default_factory=dict)
    spot: bool = True
    machines: int = Field(default=1, ge=1, le=16)
    device: Device = "gpu"
    weights: Weights = "hub"
    answer_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    tool_call_parser: str | None = Field(default=None, pattern=r"^[a-z0-9_-]{1,40}$")
    adapters: tuple[Adapter, ...] = Field(default=(), max_length=32)
    runtime_adapters: bool = False
    expose: Expose = "cluster"
    gateway: Gateway | None = None
    hf_overrides: str | None = None
    sleep_level: Literal[1, 2] | None = None

    @model_validator(mode="after")
    def _whole(self) -> ServeWorkload:
        check_server(self.adapters, self.expose, self.gateway)
        check_overrides(self.hf_overrides)
        if self.machines > 1 and ("pipeline_parallel_size" in self.settings or self.device == "cpu"):
            raise ValueError("machines are pipeline stages with GPUs: leave out pipeline_parallel_size and device: cpu")
        if self.device == "cpu" and self.sleep_level is not None:
            raise ValueError("vLLM has no sleep mode on a CPU: leave sleep_level out")
        return self


class FinetuneWorkload(Frozen):
    """Fine-tuning runs: as ServeWorkload; schedule: hours of training work a month; replicas: runs at the same time.

    machines: of one run, whose GPUs all hold the model (settings.parallelism ddp)
    recipe: fields of the program's configuration that no plan decides, such as epochs, learning_rate and data
    runs: by name, each with what it has otherwise than the recipe; none: one for each replica
    queue: of Kueue (a LocalQueue), which then starts the runs
    """

    kind: Literal["finetune"]
    name: str = Field(default="finetune", pattern=_NAME)
    model: str | None = None
    context: Tokens
    method: Literal["full", "lora", "qlora", "dora", "qdora"] = "qlora"
    replicas: int = Field(default=1, ge=1, le=1000)
    schedule: ScheduleText = "80h"
    settings: dict[str, Any] = Field(default_factory=dict)
    spot: bool = True
    machines: int = Field(default=1, ge=1, le=16)
    weights: Weights = "hub"
    recipe: Recipe = Field(default_factory=dict)
    runs: dict[RunName, Recipe] = Field(default_factory=dict, max_length=64)
    queue: str | None = Field(default=None, pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")

    @model_validator(mode="after")
    def _whole(self) -> FinetuneWorkload:
        check_runs(self.replicas, self.runs)
        if self.machines > 1 and self.settings.get("parallelism") != "ddp":
            raise ValueError("machines of one run share the batch: write settings: {parallelism: ddp}, or machines: 1")
        if self.machines > 1 and "n_gpus" in self.settings:
            raise ValueError("with machines each gives all of its GPUs: leave out n_gpus")
        return self


Workload = Annotated[ServeWorkload | FinetuneWorkload, Field(discriminator="kind")]


class Pricing(Frozen):
    """How machines may be bought.

    spot: allowed at all; commitments: kinds that may be signed; fallback_on_demand: every spot pool gets a twin on
    demand; evictions_per_hour: low, expected and high chance, in place of the catalog's assumption
    """

    spot: bool = True
    commitments: tuple[Commitment, ...] = ()
    fallback_on_demand: bool = False
    evictions_per_hour: tuple[Share, Share, Share] | None = None

    @field_validator("evictions_per_hour")
    @classmethod
    def _rises(cls, value: tuple[Decimal, Decimal, Decimal] | None) -> tuple[Decimal, Decimal, Decimal] | None:
        if value is not None and not value[0] <= value[1] <= value[2]:
            raise ValueError("low, expected and high must not fall")
        return value

    def priorities(self, *, spot: bool) -> tuple[Priority, ...]:
        """The ways to buy a machine for a workload that may (or may not) run on spot."""
        allowed: list[Priority] = ["on-demand"]
        if self.spot and spot:
            allowed.append("spot")
        return (*allowed, *self.commitments)


class Quota(Frozen):
    """vCPUs that the subscription has in a region. Families that are not named, and None, are not limited here."""

    family_vcpus: dict[str, Vcpus] = Field(default_factory=dict)
    spot_vcpus: Vcpus | None = None
    total_vcpus: Vcpus | None = None

    @field_validator("family_vcpus")
    @classmethod
    def _families(cls, limits: dict[str, int]) -> dict[str, int]:
        return {quota_family(name): vcpus for name, vcpus in limits.items()}


class Access(Frozen):
    """Who may reach the cluster.

    admin_group_object_ids: Entra ID groups whose members administer it; authorized_ip_ranges: CIDRs that may call its
    API (none: every address); private_cluster: its API only inside the network (None: what the posture asks for)
    """

    admin_group_object_ids: tuple[UUID, ...] = Field(default=(), max_length=10)
    authorized_ip_ranges: tuple[IPv4Network, ...] = Field(default=(), max_length=200)
    private_cluster: bool | None = None


class Intent(Frozen):
    """What a person asks for, as `tonnage:intent` of a stack holds it.

    model: catalog name, folder, config.json or hub id; rope_scaling: factor by which contexts are extended
    regions: allowed ones, or `any`; quota: by region, `*` for all; prefer_families: quota families to stay within
    while they fit; skus: only these sizes; gpu_instance_profile: every GPU is cut into MIG devices, of which a replica
    takes one; take_turns: the workloads never run at the same time, so they may share machines
    headroom: share of each GPU to leave free (None: as `planner size`)
    approved_usd_per_month: what finance has signed; buffer, request_to: of the budget's request
    alert_emails: who hears of money and of failures; tags: on every resource, beside the plan's own
    maintenance: when nodes and the control plane may be upgraded, one window of a week
    exceptions: policy rules that this stack may break, each with the reason
    """

    model: str
    rope_scaling: float | None = Field(default=None, ge=1, le=64)
    workloads: tuple[Workload, ...] = Field(min_length=1, max_length=8)
    regions: tuple[str, ...] = Field(default=("eastus",), min_length=1)
    posture: Posture = "dev"
    pricing: Pricing = Pricing()
    quota: dict[str, Quota] = Field(default_factory=dict)
    prefer_families: tuple[str, ...] = ()
    skus: tuple[str, ...] = ()
    gpu_instance_profile: Profile | None = None
    take_turns: bool = False
    headroom: float | None = Field(default=None, ge=0, lt=1)
    cluster: Cluster = Cluster()
    storage: Storage = Storage()
    developers: Developers = Developers()
    approved_usd_per_month: Decimal | None = Field(default=None, gt=0, le=10**9, decimal_places=2)
    buffer: Share = Decimal("0.20")
    request_to: Decimal = Field(default=Decimal(10), ge=Decimal("0.01"), le=10**6, decimal_places=2)
    owners: dict[str, str] = Field(default_factory=dict)
    access: Access = Access()
    alert_emails: tuple[Email, ...] = Field(default=(), max_length=50)
    tags: dict[TagName, TagValue] = Field(default_factory=dict, max_length=40)
    maintenance: ScheduleText = "sun 00:00-06:00"
    exceptions: dict[str, Reason] = Field(default_factory=dict)

    @field_validator("maintenance")
    @classmethod
    def _one_window(cls, text: str) -> str:
        windows = parse_schedule(text).windows
        if len(windows) != 1 or windows[0].end_minute - windows[0].start_minute < 4 * 60:
            raise ValueError("maintenance is one window of at least four hours on one day, such as sun 00:00-06:00")
        return text

    @field_validator("skus")
    @classmethod
    def _sizes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name if is_cpu_size(name) else sku(name).name for name in names)

    @field_validator("prefer_families")
    @classmethod
    def _families(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(quota_family(name) for name in names)

    @model_validator(mode="after")
    def _names_differ(self) -> Intent:
        names = [workload.name for workload in self.workloads]
        if len(set(names)) < len(names):
            raise ValueError("two workloads have the same name: give each its own")
        for workload in self.workloads:
            if isinstance(workload, FinetuneWorkload):
                runs = {run.name for run in runs_of(workload.name, workload.replicas, {}, workload.runs)}
                taken = (runs - {workload.name}) & set(names)
                if taken:
                    raise ValueError(f"a run of {workload.name} and a workload are both {min(taken)}: rename one")
        return self

    @property
    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 of the intent, by which a plan knows what it answers."""
        # without defaults: a field that a later version adds leaves plans of today what they are
        stated = self.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps(stated, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_intent(data: object, what: str) -> Intent:
    """The intent in a mapping, as a stack file or JSON holds it. PlannerError names the first field that is wrong."""
    if not isinstance(data, Mapping):
        raise PlannerError(f"{what} holds no intent: write a mapping with model and workloads")
    try:
        # through JSON's types: YAML's floats would lose a Decimal's digits, and lists become tuples
        return Intent.model_validate(_plain(data))
    except ValidationError as error:
        raise PlannerError(f"{what}: {first_fault(error)}") from error
    except RecursionError:
        raise PlannerError(f"{what} refers to itself: write each part out") from None


# what to write where pydantic would tell a regular expression or its own word: by field and the beginning of its fault
_WRITE = {
    ("exceptions", "string_pattern"): "write the reason in two words or more",
    ("alert_emails", "string_pattern"): "write an address such as a@b.com",
    ("admin_group_object_ids", "uuid"): "write an Entra ID object id such as 00000000-0000-0000-0000-000000000000",
    ("authorized_ip_ranges", "ip_v4_network"): "write a range of addresses such as 203.0.113.0/24",
    ("approved_usd_per_month", "decimal"): "write dollars and cents, such as 600.00",
    ("tags", "string_pattern"): "write a name of letters, digits, blanks, hyphens and dots",
    ("checkpoint", "string_pattern"): "write a hub id such as Qwen/Qwen3-8B-AWQ",
    ("name", "string_pattern"): "write at most 32 lower-case letters, digits and hyphens, a letter first",
    ("", "string_pattern"): "it has characters that are not taken there",
    ("", "decimal_max_places"): "write fewer digits behind the point",
    ("", "decimal"): "write a number such as 1.5",
}


def first_fault(error: ValidationError) -> str:
    """`workloads.0.context cannot be planned: ...`, from the first thing that pydantic refuses."""
    first = error.errors()[0]
    # a union names the kind it took; a person wrote only the field
    parts = [str(part) for part in first["loc"] if part not in ("serve", "finetune")]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "extra_forbidden":
        return f"{'.'.join(parts)} is no field that is known there: check its spelling"
    if first["type"] == "missing":
        return f"{'.'.join(parts)} is missing: write it"
    where = ".".join(parts) or "the whole"
    for (field, fault), words in _WRITE.items():
        if first["type"].startswith(fault) and (not field or field in parts):
            return f"{where} cannot be planned: {words}"
    if first["msg"].startswith("Input should be "):
        return f"{where} cannot be planned: it should be {message}"
    return f"{where} cannot be planned: {message[:1].lower()}{message[1:]}"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(inner) for inner in value)
    if isinstance(value, float):
        # Pulumi hands 600.0 on as 600, and the digest of both must be the same
        return int(value) if value.is_integer() else str(value)
    return value


def model_of(intent: Intent, workload: ServeWorkload | FinetuneWorkload) -> ModelSpec:
    """The model of a workload, its context extended where the intent says so. Raises PlannerError."""
    spec = load_model(workload.model or intent.model)
    if intent.rope_scaling:
        spec = spec.model_copy(update={"max_context": int(spec.max_context * intent.rope_scaling)})
    if workload.context > spec.max_context:
        factor = -(-workload.context // spec.max_context)
        raise PlannerError(
            f"{workload.name}: {workload.context:,} tokens are beyond {spec.name}'s context of {spec.max_context:,}:"
            f" lower it, or state the rope extension you will use (rope_scaling: {factor} in an intent, --rope-scaling"
            f" yarn:{factor})"
        )
    return spec


_OWNED = {
    "serve": ("max_model_len", "concurrency"),
    "finetune": ("seq_len", "method"),
}


def stated_gpus(workload: ServeWorkload | FinetuneWorkload) -> int | None:
    """How many GPUs the settings of a server ask for; None leaves it to the plan."""
    if isinstance(workload, FinetuneWorkload) or "tensor_parallel_size" not in workload.settings:
        return None
    settings = settings_of(workload)
    assert isinstance(settings, ServingSettings)
    return settings.tensor_parallel_size * settings.pipeline_parallel_size


def settings_of(workload: ServeWorkload | FinetuneWorkload) -> Settings:
    """The memory model's settings of a workload. PlannerError names the setting that is wrong."""
    owned = [name for name in _OWNED[workload.kind] if name in workload.settings]
    if owned:
        raise PlannerError(f"{workload.name}: {owned[0]} is a field of the workload itself: take it out of settings")
    try:
        if isinstance(workload, ServeWorkload):
            fields = workload.settings | {"max_model_len": workload.context, "concurrency": workload.concurrency}
            fields |= lora_settings(workload.name, fields, workload.adapters, workload.runtime_adapters)
            return ServingSettings(**fields)
        offload = workload.settings.get("offload", ())
        fields = workload.settings | {"seq_len": workload.context, "method": workload.method, "offload": offload}
        return FinetuneSettings(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise PlannerError(f"{workload.name}: the setting {name} cannot be planned: {first['msg'].lower()}") from error


def schedule_of(workload: ServeWorkload | FinetuneWorkload) -> Schedule:
    return parse_schedule(workload.schedule)


def intents_from_options(options: Mapping[str, Any]) -> tuple[Intent, ...]:
    """The intent behind the options of `planner plan` and `planner budget`, one for each context. PlannerError."""
    contexts = [parse_tokens(part) for part in (options["ctx"] or "").split(",") if part.strip()]
    if not options["model"] or not contexts:
        raise PlannerError("nothing to plan: give --stack, or --model and --ctx")
    return tuple(parse_intent(_from_options(options, context), "the options") for context in contexts)


def _from_options(options: Mapping[str, Any], context: int) -> dict[str, Any]:
    tuning = {"kind": "finetune", "context": context, "method": options["method"]}
    serving = {
        "kind": "serve",
        "context": context,
        "concurrency": options["concurrency"],
        "replicas": options["replicas"],
        "settings": {"quantization": options["quantization"]} if options["quantization"] else {},
    }
    tuning["schedule"], serving["schedule"] = options["finetune_hours"], options["serve_hours"]
    wanted = {"serve": [serving], "finetune": [tuning], "both": [tuning, serving]}[options["task"]]
    family = dict(_quota_option(text) for text in options["quota"] or ())
    limited = family or options["spot_quota"] is not None
    return {
        "model": options["model"],
        "rope_scaling": rope_factor(options["rope_scaling"]),
        "workloads": wanted,
        "regions": region_names(options["region"]),
        "posture": options["posture"],
        "take_turns": options["take_turns"],
        "pricing": {"spot": options["spot"], "commitments": options["commitment"] or ()},
        "prefer_families": options["prefer_family"] or (),
        "skus": options["sku"] or (),
        "quota": {"*": {"family_vcpus": family, "spot_vcpus": options["spot_quota"]}} if limited else {},
        "developers": {"count": options["developers"]},
        "approved_usd_per_month": options["approved"],
    }


def region_names(text: str) -> list[str]:
    """`eastus, westeurope` -> its parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _quota_option(text: str) -> tuple[str, int]:
    """`StandardNCADSA100v4Family=48` -> the family and its vCPUs."""
    name, found, vcpus = text.rpartition("=")
    if not found or not name.strip() or not re.fullmatch("[0-9]{1,7}", vcpus.strip()):
        raise PlannerError(f"{text!r} is not a quota: write FAMILY=VCPUS, for example StandardNCADSA100v4Family=48")
    return name.strip(), int(vcpus)
