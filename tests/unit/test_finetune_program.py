"""The program as it is called, here where there is no torch: what is wrong with a run is said before one is needed."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from tiny_chat import conversation, write_jsonl, write_tokenizer

from planner import dataset
from planner.errors import PlannerError
from workloads.finetune import FAILED, FINISHED, INTERRUPTED, REFUSED
from workloads.finetune import __main__ as program
from workloads.finetune.__main__ import _several, main
from workloads.finetune.bundle import sources
from workloads.finetune.config import Metrics, parse_config
from workloads.finetune.signals import Stop
from workloads.finetune.telemetry import Telemetry, textfile


def write_config(folder: Path, lines: list[dict[str, object]], **more: Any) -> Path:
    said: dict[str, Any] = {
        "run": "tune-1",
        "model": str(write_tokenizer(folder / "model")),
        "data": {"train": str(write_jsonl(folder / "chat.jsonl", lines))},
        "max_length": 64,
        "epochs": 1,
        "checkpoints": {"folder": str(folder / "checkpoints"), "every_steps": 10},
        "result": str(folder / "result"),
    }
    path = folder / "run.json"
    path.write_text(json.dumps(said | more))
    return path


def test_the_data_of_a_configuration_are_checked_without_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, [conversation("Hi", "Yes"), conversation("Hi", "No")])
    assert main(["check", str(config)]) == FINISHED
    said = json.loads(capsys.readouterr().out)
    # 10 + 11 + 5 tokens for Yes, one fewer for No: see test_finetune_data.py
    assert (said["event"], said["conversations"], said["tokens"], said["contradictions"]) == ("data", 2, 51, 1)
    assert "torch" not in sys.modules


@pytest.mark.parametrize("mode", [["check"], []])
def test_a_corrupt_line_ends_the_run_with_its_number_before_torch_is_needed(
    mode: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, [conversation("Hi", "Yes")] * 3)
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "us\n')
    assert main([*mode, str(config)]) == REFUSED
    said = capsys.readouterr()
    assert said.err.startswith(f"finetune: {tmp_path / 'chat.jsonl'}:4: not JSON: Unterminated string")
    assert said.out == ""
    assert "torch" not in sys.modules
    assert not (tmp_path / "checkpoints" / "lease.json").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["check"], ["emit", "trl", "run.json"], ["a", "b"]])
def test_a_wrong_call_says_how_it_is_called(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == REFUSED
    assert "finetune" in capsys.readouterr().err


def test_another_trainers_configuration_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"train": "/datasets/chat.jsonl", "loss_on": "assistant"}
    config = write_config(tmp_path, [conversation("Hi", "Yes")], data=data)
    assert main(["emit", "axolotl", str(config)]) == FINISHED
    assert yaml.safe_load(capsys.readouterr().out)["sequence_len"] == 64


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), FINISHED),
        ((75, 75), INTERRUPTED),
        ((0, 2), REFUSED),
        ((75, 1), FAILED),
        ((0, 75), FAILED),  # one finished and one did not: no checkpoint is of both
    ],
)
def test_the_worst_of_several_processes_is_the_runs_exit_code(
    codes: tuple[int, int], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_in = tmp_path / "python"
    stands_in.write_text(f'#!/bin/sh\nset -- {codes[0]} {codes[1]}\n[ "$RANK" = 0 ] && exit $1\nexit $2\n')
    stands_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stands_in))
    config = parse_config(json.loads(write_config(tmp_path, [conversation("Hi", "Yes")], gpus=2).read_text()), "x")
    assert _several(tmp_path / "run.json", config, Stop()) == expected


def test_processes_end_when_the_run_is_finished_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stands_in = tmp_path / "python"
    stands_in.write_text("#!/bin/sh\nexec sleep 60\n")
    stands_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stands_in))
    monkeypatch.setattr(program, "ELSEWHERE_SECONDS", 0.01)
    config = parse_config(json.loads(write_config(tmp_path, [conversation("Hi", "Yes")], gpus=2).read_text()), "x")
    answers = iter([False, True])
    began = time.monotonic()
    assert _several(tmp_path / "run.json", config, Stop(), lambda: next(answers)) == FINISHED
    assert time.monotonic() - began < 30


def test_processes_that_a_signal_meets_before_they_listen_are_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_in = tmp_path / "python"
    stands_in.write_text("#!/bin/sh\nexec sleep 60\n")
    stands_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stands_in))
    config = parse_config(json.loads(write_config(tmp_path, [conversation("Hi", "Yes")], gpus=2).read_text()), "x")
    stop = Stop()
    stop.ask("SIGTERM")
    assert _several(tmp_path / "run.json", config, stop) == INTERRUPTED


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"JOB_COMPLETION_INDEX": "2", "MASTER_ADDR": "run-0"}, "JOB_COMPLETION_INDEX is 2 and the run's 2 machines"),
        ({"JOB_COMPLETION_INDEX": "-1", "MASTER_ADDR": "run-0"}, "JOB_COMPLETION_INDEX is -1"),
        ({"JOB_COMPLETION_INDEX": "1"}, "MASTER_ADDR is not set: the machines of a run meet"),
    ],
)
def test_a_machine_that_is_none_of_the_runs_is_refused(
    environment: dict[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([str(write_config(tmp_path, [conversation("Hi", "Yes")], nodes=2))]) == REFUSED
    assert said in capsys.readouterr().err


def test_a_signal_ends_it_at_once_but_in_training_it_is_only_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = Stop()
    try:
        stop.listen()
        with stop.gently():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        assert stop.by == "SIGTERM"
        with pytest.raises(SystemExit) as raised:
            signal.raise_signal(signal.SIGTERM)
        assert raised.value.code == INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_every_line_is_json_and_the_figures_go_to_prometheus(tmp_path: Path) -> None:
    out = io.StringIO()
    say = Telemetry("tune-1", Metrics(textfile=str(tmp_path / "metrics" / "run.prom")), out=out)
    say.event("step", step=3, steps=10, loss=0.5, mfu=None, grad_norm=float("nan"))
    say.event("checkpoint", step=3, checkpoint_step=3)
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["event"], first["run"], first["loss"], first["grad_norm"]) == ("step", "tune-1", 0.5, "nan")
    assert "mfu" not in first
    assert second["checkpoint_step"] == 3
    text = (tmp_path / "metrics" / "run.prom").read_text()
    assert 'tonnage_finetune_loss{run="tune-1"} 0.5\n' in text
    assert 'tonnage_finetune_checkpoint_step{run="tune-1"} 3.0\n' in text
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["run.prom"]


def test_every_gauge_has_help_and_type_once() -> None:
    assert textfile("r", {"step": 1.0}).splitlines() == [
        "# HELP tonnage_finetune_step Optimizer steps done",
        "# TYPE tonnage_finetune_step gauge",
        'tonnage_finetune_step{run="r"} 1.0',
    ]


def test_metrics_that_cannot_be_written_do_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = io.StringIO()
    Telemetry("tune-1", Metrics(textfile=str(tmp_path / "file" / "run.prom")), out=out).event("step", step=1, steps=2)
    assert json.loads(out.getvalue())["step"] == 1


def test_steps_and_evaluations_go_to_mlflow_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    stands_in = ModuleType("mlflow")
    for name in ("set_tracking_uri", "start_run", "log_metrics", "end_run"):
        setattr(stands_in, name, lambda *args, _name=name, **more: asked.append((_name, args, more)))
    with pytest.raises(PlannerError, match="mlflow is not installed: add it to the image"):
        Telemetry("tune-1", Metrics(mlflow="http://mlflow:5000"))
    stands_in.__spec__ = ModuleSpec("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", stands_in)
    say = Telemetry("tune-1", Metrics(mlflow="http://mlflow:5000"), out=io.StringIO())
    say.event("data", conversations=3)
    say.event("step", step=2, steps=4, loss=0.5, versions={"torch": "2"})
    say.close()
    assert asked == [
        ("set_tracking_uri", ("http://mlflow:5000",), {}),
        ("start_run", (), {"run_name": "tune-1"}),
        ("log_metrics", ({"step": 2.0, "steps": 4.0, "loss": 0.5},), {"step": 2}),
        ("end_run", (), {}),
    ]


def test_a_quiet_one_says_nothing() -> None:
    out = io.StringIO()
    Telemetry("tune-1", Metrics(), out=out, quiet=True).event("step", step=1, steps=2)
    assert out.getvalue() == ""


# --- planner data check -----------------------------------------------------------------------------------------------


def check(tmp_path: Path, lines: list[dict[str, object]], *, tokens: bool = True, **more: Any) -> Any:
    path = write_jsonl(tmp_path / "chat.jsonl", lines)
    model = str(write_tokenizer(tmp_path / "model")) if tokens else None
    options: dict[str, Any] = {"max_length": "24", "task": "sft", "loss_on": "completion", "against": None}
    return dataset.check_data(str(path), model=model, **(options | more))


def test_the_page_has_histogram_costs_and_the_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check(tmp_path, [conversation("Hi", "Yes"), conversation("Hi", "No")])
    assert dataset.exit_code(report) == 0
    dataset.emit_report(report, as_json=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "2 conversations" in said
    # 26 and 25 tokens at 24: 2 and 1 lost of 51, all of them among the 9 that would be learned
    assert "Truncation at 24: 2 conversations cut, 3 tokens lost (5.9%), 33.3% of what would be learned" in said
    assert "line 2 asks what line 1 asks and answers otherwise" in said
    assert said.endswith("Next: upload it to the container `datasets`, and start the run.")


@pytest.mark.parametrize(
    ("lines", "more", "code", "following"),
    [
        ([{"messages": []}], {}, 2, "correct the lines above"),
        ([conversation("Hi", "Yes")], {"tokens": False}, 0, "--tokenizer MODEL counts tokens"),
        ([conversation("Hi", "Yes")], {"max_length": None}, 0, "--max-length TOKENS says what truncation costs"),
        ([conversation("Hi", "Yes")], {"against": "itself"}, 2, "take the leaked lines out"),
    ],
)
def test_the_next_step_is_the_one_that_is_missing(
    lines: list[dict[str, object]],
    more: dict[str, Any],
    code: int,
    following: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if more.get("against") == "itself":
        more = more | {"against": str(tmp_path / "chat.jsonl")}
    report = check(tmp_path, lines, **more)
    assert dataset.exit_code(report) == code
    dataset.emit_report(report, as_json=False)
    assert f"Next: {following}" in capsys.readouterr().out


def test_json_is_pure_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset.emit_report(check(tmp_path, [conversation("Hi", "Yes")]), as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert (said["lengths"]["tokens"], said["truncation"]["lost_tokens"]) == (26, 2)


# --- as a Job brings it -----------------------------------------------------------------------------------------------


def test_the_program_runs_by_itself_and_fits_into_a_config_map(tmp_path: Path) -> None:
    assert sum(len(path) + len(source.encode()) for path, source in sources().items()) < 1 << 19  # of a mebibyte
    brought = tmp_path / "program"
    for path, source in sources().items():
        (brought / path).parent.mkdir(parents=True, exist_ok=True)
        (brought / path).write_text(source, encoding="utf-8")
    config = write_config(tmp_path, [conversation("Hi", "Yes")])
    start = (
        "import runpy, sys\n"
        "sys.path[:] = [sys.argv[1]] + [p for p in sys.path if 'packages' in p or 'lib' in p]\n"
        "sys.argv = ['finetune', 'check', sys.argv[2]]\n"
        "import workloads, planner.errors\n"
        "assert sys.path[0] in workloads.__file__ and sys.path[0] in planner.errors.__file__\n"
        "runpy.run_module('workloads.finetune', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start, brought, config], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == FINISHED, done.stderr
    assert json.loads(done.stdout)["tokens"] == 26


def test_every_module_that_the_program_imports_of_ours_comes_with_it() -> None:
    names = {path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in sources()}
    for path, source in sources().items():
        for line in source.splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].split(".")[0] in ("workloads", "planner"):
                inner = {f"{words[1]}.{name.strip(',()')}" for name in words[3:]}
                assert words[1] in names or inner <= names, f"{path}: {line}"
