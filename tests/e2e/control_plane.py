"""A Kubernetes control plane of one's own, with pretend nodes: etcd, API server, controllers, scheduler, KWOK.

Everything listens on 127.0.0.1 and lives in one folder. The scheduler, the controllers and admission are the real ones.
Pretended are the kubelets (KWOK), the machines (`pools`), the NVIDIA device plugin's registration of GPUs, and the
cluster autoscaler (`autoscaler`).
"""

import base64
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import yaml
from autoscaler import grow
from kwok import STAGES
from pools import GPU, GPUS_ANNOTATION, SPOT_KEY, Pool, node_name, node_of
from standin.cluster import ApiError, Cluster, Object, condition, is_true
from tools import Engines, engines

T = TypeVar("T")

# The definitions that AKS installs with the add-ons for managed Prometheus, Key Vault and KEDA.
AKS_CRDS = ("azmonitoring.coreos.com", "secrets-store.csi.x-k8s.io", "keda.sh")
EXPANDER = "cluster-autoscaler-priority-expander"
# Put on a spot node that Azure is about to take. Source: AKS docs, node-auto-drain.md (2026-08).
PREEMPTED = {"key": "remediator.kubernetes.azure.com/unschedulable", "effect": "NoSchedule"}
_BEAT_S = 0.2
_START_S = 90


