"""What tests on a control plane share: the programs, and a control plane to which plans are applied."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from applied import KINDS, leftovers, stored
from control_plane import AKS_CRDS, ControlPlane, control_plane
from tools import Engines, Missing, engines

from workloads.render import NAMESPACE


@pytest.fixture(scope="session")
def programs() -> Engines:
    """The real engines; skipped where they cannot be had, and failed in CI."""
    try:
        return engines()
    except Missing as reason:
        if os.environ.get("CI"):
            pytest.fail(str(reason))
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, programs: Engines) -> Iterator[ControlPlane]:
    crds = (*AKS_CRDS, "leaderworkerset.x-k8s.io")
    with control_plane(tmp_path_factory.mktemp("plane"), programs=programs, crds=crds) as plane:
        plane.wait_for(lambda: all(stored(plane, *kind) for kind in KINDS), 60, "storage for every kind")
        yield plane


@pytest.fixture
def plane(running: ControlPlane) -> Iterator[ControlPlane]:
    """The control plane, without nodes and without objects of a plan but the namespaces, which take long to go."""
    yield running
    running.autoscale([])
    running.unavailable.clear()
    for one in leftovers(running):
        running.cluster.delete(one)
    for pod in running.pods(NAMESPACE):
        running.cluster.delete(pod, grace_s=0)
    running.wait_for(lambda: not running.pods(NAMESPACE) and not leftovers(running), 60, "everything to go")
    for node in running.nodes():
        running.cluster.delete(node)
