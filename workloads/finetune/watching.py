"""What is seen of a run while it trains: loss, pace, MFU, memory beside the plan's, and when to stop early."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers

from workloads.finetune.config import FinetuneConfig
from workloads.finetune.telemetry import Telemetry


class Judge(transformers.TrainerCallback):  # type: ignore[misc]
    """Early stop by the losses in the trainer's own history, which checkpoints hold."""

    def __init__(self, config: FinetuneConfig, trainer: Any, say: Telemetry) -> None:
        self.config, self.trainer, self.say = config, trainer, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The evaluation that a stop skipped at the step that is resumed."""
        wanted = self.config.evaluation
        if wanted is None or state.global_step == 0 or state.global_step % wanted.every_steps:
            return
        if state.global_step not in dict(evaluations(state)):
            self.trainer.evaluate()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        losses = evaluations(state)
        if not losses:
            return
        step, loss = losses[-1]
        best = best_step(state)
        self.say.event("evaluation", step=step, steps=state.max_steps, eval_loss=loss, best_step=best)
        patience = self.config.evaluation.patience if self.config.evaluation else None
        if patience is None:
            return
        control.should_save |= best == step
        behind = len(losses) - 1 - min(range(len(losses)), key=lambda i: losses[i][1])
        if behind >= patience:
            self.say.event("early-stop", step=step, best_step=best)
            control.should_training_stop = True


def evaluations(state: Any) -> list[tuple[int, float]]:
    """Step and loss of every evaluation so far."""
    return [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]


def best_step(state: Any) -> int | None:
    """The step with the lowest loss in evaluation, the first of equals; None before any."""
    losses = evaluations(state)
    return min(losses, key=lambda pair: pair[1])[0] if losses else None


class Narrator(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells steps: loss, pace, MFU, and the memory beside what the plan predicts."""

    def __init__(self, config: FinetuneConfig, trainer: Any, say: Telemetry) -> None:
        self.config, self.trainer, self.say = config, trainer, say
        self._flops_per_token = flops_per_token(trainer.model, config)
        self._started = self._last = time.monotonic()
        self._first_step = self._last_step = 0
        self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = self._last = time.monotonic()
        self._first_step = self._last_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        now = time.monotonic()
        seconds = max(now - self._last, 1e-9)
        total = float(logs.get("num_tokens", 0))
        pace = max(0.0, total - self._tokens) / seconds
        done = state.global_step - self._first_step
        peak = peak_allocated_bytes()
        predicted = self.config.predicted
        card = predicted.flops_per_second
        cards = self.trainer.args.world_size
        self.say.event(
            "step",
            step=state.global_step,
            steps=state.max_steps,
            loss=logs["loss"],
            grad_norm=logs.get("grad_norm"),
            learning_rate=logs.get("learning_rate"),
            token_accuracy=logs.get("mean_token_accuracy"),
            tokens=int(total),
            tokens_per_second=round(pace, 1),
            seconds_per_step=round(seconds / max(1, state.global_step - self._last_step), 4),
            remaining_seconds=round((now - self._started) / max(1, done) * (state.max_steps - state.global_step)),
            optimizer_bytes=optimizer_bytes(self.trainer.optimizer),
            mfu=round(pace * self._flops_per_token / (card * cards), 4) if card else None,
            peak_allocated_bytes=peak,
            predicted_allocated_bytes=predicted.allocated_bytes,
            memory_error_pct=round(100 * (predicted.allocated_bytes / peak - 1), 1)
            if peak and predicted.allocated_bytes
            else None,
        )
        self._last, self._last_step, self._tokens = now, state.global_step, total


def peak_allocated_bytes() -> int | None:
    """Peak of torch's allocator on the card; None on a CPU, whose allocator does not count."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def weight_bytes(model: Any) -> tuple[int, int]:
    """Bytes of the base and of the adapters: parameters, and the scales of 4-bit ones, each storage once.

    Without adapters all is base, although it is trained.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = not hasattr(model, "peft_config")
    base = [p for p in model.parameters() if whole or not p.requires_grad]
    for parameter in list(base):
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # double quantisation has scales of its scales
            base += [tensor for tensor in (state.absmax, state.code, state.offset) if torch.is_tensor(tensor)]
            state = state.state2
    return _bytes(base), 0 if whole else _bytes(trained)


def optimizer_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state; 0 before its first step."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return _bytes([tensor for state in inner.state.values() for tensor in state.values() if torch.is_tensor(tensor)])


def _bytes(tensors: list[Any]) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def flops_per_token(model: Any, config: FinetuneConfig) -> float:
    """The model's own arithmetic for one token of training: what an MFU counts.

    2 N forward, 2 N for the gradients of activations, 2 T for those of weights, and attention's 12 L H S / 2 (causal;
    8 of the 12 where weights are frozen is not told apart: it is the same product). N: matrix parameters that a token
    passes, embeddings not, the head yes; T: those that are trained. What checkpointing computes twice does not count.
    Source: PaLM (arXiv 2204.02311), appendix B; Korthikanti et al. (arXiv 2205.05198) for the halves.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = base.config.get_text_config()
    embedding = base.get_input_embeddings().weight.numel()
    tied = base.get_output_embeddings() is not None and (
        base.get_output_embeddings().weight is base.get_input_embeddings().weight
    )
    whole = model.num_parameters() if hasattr(model, "num_parameters") else base.num_parameters()
    passed = whole - (0 if tied else embedding)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 6 * text.num_hidden_layers * text.num_attention_heads * head_dim * config.max_length
    return float(4 * passed + 2 * min(trained, passed) + attention)
