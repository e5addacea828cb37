"""Training itself: a model, an adapter and examples in TRL's trainers, from the newest checkpoint to the result."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import peft
import torch
import transformers
import trl

from planner.errors import PlannerError
from workloads.finetune import checkpoint
from workloads.finetune.check import Prepared
from workloads.finetune.config import FinetuneConfig
from workloads.finetune.data import Example
from workloads.finetune.keeping import Keeper, WholeDpo, WholeSft, by_first, first_says, gathered
from workloads.finetune.signals import Stop
from workloads.finetune.telemetry import Telemetry
from workloads.finetune.watching import Judge, Narrator, best_step, weight_bytes

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()

WIDTHS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Outcome(NamedTuple):
    """steps: done of `total`; stopped: before the end; folder: of the result, where there is one."""

    steps: int
    total: int
    stopped: bool
    folder: Path | None


def train(
    config: FinetuneConfig,
    model_path: str,
    data: Prepared,
    stop: Stop,
    say: Telemetry,
    *,
    copy: Callable[[Path], None] | None = None,
) -> Outcome:
    """Train, from the newest whole checkpoint where there is one, to the result or to a stop.

    copy: called with each checkpoint when it is whole.

    PlannerError for a model that cannot be loaded, a checkpoint of another run, and a machine that does not suit.
    """
    _check_machine(config)
    transformers.set_seed(config.seed)
    model = _model(config, model_path)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # from here on processes wait for each other, and one that left at once would take the others down
    with stop.gently() if several else contextlib.nullcontext():
        trainer = _trainer(config, model, model_path, data)
        facts = {"config": config.digest, "data": data.digest}
        keeper = Keeper(config, trainer, stop, say, facts, copy)
        trainer.keeper = keeper
        for callback in (keeper, Narrator(config, trainer, say), Judge(config, trainer, say)):
            trainer.add_callback(callback)
        resumed = _resume(Path(config.checkpoints.folder), facts, trainer)
        say.event("start", **_described(config, trainer, resumed))
        outcome = _trained(config, keeper, resumed)
        if torch.distributed.is_initialized():  # together: nobody is left waiting for one that has gone
            torch.distributed.destroy_process_group()
        return outcome


def _trained(config: FinetuneConfig, keeper: Keeper, resumed: Path | None) -> Outcome:
    trainer = keeper.trainer
    with keeper.stop.gently():
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        state = trainer.state
        if keeper.stopped:
            return Outcome(state.global_step, state.max_steps, True, None)
        result = Path(config.result)

        def write() -> None:
            _load_best(config, trainer, keeper.say)
            checkpoint.write(
                result,
                lambda partial: _save_result(trainer, partial),
                keeper.facts | {"run": config.run, "step": state.global_step},
                make_room=False,
            )

        by_first(trainer, "the result", write)
    return Outcome(state.global_step, state.max_steps, False, result)


# --- the parts --------------------------------------------------------------------------------------------------------


def _check_machine(config: FinetuneConfig) -> None:
    if config.precision == "bf16" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
        raise PlannerError(
            f"{torch.cuda.get_device_name()} has no bf16: set precision and weights to fp16 (fp32 weights where all"
            " are trained)"
        )
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise PlannerError("fp16 needs a GPU and none is visible: set precision to bf16 or fp32, or see to the driver")
    if config.loss == "liger" and not torch.cuda.is_available():
        raise PlannerError("Liger's kernels need a GPU and none is visible: set loss to chunked, or see to the driver")
    if config.loss == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise PlannerError("the package liger-kernel is not installed: add it to the image, or set loss to chunked")


def _model(config: FinetuneConfig, path: str) -> Any:
    quantization = None
    if config.quantized:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.base_quantization == "nf4-double",
            bnb_4bit_compute_dtype=WIDTHS[config.weights],
        )
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.revision,
            dtype=WIDTHS[config.weights],
            attn_implementation=config.attention,
            quantization_config=quantization,
            device_map={"": device} if quantization else None,
        )
    except (OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise PlannerError(
            f"the model {config.model} cannot be loaded ({said}): correct its name or its files"
        ) from error


def _adapter(config: FinetuneConfig) -> Any:
    if not config.adapter:
        return None
    targets = config.lora_targets if isinstance(config.lora_targets, str) else list(config.lora_targets)
    return peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        use_dora=config.method in ("dora", "qdora"),
        task_type="CAUSAL_LM",
    )


def _trainer(config: FinetuneConfig, model: Any, path: str, data: Prepared) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, revision=config.revision)
    casts = config.adapter or config.weights == "fp32"  # weights trained in 16 bits are computed in them as they are
    common = {
        "output_dir": config.checkpoints.folder,
        "max_length": config.max_length,
        "per_device_train_batch_size": config.micro_batch,
        "per_device_eval_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.epochs or 1,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optimizer,
        "bf16": casts and config.precision == "bf16",
        "fp16": casts and config.precision == "fp16",
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "use_liger_kernel": config.loss == "liger",
        "seed": config.seed,
        "save_strategy": "no",  # `Keeper` decides
        "eval_strategy": "steps" if config.evaluation else "no",
        "eval_steps": config.evaluation.every_steps if config.evaluation else None,
        "prediction_loss_only": True,
        "logging_steps": config.metrics.every_steps,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }
    parts = {
        "model": model,
        "processing_class": tokenizer,
        "peft_config": _adapter(config),
    }
    if config.task == "dpo":
        arguments = trl.DPOConfig(**common, beta=config.dpo_beta)
        rows = _preferences
    else:
        packing = {"packing": config.data.packing, "eval_packing": False if config.data.packing else None}
        arguments = trl.SFTConfig(**common, **packing)
        rows = _conversations
    made = WholeDpo if config.task == "dpo" else WholeSft
    evaluation = rows(data.evaluation) if config.evaluation else None
    try:
        trainer = made(**parts, args=arguments, train_dataset=rows(data.train), eval_dataset=evaluation)
    except ValueError as error:  # target modules that are not there, settings that exclude each other
        said = " ".join(str(error).split())[:200]
        raise PlannerError(f"the trainer refuses the configuration ({said}): correct it") from error
    trainer.remove_callback(transformers.PrinterCallback)
    if config.precision == "fp16":
        widen_trained(trainer.model)
    return trainer


def widen_trained(model: Any) -> None:
    """Trained parameters in 32 bits: fp16 training scales the loss, and its scaler takes no gradients of 16 bits.

    TRL puts adapters on a 4-bit base into bfloat16, also where the card has none.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _conversations(examples: list[Example]) -> Any:
    return datasets.Dataset.from_dict(
        {"input_ids": [list(e.tokens) for e in examples], "labels": [list(e.labels) for e in examples]}
    )


