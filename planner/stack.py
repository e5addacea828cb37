"""Stack files: `stacks/Pulumi.<stack>.yaml`, with what a person wants (tonnage:intent) and the plan that answers it.

The plan is put into the file's text in place of the old one, so that comments, order and encrypted values stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from planner.errors import PlannerError
from planner.files import write_atomically
from planner.plan import Intent, parse_intent
from planner.plan.lock import Lock, again, changes, check_version, parse_lock

FOLDER = Path("stacks")
INTENT_KEY = "tonnage:intent"
PLAN_KEY = "tonnage:plan"
LONGEST_NAME = 28  # Azure takes 44 characters for a data collection endpoint, tonnage-STACK-metrics
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"


class Written(NamedTuple):
    """A stack file that holds a plan. changes: what differs from the plan before, a line each."""

    path: Path
    changes: tuple[str, ...]


class StackFile(NamedTuple):
    """A stack file as it was read. config: all that it says under config, secrets as they are encrypted."""

    stack: str
    path: Path
    config: dict[str, Any]

    @property
    def intent(self) -> Intent:
        """What a person wants. PlannerError where there is none, or a field of it is wrong."""
        return _intent(self.config, self.path)

    @property
    def lock(self) -> Lock:
        """The plan that answers it. PlannerError as read_lock."""
        if PLAN_KEY not in self.config:
            raise PlannerError(f"{self.path} has no {PLAN_KEY}: {again(self.stack)}")
        return parse_lock(self.config[PLAN_KEY], f"{self.path}, {PLAN_KEY}", self.stack)


def stack_names() -> tuple[str, ...]:
    """The stacks of the project in the working folder."""
    return tuple(sorted(map(_stack_of, FOLDER.glob("Pulumi.*.yaml"))))


def _stack_of(path: Path) -> str:
    return path.name[len("Pulumi.") : -len(".yaml")]


def stack_path(stack: str) -> Path:
    """The file of a stack, whether it is there or not. PlannerError for what is not the name of a stack."""
    name = stack.strip()
    if not name:
        raise PlannerError("the name of the stack is empty: write it as in stacks/Pulumi.<stack>.yaml")
    if not re.fullmatch(_NAME, name):
        raise PlannerError(f"{stack[:100]!r} is not the name of a stack: write it as in stacks/Pulumi.<stack>.yaml")
    return FOLDER / f"Pulumi.{name}.yaml"


def check_stack_name(stack: str) -> str:
    """The name itself. PlannerError when Azure would refuse it as part of its resources' names."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", stack) or "--" in stack or len(stack) > LONGEST_NAME:
        raise PlannerError(
            f"{stack[:100]!r} cannot be part of Azure's names: call the stack in at most {LONGEST_NAME} lower-case"
            " letters, digits and single hyphens, such as dev-32k"
        )
    return stack


def read_intent(stack: str) -> Intent:
    """The intent of a stack, by its name. PlannerError for an unknown stack, bad YAML, or no intent in it."""
    return read_stack(stack).intent


def intent_in(text: str, path: Path) -> Intent:
    """The intent in the text of a stack file. PlannerError as read_intent."""
    return _intent(_config(_load(text, path)), path)


def _intent(config: Mapping[str, Any], path: Path) -> Intent:
    if INTENT_KEY not in config:
        raise PlannerError(f"{path} has no {INTENT_KEY} under config: write there what the stack is for")
    return parse_intent(config[INTENT_KEY], f"{path}, {INTENT_KEY}")


def read_stack(stack: str) -> StackFile:
    """A stack's file, read once. PlannerError for an unknown stack and bad YAML."""
    path = stack_path(stack)
    return StackFile(stack.strip(), path, _config(_load(_read(path), path)))


def _config(content: object) -> dict[str, Any]:
    config = content.get("config") if isinstance(content, dict) else None
    return config if isinstance(config, dict) else {}


def needed_secrets(lock: Lock) -> dict[str, str]:
    """Config keys that the workloads cannot do without, each with the command that sets it."""
    if any(workload.task == "serve" for workload in lock.workloads):
        return {"apiKey": 'pulumi config set --secret tonnage:apiKey "$(openssl rand -hex 32)"'}
    return {}


def read_lock(stack: str) -> Lock:
    """The plan in a stack file. PlannerError when it has none, or one that must not be applied as it is."""
    return read_stack(stack).lock


def write_lock(stack: str, lock: Lock, *, dry_run: bool = False) -> Written:
    """Put a plan into a stack file, in place of the one it holds; dry_run: only say what would change.

    Everything else of the file stays as it is, byte for byte. PlannerError when that cannot be made sure, when the
    plan answers another intent than the file's, when the old plan is a newer Tonnage's, and when the file cannot be
    written.
    """
    path = stack_path(stack)
    text = _read(path)
    config = _config(_load(text, path))
    if _intent(config, path).digest != lock.intent:
        raise PlannerError(f"the intent in {path} was changed while it was planned for: {again(stack.strip())}")
    check_version(config.get(PLAN_KEY), f"{path}, {PLAN_KEY}")
    differs: tuple[str, ...]
    try:
        before = parse_lock(config[PLAN_KEY], PLAN_KEY) if PLAN_KEY in config else None
        if before is not None and before.digest == lock.digest:
            return Written(path, ())
        differs = changes(before, lock) or (_unseen(before, lock),)
    except PlannerError:  # a plan that cannot be read is what a new one is for
        differs = ("the plan before could not be read",)
    after = with_lock(text, lock, path)
    if not dry_run:
        write_text(path, after)
    return Written(path, differs)


