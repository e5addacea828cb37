"""The virtual network: a subnet for nodes, one for private endpoints where there are any, and who may reach what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pulumi
from pulumi_azure_native import network, privatedns

from infra.cluster import POD_CIDR
from infra.names import Names
from planner.errors import PlannerError

VNET_CIDR = "10.224.0.0/12"  # to 10.239.255.255: beside the pods (10.244.0.0/16) and the services (10.0.0.0/16)
NODES_CIDR = "10.224.0.0/16"
ENDPOINTS_CIDR = "10.225.0.0/24"

# in the order in which a plan pays for them; each is also the name that Azure Private Link gives the group
ZONES = {
    "blob": "privatelink.blob.core.windows.net",
    "vault": "privatelink.vaultcore.azure.net",
    "registry": "privatelink.azurecr.io",
}
POLICIES = network.VirtualNetworkPrivateEndpointNetworkPolicies
SERVICES = {"blob": "Microsoft.Storage", "vault": "Microsoft.KeyVault"}


@dataclass(frozen=True)
class NetworkArgs:
    """private_endpoints: how many of blob, vault and registry, in that order, are reached inside the network alone."""

    location: str
    resource_group_name: pulumi.Input[str]
    tags: Mapping[str, str]
    names: Names
    private_endpoints: int


@dataclass(frozen=True)
class Endpoints:
    """Where private endpoints go.

    zone_ids: the DNS zone by kind, of those kinds that have an endpoint; made: the endpoints so far
    """

    subnet_id: pulumi.Output[str]
    zone_ids: Mapping[str, pulumi.Output[str]]
    made: list[pulumi.Resource] = field(default_factory=list)


class Network(pulumi.ComponentResource):
    """The network of a stack.

    vnet_id, nodes_subnet_id: their ids; endpoints: where private endpoints go, None without any
    """

    vnet_id: pulumi.Output[str]
    nodes_subnet_id: pulumi.Output[str]
    endpoints: Endpoints | None

    def __init__(self, name: str, args: NetworkArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("tonnage:infra:Network", name, {}, opts)
        private = private_kinds(args.private_endpoints)
        vnet = network.VirtualNetwork(
            "network",
            virtual_network_name=args.names.of("network", "vnet"),
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            address_space=network.AddressSpaceArgs(address_prefixes=[VNET_CIDR]),
            opts=pulumi.ResourceOptions(parent=self),
        )
        services = [service for kind, service in SERVICES.items() if kind not in private]
        nodes = self._subnet("nodes", args, vnet, NODES_CIDR, _nodes_rules(), services, ())
        self.vnet_id, self.nodes_subnet_id, self.endpoints = vnet.id, nodes.id, None
        if private:
            endpoints = self._subnet("endpoints", args, vnet, ENDPOINTS_CIDR, _endpoints_rules(), (), (nodes,))
            zones = {kind: self._zone(kind, args, vnet, endpoints) for kind in private}
            self.endpoints = Endpoints(endpoints.id, zones)
        self.register_outputs({"vnet_id": self.vnet_id, "nodes_subnet_id": self.nodes_subnet_id})

    def _subnet(
        self,
        kind: str,
        args: NetworkArgs,
        vnet: network.VirtualNetwork,
        cidr: str,
        rules: Sequence[network.SecurityRuleArgs],
        services: Sequence[str],
        before: Sequence[pulumi.Resource],
    ) -> network.Subnet:
        """A subnet with its own security group. before: what must be written first; a network takes one at a time."""
        group = network.NetworkSecurityGroup(
            kind,
            network_security_group_name=args.names.of("network", kind),
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            security_rules=rules,
            opts=pulumi.ResourceOptions(parent=self),
        )
        return network.Subnet(
            kind,
            subnet_name=kind,
            resource_group_name=args.resource_group_name,
            virtual_network_name=vnet.name,
            address_prefix=cidr,
            network_security_group=network.NetworkSecurityGroupArgs(id=group.id),
            service_endpoints=[network.ServiceEndpointPropertiesFormatArgs(service=service) for service in services],
            # nodes leave through the cluster's load balancer, endpoints never: nothing rests on Azure's default way out
            default_outbound_access=False,
            # without it the rules above would pass private endpoints by; the nodes' subnet is AKS's to arrange
            private_endpoint_network_policies=POLICIES.NETWORK_SECURITY_GROUP_ENABLED if kind == "endpoints" else None,
            opts=pulumi.ResourceOptions(parent=self, depends_on=before),
        )

    def _zone(
        self, kind: str, args: NetworkArgs, vnet: network.VirtualNetwork, subnet: network.Subnet
    ) -> pulumi.Output[str]:
        """The private DNS zone of a kind of endpoint, linked to the network: its id, once the link is there."""
        zone = privatedns.PrivateZone(
            kind,
            private_zone_name=ZONES[kind],
            location="Global",
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            opts=pulumi.ResourceOptions(parent=self),
        )
        link = privatedns.VirtualNetworkLink(
            kind,
            virtual_network_link_name=args.names.of("network", kind),
            private_zone_name=zone.name,
            location="Global",
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            virtual_network=privatedns.SubResourceArgs(id=vnet.id),
            registration_enabled=False,
            opts=pulumi.ResourceOptions(parent=self, depends_on=[subnet]),
        )
        return pulumi.Output.all(zone.id, link.id).apply(lambda ids: str(ids[0]))


def private_kinds(count: int) -> tuple[str, ...]:
    """The first `count` of blob, vault and registry. PlannerError for a count that no three can give."""
    if not 0 <= count <= len(ZONES):
        raise PlannerError(
            f"private_endpoints is {count}, and there are three services to reach privately: set it to 0 (none), 1"
            " (storage), 2 (and the vault) or 3 (and the registry)"
        )
    return tuple(ZONES)[:count]


def is_private(kind: str, endpoints: Endpoints | None) -> bool:
    """Whether a service (blob, vault or registry) is reached inside the network alone."""
    return endpoints is not None and kind in endpoints.zone_ids


class Reachable(Protocol):
    """What the arguments of a component that may have a private endpoint say of it."""

    @property
    def location(self) -> str: ...
    @property
    def resource_group_name(self) -> pulumi.Input[str]: ...
    @property
    def tags(self) -> Mapping[str, str]: ...
    @property
    def names(self) -> Names: ...
    @property
    def endpoints(self) -> Endpoints | None: ...


def private_endpoint(
    kind: str, target_id: pulumi.Input[str], args: Reachable, parent: pulumi.Resource
) -> list[pulumi.Resource]:
    """The endpoint of a storage account (blob), vault or registry inside the network, and its name in private DNS.

    Gives the last resource made, to wait for; nothing where the service has no endpoint.
    """
    if args.endpoints is None or not is_private(kind, args.endpoints):
        return []
    endpoint = network.PrivateEndpoint(
        kind,
        private_endpoint_name=args.names.of("private endpoint", kind),
        location=args.location,
        resource_group_name=args.resource_group_name,
        tags=args.tags,
        subnet=network.SubnetArgs(id=args.endpoints.subnet_id),
        private_link_service_connections=[
            network.PrivateLinkServiceConnectionArgs(name=kind, private_link_service_id=target_id, group_ids=[kind])
        ],
        # one after another: Azure refuses endpoints that are written to one subnet at the same time
        opts=pulumi.ResourceOptions(parent=parent, depends_on=args.endpoints.made[-1:]),
    )
    args.endpoints.made.append(endpoint)
    zone = network.PrivateDnsZoneConfigArgs(name=kind, private_dns_zone_id=args.endpoints.zone_ids[kind])
    group = network.PrivateDnsZoneGroup(
        kind,
        private_dns_zone_group_name="default",
        private_endpoint_name=endpoint.name,
        resource_group_name=args.resource_group_name,
        private_dns_zone_configs=[zone],
        opts=pulumi.ResourceOptions(parent=parent),
    )
    return [group]


def _nodes_rules() -> tuple[network.SecurityRuleArgs, ...]:
    """Nodes and pods among themselves, and Azure's health probes; nothing from the Internet, no hop by SSH or RDP.

    Pods send with their own addresses, which a network's tag need not cover, so theirs are named. A service open to the
    Internet would need a rule of its own here: there is none, since services stay inside.
    """
    inside = [NODES_CIDR, POD_CIDR]
    return (
        _rule("AllowNodesAndPods", 100, sources=inside, destinations=inside),
        _rule("AllowVirtualNetwork", 110, source="VirtualNetwork", destination="VirtualNetwork"),
        _rule("AllowLoadBalancerProbes", 120, source="AzureLoadBalancer"),
        _rule("DenyInternet", 4000, source="Internet", allow=False),
        _rule(
            "DenyRemoteShells",
            100,
            inbound=False,
            protocol=network.SecurityRuleProtocol.TCP,
            source="VirtualNetwork",
            destination="VirtualNetwork",
            ports=["22", "3389"],
            allow=False,
        ),
    )


def _endpoints_rules() -> tuple[network.SecurityRuleArgs, ...]:
    """HTTPS from inside the network, nothing else: endpoints answer, they never ask."""
    https = network.SecurityRuleProtocol.TCP
    return (
        _rule("AllowHttpsFromNetwork", 100, protocol=https, source="VirtualNetwork", ports=["443"]),
        _rule("DenyInternet", 4000, source="Internet", allow=False),
        _rule("DenyTheRest", 4096, source="*", allow=False),
    )


def _rule(
    name: str,
    priority: int,
    *,
    allow: bool = True,
    inbound: bool = True,
    protocol: str = network.SecurityRuleProtocol.ASTERISK,
    source: str | None = None,
    sources: Sequence[str] | None = None,
    destination: str | None = None,
    destinations: Sequence[str] | None = None,
    ports: Sequence[str] | None = None,
) -> network.SecurityRuleArgs:
    """A rule; anything where nothing is said."""
    return network.SecurityRuleArgs(
        name=name,
        priority=priority,
        access=network.SecurityRuleAccess.ALLOW if allow else network.SecurityRuleAccess.DENY,
        direction=network.SecurityRuleDirection.INBOUND if inbound else network.SecurityRuleDirection.OUTBOUND,
        protocol=protocol,
        source_port_range="*",
        source_address_prefix=source if sources is None else None,
        source_address_prefixes=sources,
        destination_port_range="*" if ports is None else None,
        destination_port_ranges=ports,
        destination_address_prefix=(destination or "*") if destinations is None else None,
        destination_address_prefixes=destinations,
    )
