"""The Pulumi program run in this process on a monitor that records: no CLI, no account, no network.

The one place that knows names of pulumi.runtime, which are half private: what changes there is mended here.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from infra.policy import SECRET, UNKNOWN, Recorded
from planner.errors import PlannerError

# Pulumi's wire format, sdk/python/lib/pulumi/runtime/rpc.py: what marks a map as something else than a map
SIGNATURE = "4dabf18193072939515e22adb298388d"
SECRET_SIGNATURE = "1b47061264138c4ac30d75fd1eb44270"
RESOURCE_SIGNATURE = "5cf8f73096256a8f31e491e813e4eb8e"
ASSET_SIGNATURES = ("c44067f5952c0a294b673a41bacd8c17", "0def7320c3a5731c473e5ecbe6d01bc7")

STACK_TYPE = "pulumi:pulumi:Stack"
SUBSCRIPTION, TENANT = "<subscription>", "<tenant>"
PACKAGES = ("pulumi", "pulumi_azure_native", "pulumi_kubernetes")
WARNING = 2  # pulumi/engine.proto, LogSeverity: debug 0, info 1, warning 2, error 3

# the shape of what `az aks get-credentials --format exec` writes; every value in it is a placeholder
KUBECONFIG = """apiVersion: v1
kind: Config
current-context: cluster
clusters:
- name: cluster
  cluster: {server: "https://cluster.invalid:443"}
contexts:
- name: cluster
  context: {cluster: cluster, user: user}
users:
- name: user
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1beta1
      command: kubelogin
      args: [get-token, --environment, AzurePublicCloud, --server-id, 6dae42f8-4368-4678-94ff-3960e28e3630,
        --client-id, 80faf920-1908-4b52-b5ef-a8e7bedfc67a, --tenant-id, tenant, --login, devicecode]
"""


class Recording(NamedTuple):
    """What a program registered, in the order in which it says so, its outputs, and what it warned of."""

    resources: tuple[Recorded, ...]
    outputs: dict[str, Any]
    notes: tuple[str, ...]


def record(
    program: Callable[[], object],
    *,
    project: str,
    stack: str,
    config: Mapping[str, str],
    secret_keys: Collection[str] = (),
) -> Recording:
    """Run a program as `pulumi preview` of an empty stack runs it, and keep what it registers.

    Known are ids, names and what inputs say; all else that Azure computes stays unknown. What the program prints goes
    to stderr. PlannerError as the program raises it, for what it refuses as RunError, and where Pulumi is missing;
    any other exception of the program comes out as it is.
    """
    with needs_pulumi():
        from pulumi import RunError
        from pulumi.runtime.stack import run_in_stack

    recorder = _Recorder(project, stack)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        # one request at a time; and what fails after the first failure is not told again
        loop.set_default_executor(ThreadPoolExecutor(max_workers=1))
        loop.set_exception_handler(lambda _loop, _context: None)
        recorder.configure(config, secret_keys)
        await run_in_stack(recorder.in_order(program))

    with needs_pulumi(), contextlib.redirect_stdout(sys.stderr), _no_collector(), asyncio.Runner() as runner:
        try:
            # a context of its own: Pulumi keeps stack, settings and configuration in context variables
            runner.run(main(), context=contextvars.copy_context())
        except RunError as error:
            found = _refusal(error)
            raise found or PlannerError(f"the Pulumi program refuses: {_one_line(str(error))}") from error
    return recorder.finished()


@contextlib.contextmanager
def needs_pulumi() -> Iterator[None]:
    """PlannerError in place of Python's where Pulumi or one of its packages is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in PACKAGES:
            raise
        raise PlannerError(f"a preview needs {error.name}, which is not installed: uv sync --extra infra") from error


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Pulumi makes a hundred thousand short-lived objects: looking for cycles among them takes as long as the run."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _refusal(error: BaseException | None) -> PlannerError | None:
    """The PlannerError that another exception was raised from."""
    while error is not None and not isinstance(error, PlannerError):
        error = error.__cause__ or error.__context__
    return error


def _one_line(text: str) -> str:
    return " ".join(text.split())


