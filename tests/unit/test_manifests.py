"""`planner render`: manifests on stdout, in a folder, and where their values come from."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest
import yaml
from locks import ROOT, STACKS

from planner.plan.lock import _digest as lock_digest
from planner.stack import read_lock
from workloads.render import render


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("stack", STACKS)
def test_what_is_printed_is_what_is_applied(stack: str) -> None:
    outcome = golden.run(("render", "--stack", stack))
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert list(yaml.safe_load_all(outcome.stdout)) == render(read_lock(stack), ["api-key"])
    assert json.loads(golden.run(("render", "--stack", stack, "--json")).stdout) == render(
        read_lock(stack), ["api-key"]
    )


def test_a_folder_gets_a_file_an_object_in_the_order_to_apply_them(tmp_path: Path) -> None:
    outcome = golden.run(("render", "--stack", "prod-standard", "-o", str(tmp_path)))
    made = render(read_lock("prod-standard"), ["api-key"])
    files = sorted(tmp_path.iterdir())
    assert outcome.stdout == f"{len(made)} manifests are in {tmp_path}\n"
    assert [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files] == made
    assert files[0].name == "01-namespace-tonnage.yaml"


def test_a_folder_keeps_what_is_not_ours_and_loses_what_is_no_longer_made(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: Mine\n", encoding="utf-8")
    golden.run(("render", "--stack", "dev-32k", "-o", str(tmp_path)))
    more = len(list(tmp_path.iterdir()))
    golden.run(("render", "--stack", "prod-standard", "-o", str(tmp_path)))
    assert len(list(tmp_path.iterdir())) == len(render(read_lock("prod-standard"))) + 1 < more
    assert (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize("stack", STACKS)
def test_every_argument_of_the_manifests_is_explained(stack: str) -> None:
    told = json.loads(golden.run(("render", "--stack", stack, "--explain", "--json")).stdout)
    for manifest in render(read_lock(stack), ["api-key"]):
        if manifest["kind"] not in ("Deployment", "Job"):
            continue
        rows = told[manifest["metadata"]["labels"]["app.kubernetes.io/instance"]]
        words = " ".join(row["value"] for row in rows if row["part"] == "argument").split()
        args = manifest["spec"]["template"]["spec"]["containers"][0]["args"]
        assert [word.partition("=")[0] for word in words] == [word.partition("=")[0] for word in args]
        assert all(row["why"] for row in rows)


def test_the_times_of_the_probes_are_explained_as_they_are_rendered() -> None:
    (deployment,) = [m for m in render(read_lock("prod-standard")) if m["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    text = golden.run(("render", "--stack", "prod-standard", "--explain"), 160).stdout
    failures = pod["containers"][0]["startupProbe"]["failureThreshold"]
    assert f"startup: {failures} x 10 s = {failures * 10} s" in text
    assert f"terminationGracePeriodSeconds: {pod['terminationGracePeriodSeconds']}" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--stack", "nope"), "there is no stack file stacks/Pulumi.nope.yaml"),
        (("--stack", "dev-2k", "-o", "x", "--explain"), "-o writes manifests and prints nothing else"),
        (("--stack", "dev-2k", "-o", "README.md"), "README.md is a file: name a folder"),
    ],
)
def test_what_cannot_be_rendered_is_refused_in_a_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    outcome = golden.run(("render", *arguments))
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert sentence in outcome.stderr


def test_a_plan_that_must_not_be_applied_is_not_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stacks").mkdir()
    text = (ROOT / "stacks" / "Pulumi.dev-2k.yaml").read_text(encoding="utf-8")
    changed = text.replace("posture: dev", "posture: prod", 1)
    (tmp_path / "stacks" / "Pulumi.dev-2k.yaml").write_text(changed, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    outcome = golden.run(("render", "--stack", "dev-2k"))
    assert outcome.exit_code == 2
    assert "answers another intent" in outcome.stderr


def test_a_secret_that_is_set_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stacks").mkdir()
    text = (ROOT / "stacks" / "Pulumi.dev-32k.yaml").read_text(encoding="utf-8")
    changed = text.replace("config:\n", "config:\n  tonnage:hfToken: {secure: v1:x}\n", 1)
    (tmp_path / "stacks" / "Pulumi.dev-32k.yaml").write_text(changed, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    outcome = golden.run(("render", "--stack", "dev-32k"))
    assert "key: hf-token" in outcome.stdout
    assert "v1:x" not in outcome.stdout


# --- fine-tuning runs -------------------------------------------------------------------------------------------------


def edited(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> Path:
    """A copy of dev-2k in a folder of its own, into which the test goes, with changes to its text."""
    (folder / "stacks").mkdir()
    path = folder / "stacks" / "Pulumi.dev-2k.yaml"
    text = (ROOT / "stacks" / path.name).read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    return path


def recipe(text: str) -> tuple[str, str]:
    return "        method: qlora\n", f"        method: qlora\n{text}"


TWO_RUNS = recipe(
    "        recipe: {learning_rate: 1.0e-4, data: {loss_on: assistant}}\n"
    "        runs: {support: {}, legal: {epochs: 2, data: {train: law.jsonl}}}\n"
)


@pytest.mark.parametrize(
    ("trainer", "model", "steps"),
    [("axolotl", "base_model", "num_epochs"), ("unsloth", "model", "training.num_epochs")],
)
def test_the_runs_of_a_plan_are_written_for_another_trainer(
    trainer: str, model: str, steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(tmp_path, monkeypatch, TWO_RUNS)
    assert golden.run(("plan", "--stack", "dev-2k", "--prices", "2026-11")).exit_code == 0
    outcome = golden.run(("render", "--stack", "dev-2k", "--emit", trainer))
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    made = list(yaml.safe_load_all(outcome.stdout))
    assert [one[model] for one in made] == ["Qwen/Qwen3-8B"] * 2
    outer, _, inner = steps.rpartition(".")
    assert [(one[outer] if outer else one)[inner] for one in made] == [1, 2]
    assert "datasets/finetune-support/train.jsonl" in outcome.stdout  # folders beside it, called like the containers
    assert "datasets/law.jsonl" in outcome.stdout
    assert "az://" not in outcome.stdout
    folder = golden.run(("render", "--stack", "dev-2k", "--emit", trainer, "-o", "runs"))
    assert folder.stdout == f"2 configurations for {trainer} in runs\n"
    written = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in Path("runs").iterdir()}
    assert written == {f"{trainer}-finetune-support.yaml": made[0], f"{trainer}-finetune-legal.yaml": made[1]}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--stack", "dev-2k", "--emit", "axolotl"), "Axolotl cannot be given this run: it learns every answer"),
        (
            ("--stack", "prod-standard", "--emit", "axolotl"),
            "prod-standard trains nothing: add a workload of kind fine",
        ),
        (
            ("--stack", "dev-2k", "--emit", "axolotl", "--explain"),
            "--emit writes another trainer's configuration: drop",
        ),
        (("--stack", "dev-2k", "--emit", "axolotl", "--json"), "drop --explain and --json"),
        (("--stack", "dev-2k", "--emit", "llamafactory"), "is not one of"),
    ],
)
def test_what_another_trainer_cannot_be_given_is_refused_in_a_sentence(
    arguments: tuple[str, ...], sentence: str
) -> None:
    outcome = golden.run(("render", *arguments))
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert sentence in outcome.stderr


def test_a_recipe_that_the_program_refuses_is_not_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edited(tmp_path, monkeypatch, recipe("        recipe: {learningrate: 3}\n"))
    before = path.read_bytes()
    outcome = golden.run(("plan", "--stack", "dev-2k", "--prices", "2026-11"))
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert "the configuration of finetune: there is no field learningrate: take it out" in outcome.stderr
    assert path.read_bytes() == before


def test_what_the_program_does_not_train_is_planned_with_a_warning_and_not_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(tmp_path, monkeypatch, recipe("        settings: {trainer: unsloth}\n"))
    outcome = golden.run(("plan", "--stack", "dev-2k", "--prices", "2026-11"))
    assert outcome.exit_code == 0
    sentence = "finetune: the program does not train with trainer unsloth: set it to trl in the intent's settings"
    assert f"planner: {sentence}" in outcome.stderr
    assert "`pulumi up` refuses this plan until then" in outcome.stderr
    rendered = golden.run(("render", "--stack", "dev-2k"))
    assert (rendered.exit_code, rendered.stdout) == (2, "")
    assert sentence in rendered.stderr


def test_a_stack_file_from_before_the_jobs_is_planned_again_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edited(tmp_path, monkeypatch)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    plan = content["config"]["tonnage:plan"]
    for workload in plan["workloads"]:
        del workload["training"]
    plan["digest"] = lock_digest(plan)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    outcome = golden.run(("render", "--stack", "dev-2k"))
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert "was made by an older Tonnage: run `planner plan --stack" in outcome.stderr
