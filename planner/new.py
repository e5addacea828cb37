"""`planner new`: a stack file with a commented intent and the plan that answers it, from options or from answers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from decimal import Decimal
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NamedTuple

from planner.catalog import load_model
from planner.catalog.prices import load_sheet
from planner.errors import DoesNotFit, PlannerError
from planner.model import ModelSpec
from planner.money import check_age, lock_for
from planner.plan import Intent, make_plan, over_budget
from planner.plan.intent import ANY_REGION, region_names
from planner.plan.lock import Lock
from planner.report import put
from planner.stack import check_stack_name, intent_in, needed_secrets, stack_path, with_lock, write_text
from planner.units import format_usd, parse_tokens

# what must be said, and what is asked with it: option, question, answer when none is given
REQUIRED = ("model", "ctx", "approved")
QUESTIONS = (
    ("model", "Model (a catalog name of `planner models`, a folder or a hub id)", None),
    ("ctx", "Context in tokens, such as 8k", None),
    ("task", "What it is for: serve, finetune or both", "both"),
    ("posture", "How the cluster is built: dev or prod", "dev"),
    ("region", "Azure regions allowed, with commas, or any", "eastus"),
    ("approved", "USD a month that are approved", None),
)
ADDRESSES = "Addresses that may call the cluster's API (CIDR, with commas; empty: any, with your reason)"
REASON = "Why every address may call it (empty: to be filled in later)"
ALLOWED = {"task": ("serve", "finetune", "both"), "posture": ("dev", "prod")}


class NewStack(NamedTuple):
    """A stack file that was written, what it asks for, and the plan in it."""

    path: Path
    intent: Intent
    lock: Lock


def new_stack(stack: str, options: Mapping[str, Any]) -> NewStack:
    """Write stacks/Pulumi.STACK.yaml, from options and, at a terminal, from answers.

    PlannerError when the name or an answer is wrong, the stack exists, or this is not the project's folder;
    DoesNotFit when nothing holds the workloads or the plan is above what is approved. Then nothing is written.
    """
    path = stack_path(check_stack_name(stack))
    if not Path("Pulumi.yaml").is_file():
        raise PlannerError("there is no Pulumi.yaml here: run planner new in the project's folder")
    if path.exists() or path.is_symlink():
        raise PlannerError(f"{path} is there already: edit it and run planner plan --stack {stack}, or choose a name")
    said = _answered(options)
    text = _stack_text(stack, load_model(said["model"]), said)
    intent = intent_in(text, path)
    sheet = load_sheet(said["prices"])
    plan = make_plan(intent, sheet)
    check_age(plan.lines, sheet, said)
    sentence = over_budget(plan, intent)
    if sentence:
        raise DoesNotFit(sentence)
    lock = lock_for(plan, intent, stack)
    write_text(path, with_lock(text, lock, path))
    return NewStack(path, intent, lock)


def emit_new(stack: str, made: NewStack) -> None:
    """What was made, and what to run next."""
    lock = made.lock
    assert lock.approved_usd_per_month is not None
    at_least = "at least " if None in lock.lines_usd.values() else ""
    approved = format_usd(lock.approved_usd_per_month)
    lines = [f"{made.path}: {lock.region}, {at_least}{format_usd(lock.usd)} a month of {approved} approved"]
    lines += [f"  {pool.name}: up to {pool.max_nodes} x {pool.sku}, {pool.priority}" for pool in lock.pools]
    steps = [
        f"planner budget --stack {stack} -o budget.html",
        f"planner preview --stack {stack}",
        f"pulumi stack init {stack}",
        f"pulumi up --stack {stack}",
    ]
    steps[-1:-1] = [f"{command} --stack {stack}" for command in needed_secrets(lock).values()]
    if not (lock.around.private_cluster or made.intent.access.authorized_ip_ranges or made.intent.exceptions):
        steps[:0] = [
            f"say in {made.path} which addresses may call the cluster's API (access), or why all may (exceptions)",
            f"planner plan --stack {stack}",
        ]
    lines += [f"{'      ' if number else 'Next: '}{step}" for number, step in enumerate(steps)]
    put("".join(f"{line}\n" for line in lines))


def _answered(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, completed by asking where somebody can answer. PlannerError names what is missing."""
    for name, _, default in QUESTIONS:
        if options[name] is not None and not options[name].strip(" ,"):
            instead = f"leave it out for {default}" if default else "write what is meant"
            raise PlannerError(f"--{name} is empty: {instead}")
    missing = [name for name in REQUIRED if options[name] is None]
    if missing and not _at_a_terminal():
        flags = ", ".join(f"--{name}" for name in missing)
        raise PlannerError(f"a new stack needs {flags}: add what is missing, or answer at a terminal")
    said = {**options, "reason": ""}
    if missing:
        for name, question, default in QUESTIONS:
            if said[name] is None:
                said[name] = _asked(name, question, default, said)
        if said["posture"] == "dev" and not said["ip_range"]:
            said["ip_range"] = region_names(_asked("ip_range", ADDRESSES, "", said))
            said["reason"] = "" if said["ip_range"] else _asked("reason", REASON, "", said)
    for name, default in (("task", "both"), ("posture", "dev"), ("region", "eastus")):
        said[name] = said[name] or default
    for name in ("task", "posture", "ctx"):
        _check(name, said[name], said)
    return said


