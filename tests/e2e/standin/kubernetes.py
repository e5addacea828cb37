"""A stand-in for Pulumi's kubernetes provider: what the engine sends goes to a real API server by server-side apply.

It keeps nothing of its own but a journal of requests. One process serves all provider instances of a program, so it
takes one cluster only, and refuses the default provider, which would take whatever cluster ~/.kube/config names.
"""

import functools
import importlib.metadata
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf import any_pb2, empty_pb2, struct_pb2
from google.rpc import status_pb2
from pulumi.runtime.proto import plugin_pb2, provider_pb2, provider_pb2_grpc

from standin import kubeconfigs, objects, waiting
from standin.cluster import ApiError, Cluster, Object, active, is_true
from standin.store import Journal
from standin.wire import UNKNOWN, has_unknown, is_secret, reveal, secret, to_plain, to_struct

MANAGER = "pulumi-kubernetes"
_SETTINGS = frozenset(
    {
        "alwaysRender", "cluster", "clusterIdentifier", "context", "deleteUnreachable", "enableConfigMapMutable",
        "enablePatchForce", "enableSecretMutable", "enableServerSideApply", "helmReleaseSettings", "kubeClientSettings",
        "kubeconfig", "namespace", "renderYamlToDirectory", "skipUpdateUnreachable", "suppressDeprecationWarnings",
        "suppressHelmHookWarnings", "upsertExistingObjects", "version", "pluginDownloadURL",
    }
)  # fmt: skip
_CRD_WAIT_S = 10

Plain = dict[str, Any]
Answer = TypeVar("Answer")


class Refusal(Exception):
    """The provider's answer is an error; the text is shown to the user."""


class Unfinished(Exception):
    """The object was made but is not ready: the engine keeps its state and tries again."""

    def __init__(self, identity: str, outputs: Plain, inputs: Plain, reason: str) -> None:
        super().__init__(reason)
        self.identity, self.outputs, self.inputs, self.reason = identity, outputs, inputs, reason


def _answering(method: Callable[[Any, Any, Any], Answer]) -> Callable[[Any, Any, Any], Answer]:
    """Journals a request and turns refusals into gRPC errors without any secret in them."""

    @functools.wraps(method)
    def answer(self: "KubernetesProvider", request: Any, context: Any) -> Answer:
        name, hide = method.__name__, _hidden_texts(request)
        told = {key: getattr(request, key) for key in ("urn", "id", "preview", "type") if getattr(request, key, "")}
        self.journal.add(event="start", operation=name, **told)
        try:
            answered = method(self, request, context)
        except Unfinished as error:
            reason = _redacted(error.reason, hide)
            self.journal.add(event="end", operation=name, error=reason, **told)
            _abort_unfinished(context, error, reason)
            raise
        except (Refusal, ApiError, ValueError) as error:
            reason = _redacted(str(error), hide)
            self.journal.add(event="end", operation=name, error=reason, **told)
            context.abort(grpc.StatusCode.UNKNOWN, reason)
            raise
        self.journal.add(event="end", operation=name, **told)
        return answered

    return answer