class _Recorder:
    """What the program has said so far. Pulumi asks from another thread, one request at a time."""

    def __init__(self, project: str, stack: str) -> None:
        self.project = project
        self.stack = stack
        self.rows: dict[str, Recorded] = {}
        self.order: dict[tuple[str, str], int] = {}
        self.outputs: dict[str, Any] = {}
        self.notes: list[str] = []
        self.root = ""
        self.lock = threading.Lock()

    def configure(self, config: Mapping[str, str], secret_keys: Collection[str]) -> None:
        """Point Pulumi's runtime, in this context alone, at this recorder."""
        from pulumi.runtime import mocks
        from pulumi.runtime.config import set_all_config
        from pulumi.runtime.settings import ROOT, configure

        monitor = _monitor(self)
        settings: Any = mocks.MockSettings  # which has no types
        configure(
            settings(
                project=self.project,
                stack=self.stack,
                organization="organization",
                root_directory=None,
                parallel=1,
                dry_run=True,
                legacy_apply_enabled=False,
                monitor=monitor,
                monitor_features=set(monitor.GetDeploymentInfo(None).supportedFeatures),
                engine=self,
                lock=threading.Lock(),
                outputs=set(),
                callbacks=None,
                package_refs={},
                base_providers_by_ref={},
            )
        )
        ROOT.set(None)
        set_all_config(dict(config), list(secret_keys))

    def in_order(self, program: Callable[[], object]) -> Callable[[], None]:
        """The program, each of whose resources is noted as it is written: requests come in another order."""
        from pulumi.runtime.stack import register_stack_transformation

        def note(arguments: Any) -> None:
            self.order.setdefault((arguments.type_, arguments.name), len(self.order))

        def run() -> None:
            register_stack_transformation(note)
            program()

        return run

    def finished(self) -> Recording:
        last = len(self.order)
        rows = sorted(self.rows.values(), key=lambda row: (self.order.get((row.type, row.name), last), row.urn))
        return Recording(tuple(rows), self.outputs, tuple(dict.fromkeys(self.notes)))

    # ------------------------------------------------------------------------------------ requests of the program

    def Log(self, request: Any) -> None:  # noqa: N802, the protocol's name
        if request.severity >= WARNING:
            with self.lock:
                self.notes.append(_one_line(request.message))

    def urn(self, parent: str, type_: str, name: str) -> str:
        """As the engine makes it: the types of all ancestors but the stack, then the resource's own."""
        above = "" if parent in ("", self.root) else parent.split("::")[2] + "$"
        return f"urn:pulumi:{self.stack}::{self.project}::{above}{type_}::{name}"

    def registered(self, request: Any) -> tuple[str, str, dict[str, Any]]:
        """Keep a resource; its urn, its id, and what is known of its outputs beside that."""
        urn = self.urn(request.parent, request.type, request.name)
        if request.type == STACK_TYPE:
            self.root = urn
            return urn, "", {}
        inputs = _plain_map(request.object)
        row = Recorded(
            type=request.type,
            name=request.name,
            urn=urn,
            parent="" if request.parent == self.root else request.parent,
            inputs=inputs,
            dependencies=tuple(sorted(set(request.dependencies))),
            protect=bool(request.protect),
            retain_on_delete=bool(request.retainOnDelete),
            ignore_changes=tuple(request.ignoreChanges),
            delete_before_replace=bool(request.deleteBeforeReplace),
            timeouts={
                when: length
                for when in ("create", "update", "delete")
                if (length := getattr(request.customTimeouts, when))
            },
        )
        with self.lock:
            if urn in self.rows:
                raise PlannerError(
                    f"the Pulumi program makes two resources {request.name} of type {request.type}: rename one"
                )
            self.rows[urn] = row
        if not request.custom:
            return urn, "", {}
        return urn, *_known(row)

    def ended(self, request: Any) -> None:
        if request.urn == self.root:
            self.outputs = _plain_map(request.outputs)

    def called(self, token: str) -> dict[str, Any] | None:
        """What Azure's function answers, in placeholders; None for what is not known without asking Azure."""
        if token == "azure-native:authorization:getClientConfig":
            return {
                "subscriptionId": SUBSCRIPTION,
                "tenantId": TENANT,
                "clientId": "<client of whoever deploys>",
                "objectId": "<whoever deploys>",
            }
        if token.startswith("azure-native:containerservice:listManagedCluster"):
            import base64

            return {"kubeconfigs": [{"name": "cluster", "value": base64.b64encode(KUBECONFIG.encode()).decode()}]}
        with self.lock:
            self.notes.append(f"what {token} answers is not known without asking Azure")
        return None


