"""Trainers (what a fine-tuning stack fuses, chunks and casts by default) and the constants of their memory."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any, Literal

from planner.catalog import read_facts
from planner.errors import PlannerError
from planner.model import Frozen

LossHead = Literal["hf", "hf_shifted", "hf_outputs", "hf_16bit", "in_place", "chunked", "liger", "logit_chunks", "none"]
"""How the logits become a loss:
hf            transformers 5: 16-bit logits, an fp32 copy, log_softmax (ForCausalLMLoss)
hf_shifted    transformers up to 4.45: fp32 logits, their shifted copy, log_softmax
hf_outputs    hf_shifted under autocast, with the model's outputs alive until the backward is through (Trainers of 2023)
hf_16bit      models that never upcast: 16-bit logits, shifted copy, log_softmax in the logits' width
in_place      logits and shifted copy materialised, loss and gradient written in place by one kernel
chunked       TRL's fused head: [4096, 32768] tiles, no logits at all
liger         Liger's fused linear cross entropy: chunks of tokens
logit_chunks  16-bit logits in chunks of tokens that all stay until the backward (torchtune, LitGPT)
none          mean of the hidden states; an oracle's baseline
"""


class Trainer(Frozen):
    """A fine-tuning stack's defaults.

    checkpoints: gradient checkpointing is on unless it is switched off; checkpointing: which kind it is when on,
        reentrant, non_reentrant or offloaded ("none": the trainer has none of its own, non_reentrant is meant)
    adapter_on_quantized: width of LoRA adapters on a quantised base; autocast: 16-bit autocast around the step
    kernels: the fused operations; experts_are_linear: routed experts are nn.Linear modules (transformers 4)
    embedding_state_32bit: 8-bit Adam keeps the embedding's moments in fp32 (Trainer.create_optimizer of transformers 5)
    """

    name: str
    label: str
    loss: LossHead
    checkpoints: bool
    checkpointing: Literal["none", "reentrant", "non_reentrant", "offloaded"]
    optimizer: str
    adapter_on_quantized: Literal["bf16", "fp32"]
    autocast: bool
    kernels: dict[str, bool]
    experts_are_linear: bool = False
    embedding_state_32bit: bool = False
    source: str
    as_of: str


@cache
def trainers() -> dict[str, Trainer]:
    """Every trainer by name."""
    return {record["name"]: Trainer.model_validate(record) for record in read_facts("trainers.json")["trainers"]}


def trainer(name: str) -> Trainer:
    """The trainer of that name; PlannerError with the nearest names when there is none."""
    known = trainers()
    if name in known:
        return known[name]
    near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3)) or ", ".join(known)
    raise PlannerError(f"no trainer is called {name!r}: try {near}")


def constant(name: str) -> dict[str, Any]:
    """A constant of training memory with its source and date."""
    record: dict[str, Any] = read_facts("trainers.json")["constants"][name]
    return record