class ControlPlane:
    """A running cluster.

    kubeconfig: of an administrator, as a dict; cluster: a client with it; folder: logs and data
    unavailable: names of pools for which Azure has no machines just now; a test may change it at any time
    """

    def __init__(self, folder: Path, kubeconfig: Object, issuer: str) -> None:
        self.folder, self.kubeconfig, self.issuer = folder, kubeconfig, issuer
        self.cluster = Cluster(kubeconfig)
        self.unavailable: set[str] = set()
        self._pools: list[Pool] = []
        self._indices: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._cloud = threading.Thread(target=self._run_cloud, name="cloud", daemon=True)

    @property
    def server(self) -> str:
        """The address of the API server."""
        return self.cluster.server

    def add_node(self, pool: Pool, index: int | None = None) -> str:
        """Makes a pretend node of the pool (`pools.Pool`), by default the next one. Gives its name."""
        with self._lock:
            following = self._indices.get(pool["name"], 0)
            index = following if index is None else index
            self._indices[pool["name"]] = max(index + 1, following)
        self.cluster.create(node_of(pool, index))
        return node_name(pool, index)

    def autoscale(self, pools: Sequence[Pool]) -> None:
        """From now on pools have their minimum of nodes and grow to their maximum for pods that fit nowhere else."""
        for pool in pools:
            for _ in range(len(self.nodes(pool["name"])), int(pool["min_count"])):
                self.add_node(pool)
        self._pools = list(pools)

    def evict_spot(self, name: str, *, notice: bool = True) -> None:
        """Azure takes a spot node back.

        With notice AKS taints and cordons the node and drains it with the eviction API within the 30 s, then the
        machine and its Node object go. Without, the machine is just gone, and the garbage collector of pods ends what
        ran on it (after its own 40 s of quarantine). Both give the pods the condition DisruptionTarget.
        """
        node = self.cluster.get("v1", "Node", name)
        if node is None or node["metadata"]["labels"].get(SPOT_KEY) != "spot":
            raise ValueError(f"{name} is not a spot node of this cluster: Azure takes back only those")
        if notice:
            taints = [*(node["spec"].get("taints") or ()), PREEMPTED]
            self.cluster.merge(node, {"spec": {"unschedulable": True, "taints": taints}})
            self._drain(name)
        self.cluster.delete(node)

    def delete_nodes(self, pool: str) -> None:
        """The machines of a pool go, without a drain, as when AKS deletes the pool."""
        for node in self.nodes(pool):
            self.cluster.delete(node)

    def pods(self, namespace: str | None = None, labels: str = "") -> list[Object]:
        """The pods of a namespace, or of all, chosen by a label selector such as `app=vllm`."""
        return self.cluster.list("v1", "Pod", namespace, **({"labelSelector": labels} if labels else {}))

    def nodes(self, pool: str | None = None) -> list[Object]:
        """The nodes, or those of one pool."""
        return self.cluster.list("v1", "Node", **({"labelSelector": f"agentpool={pool}"} if pool else {}))

    def pool_of_pod(self, pod: Object) -> str | None:
        """The name of the pool that a pod runs in, None where it is not scheduled or its node is gone."""
        node = self.cluster.get("v1", "Node", pod["spec"].get("nodeName") or "-")
        return None if node is None else str(node["metadata"]["labels"]["agentpool"])

    def finish_pod(self, name: str, exit_code: int = 0, *, namespace: str = "default") -> None:
        """Ends the containers of a running pod with that exit code, as its kubelet would report it."""
        pod = self.cluster.get("v1", "Pod", name, namespace)
        if pod is None or pod["status"]["phase"] != "Running":
            raise ValueError(f"pod {namespace}/{name} is not running, so its containers cannot end")
        policy = pod["spec"]["restartPolicy"]
        if policy == "Always" or (policy == "OnFailure" and exit_code):
            raise ValueError(
                f"pod {namespace}/{name} has restartPolicy {policy}: its kubelet would restart the container"
            )
        reason = "Error" if exit_code else "Completed"
        ended = {"terminated": {"exitCode": exit_code, "reason": reason, "finishedAt": _now()}}
        statuses = [
            {key: value for key, value in status.items() if key != "state"}
            | {"ready": False, "started": False, "state": ended}
            for status in pod["status"]["containerStatuses"]
        ]
        conditions = [
            entry | {"status": "False", "reason": "PodCompleted"}
            if entry["type"] in ("Ready", "ContainersReady")
            else entry
            for entry in pod["status"]["conditions"]
        ]
        phase = "Failed" if exit_code else "Succeeded"
        status = {"phase": phase, "containerStatuses": statuses, "conditions": conditions}
        self.cluster.merge(pod, {"status": status}, "status")

    def wait_for(self, predicate: Callable[[], T | None], seconds: float = 60, what: str = "") -> T:
        """What the predicate gives once it is true. Raises AssertionError with the pods and why they wait."""
        until = time.monotonic() + seconds
        while True:
            if self._failure is not None:
                raise AssertionError(f"the pretended cloud failed: {self._failure}") from self._failure
            found = predicate()
            if found:
                return found
            if time.monotonic() > until:
                raise AssertionError(f"waited {seconds:g} s in vain for {what or 'a condition'}; {self._describe()}")
            time.sleep(_BEAT_S)

    def close(self) -> None:
        """Ends the pretended cloud; the processes end with `control_plane`."""
        self._stop.set()
        if self._cloud.is_alive():
            self._cloud.join()
        self.cluster.close()

    def _start_cloud(self) -> None:
        self._cloud.start()

    def _run_cloud(self) -> None:
        while not self._stop.wait(_BEAT_S):
            try:
                self._beat()
            except ApiError as error:
                # An object changed or went between reading and writing it: the next beat sees the new state.
                if error.status not in (404, 409):
                    self._failure = error
                    return
            except (KeyError, ValueError, TypeError) as error:
                self._failure = error
                return

    def _beat(self) -> None:
        pods, nodes = self.pods(), self.nodes()
        for node in nodes:
            self._register_gpus(node, pods)
        if self._pools:
            expander = self.cluster.get("v1", "ConfigMap", EXPANDER, "kube-system") or {}
            priorities = (expander.get("data") or {}).get("priorities", "")
            sets = self.cluster.list("apps/v1", "DaemonSet")
            for pool in grow(pods, nodes, sets, self._pools, unavailable=self.unavailable, priorities=priorities):
                self.add_node(pool)

    def _register_gpus(self, node: Object, pods: Sequence[Object]) -> None:
        """The kubelet offers GPUs while a device plugin is connected to it, and none afterwards."""
        gpus = int(node["metadata"].get("annotations", {}).get(GPUS_ANNOTATION, 0))
        here = [pod for pod in pods if pod["spec"].get("nodeName") == node["metadata"]["name"]]
        wanted = str(gpus) if gpus and any(_is_device_plugin(pod) for pod in here) else "0"
        if node["status"].get("allocatable", {}).get(GPU, "0") != wanted:
            self.cluster.merge(node, {"status": {"capacity": {GPU: wanted}, "allocatable": {GPU: wanted}}}, "status")

    def _drain(self, name: str) -> None:
        """Evicts what is no DaemonSet's pod. What a disruption budget holds back goes with the machine."""
        for pod in self.cluster.list("v1", "Pod", fieldSelector=f"spec.nodeName={name}"):
            owners = pod["metadata"].get("ownerReferences") or ()
            if any(owner["kind"] == "DaemonSet" for owner in owners):
                continue
            metadata = {key: pod["metadata"][key] for key in ("name", "namespace")}
            eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
            try:
                self.cluster.request("POST", self.cluster.path_of(pod, subresource="eviction"), body=eviction)
            except ApiError as error:
                if error.status not in (404, 429):
                    raise
        until = time.monotonic() + 30
        while time.monotonic() < until:
            left = self.cluster.list("v1", "Pod", fieldSelector=f"spec.nodeName={name}")
            if not any(pod["metadata"].get("deletionTimestamp") for pod in left):
                return
            time.sleep(_BEAT_S)

    def _describe(self) -> str:
        """The pods, each with its phase, node and the reason why it waits."""
        lines = []
        for pod in self.pods():
            status, metadata = pod.get("status") or {}, pod["metadata"]
            where = pod["spec"].get("nodeName") or condition(pod, "PodScheduled").get("message", "not scheduled")
            lines.append(f"{metadata['namespace']}/{metadata['name']} {status.get('phase')} ({where})")
        return (
            f"nodes: {', '.join(node['metadata']['name'] for node in self.nodes()) or 'none'}; pods: {'; '.join(lines)}"
        )


