"""plan, budget, prices and compare as commands: exit codes, files whole or not at all, one sentence a refusal."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import golden
import pytest
from retail_server import GOOD, RetailServer

from planner.budget import Budget
from planner.catalog.prices import cached_sheets, load_sheet
from planner.plan import Plan

ROOT = Path(__file__).parents[2]
PLAN = ("plan", "--model", "qwen3-8b", "--ctx", "8k", "--serve-hours", "60h")
SCENARIO = ("budget", "--scenario", "dev-32k")
DAY = 86_400
TODAY = 1_795_305_600  # 2026-11-22


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TONNAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(TODAY))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(ROOT)


def refused(*argv: str, code: int = 2) -> str:
    """The last sentence on stderr of a command that ends with that code."""
    outcome = golden.run(argv)
    assert outcome.exit_code == code, outcome
    assert "Traceback" not in outcome.stderr
    assert all(line.startswith("planner: ") for line in outcome.stderr.splitlines())
    return outcome.stderr.splitlines()[-1].removeprefix("planner: ")


# ------------------------------------------------------------------------------------------------------------ plan


def test_a_plan_as_json_is_the_plan() -> None:
    outcome = golden.run((*PLAN, "--json"))
    plan = Plan.model_validate_json(outcome.stdout)
    assert json.loads(outcome.stdout)["schema_version"] == "tonnage.plan/1"
    assert plan.usd == sum((line.usd for line in plan.lines if line.usd is not None), Decimal(0))


def test_a_plan_above_the_approved_amount_is_printed_and_ends_with_exit_code_1() -> None:
    outcome = golden.run((*PLAN, "--approved", "10"))
    assert outcome.exit_code == 1
    assert "a month" in outcome.stdout
    assert outcome.stderr.splitlines()[-1].endswith("$10.00 is approved: raise the approval or change the intent")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("plan",), "give --stack, or --model and --ctx"),
        (("plan", "--model", "qwen3-8b"), "give --stack, or --model and --ctx"),
        (("plan", "--stack", "no-such"), "choose one of dev-2k"),
        (("plan", "--stack", "dev-2k", "--no-spot"), "drop --spot"),
        ((*PLAN, "--quota", "F=\u00b2"), "is not a quota"),
        ((*PLAN, "--prices", "~nosuchuser/x"), "is not a price sheet"),
        ((*PLAN, "--prices", "x" * 5000), "is not a price sheet"),
        (("plan", "--stack", "dev-2k", "--model", "qwen3-8b"), "the intent of stack dev-2k decides that: drop --model"),
        ((*PLAN, "--region", "atlantis"), "not a region in the price sheet"),
        ((*PLAN, "--quota", "nonsense"), "is not a quota"),
        ((*PLAN, "--commitment", "for-ever"), "commitments"),
        ((*PLAN, "--sku", "NC1"), "not an Azure GPU size"),
        ((*PLAN, "--prices", "no-such"), "is not a price sheet"),
        ((*PLAN, "--approved", "much"), "approved_usd_per_month"),
        (("plan", "--model", "qwen3-8b", "--ctx", "8k", "--serve-hours", "often"), "is not a schedule"),
        (("plan", "--model", "qwen3-8b", "--ctx", "0"), "context"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_sentence(argv: tuple[str, ...], words: str) -> None:
    assert words in refused(*argv)


def test_several_contexts_are_checked_like_one() -> None:
    several = ("plan", "--model", "qwen3-8b", "--ctx", "2k,4k")
    assert "max-price-age" in refused(*several, "--max-price-age", "1")
    outcome = golden.run((*several, "--approved", "1"))
    assert outcome.exit_code == 1
    assert "157 days old" in outcome.stderr


@pytest.mark.parametrize("argv", [("plan", "--stack", "dev-32k"), ("prices",), (*PLAN, "--json")])
def test_a_reader_who_has_seen_enough_is_no_failure(argv: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "planner", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdout is not None
        running.stdout.close()
        assert running.wait() == 0


def test_a_full_disk_is_one_sentence() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        command = [sys.executable, "-m", "planner", "prices"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("planner: the output cannot be written")
    assert done.stderr.count("\n") == 1


def test_what_no_size_holds_ends_with_exit_code_1() -> None:
    sentence = refused("plan", "--model", "llama-3.3-70b", "--ctx", "8k", "--sku", "NC4as_T4_v3", code=1)
    assert "fits on no size that is allowed" in sentence


# ---------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("form", ["md", "html", "json", "csv"])
def test_the_format_follows_the_files_name_or_the_option(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"budget.{form}"
    outcome = golden.run((*SCENARIO, "-o", str(path)))
    assert outcome.exit_code == 0
    assert outcome.stdout == ""
    assert f"wrote {path}: 250 USD a month requested" in outcome.stderr
    assert path.read_text(encoding="utf-8") == golden.run((*SCENARIO, "--format", form)).stdout
    assert list(tmp_path.glob("*.tmp")) == list(tmp_path.glob(".*.tmp")) == []


def test_the_same_question_gives_the_same_bytes() -> None:
    assert golden.run((*SCENARIO, "--format", "html")).stdout == golden.run((*SCENARIO, "--format", "html")).stdout


def test_the_csv_adds_up_to_the_json() -> None:
    made = Budget.model_validate_json(golden.run((*SCENARIO, "--format", "json")).stdout)
    rows = list(csv.DictReader(io.StringIO(golden.run((*SCENARIO, "--format", "csv")).stdout)))
    assert sum(Decimal(row["BilledCost"]) for row in rows if row["BilledCost"]) == made.total


def test_a_budget_against_an_earlier_one_shows_the_variance(tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    golden.run(("budget", "--scenario", "dev-2k", "-o", str(before)))
    made = Budget.model_validate_json(golden.run((*SCENARIO, "--against", str(before), "--format", "json")).stdout)
    assert made.variance is not None
    assert made.variance.before_total == 118
    assert made.variance.after_total == made.total


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("budget",), "give --stack or --scenario"),
        (("budget", "--stack", "dev-2k", "--scenario", "dev-2k"), "give --stack or --scenario"),
        (("budget", "--scenario", "no-such"), "choose one of dev-2k"),
        ((*SCENARIO, "--currency", "XXX"), "no exchange rate"),
        ((*SCENARIO, "--region", "atlantis"), "not a region"),
        ((*SCENARIO, "--against", "/no/such.json"), "cannot be read"),
        ((*SCENARIO, "--against", "README.md"), "is not a budget"),
        ((*SCENARIO, "-o", "/no/such/folder/\0x.md"), "cannot be written"),
        ((*SCENARIO, "-o", "budget.docx"), "does not say a format"),
        ((*SCENARIO, "-o", "/proc/budget.md"), "cannot be written"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_and_nothing_is_written(argv: tuple[str, ...], words: str) -> None:
    assert words in refused(*argv)
    assert not (ROOT / "budget.docx").exists()


def test_a_budget_above_the_approved_amount_ends_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "stacks" / "Pulumi.dev-2k.yaml").read_text(encoding="utf-8")
    (tmp_path / "stacks").mkdir()
    stack = tmp_path / "stacks" / "Pulumi.dear.yaml"
    stack.write_text(text.replace("approved_usd_per_month: 600", "approved_usd_per_month: 60"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    outcome = golden.run(("budget", "--stack", "dear"))
    assert outcome.exit_code == 1
    assert "60" in outcome.stderr.splitlines()[-1]
    assert outcome.stdout.startswith("# ")


def test_another_currency_is_on_every_amount() -> None:
    dollars = Budget.model_validate_json(golden.run((*SCENARIO, "--format", "json")).stdout)
    euros = Budget.model_validate_json(golden.run((*SCENARIO, "--currency", "eur", "--format", "json")).stdout)
    # one USD is 0.8587 EUR: 81.45 x 0.8587 = 69.9
    assert euros.currency == "EUR"
    assert euros.lines[0].amount == 70
    assert euros.total < dollars.total


# ---------------------------------------------------------------------------------------------------------- prices


def test_prices_of_one_size_in_one_region() -> None:
    outcome = golden.run(("prices", "--sku", "nc24ads_a100_v4", "--region", "East US", "--json"))
    offers = {o["priority"]: o for o in json.loads(outcome.stdout)["offers"]}
    assert offers["on-demand"]["usd_per_hour"] == "3.673"
    assert offers["spot"]["usd_per_hour"] == "0.67877"
    assert offers["reserved-1y"]["provenance"]["estimate"]


def test_a_cpu_size_has_prices_too() -> None:
    assert golden.run(("prices", "--sku", "D4s_v5", "--region", "eastus")).exit_code == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("prices", "--sku", "NC999"), "not an Azure GPU size"),
        (("prices", "--region", "nowhere"), "not a region"),
        (("prices", "--sku", "ND128isr_GB300_v6"), "has no price for ND128isr_GB300_v6"),
        (("prices", "--prices", "/no/such/sheet.json"), "is not a price sheet"),
    ],
)
def test_prices_that_are_not_there_are_refused(argv: tuple[str, ...], words: str) -> None:
    assert words in refused(*argv)


# ------------------------------------------------------------------------------------------------------------- age


def at(day: int, *argv: str) -> tuple[int, str]:
    """Exit code and stderr of a command so many days after 2026-11-22."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(TODAY + day * DAY), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "planner", *argv], capture_output=True, text=True, env=environment, check=False
    )
    return done.returncode, done.stderr


