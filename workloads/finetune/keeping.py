"""Checkpoints of TRL's trainers: when they are written, that they are whole, and that what resumes is the same run.

A run that was stopped and resumed gives bit for bit the result of one that was not. For that, beside what transformers
keeps, the random states saved are those of the beginning of a step that was broken off, evaluations leave them alone,
and weights come back in the type that they had.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
import trl

from planner.errors import PlannerError
from workloads.finetune import checkpoint
from workloads.finetune.config import FinetuneConfig
from workloads.finetune.signals import Stop
from workloads.finetune.telemetry import Telemetry
from workloads.finetune.watching import best_step
from workloads.store import files_in

Answer = TypeVar("Answer")


class _Whole:
    """What both of TRL's trainers are given: whole checkpoints and evaluations that leave the random states alone."""

    keeper: Keeper

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.keeper.save(lambda: super(_Whole, self)._save_checkpoint(model, trial))  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.keeper.writing or super()._get_output_dir(trial))  # type: ignore[misc]

    def store_flos(self) -> None:
        """While the first process writes alone it must not wait for the others, whose part in this is done already."""
        if self.keeper.writing is None:
            super().store_flos()  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        names = ["rng_state.pth"] if len(self.keeper.states) == 1 else [f"rng_state_{i}.pth" for i in range(1 << 16)]
        for name, state in zip(names, self.keeper.states, strict=False):
            torch.save(state, Path(output_dir) / name)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: it would name no more than the manifest does, and wants to be written at every checkpoint."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with same_widths(self.model):  # type: ignore[attr-defined]
            super()._load_from_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        with same_widths(self.model):  # type: ignore[attr-defined]
            super()._load_best_model()  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        before = random_states()
        try:
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            restore(before)


class WholeSft(_Whole, trl.SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer on conversations that are tokens already."""


class WholeDpo(_Whole, trl.DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer on preferences that are tokens already."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


@contextlib.contextmanager
def same_widths(model: Any) -> Iterator[None]:
    """Parameters keep the types that they had: peft loads a 16-bit adapter in 32 bits, and the run would be another."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(before[name])


def random_states() -> dict[str, Any]:
    """Of Python, numpy, torch and the card, as transformers keeps them."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        several = torch.distributed.is_initialized()
        states["cuda"] = torch.cuda.get_rng_state_all() if several else torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states:
        several = isinstance(states["cuda"], list)
        (torch.cuda.set_rng_state_all if several else torch.cuda.set_rng_state)(states["cuda"])


class Keeper(transformers.TrainerCallback):  # type: ignore[misc]
    """Decides when to save and when to stop, the same on every process; and saves.

    writing: the folder that the trainer writes into just now; states: the random states to save, by process
    """

    def __init__(
        self,
        config: FinetuneConfig,
        trainer: Any,
        stop: Stop,
        say: Telemetry,
        facts: dict[str, str],
        copy: Callable[[Path], None] | None,
    ) -> None:
        self.config, self.trainer, self.stop, self.say, self.facts = config, trainer, stop, say, facts
        self.copy = copy
        self.folder = Path(config.checkpoints.folder)
        self.writing: Path | None = None
        self.states: list[dict[str, Any]] = []
        self.stopped = False
        self._at_step_begin: dict[str, Any] | None = None
        self._saved_step = 0
        self._saved_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved_step, self._saved_at = state.global_step, time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._at_step_begin = random_states() if args.gradient_accumulation_steps > 1 else None

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """In the middle of a step: its gradients are given up, and the step is done again later."""
        if self._agreed(self.stop.by is not None):
            self.stopped = control.should_training_stop = True
            control.should_save = state.global_step > self._saved_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._at_step_begin = None
        last = state.global_step >= state.max_steps
        if not last and self._agreed(self.stop.by is not None):
            self.stopped = control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        elif not last and self._agreed(self._due(state.global_step)):
            control.should_save = True

    def _due(self, step: int) -> bool:
        when = self.config.checkpoints
        by_step = when.every_steps is not None and step % when.every_steps == 0
        waited = time.monotonic() - self._saved_at
        return by_step or (when.every_seconds is not None and waited >= when.every_seconds)

    def _agreed(self, wanted: bool) -> bool:
        """Whether any process wants it."""
        if not torch.distributed.is_initialized():
            return wanted
        flag = torch.tensor(int(wanted), device=self.trainer.args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def save(self, fill: Callable[[], None]) -> None:
        """Write the checkpoint of this step whole, by the first process alone, and prune the older ones."""
        step = self.trainer.state.global_step
        if step == 0:
            return
        mine = self._at_step_begin or random_states()
        self.states = gathered(mine)
        self.trainer.store_flos()
        by_first(self.trainer, "the checkpoint", lambda: self._save(step, fill))
        self._saved_step, self._saved_at = step, time.monotonic()

    def _save(self, step: int, fill: Callable[[], None]) -> None:
        started = time.monotonic()
        target = self.folder / f"checkpoint-{step}"

        def into(partial: Path) -> None:
            self.writing = partial
            try:
                fill()
            finally:
                self.writing = None
            inner = partial / target.name  # transformers gives each checkpoint a folder of its own
            for path in list(inner.iterdir()):
                path.rename(partial / path.name)
            inner.rmdir()

        best = best_step(self.trainer.state)
        spare = f"checkpoint-{best}" if best else ""
        facts = self.facts | {"run": self.config.run, "step": step} | ({"best": spare} if spare else {})
        checkpoint.write(target, into, facts, spare=spare)
        checkpoint.prune(self.folder, self.config.checkpoints.keep, spare)
        self.say.event(
            "checkpoint",
            step=step,
            checkpoint_step=step,
            bytes=sum(path.stat().st_size for path in files_in(target).values()),
            seconds=round(time.monotonic() - started, 3),
        )
        if self.copy is not None:
            self.copy(target)


def gathered(mine: Answer) -> list[Answer]:
    """Every process's answer, on every process, the first one's first."""
    if not torch.distributed.is_initialized():
        return [mine]
    answers: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, mine)
    return answers


def first_says(answer: Answer) -> Answer:
    """The first process's answer, on every process."""
    if not torch.distributed.is_initialized():
        return answer
    said = [answer]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


def by_first(trainer: Any, what: str, write: Callable[[], None]) -> None:
    """Let the first process write, while the others wait. All fail where it fails."""
    wrong: Exception | None = None
    if trainer.is_world_process_zero():
        try:
            write()
        except (OSError, RuntimeError, PlannerError) as error:
            wrong = error
    if first_says(wrong is not None):
        raise wrong or checkpoint.Behind(f"the first process could not write {what}: see what it says")
