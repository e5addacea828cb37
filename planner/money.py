"""What the money commands do between options and output: read the inputs, check prices' age, write files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

from planner.budget import Budget, BudgetLine, Money, finish, machine_price_age, read_budget
from planner.budget.of_plan import draft_of_plan
from planner.budget.of_scenario import draft_of_scenario, money_of
from planner.catalog.hardware import sku as gpu_size
from planner.catalog.hardware import skus
from planner.catalog.prices import DEFAULT, Offer, PriceSheet, load_sheet, today
from planner.catalog.scenarios import reference, scenario
from planner.compare import Comparison, compare, demand_of, parse_speeds, parse_usd, stated_server
from planner.cost.lines import Line
from planner.errors import DoesNotFit, PlannerError
from planner.files import write_atomically
from planner.plan import Intent, Plan, intents_from_options, make_plan, over_budget, parse_intent
from planner.plan.beside import Beside, beside_reference
from planner.plan.intent import ANY_REGION, region_names
from planner.plan.lock import Lock, check_lock, lock_of
from planner.report import money as report
from planner.report import put
from planner.stack import Written, read_intent, stack_path, write_lock

OLD_DAYS, LIMIT_DAYS = 45, 365
CHANGES_SHOWN = 12
Format = Literal["md", "html", "json", "csv"]


class Planned(NamedTuple):
    """Plans with what they answer; beside: for several contexts, in their place."""

    plans: tuple[Plan, ...]
    intents: tuple[Intent, ...]
    beside: tuple[Beside, ...] = ()
    stack: str | None = None


def plans(options: Mapping[str, Any]) -> Planned:
    """The plan of a stack or of the options; with several contexts, one a context beside the reference's choices."""
    _check_named(options)
    sheet = load_sheet(options["prices"])
    if options["stack"]:
        ignored = sorted(options["stated"] - {"stack", "prices", "max_price_age", "explain", "as_json", "dry_run"})
        if ignored:
            flag = ignored[0].replace("_", "-")
            raise PlannerError(f"the intent of stack {options['stack']} decides that: drop --{flag}, or edit it there")
    elif options["dry_run"]:
        raise PlannerError("without --stack nothing is written: drop --dry-run")
    intents = (read_intent(options["stack"]),) if options["stack"] else intents_from_options(options)
    if len(intents) > 1:
        rows = beside_reference(intents, sheet)
        made_plans = tuple(plan for _, plan in rows if plan is not None)
        check_age([line for plan in made_plans for line in plan.lines], sheet, options)
        return Planned(made_plans, intents, tuple(row for row, _ in rows))
    made = make_plan(intents[0], sheet)
    check_age(made.lines, sheet, options)
    return Planned((made,), intents, stack=options["stack"])


def _check_named(options: Mapping[str, Any]) -> None:
    """PlannerError for --stack and --region with nothing in them, such as a variable of a script that is not set."""
    for name, example in (("stack", "dev-32k"), ("region", "eastus")):
        if options.get(name) is not None and not options[name].strip(" ,"):
            raise PlannerError(f"--{name} is empty: write a name, such as --{name} {example}, or leave it out")


def emit_plans(done: Planned, *, as_json: bool, explain: bool) -> None:
    """The plan, or the table of contexts, on stdout."""
    if done.beside:
        report.emit_beside(done.beside, as_json=as_json)
        return
    for made in done.plans:
        report.emit_plan(made, stack=done.stack, as_json=as_json, explain=explain)


def check(done: Planned) -> None:
    """Exit code 1 for a plan above what was approved, or a context that nothing holds."""
    for row in done.beside:
        if row.usd_per_month is None:
            raise DoesNotFit(row.why)
    for made, intent in zip(done.plans, done.intents, strict=True):
        sentence = over_budget(made, intent)
        if sentence:
            kept = f"; {stack_path(done.stack)} keeps the plan it has" if done.stack else ""
            raise DoesNotFit(f"{sentence}{kept}")


def lock_plan(done: Planned, *, dry_run: bool) -> Written | None:
    """Write a stack's plan into its file when it may be applied, or could be once it is approved; else None.

    dry_run: write nothing, and say what would change. DoesNotFit for what `pulumi up` would refuse.
    """
    if done.stack is None or over_budget(done.plans[0], done.intents[0]):
        return None
    lock = lock_for(done.plans[0], done.intents[0], done.stack.strip())
    _check_recipes(lock)
    return write_lock(done.stack, lock, dry_run=dry_run)


def _check_recipes(lock: Lock) -> None:
    """PlannerError for a recipe that the fine-tuning program refuses.

    What it does not train at all is told and may be planned: another trainer does.
    """
    from workloads.finetune.from_plan import NotTrained
    from workloads.training import planned_runs

    for workload in lock.workloads:
        if workload.task == "finetune":
            try:
                planned_runs(lock, workload)
            except NotTrained as error:
                print(f"planner: {error}; `pulumi up` refuses this plan until then", file=sys.stderr)


