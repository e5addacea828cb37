"""`planner new`: a stack file that reads like the shipped ones, and nothing written when anything is wrong."""

from __future__ import annotations

import io
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import golden
import pytest
import yaml

from planner import new
from planner.cli import app
from planner.plan.lock import check_lock
from planner.stack import read_intent, read_lock

GIVEN = ("--model", "qwen3-8b", "--ctx", "8k", "--approved", "900", "--serve-hours", "60h")
FILE = Path("stacks/Pulumi.mine.yaml")


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty project with no price sheets of its own and nobody at the keyboard."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TONNAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    Path("Pulumi.yaml").write_text("name: tonnage\n", encoding="utf-8")


def made(*argv: str) -> str:
    """The file of the new stack."""
    outcome = golden.run(("new", "mine", *argv))
    assert outcome.exit_code == 0, outcome
    return FILE.read_text(encoding="utf-8")


def refused(*argv: str, code: int = 2) -> str:
    """The sentence of a refusal, after which there is no new file."""
    before = sorted(Path().rglob("*.yaml"))
    outcome = golden.run(("new", *argv))
    assert (outcome.exit_code, outcome.stdout) == (code, "")
    assert sorted(Path().rglob("*.yaml")) == before
    assert all(line.startswith("planner: ") for line in outcome.stderr.splitlines())
    return outcome.stderr.splitlines()[-1]


def test_a_new_stack_holds_what_was_asked_and_a_plan_that_may_be_applied() -> None:
    text = made(*GIVEN, "--task", "serve", "--region", "westeurope, swedencentral", "--no-spot")
    intent = read_intent("mine")
    assert intent.model == "qwen3-8b"
    assert intent.regions == ("westeurope", "swedencentral")
    assert intent.posture == "dev"
    assert not intent.pricing.spot
    assert intent.approved_usd_per_month == Decimal(900)
    assert [(w.kind, w.context, w.schedule) for w in intent.workloads] == [("serve", 8192, "60h")]
    check_lock(read_lock("mine"), intent, "the plan")
    # comments first, the intent, the plan last
    assert text.startswith("# Development: serving of qwen3-8b at 8,192 tokens.\n# What you edit is tonnage:intent;")
    assert text.index("tonnage:intent:") < text.index("tonnage:plan:")
    assert "#" not in text[text.index("tonnage:plan:") :]
    assert text.endswith("\n")
    assert max(map(len, text.splitlines())) <= 120


def test_what_comes_next_is_said() -> None:
    outcome = golden.run(("new", "mine", *GIVEN))
    lines = outcome.stdout.splitlines()
    assert re.fullmatch(r"stacks/Pulumi.mine.yaml: eastus, \$[0-9]+\.[0-9]{2} a month of \$900.00 approved", lines[0])
    assert lines[-3:] == [
        "Next: planner budget --stack mine -o budget.html",
        "      planner preview --stack mine",
        "      pulumi stack init mine && pulumi up --stack mine",
    ]


def test_every_option_is_in_the_intent() -> None:
    made(
        *("--model", "qwen3-8b", "--ctx", "4096", "--approved", "$9,000.50", "--posture", "prod", "--region", "eastus"),
        *("--serve-hours", "mon-fri 08:00-18:00", "--finetune-hours", "20", "--email", "a@b.de", "--email", "c@d.com"),
        *("--admin-group", "00000000-0000-0000-0000-000000000001"),
    )
    intent = read_intent("mine")
    assert intent.posture == "prod"
    assert intent.approved_usd_per_month == Decimal("9000.50")
    assert intent.alert_emails == ("a@b.de", "c@d.com")
    assert [str(group) for group in intent.access.admin_group_object_ids] == ["00000000-0000-0000-0000-000000000001"]
    assert [(w.name, w.schedule) for w in intent.workloads] == [("finetune", "20h"), ("serve", "mon-fri 08:00-18:00")]
    # production on spot stands on a machine on demand while Azure has none
    assert intent.pricing.fallback_on_demand


def test_a_new_stack_is_current(tmp_path: Path) -> None:
    text = made(*GIVEN)
    assert golden.run(("plan", "--stack", "mine")).stdout.splitlines()[-1].endswith("is current, nothing changed")
    assert FILE.read_text(encoding="utf-8") == text


def test_the_suggestions_in_the_comments_can_be_taken() -> None:
    text = made(*GIVEN)
    plan = text.index("  tonnage:plan:")
    intent = text[:plan].replace("# take_turns", "take_turns").replace("# storage", "storage")
    intent = intent.replace("# developers", "developers").replace("# alert_emails", "alert_emails")
    intent = intent.replace("# settings", "settings")
    FILE.write_text(intent + text[plan:], encoding="utf-8")
    taken = read_intent("mine")
    assert taken.take_turns
    assert taken.storage.dataset_gb == 200
    assert taken.developers.count == 2
    assert taken.alert_emails == ("platform@example.com",)
    assert taken.workloads[1].settings == {"quantization": "awq"}


