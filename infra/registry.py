"""The container registry, and the training image that it builds itself: no repository or Docker engine is needed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pulumi
import yaml
from pulumi_azure_native import containerregistry as acr
from pulumi_azure_native import resources

from infra.names import Names
from infra.network import Endpoints, is_private, private_endpoint
from infra.roles import role_assignment
from planner.errors import PlannerError
from planner.plan.lock import Lock

DOCKERFILE = Path(__file__).parent / "images" / "train" / "Dockerfile"
IMAGE = "tonnage-train"
UNTAGGED_DAYS = 7  # how long a premium registry keeps what no tag names any more
STEP_SECONDS = 3600
# the first stable version that knows networkRuleBypassAllowedForTasks, without which no task reaches a private registry
BYPASS_VERSION = "2025-11-01"


@dataclass(frozen=True)
class RegistryArgs:
    """lock: the plan; endpoints: where private endpoints go; kubelet_principal_id: who pulls images."""

    location: str
    resource_group_name: pulumi.Input[str]
    tags: Mapping[str, str]
    names: Names
    lock: Lock
    subscription_id: pulumi.Input[str]
    endpoints: Endpoints | None
    kubelet_principal_id: pulumi.Input[str]


class Registry(pulumi.ComponentResource):
    """The registry.

    registry_id, login_server: of the registry; train_image: with its tag, once it is built, None when nothing trains
    ready: what a puller must wait for
    """

    registry_id: pulumi.Output[str]
    login_server: pulumi.Output[str]
    train_image: pulumi.Output[str] | None
    ready: list[pulumi.Resource]

    def __init__(self, name: str, args: RegistryArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("tonnage:infra:Registry", name, {}, opts)
        tier = str(args.lock.around.cluster.registry)
        private = is_private("registry", args.endpoints)
        if private and tier != "premium":
            raise PlannerError(
                f"a registry of the {tier} tier cannot have a private endpoint: set cluster.registry to premium, or"
                " cluster.private_endpoints to 2"
            )
        registry = self._registry(args, tier, private)
        self.registry_id = registry.id
        self.login_server = pulumi.Output.format("{0}.azurecr.io", registry.name)
        self.ready = [self._role("kubelet-pulls", "AcrPull", args.kubelet_principal_id, args)]
        self.ready += private_endpoint("registry", registry.id, args, self)
        self.train_image = None
        if any(workload.task == "finetune" for workload in args.lock.workloads):
            self.train_image = self._build(registry, args, private)
        self.register_outputs({"login_server": self.login_server, "train_image": self.train_image})

    def _registry(self, args: RegistryArgs, tier: str, private: bool) -> acr.Registry:
        """The registry of that tier. What only premium has is left out of the others: Azure would refuse it."""
        premium = tier == "premium"
        policies = acr.PoliciesArgs(
            retention_policy=acr.RetentionPolicyArgs(days=UNTAGGED_DAYS, status=acr.PolicyStatus.ENABLED),
            export_policy=acr.ExportPolicyArgs(
                status=acr.ExportPolicyStatus.DISABLED if private else acr.ExportPolicyStatus.ENABLED
            ),
        )
        zones = acr.ZoneRedundancy.ENABLED if _zonal(args) else acr.ZoneRedundancy.DISABLED
        return acr.Registry(
            args.names.unique,
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            sku=acr.SkuArgs(name=tier.capitalize()),
            admin_user_enabled=False,
            anonymous_pull_enabled=False,
            public_network_access=acr.PublicNetworkAccess.DISABLED if private else acr.PublicNetworkAccess.ENABLED,
            network_rule_bypass_options=acr.NetworkRuleBypassOptions.AZURE_SERVICES,
            network_rule_set=acr.NetworkRuleSetArgs(default_action=acr.DefaultAction.DENY) if private else None,
            data_endpoint_enabled=True if premium else None,
            zone_redundancy=zones if premium else None,
            policies=policies if premium else None,
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _let_tasks_in(self, registry: acr.Registry, args: RegistryArgs) -> resources.Deployment:
        """Lets the registry's own tasks through its closed network, which the provider's API version cannot say.

        The whole registry is stated again: what a request leaves out may fall back to its default; and so this changes,
        and is applied again, whenever the registry does.
        """
        body = {
            "type": "Microsoft.ContainerRegistry/registries",
            "apiVersion": BYPASS_VERSION,
            "name": registry.name,
            "location": args.location,
            "tags": args.tags,
            "sku": {"name": "Premium"},
            "properties": _private_properties(args) | {"networkRuleBypassAllowedForTasks": True},
        }
        return resources.Deployment(
            "registry-tasks",
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            properties=resources.DeploymentPropertiesArgs(
                mode=resources.DeploymentMode.INCREMENTAL,
                template={
                    "$schema": "https://schema.management.azure.com/schemas/2019-04-01/deploymentTemplate.json#",
                    "contentVersion": "1.0.0.0",
                    "resources": [body],
                },
            ),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[registry]),
        )

    def _build(self, registry: acr.Registry, args: RegistryArgs, private: bool) -> pulumi.Output[str]:
        """The training image's name with its tag, once it is built."""
        base = args.lock.platform.images["python"]
        tag = image_tag(DOCKERFILE.read_bytes(), base)
        own = acr.IdentityPropertiesArgs(type=acr.ResourceIdentityType.SYSTEM_ASSIGNED)
        task = acr.Task(
            "train-image",
            registry_name=registry.name,
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            status=acr.TaskStatus.ENABLED,
            platform=acr.PlatformPropertiesArgs(os=acr.OS.LINUX, architecture=acr.Architecture.AMD64),
            agent_configuration=acr.AgentPropertiesArgs(cpu=2),
            timeout=3 * STEP_SECONDS,
            step=acr.EncodedTaskStepArgs(type="EncodedTask", encoded_task_content=task_content(tag, base)),
            identity=own if private else None,
            credentials=_own_credentials(self.login_server) if private else _default_credentials(),
            opts=pulumi.ResourceOptions(parent=self),
        )
        # the endpoint among them: while it is made, the new role becomes known everywhere
        waits = [*self.ready, *self._for_private_push(task, registry, args)] if private else []
        run = acr.TaskRun(
            "train-image",
            registry_name=registry.name,
            location=args.location,
            resource_group_name=args.resource_group_name,
            run_request=acr.TaskRunRequestArgs(type="TaskRunRequest", task_id=task.id),
            force_update_tag=tag,
            opts=pulumi.ResourceOptions(
                parent=self, depends_on=waits, custom_timeouts=pulumi.CustomTimeouts(create="190m", update="190m")
            ),
        )
        return pulumi.Output.all(self.login_server, run.id).apply(lambda made: f"{made[0]}/{IMAGE}:{tag}")

    def _for_private_push(self, task: acr.Task, registry: acr.Registry, args: RegistryArgs) -> list[pulumi.Resource]:
        """What a task needs to push to a registry without public access: the right to, and a way in."""
        principal_id = task.identity.apply(lambda own: own.principal_id if own else None)
        return [
            self._role("train-image-pushes", "AcrPush", principal_id, args),
            self._let_tasks_in(registry, args),
        ]

    def _role(self, name: str, role: str, principal_id: pulumi.Input[Any], args: RegistryArgs) -> pulumi.Resource:
        return role_assignment(
            name,
            stack=args.names.stack,
            role=role,
            scope=self.registry_id,
            principal_id=principal_id,
            subscription_id=args.subscription_id,
            parent=self,
        )