class KubernetesProvider(provider_pb2_grpc.ResourceProviderServicer):
    """The provider's protocol over a cluster.

    kubeconfig: of the cluster, with a token; None: the one that Configure brings must itself hold a token
    state: the stand-ins' state file; the journal lies beside it as NAME.kubernetes.jsonl
    """

    def __init__(self, kubeconfig: Mapping[str, Any] | None, state: Path) -> None:
        self._own = kubeconfig
        self.journal = Journal(state.with_name(f"{state.stem}.kubernetes.jsonl"))
        self._cluster: Cluster | None = None
        self._opened: list[Cluster] = []
        self._settings: Plain = {}
        self._cancelled = threading.Event()

    @_answering
    def Handshake(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What the provider can do, on a connection that has just been made."""
        self._cancelled.clear()
        return provider_pb2.ProviderHandshakeResponse(
            accept_secrets=True, accept_resources=False, accept_outputs=False, supports_autonaming_configuration=True
        )

    @_answering
    def Attach(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The engine says where it listens; the stand-in has nothing to tell it."""
        return empty_pb2.Empty()

    @_answering
    def GetPluginInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The version of the SDK that is installed."""
        return plugin_pb2.PluginInfo(version=_version())

    @_answering
    def GetSchema(self, request: Any, context: Any) -> Any:  # noqa: N802
        """An empty schema: programs in Python do not ask for it."""
        return provider_pb2.GetSchemaResponse(schema=json.dumps({"name": "kubernetes", "version": _version()}))

    @_answering
    def CheckConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refuses settings that the provider does not have, and a kubeconfig that nobody could log in with."""
        given = to_plain(request.news)
        failures = [
            provider_pb2.CheckFailure(property=key, reason=f"the kubernetes provider has no setting {key!r}")
            for key in sorted(given.keys() - _SETTINGS)
        ]
        text = given.get("kubeconfig")
        if isinstance(text, str) and text != UNKNOWN:
            try:
                kubeconfigs.check(kubeconfigs.parse(text))
            except ValueError as error:
                failures.append(provider_pb2.CheckFailure(property="kubeconfig", reason=str(error)))
        return provider_pb2.CheckResponse(inputs=request.news, failures=failures)

    @_answering
    def DiffConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A change of clusterIdentifier replaces the provider; where there is none, a change of cluster does."""
        old, new = to_plain(request.old_inputs or request.olds), to_plain(request.news)
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        before, after = old.get("clusterIdentifier"), new.get("clusterIdentifier")
        replaces: list[str] = []
        if before and after:
            replaces = ["clusterIdentifier"] if before != after and after != UNKNOWN else []
        elif "kubeconfig" in changed and UNKNOWN not in (old.get("kubeconfig"), new.get("kubeconfig")):
            replaces = ["kubeconfig"] if _entry(old) != _entry(new) else []
        some, none = provider_pb2.DiffResponse.DIFF_SOME, provider_pb2.DiffResponse.DIFF_NONE
        return provider_pb2.DiffResponse(changes=some if changed else none, diffs=changed, replaces=replaces)

    @_answering
    def Configure(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Logs in. The answer is an error where the real provider would reach no cluster, or not the one meant."""
        given = to_plain(request.args)
        text = given.get("kubeconfig")
        if not text:
            raise Refusal(
                "the default kubernetes provider has no kubeconfig and would take whatever cluster ~/.kube/config "
                "names: give every resource the explicit provider"
            )
        if text == UNKNOWN:
            raise Refusal("configured Kubernetes cluster is unreachable: its kubeconfig is not known yet")
        asked = kubeconfigs.parse(text)
        kubeconfigs.check(asked)
        self._cluster = Cluster(self._login(asked))
        self._opened.append(self._cluster)
        self._settings = {key: _setting(value) for key, value in given.items() if key != "kubeconfig"}
        return provider_pb2.ConfigureResponse(
            acceptSecrets=True, supportsPreview=True, supports_autonaming_configuration=True
        )

    @_answering
    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The inputs with name and namespace filled in, as the provider does where a program leaves them out."""
        api_version, kind = objects.kind_of(_token(request))
        inputs, old = to_plain(request.news, keep_secrets=True), to_plain(request.olds)
        failures = [
            provider_pb2.CheckFailure(
                property=key, reason=f"is {inputs.get(key)!r}, but the resource's type says {wanted!r}"
            )
            for key, wanted in (("apiVersion", api_version), ("kind", kind))
            if inputs.get(key) != wanted
        ]
        metadata = reveal(inputs.get("metadata") or {})
        if metadata == UNKNOWN:
            failures.append(provider_pb2.CheckFailure(property="metadata", reason="must be known in a preview"))
            return provider_pb2.CheckResponse(inputs=request.news, failures=failures)
        if not metadata.get("name") and not metadata.get("generateName"):
            reason = _autoname(request, metadata, old.get("metadata") or {})
            if reason:
                failures.append(provider_pb2.CheckFailure(property="metadata.name", reason=reason))
        if not metadata.get("namespace") and self._cluster is not None:
            found = self._cluster.kind(api_version, kind)
            if found is not None and found.namespaced:
                metadata["namespace"] = self._settings.get("namespace") or "default"
        inputs["metadata"] = secret(metadata) if is_secret(inputs.get("metadata")) else metadata
        try:
            waiting.limit_s(reveal(inputs), 0)
            waiting.check_wait_for(reveal(inputs))
        except ValueError as error:
            failures.append(provider_pb2.CheckFailure(property="metadata.annotations", reason=str(error)))
        return provider_pb2.CheckResponse(inputs=to_struct(inputs), failures=failures)

    @_answering
    def Diff(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What the program changes since the state was written: new inputs against the object in the state.

        As the real provider does it: drift shows only after a refresh, and what replaces stands in a table.
        """
        api_version, kind = objects.kind_of(_token(request))
        outputs = to_plain(request.olds)
        old = objects.object_of(to_plain(request.old_inputs) or outputs.get("__inputs") or {})
        new = objects.object_of(to_plain(request.news))
        known = {key: value for key, value in outputs.items() if not key.startswith("__")}
        base = objects.projected(known, old) if known else old
        mutable = bool(self._settings.get(f"enable{kind}Mutable"))
        detailed: dict[str, Any] = {}
        replaces = ['metadata.annotations["pulumi.com/replaceUnready"]'] if self._is_unready_job(new) else []
        changed = list(objects.changes(base, new))
        for path, how in changed:
            text = objects.text_of(path)
            if objects.replacing(api_version, kind, path, mutable=mutable):
                replaces.append(text)
                how = f"{how}_REPLACE"
            detailed[text] = provider_pb2.PropertyDiff(kind=provider_pb2.PropertyDiff.Kind.Value(how))
        was, will_be = (obj.get("metadata") or {} for obj in (base, new))
        same_place = all(was.get(key) == will_be.get(key) for key in ("name", "namespace"))
        some, none = provider_pb2.DiffResponse.DIFF_SOME, provider_pb2.DiffResponse.DIFF_NONE
        return provider_pb2.DiffResponse(
            changes=some if changed or replaces else none,
            diffs=sorted({str(path[0]) for path, _ in changed}),
            replaces=replaces,
            # Two objects of one name cannot be there at a time, unless Pulumi made the name up.
            deleteBeforeReplace=bool(replaces) and same_place and objects.annotation(new, "autonamed") != "true",
            detailedDiff=detailed,
            hasDetailedDiff=True,
        )

    @_answering
    def Create(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Applies a new object and waits until it is ready; refuses one that is there already, as 4.34 does."""
        marked = to_plain(request.properties, keep_secrets=True)
        obj = objects.object_of(marked)
        if request.preview:
            return provider_pb2.CreateResponse(properties=to_struct(self._previewed(obj, marked, creating=True)))
        cluster = self._reached()
        self._await_kind(cluster, obj)
        name = obj["metadata"].get("name")
        if name and not self._settings.get("upsertExistingObjects") and _live(cluster, obj) is not None:
            raise Refusal(
                f"resource {objects.identifier(obj)} was not created: a {obj['kind']} of that name already exists"
            )
        outputs, identity = self._applied(cluster, obj, marked, request.timeout)
        return provider_pb2.CreateResponse(id=identity, properties=to_struct(outputs))

    @_answering
    def Update(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Applies the new inputs and waits until the object is ready again."""
        marked = to_plain(request.news, keep_secrets=True)
        obj = objects.object_of(marked)
        if request.preview:
            return provider_pb2.UpdateResponse(properties=to_struct(self._previewed(obj, marked, creating=False)))
        outputs, _ = self._applied(self._reached(), obj, marked, request.timeout)
        return provider_pb2.UpdateResponse(properties=to_struct(outputs))

    @_answering
    def Read(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The live object, and the live values of what the inputs speak of. Without an id: it is gone."""
        live = _live(self._reached(), objects.from_identifier(_token(request), request.id))
        if live is None:
            return provider_pb2.ReadResponse()
        marked = to_plain(request.inputs, keep_secrets=True)
        if not marked:
            marked = to_plain(request.properties, keep_secrets=True).get("__inputs") or {}
        plain = objects.object_of(marked)
        found = objects.projected(live, plain) if plain else objects.comparable(live)
        inputs = objects.hidden(live["kind"], found, marked)
        outputs = _outputs(live, inputs)
        return provider_pb2.ReadResponse(
            id=objects.identifier(live), properties=to_struct(outputs), inputs=to_struct(inputs)
        )

    @_answering
    def Delete(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Deletes the object with all that it owns, and waits until it is gone."""
        obj = objects.from_identifier(_token(request), request.id)
        cluster = self._reached()
        try:
            if cluster.kind(obj["apiVersion"], obj["kind"]) is None:
                return empty_pb2.Empty()
            live = _live(cluster, obj)
            if live is not None and cluster.delete(obj, propagation="Foreground"):
                limit = waiting.limit_s(live, request.timeout)
                waiting.until_gone(cluster, obj, limit, self._cancelled)
        except waiting.NotReady as error:
            raise Refusal(str(error)) from error
        except ApiError as error:
            if error.status == 0 and self._settings.get("deleteUnreachable"):
                return empty_pb2.Empty()
            raise
        return empty_pb2.Empty()

    @_answering
    def Invoke(self, request: Any, context: Any) -> Any:  # noqa: N802
        """No function is passed on: they render charts and YAML outside the preview's sight."""
        raise Refusal(f"the function {request.tok} is not passed on: declare each object as a resource")

    @_answering
    def Cancel(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Ends the waits; what they waited for keeps its state and is finished by the next run."""
        self._cancelled.set()
        return empty_pb2.Empty()

    def close(self) -> None:
        """Closes the connections to the cluster; for the end of the server, when no request is under way."""
        for cluster in self._opened:
            cluster.close()

    def _login(self, asked: Plain) -> Plain:
        """The kubeconfig to use: the cluster that the program names, with a token that is valid there."""
        entry, user = active(asked)
        if self._own is None:
            if not user.get("token"):
                raise Refusal("there is no kubelogin to get a token with: the kubeconfig must hold one")
            return asked
        own_entry, own_user = active(self._own)
        if entry["server"].rstrip("/") != own_entry["server"].rstrip("/"):
            raise Refusal(
                f"configured Kubernetes cluster is unreachable: {entry['server']} does not answer, "
                f"only {own_entry['server']} does"
            )
        merged = {"cluster": dict(entry), "user": {"token": user.get("token") or own_user["token"]}}
        return {
            "current-context": "given",
            "clusters": [{"name": "given", "cluster": merged["cluster"]}],
            "users": [{"name": "given", "user": merged["user"]}],
            "contexts": [{"name": "given", "context": {"cluster": "given", "user": "given"}}],
        }

    def _reached(self) -> Cluster:
        if self._cluster is None:
            raise Refusal("configured Kubernetes cluster is unreachable: the provider was never configured")
        return self._cluster

    def _is_unready_job(self, new: Object) -> bool:
        """Whether the annotation pulumi.com/replaceUnready asks for a new Job because this one is not complete."""
        if self._cluster is None or new["kind"] != "Job" or objects.annotation(new, "replaceUnready") != "true":
            return False
        live = _live(self._cluster, new)
        return live is not None and not is_true(live, "Complete")

    def _previewed(self, obj: Object, marked: Plain, *, creating: bool) -> Plain:
        """The outputs as far as a preview can know them: by a dry run where the cluster can make one."""
        known = objects.hidden(str(obj["kind"]), dict(marked), marked)
        if self._cluster is None or has_unknown(obj) or self._cluster.kind(obj["apiVersion"], obj["kind"]) is None:
            return known
        if not obj["metadata"].get("name") or (creating and _live(self._cluster, obj) is not None):
            return known
        try:
            planned = self._apply(self._cluster, obj, dry_run=True)
        except ApiError as error:
            # Its namespace is made by the same run, only later.
            if error.status == 404 and creating:
                return known
            raise
        planned.pop("status", None)
        return _outputs(planned, marked)

    def _applied(self, cluster: Cluster, obj: Object, marked: Plain, option_s: float) -> tuple[Plain, str]:
        """Outputs and id after apply and wait. Raises Unfinished when the object does not become ready."""
        live = self._apply(cluster, obj, dry_run=False)
        identity = objects.identifier(live)
        limit = waiting.limit_s(obj, option_s)
        try:
            ready = waiting.until_ready(cluster, live, limit, self._cancelled)
        except waiting.NotReady as error:
            now = _live(cluster, live) or live
            said = f"the Kubernetes API server reported that {identity!r} failed to fully initialize or become live"
            raise Unfinished(identity, _outputs(now, marked), marked, f"{said}: {error}") from error
        return _outputs(ready, marked), identity

    def _apply(self, cluster: Cluster, obj: Object, *, dry_run: bool) -> Object:
        force = objects.annotation(obj, "patchForce") == "true" or bool(self._settings.get("enablePatchForce"))
        if not obj["metadata"].get("name"):
            return cluster.create(obj)
        try:
            return cluster.apply(obj, manager=MANAGER, force=force, dry_run=dry_run)
        except ApiError as error:
            if error.status != 409:
                raise
            message = (
                f"Server-Side Apply field conflict detected: {error.message}; "
                'take the field out of the program, or add the annotation pulumi.com/patchForce: "true"'
            )
            raise ApiError(409, error.reason, message, error.causes) from error

    def _await_kind(self, cluster: Cluster, obj: Object) -> None:
        """Waits a little for a definition that the same run installs."""
        until = time.monotonic() + _CRD_WAIT_S
        while cluster.kind(obj["apiVersion"], obj["kind"]) is None:
            if time.monotonic() > until or self._cancelled.is_set():
                raise Refusal(
                    f"creation of resource {obj['metadata'].get('name')} failed because the Kubernetes API server "
                    "reported that the apiVersion for this resource does not exist (no matches for kind "
                    f'"{obj["kind"]}" in version "{obj["apiVersion"]}"): verify that its CRD has been created'
                )
            time.sleep(0.5)


def _live(cluster: Cluster, obj: Object) -> Object | None:
    metadata = obj["metadata"]
    return cluster.get(obj["apiVersion"], obj["kind"], metadata["name"], metadata.get("namespace"))


def _outputs(live: Object, marked: Plain) -> Plain:
    """What goes into the state: the live object, and beside it the inputs that made it."""
    metadata = {key: value for key, value in live["metadata"].items() if key != "managedFields"}
    outputs = objects.hidden(live["kind"], live | {"metadata": metadata}, marked)
    inputs = objects.hidden(live["kind"], dict(marked), marked)
    return outputs | {"__inputs": inputs, "__fieldManager": MANAGER, "__initialApiVersion": live["apiVersion"]}


def _autoname(request: Any, metadata: Plain, old: Mapping[str, Any]) -> str:
    """Puts a name into the metadata; gives the reason where none may be made up."""
    annotations = dict(metadata.get("annotations") or {})
    if (old.get("annotations") or {}).get("pulumi.com/autonamed") == "true":
        name = str(old["name"])
    elif request.autonaming.mode == provider_pb2.CheckRequest.AutonamingOptions.DISABLE:
        return "automatic naming is disabled: give the resource a name"
    else:
        name = request.autonaming.proposed_name or f"{_name(request)}-{_random_hex(request)}"
    metadata["name"] = name
    metadata["annotations"] = annotations | {"pulumi.com/autonamed": "true"}
    return ""


def _random_hex(request: Any) -> str:
    """Eight hexadecimal digits, the same ones for the preview and the run where the engine gives a seed."""
    return bytes(request.randomSeed[:4]).hex() if len(request.randomSeed) >= 4 else secrets.token_hex(4)


def _token(request: Any) -> str:
    """The type of the resource, which older engines give in the URN only."""
    return str(request.type or request.urn.split("::")[2].rpartition("$")[2])


def _name(request: Any) -> str:
    return str(request.name or request.urn.rpartition("::")[2])


def _entry(settings: Mapping[str, Any]) -> object:
    """The address of the cluster that settings lead to, None where that is not to be read."""
    text = settings.get("kubeconfig")
    if not isinstance(text, str):
        return None
    try:
        return active(kubeconfigs.parse(text))[0].get("server")
    except ValueError:
        return None


def _setting(value: Any) -> Any:
    """Provider settings that are no strings travel as JSON in a string."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


@functools.cache
def _version() -> str:
    return importlib.metadata.version("pulumi-kubernetes")


def _hidden_texts(request: Any) -> list[str]:
    """The secrets of a request, so that no message repeats them."""
    token = str(getattr(request, "type", "") or "")
    texts: set[str] = set()
    for field in ("news", "properties", "olds", "inputs", "args"):
        struct = getattr(request, field, None)
        if isinstance(struct, struct_pb2.Struct):
            texts.update(objects.secret_texts(token.rpartition(":")[2], to_plain(struct, keep_secrets=True)))
    return sorted(texts, key=len, reverse=True)


def _redacted(text: str, hide: list[str]) -> str:
    return re.sub("|".join(map(re.escape, hide)), "[secret]", text) if hide else text


def _abort_unfinished(context: Any, error: Unfinished, reason: str) -> None:
    """Ends the call with the detail by which the engine keeps the state of what is not ready."""
    detail = provider_pb2.ErrorResourceInitFailed(
        id=error.identity, properties=to_struct(error.outputs), reasons=[reason], inputs=to_struct(error.inputs)
    )
    packed = any_pb2.Any()
    packed.Pack(detail)
    status = status_pb2.Status(code=grpc.StatusCode.UNKNOWN.value[0], message=reason, details=[packed])
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(grpc.StatusCode.UNKNOWN, reason)
