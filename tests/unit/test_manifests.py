"""`planner render`: manifests on stdout, in a folder, and where their values come from."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest
import yaml
from locks import ROOT, STACKS

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
