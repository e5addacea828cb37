"""Starts both stand-in providers, each a gRPC server on a port of its own: `python -m standin.serve --directory DIR`.

The first line of output is JSON with the ports. DIR holds all that there is to see or to set: azure.json (the state),
journal.jsonl, journal.kubernetes.jsonl, faults.json and quota.json. SIGTERM and SIGINT end it; started again, it
knows what it knew.
"""

import argparse
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import yaml
from pulumi.runtime.proto import provider_pb2_grpc

from standin import faults, store
from standin.arm import Arm
from standin.azure import AzureProvider

MESSAGE_LIMIT_BYTES = 400 * 1024 * 1024
START_LIMIT_S = 60


@dataclass
class Standins:
    """The running stand-ins: their ports by provider name, and the files in their directory."""

    process: "subprocess.Popen[str]"
    directory: Path
    ports: dict[str, int]

    @property
    def debug_providers(self) -> str:
        """The value of PULUMI_DEBUG_PROVIDERS."""
        return ",".join(f"{name}:{port}" for name, port in sorted(self.ports.items()))

    def journal(self, **wanted: Any) -> list[dict[str, Any]]:
        """The requests so far, those whose entries have the wanted values."""
        lines = store.entries(self.directory / "journal.jsonl")
        return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]

    def kubernetes_journal(self, **wanted: Any) -> list[dict[str, Any]]:
        """The requests to the kubernetes provider so far; see standin.kubernetes for what an entry holds."""
        lines = store.entries(self.directory / "journal.kubernetes.jsonl")
        return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]

    def set_faults(self, *wanted: dict[str, Any]) -> None:
        """From now on these faults, and no others; see standin.faults."""
        faults.write(self.directory / "faults.json", list(wanted))

    def set_quota(self, limits: dict[str, int], sizes: dict[str, dict[str, Any]]) -> None:
        """Regional vCPU limits by quota family, and the family and vCPUs of each VM size."""
        text = json.dumps({"limits": limits, "sizes": sizes})
        (self.directory / "quota.json").write_text(text, encoding="utf-8")

    def resources(self) -> dict[str, dict[str, Any]]:
        """What exists in Azure, by lower-case id."""
        found = store.Store(self.directory / "azure.json").read()["resources"]
        assert isinstance(found, dict)
        return found

    def edit(self, resource_id: str, **inputs: Any) -> None:
        """Change a resource behind Pulumi's back, as a person or an autoscaler does."""
        with store.Store(self.directory / "azure.json").edit() as state:
            state["resources"][resource_id.lower()]["inputs"].update(inputs)

    def stop(self) -> None:
        """End the process; the directory stays."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=START_LIMIT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


def start(directory: Path, kubeconfig: Path | None = None, *, lag_s: float = 60.0) -> Standins:
    """Start the stand-ins in a process of their own. Without a kubeconfig only azure-native is there."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "standin.serve", "--directory", str(directory), "--lag", str(lag_s)]
    if kubeconfig is not None:
        command += ["--kubeconfig", str(kubeconfig)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with (directory / "serve.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_LIMIT_S)
    line = process.stdout.readline() if ready else ""
    if not line:
        process.kill()
        process.wait()
        process.stdout.close()
        raise RuntimeError(
            f"the stand-in providers did not start: {(directory / 'serve.log').read_text(encoding='utf-8')}"
        )
    return Standins(process, directory, json.loads(line))


def arm_in(directory: Path, lag_s: float = 60.0) -> Arm:
    """The stand-in for ARM with its files in the directory."""
    return Arm(
        store.Store(directory / "azure.json"),
        store.Journal(directory / "journal.jsonl"),
        directory / "faults.json",
        directory / "quota.json",
        lag_s,
    )


def served(provider: Any) -> tuple[grpc.Server, int]:
    """A gRPC server of the provider, started, and its port."""
    limits = [
        ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
        ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ]
    server = grpc.server(ThreadPoolExecutor(max_workers=64), options=limits)
    provider_pb2_grpc.add_ResourceProviderServicer_to_server(provider, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--kubeconfig", type=Path)
    parser.add_argument("--lag", type=float, default=60.0)
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    kubeconfig, kubernetes = None, None
    if arguments.kubeconfig is not None:
        kubeconfig = yaml.safe_load(arguments.kubeconfig.read_text(encoding="utf-8"))
    servers = {"azure-native": served(AzureProvider(arm_in(arguments.directory, arguments.lag), kubeconfig))}
    if kubeconfig is not None:
        kubernetes = importlib.import_module("standin.kubernetes").KubernetesProvider(
            kubeconfig, arguments.directory / "journal.json"
        )
        servers["kubernetes"] = served(kubernetes)
    print(json.dumps({name: port for name, (_, port) in servers.items()}), flush=True)
    ended.wait()
    for server, _ in servers.values():
        server.stop(grace=1).wait()
    if kubernetes is not None:
        kubernetes.close()


if __name__ == "__main__":
    main()
