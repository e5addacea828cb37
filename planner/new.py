"""`planner new`: a stack file with a commented intent and the plan that answers it, from options or from answers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.catalog import load_model
from planner.catalog.prices import load_sheet
from planner.errors import DoesNotFit, PlannerError
from planner.model import ModelSpec
from planner.money import check_age, lock_for
from planner.plan import make_plan, over_budget
from planner.plan.intent import region_names
from planner.plan.lock import Lock
from planner.report import put
from planner.stack import check_stack_name, intent_in, stack_path, with_lock, write_text
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


def new_stack(stack: str, options: Mapping[str, Any]) -> tuple[Path, Lock]:
    """Write stacks/Pulumi.STACK.yaml: its path and the plan in it.

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
    lock = lock_for(plan, intent)
    write_text(path, with_lock(text, lock, path))
    return path, lock


def emit_new(stack: str, path: Path, lock: Lock) -> None:
    """What was made, and what to run next."""
    assert lock.approved_usd_per_month is not None
    approved = format_usd(lock.approved_usd_per_month)
    lines = [f"{path}: {lock.region}, {format_usd(lock.usd)} a month of {approved} approved"]
    lines += [f"  {pool.name}: up to {pool.max_nodes} x {pool.sku}, {pool.priority}" for pool in lock.pools]
    lines += [
        f"Next: planner budget --stack {stack} -o budget.html",
        f"      planner preview --stack {stack}",
        f"      pulumi stack init {stack} && pulumi up --stack {stack}",
    ]
    put("".join(f"{line}\n" for line in lines))


def _answered(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, completed by asking where somebody can answer. PlannerError names what is missing."""
    missing = [name for name in REQUIRED if not options[name]]
    if missing and not _at_a_terminal():
        flags = ", ".join(f"--{name}" for name in missing)
        raise PlannerError(f"a new stack needs {flags}: add what is missing, or answer at a terminal")
    said = dict(options)
    if missing:
        import typer

        for name, question, default in QUESTIONS:
            if not options[name]:
                said[name] = str(typer.prompt(question, default=default, err=True)).strip()
    for name, default in (("task", "both"), ("posture", "dev"), ("region", "eastus")):
        said[name] = said[name] or default
    for name, allowed in (("task", ("serve", "finetune", "both")), ("posture", ("dev", "prod"))):
        if said[name] not in allowed:
            raise PlannerError(f"{said[name][:40]!r} is not a {name}: choose one of {', '.join(allowed)}")
    return said


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
    groups = ", ".join(map(_word, said["admin_group"] or ()))
    lines.append(
        f"    access: {{admin_group_object_ids: [{groups}]}}"
        if groups
        else "    # access: {admin_group_object_ids: [the Entra ID group that administers the cluster]}"
    )
    lines += [
        "    # what finance has signed: the amount of the stack's Azure Budget",
        f"    approved_usd_per_month: {_usd(said['approved'])}",
    ]
    return "\n".join(lines) + "\n"


def _word(text: str) -> str:
    """A text as YAML, in quotes where it could be read as something else."""
    text = text.strip()
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9/._-]*|[0-9]+h", text) and not re.fullmatch(
        "(?i:true|false|null|yes|no|on|off|y|n)", text
    )
    return text if plain else json.dumps(text, ensure_ascii=False)