def test_old_prices_warn_and_then_are_refused_unless_they_are_wanted() -> None:
    # the machines' prices are of 2026-06-18 and 2026-07-01: 157 days old on 2026-11-22
    code, said = at(0, *SCENARIO)
    assert (code, "up to 157 days old" in said) == (0, True)
    code, said = at(300, *SCENARIO)
    assert (code, "run `planner prices refresh`, or allow them with --max-price-age 457" in said) == (2, True)
    assert at(300, *SCENARIO, "--max-price-age", "457")[0] == 0
    assert at(300, *SCENARIO, "--prices", "2026-11")[0] == 0
    assert at(0, *SCENARIO, "--max-price-age", "100")[0] == 2


# --------------------------------------------------------------------------------------------------------- refresh


@pytest.fixture
def server() -> Iterator[RetailServer]:
    with RetailServer(GOOD) as running:
        yield running


def test_a_refresh_writes_a_sheet_that_is_used_from_then_on(server: RetailServer) -> None:
    before = load_sheet()
    assert before.path is None
    outcome = golden.run(("prices", "refresh", "--endpoint", server.url))
    assert outcome.exit_code == 0, outcome.stderr
    (path,) = cached_sheets()
    assert path.name == "2026-11-22.json"
    assert str(path.name) in outcome.stdout.replace("\n", "")
    assert load_sheet().path == path
    assert load_sheet("2026-11").path is None
    assert "prices changed" in outcome.stdout


