"""Kubernetes objects as resources of the program: each one visible in a preview, applied in the order it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pulumi
from pulumi_kubernetes import Provider

from workloads.pods import NAMESPACE, Manifest

# what must be there before what: each kind waits for all of the kinds before; the rest comes last
BEFORE = (
    ("Namespace", "StorageClass"),
    ("ConfigMap", "NetworkPolicy", "PersistentVolume", "ResourceQuota", "SecretProviderClass", "ServiceAccount"),
    ("PersistentVolumeClaim",),
)
# kinds whose names end in digits of what they are, since they cannot be edited
FIXED = ("Job", "PersistentVolume", "PersistentVolumeClaim")


@dataclass(frozen=True)
class ReleaseArgs:
    """kubeconfig: a secret; cluster_id: by which the provider knows the cluster, whatever its kubeconfig says

    after: what must be there before any object: rights, pools, identities
    """

    kubeconfig: pulumi.Input[str]
    cluster_id: pulumi.Input[str]
    manifests: Sequence[Manifest]
    after: Sequence[pulumi.Resource]


class Release(pulumi.ComponentResource):
    """The objects of a plan on its cluster. objects: by kind and name."""

    objects: dict[str, pulumi.CustomResource]

    def __init__(self, name: str, args: ReleaseArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("tonnage:infra:Release", name, {}, opts)
        provider = Provider(
            "cluster",
            kubeconfig=args.kubeconfig,
            cluster_identifier=args.cluster_id,
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.objects = {}
        ready = list(args.after)
        for rank in range(len(BEFORE) + 1):
            made = [self._object(one, provider, ready) for one in args.manifests if _rank(one) == rank]
            ready = [*made] or ready
        self.register_outputs({})

    def _object(
        self, manifest: Manifest, provider: Provider, depends_on: Sequence[pulumi.Resource]
    ) -> pulumi.CustomResource:
        api, kind, metadata = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
        group = api if "/" in api else f"core/{api}"  # as the provider's schema calls the group without a name
        key = f"{kind}/{metadata['name']}"
        self.objects[key] = pulumi.CustomResource(
            f"kubernetes:{group}:{kind}",
            logical_name(manifest),
            dict(manifest),
            pulumi.ResourceOptions(
                parent=self,
                provider=provider,
                depends_on=depends_on,
                ignore_changes=_left_alone(manifest),
                delete_before_replace=True,  # names are fixed, and a GPU is not there twice
            ),
        )
        return self.objects[key]


def _left_alone(manifest: Manifest) -> list[str] | None:
    """What the schedule or a person decides: how many servers run (KEDA, kubectl scale), whether a run has started."""
    if manifest["kind"] in ("Deployment", "LeaderWorkerSet") and not manifest["spec"].get("replicas"):
        return ["spec.replicas"]
    return ["spec.suspend"] if manifest["kind"] == "Job" else None


def _rank(manifest: Manifest) -> int:
    return next((rank for rank, kinds in enumerate(BEFORE) if manifest["kind"] in kinds), len(BEFORE))


def logical_name(manifest: Manifest) -> str:
    """`deployment-serve`; what cannot be edited without the digits of its name, so that the new replaces the old."""
    kind, metadata = manifest["kind"], manifest["metadata"]
    name = metadata["name"].rpartition("-")[0] if kind in FIXED else metadata["name"]
    space = metadata.get("namespace")
    return f"{kind.lower()}-{name}" if space in (None, NAMESPACE) else f"{kind.lower()}-{space}-{name}"
