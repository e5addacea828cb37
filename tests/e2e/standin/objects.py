"""Kubernetes objects as Pulumi's kubernetes provider handles them: which kind a token is, what changed, what replaces.

Nothing here speaks to a cluster. The behaviour is pulumi-kubernetes 4.x's with server-side apply.
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from standin.cluster import Object, milli
from standin.wire import is_secret, reveal, secret

Path = tuple[str | int, ...]

# A change here replaces the object. Source: pulumi-kubernetes, provider/pkg/provider/diff.go (2026-08). The list has no
# DaemonSet: the real one writes the kind `Daemonset`, so a new selector there is an update that the server refuses.
_REPLACING: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("v1", "ConfigMap"): ("data", "binaryData"),
    ("v1", "Secret"): ("type", "data", "stringData"),
    ("v1", "Service"): ("spec.clusterIP",),
    ("v1", "PersistentVolume"): ("spec.csi", "spec.nfs", "spec.azureFile", "spec.azureDisk", "spec.hostPath"),
    ("v1", "PersistentVolumeClaim"): ("spec",),
    ("v1", "ResourceQuota"): ("spec.scopes",),
    ("apps/v1", "Deployment"): ("spec.selector",),
    ("apps/v1", "StatefulSet"): (
        "spec.podManagementPolicy",
        "spec.revisionHistoryLimit",
        "spec.selector",
        "spec.serviceName",
        "spec.volumeClaimTemplates",
    ),
    ("batch/v1", "Job"): ("spec.completions", "spec.parallelism", "spec.selector", "spec.template"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): ("roleRef",),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"): ("roleRef",),
    ("storage.k8s.io/v1", "StorageClass"): ("parameters", "provisioner"),
}
_IDENTITY = ("metadata.name", "metadata.namespace")
_SERVER_SET = ("managedFields", "resourceVersion", "generation", "creationTimestamp", "uid", "selfLink")
# Below these keys values are quantities, which the server writes in its own form (`0.5` as `500m`).
_QUANTITIES = ("limits", "requests", "capacity", "hard", "sizeLimit", "divisor", "overhead", "storage")
_LIST_KEYS = ("name", "containerPort", "mountPath", "devicePath", "key", "topologyKey", "ip", "type")


def kind_of(token: str) -> tuple[str, str]:
    """`kubernetes:core/v1:Namespace` -> ("v1", "Namespace"). Raises ValueError for what is no single object."""
    parts = token.split(":")
    if len(parts) != 3 or parts[0] != "kubernetes" or "/" not in parts[1]:
        raise ValueError(f"{token!r} is not a resource of the kubernetes provider")
    group, _, version = parts[1].partition("/")
    kind = parts[2]
    if group in ("helm.sh", "yaml", "kustomize") or kind.endswith("Patch"):
        raise ValueError(f"{token} is not one object of the cluster, and this stand-in passes on only those")
    return (version if group == "core" else f"{group}/{version}"), kind


def object_of(inputs: Mapping[str, Any]) -> Object:
    """The object to send: secrets revealed, nothing where a value is None."""
    cleaned: Object = _without_none(reveal(dict(inputs)))
    return cleaned


def identifier(obj: Mapping[str, Any]) -> str:
    """Pulumi's id of an object: `namespace/name`, or the name alone."""
    metadata = obj["metadata"]
    return f"{metadata['namespace']}/{metadata['name']}" if metadata.get("namespace") else str(metadata["name"])


def from_identifier(token: str, identity: str) -> Object:
    """What must be known of an object to find it."""
    api_version, kind = kind_of(token)
    namespace, _, name = identity.rpartition("/")
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}


def annotation(obj: Mapping[str, Any], name: str) -> str:
    """The value of a `pulumi.com/` annotation, empty where there is none."""
    annotations = (obj.get("metadata") or {}).get("annotations") or {}
    return str(annotations.get(f"pulumi.com/{name}", ""))


def comparable(live: Object) -> Object:
    """The object without what the server writes of its own: status and bookkeeping."""
    metadata = {key: value for key, value in live["metadata"].items() if key not in _SERVER_SET}
    return {key: value for key, value in live.items() if key != "status"} | {"metadata": metadata}


