"""The real Pulumi CLI on a copy of the project, with a file backend and the stand-in providers."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = ("Pulumi.yaml", "infra", "workloads", "planner", "stacks", "pyproject.toml", "uv.lock", "README.md", "LICENSE")
COMMAND_LIMIT_S = 900


@dataclass(frozen=True)
class Result:
    """What a command gave back. `events` are the engine's (see `Project.run`), oldest first."""

    command: str
    rc: int
    stdout: str
    stderr: str
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def output(self) -> str:
        """Both streams, as a person sees them."""
        return self.stdout + self.stderr

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The engine's plan or work: one object each with op, urn, type, keys, diffs, detailedDiff, old and new."""
        found = []
        for event in self.events:
            for kind in ("resourcePreEvent", "resOutputsEvent", "resOpFailedEvent"):
                if kind in event:
                    found.append({**event[kind]["metadata"], "event": kind})
        return found

    def operations(self) -> dict[str, str]:
        """Operation by resource, "type::name" -> create, update, replace, delete, same, refresh, read or import.

        A replacement (create-replacement, delete-replaced, replace) counts as replace.
        """
        found: dict[str, str] = {}
        for step in self.steps:
            if step["event"] != "resourcePreEvent":
                continue
            key = short_urn(step["urn"])
            op = "replace" if "replace" in step["op"] else step["op"]
            if found.get(key) != "replace":
                found[key] = op
        return found

    def changed(self) -> dict[str, str]:
        """`operations` without what stays the same."""
        return {key: op for key, op in self.operations().items() if op not in ("same", "refresh", "read")}

    def detailed_diff(self, resource: str) -> dict[str, Any]:
        """The engine's detailed diff of one resource ("type::name"), {} if it has none."""
        for step in self.steps:
            if short_urn(step["urn"]) == resource and step.get("detailedDiff"):
                return dict(step["detailedDiff"])
        return {}

    def diagnostics(self, *severities: str) -> list[tuple[str, str]]:
        """(resource, message) of each message of these severities (default: error)."""
        wanted = severities or ("error",)
        found = []
        for event in self.events:
            entry = event.get("diagnosticEvent")
            if entry is not None and entry["severity"] in wanted:
                found.append((short_urn(entry.get("urn", "")), _plain(entry["message"])))
        return found


def short_urn(urn: str) -> str:
    """The "type::name" of a URN, without its parents' types."""
    parts = urn.split("::")
    return "::".join([parts[2].rsplit("$", 1)[-1], *parts[3:]]) if len(parts) > 3 else urn


