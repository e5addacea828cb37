"""The GPU pools: each an AgentPool of its own, so that a change to one leaves the others and the cluster alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pulumi
from pulumi_azure_native import containerservice as aks

from planner.plan.lock import LockedPool

GPU_TAINT, CPU_TAINT = "sku=gpu:NoSchedule", "sku=cpu:NoSchedule"
# what AKS refuses to change on a pool that exists; the provider itself replaces for the machine's size alone
FIXED = (
    "availabilityZones",
    "gpuProfile",
    "maxPods",
    "osDiskSizeGB",
    "osDiskType",
    "scaleSetEvictionPolicy",
    "scaleSetPriority",
    "spotMaxPrice",
    "vnetSubnetID",
)


@dataclass(frozen=True)
class GpuPoolsArgs:
    """pools: of the plan; kubernetes_version: of the cluster, which new pools must not be ahead of."""

    resource_group_name: pulumi.Input[str]
    tags: Mapping[str, str]
    cluster_name: pulumi.Input[str]
    nodes_subnet_id: pulumi.Input[str]
    pools: Sequence[LockedPool]


class GpuPools(pulumi.ComponentResource):
    """The pools of the plan, made one after another: AKS takes one write at a time. pools: by name."""

    pools: dict[str, aks.AgentPool]

    def __init__(self, name: str, args: GpuPoolsArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("tonnage:infra:GpuPools", name, {}, opts)
        self.pools = {}
        for pool in args.pools:
            self.pools[pool.name] = self._pool(pool, args, list(self.pools.values())[-1:])
        self.register_outputs({})

    def _pool(self, pool: LockedPool, args: GpuPoolsArgs, before: Sequence[pulumi.Resource]) -> aks.AgentPool:
        spot = pool.priority == "spot"
        return aks.AgentPool(
            pool.name,
            agent_pool_name=pool.name,
            resource_group_name=args.resource_group_name,
            resource_name_=args.cluster_name,
            mode=aks.AgentPoolMode.USER,
            type=aks.AgentPoolType.VIRTUAL_MACHINE_SCALE_SETS,
            vm_size=pool.sku,
            enable_auto_scaling=True,
            # pods keep the machines that they need; a minimum above the machines of the moment would be refused
            min_count=0,
            max_count=pool.max_nodes,
            count=0,  # Azure asks for it at some updates; afterwards the autoscaler decides
            scale_down_mode=aks.ScaleDownMode.DELETE,
            scale_set_priority=aks.ScaleSetPriority.SPOT if spot else aks.ScaleSetPriority.REGULAR,
            scale_set_eviction_policy=aks.ScaleSetEvictionPolicy.DELETE if spot else None,
            spot_max_price=-1 if spot else None,  # up to the price on demand: never taken back for the price
            node_taints=[GPU_TAINT if pool.gpus_per_node else CPU_TAINT],
            node_labels={"tonnage/gpu": pool.gpu} if pool.gpu else None,
            gpu_profile=aks.GPUProfileArgs(driver=pool.driver) if pool.gpu else None,
            gpu_instance_profile=pool.gpu_instance_profile,
            os_type="Linux",
            os_sku="Ubuntu",
            os_disk_type=pool.os_disk_type,
            os_disk_size_gb=pool.os_disk_gib,
            max_pods=50,
            vnet_subnet_id=args.nodes_subnet_id,
            enable_node_public_ip=False,
            security_profile=aks.AgentPoolSecurityProfileArgs(ssh_access=aks.AgentPoolSSHAccess.DISABLED),
            upgrade_settings=None if spot else _upgrade(pool),
            tags={**args.tags, "workloads": "-".join(pool.workloads)},
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=before,
                ignore_changes=["count"],
                replace_on_changes=list(FIXED),
                delete_before_replace=True,  # a pool's name is its own: two cannot have it
                custom_timeouts=pulumi.CustomTimeouts(create="45m", update="45m", delete="45m"),
            ),
        )


def _upgrade(pool: LockedPool) -> aks.AgentPoolUpgradeSettingsArgs:
    """A machine more while upgrading where the quota has room, else one machine less."""
    if pool.max_surge:
        return aks.AgentPoolUpgradeSettingsArgs(max_surge=str(pool.max_surge))
    return aks.AgentPoolUpgradeSettingsArgs(max_surge="0", max_unavailable="1")
