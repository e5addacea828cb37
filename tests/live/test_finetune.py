"""The fine-tuning program on a tiny Qwen3: it learns, stops and goes on, and what comes out is bit for bit the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from workloads.finetune import FINISHED, INTERRUPTED
from workloads.finetune.checkpoint import manifest_of, newest

for needed in ("torch", "transformers", "peft", "trl", "bitsandbytes"):
    pytest.importorskip(needed, reason=f"the program needs {needed}: run make live")


@pytest.fixture(scope="module")
def forker() -> Iterator[tiny.Forker]:
    made = tiny.Forker()
    yield made
    made.close()


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


METHODS = ["qlora", "lora", "dora", "full"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_and_resumed_gives_bit_for_bit_what_an_unbroken_one_gives(
    method: str, forker: tiny.Forker, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, data, _ = inputs
    unbroken = forker.run(tiny.write_config(tmp_path / "a", tiny.settings(tmp_path / "a", model, data, method=method)))
    assert unbroken.code == FINISHED, unbroken.errors.read_text()

    config = tiny.write_config(tmp_path / "b", tiny.settings(tmp_path / "b", model, data, method=method))
    broken = forker.start(config)
    broken.until_event("step", step=3)
    broken.kill(signal.SIGTERM)
    assert broken.wait() == INTERRUPTED, broken.errors.read_text()
    before = broken.events("step")
    (stopped,) = broken.events("interrupted")
    assert 3 <= stopped["step"] < 8
    assert stopped["by"] == "SIGTERM"
    assert not (tmp_path / "b" / "result").exists()
    found, _ = newest(tmp_path / "b" / "checkpoints")
    assert found is not None
    assert found.name == f"checkpoint-{stopped['step']}"

    resumed = forker.run(config)
    assert resumed.code == FINISHED, resumed.errors.read_text()
    (start,) = resumed.events("start")
    assert start["resumed_from"] == found.name
    assert_bitwise_equal(tmp_path / "a" / "result", tmp_path / "b" / "result")
    losses = [event["loss"] for event in unbroken.events("step")]
    assert [event["loss"] for event in (*before, *resumed.events("step"))] == losses
    assert losses[-1] < losses[0]
    assert manifest_of(tmp_path / "b" / "result") is not None
