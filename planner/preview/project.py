"""The Pulumi project in the working folder: its program, and a stack's configuration as the program receives it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from planner.errors import PlannerError
from planner.stack import FOLDER, StackFile

FILE = Path("Pulumi.yaml")
# what stands for a value that only the stack's key can decrypt
PLACEHOLDER = "placeholder-of-an-encrypted-value"
# what the program reads of its own
SETTINGS = ("intent", "plan", "apiKey", "hfToken", "kubelogin", "systemPool")


class Project(NamedTuple):
    """name: of the project; program: the folder or file that Pulumi runs; config: defaults, as Pulumi.yaml says."""

    name: str
    program: Path
    config: dict[str, Any]


class Configuration(NamedTuple):
    """Values by full key, as the program receives them: text, or JSON. secret_keys: those that are secret."""

    values: dict[str, str]
    secret_keys: tuple[str, ...]

    def with_placeholder(self, key: str) -> Configuration:
        """The same with a secret more, which is not set yet."""
        return Configuration(self.values | {key: PLACEHOLDER}, (*self.secret_keys, key))


def read_project() -> Project:
    """The project in the working folder. PlannerError where there is none, or one that cannot be previewed."""
    if not FILE.is_file():
        raise PlannerError(f"there is no {FILE} here: run planner in the project's folder, the one that holds it")
    try:
        content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise PlannerError(f"{FILE} cannot be read as YAML: correct it or restore it from git") from error
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise PlannerError(f"{FILE} names no project: restore it from git")
    if content.get("stackConfigDir") != str(FOLDER):
        raise PlannerError(f"{FILE} keeps its stacks elsewhere: write stackConfigDir: {FOLDER}")
    runtime = content.get("runtime")
    language = runtime.get("name") if isinstance(runtime, dict) else runtime
    if language != "python":
        raise PlannerError(f"{FILE} has the runtime {language}, and only a program in Python can be previewed")
    program = Path(str(content.get("main") or "."))
    if not (program.is_file() or (program / "__main__.py").is_file()):
        raise PlannerError(f"{FILE} says main: {program}, where there is no program: restore {program}/__main__.py")
    config = content.get("config")
    return Project(content["name"], program, config if isinstance(config, dict) else {})


def configuration(project: Project, file: StackFile) -> Configuration:
    """The configuration of a stack over the defaults of its project.

    What is encrypted stays so: a placeholder stands for it, and the key counts as secret. PlannerError for a file that
    Pulumi would not read.
    """
    values: dict[str, str] = {}
    secret_keys: list[str] = []
    stated = {_full(key, project.name): value for key, value in file.config.items()}
    for key, value in project.config.items():
        # a map is the schema of a value: with `value` for a provider's, `default` for the project's own
        default = value.get("value", value.get("default")) if isinstance(value, dict) else value
        if default is not None:
            stated.setdefault(_full(key, project.name), default)
    for key, value in stated.items():
        plain, secret = _decrypted(value)
        try:
            values[key] = _text(plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlannerError(
                f"{file.path}: {key} holds what JSON cannot, such as a date: put it in quotes"
            ) from error
        if secret:
            secret_keys.append(key)
    return Configuration(values, tuple(secret_keys))


def check_settings(given: Configuration, project: Project, file: StackFile) -> None:
    """PlannerError for a setting of the project that its program does not know: a typo would go unseen."""
    known = [f"{project.name}:{name}" for name in SETTINGS]
    for key in given.values:
        if key.startswith(f"{project.name}:") and key not in known:
            near = difflib.get_close_matches(key.lower(), [name.lower() for name in known], n=1, cutoff=0.75)
            meant = next((name for name in known if [name.lower()] == near), "")
            hint = f"did you mean {meant}?" if meant else f"take it out, the program knows {', '.join(SETTINGS)}"
            raise PlannerError(f"{file.path}: {key[:80]} is no setting of the program: {hint}")


def _full(key: object, project: str) -> str:
    """Pulumi's keys have a namespace, which is the project's name where none is written."""
    return str(key) if ":" in str(key) else f"{project}:{key}"


def _decrypted(value: Any) -> tuple[Any, bool]:
    """The value with a placeholder for each encrypted part, and whether there was one."""
    if isinstance(value, Mapping):
        if list(value) == ["secure"]:
            return PLACEHOLDER, True
        parts = {key: _decrypted(inner) for key, inner in value.items()}
        return {key: plain for key, (plain, _) in parts.items()}, any(secret for _, secret in parts.values())
    if isinstance(value, list):
        items = [_decrypted(inner) for inner in value]
        return [plain for plain, _ in items], any(secret for _, secret in items)
    return value, False


def _text(value: Any) -> str:
    """As the Pulumi CLI hands a value over: text as it is, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
