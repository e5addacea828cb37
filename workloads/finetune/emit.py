"""The same run for other trainers: an Axolotl or an Unsloth configuration, or a refusal where it would be another run.

Fields: Axolotl 0.19.0 utils/schemas (AxolotlInputConfig); Unsloth unsloth_cli/config.py at 10da22a014.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml

from planner.errors import PlannerError
from workloads.blobs import is_url
from workloads.finetune.config import FinetuneConfig

Trainer = Literal["axolotl", "unsloth"]


def emit(config: FinetuneConfig, trainer: Trainer) -> str:
    """The run as that trainer's YAML file. PlannerError for what it cannot say."""
    made = axolotl(config) if trainer == "axolotl" else unsloth(config)
    return yaml.safe_dump(made, sort_keys=False, default_flow_style=False)


def _refuse(trainer: str, *wrong: tuple[bool, str]) -> None:
    for is_wrong, why in wrong:
        if is_wrong:
            raise PlannerError(f"{trainer} cannot be given this run: {why}")


def axolotl(c: FinetuneConfig) -> dict[str, Any]:
    """Axolotl's configuration; data as `chat_template` with roles to train, its own loss as the model's."""
    _refuse(
        "Axolotl",
        (is_url(c.model) or is_url(c.data.train), "its model and data are no Blob URLs: name mounted folders"),
        (c.task == "dpo", "its preferences are written otherwise: train them here, or with TRL"),
        (c.data.loss_on == "completion", "it learns every answer of a conversation: set data.loss_on to assistant"),
    )
    said: dict[str, Any] = {
        "base_model": c.model,
        **({"revision_of_model": c.revision} if c.revision else {}),
        "sequence_len": c.max_length,
        "excess_length_strategy": "raise" if c.data.too_long == "refuse" else c.data.too_long,
        "sample_packing": c.data.packing,
        "micro_batch_size": c.micro_batch,
        "gradient_accumulation_steps": c.gradient_accumulation_steps,
        **({"num_epochs": c.epochs} if c.epochs else {"max_steps": c.max_steps}),
        "learning_rate": c.learning_rate,
        "lr_scheduler": c.scheduler,
        "warmup_steps": c.warmup_steps,
        "weight_decay": c.weight_decay,
        "max_grad_norm": c.max_grad_norm,
        "optimizer": c.optimizer,
        "bf16": c.precision == "bf16",
        "fp16": c.precision == "fp16",
        "gradient_checkpointing": c.gradient_checkpointing,
        **({"gradient_checkpointing_kwargs": {"use_reentrant": False}} if c.gradient_checkpointing else {}),
        "attn_implementation": c.attention,
        "seed": c.seed,
        "output_dir": c.result,
        "save_total_limit": c.checkpoints.keep,
        **({"save_steps": c.checkpoints.every_steps} if c.checkpoints.every_steps else {}),
        **({"val_set_size": c.data.evaluation_share} if c.data.evaluation_share else {}),
        **({"eval_steps": c.evaluation.every_steps} if c.evaluation else {}),
        "logging_steps": c.metrics.every_steps,
    }
    if c.evaluation and c.evaluation.patience:
        said["early_stopping_patience"] = c.evaluation.patience
    if c.adapter:
        said |= _axolotl_adapter(c)
    said["datasets"] = [_axolotl_data(c, c.data.train)]
    if c.data.evaluation:
        said["test_datasets"] = [_axolotl_data(c, c.data.evaluation)]
    return said


def _axolotl_adapter(c: FinetuneConfig) -> dict[str, Any]:
    linear = c.lora_targets == "all-linear"
    said: dict[str, Any] = {
        "adapter": "qlora" if c.quantized else "lora",
        "load_in_4bit": c.quantized,
        "lora_r": c.lora_rank,
        "lora_alpha": c.lora_alpha or 2 * c.lora_rank,
        "lora_dropout": c.lora_dropout,
        **({"lora_target_linear": True} if linear else {"lora_target_modules": _targets(c)}),
    }
    if c.method in ("dora", "qdora"):
        said["peft_use_dora"] = True
    if c.quantized:
        said["bnb_config_kwargs"] = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": c.base_quantization == "nf4-double",
        }
    return said


def _axolotl_data(c: FinetuneConfig, path: str) -> dict[str, Any]:
    everybody = ["system", "user", "assistant", "tool"]
    return {
        "path": path,
        "ds_type": "json",
        "split": "train",
        "type": "chat_template",
        "field_messages": "messages",
        "roles_to_train": ["assistant"] if c.data.loss_on == "assistant" else everybody,
        "train_on_eos": "turn" if c.data.loss_on == "assistant" else "all",
    }


def unsloth(c: FinetuneConfig) -> dict[str, Any]:
    """Unsloth's configuration, for `unsloth train --config`. What it has no word for is refused, not left out."""
    _refuse(
        "Unsloth",
        (is_url(c.model) or is_url(c.data.train), "its model and data are no Blob URLs: name mounted folders"),
        (c.task == "dpo", "its command trains sft alone: set task to sft"),
        (c.revision is not None, "its file has no revision: download the model and name its folder"),
        (c.gpus * c.nodes > 1, "it trains on one GPU: set gpus and nodes to 1"),
        (c.evaluation is not None or c.data.evaluation_share > 0, "its file has no evaluation: take it out"),
        (c.data.loss_on == "completion", "it learns every answer of a conversation: set data.loss_on to assistant"),
        (c.scheduler != "linear", "its scheduler is linear: set scheduler to linear"),
        (c.quantized and c.base_quantization != "nf4-double", "its base is nf4-double"),
        (c.epochs is not None and c.epochs != int(c.epochs), "its epochs are whole: set epochs to a whole number"),
    )
    return {
        "model": c.model,
        "data": {"local_dataset": [c.data.train], "format_type": "chatml"},
        "training": {
            "training_type": "lora" if c.adapter else "full",
            "max_seq_length": c.max_length,
            "load_in_4bit": c.quantized,
            "output_dir": c.result,
            "num_epochs": int(c.epochs or 1),
            "max_steps": c.max_steps or 0,
            "learning_rate": c.learning_rate,
            "batch_size": c.micro_batch,
            "gradient_accumulation_steps": c.gradient_accumulation_steps,
            "warmup_steps": c.warmup_steps,
            "save_steps": c.checkpoints.every_steps or 0,
            "weight_decay": c.weight_decay,
            "random_seed": c.seed,
            "packing": c.data.packing,
            "train_on_completions": c.data.loss_on != "all",
            "gradient_checkpointing": "true" if c.gradient_checkpointing else "none",
        },
        **(
            {
                "lora": {
                    "lora_r": c.lora_rank,
                    "lora_alpha": c.lora_alpha or 2 * c.lora_rank,
                    "lora_dropout": c.lora_dropout,
                    "target_modules": ",".join(_targets(c)),
                    "use_dora": c.method in ("dora", "qdora"),
                }
            }
            if c.adapter
            else {}
        ),
    }


def _targets(c: FinetuneConfig) -> list[str]:
    """Module names. all-linear is what both write out for the usual layer of three or four and three matrices."""
    if c.lora_targets == "all-linear":
        return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return [c.lora_targets] if isinstance(c.lora_targets, str) else list(c.lora_targets)
