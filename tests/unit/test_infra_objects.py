"""What Azure decides is put into the manifests of a plan, each value in its own field."""

from __future__ import annotations

import json

import pytest
from locks import STACKS, planned, served, shipped

from infra.objects import Values, manifests
from workloads.render import PLACEHOLDERS, render

VALUES = Values(
    client_ids={"serve": "client-serve", "finetune": "client-finetune"},
    tenant_id="tenant",
    vault_name="vault",
    secrets=("api-key", "hf-token"),
    resource_group_name="group",
    storage_account="account",
    train_image="registry.azurecr.io/tonnage-train:0123456789ab",
)


@pytest.mark.parametrize("stack", STACKS)
def test_no_place_is_left_open(stack: str) -> None:
    text = json.dumps(manifests(shipped(stack)[1], VALUES))
    assert not [name for name in PLACEHOLDERS if f"${{{name}}}" in text]


def test_each_value_stands_where_it_belongs() -> None:
    made = {(m["kind"], m["metadata"]["name"]): m for m in manifests(shipped("dev-32k")[1], VALUES)}
    account = made["ServiceAccount", "finetune"]["metadata"]["annotations"]
    assert account == {"azure.workload.identity/client-id": "client-finetune"}
    parameters = made["SecretProviderClass", "serve"]["spec"]["parameters"]
    told = {key: parameters[key] for key in ("clientID", "keyvaultName", "tenantId")}
    assert told == {"clientID": "client-serve", "keyvaultName": "vault", "tenantId": "tenant"}
    (job,) = [m for (kind, _), m in made.items() if kind == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == VALUES.train_image
    assert {"name": "AZURE_STORAGE_ACCOUNT_NAME", "value": "account"} in container["env"]


def test_a_volume_is_told_its_account_and_group() -> None:
    lock = planned(served(workload={"weights": "blob"}))[1]
    (volume,) = [m for m in manifests(lock, VALUES) if m["kind"] == "PersistentVolume"]
    attributes = volume["spec"]["csi"]["volumeAttributes"]
    assert (attributes["storageAccount"], attributes["resourceGroup"]) == ("account", "group")


@pytest.mark.parametrize("stack", STACKS)
def test_nothing_else_is_changed(stack: str) -> None:
    lock = shipped(stack)[1]
    places = {
        "client-serve": "${CLIENT_ID_SERVE}",
        "client-finetune": "${CLIENT_ID_FINETUNE}",
        "tenant": "${TENANT_ID}",
        "vault": "${VAULT_NAME}",
        "group": "${RESOURCE_GROUP}",
        "account": "${STORAGE_ACCOUNT}",
        VALUES.train_image: "${TRAIN_IMAGE}",
    }
    text = json.dumps(manifests(lock, VALUES))
    for value, place in places.items():
        text = text.replace(json.dumps(value), json.dumps(place))
    assert json.loads(text) == render(lock)