def _preferences(examples: list[Example]) -> Any:
    return datasets.Dataset.from_dict(
        {
            "prompt_ids": [list(e.prompt) for e in examples],
            "chosen_ids": [list(e.tokens[len(e.prompt) :]) for e in examples],
            "rejected_ids": [list(e.rejected) for e in examples],
        }
    )


def _described(config: FinetuneConfig, trainer: Any, resumed: Path | None) -> dict[str, Any]:
    parameters = list(trainer.model.parameters())
    weights, adapters = weight_bytes(trainer.model)
    return {
        "resumed_from": resumed.name if resumed else None,
        "method": config.method,
        "task": config.task,
        "sequences": len(trainer.train_dataset),
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "weights_bytes": weights,
        "adapters_bytes": adapters,
        "processes": trainer.args.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, trl)},
    }


def _resume(folder: Path, facts: dict[str, str], trainer: Any) -> Path | None:
    """The checkpoint to go on from: the first process's newest, on every process.

    PlannerError, the same on all, where one of them may not take it; Behind where its machine does not have it.
    """
    first = trainer.is_world_process_zero()
    found = first_says(checkpoint.newest(folder)[0] if first else None)
    if found is None:
        return None
    mine = folder / found.name  # another machine's folder may lie elsewhere
    wrong: PlannerError | None = None
    try:
        _check_resumable(mine, facts, trainer.args.world_size)
    except PlannerError as error:
        wrong = error
    for said in gathered(wrong):
        if said is not None:
            raise said
    return mine


def _check_resumable(found: Path, facts: dict[str, str], processes: int) -> None:
    said = checkpoint.manifest_of(found)
    if said is None:
        raise checkpoint.Behind(
            f"{found}, from which the run goes on, is not on machine {os.environ.get('JOB_COMPLETION_INDEX', '0')}:"
            " start it again, and it is fetched from checkpoints.mirror, or let the machines share the folder"
        )
    checkpoint.check_same_run(found, said, **facts)
    rng = "rng_state.pth" if processes == 1 else f"rng_state_{processes - 1}.pth"
    if not (found / rng).exists():
        raise PlannerError(
            f"{found} was made by another number of processes than {processes}: start the run with as many, or give"
            " it another name"
        )


def _load_best(config: FinetuneConfig, trainer: Any, say: Telemetry) -> None:
    """With early stop the result is the best model, not the last."""
    if config.evaluation is None or config.evaluation.patience is None:
        return
    best = best_step(trainer.state)
    folder = Path(config.checkpoints.folder) / f"checkpoint-{best}"
    if best is None or best == trainer.state.global_step:
        return
    if checkpoint.manifest_of(folder) is None:
        raise PlannerError(
            f"{folder}, the best checkpoint, is not whole: evaluate less early, or keep more checkpoints"
        )
    trainer.state.best_model_checkpoint = str(folder)
    trainer._load_best_model()
    say.event("best", step=best)


def _save_result(trainer: Any, partial: Path) -> None:
    trainer.save_model(str(partial), _internal_call=True)
    (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle: nothing that serves should load one
