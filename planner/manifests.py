"""`planner render`: a stack's Kubernetes manifests on stdout or in a folder, and where their values come from.

Also its fine-tuning runs as another trainer's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from planner.errors import PlannerError
from planner.files import write_atomically
from planner.plan.lock import Lock, check_lock
from planner.report import _escape, _table, console, put
from planner.stack import PLAN_KEY, needed_secrets, read_stack

if TYPE_CHECKING:
    from workloads.finetune.emit import Trainer
    from workloads.render import Manifest

HEAD = "# written by planner render; what stands as ${NAME} only Azure knows\n"


def render(stack: str, output: str | None, *, explain: bool, as_json: bool, emit: Trainer | None = None) -> None:
    """Print or write the manifests of a stack's plan. PlannerError for a plan that must not be applied.

    emit: the configurations of its fine-tuning runs for that trainer instead
    """
    if emit and (explain or as_json):
        raise PlannerError("--emit writes another trainer's configuration: drop --explain and --json")
    if output and (explain or as_json):
        raise PlannerError("-o writes manifests and prints nothing else: drop --explain and --json, or -o")
    file = read_stack(stack)
    lock = file.lock
    check_lock(lock, file.intent, f"{file.path}, {PLAN_KEY}", file.stack)
    if emit:
        _emit(lock, emit, output, file.stack)
        return
    secrets = _secrets(lock, file.config)
    if explain:
        _explain(lock, secrets, as_json=as_json)
        return
    made = _made(lock, secrets)
    if output:
        _write(made, output)
    elif as_json:
        put(json.dumps(made, indent=2) + "\n")
    else:
        put(HEAD + "".join(f"---\n{text(one)}" for one in made))


def _secrets(lock: Lock, config: Collection[str]) -> list[str]:
    """Names in the vault: of those that are set, and of those that must be before `pulumi up`."""
    needed = needed_secrets(lock)
    with _whole_clone():
        from workloads.pods import VAULT_NAMES
    return [name for key, name in VAULT_NAMES.items() if key in needed or f"tonnage:{key}" in config]


def _made(lock: Lock, secrets: Collection[str]) -> list[Manifest]:
    with _whole_clone():
        from workloads.render import render as rendered
    return rendered(lock, secrets)


@contextmanager
def _whole_clone() -> Iterator[None]:
    """The renderer is part of the project and not of the package. PlannerError where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise PlannerError(
            f"{error.name} is missing: run planner in a whole clone of the project, with the environment of that clone"
        ) from error


def text(manifest: Manifest) -> str:
    """A manifest as YAML, keys in the order of the template, long text as blocks."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=10**6, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, which people can read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _block)


def _folder(output: str) -> Path:
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise PlannerError(f"{folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(made: list[Manifest], output: str) -> None:
    """A file an object, numbered in the order to apply them; files of an earlier run that are no longer made go."""
    folder = _folder(output)
    old = {
        path for path in folder.glob("*.yaml") if path.read_text(encoding="utf-8", errors="replace").startswith(HEAD)
    }
    width = len(str(len(made)))
    written = []
    for number, one in enumerate(made, 1):
        path = folder / f"{number:0{width}}-{one['kind'].lower()}-{one['metadata']['name']}.yaml"
        write_atomically(path, HEAD + text(one))
        written.append(path)
    for path in old - set(written):
        path.unlink()
    put(f"{len(written)} manifests are in {folder}\n")


def _emit(lock: Lock, trainer: Trainer, output: str | None, stack: str) -> None:
    """A configuration a run; data and results lie beside, in folders that are called like the containers."""
    with _whole_clone():
        from workloads.finetune.emit import emit
        from workloads.training import planned_runs
    made = {
        planned.run.name: emit(planned.config, trainer)
        for workload in lock.workloads
        if workload.task == "finetune"
        for planned in planned_runs(lock, workload, desk=True, trainer=trainer)
    }
    if not made:
        raise PlannerError(
            f"{stack} trains nothing: add a workload of kind finetune to its intent, or name another stack"
        )
    if output is None:
        put(
            "---\n".join(f"# {name}: written by planner render --emit {trainer}\n{said}" for name, said in made.items())
        )
        return
    folder = _folder(output)
    for name, said in made.items():
        write_atomically(folder / f"{trainer}-{name}.yaml", said)
    put(f"{len(made)} configuration{'s' if len(made) > 1 else ''} for {trainer} in {folder}\n")


def _explain(lock: Lock, secrets: Collection[str], *, as_json: bool) -> None:
    _made(lock, secrets)
    from workloads.explain import explain

    told = {workload.name: explain(lock, workload, secrets) for workload in lock.workloads}
    if as_json:
        put(json.dumps({name: [row._asdict() for row in rows] for name, rows in told.items()}, indent=2) + "\n")
        return
    terminal = console()
    for workload in lock.workloads:
        kind = "server" if workload.task == "serve" else "fine-tuning"
        shown = _table(
            f"{workload.name}: {kind} of {workload.model}", [("", "name"), ("value", "left"), ("why", "left")]
        )
        before = ""
        for row in told[workload.name]:
            shown.add_row("" if row.part == before else row.part, _escape(row.value), _escape(row.why))
            before = row.part
        terminal.print(shown)
