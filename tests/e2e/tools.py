"""The programs that the end-to-end tests drive: Pulumi's CLI, a Kubernetes control plane, KWOK.

`pulumi` comes from the PATH when its language host is there too. Everything else, and Pulumi otherwise, is built by Go
from the modules pinned under `tools/`, once, into a folder outside the clone. `python tests/e2e/tools.py` builds and
prints the paths.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

GROUPS = Path(__file__).resolve().parent / "tools"
PULUMI_VERSION = "3.250.0"
KUBERNETES_VERSION = "1.34.2"
EXECUTOR = "pulumi-language-python-exec"


class Missing(Exception):
    """A program is neither there nor can it be built; the text says why, in one sentence."""


@dataclass(frozen=True)
class Engines:
    """Where the programs are.

    language_host: the real one from the PATH, None where Pulumi was built (its language host cannot be)
    language_executor: the script of Pulumi's SDK that runs a Python program
    crds: API group -> files, each one CustomResourceDefinition as JSON
    """

    pulumi: Path
    language_host: Path | None
    language_executor: Path
    etcd: Path
    kube_apiserver: Path
    kube_controller_manager: Path
    kube_scheduler: Path
    kwok: Path
    crds: Mapping[str, tuple[Path, ...]]


@dataclass(frozen=True)
class Program:
    """A program to build: its group under tools/, its main package, and what the linker writes into it."""

    group: str
    package: str
    ldflags: str = ""


_KUBERNETES = f"-X k8s.io/component-base/version.gitVersion=v{KUBERNETES_VERSION}"
PROGRAMS = {
    "etcd": Program("nodes", "go.etcd.io/etcd/server/v3"),
    "kwok": Program("nodes", "sigs.k8s.io/kwok/cmd/kwok"),
    "pulumi": Program(
        "pulumi",
        "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi",
        f"-X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version={PULUMI_VERSION}",
    ),
    "kube-apiserver": Program("kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver", _KUBERNETES),
    "kube-controller-manager": Program("kubernetes", "k8s.io/kubernetes/cmd/kube-controller-manager", _KUBERNETES),
    "kube-scheduler": Program("kubernetes", "k8s.io/kubernetes/cmd/kube-scheduler", _KUBERNETES),
}

# Azure's managed Prometheus reads monitors of its own group. Its definitions are prometheus-operator's under another
# group name: Azure/prometheus-collector, addon-chart templates ama-metrics-*-crd.yaml (same generator version, 0.18.0),
# as of 2026-11. That repository itself is not to be had as a Go module.
CRD_SOURCES = (
    (
        "azmonitoring.coreos.com",
        "github.com/prometheus-operator/prometheus-operator",
        "example/prometheus-operator-crd",
        ("monitoring.coreos.com_podmonitors.yaml", "monitoring.coreos.com_servicemonitors.yaml"),
    ),
    (
        "secrets-store.csi.x-k8s.io",
        "sigs.k8s.io/secrets-store-csi-driver",
        "config/crd/bases",
        (
            "secrets-store.csi.x-k8s.io_secretproviderclasses.yaml",
            "secrets-store.csi.x-k8s.io_secretproviderclasspodstatuses.yaml",
        ),
    ),
    (
        "keda.sh",
        "github.com/kedacore/keda/v2",
        "config/crd/bases",
        (
            "keda.sh_clustertriggerauthentications.yaml",
            "keda.sh_scaledjobs.yaml",
            "keda.sh_scaledobjects.yaml",
            "keda.sh_triggerauthentications.yaml",
        ),
    ),
    (
        "leaderworkerset.x-k8s.io",
        "sigs.k8s.io/lws",
        "config/crd/bases",
        ("leaderworkerset.x-k8s.io_leaderworkersets.yaml",),
    ),
)


def engines() -> Engines:
    """The programs, built on the first call (some ten minutes on two cores). Raises Missing."""
    pulumi, host = shutil.which("pulumi"), shutil.which("pulumi-language-python")
    installed = pulumi is not None and host is not None
    wanted = [name for name in PROGRAMS if not (installed and name == "pulumi")]
    folder = cache_folder()
    if not _complete(folder, wanted, executor=not installed):
        with _locked(folder):
            if not _complete(folder, wanted, executor=not installed):
                _build(folder, wanted, executor=not installed)
    if pulumi is not None and host is not None:
        executor = Path(host).resolve().with_name(EXECUTOR)
        if not executor.exists():
            raise Missing(f"{EXECUTOR} is not beside {host}: reinstall Pulumi, or take it off the PATH")
    else:
        executor = folder / EXECUTOR
    crds = {group: tuple(sorted((folder / "crds" / group).iterdir())) for group, *_ in CRD_SOURCES}
    return Engines(
        pulumi=Path(pulumi) if installed and pulumi else folder / "pulumi",
        language_host=Path(host) if installed and host else None,
        language_executor=executor,
        etcd=folder / "etcd",
        kube_apiserver=folder / "kube-apiserver",
        kube_controller_manager=folder / "kube-controller-manager",
        kube_scheduler=folder / "kube-scheduler",
        kwok=folder / "kwok",
        crds=crds,
    )


def cache_folder() -> Path:
    """The folder of the built programs: named by what they are built from. Raises Missing without Go."""
    version = _go(["env", "GOVERSION", "GOOS", "GOARCH"], GROUPS / "kubernetes")
    digest = hashlib.sha256(version.encode())
    for file in sorted(GROUPS.glob("*/go.*")):
        digest.update(f"{file.parent.name}/{file.name}\n".encode() + file.read_bytes())
    for part in (PROGRAMS, CRD_SOURCES):
        digest.update(repr(part).encode())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "tonnage" / f"e2e-{digest.hexdigest()[:16]}"


def _complete(folder: Path, programs: list[str], *, executor: bool) -> bool:
    files = [*programs, *(f"crds/{group}" for group, *_ in CRD_SOURCES), *([EXECUTOR] if executor else [])]
    return all((folder / name).exists() for name in files)


def _build(folder: Path, programs: list[str], *, executor: bool) -> None:
    """Whatever is missing; each file appears under its name only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in programs:
        if (folder / name).exists():
            continue
        program, part = PROGRAMS[name], folder / f"{name}.part"
        sys.stderr.write(f"building {name} (once, into {folder})\n")
        ldflags = f"-s -w {program.ldflags}".strip()
        _go(["build", "-trimpath", "-ldflags", ldflags, "-o", str(part), program.package], GROUPS / program.group)
        part.replace(folder / name)
    if executor and not (folder / EXECUTOR).exists():
        sdk = _module("pulumi", "github.com/pulumi/pulumi/sdk/v3")
        part = folder / f"{EXECUTOR}.part"
        shutil.copyfile(sdk / "python" / "cmd" / EXECUTOR, part)
        part.chmod(0o755)
        part.replace(folder / EXECUTOR)
    for group, module, under, names in CRD_SOURCES:
        final, part = folder / "crds" / group, folder / f"crds-{group}.part"
        if final.exists():
            continue
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        source = _module("crds", module)
        for name in names:
            definition = _in_group(yaml.safe_load((source / under / name).read_text(encoding="utf-8")), group)
            (part / f"{definition['spec']['names']['plural']}.json").write_text(
                json.dumps(definition), encoding="utf-8"
            )
        final.parent.mkdir(exist_ok=True)
        part.replace(final)


