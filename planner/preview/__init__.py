"""What `pulumi up` would make, seen without a CLI, an account or a network: the program's resources and their cost.

`preview(stack)` runs the Pulumi program of the working folder in this process; `emit` prints what comes of it.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.catalog.hardware import cpu_size
from planner.errors import DoesNotFit, PlannerError
from planner.plan.lock import Lock, check_lock
from planner.plan.result import SPOT_QUOTA, TOTAL_QUOTA
from planner.preview.project import Configuration, check_settings, configuration, read_project
from planner.report import put
from planner.report.preview import ShownFinding, ShownPreview, ShownResource, emit_preview
from planner.stack import PLAN_KEY, needed_secrets, read_stack

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
    unset: secrets that must be set before `pulumi up`, by key, each with the command that sets it
    """

    project: str
    stack: str
    lock: Lock
    resources: tuple[Recorded, ...]
    bill: Bill
    outputs: dict[str, Any]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    unset: dict[str, str]

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
    project, file = read_project(), read_stack(stack)
    intent, lock = file.intent, file.lock
    given = configuration(project, file)
    check_settings(given, project, file)
    check_lock(lock, intent, f"{file.path}, {PLAN_KEY}", file.stack)  # the program does too, without the stack's name
    given, unset = _with_secrets(given, project.name, lock, file.stack)
    with _importable(Path.cwd()):
        from infra.policy import Context, check
        from planner.preview.cost import bill
        from planner.preview.recording import needs_pulumi, record

        with needs_pulumi(), _readable_files():
            program = str(project.program.resolve())
            done = record(
                lambda: runpy.run_path(program, run_name="__main__"),
                project=project.name,
                stack=file.stack,
                config=given.values,
                secret_keys=given.secret_keys,
            )
        findings = check(done.resources, Context(lock=lock, intent=intent, stack=file.stack))
    return Preview(
        project=project.name,
        stack=file.stack,
        lock=lock,
        resources=done.resources,
        bill=bill(done.resources, lock),
        outputs=done.outputs,
        findings=tuple(findings),
        notes=done.notes,
        unset=unset,
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
        quota_for=_quota_for(lock),
        outputs=_readable(made.outputs),
        notes=made.notes,
        unset=made.unset,
    )


def _quota_for(lock: Lock) -> dict[str, str]:
    """What each quota is for, by its name."""
    spot = [pool.name for pool in lock.pools if pool.priority == "spot"]
    found = {TOTAL_QUOTA: "all machines but spot", SPOT_QUOTA: _pools(spot)}
    for pool in lock.pools:
        same = [other.name for other in lock.pools if other.quota_family == pool.quota_family]
        found[pool.quota_family] = _pools([name for name in same if name not in spot])
    system = cpu_size(lock.around.cluster.system_sku).quota_family
    found[system] = "system nodes, and one more while they are upgraded"
    rest = [name for name in lock.quota if name not in found]
    if "people/developer-machines" in lock.lines_usd and not rest:
        found[system] += "; developers' machines"
    return {name: found.get(name, "developers' machines") for name in lock.quota}


def _pools(names: Sequence[str]) -> str:
    return f"{'pool' if len(names) == 1 else 'pools'} {', '.join(names)}, full"


def _with_secrets(given: Configuration, project: str, lock: Lock, stack: str) -> tuple[Configuration, dict[str, str]]:
    """The configuration with a placeholder for each secret that must be set before `up`, and the command for each."""
    unset = {}
    for name, command in needed_secrets(lock).items():
        key = f"{project}:{name}"
        if key not in given.values:
            given = given.with_placeholder(key)
            unset[key] = f"{command} --stack {stack}"
    return given, unset


@contextlib.contextmanager
def _readable_files() -> Iterator[None]:
    """PlannerError for a file of the program that is missing or locked."""
    try:
        yield
    except OSError as error:
        raise PlannerError(
            f"the Pulumi program cannot read {error.filename or 'a file'} ({error.strerror}): restore it from git"
        ) from error


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
    """The project's own packages go before those of another clone that is installed; not for longer than it takes.

    PlannerError where the folder has no program of its own, or another clone's is already in use.
    """
    sys.path.insert(0, str(folder))
    try:
        import infra

        found = Path(infra.__file__).resolve() if infra.__file__ else None
        if found is None or not found.is_relative_to(folder.resolve()):
            raise PlannerError(
                f"the program is that of {found.parents[1] if found else 'nobody'} and not of this folder: run planner"
                " in a whole clone of the project, with the environment of that clone"
            )
        yield
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] != "infra":
            raise
        raise PlannerError(
            f"{error.name} is missing: run planner in a whole clone of the project, not in a copy of a part of it"
        ) from error
    finally:
        sys.path.remove(str(folder))
