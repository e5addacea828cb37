"""The one file that a run is configured by: what it may say, and why it is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planner.errors import PlannerError

Method = Literal["full", "lora", "qlora", "dora", "qdora"]
# transformers' names (OptimizerNames) of those that the plan's memory model knows
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd"]
Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """A noun of the configuration: nothing unknown, nothing changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Strict):
    """Chat JSONL and how it becomes tokens.

    train, evaluation: files, or Blob URLs; evaluation_share: of the training lines, taken out by hash, where no file
    loss_on: completion (the last answer), assistant (every answer) or all tokens
    too_long: what happens to lines beyond max_length: truncate their end, drop them, or refuse the data
    packing: several conversations in one sequence, apart in the attention
    """

    train: str
    evaluation: str | None = None
    evaluation_share: float = Field(default=0.0, ge=0.0, le=0.5)
    loss_on: Literal["completion", "assistant", "all"] = "completion"
    too_long: Literal["truncate", "drop", "refuse"] = "truncate"
    packing: bool = False
    duplicates: Literal["warn", "drop", "refuse"] = "warn"


class Checkpoints(Strict):
    """folder: on a disk or a mounted container; every_seconds: of the monotonic clock, every_steps: beside or instead

    keep: how many complete ones stay; mirror: a Blob URL to which each is copied, where the folder dies with its pod
    """

    folder: str
    every_seconds: float | None = Field(default=None, gt=0)
    every_steps: Positive | None = None
    keep: Positive = 2
    mirror: str | None = None


class Evaluation(Strict):
    """every_steps: between two evaluations; patience: stop after so many without a better loss, None never does."""

    every_steps: Positive = 50
    patience: Positive | None = None


class Predicted(Strict):
    """What the plan says of the run, logged beside what is measured.

    allocated_bytes: torch's peak; flops_per_second: of the card at the run's precision, dense; for the MFU
    """

    allocated_bytes: Positive | None = None
    flops_per_second: float | None = Field(default=None, gt=0)


class Metrics(Strict):
    """textfile: for Prometheus' textfile collector; mlflow: a tracking URI; every_steps: between lines of progress."""

    textfile: str | None = None
    mlflow: str | None = None
    every_steps: Positive = 1


