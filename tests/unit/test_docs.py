"""What the pages say is what the program does: generated pages are current, and the README's commands run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from retail_server import GOOD, RetailServer

from planner.catalog import model_entry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
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
