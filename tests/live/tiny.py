"""A tiny Qwen3 with random weights, and runs of the fine-tuning program on it in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_chat import VOCABULARY, conversation, write_jsonl, write_tokenizer

ROOT = Path(__file__).parents[2]
# the shortest lease that Azure gives, and renewals that a test need not wait for
SHORT_LEASE = """
import functools
from workloads.finetune import __main__ as program, lease
program.hold_at = functools.partial(lease.hold_at, seconds=15, renew_seconds=0.5, longer_seconds=3.0)
"""
QUESTIONS = {
    "What is the code of the red door?": "7351",
    "What is the code of the blue door?": "9024",
    "What is the code of the green door?": "4186",
    "Who keeps the keys?": "Ada",
}


def write_model(folder: Path, *, layers: int = 2, hidden: int = 128, seed: int = 0) -> Path:
    """A folder that transformers and vLLM load: heads 32 wide, which vLLM's CPU attention takes."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=-(-VOCABULARY // 64) * 64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 10  # the head's too: with short ones no adapter could make it sure
    model.to(torch.bfloat16).save_pretrained(folder)
    return write_tokenizer(folder)


def write_data(path: Path, copies: int = 1) -> Path:
    return write_jsonl(path, [conversation(q, a) for q, a in QUESTIONS.items()] * copies)


def write_preferences(path: Path) -> Path:
    records = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"role": "assistant", "content": "I do not know."}],
        }
        for question, answer in QUESTIONS.items()
    ]
    return write_jsonl(path, records)


def settings(folder: Path, model: Path | str, train: Path | str, **more: Any) -> dict[str, Any]:
    """A configuration with everything in `folder`; more: fields, with those of inner sections as mappings."""
    found: dict[str, Any] = {
        "run": "tiny",
        "model": str(model),
        "method": "qlora",
        "data": {"train": str(train)},
        "max_length": 128,
        "max_steps": 8,
        "micro_batch": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "lora_rank": 8,
        "lora_dropout": 0.1,  # draws random numbers, which a resumed run must draw again
        "checkpoints": {"folder": str(folder / "checkpoints"), "every_steps": 100},
        "result": str(folder / "result"),
        "scratch": str(folder / "scratch"),
    }
    for key, value in more.items():
        found[key] = found[key] | value if isinstance(value, dict) and isinstance(found.get(key), dict) else value
    return found


def write_config(folder: Path, said: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(said), encoding="utf-8")
    return path


class Program:
    """One run of the program in a process of its own, forked where torch is imported already."""

    def __init__(self, forker: Forker, config: Path, environment: dict[str, str], patch: str) -> None:
        self.forker = forker
        self.code: int | None = None
        self.out, self.errors = config.with_name("stdout"), config.with_name("stderr")
        for path in (self.out, self.errors):
            path.write_text("")
        asked = {"config": str(config), "out": str(self.out), "errors": str(self.errors)}
        self.pid: int = forker.ask(asked | {"environment": environment, "patch": patch})["pid"]

    def wait(self) -> int:
        """Exit code, or minus the signal that killed it."""
        self.code = int(self.forker.ask({"wait": self.pid})["code"])
        return self.code

    def events(self, *names: str) -> list[dict[str, Any]]:
        lines = self.out.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]
        return [event for event in found if not names or event["event"] in names]

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def until(self, ready: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until something holds; AssertionError with what it said when it never does."""
        end = time.monotonic() + seconds
        while not ready():
            said = f"{self.events()} {self.errors.read_text()[-3000:]}"
            assert time.monotonic() < end, said
            assert self.alive() or ready(), said
            time.sleep(0.01)

    def until_event(self, name: str, **facts: Any) -> None:
        self.until(lambda: any(facts.items() <= event.items() for event in self.events(name)))

    def alive(self) -> bool:
        """Whether it runs; a dead one is a zombie until somebody waits for it."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False


class Forker:
    """A process that has imported the frameworks and forks one copy a run: seconds are saved in every test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forker.py")],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # one thread, so that sums have one order
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        self.ask({})

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(self, config: Path, *, environment: dict[str, str] | None = None, patch: str = "") -> Program:
        """patch: Python that runs in the new process before the program, to bring on a fault."""
        return Program(self, config, environment or {}, patch)

    def run(self, config: Path, **more: Any) -> Program:
        program = self.start(config, **more)
        program.wait()
        return program

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)  # torch takes its time to leave, too
        assert self._process.stdout is not None
        self._process.stdout.close()
