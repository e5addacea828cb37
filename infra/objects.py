"""The Kubernetes objects of a plan, with what only Azure knows put into their places."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pulumi

from planner.plan.lock import Lock
from workloads.render import PLACEHOLDERS, Manifest, render

_PLACE = re.compile(r"\$\{([A-Z_]+)\}")


@dataclass(frozen=True)
class Values:
    """What Azure decides.

    client_ids: of the identity of each kind of workload; secrets: names in the vault; train_image: None if none trains
    """

    client_ids: Mapping[str, pulumi.Input[str]]
    tenant_id: pulumi.Input[str]
    vault_name: pulumi.Input[str]
    secrets: Sequence[str]
    resource_group_name: pulumi.Input[str]
    storage_account: pulumi.Input[str]
    train_image: pulumi.Input[str] | None


def manifests(lock: Lock, values: Values) -> list[Manifest]:
    """Every object of a plan, in the order in which the cluster needs them."""
    known = {
        "TENANT_ID": values.tenant_id,
        "VAULT_NAME": values.vault_name,
        "RESOURCE_GROUP": values.resource_group_name,
        "STORAGE_ACCOUNT": values.storage_account,
        "TRAIN_IMAGE": values.train_image,
        **{f"CLIENT_ID_{kind.upper()}": value for kind, value in values.client_ids.items()},
    }
    return [_filled(one, known) for one in render(lock, values.secrets)]


def _filled(value: Any, known: Mapping[str, Any]) -> Any:
    """Every ${NAME} replaced. What Azure decides stands alone in its field: no text is put together around it."""
    if isinstance(value, dict):
        return {key: _filled(inner, known) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, known) for inner in value]
    place = _PLACE.fullmatch(value) if isinstance(value, str) else None
    return known[place[1]] if place and place[1] in PLACEHOLDERS else value