def _unseen(before: Lock | None, lock: Lock) -> str:
    """What changed where a person would see no difference."""
    if before is not None and before.model_copy(update={"intent": lock.intent, "digest": lock.digest}) == lock:
        return "nothing but the intent that it answers"
    return "only what programs read"


def write_text(path: Path, text: str) -> None:
    """A stack file, whole or not at all. PlannerError when it cannot be written."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise PlannerError(f"{path} cannot be written ({error.strerror}): free space or change its rights") from error


def _read(path: Path) -> str:
    if not path.is_file():
        known = ", ".join(stack_names())
        hint = f"choose one of {known}" if known else "run planner in the project's folder, the one with Pulumi.yaml"
        raise PlannerError(f"there is no stack file {path}: {hint}")
    try:
        with path.open(encoding="utf-8", newline="") as file:  # line ends stay what they are
            return file.read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise PlannerError(f"{path} cannot be read ({reason}): correct it or restore it from git") from error


class _Loader(yaml.SafeLoader):
    """Reads words as Pulumi does (YAML 1.2): 1e3 is a number, yes and 8:30 are text. Refuses a key that comes twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the type that PyYAML gives it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "int", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"the key {key.value} comes twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"({_pattern})$"), list(_first))


def _load(text: str, path: Path) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        # what PyYAML raises for values that do not suit their tags
        problem = getattr(error, "problem", None) or str(error) or "nested too deeply"
        mark = getattr(error, "problem_mark", None)
        first = problem.splitlines()[0] + (f", line {mark.line + 1}" if mark else "")
        raise PlannerError(f"{path} cannot be read as YAML ({first}): correct it or restore it from git") from error


def with_lock(text: str, lock: Lock, path: Path) -> str:
    """The text of a stack file with the plan in it; the rest is untouched. PlannerError when that cannot be sure."""
    old, plan = _load(text, path), lock.plain()
    root = yaml.compose(text, Loader=_Loader)
    pairs = root.value if isinstance(root, yaml.MappingNode) and not root.flow_style else []
    config = next((value for key, value in pairs if key.value == "config"), None)
    if not isinstance(config, yaml.MappingNode) or config.flow_style or not _config(old):
        raise PlannerError(f"{path} has no config with a line for each key: write it so, then {again(_stack_of(path))}")
    unsafe = PlannerError(
        f"a plan cannot be put into {path} without touching the rest: write its config as plain blocks of YAML, without"
        f" anchors and with a newline at the end, then {again(_stack_of(path))}"
    )
    if re.search("\r(?!\n)|[\x85\u2028\u2029]", text):  # which end a line for one reader of YAML and not for another
        raise unsafe
    try:
        after = _with_block(text, config, plan)
        kept = _load(after, path) == old | {"config": old["config"] | {PLAN_KEY: plan}}
    except (PlannerError, RecursionError):  # an anchor that the old plan had, a part that refers to itself
        kept = False
    if not kept:
        raise unsafe
    return after


def _with_block(text: str, config: yaml.MappingNode, plan: Mapping[str, Any]) -> str:
    """The text with the plan in place of the old one, or at the end of config, where comments may follow."""
    end_of_line = "\r\n" if "\r\n" in text else "\n"
    indent = " " * config.value[0][0].start_mark.column
    body = yaml.dump({PLAN_KEY: dict(plan)}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    block = "".join(f"{indent}{line}{end_of_line}" for line in body.splitlines())
    entry = next(((key, value) for key, value in config.value if key.value == PLAN_KEY), None)
    if entry is not None:
        start, stop = _line_start(text, entry[0].start_mark.index), _line_end(text, _last(entry[1]))
    else:
        stop = _line_end(text, _last(config))
        # comments that are indented further belong to the part above
        own = re.compile(rf"(?:[ ]{{{len(indent) + 1},}}#[^\n]*(?:\n|$))*").match(text, stop)
        start = stop = own.end() if own else stop
    if start and text[start - 1] != "\n":
        block = end_of_line + block
    if stop == len(text) and not text.endswith("\n"):
        block = block.removesuffix(end_of_line)
    return text[:start] + block + text[stop:]


class _Dumper(yaml.SafeDumper):
    """Quotes what any reader of YAML could take for a number or a yes, and indents lists."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if re.match(r"[-+]?\.?[0-9]|[yYnN]$", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


def _last(node: yaml.Node) -> int:
    """Where the last word of a node ends. A block's own end mark lies behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last(last[1] if isinstance(node, yaml.MappingNode) else last)
    return int(node.end_mark.index)


def _line_start(text: str, index: int) -> int:
    return text.rfind("\n", 0, index) + 1


def _line_end(text: str, index: int) -> int:
    """Behind the line that holds index; a block scalar's end mark is already there."""
    if index and text[index - 1] == "\n":
        return index
    found = text.find("\n", index)
    return len(text) if found < 0 else found + 1