@dataclass
class Project:
    """A copy of the repository's Pulumi project in a folder, with a backend and a Pulumi home of its own.

    folder: holds `project` (the copy), `backend`, `home`, `bin` (the language host's launcher) and `events`.
    providers: the value of PULUMI_DEBUG_PROVIDERS.
    """

    folder: Path
    pulumi: Path
    executor: Path
    providers: str
    language_host: Path | None = None
    passphrase: str = "correct horse battery staple"
    extra_environment: dict[str, str] = field(default_factory=dict)
    runs: int = 0

    @property
    def path(self) -> Path:
        """The copy of the project."""
        return self.folder / "project"

    @property
    def environment(self) -> dict[str, str]:
        """What the CLI and, through it, the program see."""
        kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE", "SYSTEMROOT")
        base = {name: os.environ[name] for name in kept if name in os.environ}
        first = [str(self.folder / "bin"), str(self.pulumi.parent)]
        return {
            **base,
            "PATH": os.pathsep.join([*first, base.get("PATH", "")]),
            "PULUMI_HOME": str(self.folder / "home"),
            "PULUMI_BACKEND_URL": (self.folder / "backend").as_uri(),
            "PULUMI_CONFIG_PASSPHRASE": self.passphrase,
            "PULUMI_SKIP_UPDATE_CHECK": "1",
            "PULUMI_DEBUG_COMMANDS": "true",  # for --event-log
            "PULUMI_DEBUG_PROVIDERS": self.providers,
            "PULUMI_AUTOMATION_API_SKIP_VERSION_CHECK": "true",
            "PYTHONPATH": str(self.path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NO_COLOR": "1",
            **self.extra_environment,
        }

    def run(self, *arguments: str, stack: str | None = None, events: bool = False, **options: Any) -> Result:
        """Run `pulumi` with the arguments in the project. With events the engine's own are in the result."""
        with self.started(*arguments, stack=stack, events=events, **options) as process:
            return process.result()

    def started(
        self, *arguments: str, stack: str | None = None, events: bool = False, stdin: str | None = None
    ) -> "Running":
        """Start `pulumi` and go on; see `Running`."""
        self.runs += 1
        command = [str(self.pulumi), *arguments]
        if stack is not None:
            command += ["--stack", stack]
        log = self.folder / "events" / f"{self.runs:03}.jsonl" if events else None
        if log is not None:
            log.parent.mkdir(exist_ok=True)
            command += ["--event-log", str(log)]
        return Running(command, self.path, self.environment, log, stdin)

    # -- the commands of a user

    def init(self, stack: str) -> Result:
        """`pulumi stack init`: the first of all; writes the encryption salt into the copy's stack file."""
        return self.run("stack", "init", stack)

    def up(self, stack: str, *more: str) -> Result:
        """`pulumi up --yes`."""
        return self.run("up", "--yes", *_quiet(more), stack=stack, events=True)

    def preview(self, stack: str, *more: str) -> Result:
        """`pulumi preview`."""
        return self.run("preview", *_quiet(more), stack=stack, events=True)

    def refresh(self, stack: str, *more: str) -> Result:
        """`pulumi refresh --yes`."""
        return self.run("refresh", "--yes", *_quiet(more), stack=stack, events=True)

    def destroy(self, stack: str, *more: str) -> Result:
        """`pulumi destroy --yes`."""
        return self.run("destroy", "--yes", *_quiet(more), stack=stack, events=True)

    def set_secret(self, stack: str, key: str, value: str) -> Result:
        """`pulumi config set --secret`, the value by standard input."""
        return self.run("config", "set", "--secret", key, stack=stack, stdin=value)

    def outputs(self, stack: str) -> dict[str, Any]:
        """The stack's outputs, secrets in plain text."""
        found = self.run("stack", "output", "--json", "--show-secrets", stack=stack)
        assert found.rc == 0, found.output
        return dict(json.loads(found.stdout))

    def state(self, stack: str) -> list[dict[str, Any]]:
        """The resources of the exported state, secrets encrypted."""
        found = self.run("stack", "export", stack=stack)
        assert found.rc == 0, found.output
        deployment = json.loads(found.stdout)["deployment"]
        return list(deployment.get("resources", []))

    def pending(self, stack: str) -> list[dict[str, Any]]:
        """The operations that the state holds as begun and not ended (after an interruption)."""
        found = self.run("stack", "export", stack=stack)
        assert found.rc == 0, found.output
        return list(json.loads(found.stdout)["deployment"].get("pending_operations", []))

    def kept_files(self) -> Iterable[Path]:
        """Every file that Pulumi keeps or the project holds: where a secret in plain text would lie."""
        for root in (self.folder / "backend", self.folder / "home", self.path, self.folder / "events"):
            yield from (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


class Running:
    """A command that runs: wait for its `result`, or `interrupt` it as Ctrl-C does."""

    def __init__(
        self, command: list[str], folder: Path, environment: dict[str, str], log: Path | None, stdin: str | None
    ) -> None:
        self.command = shlex.join(command)
        self.log = log
        self.stdin = stdin
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def interrupt(self) -> None:
        """SIGINT to the CLI: it asks the providers to cancel and writes down what it knows."""
        self.process.send_signal(signal.SIGINT)

    def result(self, limit_s: float = COMMAND_LIMIT_S) -> Result:
        """Wait for the end."""
        stdout, stderr = self.process.communicate(self.stdin, timeout=limit_s)
        return Result(self.command, self.process.returncode, stdout, stderr, _events(self.log))


def new_project(
    folder: Path,
    providers: str,
    *,
    pulumi: Path,
    executor: Path,
    language_host: Path | None = None,
    source: Path = REPOSITORY,
    environment: dict[str, str] | None = None,
) -> Project:
    """A project in a new folder: the copy, an empty backend, a language host (the real one where it is given)."""
    project = Project(folder, pulumi, executor, providers, language_host, extra_environment=dict(environment or {}))
    for part in ("backend", "home", "bin"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache", "*.pyc")
    project.path.mkdir()
    for name in COPIED:
        origin = source / name
        if origin.is_dir():
            shutil.copytree(origin, project.path / name, ignore=ignore)
        elif origin.exists():
            shutil.copy2(origin, project.path / name)
    if language_host is None:
        _launcher(folder / "bin" / "pulumi-language-python", executor)
    else:
        # The real host runs the Python of the .venv beside pyproject.toml.
        (project.path / ".venv").symlink_to(Path(sys.prefix))
        (folder / "bin" / "pulumi-language-python").symlink_to(language_host)
    return project


def _launcher(path: Path, executor: Path) -> None:
    script = Path(__file__).with_name("language_host.py")
    command = shlex.join([sys.executable, str(script), "--executor", str(executor)])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o755)


def _quiet(more: tuple[str, ...]) -> tuple[str, ...]:
    return ("--non-interactive", "--suppress-permalink=true", *more)


def _events(log: Path | None) -> list[dict[str, Any]]:
    if log is None or not log.exists():
        return []
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the last line of a run that was cut short
    return found


def _plain(message: str) -> str:
    """The message without the engine's colour marks."""
    return re.sub(r"<\{%[^%]*%\}>", "", message).strip()


def wait_until(condition: Callable[[], bool], running: Running | None = None, limit_s: float = 120.0) -> bool:
    """Wait for the condition; False when the time is over or the command has ended without it."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if condition():
            return True
        if running is not None and running.process.poll() is not None:
            return condition()
        time.sleep(0.05)
    return False