@contextmanager
def control_plane(
    folder: Path,
    *,
    issuer: str = "https://issuer.test/",
    crds: Collection[str] = AKS_CRDS,
    programs: Engines | None = None,
) -> Iterator[ControlPlane]:
    """A control plane that has started, and that is gone with all its processes afterwards.

    issuer: of service account tokens, as AKS's OIDC issuer is; crds: API groups whose definitions are installed.
    Raises tools.Missing where the programs cannot be had, RuntimeError with a log's end where one does not start.
    """
    found = programs or engines()
    folder.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        kubeconfig = _start_server(found, folder, processes, issuer)
        plane = ControlPlane(folder, kubeconfig, issuer)
        try:
            _start_rest(found, folder, processes, plane)
            _install(plane.cluster, [file for group in crds for file in found.crds[group]])
            plane._start_cloud()
            yield plane
        finally:
            plane.close()
    finally:
        _end(processes)


def _start_server(found: Engines, folder: Path, processes: list[subprocess.Popen[bytes]], issuer: str) -> Object:
    """etcd and the API server; gives an administrator's kubeconfig once it is ready."""
    client_port, peer_port, port = _free_port(), _free_port(), _free_port()
    etcd_url, peer_url = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    token, key = secrets.token_urlsafe(24), folder / "service-account.pem"
    key.write_text(_signing_key(), encoding="ascii")
    key.chmod(0o600)
    (folder / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n', encoding="ascii")
    (folder / "tokens.csv").chmod(0o600)
    processes.append(
        _run(
            folder, "etcd", found.etcd, f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn",
            f"--listen-client-urls={etcd_url}", f"--advertise-client-urls={etcd_url}",
            f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=default={peer_url}",
        )
    )  # fmt: skip
    processes.append(
        _run(
            folder, "kube-apiserver", found.kube_apiserver, f"--etcd-servers={etcd_url}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={port}",
            f"--cert-dir={folder / 'certificates'}", f"--token-auth-file={folder / 'tokens.csv'}",
            "--authorization-mode=RBAC", "--anonymous-auth=false", "--service-cluster-ip-range=10.0.0.0/16",
            f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
            f"--service-account-issuer={issuer}", "--endpoint-reconciler-type=none",
            "--allow-privileged=true",
        )
    )  # fmt: skip
    certificate = folder / "certificates" / "apiserver.crt"
    _until(lambda: certificate.exists(), processes, folder, "the API server's certificate")
    kubeconfig = _kubeconfig(f"https://127.0.0.1:{port}", certificate.read_bytes(), token)
    (folder / "kubeconfig.yaml").write_text(yaml.safe_dump(kubeconfig), encoding="utf-8")
    (folder / "kubeconfig.yaml").chmod(0o600)
    probe = Cluster(kubeconfig)
    try:
        _until(lambda: _answers(probe), processes, folder, "the API server")
    finally:
        probe.close()
    return kubeconfig


def _start_rest(found: Engines, folder: Path, processes: list[subprocess.Popen[bytes]], plane: ControlPlane) -> None:
    """Scheduler, controllers and KWOK; back once service accounts are made."""
    kubeconfig, certificate = folder / "kubeconfig.yaml", folder / "certificates" / "apiserver.crt"
    stages = folder / "stages.yaml"
    stages.write_text(yaml.safe_dump_all(STAGES), encoding="utf-8")
    shared = (f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--secure-port=0")
    processes.append(_run(folder, "kube-scheduler", found.kube_scheduler, *shared))
    processes.append(
        _run(
            folder, "kube-controller-manager", found.kube_controller_manager, *shared,
            f"--root-ca-file={certificate}", f"--service-account-private-key-file={folder / 'service-account.pem'}",
            # the pretended kubelets send no heartbeats: a node would count as lost without this, its pods as unready
            "--node-monitor-grace-period=24h",
        )
    )  # fmt: skip
    processes.append(
        _run(
            folder, "kwok", found.kwok, f"--kubeconfig={kubeconfig}", f"--config={stages}",
            "--manage-all-nodes=true", f"--server-address=127.0.0.1:{_free_port()}", "--node-ip=127.0.0.1",
            "--cidr=10.244.0.0/16",
        )
    )  # fmt: skip
    ready = lambda: plane.cluster.get("v1", "ServiceAccount", "default", "default")  # noqa: E731
    _until(ready, processes, folder, "the controllers")


def _install(cluster: Cluster, files: Sequence[Path]) -> None:
    """Installs definitions of custom resources and waits until they are served."""
    definitions = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for definition in definitions:
        cluster.apply(definition, manager="addons")
    until = time.monotonic() + _START_S
    for definition in definitions:
        kind, name = definition["kind"], definition["metadata"]["name"]
        while not is_true(cluster.get(definition["apiVersion"], kind, name) or {}, "Established"):
            if time.monotonic() > until:
                raise RuntimeError(f"the API server does not serve {name}")
            time.sleep(0.05)


def _run(folder: Path, name: str, program: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own (Ctrl-C is ours to handle), its output in a log."""
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [program, *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_DIE_WITH_PARENT,
        )


def _death_signal() -> Callable[[], None] | None:
    """On Linux: what makes a child end when this process is killed and cannot clean up."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    pr_set_pdeathsig = 1

    def ask() -> None:
        prctl(pr_set_pdeathsig, signal.SIGTERM)

    return ask


_DIE_WITH_PARENT = _death_signal()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends the processes, the last started first; kills what does not go."""
    for process in reversed(processes):
        process.terminate()
    for process in reversed(processes):
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until(ready: Callable[[], object], processes: Sequence[subprocess.Popen[bytes]], folder: Path, what: str) -> None:
    until = time.monotonic() + _START_S
    while not ready():
        dead = next((process for process in processes if process.poll() is not None), None)
        if dead is not None or time.monotonic() > until:
            program = Path(os.fsdecode(dead.args[0] if dead else processes[-1].args[0])).name  # type: ignore[index, arg-type]
            log = (folder / f"{program}.log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{what} did not start; {program} said: {log[-1500:]}")
        time.sleep(0.05)


def _answers(cluster: Cluster) -> bool:
    try:
        return bool(cluster.request("GET", "/readyz") == "ok")
    except ApiError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _kubeconfig(server: str, certificate: bytes, token: str) -> Object:
    authority = base64.b64encode(certificate).decode()
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority-data": authority}}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
    }


def _signing_key() -> str:
    """A fresh P-256 key in PEM (RFC 5915), which needs no library: the public half follows from the number."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    number = (secrets.randbelow(order - 1) + 1).to_bytes(32, "big")
    prime256v1 = bytes.fromhex("a00a06082a8648ce3d030107")
    body = bytes.fromhex("0201010420") + number + prime256v1
    text = base64.b64encode(bytes([0x30, len(body)]) + body).decode()
    return f"-----BEGIN EC PRIVATE KEY-----\n{text[:64]}\n{text[64:]}\n-----END EC PRIVATE KEY-----\n"


def _is_device_plugin(pod: Object) -> bool:
    """A running NVIDIA device plugin that can reach the kubelet's socket."""
    sockets = {
        volume["name"]
        for volume in pod["spec"].get("volumes") or ()
        if (volume.get("hostPath") or {}).get("path", "").rstrip("/") == "/var/lib/kubelet/device-plugins"
    }
    connected = any(
        "k8s-device-plugin" in container["image"]
        and any(mount["name"] in sockets for mount in container.get("volumeMounts") or ())
        for container in pod["spec"]["containers"]
    )
    return connected and is_true(pod, "Ready") and not pod["metadata"].get("deletionTimestamp")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
