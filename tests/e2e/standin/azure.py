"""The azure-native provider's side of Pulumi's provider protocol, in front of the stand-in for ARM.

It does what pulumi-azure-native 3.29 does: its names, its defaults, its diff of inputs with inputs, its reading of
inputs back from outputs (provider/pkg/provider in its repository), its retries and the words of its errors.
"""

import base64
import re
import threading
import uuid
from typing import Any, NoReturn

import grpc
import yaml
from google.protobuf import any_pb2, empty_pb2
from google.rpc import status_pb2
from pulumi.runtime.proto import plugin_pb2, provider_pb2, provider_pb2_grpc

from standin import arm_body, arm_outputs, differ, sdk_schema, wire
from standin.arm import CONFLICT_WAIT_S, RETRIES, Arm, Unfinished
from standin.arm_table import TYPES
from standin.arm_types import ArmType
from standin.faults import ArmError
from standin.store import hide, unseal

VERSION = "3.29.0"
REPLACE_FLAG = "__createBeforeDelete"
CLIENT_CONFIG = {
    "clientId": "04b07795-8ddb-461a-bbee-02f9e1bf7b46",
    "objectId": arm_outputs.DEPLOYER,
    "subscriptionId": arm_outputs.SUBSCRIPTION,
    "tenantId": arm_outputs.TENANT,
}
AKS_SERVER_APPLICATION = "6dae42f8-4368-4678-94ff-3960e28e3630"
"""The application id of every AKS cluster's API server."""
AKS_CLIENT_APPLICATION = "80faf920-1908-4b52-b5ef-a8e7bedfc67a"


