"""Policy: plain rules over the resources of a stack, used by the preview, the tests and the CrossGuard pack."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from infra.policy import cluster, identity, money, network, objects, pools, storage, vault
from infra.policy.excuses import EXCUSES, NOT_ASKED
from infra.policy.nouns import SECRET, UNKNOWN, Context, Finding, Recorded, Rule, Severity
from planner.errors import PlannerError

__all__ = ["RULES", "SECRET", "UNKNOWN", "Context", "Finding", "Recorded", "Rule", "Severity", "check", "policy_table"]

RULES: tuple[Rule, ...] = (
    *money.RULES,
    *identity.RULES,
    *network.RULES,
    *storage.RULES,
    *vault.RULES,
    *cluster.RULES,
    *pools.RULES,
    *objects.RULES,
)
_ORDER: tuple[Severity, ...] = ("high", "medium", "low", "note")


def check(resources: Sequence[Recorded], context: Context, rules: Sequence[Rule] = RULES) -> tuple[Finding, ...]:
    """What the rules find, worst first; what is excused after that, each with its reason, and notes last.

    An exception of the intent is named by a rule, or by rule/resource. PlannerError for one that names no rule.
    """
    _check_exceptions(context)
    used: set[str] = set()
    resources = [replace(one, inputs=_seen(one.inputs)) for one in resources]
    found = [finding for rule in rules for finding in _findings(rule, resources, context, used)]
    if rules is RULES:
        found += [
            Finding(
                name.partition("/")[0],
                name.partition("/")[2],
                "",
                f"the exception {name} excuses nothing: take it out of the intent",
                "note",
            )
            for name in context.intent.exceptions
            if name not in used
        ]
    return tuple(sorted(found, key=lambda f: (f.severity == "note", bool(f.excused), _ORDER.index(f.severity))))


def _seen(value: Any) -> Any:
    """Inputs without secrets: what they are is as good as unknown."""
    if isinstance(value, Mapping):
        return {key: _seen(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_seen(inner) for inner in value]
    return UNKNOWN if value == SECRET else value


def _check_exceptions(context: Context) -> None:
    names = [rule.name for rule in RULES]
    for name in context.intent.exceptions:
        if name.partition("/")[0] not in names:
            near = difflib.get_close_matches(name.partition("/")[0], names, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]}?" if near else "docs/policy.md lists them"
            raise PlannerError(f"the exception {name[:80]!r} of the intent names no rule of the policy: {hint}")


def _findings(rule: Rule, resources: Sequence[Recorded], context: Context, used: set[str]) -> Iterator[Finding]:
    """used: gets the names of the exceptions that excused something."""
    for resource, sentence in rule.faults(resources, context):
        name, urn = (resource.name, resource.urn) if resource else ("", "")
        keys = [key for key in (f"{rule.name}/{name}", rule.name) if key in context.intent.exceptions]
        used.update(keys[:1])
        reason = context.intent.exceptions[keys[0]] if keys else _own_excuse(rule, resource, resources, context)
        yield Finding(rule.name, name, urn, sentence, rule.severity, rule.answers, reason)


def _own_excuse(rule: Rule, resource: Recorded | None, resources: Sequence[Recorded], context: Context) -> str:
    """The product's own reason why a rule may be broken here, or empty."""
    fitting = (one for one in EXCUSES if rule.name in one.rules and one.when(resource, resources, context))
    return next((one.reason for one in fitting), "")


def policy_table() -> str:
    """docs/policy.md: the rules by area with the public rules that they answer, and what is excused or not asked."""
    lines = [
        "# Policy",
        "",
        f"{len(RULES)} rules over what a stack would make. `planner preview` runs them on a plan, the tests on every"
        " stack, and `pulumi up",
        "--policy-pack infra/policy_pack` on what the engine knows: there a rule of high severity stops the update, the"
        " others warn.",
        "",
        "A rule is broken on purpose by an exception in the intent, with the reason, for the whole stack or for one"
        " resource:",
        "",
        "```yaml",
        "exceptions:",
        "  api-addresses: the office has no fixed address",
        "  soft-delete/blobs: the data is synthetic",
        "```",
        "",
        "An exception that names no rule is refused, and one that excuses nothing is reported. What is not known before"
        " an apply counts",
        "as right. `CKV` ids are checkov's, `Azure.` ids PSRule's; others are the names of Azure Policy's built-in"
        " definitions, by their",
        "first digits.",
    ]
    for area in dict.fromkeys(rule.area for rule in RULES):
        lines += ["", f"## {area.capitalize()}", "", "| rule | asks that | severity | answers |", "|---|---|---|---|"]
        lines += [
            f"| `{rule.name}` | {rule.what} | {rule.severity} | {', '.join(rule.answers)} |"
            for rule in RULES
            if rule.area == area
        ]
    lines += ["", "## Excused by the product", "", "| rules | why |", "|---|---|"]
    lines += [f"| {', '.join(f'`{rule}`' for rule in one.rules)} | {one.reason} |" for one in EXCUSES]
    lines += ["", "## Not asked", "", "| public rules | why |", "|---|---|"]
    lines += [f"| {ids} | {why} |" for ids, why in NOT_ASKED.items()]
    return "\n".join(lines) + "\n"
