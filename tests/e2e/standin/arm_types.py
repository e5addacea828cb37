"""What the stand-in knows of one ARM resource type; the types themselves are in arm_table."""

import functools
import importlib
import inspect
import re
import sys
from dataclasses import dataclass, field
from typing import Any

from standin import sdk_schema


@dataclass(frozen=True)
class ArmType:
    """One resource type.

    path: ARM's, with the SDK's input names in braces; the last one is the resource's own name.
    model: the azure-mgmt class that its request body must fit, `beyond_model` what the SDK's newer API has on top.
    name: regular expression of the whole name; words: the same in English.
    force_new: inputs whose change the provider makes a replacement of; create_only: inputs that ARM refuses to change.
    maintain: inputs that the provider leaves to resources of their own where the program does not give them.
    write_only: inputs that ARM never gives back. defaults: what ARM fills in.
    location: "region", "global", "any" (either) or "none" (the provider fills in none).
    exclusive: which operations may not run at the same time as one on this: "own", "parent" or "".
    asynchronous: ARM accepts first and works afterwards, so that a failure leaves a resource behind.
    """

    token: str
    path: str
    model: str
    name: str
    words: str
    force_new: frozenset[str] = frozenset()
    create_only: frozenset[str] = frozenset()
    maintain: tuple[str, ...] = ()
    write_only: tuple[str, ...] = ()
    beyond_model: frozenset[str] = frozenset()
    defaults: dict[str, Any] = field(default_factory=dict)
    location: str = "region"
    exclusive: str = ""
    asynchronous: bool = False
    singleton: bool = False

    @property
    def path_inputs(self) -> list[str]:
        """The inputs that are part of the id, outermost first."""
        return [name for name in re.findall(r"{(\w+)}", self.path) if name != "subscriptionId"]

    @property
    def name_input(self) -> str:
        """The input that names the resource itself."""
        return self.path_inputs[-1]

    @property
    def autoname(self) -> str:
        """How the provider names what the program does not: "uuid", "random" (hex digits appended) or "copy"."""
        if self.name_input == "roleAssignmentName":
            return "uuid"
        # One name below the resource provider: a top-level resource. (pulumi-azure-native, resources.AutoNamer)
        provider_part = self.path.lower().rsplit("microsoft.", 1)
        return "random" if len(provider_part) == 1 or provider_part[1].count("{") == 1 else "copy"

    @property
    def arm_type(self) -> str:
        """ARM's name of the type, such as Microsoft.Network/virtualNetworks/subnets."""
        if "/providers/" not in self.path:
            return "Microsoft.Resources/resourceGroups"
        provider, *rest = self.path.rsplit("/providers/", 1)[1].split("/")
        return "/".join([provider, *rest[::2]])

    @property
    def api_version(self) -> str:
        """The API version that the SDK names in its documentation of the resource."""
        return _api_version(self.token)

    @property
    def args(self) -> type:
        """The SDK's Args class."""
        return sdk_schema.args_class(self.token)

    @property
    def model_class(self) -> Any:
        """The azure-mgmt class of the request body."""
        module_name, class_name = self.model.rsplit(".", 1)
        return getattr(importlib.import_module(f"azure.mgmt.{module_name}"), class_name)


@functools.cache
def _api_version(token: str) -> str:
    source = inspect.getsource(sys.modules[sdk_schema.resource_class(token).__module__])
    found = re.search(r"Uses Azure REST API version ([0-9a-z-]*[0-9a-z])", source)
    assert found is not None, token
    return found[1]