class AzureProvider(provider_pb2_grpc.ResourceProviderServicer):
    """The provider. kubeconfig: of the control plane that stands behind every cluster, None where there is none."""

    def __init__(self, arm: Arm, kubeconfig: dict[str, Any] | None = None) -> None:
        self.arm = arm
        self.kubeconfig = kubeconfig
        self.location: str | None = None
        self.cancelled = threading.Event()

    # -- the provider itself

    def Handshake(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.cancelled = threading.Event()
        return provider_pb2.ProviderHandshakeResponse(accept_secrets=True, supports_autonaming_configuration=True)

    def Attach(self, request: Any, context: Any) -> Any:  # noqa: N802
        return empty_pb2.Empty()

    def GetPluginInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        return plugin_pb2.PluginInfo(version=VERSION)

    def GetSchema(self, request: Any, context: Any) -> Any:  # noqa: N802
        return provider_pb2.GetSchemaResponse(schema='{"name": "azure-native", "version": "%s"}' % VERSION)  # noqa: UP031

    def GetMapping(self, request: Any, context: Any) -> Any:  # noqa: N802
        return provider_pb2.GetMappingResponse()

    def CheckConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return provider_pb2.CheckResponse(inputs=request.news)

    def DiffConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return provider_pb2.DiffResponse(changes=provider_pb2.DiffResponse.DIFF_NONE)

    def Configure(self, request: Any, context: Any) -> Any:  # noqa: N802
        # A process that Pulumi starts ends after each run; this one lives on, so a new run begins here.
        self.cancelled = threading.Event()
        self.location = wire.to_plain(request.args).get("location") or None
        self.arm.journal.add(event="start", operation="configure", type="azure-native", name="", location=self.location)
        return provider_pb2.ConfigureResponse(
            acceptSecrets=True, supportsPreview=True, supports_autonaming_configuration=True
        )

    def Cancel(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.arm.journal.add(event="start", operation="cancel", type="azure-native", name="")
        self.cancelled.set()
        return empty_pb2.Empty()

    def Invoke(self, request: Any, context: Any) -> Any:  # noqa: N802
        arguments = wire.to_plain(request.args)
        self.arm.journal.add(
            event="start", operation="invoke", type=request.tok, name=arguments.get("resourceName", "")
        )
        if request.tok == "azure-native:authorization:getClientConfig":
            return _invoked(dict(CLIENT_CONFIG))
        if request.tok == "azure-native:containerservice:listManagedClusterUserCredentials":
            return _invoked(self._user_credentials(arguments, context))
        getter = re.fullmatch(r"(azure-native:\w+:)get(\w+)", request.tok)
        kind = TYPES.get(getter[1] + getter[2]) if getter is not None else None
        if kind is None:
            _refuse(context, f"The stand-in for azure-native does not know the function {request.tok}.")
        resource_id = self.arm.resource_id(kind, arguments)
        found = self.arm.get(resource_id)
        if found is None:
            _refuse(context, f"request failed {resource_id}: {_not_found(kind, resource_id)}")
        return _invoked({**unseal(found), "id": resource_id})

    # -- resources

    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind = self._kind(request.urn, context)
        olds = wire.to_plain(request.olds)
        news = wire.to_plain(request.news, keep_secrets=True)
        self._name(kind, request, olds, news)
        plain = {name: wire.reveal(part) for name, part in news.items() if not name.startswith("__")}
        if _has_location(kind) and not news.get("location"):
            location = olds.get("location") or self.location or self._group_location(plain)
            if location is not None:
                news["location"] = plain["location"] = location
        news.setdefault("azureApiVersion", kind.api_version)
        plain.pop("azureApiVersion", None)
        found = sdk_schema.problems(kind.args, plain) or self._shape_problems(kind, plain)
        return provider_pb2.CheckResponse(
            inputs=wire.to_struct(news),
            failures=[provider_pb2.CheckFailure(reason=hide(reason, news)) for _, reason in found],
        )

    def Diff(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind = self._kind(request.urn, context)
        old_inputs = wire.to_plain(request.old_inputs)
        news = wire.to_plain(request.news)
        forced = frozenset(kind.path_inputs) | kind.force_new
        changes = differ.detailed(old_inputs, news, forced, wire.to_plain(request.olds))
        replaces = sorted({path.split(".")[0].split("[")[0] for path, change in changes.items() if change.replaces})
        names = provider_pb2.PropertyDiff.Kind
        flag = old_inputs.get(REPLACE_FLAG)
        return provider_pb2.DiffResponse(
            changes=provider_pb2.DiffResponse.DIFF_SOME if changes else provider_pb2.DiffResponse.DIFF_NONE,
            replaces=replaces,
            deleteBeforeReplace=not flag if isinstance(flag, bool) else bool(replaces),
            diffs=sorted({path.split(".")[0].split("[")[0] for path in changes}),
            detailedDiff={
                path: provider_pb2.PropertyDiff(
                    kind=names.Value(change.kind + ("_REPLACE" if change.replaces else "")), inputDiff=True
                )
                for path, change in changes.items()
            },
            hasDetailedDiff=bool(changes),
        )

    def Create(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind = self._kind(request.urn, context)
        inputs = wire.to_plain(request.properties, keep_secrets=True)
        if request.preview:
            previewed = sdk_schema.previewed(sdk_schema.resource_class(kind.token), inputs)
            return provider_pb2.CreateResponse(properties=wire.to_struct(previewed))
        resource_id = self.arm.resource_id(kind, wire.reveal(inputs))
        if self.arm.get(resource_id) is not None and not kind.singleton:
            _refuse(context, f"cannot create already existing resource '{resource_id}'")
        outputs = self._put("create", kind, resource_id, inputs, request, context)
        return provider_pb2.CreateResponse(id=resource_id, properties=wire.to_struct(outputs))

    def Update(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind = self._kind(request.urn, context)
        inputs = wire.to_plain(request.news, keep_secrets=True)
        if request.preview:
            previewed = sdk_schema.previewed(sdk_schema.resource_class(kind.token), inputs)
            olds = wire.to_plain(request.olds, keep_secrets=True)
            previewed |= {name: olds[name] for name in ("name", "location") if name in olds}
            return provider_pb2.UpdateResponse(properties=wire.to_struct(previewed))
        outputs = self._put("update", kind, request.id, inputs, request, context)
        return provider_pb2.UpdateResponse(properties=wire.to_struct(outputs))

    def Read(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind = self._kind(request.urn, context)
        entry = {"operation": "read", "type": kind.token, "name": request.id.rsplit("/", 1)[-1], "urn": request.urn}
        self.arm.journal.add(event="start", **entry)
        try:
            self._until_accepted(entry, self.cancelled, lambda: self.arm.refuse_read(kind, request.id))
        except ArmError as error:
            _refuse(context, str(error))
        found = self.arm.get(request.id)
        if found is None:
            return provider_pb2.ReadResponse()
        old_inputs = wire.to_plain(request.inputs, keep_secrets=True)
        old_outputs = wire.to_plain(request.properties, keep_secrets=True)
        outputs = unseal(found, old_inputs, old_outputs)
        if old_inputs:
            inputs = differ.read_back(kind, old_inputs, old_outputs, outputs)
        else:
            inputs = {**_path_values(kind, request.id), **sdk_schema.project(kind.args, outputs)}
        return provider_pb2.ReadResponse(
            id=request.id, properties=wire.to_struct(outputs), inputs=wire.to_struct(inputs)
        )

    def Delete(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind = self._kind(request.urn, context)
        entry = {"operation": "delete", "type": kind.token, "name": request.id.rsplit("/", 1)[-1], "urn": request.urn}
        self.arm.journal.add(event="start", **entry)
        cancelled = self.cancelled
        try:
            self._until_accepted(entry, cancelled, lambda: self.arm.delete(kind, request.id, cancelled))
        except (ArmError, Unfinished) as error:
            self.arm.journal.add(event="end", error=str(error), **entry)
            _refuse(context, str(error))
        self.arm.journal.add(event="end", error=None, **entry)
        return empty_pb2.Empty()

    # -- helpers

    def _put(
        self, operation: str, kind: ArmType, resource_id: str, inputs: dict[str, Any], request: Any, context: Any
    ) -> dict[str, Any]:
        entry = {"operation": operation, "type": kind.token, "name": resource_id.rsplit("/", 1)[1], "urn": request.urn}
        self.arm.journal.add(event="start", **entry)
        plain = _body_inputs(kind, wire.reveal(inputs))
        _, problems = arm_body.body(kind.model_class, plain, kind.beyond_model)
        if problems:
            message = hide(f"error preparing body for {resource_id}: {'; '.join(problems)}", inputs)
            self.arm.journal.add(event="end", error=message, **entry)
            _refuse(context, message)
        cancelled = self.cancelled
        try:
            self._until_accepted(entry, cancelled, lambda: self.arm.put(kind, resource_id, inputs, cancelled))
        except ArmError as error:
            self.arm.journal.add(event="end", error=str(error), **entry)
            _refuse(context, str(error))
        except Unfinished as error:
            self.arm.journal.add(event="end", error=str(error), **entry)
            if not error.kept:
                _refuse(context, str(error))
            _refuse_with_state(context, resource_id, str(error), inputs)
        self.arm.journal.add(event="end", error=None, **entry)
        found = self.arm.get(resource_id)
        assert found is not None
        return dict(unseal(found, inputs))

    def _until_accepted(self, entry: dict[str, Any], cancelled: threading.Event, work: Any) -> None:
        """Do the work, again where pulumi-azure-native itself tries again."""
        for attempt in range(RETRIES):
            try:
                work()
            except ArmError as error:
                if not error.retried or attempt == RETRIES - 1:
                    raise
                self.arm.journal.add(event="retry", error=str(error), **entry)
                if cancelled.wait(error.retry_after_s or CONFLICT_WAIT_S):
                    raise
            else:
                return

    def _kind(self, urn: str, context: Any) -> ArmType:
        token = urn.split("::")[2].rsplit("$", 1)[-1]
        kind = TYPES.get(token)
        if kind is None:
            _refuse(context, f"The stand-in for azure-native does not know the resource type {token}.")
        return kind

    def _name(self, kind: ArmType, request: Any, olds: dict[str, Any], news: dict[str, Any]) -> None:
        """Fill in the name as pulumi-azure-native does."""
        key = kind.name_input
        if news.get(key) is not None:
            return
        random = False
        if olds.get(key) is not None:
            news[key], random = olds[key], bool(olds.get(REPLACE_FLAG))
        else:
            logical = request.urn.rsplit("::", 1)[1]
            modes = provider_pb2.CheckRequest.AutonamingOptions
            given = request.autonaming if request.HasField("autonaming") else None
            if given is not None and given.mode == modes.DISABLE:
                return
            takes = kind.autoname != "uuid" or (given is not None and given.mode == modes.ENFORCE)
            seed = request.randomSeed or b"\0"
            if given is not None and takes:
                news[key], random = given.proposed_name, True
            elif kind.autoname == "uuid":
                news[key], random = str(uuid.UUID(_hex(seed, 32))), True
            elif kind.autoname == "random":
                news[key], random = logical + _hex(seed, 8), True
            else:
                news[key] = logical
        if random:
            news[REPLACE_FLAG] = True

    def _group_location(self, inputs: dict[str, Any]) -> str | None:
        group = inputs.get("resourceGroupName")
        if group is None or group == wire.UNKNOWN:
            return group
        found = self.arm.get(f"/subscriptions/{arm_outputs.SUBSCRIPTION}/resourceGroups/{group}")
        return str(found["location"]) if found is not None else None

    @staticmethod
    def _shape_problems(kind: ArmType, inputs: dict[str, Any]) -> list[tuple[str, str]]:
        """Name, location and body, as far as they are known."""
        found = []
        name = inputs.get(kind.name_input)
        if name is None:
            found.append((kind.name_input, f"missing required property '{kind.name_input}'"))
        elif name != wire.UNKNOWN and not re.fullmatch(kind.name, name):
            found.append(
                (kind.name_input, f"'{kind.name_input}' is '{name}', but a {kind.arm_type} takes {kind.words}")
            )
        location = inputs.get("location")
        if _has_location(kind) and location is None:
            found.append(
                (
                    "location",
                    "missing required property 'location'. Either set it explicitly or configure it with "
                    "'pulumi config set azure-native:location <value>'.",
                )
            )
        elif not _location_fits(kind, location):
            found.append(
                (
                    "location",
                    f"The provided location '{location}' is not available for resource type '{kind.arm_type}'.",
                )
            )
        _, problems = arm_body.body(kind.model_class, _body_inputs(kind, inputs), kind.beyond_model)
        return found + [("", problem) for problem in problems]

    def _user_credentials(self, arguments: dict[str, Any], context: Any) -> dict[str, Any]:
        kind = TYPES["azure-native:containerservice:ManagedCluster"]
        resource_id = self.arm.resource_id(kind, arguments)
        cluster = self.arm.get(resource_id)
        if cluster is None:
            _refuse(context, f"request failed {resource_id}: {_not_found(kind, resource_id)}")
        server = {
            "certificate-authority-data": base64.b64encode(b"no control plane stands behind this cluster").decode(),
            "server": f"https://{cluster.get('fqdn') or cluster['privateFQDN']}:443",
        }
        if self.kubeconfig is not None:
            server = dict(self.kubeconfig["clusters"][0]["cluster"])
        name, user = (
            arguments["resourceName"],
            f"clusterUser_{arguments['resourceGroupName']}_{arguments['resourceName']}",
        )
        text = yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": name, "cluster": server}],
                "contexts": [{"name": name, "context": {"cluster": name, "user": user}}],
                "current-context": name,
                "users": [{"name": user, "user": {"exec": _kubelogin()}}],
            }
        )
        return {"kubeconfigs": [{"name": "clusterUser", "value": base64.b64encode(text.encode()).decode()}]}


def _kubelogin() -> dict[str, Any]:
    """What AKS puts into a kubeconfig of format exec: kubelogin with a device code."""
    return {
        "apiVersion": "client.authentication.k8s.io/v1beta1",
        "command": "kubelogin",
        "args": [
            *("get-token", "--environment", "AzurePublicCloud", "--server-id", AKS_SERVER_APPLICATION),
            *("--client-id", AKS_CLIENT_APPLICATION, "--tenant-id", arm_outputs.TENANT, "--login", "devicecode"),
        ],
        "env": None,
        "provideClusterInfo": False,
    }


def _body_inputs(kind: ArmType, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that go into the request's body."""
    outside = {*kind.path_inputs, "azureApiVersion"}
    return {name: part for name, part in inputs.items() if name not in outside and not name.startswith("__")}


def _has_location(kind: ArmType) -> bool:
    return kind.location != "none" and "location" in sdk_schema.fields(kind.args)


def _location_fits(kind: ArmType, location: str | None) -> bool:
    if location is None or location == wire.UNKNOWN or kind.location in ("any", "none"):
        return True
    return (kind.location == "global") == (location.lower() == "global")


def _path_values(kind: ArmType, resource_id: str) -> dict[str, str]:
    pattern = re.sub(r"{(\w+)}", lambda name: f"(?P<{name[1]}>.+)", kind.path) if kind.path[1] == "{" else None
    pattern = pattern or re.sub(r"{(\w+)}", lambda name: f"(?P<{name[1]}>[^/]+)", kind.path)
    found = re.fullmatch(pattern, resource_id, re.IGNORECASE)
    assert found is not None, resource_id
    return {name: value for name, value in found.groupdict().items() if name != "subscriptionId"}


def _hex(seed: bytes, digits: int) -> str:
    return (uuid.uuid5(uuid.NAMESPACE_OID, seed.hex()).hex)[:digits]


def _not_found(kind: ArmType, resource_id: str) -> ArmError:
    name, group = resource_id.rsplit("/", 1)[1], resource_id.split("/")[4]
    return ArmError(
        404, "ResourceNotFound", f"The Resource '{kind.arm_type}/{name}' under resource group '{group}' was not found."
    )


def _invoked(answer: dict[str, Any]) -> Any:
    return provider_pb2.InvokeResponse(**{"return": wire.to_struct(answer)})


def _refuse(context: Any, message: str) -> NoReturn:
    context.abort(grpc.StatusCode.UNKNOWN, message)
    raise AssertionError("abort raises")


def _refuse_with_state(context: Any, resource_id: str, why: str, inputs: dict[str, Any]) -> NoReturn:
    """An error that tells the engine of the resource nonetheless: its id and inputs, no outputs (the provider's wait
    is over).
    """
    detail = any_pb2.Any()
    message = f"resource created but read failed {why}: {why}"
    detail.Pack(provider_pb2.ErrorResourceInitFailed(id=resource_id, reasons=[message], inputs=wire.to_struct(inputs)))
    full = status_pb2.Status(code=grpc.StatusCode.UNKNOWN.value[0], message=message, details=[detail])
    context.set_trailing_metadata((("grpc-status-details-bin", full.SerializeToString()),))
    context.abort(grpc.StatusCode.UNKNOWN, message)
    raise AssertionError("abort raises")
