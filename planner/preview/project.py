"""The Pulumi project in the working folder: its program, and a stack's configuration as the program receives it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from planner.errors import PlannerError
from planner.stack import FOLDER, read_config, stack_path

FILE = Path("Pulumi.yaml")
# what stands for a value that only the stack's key can decrypt
PLACEHOLDER = "placeholder-of-an-encrypted-value"


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


def configuration(project: Project, stack: str) -> Configuration:
    """The configuration of a stack over the defaults of its project.

    What is encrypted stays so: a placeholder stands for it, and the key counts as secret. PlannerError for a file that
    Pulumi would not read.
    """
    values: dict[str, str] = {}
    secret_keys: list[str] = []
    stated = {_full(key, project.name): value for key, value in read_config(stack).items()}
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
                f"{stack_path(stack)}: {key} holds what JSON cannot, such as a date: put it in quotes"
            ) from error
        if secret:
            secret_keys.append(key)
    return Configuration(values, tuple(secret_keys))


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