def _in_group(definition: dict[str, Any], group: str) -> dict[str, Any]:
    definition["spec"]["group"] = group
    definition["metadata"]["name"] = f"{definition['spec']['names']['plural']}.{group}"
    return definition


def _module(group: str, module: str) -> Path:
    """The folder of a module in Go's cache, fetched and checked against the committed sums."""
    answer = json.loads(_go(["mod", "download", "-json", module], GROUPS / group))
    return Path(answer["Dir"])


def _go(arguments: list[str], folder: Path) -> str:
    """What `go` prints. Raises Missing with its last words when it fails."""
    if shutil.which("go") is None:
        raise Missing(
            "go is not on the PATH, so the control plane cannot be built: install Go 1.25 or newer "
            "and run python tests/e2e/tools.py"
        )
    environment = os.environ | {"GOFLAGS": "-buildvcs=false -mod=readonly", "GOWORK": "off", "CGO_ENABLED": "0"}
    done = subprocess.run(["go", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " ".join((done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-3:])
        raise Missing(f"`go {arguments[0]}` failed in {folder.name} of tests/e2e/tools: {last}")
    return done.stdout


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time builds into the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Build what is missing, print one path a line."""
    try:
        found = engines()
    except Missing as reason:
        sys.stderr.write(f"{reason}\n")
        return 1
    for name, value in vars(found).items():
        for path in (
            (value,) if not isinstance(value, Mapping) else [file for files in value.values() for file in files]
        ):
            sys.stdout.write(f"{name:<24} {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