def _asked(name: str, question: str, default: str | None, said: Mapping[str, Any]) -> str:
    """An answer that is right by itself: others are refused at once, and asked for again."""
    import typer

    while True:
        try:
            answer = str(typer.prompt(question, default=default, show_default=bool(default), err=True)).strip()
        except typer.Abort as error:
            raise PlannerError(
                "nothing was written: answer the questions to the end, or give the answers as options"
            ) from error
        try:
            _check(name, answer, said)
        except PlannerError as error:
            print(f"planner: {error}", file=sys.stderr)
        else:
            return answer


def _check(name: str, answer: str, said: Mapping[str, Any]) -> None:
    """PlannerError for an answer that is wrong, whatever the others are. said: what is known before it."""
    if name == "model":
        load_model(answer)
    elif name == "ctx":
        spec, context = load_model(said["model"]), parse_tokens(answer)
        if not context:
            raise PlannerError("a context of 0 tokens holds nothing: write a number such as 8k")
        if context > spec.max_context:
            raise PlannerError(
                f"{context:,} tokens are beyond {spec.name}'s context of {spec.max_context:,}: write fewer, or choose a"
                " model that holds more (`planner models --min-context`)"
            )
    elif name in ALLOWED and answer not in ALLOWED[name]:
        raise PlannerError(f"{answer[:40]!r} is not a {name}: choose one of {', '.join(ALLOWED[name])}")
    elif name == "region":
        names = region_names(answer)
        if not names:
            raise PlannerError("no region is named: write one such as eastus, or any")
        if names != [ANY_REGION]:
            sheet = load_sheet(said["prices"])
            for region in names:
                sheet.region(region)
    elif name == "approved" and not Decimal(_usd(answer)):
        raise PlannerError("nothing can be bought for 0: write USD a month, such as 600")
    elif name == "reason" and len(answer.split()) == 1:
        raise PlannerError("one word is no reason: write it in two words or more, or nothing")
    elif name == "ip_range":
        for part in region_names(answer):
            try:
                ip_network(part)
            except ValueError as error:
                raise PlannerError(
                    f"{part[:40]!r} is no range of addresses: write one such as 203.0.113.0/24"
                ) from error


def _at_a_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _usd(text: str) -> str:
    amount = text.strip().removeprefix("$").replace(",", "")
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,2})?", amount):
        raise PlannerError(f"{text[:40]!r} is not an amount: write USD a month, such as 600")
    return amount


