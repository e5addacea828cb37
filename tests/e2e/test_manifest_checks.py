"""Public checkers over the manifests of every shipped stack: what they find is right, or has a reason here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tools

from planner.manifests import text
from planner.stack import read_lock, stack_names
from workloads.render import render

ROOT = Path(__file__).parents[2]
CHECKERS = Path(__file__).parent / "checkers"
CHECKOV = "checkov==3.3.30"
IMAGE = "stack.azurecr.io/tonnage-train:0123456789ab"  # what stands as ${TRAIN_IMAGE}, as the registry makes it
PODS = ("Deployment", "Job", "DaemonSet")
AGENTS = ("DaemonSet",)


class Excuse(NamedTuple):
    """Checks that may fail on objects of these kinds, and why."""

    checks: tuple[str, ...]
    kinds: tuple[str, ...]
    reason: str


CPU_LIMIT = "a limit of CPU makes a server wait while the machine idles: its neighbours are held off by requests"
TAGS = "images are pinned by a version that the catalog gives a source: no registry could be asked for digests"
PULL = "a version that is pinned does not change, and a server that restarts must not wait for a registry"
WRITABLE = "NVIDIA's runtime writes libraries' names into the container's root when it starts"
IN_MACHINES = "the device plugin and the GPU exporter speak to the kubelet through a folder of the machine, as root"
CHECKOV_EXCUSES = (
    Excuse(("CKV_K8S_11",), PODS, CPU_LIMIT),
    Excuse(("CKV_K8S_43",), PODS, TAGS),
    Excuse(("CKV_K8S_15",), PODS, PULL),
    Excuse(("CKV_K8S_22",), PODS, WRITABLE),
    Excuse(("CKV_K8S_35",), ("Deployment", "Job"), "vLLM and the hub's client read their keys from variables alone"),
    Excuse(
        ("CKV_K8S_20", "CKV_K8S_23", "CKV_K8S_25", "CKV_K8S_28", "CKV_K8S_29", "CKV_K8S_31", "CKV_K8S_37"),
        AGENTS,
        IN_MACHINES,
    ),
    Excuse(("CKV_K8S_39", "CKV_K8S_40"), AGENTS, IN_MACHINES),
    Excuse(("CKV_K8S_8", "CKV_K8S_9"), AGENTS, "the device plugin answers nobody: the kubelet finds it at its socket"),
)
SCORE_EXCUSES = (
    Excuse(("container-resources",), PODS, CPU_LIMIT),
    Excuse(("container-image-pull-policy",), PODS, PULL),
    Excuse(("container-security-context-readonlyrootfilesystem",), PODS, WRITABLE),
    Excuse(("container-security-context-user-group-id",), AGENTS, IN_MACHINES),
    Excuse(
        ("deployment-has-poddisruptionbudget",),
        ("Deployment",),
        "with a single pod a budget would keep its machine from every upgrade",
    ),
    Excuse(("deployment-replicas",), ("Deployment",), "a second GPU is the intent's to pay for"),
    Excuse(("deployment-strategy",), ("Deployment",), "on a full pool a pod more would wait for ever"),
    Excuse(
        ("deployment-has-host-podantiaffinity",),
        ("Deployment",),
        "replicas are spread by a topology constraint instead",
    ),
)


class Found(NamedTuple):
    """A check that failed on an object."""

    check: str
    kind: str
    name: str
    said: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifests of every shipped stack, a folder each, with an image where Azure would put one."""
    made = tmp_path_factory.mktemp("manifests")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        for stack in stack_names():
            (made / stack).mkdir()
            for number, one in enumerate(render(read_lock(stack))):
                plain = text(one).replace("${TRAIN_IMAGE}", IMAGE)
                (made / stack / f"{number:02}.yaml").write_text(plain, encoding="utf-8")
    finally:
        os.chdir(before)
    return made


def unexcused(found: Iterable[Found], excuses: Iterable[Excuse]) -> list[Found]:
    return [
        one for one in found if not any(one.check in excuse.checks and one.kind in excuse.kinds for excuse in excuses)
    ]


def unused(found: Iterable[Found], excuses: Iterable[Excuse]) -> list[str]:
    """Checks that are excused and never fail."""
    failed = {one.check for one in found}
    return [check for excuse in excuses for check in excuse.checks if check not in failed]


def checkov(folder: Path) -> Iterator[Found]:
    uv = shutil.which("uv") or ROOT / ".tools" / "bin" / "uv"
    command = [str(uv), "tool", "run", "--from", CHECKOV, "checkov", "--framework", "kubernetes", "--quiet"]
    done = subprocess.run(
        [*command, "--compact", "--output", "json", "--directory", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"LOG_LEVEL": "ERROR"},
    )
    assert done.stdout.lstrip()[:1] in ("{", "["), done.stderr[-2000:]
    answer: Any = json.loads(done.stdout)
    for report in answer if isinstance(answer, list) else [answer]:
        assert report["summary"]["passed"] > 500  # it looked at something
        for one in report["results"]["failed_checks"]:
            kind, _, name = one["resource"].partition(".")
            yield Found(one["check_id"], kind, name, one["check_name"])


def kube_score() -> Path:
    """The program, built once from the pinned module. Raises tools.Missing."""
    digest = hashlib.sha256((CHECKERS / "go.sum").read_bytes()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    program = Path(home) / "tonnage" / f"checkers-{digest}" / "kube-score"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        with tools._locked(program.parent):
            if not program.exists():
                part = program.with_name("kube-score.part")
                command = ["build", "-trimpath", "-o", str(part), "github.com/zegl/kube-score/cmd/kube-score"]
                tools._go(command, CHECKERS)
                part.replace(program)
    return program


def scored(program: Path, folder: Path) -> Iterator[Found]:
    for stack in sorted(folder.iterdir()):
        files = sorted(map(str, stack.iterdir()))
        command = [str(program), "score", "--output-format", "json", "--kubernetes-version", "v1.34", *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        objects = json.loads(done.stdout)
        assert len(objects) >= 3, done.stderr
        for one in objects:
            for check in one["checks"]:
                if not check["skipped"] and check["grade"] < 10:
                    said = "; ".join(comment["summary"] for comment in check["comments"] or ())
                    name = one["object_meta"]["name"]
                    yield Found(check["check"]["id"], one["type_meta"]["kind"], name, said)


def test_checkov_finds_nothing_that_has_no_reason(folder: Path) -> None:
    found = list(checkov(folder))
    assert unexcused(found, CHECKOV_EXCUSES) == []
    assert unused(found, CHECKOV_EXCUSES) == []


def test_kube_score_finds_nothing_that_has_no_reason(folder: Path) -> None:
    try:
        program = kube_score()
    except tools.Missing as why:
        pytest.skip(str(why))
    found = list(scored(program, folder))
    assert unexcused(found, SCORE_EXCUSES) == []
    assert unused(found, SCORE_EXCUSES) == []
