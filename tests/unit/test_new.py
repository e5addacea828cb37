"""`planner new`: a stack file that reads like the shipped ones, and nothing written when anything is wrong."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import golden
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from planner import new
from planner.cli import app
from planner.errors import PlannerError
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
    assert lines[-7:] == [
        "Next: say in stacks/Pulumi.mine.yaml which addresses may call the cluster's API (access), or why all may"
        " (exceptions)",
        "      planner plan --stack mine",
        "      planner budget --stack mine -o budget.html",
        "      planner preview --stack mine",
        "      pulumi stack init mine",
        '      pulumi config set --secret tonnage:apiKey "$(openssl rand -hex 32)" --stack mine',
        "      pulumi up --stack mine",
    ]


def test_who_may_call_the_api_is_in_the_intent_and_then_no_next_step() -> None:
    ranges = ("--ip-range", "203.0.113.0/24", "--ip-range", "198.51.100.7/32")
    outcome = golden.run(("new", "mine", *GIVEN, *ranges, "--task", "finetune"))
    assert [line.removeprefix("Next:").strip() for line in outcome.stdout.splitlines()[2:]] == [
        "planner budget --stack mine -o budget.html",
        "planner preview --stack mine",
        "pulumi stack init mine",
        "pulumi up --stack mine",  # training has no key for callers
    ]
    assert [str(part) for part in read_intent("mine").access.authorized_ip_ranges] == [
        "203.0.113.0/24",
        "198.51.100.7/32",
    ]
    assert "api-addresses" not in FILE.read_text(encoding="utf-8")


def test_the_command_for_the_key_is_the_one_that_the_program_asks_for() -> None:
    pytest.importorskip("pulumi")
    from infra.settings import needed_secrets

    made(*GIVEN)
    assert needed_secrets(read_lock("mine")) == {
        "apiKey": 'pulumi config set --secret tonnage:apiKey "$(openssl rand -hex 32)"'
    }


def test_what_has_no_price_makes_the_cost_a_lower_bound() -> None:
    made(*GIVEN)
    lock = read_lock("mine")
    known = new.NewStack(FILE, read_intent("mine"), lock)
    unpriced = known._replace(lock=lock.model_copy(update={"lines_usd": {"gpu/serve": None}}))
    for stack, words in ((known, f"eastus, ${lock.usd} a month"), (unpriced, f"eastus, at least ${lock.usd} a month")):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            new.emit_new("mine", stack)
        assert words in said.getvalue()


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
    intent = intent.replace("# settings", "settings").replace("# access", "access")
    intent = intent.replace("# exceptions", "exceptions")
    FILE.write_text(intent + text[plan:], encoding="utf-8")
    taken = read_intent("mine")
    assert taken.take_turns
    assert taken.storage.dataset_gb == 200
    assert taken.developers.count == 2
    assert taken.alert_emails == ("platform@example.com",)
    assert taken.workloads[1].settings == {"quantization": "awq"}
    assert [str(part) for part in taken.access.authorized_ip_ranges] == ["203.0.113.0/24"]
    assert taken.exceptions == {"api-addresses": "why every address may call"}


def test_production_may_take_zones_from_a_comment_and_has_no_addresses_to_name() -> None:
    text = made("--model", "qwen3-8b", "--ctx", "4k", "--approved", "9000", "--posture", "prod")
    assert "authorized_ip_ranges" not in text
    assert "api-addresses" not in text
    FILE.write_text(text.replace("# cluster: {zones", "cluster: {zones"), encoding="utf-8")
    assert read_intent("mine").cluster.zones == ("1", "2", "3")


@pytest.mark.parametrize("group", [(), ("--admin-group", "00000000-0000-0000-0000-000000000001")])
@pytest.mark.parametrize("addresses", [(), ("--ip-range", "203.0.113.0/24")])
@pytest.mark.parametrize("posture", ["dev", "prod"])
def test_who_may_do_what_is_one_part_of_the_intent(
    posture: str, addresses: tuple[str, ...], group: tuple[str, ...]
) -> None:
    text = made(
        *("--model", "qwen3-8b", "--ctx", "4k", "--approved", "9000", "--posture", posture, "--task", "serve"),
        *(*addresses, *group),
    )
    access = read_intent("mine").access
    assert len(access.authorized_ip_ranges) == len(addresses) // 2
    assert len(access.admin_group_object_ids) == len(group) // 2
    assert text.count("access:") == 1
    assert max(map(len, text.splitlines())) <= 120


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
        (("mine", *GIVEN, "--ctx", "9m"), "beyond qwen3-8b's context of 40,960: write fewer, or choose a model", 2),
        (("mine", *GIVEN, "--model", "no-such-model"), "no-such-model", 2),
        (("mine", *GIVEN, "--region", "atlantis"), "not a region", 2),
        (("mine", *GIVEN, "--region", " , "), "--region is empty: leave it out for eastus", 2),
        (("mine", *GIVEN, "--region", ""), "--region is empty: leave it out for eastus", 2),
        (("mine", *GIVEN, "--model", ""), "--model is empty: write what is meant", 2),
        (("mine", *GIVEN, "--ctx", "0"), "a context of 0 tokens holds nothing", 2),
        (("mine", *GIVEN, "--ip-range", "office"), "write a range of addresses such as 203.0.113.0/24", 2),
        (("mine", *GIVEN, "--email", "nobody"), "write an address such as a@b.com", 2),
        (("mine", *GIVEN, "--admin-group", "admins"), "write an Entra ID object id such as", 2),
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

    def answer(question: str, default: Any, show_default: bool, err: bool) -> str:
        assert err  # stdout holds the answer alone
        asked.append((question.split(" ")[0], default))
        return {"Context": "4k", "What": "serve", "USD": "900"}.get(question.split(" ")[0], default)

    monkeypatch.setattr("typer.prompt", answer)
    monkeypatch.setattr(sys, "stdin", Keyboard())
    made("--model", "qwen3-8b", "--posture", "dev", "--serve-hours", "60h")
    assert asked == [
        *(("Context", None), ("What", "both"), ("Azure", "eastus"), ("USD", None)),
        *(("Addresses", ""), ("Why", "")),
    ]
    intent = read_intent("mine")
    assert [(w.kind, w.context) for w in intent.workloads] == [("serve", 4096)]
    assert intent.regions == ("eastus",)


def test_at_a_terminal_nothing_is_asked_when_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("typer.prompt")
    monkeypatch.setattr(sys, "stdin", Keyboard())
    made(*GIVEN)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> Result:
    """`planner new mine` answered with these lines, after which the input ends."""
    monkeypatch.setattr("planner.new._at_a_terminal", lambda: True)
    return CliRunner().invoke(app, ["new", "mine", "--serve-hours", "60h"], input="".join(f"{n}\n" for n in lines))


def test_the_real_questions_can_be_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    result = typed(monkeypatch, "qwen3-8b", "8k", "serve", "", "", "900", "203.0.113.0/24, 198.51.100.7/32")
    assert result.exit_code == 0, result.output
    intent = read_intent("mine")
    assert intent.approved_usd_per_month == Decimal(900)
    assert len(intent.access.authorized_ip_ranges) == 2


def test_a_reason_in_place_of_addresses_becomes_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    result = typed(monkeypatch, "qwen3-8b", "8k", "serve", "", "", "900", "", "a lab: for #1 only")
    assert result.exit_code == 0, result.output
    assert read_intent("mine").exceptions == {"api-addresses": "a lab: for #1 only"}
    assert "which addresses may call" not in result.stdout[result.stdout.index("Next:") :]


def test_production_is_not_asked_for_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    result = typed(monkeypatch, "qwen3-8b", "8k", "serve", "prod", "", "9000")
    assert result.exit_code == 0, result.output


def test_a_wrong_answer_is_refused_at_once_and_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_and_right = (
        *("no-such-model", "qwen3-8b", "many", "9m", "8k", "play", "serve", "test", "dev", "atlantis", "eastus"),
        *("much", "0", "900", "office", "", "lab", "it is a lab"),
    )
    result = typed(monkeypatch, *wrong_and_right)
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "planner: " in line and "machine prices" not in line]
    assert len(told) == 10
    assert read_intent("mine").exceptions == {"api-addresses": "it is a lab"}


def test_who_ends_the_questions_gets_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    result = typed(monkeypatch, "qwen3-8b", "8k")  # then the input ends, as by Ctrl-D
    assert isinstance(result.exception, PlannerError)
    assert result.exception.exit_code == 2
    assert str(result.exception).startswith("nothing was written: answer the questions")
    assert not FILE.exists()
