"""Pulumi's wire format (a protobuf Struct with marked values) to plain Python and back.

The marks are those of Pulumi's `sdk/go/common/resource`: a marked value is an object whose key SIG says of what kind
it is. An unknown value travels as one of seven strings, by its type; here all become UNKNOWN, the one of strings.
"""

import math
from typing import Any

from google.protobuf import json_format, struct_pb2

SIG = "4dabf18193072939515e22adb298388d"
SECRET_SIG = "1b47061264138c4ac30d75fd1eb44270"
OUTPUT_SIG = "d0e6a833031e9bbcd3f4e8bde6ca49a4"
RESOURCE_SIG = "5cf8f73096256a8f31e491e813e4eb8e"
ASSET_SIG = "c44067f5952c0a294b673a41bacd8c17"
ARCHIVE_SIG = "0def7320c3a5731c473e5ecbe6d01bc7"

UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
UNKNOWNS = frozenset(
    {
        UNKNOWN,
        "1c4a061d-8072-4f0a-a4cb-0ff528b18fe7",  # bool
        "3eeb2bf0-c639-47a8-9e75-3b44932eb421",  # number
        "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2",  # array
        "030794c1-ac77-496b-92df-f27374a8bd58",  # asset
        "e48ece36-62e2-4504-bad9-02848725956a",  # archive
        "dd056dcd-154b-4c76-9bd3-c8f88648b5ff",  # object
    }
)


def secret(value: Any) -> dict[str, Any]:
    """The value marked as a secret; a value already marked is given back."""
    return value if is_secret(value) else {SIG: SECRET_SIG, "value": value}


def is_secret(value: Any) -> bool:
    """Whether the value is marked as a secret."""
    return isinstance(value, dict) and value.get(SIG) == SECRET_SIG


def reveal(value: Any) -> Any:
    """The value with the marks of secrets taken off, at every depth."""
    if is_secret(value):
        return reveal(value.get("value"))
    if isinstance(value, dict):
        return {key: reveal(part) for key, part in value.items()}
    if isinstance(value, list):
        return [reveal(part) for part in value]
    return value


def has_unknown(value: Any) -> bool:
    """Whether a value that is not known yet lies anywhere within."""
    if isinstance(value, dict):
        return any(has_unknown(part) for part in value.values())
    if isinstance(value, list):
        return any(has_unknown(part) for part in value)
    return isinstance(value, str) and value in UNKNOWNS


def to_plain(struct: struct_pb2.Struct, *, keep_secrets: bool = False) -> dict[str, Any]:
    """The Struct as plain Python: whole numbers as int, unknowns as UNKNOWN, outputs as their values, references as
    ids.

    With keep_secrets a secret stays marked (see `secret`), without it only its value is left.
    """
    return {key: _plain(value, keep_secrets) for key, value in struct.fields.items()}


def to_struct(plain: dict[str, Any]) -> struct_pb2.Struct:
    """Plain Python (with secrets marked by `secret` and unknowns as UNKNOWN) as a Struct."""
    struct = struct_pb2.Struct()
    json_format.ParseDict(plain, struct)
    return struct


def _plain(value: struct_pb2.Value, keep_secrets: bool) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        return UNKNOWN if value.string_value in UNKNOWNS else value.string_value
    if kind == "number_value":
        number = value.number_value
        return int(number) if math.isfinite(number) and number == int(number) else number
    if kind == "bool_value":
        return value.bool_value
    if kind == "list_value":
        return [_plain(part, keep_secrets) for part in value.list_value.values]
    if kind == "struct_value":
        return _plain_struct(value.struct_value, keep_secrets)
    return None


def _plain_struct(struct: struct_pb2.Struct, keep_secrets: bool) -> Any:
    mark = struct.fields[SIG].string_value if SIG in struct.fields else ""
    if mark == SECRET_SIG:
        inner = _plain(struct.fields["value"], keep_secrets)
        return secret(inner) if keep_secrets else inner
    if mark == OUTPUT_SIG:
        inner = _plain(struct.fields["value"], keep_secrets) if "value" in struct.fields else UNKNOWN
        hidden = "secret" in struct.fields and struct.fields["secret"].bool_value
        return secret(inner) if hidden and keep_secrets else inner
    if mark == RESOURCE_SIG:
        return _plain(struct.fields["id"], keep_secrets) if "id" in struct.fields else struct.fields["urn"].string_value
    return {key: _plain(value, keep_secrets) for key, value in struct.fields.items()}
