"""Versions that a cluster is built from: Kubernetes and the images that run on it, each pinned, with its source."""

from __future__ import annotations

from functools import cache

from planner.catalog import read_facts
from planner.model import Frozen


class Platform(Frozen):
    """What a plan pins. kubernetes_version: minor, as AKS takes it; images: by what they are for, with their tag.

    shares: of a machine's CPU and memory, what its GPUs' pods ask for and may take; kept_vcpus: what they leave
    """

    kubernetes_version: str
    images: dict[str, str]
    shares: dict[str, float]


@cache
def platform() -> Platform:
    """The versions of the catalog's platform.json, which holds source and date of each."""
    facts = read_facts("platform.json")
    return Platform(
        kubernetes_version=facts["kubernetes_version"]["value"],
        images={name: record["value"] for name, record in facts["images"].items()},
        shares={name: record["value"] for name, record in facts["shares"].items()},
    )
