"""Stack files: `stacks/Pulumi.<stack>.yaml`, where `tonnage:intent` says what a person wants."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from planner.errors import PlannerError
from planner.plan import Intent, parse_intent

FOLDER = Path("stacks")
INTENT_KEY = "tonnage:intent"


def stack_names() -> tuple[str, ...]:
    """The stacks of the project in the working folder."""
    return tuple(sorted(path.name[len("Pulumi.") : -len(".yaml")] for path in FOLDER.glob("Pulumi.*.yaml")))


def read_intent(stack: str) -> Intent:
    """The intent of a stack, by its name. PlannerError for an unknown stack, bad YAML, or no intent in it."""
    name = stack.strip()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise PlannerError(f"{stack[:100]!r} is not the name of a stack: write it as in stacks/Pulumi.<stack>.yaml")
    path = FOLDER / f"Pulumi.{name}.yaml"
    if not path.is_file():
        known = ", ".join(stack_names())
        hint = f"choose one of {known}" if known else "run planner in the project's folder, the one with Pulumi.yaml"
        raise PlannerError(f"there is no stack file {path}: {hint}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        first = (str(error) or "nested too deeply").splitlines()[0]
        raise PlannerError(f"{path} cannot be read as YAML ({first}): correct it or restore it from git") from error
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or INTENT_KEY not in config:
        raise PlannerError(f"{path} has no {INTENT_KEY} under config: write there what the stack is for")
    return parse_intent(config[INTENT_KEY], f"{path}, {INTENT_KEY}")