@pytest.mark.parametrize(
    "word", ["yes", "null", "1e3", "a: b", "a #b", "[x]", "&x", "\u00e4", "'", '"', "a\\b", "0123"]
)
def test_any_word_is_written_so_that_it_is_read_back(word: str) -> None:
    assert yaml.safe_load(f"a: {new._word(word)}") == {"a": word}


@pytest.mark.parametrize(
    ("argv", "words", "code"),
    [
        (("mine",), "needs --model, --ctx, --approved: add what is missing, or answer at a terminal", 2),
        (("mine", "--model", "qwen3-8b", "--ctx", "8k"), "needs --approved: add", 2),
        (("Mine_1", *GIVEN), "'Mine_1' cannot be part of Azure's names", 2),
        (("a" * 33, *GIVEN), "at most 28 lower-case", 2),
        (("../x", *GIVEN), "cannot be part of Azure's names", 2),
        (("mine", *GIVEN, "--approved", "10"), "$10.00 is approved: raise the approval or change the intent", 1),
        (("mine", *GIVEN, "--approved", "much"), "'much' is not an amount", 2),
        (("mine", *GIVEN, "--approved", "-5"), "is not an amount", 2),
        (("mine", *GIVEN, "--approved", "nan"), "is not an amount", 2),
        (("mine", *GIVEN, "--approved", "0"), "approved_usd_per_month cannot be planned", 2),
        (("mine", *GIVEN, "--approved", "1e400"), "is not an amount", 2),
        (("mine", *GIVEN, "--approved", "5.001"), "is not an amount", 2),
        (("mine", *GIVEN, "--task", "play"), "'play' is not a task: choose one of serve, finetune, both", 2),
        (("mine", *GIVEN, "--posture", "test"), "'test' is not a posture", 2),
        (("mine", *GIVEN, "--ctx", "2k,4k"), "is not a token count", 2),
        (("mine", *GIVEN, "--ctx", "9m"), "beyond qwen3-8b's context", 2),
        (("mine", *GIVEN, "--model", "no-such-model"), "no-such-model", 2),
        (("mine", *GIVEN, "--region", "atlantis"), "not a region", 2),
        (("mine", *GIVEN, "--region", " , "), "regions", 2),
        (("mine", *GIVEN, "--email", "nobody"), "alert_emails", 2),
        (("mine", *GIVEN, "--admin-group", "admins"), "admin_group_object_ids", 2),
        (("mine", *GIVEN, "--serve-hours", "often"), "is not a schedule", 2),
        (("mine", *GIVEN, "--max-price-age", "1"), "run `planner prices refresh`", 2),
        (("mine", *GIVEN, "--model", "llama-3.1-405b", "--task", "finetune"), "no plan fits the intent", 1),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(argv: tuple[str, ...], words: str, code: int) -> None:
    assert words in refused(*argv, code=code)


def test_a_stack_that_is_there_stays() -> None:
    text = made(*GIVEN)
    assert "is there already: edit it and run planner plan --stack mine" in refused("mine", *GIVEN)
    assert FILE.read_text(encoding="utf-8") == text


def test_a_folder_without_a_project_is_refused(tmp_path: Path) -> None:
    Path("Pulumi.yaml").unlink()
    assert "there is no Pulumi.yaml here: run planner new in the project's folder" in refused("mine", *GIVEN)


class Keyboard(io.StringIO):
    """Somebody who types these lines at a terminal."""

    def isatty(self) -> bool:
        return True


def test_at_a_terminal_what_is_missing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(question: str, default: Any, err: bool) -> str:
        assert err  # stdout holds the answer alone
        asked.append((question.split(" ")[0], default))
        return {"Context": "4k", "What": "serve", "USD": "900"}.get(question.split(" ")[0], default)

    monkeypatch.setattr("typer.prompt", answer)
    monkeypatch.setattr(sys, "stdin", Keyboard())
    made("--model", "qwen3-8b", "--posture", "dev", "--serve-hours", "60h")
    assert asked == [("Context", None), ("What", "both"), ("Azure", "eastus"), ("USD", None)]
    intent = read_intent("mine")
    assert [(w.kind, w.context) for w in intent.workloads] == [("serve", 4096)]
    assert intent.regions == ("eastus",)


def test_at_a_terminal_nothing_is_asked_when_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("typer.prompt")
    monkeypatch.setattr(sys, "stdin", Keyboard())
    made(*GIVEN)


def test_the_real_questions_can_be_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.setattr("planner.new._at_a_terminal", lambda: True)
    result = CliRunner().invoke(app, ["new", "mine", "--serve-hours", "60h"], input="qwen3-8b\n8k\nserve\n\n\n900\n")
    assert result.exit_code == 0, result.output
    assert read_intent("mine").approved_usd_per_month == Decimal(900)
