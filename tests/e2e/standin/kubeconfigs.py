"""The kubeconfig that a program passes to the kubernetes provider: what the real provider refuses is refused here."""

from collections.abc import Mapping
from typing import Any

import yaml

from standin.cluster import active

# Ways of kubelogin to log in without a person. Source: Azure/kubelogin, docs/book (2026-08).
UNATTENDED = frozenset({"azurecli", "azd", "azurepipelines", "msi", "spn", "workloadidentity"})


def parse(text: str) -> dict[str, Any]:
    """The text of a kubeconfig as a dict. Raises ValueError where it is none."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"failed to parse kubeconfig: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            "failed to parse kubeconfig: it must be the contents of a kubeconfig (a path is not taken here)"
        )
    return found


def check(kubeconfig: Mapping[str, Any]) -> None:
    """Raises ValueError for a kubeconfig with which nobody can log in unattended."""
    cluster, user = active(kubeconfig)
    if not str(cluster["server"]).startswith("https://"):
        raise ValueError(f"the server {cluster['server']} of the kubeconfig is not reached by https")
    if not cluster.get("certificate-authority-data"):
        raise ValueError("tls: failed to verify certificate: the kubeconfig has no certificate-authority-data")
    if user.get("exec"):
        _check_exec(user["exec"])
    elif not user.get("token"):
        raise ValueError("the server has asked for the client to provide credentials: the kubeconfig's user has none")


def _check_exec(entry: Mapping[str, Any]) -> None:
    version, command = str(entry.get("apiVersion", "")), str(entry.get("command", ""))
    if version not in ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"):
        raise ValueError(f"exec plugin: invalid apiVersion {version!r}")
    if version.endswith("/v1") and not entry.get("interactiveMode"):
        raise ValueError("invalid configuration: interactiveMode must be specified for the user's exec plugin")
    if command.rpartition("/")[2] != "kubelogin":
        raise ValueError(f"the kubeconfig runs {command!r} to log in: AKS with Entra ID needs kubelogin")
    arguments = [str(argument) for argument in entry.get("args") or ()]
    options = _options(arguments)
    if "get-token" not in arguments:
        raise ValueError("the kubeconfig runs kubelogin without get-token")
    login = options.get("--login") or options.get("-l") or "devicecode"
    if login not in UNATTENDED:
        raise ValueError(
            f"kubelogin's login mode is {login!r}, which waits for a person: take azurecli or workloadidentity"
        )
    if not options.get("--server-id"):
        raise ValueError("--server-id is required: the kubeconfig runs kubelogin without it")


def _options(arguments: list[str]) -> dict[str, str]:
    """`--login azurecli` and `--login=azurecli` alike."""
    found: dict[str, str] = {}
    for index, argument in enumerate(arguments):
        name, sign, value = argument.partition("=")
        if argument.startswith("-"):
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            found[name] = value if sign else following
    return found
