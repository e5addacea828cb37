"""What `pulumi up` would make, seen without a CLI, an account or a network: the program's resources and their cost.

`preview(stack)` runs the Pulumi program of the working folder in this process; `emit` prints what comes of it.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.errors import DoesNotFit, PlannerError
from planner.plan.lock import Lock
from planner.preview.project import Configuration, configuration, read_project
from planner.report import put
from planner.report.preview import ShownFinding, ShownPreview, ShownResource, emit_preview
from planner.stack import read_intent, read_lock

if TYPE_CHECKING:
    from infra.policy import Finding, Recorded
    from planner.preview.cost import Bill

Form = Literal["text", "md", "json"]
KNOWN_LATER = "[known after the deployment]"


@dataclass(frozen=True)
class Preview:
    """A stack as its program would make it on an empty subscription.

    resources: in the order of the program; bill: the plan's lines over them; outputs: of the stack
    findings: of the policies, excused ones too; notes: what a reader should know beside that
    """

    project: str
    stack: str
    lock: Lock
    resources: tuple[Recorded, ...]
    bill: Bill
    outputs: dict[str, Any]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def quota(self) -> dict[str, int]:
        """vCPUs to have before `pulumi up`, by the name Azure gives the quota."""
        return self.lock.quota

    def children(self, urn: str = "") -> tuple[Recorded, ...]:
        """The resources right below one, or those at the top."""
        return tuple(row for row in self.resources if row.parent == urn)


def preview(stack: str) -> Preview:
    """Run the program for a stack and put the plan's bill and the policies beside what it registers.

    PlannerError outside a project, for a stack file that cannot be used, for what the program refuses (DoesNotFit where
    the plan is over budget or beyond a GPU), and where Pulumi is not installed.
    """
    project = read_project()
    intent, lock = read_intent(stack), read_lock(stack)
    given = configuration(project, stack)
    with _importable(Path.cwd()):
        from infra.policy import Context, check
        from planner.preview.cost import bill
        from planner.preview.recording import record

        given, unset = _with_secrets(given, project.name, lock, stack.strip())
        program = str(project.program.resolve())
        done = record(
            lambda: runpy.run_path(program, run_name="__main__"),
            project=project.name,
            stack=stack.strip(),
            config=given.values,
            secret_keys=given.secret_keys,
        )
        findings = check(done.resources, Context(lock=lock, intent=intent, stack=stack.strip()))
    return Preview(
        project=project.name,
        stack=stack.strip(),
        lock=lock,
        resources=done.resources,
        bill=bill(done.resources, lock),
        outputs=done.outputs,
        findings=tuple(findings),
        notes=(*unset, *done.notes),
    )


def emit(made: Preview, form: Form) -> None:
    """The preview on stdout: for a terminal, as a comment on a pull request, or as JSON."""
    if form == "md":
        from planner.preview.markdown import preview_markdown

        put(preview_markdown(shown(made)))
    else:
        emit_preview(shown(made), as_json=form == "json")


def check_preview(made: Preview) -> None:
    """DoesNotFit when a policy of high severity is broken without a reason."""
    grave = [finding for finding in made.findings if finding.severity == "high" and not finding.excused]
    if grave:
        more = f" (and {len(grave) - 1} more)" if len(grave) > 1 else ""
        raise DoesNotFit(
            f"policy {grave[0].rule}{more}: {grave[0].sentence.rstrip('.')}; change it, or give a reason under"
            " exceptions in the intent"
        )


def shown(made: Preview) -> ShownPreview:
    """The preview as it is printed, in plain data."""
    lock, prices = made.lock, made.lock.prices
    return ShownPreview(
        project=made.project,
        stack=made.stack,
        region=lock.region,
        usd_per_month=made.bill.usd,
        approved_usd_per_month=lock.approved_usd_per_month,
        prices=(
            f"sheet {prices.sheet} ({prices.digest}) of the day of the plan, figures of {prices.oldest} to"
            f" {prices.newest}"
        ),
        resources=tuple(
            ShownResource(
                type=row.type,
                name=row.name,
                urn=row.urn,
                parent=row.parent,
                protect=row.protect,
                retain_on_delete=row.retain_on_delete,
                usd_per_month=cost.usd,
                lines=cost.lines,
                unpriced=cost.unpriced,
                why=cost.why,
                dependencies=row.dependencies,
                inputs=_public(row),
            )
            for row, cost in zip(made.resources, made.bill.costs, strict=True)
        ),
        elsewhere=made.bill.elsewhere,
        unpriced=made.bill.unpriced,
        findings=tuple(
            ShownFinding(
                rule=finding.rule,
                severity=finding.severity,
                resource=finding.resource,
                urn=finding.urn,
                sentence=finding.sentence,
                answers=finding.answers,
                excused=finding.excused,
            )
            for finding in made.findings
        ),
        quota=made.quota,
        outputs=_readable(made.outputs),
        notes=made.notes,
    )


def _with_secrets(given: Configuration, project: str, lock: Lock, stack: str) -> tuple[Configuration, list[str]]:
    """The configuration with a placeholder for each secret that must be set before `up`, and a note for each."""
    from infra.settings import needed_secrets

    notes = []
    for name, command in needed_secrets(lock).items():
        if f"{project}:{name}" not in given.values:
            given = given.with_placeholder(f"{project}:{name}")
            notes.append(f"the secret {project}:{name} is not set yet: {command} --stack {stack}")
    return given, notes


def _public(row: Recorded) -> dict[str, Any]:
    """The inputs to print. A Kubernetes Secret keeps its keys alone, also where the program calls nothing secret."""
    from infra.policy import SECRET

    inputs: dict[str, Any] = _readable(row.inputs)
    if row.kind != "kubernetes:core/v1:Secret":
        return inputs
    return {
        key: dict.fromkeys(value, SECRET) if key in ("data", "stringData") and isinstance(value, dict) else value
        for key, value in inputs.items()
    }


def _readable(value: Any) -> Any:
    """Plain data with a word in place of the mark by which Pulumi knows what it does not know yet."""
    from infra.policy import UNKNOWN

    if isinstance(value, dict):
        return {key: _readable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_readable(inner) for inner in value]
    return KNOWN_LATER if value == UNKNOWN else value


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The project's own packages can be imported also where it is not installed; not for longer than it takes."""
    path = str(folder)
    added = path not in sys.path
    if added:
        sys.path.append(path)
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] != "infra":
            raise
        raise PlannerError(
            f"{error.name} is missing: run planner in a whole clone of the project, not in a copy of a part of it"
        ) from error
    finally:
        if added:
            sys.path.remove(path)
