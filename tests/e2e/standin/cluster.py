"""A small client of the Kubernetes API: objects as plain dicts, kinds found by discovery, errors as ApiError."""

import base64
import re
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

Object = dict[str, Any]


class ApiError(Exception):
    """The API server refused: its HTTP status, its reason and message, and the fields it names."""

    def __init__(self, status: int, reason: str, message: str, causes: tuple[Mapping[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.causes = status, reason, message, causes


@dataclass(frozen=True)
class Kind:
    """Where objects of a kind live: the path of their API version, their plural name, whether in namespaces."""

    root: str
    plural: str
    namespaced: bool


class Cluster:
    """One API server, as one user. Thread-safe."""

    def __init__(self, kubeconfig: Mapping[str, Any]) -> None:
        entry, user = active(kubeconfig)
        self.server: str = entry["server"].rstrip("/")
        headers = {"Authorization": f"Bearer {user['token']}"} if "token" in user else {}
        authority = base64.b64decode(entry["certificate-authority-data"]).decode()
        self._http = httpx.Client(
            base_url=self.server,
            headers=headers,
            verify=ssl.create_default_context(cadata=authority),
            timeout=60,
            trust_env=False,
        )
        self._kinds: dict[tuple[str, str], Kind] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def request(self, method: str, path: str, *, body: Any = None, kind: str = "application/json", **query: str) -> Any:
        """The parsed answer of any request; text where it is not JSON. Raises ApiError, also where nobody answers."""
        headers = {} if body is None else {"Content-Type": kind}
        try:
            answer = self._http.request(method, path, json=body, headers=headers, params=query)
        except httpx.TransportError as error:
            raise ApiError(
                0, "Unreachable", f"the Kubernetes cluster at {self.server} is unreachable: {error}"
            ) from error
        if answer.is_success:
            is_json = answer.headers.get("content-type", "").startswith("application/json")
            return answer.json() if is_json else answer.text
        raise _error(answer)

    def kind(self, api_version: str, kind: str) -> Kind | None:
        """Where the kind lives, None where the cluster does not know it (its definition may come later)."""
        key = (api_version, kind)
        with self._lock:
            if key not in self._kinds:
                root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
                try:
                    resources = self.request("GET", root)["resources"]
                except ApiError as error:
                    if error.status == 404:
                        return None
                    raise
                for entry in resources:
                    if "/" not in entry["name"]:
                        self._kinds[api_version, entry["kind"]] = Kind(root, entry["name"], entry["namespaced"])
            return self._kinds.get(key)

    def path(
        self, api_version: str, kind: str, namespace: str | None = None, name: str = "", subresource: str = ""
    ) -> str:
        """The path of an object, or of a collection without a name. Raises ApiError for a kind that is not known."""
        found = self.kind(api_version, kind)
        if found is None:
            raise ApiError(404, "NoMatch", f'no matches for kind "{kind}" in version "{api_version}"')
        scope = f"/namespaces/{namespace}" if found.namespaced and namespace else ""
        return "/".join(part for part in (f"{found.root}{scope}/{found.plural}", name, subresource) if part)

    def get(self, api_version: str, kind: str, name: str, namespace: str | None = None) -> Object | None:
        """The object, None where there is none."""
        try:
            found: Object = self.request("GET", self.path(api_version, kind, namespace, name))
        except ApiError as error:
            if error.status == 404 and error.reason != "NoMatch":
                return None
            raise
        return found

    def list(self, api_version: str, kind: str, namespace: str | None = None, **query: str) -> list[Object]:
        """All objects of a kind, in one namespace or in all; query: labelSelector, fieldSelector."""
        items: list[Object] = self.request("GET", self.path(api_version, kind, namespace), **query)["items"]
        return [{"apiVersion": api_version, "kind": kind} | item for item in items]

    def create(self, obj: Object) -> Object:
        """The object as created."""
        created: Object = self.request("POST", self.path_of(obj, named=False), body=obj)
        return created

    def apply(self, obj: Object, *, manager: str, force: bool = False, dry_run: bool = False) -> Object:
        """The object after server-side apply; 409 where another manager owns a field and force is off."""
        query = {"fieldManager": manager, "force": "true" if force else "false"} | (
            {"dryRun": "All"} if dry_run else {}
        )
        applied: Object = self.request(
            "PATCH", self.path_of(obj), body=obj, kind="application/apply-patch+yaml", **query
        )
        return applied

    def merge(self, obj: Object, patch: Object, subresource: str = "", *, manager: str = "cloud") -> Object:
        """The object after a JSON merge patch, of itself or of a subresource such as `status`."""
        path = self.path_of(obj, subresource=subresource)
        kind = "application/merge-patch+json"
        merged: Object = self.request("PATCH", path, body=patch, kind=kind, fieldManager=manager)
        return merged

    def delete(self, obj: Object, *, propagation: str = "Background", grace_s: int | None = None) -> bool:
        """Asks for the deletion; False where the object was gone already."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        body |= {} if grace_s is None else {"gracePeriodSeconds": grace_s}
        try:
            self.request("DELETE", self.path_of(obj), body=body)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    def path_of(self, obj: Object, *, named: bool = True, subresource: str = "") -> str:
        """The path of an object that says itself what it is."""
        metadata = obj["metadata"]
        name = metadata["name"] if named else ""
        return self.path(obj["apiVersion"], obj["kind"], metadata.get("namespace"), name, subresource)


def active(kubeconfig: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The cluster and the user of the current context. Raises ValueError where either is missing."""
    contexts = {entry["name"]: entry["context"] for entry in kubeconfig.get("contexts") or ()}
    name = kubeconfig.get("current-context") or ""
    if name not in contexts:
        raise ValueError(
            "invalid configuration: no configuration has been provided (its current-context names no context)"
        )
    clusters = {entry["name"]: entry.get("cluster") or {} for entry in kubeconfig.get("clusters") or ()}
    users = {entry["name"]: entry.get("user") or {} for entry in kubeconfig.get("users") or ()}
    cluster, user = clusters.get(contexts[name].get("cluster")), users.get(contexts[name].get("user"))
    if not cluster or not cluster.get("server"):
        raise ValueError(f"invalid configuration: no server found for the cluster of context {name!r}")
    if user is None:
        raise ValueError(f"invalid configuration: context {name!r} names a user that is not there")
    return cluster, user


def condition(obj: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The status condition of that type, empty where there is none."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((entry for entry in conditions if entry["type"] == kind), {})


def is_true(obj: Mapping[str, Any], kind: str) -> bool:
    """Whether the status condition of that type is True."""
    return condition(obj, kind).get("status") == "True"


_QUANTITY = re.compile(r"([+-]?[0-9.]+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|)")
_UNITS: dict[str, int] = {"": 1000, "m": 1} | {unit: 1000 ** (i + 2) for i, unit in enumerate("kMGTPE")}
_UNITS |= {f"{unit}i": 1000 * 1024 ** (i + 1) for i, unit in enumerate("KMGTPE")}


def milli(quantity: str | int | float) -> int | None:
    """A Kubernetes quantity in thousandths (`500m` -> 500, `1Gi` -> 1073741824000); None for what is no quantity."""
    match = _QUANTITY.fullmatch(str(quantity))
    if match is None or match[1].count(".") > 1 or not re.search(r"\d", match[1]):
        return None
    whole, _, part = match[1].partition(".")
    unit = _UNITS[match[2]]
    return int(whole or 0) * unit + (int(part) * unit // int(10 ** len(part)) if part else 0)


def _error(answer: httpx.Response) -> ApiError:
    try:
        status = answer.json()
    except ValueError:
        return ApiError(answer.status_code, answer.reason_phrase, answer.text.strip() or answer.reason_phrase)
    causes = tuple((status.get("details") or {}).get("causes") or ())
    return ApiError(answer.status_code, status.get("reason", ""), status.get("message", answer.text), causes)
