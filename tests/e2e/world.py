"""A whole world for one stack: the real Pulumi CLI on a copy of the project, Azure and Kubernetes stood in, machines.

What happens between them is pretended here: the machines of AKS pools, which come and go with what Azure holds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pools
import pulumi_cli
import tools
import yaml
from control_plane import ControlPlane, control_plane
from pulumi_cli import Project, Result
from standin import serve
from standin.serve import Standins

from planner.plan import Intent, parse_intent
from planner.plan.lock import Lock, parse_lock

CANARY_KEY = "canary-api-key-2b1e77aa-do-not-print"
CANARY_TOKEN = "canary-hf-token-90cc41f3-do-not-print"
NAMESPACE = "tonnage"
POOL_ID = re.compile(r".*/managedclusters/[^/]+/agentpools/([^/]+)$")
CLUSTER_ID = re.compile(r".*/managedclusters/[^/]+$")
BEAT_S = 0.3


@dataclass
class World:
    """stack: its name; seen: all that any command printed, for the search for secrets."""

    stack: str
    project: Project
    standins: Standins
    plane: ControlPlane
    seen: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        """The copy's stack file."""
        return self.project.path / "stacks" / f"Pulumi.{self.stack}.yaml"

    @property
    def config(self) -> dict[str, Any]:
        content = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        return dict(content["config"])

    @property
    def intent(self) -> Intent:
        return parse_intent(self.config["tonnage:intent"], "the copy's intent")

    @property
    def lock(self) -> Lock:
        return parse_lock(self.config["tonnage:plan"], "the copy's plan")

    def ok(self, result: Result) -> Result:
        """The result of a command that went well; AssertionError with what it printed otherwise."""
        self.seen.append(result.output)
        assert result.rc == 0, f"{result.command} ended with {result.rc}:\n{result.output[-6000:]}"
        return result

    def fails(self, result: Result) -> Result:
        """The result of a command that failed; AssertionError when it went well."""
        self.seen.append(result.output)
        assert result.rc != 0, f"{result.command} went well:\n{result.output[-3000:]}"
        return result

    def up(self) -> Result:
        return self.ok(self.project.up(self.stack, "--skip-preview"))

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Edit the intent as a person does, then `planner plan --stack`."""
        self.rewrite(change)
        self.plan()

    def rewrite(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Edit the intent alone."""
        content = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        change(content["config"]["tonnage:intent"])
        self.file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def plan(self) -> None:
        """`planner plan --stack` in the copy."""
        command = [sys.executable, "-m", "planner", "plan", "--stack", self.stack, "--prices", "2026-11"]
        environment = {**os.environ, "PYTHONPATH": str(self.project.path)}
        done = subprocess.run(
            command, cwd=self.project.path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def running(self) -> dict[str, list[str]]:
        """Names of running pods of the workloads, by the pool that each runs in."""
        found: dict[str, list[str]] = {}
        for pod in self.plane.pods(NAMESPACE):
            if pod["status"].get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp"):
                found.setdefault(self.plane.pool_of_pod(pod) or "", []).append(pod["metadata"]["name"])
        return found

    def wait_running(self, instance: str, seconds: float = 90) -> dict[str, Any]:
        """The running pod of a workload, once there is one."""
        labels = f"app.kubernetes.io/instance={instance}"

        def alive() -> dict[str, Any] | None:
            for pod in self.plane.pods(NAMESPACE, labels):
                if pod["status"].get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp"):
                    return pod
            return None

        return self.plane.wait_for(alive, seconds, f"a running pod of {instance}")

    def start_run(self, workload: str) -> dict[str, Any]:
        """`kubectl patch job ... suspend: false`: its pod, once it runs."""
        labels = "app.kubernetes.io/part-of=tonnage"
        jobs = self.plane.cluster.list("batch/v1", "Job", NAMESPACE, labelSelector=labels)
        (job,) = [job for job in jobs if job["metadata"]["name"].rpartition("-")[0] == workload]
        assert job["spec"]["suspend"] is True
        self.plane.cluster.merge(job, {"spec": {"suspend": False}})
        return self.wait_running(workload)

    def scale(self, deployment: str, replicas: int) -> None:
        """`kubectl scale`."""
        found = self.plane.cluster.get("apps/v1", "Deployment", deployment, NAMESPACE)
        assert found is not None
        self.plane.cluster.merge(found, {"spec": {"replicas": replicas}})

    def secrets_in_plain_text(self) -> list[str]:
        """Where a canary can be read: in anything that was printed, or in a file that is kept."""
        canaries = (CANARY_KEY, CANARY_TOKEN)
        found = [f"output: {text[:80]}" for text in self.seen if any(canary in text for canary in canaries)]
        for path in [*self.project.kept_files(), *(p for p in self.standins.directory.rglob("*") if p.is_file())]:
            text = path.read_bytes()
            found += [str(path) for canary in canaries if canary.encode() in text]
        return found


def _machines(standins: Standins, plane: ControlPlane, stop: threading.Event) -> None:
    """Machines follow the pools that Azure holds: they come with a pool, and go with it."""
    known: dict[str, Mapping[str, Any]] = {}
    while not stop.wait(BEAT_S):
        profiles: dict[str, Mapping[str, Any]] = {}
        for resource_id, resource in standins.resources().items():
            if POOL_ID.fullmatch(resource_id):
                profiles[resource["inputs"]["agentPoolName"]] = resource["inputs"]
            elif CLUSTER_ID.fullmatch(resource_id):
                profiles |= {profile["name"]: profile for profile in resource["inputs"]["agentPoolProfiles"]}
        for name, before in known.items():
            if name not in profiles or profiles[name]["vmSize"] != before["vmSize"]:
                for node in plane.nodes(name):
                    plane.cluster.delete(node)
        if profiles != known:
            plane.autoscale([pools.pool_of(profile, region="eastus") for profile in profiles.values()])
        known = profiles


@contextmanager
def world(folder: Path, stack: str, *, initialized: bool = True) -> Iterator[World]:
    """A world of its own for a stack, with its secrets set. Raises tools.Missing where the engines cannot be had."""
    engines = tools.engines()
    with control_plane(folder / "plane", programs=engines) as plane:
        standins = serve.start(folder / "standin", folder / "plane" / "kubeconfig.yaml")
        stop = threading.Event()
        machines = threading.Thread(target=_machines, args=(standins, plane, stop), daemon=True)
        machines.start()
        try:
            project = pulumi_cli.new_project(
                folder / "pulumi",
                standins.debug_providers,
                pulumi=engines.pulumi,
                executor=engines.language_executor,
                language_host=engines.language_host,
            )
            made = World(stack, project, standins, plane)
            if initialized:
                made.ok(project.init(stack))
                made.ok(project.set_secret(stack, "apiKey", CANARY_KEY))
                made.ok(project.set_secret(stack, "hfToken", CANARY_TOKEN))
            yield made
        finally:
            stop.set()
            machines.join()
            standins.stop()
