"""What the pages say is what the program does: generated pages are current, commands run or parse, names exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel
from retail_server import GOOD, RetailServer

from infra.alerts import Alert, rule_groups
from infra.settings import SECRETS, watched
from planner.catalog import model_entry
from planner.cli import app
from planner.plan import Intent
from planner.plan.intent import FinetuneWorkload, Quota, ServeWorkload
from planner.plan.lock import Lock
from planner.stack import read_lock, stack_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


STACKS, OPERATIONS = text_of("docs/stacks.md"), text_of("docs/operations.md")
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))
DECISIONS = sorted(f"docs/decisions/{path.name}" for path in ROOT.glob("docs/decisions/*.md"))
# by people: what is generated cannot name what is not there
WRITTEN = [page for page in (*PAGES, *DECISIONS) if not text_of(page).startswith("<!-- generated")]
each_page = pytest.mark.parametrize("page", WRITTEN)
PLANNER = Path(sys.executable).with_name("planner")
PLAIN = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}


def run(arguments: list[str], cwd: Path, more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = PLAIN | {"TONNAGE_CACHE": str(cwd / "no-such-cache")} | (more or {})
    return subprocess.run(
        [PLANNER, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, check=False, timeout=60
    )


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("planner ")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's commands name: a model of one's own, and the measurements."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my-model").mkdir()
    (folder / "my-model" / "config.json").write_text(model_entry("qwen3-4b").model_dump_json(include={"config"})[10:-1])
    shutil.copytree(ROOT / "tests" / "measured", folder / "tests" / "measured")
    shutil.copytree(ROOT / "stacks", folder / "stacks")
    shutil.copytree(ROOT / "infra", folder / "infra", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Pulumi.yaml", folder)
    return folder


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_runs(command: str, clone: Path) -> None:
    with RetailServer(GOOD) as server:  # stands in for Azure's price list
        done = run(shlex.split(command)[1:], clone, {"TONNAGE_PRICES_ENDPOINT": server.url, "NO_PROXY": "127.0.0.1"})
    # 0 done, 1 it does not fit: the README shows one of those on purpose
    assert done.returncode in (0, 1), done.stderr
    assert done.returncode == 0 or "--gpu" in command
    said = done.stderr.splitlines()
    assert all(line.startswith(("planner: machine prices in the sheet", "wrote ")) for line in said)
    assert done.stdout.strip() or said[-1].startswith("wrote ")


def test_the_output_that_the_readme_shows_is_what_the_command_prints() -> None:
    shown = re.search(r"```text\n\$ planner (.*?)\n(.*?)```", README, flags=re.S)
    assert shown is not None
    done = run(shlex.split(shown[1]), ROOT)
    printed = "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())
    assert shown[2].rstrip("\n") == printed


def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def section(text: str, title: str) -> str:
    """A page's text below a heading, up to the next one of that level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    assert found is not None, title
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a text, without their heads."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("|---"):
            found.pop()
        elif line.startswith("|"):
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command of the app that the words name, and the words that are left."""
    found: Any = typer.main.get_command(app)
    while words and words[0] in getattr(found, "commands", {}):
        found, words = found.commands[words[0]], words[1:]
    return found, words


@each_page
def test_every_planner_command_of_a_page_parses(page: str) -> None:
    text = text_of(page)
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("planner "):
                command, rest = command_of(shlex.split(line, comments=True)[1:])
                command.make_context("planner", rest)  # raises for an option or a value that is not known
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for span in code(prose):
        if not span.startswith("planner "):
            continue
        words = span.split()[1:]
        command, rest = command_of([word for word in words if word != "..."])
        if "..." in words and hasattr(command, "commands"):  # any of them
            continue
        names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert not (getattr(command, "commands", {}) and rest and not rest[0].startswith("-")), f"{page}: {span}"
        assert {word for word in rest if word.startswith("--")} <= names | {"--help"}, f"{page}: {span}"


@each_page
def test_every_config_key_that_a_page_names_is_read_by_the_program(page: str) -> None:
    program = (ROOT / "infra" / "__main__.py").read_text(encoding="utf-8")
    known = set(re.findall(r"""config\.get(?:_object|_secret)?\("(\w+)"\)""", program)) | set(SECRETS)
    assert {"intent", "plan", "kubelogin", "systemPool"} <= known
    named = set(re.findall(r"\btonnage:(\w+)(?![\w:/])", text_of(page)))
    assert named <= known


@each_page
def test_every_output_that_a_page_asks_for_is_exported(page: str) -> None:
    program = (ROOT / "infra" / "__main__.py").read_text(encoding="utf-8")
    exported = set(re.findall(r"""pulumi\.export\("(\w+)\"""", program))
    assert set(re.findall(r"pulumi stack output (\w+)", text_of(page))) <= exported


def test_the_links_to_a_part_of_a_page_lead_to_a_heading() -> None:
    for page in WRITTEN:
        for target, part in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text_of(page)):
            there = (ROOT / page).parent / target if target else ROOT / page
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.M)
            slugs = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert part in slugs, f"{page} links to {target}#{part}"


def fields(model: type[BaseModel], prefix: str = "") -> set[str]:
    """The names of a model's fields, those of models inside it after a dot."""
    found = set()
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= fields(inner, f"{prefix}{name}.")
        else:
            found.add(f"{prefix}{name}")
    return found


def test_the_tables_of_the_intent_have_every_field_and_no_other() -> None:
    of_intent, of_workload = section(STACKS, "The intent, field by field").split("Of each of `workloads`:")
    told = [name for row in rows(of_intent) for name in code(row[0])]
    assert sorted(told) == sorted((fields(Intent) - {"quota"}) | {f"quota.REGION.{name}" for name in fields(Quota)})
    told = [name for row in rows(of_workload) for name in code(row[0])]
    assert sorted(told) == sorted(fields(ServeWorkload) | fields(FinetuneWorkload))


def locks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Lock]:
    monkeypatch.chdir(ROOT)
    return {stack: read_lock(stack) for stack in stack_names()}


def test_the_table_of_the_shipped_stacks_has_the_pools_of_their_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows(section(STACKS, "The six that come with it").split("A name that ends in")[0])
    told = {code(row[0])[0]: code(row[2]) for row in table}
    assert told == {stack: [pool.name for pool in lock.pools] for stack, lock in locks(monkeypatch).items()}


def test_the_table_of_alerts_is_that_of_the_shipped_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    fired = {
        rule.name: (rule.minutes, rule.severity)
        for lock in locks(monkeypatch).values()
        for group in rule_groups(watched(lock))
        for rule in group.rules
        if isinstance(rule, Alert)
    }
    told = {code(row[0])[0]: (row[1], int(row[2])) for row in rows(section(OPERATIONS, "Alerts")) if len(row) == 5}
    assert set(told) == set(fired)
    for name, (minutes, severity) in told.items():
        assert severity == fired[name][1], name
        if name != "ServerNotReady":  # its minutes follow from the model
            assert minutes == f"{fired[name][0]} min", name
