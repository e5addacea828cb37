"""The fine-tuning program on a tiny Qwen3: it learns, stops and goes on, and what comes out is bit for bit the same."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from blob import free_port

from workloads.finetune import FAILED, FINISHED, INTERRUPTED, REFUSED
from workloads.finetune.checkpoint import manifest_of, newest

for needed in ("torch", "transformers", "peft", "trl", "bitsandbytes"):
    pytest.importorskip(needed, reason=f"the program needs {needed}: run make live")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, conversations and preferences."""
    folder = tmp_path_factory.mktemp("inputs")
    return (
        tiny.write_model(folder / "model"),
        tiny.write_data(folder / "chat.jsonl", copies=4),
        tiny.write_preferences(folder / "preferences.jsonl"),
    )


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def assert_bitwise_equal(one: Path, other: Path) -> None:
    import torch

    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


KINDS = ["qlora", "lora", "dora", "qdora", "full", "dpo"]
STEPS = 8
# SIGTERM from within, at a point that no clock decides
AT = """
import os, signal
from workloads.finetune.keeping import Keeper
plain = Keeper.{hook}
def {hook}(self, args, state, control, **more):
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.{signal})
    return plain(self, args, state, control, **more)
Keeper.{hook} = {hook}
"""


def said(folder: Path, inputs: tuple[Path, Path, Path], kind: str, **more: Any) -> dict[str, Any]:
    model, chat, preferences = inputs
    if kind == "dpo":
        return tiny.settings(folder, model, preferences, task="dpo", method="lora", **more)
    return tiny.settings(folder, model, chat, method=kind, **more)


Unbroken = Callable[..., tuple[Path, list[float]]]