def test_a_refresh_that_fails_keeps_the_old_sheet() -> None:
    sentence = refused("prices", "refresh", "--endpoint", "http://127.0.0.1:9")
    assert "the price sheet in use stays as it is" in sentence
    assert cached_sheets() == ()


def test_a_broken_sheet_in_the_cache_is_named_and_a_refresh_replaces_it(server: RetailServer, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "prices"
    folder.mkdir(parents=True)
    (folder / "2026-11-20.json").write_text('{"schema_version": "tonn', encoding="utf-8")
    sentence = refused(*SCENARIO)
    assert "2026-11-20.json is not a price sheet" in sentence
    assert "planner prices refresh" in sentence
    assert golden.run((*SCENARIO, "--prices", "2026-11")).exit_code == 0
    outcome = golden.run(("prices", "refresh", "--endpoint", server.url))
    assert outcome.exit_code == 0, outcome.stderr
    assert golden.run(SCENARIO).exit_code == 0


def test_an_older_refreshed_sheet_gives_way_to_a_newer_bundled_one(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "prices"
    folder.mkdir(parents=True)
    old = (ROOT / "planner" / "catalog" / "prices" / "2026-01-reference.json").read_text(encoding="utf-8")
    (folder / "2026-05-01.json").write_text(old, encoding="utf-8")
    assert load_sheet().name == "2026-11"


@pytest.mark.parametrize("epoch", ["soon", "99999999999999", "-1"])
def test_a_clock_that_is_set_to_nonsense_is_refused(epoch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert "SOURCE_DATE_EPOCH" in refused(*SCENARIO)


def test_a_link_and_a_device_stay_what_they_are(tmp_path: Path) -> None:
    target = tmp_path / "there.md"
    target.write_text("old", encoding="utf-8")
    link = tmp_path / "link.md"
    link.symlink_to(target)
    assert golden.run((*SCENARIO, "-o", str(link))).exit_code == 0
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8").startswith("# ")
    assert golden.run((*SCENARIO, "-o", "/dev/null", "--format", "md")).exit_code == 0
    assert Path("/dev/null").is_char_device()


def test_a_file_that_a_refresh_left_unfinished_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "prices"
    folder.mkdir(parents=True)
    (folder / ".2026-11-20.json.77.tmp").write_text("{", encoding="utf-8")
    assert golden.run(SCENARIO).exit_code == 0


# --------------------------------------------------------------------------------------------------------- compare


def test_the_arithmetic_of_make_or_buy_is_printed() -> None:
    outcome = golden.run(("compare", "--tokens-per-month", "700M", "--api", "5", "--server", "3500"), 160)
    assert "($3,500.00 + $0.00) / $5 a million / 30.42 days = 23.01 million tokens a day" in outcome.stdout
    assert outcome.stderr == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--api", "cheap"), "is not a token price"),
        (("--api", "1", "--server", "free"), "is not a number"),
        (("--api", "1", "--server", "0"), "cannot be compared"),
        (("--api", "1", "--tokens-per-second", "100"), "do not share one speed"),
        (("--api", "1", "--ctx", "2k,4k"), "for one context"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused(argv: tuple[str, ...], words: str) -> None:
    assert words in refused("compare", "--tokens-per-month", "1e9", *argv)