def _monitor(recorder: _Recorder) -> Any:
    """A monitor as Pulumi's own for tests, whose requests the recorder answers."""
    from pulumi.runtime.mocks import MockMonitor
    from pulumi.runtime.proto import resource_pb2

    class Monitor(MockMonitor):
        """The names are those of the protocol."""

        def __init__(self) -> None:
            """Without the mocks that Pulumi's own would ask."""

        def RegisterResource(self, request: Any) -> Any:  # noqa: N802
            urn, ident, known = recorder.registered(request)
            answer = resource_pb2.RegisterResourceResponse(urn=urn, id=ident)
            if request.type.startswith("kubernetes:"):
                answer.object.CopyFrom(request.object)  # Kubernetes keeps what it is given
            answer.object.update(known)
            return answer

        def RegisterResourceOutputs(self, request: Any) -> None:  # noqa: N802
            recorder.ended(request)

        def ReadResource(self, request: Any) -> Any:  # noqa: N802
            urn = recorder.urn(request.parent, request.type, request.name)
            return resource_pb2.ReadResourceResponse(urn=urn, id=request.id, properties=request.properties)

        def Invoke(self, request: Any) -> Any:  # noqa: N802
            known = recorder.called(request.tok)
            answer = resource_pb2.ResourceInvokeResponse(unknown=known is None)
            getattr(answer, "return").update(known or {})
            return answer

    return Monitor()


# --------------------------------------------------------------------------------------------- values on the wire


def _plain_map(struct: Any) -> dict[str, Any]:
    """A protobuf Struct as a dict in the order of its keys, which the wire shuffles. Null is left out, as by Pulumi."""
    fields = sorted(struct.fields.items())
    return {key: _plain(value) for key, value in fields if value.WhichOneof("kind") != "null_value"}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return (
            _special(value.struct_value) if SIGNATURE in value.struct_value.fields else _plain_map(value.struct_value)
        )
    if kind == "list_value":
        return [_plain(inner) for inner in value.list_value.values]
    if kind == "number_value":  # the wire has no whole numbers
        return int(value.number_value) if value.number_value.is_integer() else value.number_value
    return None if kind in (None, "null_value") else getattr(value, kind)


def _special(struct: Any) -> Any:
    """A secret as SECRET, another resource as its id, a file as where it is. PlannerError for what is newer."""
    signature = struct.fields[SIGNATURE].string_value
    if signature == SECRET_SIGNATURE:
        return SECRET
    if signature == RESOURCE_SIGNATURE:
        return struct.fields["id"].string_value or (
            UNKNOWN if "id" in struct.fields else struct.fields["urn"].string_value
        )
    if signature in ASSET_SIGNATURES:
        return {key: _plain(value) for key, value in struct.fields.items() if key in ("path", "uri", "text", "assets")}
    raise PlannerError(f"Pulumi sends a value of a kind {signature} that this preview does not read: update tonnage")


def _known(row: Recorded) -> tuple[str, dict[str, Any]]:
    """Id and outputs that stand for what Azure would give: shaped like ids, and different for different resources."""
    package, module, kind = (*row.kind.split(":"), "", "")[:3]
    if package == "kubernetes":
        about = row.inputs.get("metadata")
        found = about if isinstance(about, dict) else {}
        name = str(found.get("name", row.name))
        return f"{found['namespace']}/{name}" if "namespace" in found else name, {}
    ident = f"/subscriptions/{SUBSCRIPTION}/{module}/{kind}/{row.name}"
    if package != "azure-native":
        return ident, {}
    known: dict[str, Any] = {"name": _name(kind, row)}
    if kind == "UserAssignedIdentity":
        known |= {
            "principalId": f"<principal of {row.name}>",
            "clientId": f"<client of {row.name}>",
            "tenantId": TENANT,
        }
    return ident, known


def _name(kind: str, row: Recorded) -> str:
    """The name that an Azure resource is given by one of its inputs, else a placeholder: Pulumi makes one up."""
    stems = {
        key[: -len("Name")].lower(): value
        for key, value in row.inputs.items()
        if key.endswith("Name")
        and (key != "resourceGroupName" or kind == "ResourceGroup")
        and isinstance(value, str)
        and value not in (UNKNOWN, SECRET)
    }
    own = [value for stem, value in stems.items() if stem == kind.lower()]
    alike = [value for stem, value in stems.items() if stem in kind.lower() or kind.lower() in stem]
    plain = list(stems.values()) if list(stems) == ["resource"] else []
    for found in (own, alike, plain):
        if len(found) == 1:
            return found[0]
    return f"<name of {row.name}>"
