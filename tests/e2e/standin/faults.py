"""Faults on demand: a JSON file that the tests write, read at each request.

The file is a list of objects. Which requests: `type` (end of the token, such as "AgentPool"), `name` (a pattern,
default "*"), `operation` ("create", "update", "delete", "read"; default "create"), `times` (how often; default
always). What happens, `fault`:

  quota      ARM refuses: QuotaExceeded with `family`, `limit`, `usage`, `required`
  conflict   409 with `code` (default OperationNotAllowed) and `message`
  throttled  429 with Retry-After `retry_after_s` (default 0.2); the provider itself tries again
  error      any other refusal: `status`, `code`, `message`
  timeout    ARM does the work, the provider stops waiting: an error with the partial state
  lost       ARM does the work, the answer is lost: an error without any state
  slow       the operation takes `seconds` and can be cancelled meanwhile
"""

import fnmatch
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = frozenset({"quota", "conflict", "throttled", "error", "timeout", "lost", "slow"})


@dataclass
class ArmError(Exception):
    """A refusal by ARM, in the words that pulumi-azure-native gives it."""

    status: int
    code: str
    message: str
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f'Status={self.status} Code="{self.code}" Message="{self.message}"'

    @property
    def retried(self) -> bool:
        """Whether pulumi-azure-native tries again by itself (azcore's list, and AnotherOperationInProgress)."""
        return self.status in (408, 429, 500, 502, 503, 504) or self.code == "AnotherOperationInProgress"


def write(path: Path, faults: list[dict[str, Any]]) -> None:
    """Write the file of faults; an empty list ends them."""
    for fault in faults:
        assert fault["fault"] in KINDS, fault
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(faults, indent=1), encoding="utf-8")
    beside.replace(path)


def due(path: Path | None, used: dict[str, int], *, operation: str, token: str, name: str) -> list[dict[str, Any]]:
    """The faults that this request meets; `used` counts them, and is changed."""
    if path is None or not path.exists():
        return []
    met = []
    for index, fault in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        key = f"{index}:" + hashlib.sha256(json.dumps(fault, sort_keys=True).encode()).hexdigest()[:16]
        wanted = (
            token.endswith(fault.get("type", ""))
            and fnmatch.fnmatchcase(name, fault.get("name", "*"))
            and operation == fault.get("operation", "create")
        )
        if wanted and used.get(key, 0) < fault.get("times", float("inf")):
            used[key] = used.get(key, 0) + 1
            met.append(fault)
    return met


def refusal(fault: dict[str, Any], region: str) -> ArmError | None:
    """The error that a fault stands for; None where ARM does the work."""
    if fault["fault"] == "quota":
        return quota_exceeded(
            fault["family"], fault.get("limit", 0), fault.get("usage", 0), fault.get("required", 24), region
        )
    if fault["fault"] == "conflict":
        message = fault.get("message", "Operation is not allowed: Another operation is in progress.")
        return ArmError(409, fault.get("code", "OperationNotAllowed"), message)
    if fault["fault"] == "throttled":
        message = "The request is being throttled as the limit has been reached for operation type."
        return ArmError(429, "TooManyRequests", message, float(fault.get("retry_after_s", 0.2)))
    if fault["fault"] == "error":
        return ArmError(fault["status"], fault["code"], fault["message"])
    return None


def quota_exceeded(family: str, limit: int, usage: int, required: int, region: str) -> ArmError:
    """ARM's refusal of a VM size for want of vCPUs of its family in the region."""
    return ArmError(
        400,
        "QuotaExceeded",
        f"Operation could not be completed as it results in exceeding approved {family} Cores quota. Additional "
        "details - "
        f"Deployment Model: Resource Manager, Location: {region}, Current Limit: {limit}, Current Usage: {usage}, "
        f"Additional Required: {required}, (Minimum) New Limit Required: {usage + required}.",
    )