class FinetuneConfig(Strict):
    """One run. Names are the trainers' own.

    run: its name, which the checkpoints bear; model: a folder, a hub id or a Blob URL; revision: of a hub id
    result: the folder of the adapter or model; upload: a Blob URL that it goes to as well
    epochs or max_steps: exactly one; warmup_steps: of the learning rate; micro_batch: sequences a GPU takes at once
    precision: of the computation (bf16, or fp16 on cards without it); weights: of the base or the masters
    base_quantization: of a 4-bit base; loss: chunked (TRL's own head), or liger: the same with Liger's other kernels
    scratch: where inputs that are Blob URLs are brought to
    gpus: processes of this machine, one for each; nodes: machines of the run
    """

    version: Literal[1] = 1
    run: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")
    model: str = Field(min_length=1)
    revision: str | None = None
    task: Literal["sft", "dpo"] = "sft"
    method: Method = "qlora"
    data: Data
    max_length: int = Field(ge=2, le=1 << 24)
    epochs: float | None = Field(default=None, gt=0)
    max_steps: Positive | None = None
    micro_batch: Positive = 1
    gradient_accumulation_steps: Positive = 1
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, ge=0)
    optimizer: Optimizer = "adamw_torch_fused"
    lora_rank: Positive = 16
    lora_alpha: Positive | None = None
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: str | tuple[str, ...] = "all-linear"
    base_quantization: Literal["nf4", "nf4-double"] = "nf4-double"
    weights: Literal["bf16", "fp16", "fp32"] = "bf16"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_checkpointing: bool = True
    attention: Literal["flash_attention_2", "sdpa", "eager"] = "sdpa"
    loss: Literal["chunked", "liger"] = "chunked"
    dpo_beta: float = Field(default=0.1, gt=0)
    seed: int = Field(default=42, ge=0, lt=1 << 32)
    gpus: Positive = 1
    nodes: Positive = 1
    checkpoints: Checkpoints
    evaluation: Evaluation | None = None
    result: str
    upload: str | None = None
    scratch: str = "/cache/tonnage"
    predicted: Predicted = Predicted()
    metrics: Metrics = Metrics()

    @model_validator(mode="after")
    def _together(self) -> FinetuneConfig:
        """What each field allows and all together do not."""
        for wrong, why in _contradictions(self):
            if wrong:
                raise ValueError(why)
        return self

    @property
    def adapter(self) -> bool:
        return self.method != "full"

    @property
    def quantized(self) -> bool:
        return self.method in ("qlora", "qdora")

    @property
    def digest(self) -> str:
        """16 hex digits of all that decides what is learned: a checkpoint of another digest is not resumed."""
        said = self.model_dump(mode="json", exclude=set(_OUTSIDE))
        said["data"] = {key: value for key, value in said["data"].items() if key not in ("train", "evaluation")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


# where things lie, how often they are told and how many processes share the batch
_OUTSIDE = ("checkpoints", "result", "upload", "scratch", "predicted", "metrics")


def _contradictions(c: FinetuneConfig) -> list[tuple[bool, str]]:
    evaluated = c.data.evaluation is not None or c.data.evaluation_share > 0
    return [
        ((c.epochs is None) == (c.max_steps is None), "give epochs or max_steps, exactly one of them"),
        (
            c.checkpoints.every_seconds is None and c.checkpoints.every_steps is None,
            "checkpoints needs every_seconds or every_steps",
        ),
        (c.evaluation is not None and not evaluated, "evaluation needs data.evaluation or data.evaluation_share"),
        (
            c.data.evaluation is not None and c.data.evaluation_share > 0,
            "data.evaluation and data.evaluation_share exclude each other",
        ),
        (c.task == "dpo" and c.data.packing, "packing is for sft: dpo compares two answers of one prompt"),
        (c.task == "dpo" and c.data.loss_on != "completion", "dpo compares answers: leave data.loss_on at completion"),
        (
            c.quantized and c.weights == "fp32",
            "a 4-bit base has no fp32 weights: say weights bf16, or fp16 on a card without it",
        ),
        (
            c.method == "full" and c.weights == "fp16",
            "fp16 weights cannot be trained in full, their gradients leave its range: use weights fp32 or bf16",
        ),
        (c.data.packing and c.attention == "eager", "packing needs attention sdpa or flash_attention_2"),
        (
            c.nodes > 1 and c.checkpoints.mirror is not None and c.upload is None,
            "several machines that meet at checkpoints.mirror need upload too: each has a disk of its own, and the"
            " result lies on the first one's",
        ),
    ]


def load_config(path: Path) -> FinetuneConfig:
    """The configuration in a YAML or JSON file. PlannerError names the file, the field and what it should be."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PlannerError(f"{path} cannot be read ({reason}): give the run's configuration file") from error
    return parse_config(_parsed(text, path), str(path))


def _parsed(text: str, path: Path) -> Any:
    import yaml

    kind, parse = ("JSON", json.loads) if path.suffix == ".json" else ("YAML", yaml.safe_load)
    try:
        return parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise PlannerError(f"{path} is not {kind} ({said}): let the plan write it again") from error


def parse_config(data: object, what: str) -> FinetuneConfig:
    """The configuration in a mapping. PlannerError names the first field that is wrong."""
    if not isinstance(data, dict):
        raise PlannerError(f"{what} is no mapping of fields: let the plan write it again")
    try:
        return FinetuneConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise PlannerError(f"{what}: there is no field {field}: take it out or correct its name") from error
        where = f"{what}: {field}" if field else what
        raise PlannerError(f"{where}: {said[:1].lower()}{said[1:]}") from error