@pytest.fixture(scope="module")
def unbroken(forker: tiny.Forker, inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Result and losses of a run that nothing stopped, made once for each configuration."""
    made: dict[str, tuple[Path, list[float]]] = {}

    def run(kind: str, **more: Any) -> tuple[Path, list[float]]:
        key = f"{kind} {more}"
        if key not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            done = forker.run(tiny.write_config(folder, said(folder, inputs, kind, **more)))
            assert done.code == FINISHED, done.errors.read_text()
            made[key] = folder / "result", [event["loss"] for event in done.events("step")]
        return made[key]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_and_resumed_gives_bit_for_bit_what_an_unbroken_one_gives(
    kind: str, forker: tiny.Forker, inputs: Any, unbroken: Unbroken, tmp_path: Path
) -> None:
    result, losses = unbroken(kind)
    config = tiny.write_config(tmp_path, said(tmp_path, inputs, kind))
    broken = forker.start(config)
    broken.until_event("step", step=3)
    broken.kill(signal.SIGTERM)
    assert broken.wait() == INTERRUPTED, broken.errors.read_text()
    (stopped,) = broken.events("interrupted")
    assert 3 <= stopped["step"] < STEPS
    assert stopped["by"] == "SIGTERM"
    assert not (tmp_path / "result").exists()
    found, _ = newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.name == f"checkpoint-{stopped['step']}"
    before = [event["loss"] for event in broken.events("step")]

    resumed = forker.run(config)
    assert resumed.code == FINISHED, resumed.errors.read_text()
    assert [event["resumed_from"] for event in resumed.events("start")] == [found.name]
    assert_bitwise_equal(result, tmp_path / "result")
    assert [*before, *(event["loss"] for event in resumed.events("step"))] == losses
    assert losses[-1] < losses[0]
    assert manifest_of(tmp_path / "result") is not None


def test_a_stop_in_the_middle_of_a_step_gives_the_step_up_and_loses_nothing(
    forker: tiny.Forker, inputs: Any, unbroken: Unbroken, tmp_path: Path
) -> None:
    config = tiny.write_config(tmp_path, said(tmp_path, inputs, "qlora"))
    broken = forker.run(config, patch=AT.format(hook="on_substep_end", step=3, signal="SIGTERM"))
    assert broken.code == INTERRUPTED, broken.errors.read_text()
    assert [event["step"] for event in broken.events("interrupted")] == [3]
    assert forker.run(config).code == FINISHED
    assert_bitwise_equal(unbroken("qlora")[0], tmp_path / "result")


def test_a_stop_where_an_evaluation_is_due_does_it_later_and_the_best_model_is_the_result(
    forker: tiny.Forker, inputs: Any, tmp_path: Path
) -> None:
    # other answers to the same questions: the more the model is sure of its own, the worse it does here
    held = tiny.write_jsonl(
        tmp_path / "held.jsonl", [tiny.conversation(question, "zzzz") for question in tiny.QUESTIONS]
    )
    evaluated = {"evaluation": {"every_steps": 2, "patience": 1}, "data": {"evaluation": str(held)}, "max_steps": 40}
    stop = AT.format(hook="on_step_end", step=2, signal="SIGTERM")
    runs = {}
    for name, patch in (("whole", ""), ("broken", stop)):
        config = tiny.write_config(tmp_path / name, said(tmp_path / name, inputs, "lora", **evaluated))
        runs[name] = forker.run(config, patch=patch)
    assert runs["whole"].code == FINISHED, runs["whole"].errors.read_text()
    assert runs["broken"].code == INTERRUPTED, runs["broken"].errors.read_text()
    assert runs["broken"].events("evaluation") == []
    resumed = forker.run(tmp_path / "broken" / "config.json")
    assert resumed.code == FINISHED, resumed.errors.read_text()
    losses = [(event["step"], event["eval_loss"]) for event in runs["whole"].events("evaluation")]
    assert [(event["step"], event["eval_loss"]) for event in resumed.events("evaluation")] == losses
    assert runs["whole"].events("early-stop")
    best = min(losses, key=lambda pair: pair[1])[0]
    assert best < losses[-1][0] < 40
    assert_bitwise_equal(tmp_path / "whole" / "result", tmp_path / "whole" / "checkpoints" / f"checkpoint-{best}")
    assert_bitwise_equal(tmp_path / "whole" / "result", tmp_path / "broken" / "result")


# --- faults, each with nothing lost -----------------------------------------------------------------------------------

OFTEN = {"checkpoints": {"every_steps": 2, "keep": 2}}


def test_a_kill_during_a_checkpoint_loses_only_the_steps_since_the_one_before(
    forker: tiny.Forker, inputs: Any, unbroken: Unbroken, tmp_path: Path
) -> None:
    config = tiny.write_config(tmp_path, said(tmp_path, inputs, "qlora", **OFTEN))
    killed = forker.run(
        config,
        patch="import os, signal\nfrom workloads.finetune import checkpoint\nplain = checkpoint.seal\n"
        "def seal(folder, facts):\n    if facts['step'] == 4:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    plain(folder, facts)\ncheckpoint.seal = seal",
    )
    assert killed.code == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4.partial",
    ]
    resumed = forker.run(config)
    assert resumed.code == FINISHED, resumed.errors.read_text()
    assert [event["folder"] for event in resumed.events("removed")] == ["checkpoint-4.partial"]
    assert resumed.events("start")[0]["resumed_from"] == "checkpoint-2"
    assert_bitwise_equal(unbroken("qlora")[0], tmp_path / "result")
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]


def test_a_truncated_newest_checkpoint_is_passed_over_for_the_one_before(
    forker: tiny.Forker, inputs: Any, unbroken: Unbroken, tmp_path: Path
) -> None:
    config = tiny.write_config(tmp_path, said(tmp_path, inputs, "qlora", **OFTEN))
    stopped = forker.run(config, patch=AT.format(hook="on_step_end", step=5, signal="SIGTERM"))
    assert stopped.code == INTERRUPTED, stopped.errors.read_text()
    state = tmp_path / "checkpoints" / "checkpoint-5" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-1])
    resumed = forker.run(config)
    assert resumed.code == FINISHED, resumed.errors.read_text()
    assert [event["folder"] for event in resumed.events("removed")] == ["checkpoint-5"]
    assert resumed.events("start")[0]["resumed_from"] == "checkpoint-4"
    assert_bitwise_equal(unbroken("qlora")[0], tmp_path / "result")


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_older_checkpoint(
    forker: tiny.Forker, inputs: Any, unbroken: Unbroken, tmp_path: Path
) -> None:
    config = tiny.write_config(tmp_path, said(tmp_path, inputs, "qlora", **OFTEN))
    full = forker.run(
        config,
        patch="import errno, os\nfrom pathlib import Path\nplain = os.fsync\n"
        f"first = Path({str(tmp_path / 'checkpoints' / 'checkpoint-2')!r})\n"
        "def fsync(handle):\n    if first.is_dir():\n        raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    plain(handle)\nos.fsync = fsync",
    )
    assert full.code == FAILED
    (sentence,) = [line for line in full.errors.read_text().splitlines() if line.startswith("finetune: ")]
    assert (
        sentence
        == f"finetune: the disk of {tmp_path / 'checkpoints'} is full: free space, then start again from the newest"
        " checkpoint"
    )
    assert "Traceback" not in full.errors.read_text()
    assert newest(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "checkpoint-2", [])
    resumed = forker.run(config)
    assert resumed.code == FINISHED, resumed.errors.read_text()
    assert resumed.events("start")[0]["resumed_from"] == "checkpoint-2"
    assert_bitwise_equal(unbroken("qlora")[0], tmp_path / "result")


def test_a_second_trainer_on_the_same_run_refuses_and_the_first_goes_on(
    forker: tiny.Forker, inputs: Any, unbroken: Unbroken, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = tiny.write_config(folder, said(folder, inputs, "qlora"))
    first = forker.start(config)
    first.until_event("start")
    other = tmp_path / "other" / "config.json"
    other.parent.mkdir()
    other.write_text(config.read_text())
    second = forker.run(other)
    assert second.code == FAILED
    assert "is used by another trainer on this machine: wait for it, or stop it" in second.errors.read_text()
    assert second.events() == []
    assert first.wait() == FINISHED
    assert_bitwise_equal(unbroken("qlora")[0], folder / "result")


def test_a_clock_that_goes_backwards_changes_nothing(
    forker: tiny.Forker, inputs: Any, unbroken: Unbroken, tmp_path: Path
) -> None:
    config = tiny.write_config(tmp_path, said(tmp_path, inputs, "qlora", checkpoints={"every_seconds": 0.001}))
    done = forker.run(
        config, patch="import itertools, time\nticks = itertools.count(0, -3600)\ntime.time = lambda: 2e9 + next(ticks)"
    )
    assert done.code == FINISHED, done.errors.read_text()
    assert [event["step"] for event in done.events("checkpoint")] == [1, 2, 3, 4, 5, 6, 7]  # none after the last step
    assert_bitwise_equal(unbroken("qlora")[0], tmp_path / "result")


def test_a_model_that_is_not_there_or_not_whole_is_refused_at_once(
    forker: tiny.Forker, inputs: Any, tmp_path: Path
) -> None:
    from tiny_chat import write_tokenizer

    for name, sentence in (
        (str(tmp_path / "none"), "is no folder and no hub id"),
        (str(write_tokenizer(tmp_path / "half")), "cannot be loaded"),
    ):
        done = forker.run(tiny.write_config(tmp_path, said(tmp_path, (Path(name), *inputs[1:]), "lora")))
        assert done.code == REFUSED, done.errors.read_text()
        assert sentence in done.errors.read_text()
        assert "Traceback" not in done.errors.read_text()


def test_modules_that_the_model_does_not_have_are_refused_at_once(
    forker: tiny.Forker, inputs: Any, tmp_path: Path
) -> None:
    done = forker.run(tiny.write_config(tmp_path, said(tmp_path, inputs, "lora", lora_targets=["no_such_proj"])))
    assert done.code == REFUSED, done.errors.read_text()
    assert "the trainer refuses the configuration (Target modules" in done.errors.read_text()
    assert "Traceback" not in done.errors.read_text()


def test_a_checkpoint_of_another_configuration_is_not_gone_on_with(
    forker: tiny.Forker, inputs: Any, tmp_path: Path
) -> None:
    patch = AT.format(hook="on_step_end", step=2, signal="SIGTERM")
    assert forker.run(tiny.write_config(tmp_path, said(tmp_path, inputs, "lora")), patch=patch).code == INTERRUPTED
    other = forker.run(tiny.write_config(tmp_path, said(tmp_path, inputs, "lora", learning_rate=1e-3)))
    assert other.code == REFUSED
    assert "checkpoint-2 was made with another config" in other.errors.read_text()
    assert newest(tmp_path / "checkpoints")[0] is not None


def test_a_finished_run_that_is_started_again_keeps_its_result(
    forker: tiny.Forker, inputs: Any, tmp_path: Path
) -> None:
    config = tiny.write_config(tmp_path, said(tmp_path, inputs, "lora", max_steps=1))
    assert forker.run(config).code == FINISHED
    before = (tmp_path / "result" / "manifest.json").stat().st_mtime_ns
    again = forker.run(config)
    assert again.code == FINISHED
    assert again.events("start") == []
    assert (tmp_path / "result" / "manifest.json").stat().st_mtime_ns == before


def test_packed_conversations_do_not_see_each_other(forker: tiny.Forker, inputs: Any, tmp_path: Path) -> None:
    """The loss of the first step, over the same conversations packed and apart: it is a mean over learned tokens."""
    losses = {}
    plain = {"max_steps": 1, "lora_dropout": 0.0, "weights": "fp32", "precision": "fp32", "max_length": 1024}
    for name, more in (
        ("packed", {"data": {"packing": True}, "micro_batch": 1, "gradient_accumulation_steps": 1}),
        ("apart", {"micro_batch": 16, "gradient_accumulation_steps": 1}),
    ):
        folder = tmp_path / name
        done = forker.run(tiny.write_config(folder, said(folder, inputs, "lora", **plain, **more)))
        assert done.code == FINISHED, done.errors.read_text()
        losses[name] = done.events("step")[0]["loss"]
    assert losses["packed"] == pytest.approx(losses["apart"], rel=1e-5)


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_give_the_loss_of_one_with_twice_the_batch_and_can_be_stopped(
    forker: tiny.Forker, inputs: Any, tmp_path: Path
) -> None:
    exact = {
        "lora_dropout": 0.0,
        "weights": "fp32",
        "precision": "fp32",
        "gradient_accumulation_steps": 1,
        "max_steps": 20,
    }
    alone = tiny.write_config(tmp_path / "one", said(tmp_path / "one", inputs, "lora", **exact, micro_batch=2))
    one = forker.run(alone)
    assert one.code == FINISHED, one.errors.read_text()
    expected = [event["loss"] for event in one.events("step")]

    both = said(tmp_path / "two", inputs, "lora", **exact, micro_batch=1, gpus=2)
    config = tiny.write_config(tmp_path / "two", both)
    port = {"MASTER_PORT": str(free_port())}
    two = forker.start(config, environment=port)
    two.until_event("step", step=2)
    two.kill(signal.SIGTERM)
    assert two.wait() == INTERRUPTED, two.errors.read_text()
    losses = [event["loss"] for event in two.events("step")]
    resumed = forker.run(config, environment=port)
    assert resumed.code == FINISHED, resumed.errors.read_text()
    losses += [event["loss"] for event in resumed.events("step")]
    assert losses == pytest.approx(expected, rel=1e-3)
