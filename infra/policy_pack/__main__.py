"""The rules of infra.policy as a CrossGuard pack: `pulumi up --policy-pack infra/policy_pack`.

A rule of high severity stops the update, the others warn. Intent and plan are those of the stack: from its config,
which Pulumi hands to a pack, else from its file in stacks/.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pulumi
from pulumi_policy import (
    EnforcementLevel,
    Policy,
    PolicyPack,
    PolicyResource,
    ReportViolation,
    Severity,
    StackValidationArgs,
    StackValidationPolicy,
    proxy,
)
from pulumi_policy.deserialize import serialize_properties

from infra.policy import RULES, SECRET, UNKNOWN, Context, Finding, Recorded, Rule, check
from planner.errors import PlannerError
from planner.plan import parse_intent
from planner.plan.lock import parse_lock
from planner.stack import INTENT_KEY, PLAN_KEY, read_intent, read_lock

ROOT = Path(__file__).resolve().parents[2]
UNKNOWNS = {value for name, value in vars(proxy).items() if name.startswith("UNKNOWN_") and name.endswith("_VALUE")}
SEVERITIES = {"high": Severity.HIGH, "medium": Severity.MEDIUM, "low": Severity.LOW}


def stack_of(resources: Sequence[PolicyResource]) -> str:
    """The stack's name, as every urn begins with it."""
    names = {resource.urn.split("::")[0].removeprefix("urn:pulumi:") for resource in resources}
    return names.pop() if len(names) == 1 else os.environ.get("PULUMI_STACK", "")


@cache
def context(stack: str) -> Context:
    """The stack's plan and intent. PlannerError when the pack can find neither, or they cannot be read."""
    config = pulumi.Config("tonnage")
    intent, plan = (config.get_object(key.partition(":")[2]) for key in (INTENT_KEY, PLAN_KEY))
    if intent is not None and plan is not None:
        return Context(parse_lock(plan, PLAN_KEY, stack), parse_intent(intent, INTENT_KEY), stack)
    return Context(read_lock(stack), read_intent(stack), stack)


def recorded(resource: PolicyResource) -> Recorded:
    """A resource as the rules take it. What was asked for counts before what Azure made of it, where both are told."""
    told = _plain(serialize_properties(resource.props))
    asked = told.pop("__inputs", None)
    inputs = {**told, **(asked if isinstance(asked, Mapping) else {})}
    for name in resource.opts.additional_secret_outputs:
        if isinstance(inputs.get(name), Mapping):  # a pack gets secrets in plain text
            inputs[name] = dict.fromkeys(inputs[name], SECRET)
    timeouts = resource.opts.custom_timeouts
    seconds = {
        "create": timeouts.create_seconds,
        "update": timeouts.update_seconds,
        "delete": timeouts.delete_seconds,
    }
    return Recorded(
        type=resource.resource_type,
        name=resource.name,
        urn=resource.urn,
        parent=resource.parent.urn if resource.parent else "",
        inputs=inputs,
        dependencies=tuple(one.urn for one in resource.dependencies),
        protect=resource.opts.protect,
        ignore_changes=tuple(resource.opts.ignore_changes),
        delete_before_replace=bool(resource.opts.delete_before_replace),
        timeouts={name: f"{value:g}s" for name, value in seconds.items() if value},
    )


def _plain(value: Any) -> Any:
    """Without the different signs that Pulumi has for unknowns of different types."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return UNKNOWN if isinstance(value, str) and value in UNKNOWNS else value


def findings(args: StackValidationArgs, rules: tuple[Rule, ...] = RULES) -> tuple[Finding, ...]:
    """What some rules find in a stack. PlannerError as context, and for an exception that names no rule."""
    resources = [recorded(one) for one in args.resources]
    if any(one.type.startswith("kubernetes:") and not one.inputs for one in resources):
        rules = tuple(rule for rule in rules if not _reads_objects(rule))
    return check(resources, context(stack_of(args.resources)), rules)


def _reads_objects(rule: Rule) -> bool:
    """Whether a rule judges by Kubernetes objects: the engine shows a pack nothing of them before there is a cluster.

    `planner preview` judges them all the same, and the engine once the cluster is made.
    """
    return rule.area == "objects" or rule.name in ("subject-exists", "account-is-federated", "pod-has-identity")


def policy(rule: Rule) -> Policy:
    """A rule as a policy of its own, so that its name and its level are told with what it finds."""

    def validate(args: StackValidationArgs, report: ReportViolation) -> None:
        try:
            found = findings(args, (rule,))
        except PlannerError:
            return  # the first policy of the pack says so, once
        for one in found:
            if not one.excused:
                report(one.sentence, one.urn or None)

    return StackValidationPolicy(
        name=rule.name,
        description=f"{rule.what[:1].upper()}{rule.what[1:]}.",
        validate=validate,
        enforcement_level=EnforcementLevel.MANDATORY if rule.severity == "high" else EnforcementLevel.ADVISORY,
        severity=SEVERITIES[rule.severity],
        tags=list(rule.answers),
    )


def _readable(args: StackValidationArgs, report: ReportViolation) -> None:
    try:
        findings(args, ())
    except PlannerError as error:
        report(str(error), None)


def _excused(args: StackValidationArgs, report: ReportViolation) -> None:
    """One line for all that is excused, one for each exception that excuses nothing."""
    try:
        found = findings(args)
    except PlannerError:
        return
    rules = sorted({one.rule for one in found if one.excused})
    if rules:
        told = ", ".join(rules)
        report(f"excused with a reason, which `planner preview` shows: {told}", None)
    for one in found:
        if one.severity == "note":
            report(one.sentence, None)


def policies() -> Iterator[Policy]:
    """The pack: whether the plan can be read, a policy for each rule, and what is excused."""
    yield StackValidationPolicy(
        name="plan-readable",
        description="The rules know the stack's intent and its plan.",
        validate=_readable,
        enforcement_level=EnforcementLevel.MANDATORY,
    )
    yield from map(policy, RULES)
    yield StackValidationPolicy(
        name="excused",
        description="What is excused is told.",
        validate=_excused,
        enforcement_level=EnforcementLevel.ADVISORY,
    )


if __name__ == "__main__":
    os.chdir(ROOT)  # where planner.stack looks for stack files
    PolicyPack("tonnage", list(policies()))  # serves until it is ended