def lock_for(plan: Plan, intent: Intent, stack: str) -> Lock:
    """The lock of a plan that `pulumi up` would take, once it is approved. DoesNotFit as check_lock."""
    lock = lock_of(plan, intent)
    if intent.approved_usd_per_month is not None:  # finance may sign after it has seen the plan
        check_lock(lock, intent, "the plan", stack)
    return lock


def emit_written(done: Planned, written: Written | None, *, as_json: bool, dry_run: bool) -> None:
    """What changed in the stack file: after the plan on stdout, or beside its JSON on stderr.

    All of it where nothing is written, and no diff of git can show the rest.
    """
    if written is None:
        return
    shown = written.changes if dry_run else written.changes[:CHANGES_SHOWN]
    rest = len(written.changes) - len(shown)
    verb = "would be written" if dry_run else "is written"
    lines = [f"{written.path}: the plan {verb if written.changes else 'is current, nothing changed'}"]
    lines += [f"  {line}" for line in shown]
    lines += [f"  and {rest} more, in `git diff {written.path}`"] if rest > 0 else []
    if done.intents[0].approved_usd_per_month is None:
        lines.append("nothing is approved yet: `pulumi up` waits for approved_usd_per_month in the intent")
    text = "".join(f"{line}\n" for line in lines)
    if as_json:
        sys.stderr.write(text)
    else:
        put(text)


def check_age(lines: Sequence[Line | BudgetLine], sheet: PriceSheet, options: Mapping[str, Any]) -> None:
    """Warns of machine prices older than 45 days; refuses those beyond the limit, unless the sheet was named."""
    age = machine_price_age(lines, today())
    named, limit = options["prices"] is not None, options["max_price_age"]
    if age > (LIMIT_DAYS if limit is None else limit) and (limit is not None or not named):
        raise PlannerError(
            f"machine prices in the sheet {sheet.name} are up to {age} days old: run `planner prices refresh`, or allow"
            f" them with --max-price-age {age}"
        )
    if age > OLD_DAYS:
        print(
            f"planner: machine prices in the sheet {sheet.name} are up to {age} days old;"
            " `planner prices refresh` reads today's",
            file=sys.stderr,
        )


def budget(options: Mapping[str, Any]) -> Budget:
    """The budget of a stack or a scenario, against an earlier one where that is named.

    A scenario with other prices than its reference's is shown against that reference.
    """
    _check_named(options)
    if bool(options["stack"]) == bool(options["scenario"]):
        raise PlannerError("a budget is of one thing: give --stack or --scenario")
    sheet, day = load_sheet(options["prices"]), today()
    earlier = _earlier(options["against"])
    wanted = options["currency"].strip().upper()
    money = Money(currency=wanted, rate=sheet.exchange_rate(wanted))
    if options["scenario"]:
        made = scenario_budget(options["scenario"], sheet, money, day, options["region"], earlier)
        check_age(made.lines, sheet, options)
        return made
    intent = read_intent(options["stack"])
    if options["region"]:
        wanted_region = options["region"].strip()
        place = wanted_region if wanted_region == ANY_REGION else sheet.region(wanted_region)
        intent = intent.model_copy(update={"regions": (place,)})
    plan = make_plan(intent, sheet)
    check_age(plan.lines, sheet, options)
    money = money.model_copy(update={"rounding": money.rounding.model_copy(update={"request_to": intent.request_to})})
    return finish(draft_of_plan(options["stack"], intent, plan, sheet), sheet, money, day, earlier)


def scenario_budget(
    name: str, sheet: PriceSheet, money: Money, day: date, region: str | None = None, earlier: Budget | None = None
) -> Budget:
    """A scenario's budget; where no earlier one is given, against the reference's own prices."""
    wanted = scenario(name)
    money = money_of(wanted, money)
    published = reference()
    if earlier is None and sheet.name != published.sheet:
        known = load_sheet(published.sheet)
        earlier = finish(draft_of_scenario(wanted, known), known, money, published.as_of)
    return finish(draft_of_scenario(wanted, sheet, region), sheet, money, day, earlier)


