"""Stack files: the intent in them, and refusals that say what to do."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from planner.catalog.prices import load_sheet
from planner.errors import PlannerError
from planner.plan import make_plan, over_budget
from planner.stack import read_intent, stack_names

ROOT = Path(__file__).parents[2]
SHEET = load_sheet("2026-11")
STACKS = ("dev-2k", "dev-32k", "prod-budget", "prod-enterprise", "prod-standard")


def test_the_shipped_stacks_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert stack_names() == STACKS


@pytest.mark.parametrize("stack", STACKS)
def test_every_shipped_stack_plans_within_what_it_says_is_approved(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    intent = read_intent(stack)
    assert intent.approved_usd_per_month is not None
    assert over_budget(make_plan(intent, SHEET), intent) == ""


def test_the_machines_of_each_shipped_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    bought = {}
    for stack in STACKS:
        plan = make_plan(read_intent(stack), SHEET)
        bought[stack] = {(p.sku.removeprefix("Standard_"), p.priority) for p in plan.pools if not p.fallback}
    assert bought == {
        "dev-2k": {("NC4as_T4_v3", "spot")},
        "dev-32k": {("NC24ads_A100_v4", "spot")},
        "prod-budget": {("NC4as_T4_v3", "spot")},
        "prod-standard": {("NC24ads_A100_v4", "spot")},
        "prod-enterprise": {("NC24ads_A100_v4", "reserved-1y")},
    }


def test_a_plan_above_the_approved_budget_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    intent = read_intent("dev-2k").model_copy(update={"approved_usd_per_month": Decimal(100)})
    assert over_budget(make_plan(intent, SHEET), intent).endswith(
        "a month and $100.00 is approved: raise the approval or change the intent"
    )


def write(folder: Path, text: str) -> None:
    (folder / "stacks").mkdir()
    (folder / "stacks" / "Pulumi.mine.yaml").write_text(text, encoding="utf-8")


GOOD = """
# a comment
config:
  azure-native:location: westeurope
  tonnage:intent:
    model: qwen3-8b
    regions: [westeurope]
    buffer: 0.15
    workloads:
      - {kind: serve, context: 8k, schedule: "mon-fri 08:00-18:00"}
"""


def test_an_intent_is_read_from_yaml_without_losing_a_digit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    intent = read_intent("mine")
    assert intent.buffer == Decimal("0.15")
    assert intent.workloads[0].context == 8192
    assert intent.workloads[0].schedule == "mon-fri 08:00-18:00"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no tonnage:intent"),
        ("- a list", "has no tonnage:intent"),
        ("config: {}", "has no tonnage:intent"),
        ("config: {tonnage:intent: 5}", "holds no intent"),
        ("config: {tonnage:intent: {}}", "model is missing"),
        (GOOD.replace('"mon-fri 08:00-18:00"', "2020-13-45"), "cannot be"),
        (GOOD.replace('"mon-fri 08:00-18:00"', "[80h]"), "a schedule is always"),
        ("config: " + "[" * 3000, "cannot be read as YAML"),
        (GOOD.replace("model: qwen3-8b", "model: qwen3-8b\n    quota: &a {x: *a}"), "refers to itself"),
        ("config: [unclosed", "cannot be read as YAML"),
        ("config: {tonnage:intent: !!python/object:os.system {}}", "cannot be read as YAML"),
        (GOOD.replace("kind: serve", "kind: play"), "workloads.0"),
        (GOOD.replace("buffer: 0.15", "buffer: 2"), "buffer"),
        (GOOD.replace("buffer: 0.15", "bufer: 0.1"), "bufer"),
    ],
)
def test_a_stack_file_that_is_wrong_is_refused_in_one_sentence(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlannerError) as refusal:
        read_intent("mine")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_stack_is_refused_with_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlannerError, match="choose one of mine"):
        read_intent("yours")
    monkeypatch.chdir(tmp_path / "stacks")
    with pytest.raises(PlannerError, match="the one with Pulumi"):
        read_intent("mine")


@pytest.mark.parametrize("name", ["../secrets", "a b", "", "x/y"])
def test_a_stack_name_is_no_path(name: str) -> None:
    with pytest.raises(PlannerError, match="is not the name of a stack"):
        read_intent(name)
