"""Stack files: the intent in them, and refusals that say what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import golden
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner import stack as stacks
from planner.catalog.prices import load_sheet
from planner.errors import PlannerError
from planner.plan import make_plan, over_budget
from planner.plan.lock import Lock, check_lock, lock_of
from planner.stack import (
    INTENT_KEY,
    PLAN_KEY,
    check_stack_name,
    read_intent,
    read_lock,
    read_stack,
    stack_names,
    with_lock,
    write_lock,
)

ROOT = Path(__file__).parents[2]
SHEET = load_sheet("2026-11")
STACKS = ("dev-2k", "dev-32k", "dev-cpu", "prod-budget", "prod-enterprise", "prod-standard")


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
        "dev-cpu": {("D4s_v5", "on-demand")},
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


@pytest.mark.parametrize("name", ["../secrets", "a b", "x/y"])
def test_a_stack_name_is_no_path(name: str) -> None:
    with pytest.raises(PlannerError, match="is not the name of a stack"):
        read_intent(name)


def test_a_stack_without_a_name_is_refused_as_such() -> None:
    with pytest.raises(PlannerError, match="the name of the stack is empty"):
        read_intent(" ")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("exceptions: {api-addresses: lab}", "write the reason in two words or more"),
        ("alert_emails: [nobody]", "write an address such as a@b.com"),
        ("access: {admin_group_object_ids: [admins]}", "write an Entra ID object id such as 00000000-"),
        ("access: {authorized_ip_ranges: [office]}", "write a range of addresses such as 203.0.113.0/24"),
        ("approved_usd_per_month: 5.001", "write dollars and cents, such as 600.00"),
        ("approved_usd_per_month: much", "write dollars and cents, such as 600.00"),
        ("tags: {a<b: c}", "write a name of letters"),
        ("buffer: 0.1234567", "write fewer digits behind the point"),
    ],
)
def test_a_field_that_is_wrong_is_told_without_the_words_of_programs(
    field: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "config:\n  tonnage:intent:\n    model: qwen3-8b\n    workloads: [{kind: serve, context: 8k}]\n"
    write(tmp_path, f"{text}    {field}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlannerError) as refusal:
        read_intent("mine")
    assert f"cannot be planned: {words}" in str(refusal.value)
    assert not re.search("pattern|pydantic|UUID|decimal|[Ii]nput", str(refusal.value))


# ----------------------------------------------------------------------------------------------------- words of YAML


@pytest.mark.parametrize(
    ("word", "value"),
    [
        # as the Pulumi CLI 3.250 hands them on: `pulumi config --json` of a file with these words
        ("yes", "yes"),
        ("on", "on"),
        ("08:00", "08:00"),
        ("12:30:45", "12:30:45"),
        ("1e3", 1000),
        ("100.0", 100),
        ("010", 8),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", 1000),
        ("1_0.5", 10.5),
        (".5", 0.5),
        ("+5", 5),
        ("1e+22", 10**22),
        ("True", True),
        ("~", None),
        ("'2027-01-01'", "2027-01-01"),
    ],
)
def test_words_are_read_as_pulumi_reads_them(
    word: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, f"config:\n  tonnage:word: {word}\n")
    monkeypatch.chdir(tmp_path)
    found = read_stack("mine").config["tonnage:word"]
    assert found == value
    assert isinstance(found, bool) == isinstance(value, bool)


@pytest.mark.parametrize(
    "text", ["config: {a: 1, a: 2}\n", "config:\n  a: 1\nconfig:\n  b: 1\n", GOOD + "    model: x\n"]
)
def test_a_key_that_comes_twice_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlannerError, match=r"the key \w+ comes twice, line \d+\)"):
        read_stack("mine")


def test_a_merged_key_may_be_overridden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x: &x {<<: &y {a: 1}, a: 2}\nconfig:\n  <<: *x\n  b: 3\n")
    monkeypatch.chdir(tmp_path)
    assert read_stack("mine").config == {"a": 2, "b": 3}


@pytest.mark.parametrize("tagged", ["!!int ''", "!!bool x", "!!timestamp x", "!!float x", "!!binary \u00e4"])
def test_a_value_that_does_not_suit_its_tag_is_refused(
    tagged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, f"config:\n  a: {tagged}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlannerError, match="cannot be read as YAML"):
        read_stack("mine")


# --------------------------------------------------------------------------------------------------------- stack names


@pytest.mark.parametrize("name", ["dev-32k", "a", "7b", "prod-enterprise", "a" * 28])
def test_a_name_that_azure_takes(name: str) -> None:
    assert check_stack_name(name) == name


@pytest.mark.parametrize("name", ["", "Dev", "a_b", "a.b", "-a", "a-", "a--b", "a" * 29, "\u00e4", "a b", "a\n"])
def test_a_name_that_azure_would_refuse(name: str) -> None:
    with pytest.raises(PlannerError, match="cannot be part of Azure's names"):
        check_stack_name(name)


# -------------------------------------------------------------------------------------------------- putting the plan in

FILE = Path("stacks/Pulumi.mine.yaml")


@cache
def shipped_lock() -> Lock:
    text = (ROOT / "stacks" / "Pulumi.dev-2k.yaml").read_text(encoding="utf-8")
    held = stacks.parse_lock(yaml.safe_load(text)["config"][PLAN_KEY], "dev-2k")
    small = {"lines_usd": {"gpu/serve": Decimal("1.50")}, "workloads": (), "pools": held.pools[:1], "quota": {}}
    return held.model_copy(update=small)  # quick to read


def plan_in(text: str) -> Any:
    return yaml.safe_load(text)["config"][PLAN_KEY]


OTHERS = (
    "azure-native:location: westeurope",
    "tonnage:hf-token:\n_secure: AAABAJx/k9Zr+pQ==",
    "tonnage:note: |\n_first\n\n_  second # no comment",
    "tonnage:note: >-\n_folded\n_text",
    "tonnage:flow: {a: [1, 2], b: 'x # y'}",
    'tonnage:quoted: "a \u00e4 \u4e2d \U0001f600 \\n #"',
    "tonnage:list:\n_- one\n_- two: 2",
    "tonnage:lines: one\n_two\n_three",
    "tonnage:empty:",
    "'tonnage:odd key': 1e3",
    "tonnage:intent:\n_model: qwen3-8b # why\n\n_# a comment inside\n_workloads: [{kind: serve, context: 8k}]",
)
BETWEEN = ("", "", "# a comment", "# \u4e2d\u6587", "", "      # far in", "\n")
OLD_PLANS = (
    None,
    "tonnage:plan:",
    "tonnage:plan: {version: 1} # old",
    "tonnage:plan:\n_version: 1\n_# inside\n_pools:\n_- name: a\n_  x: [1]",
    "'tonnage:plan': old",
)
ROOTS = (
    "encryptionsalt: v1:abc=:v1:def",
    "secretsprovider: passphrase",
    "# at the root",
    "",
    "environment:\n  - shared",
)


@st.composite
def stack_files(draw: st.DrawFn) -> tuple[str, str, str]:
    """A stack file as what stands before its plan, the old plan, and what stands behind it."""
    indent = " " * draw(st.sampled_from([1, 2, 4]))
    inner = indent + " " * draw(st.sampled_from([1, 2, 3]))

    def entry(text: str) -> str:
        return indent + text.replace("\n_", f"\n{inner}") + "\n"

    def comment() -> str:
        text = draw(st.sampled_from(BETWEEN))
        return f"{indent}{text}\n" if text.strip() else text

    kinds = draw(st.lists(st.sampled_from(OTHERS), min_size=1, max_size=5, unique_by=lambda text: text.split(": ")[0]))
    kinds = list({re.split(r":(?:\s|$)", kind)[0]: kind for kind in kinds}.values())
    old = draw(st.sampled_from(OLD_PLANS))
    at = draw(st.integers(0, len(kinds)))
    roots = draw(st.permutations(ROOTS))
    top, bottom = roots[: draw(st.integers(0, 2))], roots[3 : draw(st.integers(3, 5))]
    start = draw(st.sampled_from(["", "---\n", "# first\n\n"]))
    head = start + "".join(f"{line}\n" for line in top) + draw(st.sampled_from(["config:\n", "config: # c\n"]))
    head += "".join(comment() + entry(kind) for kind in kinds[:at]) + (comment() if old else "")
    tail = "".join(comment() + entry(kind) for kind in kinds[at:])
    tail += comment() + "".join(f"{line}\n" for line in bottom)
    parts = [head, entry(old) if old else "", tail]
    if draw(st.booleans()) and not bottom and not parts[-1].endswith("\n\n"):  # no newline at the end
        last = max(i for i, part in enumerate(parts) if part)
        parts[last] = parts[last].rstrip("\n")
    if draw(st.booleans()):
        parts = [part.replace("\n", "\r\n") for part in parts]
    return parts[0], parts[1], parts[2]


@given(stack_files())
@settings(max_examples=60, deadline=None)
@example(("config:\n  a: 1\n", "  tonnage:plan:\n    x: 1\n", "    # of the plan, and stays\n\n  b: 2\n"))
@example(("config:\n  a: 1", "", ""))
@example(("config:\n  a: 1\n", "  tonnage:plan: |\n    text\n", "  # c\n  b: 2\n"))
@example(("\ufeffconfig:\n  a: 1\n", "", "encryptionsalt: v1:x"))
def test_all_but_the_plan_stays_as_it_is(file: tuple[str, str, str]) -> None:
    before, old, behind = file
    text = before + old + behind
    held = shipped_lock()
    if not old and re.search(r"\|\s+first\s+second # no comment(\s+# far in)?\Z", text):
        # a block text that ends with the file would gain a line end by what follows it
        with pytest.raises(PlannerError, match="without touching the rest"):
            with_lock(text, held, FILE)
        return
    after = with_lock(text, held, FILE)
    assert plan_in(after) == held.plain()
    if old:
        assert after.startswith(before)
        assert after.endswith(behind)
    else:
        # what was put in is whole lines; without them the file is what it was
        added = len(after) - len(text)
        line = after.index("tonnage:plan:")
        starts = [after.rfind("\n", 0, line) + 1]
        starts.append(starts[0] - (2 if "\r\n" in text else 1))
        assert any(after[:start] + after[start + added :] == text for start in starts)
    ours, theirs = yaml.safe_load(after), yaml.safe_load(text)
    order = [key for key in ours["config"] if key != PLAN_KEY]
    assert order == [key for key in theirs["config"] if key != PLAN_KEY]
    assert {key: ours["config"][key] for key in order} == {key: theirs["config"][key] for key in order}
    assert {k: v for k, v in ours.items() if k != "config"} == {k: v for k, v in theirs.items() if k != "config"}
    assert ("\r\n" in text) == ("\r\n" in after)
    assert "\r\n" not in text or not re.search(r"(?<!\r)\n", after)
    assert text.endswith("\n") == after.endswith("\n")
    assert with_lock(after, held, FILE) == after


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config: {tonnage:intent: {model: a}}\n", "has no config with a line for each key"),
        ("{config: {a: 1}}\n", "has no config with a line for each key"),
        ("config:\n", "has no config with a line for each key"),
        ("a: 1\n", "has no config with a line for each key"),
        ("", "has no config with a line for each key"),
        ("- config:\n", "has no config with a line for each key"),
        ("config:\n  tonnage:plan:\n    a: &a [1]\n  b: *a\n", "without touching the rest"),
        ("x: &x\n  a: 1\nconfig: *x\n", "without touching the rest"),
        ("config:\n  x: &x [1]\n  tonnage:plan: *x\n  c: 1\n", "without touching the rest"),
        ("config:\n  x: &x\n    y: *x\n", "without touching the rest"),
        ("config:\n  ? tonnage:plan\n  : 1\n  b: 1\n", "without touching the rest"),
        ("? config\n: tonnage:plan: 1\n  b: 1\n", "without touching the rest"),
        ("config:\r  a: 1\r", "without touching the rest"),
        ("config:\n  a: 'x \u2028 y'\n", "without touching the rest"),
        ("config:\n  tonnage:plan: 1\n  tonnage:plan: 2\n", "the key tonnage:plan comes twice"),
        ("config:\n  a: 1\n---\nb: 1\n", "cannot be read as YAML"),
        ("config:\n  a: |\n    text", "without touching the rest"),
        ("config:\n  <<: {a: 1}\n", None),
        ("config: &c\n  a: 1\nother: *c\n", "without touching the rest"),
        ("config: !!map\n  a: 1\n...\n", None),
        ('{"config": {"a": 1}}', "has no config with a line for each key"),
    ],
)
def test_a_file_that_a_plan_cannot_be_put_into_is_refused(text: str, words: str | None) -> None:
    if words is None:
        after = with_lock(text, shipped_lock(), FILE)
        assert plan_in(after) == shipped_lock().plain()
        return
    with pytest.raises(PlannerError) as refusal:
        with_lock(text, shipped_lock(), FILE)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_comments_of_the_last_part_stay_with_it() -> None:
    text = "config:\n  tonnage:intent:\n    model: a\n    # buffer: 0.1\n  # of config\nencryptionsalt: x\n"
    after = with_lock(text, shipped_lock(), FILE)
    assert after.startswith("config:\n  tonnage:intent:\n    model: a\n    # buffer: 0.1\n  tonnage:plan:\n")
    assert after.endswith("\n  # of config\nencryptionsalt: x\n")


# ---------------------------------------------------------------------------------------------------- writing the file


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of dev-2k's file as the stack mine, without its plan."""
    text = (ROOT / "stacks" / "Pulumi.dev-2k.yaml").read_text(encoding="utf-8")
    write(tmp_path, text[: text.index("  tonnage:plan:")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TONNAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "stacks" / "Pulumi.mine.yaml"


def planned() -> Lock:
    intent = read_intent("mine")
    return lock_of(make_plan(intent, SHEET), intent)


@pytest.mark.parametrize("stack", STACKS)
def test_every_shipped_stack_holds_its_plan_as_it_is_today(
    stack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # when this fails: make golden
    (tmp_path / "stacks").mkdir()
    path = Path(shutil.copy2(ROOT / "stacks" / f"Pulumi.{stack}.yaml", tmp_path / "stacks"))
    monkeypatch.chdir(tmp_path)
    text, changed_at = path.read_bytes(), path.stat().st_mtime_ns
    intent = read_intent(stack)
    assert write_lock(stack, lock_of(make_plan(intent, SHEET), intent)).changes == ()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (text, changed_at)
    check_lock(read_lock(stack), intent, stack)
    assert list(read_stack(stack).config) == [INTENT_KEY, PLAN_KEY]


def test_a_plan_is_written_once_and_then_left(project: Path) -> None:
    intent_text = project.read_text(encoding="utf-8")
    first = write_lock("mine", planned())
    assert (first.path, first.changes) == (Path("stacks/Pulumi.mine.yaml"), ("the first plan of this stack",))
    text = project.read_text(encoding="utf-8")
    assert text.startswith(intent_text)
    assert read_lock("mine") == planned()
    os.utime(project, ns=(1, 1))
    assert write_lock("mine", planned()).changes == ()
    assert project.stat().st_mtime_ns == 1
    assert project.read_text(encoding="utf-8") == text
    assert [path.name for path in project.parent.iterdir()] == [project.name]


def test_a_new_plan_takes_the_place_of_the_old_one(project: Path) -> None:
    write_lock("mine", planned())
    old = project.read_text(encoding="utf-8") + "  tonnage:hf-token:\n    secure: AAAB=\nencryptionsalt: v1:x\n"
    project.write_text(old.replace("approved_usd_per_month: 600", "approved_usd_per_month: 650"), encoding="utf-8")
    assert write_lock("mine", planned()).changes == ("approved a month $600.00 -> $650.00",)
    now = project.read_text(encoding="utf-8")
    assert now.endswith("\n  tonnage:hf-token:\n    secure: AAAB=\nencryptionsalt: v1:x\n")
    digests = re.compile(r"'?[0-9a-f]{16}'?")
    expected = old.replace("approved_usd_per_month: 600", "approved_usd_per_month: 650")
    expected = expected.replace("approved_usd_per_month: '600'", "approved_usd_per_month: '650'")
    assert digests.sub("", now) == digests.sub("", expected)


def test_a_plan_that_was_edited_by_hand_is_written_again(project: Path) -> None:
    write_lock("mine", planned())
    text = project.read_text(encoding="utf-8")
    for edit in (("fallback: false", "fallback: 0"), ("max_nodes: 1", "max_nodes: 9"), ("version: 1", "version: 0")):
        assert edit[0] in text
        project.write_text(text.replace(*edit), encoding="utf-8")
        assert write_lock("mine", planned()).changes == ("the plan before could not be read",)
        assert project.read_text(encoding="utf-8") == text


def test_a_plan_of_a_newer_version_is_not_replaced(project: Path) -> None:
    write_lock("mine", planned())
    text = project.read_text(encoding="utf-8").replace("version: 1", "version: 2")
    project.write_text(text, encoding="utf-8")
    with pytest.raises(PlannerError, match=r"was written by a newer Tonnage \(format 2, this one reads 1\)"):
        write_lock("mine", planned())
    assert project.read_text(encoding="utf-8") == text


def test_an_intent_that_leads_to_the_same_machines_is_answered_anew(project: Path) -> None:
    write_lock("mine", planned())
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace("buffer: 0.25", "buffer: 0.30"), encoding="utf-8")
    assert write_lock("mine", planned()).changes == ("nothing but the intent that it answers",)
    check_lock(read_lock("mine"), read_intent("mine"), "mine")


def test_a_dry_run_writes_nothing(project: Path) -> None:
    text = project.read_bytes()
    assert write_lock("mine", planned(), dry_run=True).changes == ("the first plan of this stack",)
    assert project.read_bytes() == text


def test_windows_line_ends_stay(project: Path) -> None:
    project.write_bytes(project.read_bytes().replace(b"\n", b"\r\n"))
    before = project.read_bytes()
    write_lock("mine", planned())
    assert project.read_bytes().startswith(before)
    assert not re.search(rb"(?<!\r)\n", project.read_bytes())
    assert read_lock("mine") == planned()


def test_a_link_to_a_stack_file_stays_a_link(project: Path, tmp_path: Path) -> None:
    target = project.rename(tmp_path / "elsewhere.yaml")
    project.symlink_to(target)
    write_lock("mine", planned())
    assert project.is_symlink()
    assert "tonnage:plan:" in target.read_text(encoding="utf-8")


def test_a_file_that_went_away_is_not_made_again(project: Path) -> None:
    held = planned()
    project.unlink()
    with pytest.raises(PlannerError, match="there is no stack file"):
        write_lock("mine", held)
    assert not project.exists()


def test_an_intent_that_changed_while_it_was_planned_for_is_refused(project: Path) -> None:
    held = planned()
    project.write_text(project.read_text(encoding="utf-8").replace("2048", "4096"), encoding="utf-8")
    with pytest.raises(PlannerError, match="was changed while it was planned for"):
        write_lock("mine", held)


def test_a_folder_that_cannot_be_written_is_one_sentence(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, held = project.read_bytes(), planned()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stacks, "write_atomically", refuse)
    with pytest.raises(PlannerError, match=r"cannot be written \(Permission denied\): free space or change its rights"):
        write_lock("mine", held)
    assert project.read_bytes() == text


def test_a_stack_without_a_plan_says_what_to_run(project: Path) -> None:
    with pytest.raises(PlannerError, match="has no tonnage:plan: run `planner plan --stack mine` and"):
        read_lock("mine")


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_the_plan_and_says_what_changed(project: Path) -> None:
    before = project.read_text(encoding="utf-8")
    outcome = golden.run(("plan", "--stack", "mine", "--dry-run"))
    assert (outcome.exit_code, project.read_text(encoding="utf-8")) == (0, before)
    assert outcome.stdout.endswith(
        "stacks/Pulumi.mine.yaml: the plan would be written\n  the first plan of this stack\n"
    )
    assert golden.run(("plan", "--stack", "mine")).stdout.endswith(
        "stacks/Pulumi.mine.yaml: the plan is written\n  the first plan of this stack\n"
    )
    assert project.read_text(encoding="utf-8").startswith(before)
    assert golden.run(("plan", "--stack", "mine")).stdout.endswith(
        "stacks/Pulumi.mine.yaml: the plan is current, nothing changed\n"
    )


def test_many_changes_are_counted(project: Path) -> None:
    golden.run(("plan", "--stack", "mine"))
    text = project.read_text(encoding="utf-8")
    project.write_text(
        text.replace("regions: [eastus]", "regions: [westus3]").replace("_month: 600", "_month: 900"), encoding="utf-8"
    )
    lines = golden.run(("plan", "--stack", "mine")).stdout.splitlines()
    at = lines.index("stacks/Pulumi.mine.yaml: the plan is written")
    # twelve and how many more
    assert len(lines[at:]) == 14
    assert lines[at + 1] == "  region eastus -> westus3"
    assert re.fullmatch(r"  and \d+ more, in `git diff stacks/Pulumi.mine.yaml`", lines[-1])


def test_a_dry_run_tells_all_changes_since_no_diff_of_git_can(project: Path) -> None:
    golden.run(("plan", "--stack", "mine"))
    text = project.read_text(encoding="utf-8")
    project.write_text(
        text.replace("regions: [eastus]", "regions: [westus3]").replace("_month: 600", "_month: 900"), encoding="utf-8"
    )
    lines = golden.run(("plan", "--stack", "mine", "--dry-run")).stdout.splitlines()
    at = lines.index("stacks/Pulumi.mine.yaml: the plan would be written")
    assert len(lines[at:]) > 14
    assert "git diff" not in "".join(lines)


@pytest.mark.parametrize("option", ["--stack", "--region"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_option_with_nothing_in_it_is_refused(option: str, value: str) -> None:
    outcome = golden.run(("plan", "--model", "qwen3-8b", "--ctx", "8k", option, value))
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith(f"planner: {option} is empty: write a name, such as {option} ")


def test_a_file_that_fails_is_not_mistaken_for_stdout(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "prices.json")

    monkeypatch.setattr("planner.money.load_sheet", locked)
    outcome = golden.run(("plan", "--stack", "mine"))
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("planner: prices.json cannot be used (Permission denied): see that")


def test_json_on_stdout_is_nothing_but_the_plan(project: Path) -> None:
    outcome = golden.run(("plan", "--stack", "mine", "--json"))
    assert json.loads(outcome.stdout)["schema_version"] == "tonnage.plan/1"
    assert "stacks/Pulumi.mine.yaml: the plan is written\n  the first plan" in outcome.stderr
    assert read_lock("mine") == planned()


def test_a_plan_above_the_approved_amount_is_shown_and_not_written(project: Path) -> None:
    text = project.read_text(encoding="utf-8").replace("approved_usd_per_month: 600", "approved_usd_per_month: 60")
    project.write_text(text, encoding="utf-8")
    outcome = golden.run(("plan", "--stack", "mine"))
    assert outcome.exit_code == 1
    assert outcome.stderr.splitlines()[-1].endswith(
        "$60.00 is approved: raise the approval or change the intent; stacks/Pulumi.mine.yaml keeps the plan it has"
    )
    assert "the plan is written" not in outcome.stdout
    assert project.read_text(encoding="utf-8") == text


def test_a_plan_that_nothing_approves_is_written_and_says_so(project: Path) -> None:
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace("    approved_usd_per_month: 600\n", ""), encoding="utf-8")
    outcome = golden.run(("plan", "--stack", "mine"))
    assert outcome.exit_code == 0
    assert outcome.stdout.splitlines()[-1].startswith("nothing is approved yet")
    assert read_lock("mine").approved_usd_per_month is None


def test_a_plan_that_does_not_fit_leaves_the_file(project: Path) -> None:
    text = project.read_text(encoding="utf-8").replace(
        "regions: [eastus]", "regions: [eastus]\n    skus: [NC4as_T4_v3]"
    )
    text = text.replace("context: 2048", "context: 32768")
    project.write_text(text, encoding="utf-8")
    outcome = golden.run(("plan", "--stack", "mine"))
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert project.read_text(encoding="utf-8") == text


def test_without_a_stack_there_is_nothing_to_try_out() -> None:
    outcome = golden.run(("plan", "--model", "qwen3-8b", "--ctx", "8k", "--dry-run"))
    assert outcome.exit_code == 2
    assert outcome.stderr == "planner: without --stack nothing is written: drop --dry-run\n"