def _earlier(path: str | None) -> Budget | None:
    if path is None:
        return None
    try:
        return read_budget(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise PlannerError(f"the earlier budget {path} cannot be read ({reason}): give one that -o wrote") from error


def emit_budget(made: Budget, output: str | None, form: Format | None) -> None:
    """The budget on stdout or, whole or not at all, in a file, whose name may say the format."""
    from planner import pages

    renderers: dict[str, Callable[[Budget], str]] = {
        "md": pages.budget_markdown,
        "html": pages.budget_html,
        "json": pages.budget_json,
        "csv": pages.budget_csv,
    }
    ending = Path(output).suffix.lower().lstrip(".") if output else ""
    ending = {"markdown": "md", "htm": "html"}.get(ending, ending)
    chosen = form or (ending if ending in renderers else None) or ("md" if output is None else None)
    if chosen is None:
        raise PlannerError(f"the name {output} does not say a format: end it in .md, .html, .json or .csv, or --format")
    text = renderers[chosen](made)
    if output is None:
        put(text)
        return
    try:
        write_atomically(Path(output), text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise PlannerError(f"{output!r} cannot be written ({reason}): choose another place with -o") from error
    print(f"wrote {output}: {made.requested:,} {made.currency} a month requested", file=sys.stderr)


def check_budget(made: Budget) -> None:
    """Exit code 1 for a budget above what was approved."""
    if made.over_approved:
        raise DoesNotFit(
            f"{made.name} costs {made.total:,} {made.currency} a month and {made.approved:,} is approved: raise"
            " approved_usd_per_month or change the intent"
        )


def emit_prices(sku: str | None, region: str | None, prices: str | None, *, as_json: bool) -> None:
    """Offers of one size everywhere, of one region, or of both; the first region's when nothing is named."""
    _check_named({"region": region})
    sheet = load_sheet(prices)
    where = sheet.region(region) if region else None
    if sku:
        name = _size_name(sku, sheet)
        names = [name]
        title = f"{name.removeprefix('Standard_')} by region"
    else:
        where = where or sheet.region("eastus")
        names = [size.name for size in skus()]
        title = f"GPU sizes in {where}"
    rows = []
    for name in names:
        by_region: dict[str, list[Offer]] = {}
        for offer in sheet.offers(name):
            if where is None or offer.region == where:
                by_region.setdefault(offer.region, []).append(offer)
        rows += sorted(by_region.values(), key=lambda row: (row[0].usd_per_hour, row[0].region))
    if not rows:
        why = sheet.unpriced.get(names[0], "") if sku else ""
        place = f" in {where}" if where else ""
        raise PlannerError(
            f"the price sheet {sheet.name} has no price for {sku or 'a GPU size'}{place}"
            f"{f' ({why})' if why else ''}: try another region, or `planner prices refresh`"
        )
    report.emit_prices(sheet, rows, title=title, as_json=as_json)


def _size_name(text: str, sheet: PriceSheet) -> str:
    """A GPU size of the catalog, or any size that the sheet prices. Raises PlannerError."""
    bare = text.strip().lower().removeprefix("standard_")
    found = next((name for name in sheet.skus() if name.lower().removeprefix("standard_") == bare), None)
    return found or gpu_size(text).name


def refresh(currency: str, endpoint: str) -> None:
    """Today's prices into the cache; the old sheet stays as it is when anything fails."""
    from planner.catalog.prices import retail

    try:
        base = load_sheet()
    except PlannerError as error:
        print(f"planner: {error}; the bundled sheet {DEFAULT} stands in for comparison", file=sys.stderr)
        base = load_sheet(DEFAULT)
    wanted = list(base.skus()) + [size.name for size in skus() if size.name not in base.skus()]
    with report.progress("reading prices") as advance:
        done = retail.fetch(base, skus=wanted, currency=currency, endpoint=endpoint, day=today(), progress=advance)
    path = retail.save(done.content)
    report.emit_refresh(path, done)


def comparison(options: Mapping[str, Any]) -> Comparison:
    """Make or buy, from the options of `planner compare`."""
    demand = demand_of(
        tokens_per_month=options["tokens_per_month"],
        input_share=options["input_share"],
        api=options["api"],
        utilization=options["utilization"],
    )
    _check_named(options)
    speeds = parse_speeds(options["tokens_per_second"] or ())
    if options["server"] is not None:
        return stated_server(demand, parse_usd(options["server"]), speeds.get(""))
    sheet = load_sheet(options["prices"])
    if "," in options["ctx"]:
        raise PlannerError("a comparison is for one context: write --ctx 8k")
    server = {"kind": "serve", "context": options["ctx"]}
    if options["quantization"]:
        server["settings"] = {"quantization": options["quantization"]}
    wanted = {
        "model": options["model"],
        "workloads": [server],
        "regions": region_names(options["region"]),
        "pricing": {"spot": options["spot"], "commitments": options["commitment"] or ()},
        "skus": options["sku"] or (),
    }
    intent = parse_intent(wanted, "the options")
    plan = make_plan(intent, sheet)
    check_age(plan.lines, sheet, options)
    return compare(demand, intent, plan, sheet, speeds)


def emit_comparison(made: Comparison, *, as_json: bool) -> None:
    report.emit_comparison(made, as_json=as_json)