def image_tag(dockerfile: bytes, base: str) -> str:
    """The tag of the image that this Dockerfile makes of that base: the first 12 hex digits of their SHA-256."""
    return hashlib.sha256(base.encode() + b"\n" + dockerfile).hexdigest()[:12]


def task_content(tag: str, base: str) -> str:
    """The task in Base64: writes the Dockerfile into the steps' shared directory, builds it there, pushes the image.

    Format: learn.microsoft.com/azure/container-registry/container-registry-tasks-reference-yaml
    """
    dockerfile = base64.b64encode(DOCKERFILE.read_bytes()).decode()
    image = f"$Registry/{IMAGE}:{tag}"
    steps = [
        {"id": "write", "cmd": f"bash -c 'echo {dockerfile} | base64 -d > Dockerfile'"},
        {
            "id": "build",
            "build": f"-t {image} --build-arg BASE={base} -f Dockerfile .",
            "timeout": STEP_SECONDS,
            "retries": 2,
            "retryDelay": 60,
        },
        {"id": "push", "push": [image], "timeout": STEP_SECONDS},
    ]
    text = yaml.safe_dump({"version": "v1.1.0", "steps": steps}, sort_keys=False, width=10**6)
    return base64.b64encode(text.encode()).decode()


def _zonal(args: RegistryArgs) -> bool:
    return args.lock.around.posture == "prod"


def _private_properties(args: RegistryArgs) -> dict[str, Any]:
    """A private registry's properties as ARM names them: the same as those of `_registry`."""
    return {
        "adminUserEnabled": False,
        "anonymousPullEnabled": False,
        "publicNetworkAccess": "Disabled",
        "networkRuleBypassOptions": "AzureServices",
        "networkRuleSet": {"defaultAction": "Deny"},
        "dataEndpointEnabled": True,
        "zoneRedundancy": "Enabled" if _zonal(args) else "Disabled",
        "policies": {
            "retentionPolicy": {"days": UNTAGGED_DAYS, "status": "enabled"},
            "exportPolicy": {"status": "disabled"},
        },
    }


def _default_credentials() -> acr.CredentialsArgs:
    """The registry's own leave for its tasks."""
    source = acr.SourceRegistryCredentialsArgs(login_mode=acr.SourceRegistryLoginMode.DEFAULT)
    return acr.CredentialsArgs(source_registry=source)


def _own_credentials(login_server: pulumi.Output[str]) -> acr.CredentialsArgs:
    """The task's own identity: the only one that Azure lets through a registry's closed network."""
    own = acr.CustomRegistryCredentialsArgs(identity="[system]")
    return acr.CredentialsArgs(
        source_registry=acr.SourceRegistryCredentialsArgs(login_mode=acr.SourceRegistryLoginMode.NONE),
        custom_registries=login_server.apply(lambda server: {server: own}),
    )