def changes(old: Any, new: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """The paths at which two values differ, each with "ADD", "DELETE" or "UPDATE"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in new:
                yield (*path, key), "DELETE"
            elif key not in old:
                yield (*path, key), "ADD"
            else:
                yield from changes(old[key], new[key], (*path, key))
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            if index >= len(new):
                yield (*path, index), "DELETE"
            elif index >= len(old):
                yield (*path, index), "ADD"
            else:
                yield from changes(old[index], new[index], (*path, index))
    elif old != new and not _same_quantity(old, new, path):
        yield path, "UPDATE"


def replacing(api_version: str, kind: str, path: Path, *, mutable: bool = False) -> bool:
    """Whether a change at that path replaces the object; mutable: ConfigMaps and Secrets may change in place."""
    fields = _IDENTITY + (
        () if mutable and kind in ("ConfigMap", "Secret") else _REPLACING.get((api_version, kind), ())
    )
    keys = [part for part in path if isinstance(part, str)]
    for field in fields:
        wanted = field.split(".")
        # A change above the field (the whole `spec` is new) counts as one of the field.
        if keys[: len(wanted)] == wanted or (keys and wanted[: len(keys)] == keys):
            return True
    return False


def text_of(path: Path) -> str:
    """A path in Pulumi's notation: `spec.containers[0]["a.b/c"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_$][A-Za-z0-9_$-]*", part):
            text += f".{part}" if text else part
        else:
            text += f'["{part}"]'
    return text


def projected(live: Any, inputs: Any, path: Path = ()) -> Any:
    """The live values at the places that the inputs speak of: what Read gives as the new inputs.

    A quantity that the server only writes differently stays as it was given.
    """
    if isinstance(inputs, dict) and isinstance(live, dict):
        found = {key: projected(live[key], part, (*path, key)) for key, part in inputs.items() if key in live}
        if "stringData" in inputs and isinstance(live.get("data"), dict):
            found["stringData"] = {
                key: base64.b64decode(live["data"][key]).decode(errors="replace")
                for key in inputs["stringData"]
                if key in live["data"]
            }
        return found
    if isinstance(inputs, list) and isinstance(live, list):
        if len(inputs) == len(live):
            return [projected(*pair, path) for pair in zip(live, inputs, strict=True)]
        return _projected_list(live, inputs, path)
    return inputs if _same_quantity(live, inputs, path) else live


def hidden(kind: str, outputs: Object, inputs: Mapping[str, Any]) -> Object:
    """The outputs with secrets marked: where the inputs were secret, and what a Secret holds."""
    marked: Object = _marked_like(outputs, inputs)
    if kind == "Secret":
        for field in ("data", "stringData"):
            if field in marked:
                marked[field] = secret(reveal(marked[field]))
    return marked


def secret_texts(kind: str, inputs: Mapping[str, Any]) -> list[str]:
    """The strings that must not be shown: those marked, and what a Secret holds, also in base64."""
    found = list(_texts(inputs, inside=False))
    if kind == "Secret":
        for field in ("data", "stringData"):
            found += _texts(reveal(inputs.get(field) or {}), inside=True)
    encoded = [base64.b64encode(text.encode()).decode() for text in found]
    return sorted({text for text in (*found, *encoded) if len(text) >= 4}, key=len, reverse=True)


def _texts(value: Any, *, inside: bool) -> Iterator[str]:
    if is_secret(value):
        yield from _texts(reveal(value), inside=True)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part, inside=inside)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, inside=inside)
    elif inside and isinstance(value, str):
        yield value


def _marked_like(value: Any, like: Any) -> Any:
    if is_secret(like):
        return secret(reveal(value))
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: _marked_like(part, like.get(key)) for key, part in value.items()}
    if isinstance(value, list) and isinstance(like, list):
        # Its order may differ from that of the inputs, so the whole list is a secret where a part of them is.
        return secret(reveal(value)) if reveal(like) != like else value
    return value


def _same_quantity(one: Any, other: Any, path: Path) -> bool:
    if not any(key in _QUANTITIES for key in path) or isinstance(one, bool) or isinstance(other, bool):
        return False
    if not isinstance(one, str | int | float) or not isinstance(other, str | int | float):
        return False
    amount = milli(one)
    return amount is not None and amount == milli(other)


def _projected_list(live: Sequence[Any], inputs: Sequence[Any], path: Path) -> list[Any]:
    """Items found again by the key that names them; a list without such a key as it is."""
    items = [item for item in (*live, *inputs) if isinstance(item, dict)]
    key = next((name for name in _LIST_KEYS if items and all(name in item for item in items)), None)
    if key is None or len(items) != len(live) + len(inputs):
        return list(live)
    by_name = {item[key]: item for item in live}
    return [projected(by_name[item[key]], item, path) for item in inputs if item[key] in by_name]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_none(part) for part in value if part is not None]
    return value