def _stack_text(stack: str, spec: ModelSpec, said: Mapping[str, Any]) -> str:
    """The stack file without its plan: what was asked, and comments that say what else can be."""
    context = parse_tokens(said["ctx"])
    prod, both = said["posture"] == "prod", said["task"] == "both"
    verb = {"serve": "serving", "finetune": "fine-tuning", "both": "fine-tuning and serving"}[said["task"]]
    place = "Production" if prod else "Development"
    spot = "true" if said["spot"] else "false"
    pricing = f"{{spot: {spot}, fallback_on_demand: true}}" if prod and said["spot"] else f"{{spot: {spot}}}"
    lines = [
        f"# {place}: {verb} of {spec.name} at {context:,} tokens.",
        f"# What you edit is tonnage:intent; `planner plan --stack {stack}` writes tonnage:plan, which `pulumi up`"
        " follows.",
        f"# `planner budget --stack {stack}` is the page for finance, `planner preview --stack {stack}` what would be"
        " made.",
        "config:",
        "  tonnage:intent:",
        f"    model: {_word(said['model'])}",
        f"    posture: {said['posture']} # dev, or prod: private network, three system nodes, Defender",
        f"    regions: [{', '.join(map(_word, region_names(said['region'])))}]",
        "    workloads:",
    ]
    if said["task"] != "serve":
        lines += [
            "      - kind: finetune",
            f"        context: {context}",
            "        method: qlora # or full, lora, dora, qdora",
            f"        schedule: {_word(said['finetune_hours'])} # hours of training a month, or windows",
            "        # recipe: {epochs: 3, learning_rate: 1.0e-4} # what no plan decides: docs/finetune.md",
        ]
    if said["task"] != "finetune":
        lines += [
            "      - kind: serve",
            f"        context: {context}",
            "        concurrency: 1 # sequences at the full context at once",
            f"        schedule: {_word(said['serve_hours'])} # always, 60h a month, or mon-fri 08:00-18:00",
            "        # settings: {quantization: awq}",
        ]
    if both:
        lines.append("    # take_turns: true # when the two never run at the same time, they may share machines")
    lines += [
        f"    pricing: {pricing}",
        "    # storage: {dataset_gb: 200}",
        "    # developers: {count: 2, schedule: 200h}",
    ]
    emails = ", ".join(map(_word, said["email"] or ()))
    lines.append(f"    alert_emails: [{emails}]" if emails else "    # alert_emails: [platform@example.com]")
    lines += _access_lines(said)
    if prod:
        lines.append('    # cluster: {zones: ["1", "2", "3"]} # where the region has them')
    lines += [
        "    # what finance has signed: the amount of the stack's Azure Budget",
        f"    approved_usd_per_month: {_usd(said['approved'])}",
    ]
    return "\n".join(lines) + "\n"


def _access_lines(said: Mapping[str, Any]) -> list[str]:
    """Who administers the cluster and which addresses may call its API; in dev, why all may, where a person says so."""
    given = {
        "admin_group_object_ids": [_word(group) for group in said["admin_group"] or ()],
        "authorized_ip_ranges": [_word(part) for part in said["ip_range"] or ()],
    }
    examples = {"admin_group_object_ids": "an Entra ID group", "authorized_ip_ranges": "203.0.113.0/24"}
    if said["posture"] == "prod" and not given["authorized_ip_ranges"]:
        del examples["authorized_ip_ranges"]  # its API is inside the network
    stated = ", ".join(f"{key}: [{', '.join(words)}]" for key, words in given.items() if words)
    rest = [f"{key}: [{example}]" for key, example in examples.items() if not given[key]]
    if stated:
        lines = [f"    access: {{{stated}}}", *(f"    # beside it: {one}" for one in rest)]
    elif len(rest) == 1:
        lines = [f"    # access: {{{rest[0]}}}"]
    else:
        lines = [f"    # access: {{{rest[1]}}} # beside it: {rest[0]}"]
    if said["reason"]:
        lines.append(f"    exceptions: {{api-addresses: {json.dumps(said['reason'], ensure_ascii=False)}}}")
    elif said["posture"] == "dev" and not given["authorized_ip_ranges"]:
        lines.append("    # exceptions: {api-addresses: why every address may call}")
    return lines


def _word(text: str) -> str:
    """A text as YAML, in quotes where it could be read as something else."""
    text = text.strip()
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9/._-]*|[0-9]+h", text) and not re.fullmatch(
        "(?i:true|false|null|yes|no|on|off|y|n)", text
    )
    return text if plain else json.dumps(text, ensure_ascii=False)
