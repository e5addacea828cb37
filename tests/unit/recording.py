"""Runs a Pulumi program in process, without CLI or Azure, and gives back what it would register as plain data."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pulumi
from google.protobuf import empty_pb2
from pulumi.runtime import mocks, rpc
from pulumi.runtime.config import set_all_config
from pulumi.runtime.settings import configure
from pulumi.runtime.stack import run_in_stack

UNKNOWN = "<unknown>"  # stands in inputs for what only a real deployment knows
SECRET = "secret"  # a property that holds a secret stands in inputs as {"secret": all of its value}

SUBSCRIPTION = "/subscriptions/00000000-0000-0000-0000-000000000001"


class Row(NamedTuple):
    """One registered resource.

    inputs: as sent, with the provider's camelCase names; dependencies: URNs; parent: URN
    options: protect, retainOnDelete, ignoreChanges, deleteBeforeReplace, replaceOnChanges, additionalSecretOutputs,
    timeouts (create, update, delete), provider, version
    """

    type: str
    name: str
    urn: str
    parent: str
    inputs: dict[str, Any]
    dependencies: tuple[str, ...]
    options: dict[str, Any]


def fake_id(name: str) -> str:
    """The id that the recorder gives to the resource of that logical name."""
    return f"{SUBSCRIPTION}/recorded/{name}"


def record(
    program: Callable[[], object],
    stack: str = "dev-32k",
    config: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Mapping[str, Any]] | None = None,
    calls: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:
    """What the program registers, as a preview (a plan of creates) sees it.

    In the order of registration, which is the same every time only for resources that wait for each other.

    Every resource answers with its inputs, its logical name as `name` and `fake_id(name)`; what else Azure computes
    is unknown, save what `outputs` states by logical name (camelCase). `calls` answers functions, by token.
    An exception in the program, or a function that `calls` does not answer, comes out of here.
    """
    rows: list[Row] = []
    monitor = _Recorder(rows, outputs or {}, calls or {})
    flat = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (config or {}).items()}
    # a context of its own: Pulumi keeps stack, settings and configuration in context variables
    contextvars.copy_context().run(_run, program, monitor, stack, flat)
    return rows


def one(rows: list[Row], type_ending: str, name: str | None = None) -> Row:
    """The only row whose type ends so, and has that logical name if one is given. AssertionError for none or more."""
    found = [row for row in rows if row.type.endswith(type_ending) and name in (None, row.name)]
    assert len(found) == 1, f"{len(found)} resources of type {type_ending}, name {name}: {[row.name for row in rows]}"
    return found[0]


def named(rows: list[Row], type_ending: str) -> dict[str, Row]:
    """The rows whose type ends so, by logical name."""
    return {row.name: row for row in rows if row.type.endswith(type_ending)}


class _Mocks(mocks.Mocks):
    def __init__(self, outputs: Mapping[str, Mapping[str, Any]], calls: Mapping[str, Mapping[str, Any]]) -> None:
        self.outputs = outputs
        self.calls = calls

    def call(self, args: mocks.MockCallArgs) -> tuple[dict[str, Any], list[tuple[str, str]] | None]:
        assert args.token in self.calls, f"the program calls {args.token}: give its answer as calls="
        return dict(self.calls[args.token]), []

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        return fake_id(args.name), {"name": args.name, **args.inputs, **self.outputs.get(args.name, {})}


class _Recorder(mocks.MockMonitor):
    def __init__(
        self, rows: list[Row], outputs: Mapping[str, Mapping[str, Any]], calls: Mapping[str, Mapping[str, Any]]
    ) -> None:
        super().__init__(_Mocks(outputs, calls))
        self.rows = rows

    def Invoke(self, request: Any) -> Any:  # noqa: N802, the protocol's names
        with _loop_of_this_thread():
            return super().Invoke(request)

    def ReadResource(self, request: Any) -> Any:  # noqa: N802
        with _loop_of_this_thread():
            return super().ReadResource(request)

    def RegisterResource(self, request: Any) -> Any:  # noqa: N802
        with _loop_of_this_thread():
            answer = super().RegisterResource(request)
        options = {
            "protect": request.protect,
            "retainOnDelete": request.retainOnDelete,
            "ignoreChanges": list(request.ignoreChanges),
            "replaceOnChanges": list(request.replaceOnChanges),
            "deleteBeforeReplace": request.deleteBeforeReplace,
            "additionalSecretOutputs": list(request.additionalSecretOutputs),
            "timeouts": {
                when: getattr(request.customTimeouts, when)
                for when in ("create", "update", "delete")
                if getattr(request.customTimeouts, when)
            },
            "provider": request.provider,
            "version": request.version,
        }
        self.rows.append(
            Row(
                request.type,
                request.name,
                answer.urn,
                request.parent,
                _plain(rpc.deserialize_properties(request.object, keep_unknowns=True)),
                tuple(sorted(request.dependencies)),
                options,
            )
        )
        return answer


@contextlib.contextmanager
def _loop_of_this_thread() -> Iterator[None]:
    """Pulumi calls a monitor in a thread of a pool, where its mocks would make an event loop and never close it."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _plain(value: Any) -> Any:
    """Without Pulumi's own types: unknowns, secrets and whole numbers as plain values."""
    if isinstance(value, pulumi.output.Unknown):
        return UNKNOWN
    if rpc.is_rpc_secret(value):
        return {SECRET: _plain(rpc.unwrap_rpc_secret(value))}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _run(program: Callable[[], object], monitor: _Recorder, stack: str, config: dict[str, str]) -> None:
    features = set(monitor.GetDeploymentInfo(empty_pb2.Empty()).supportedFeatures)
    configure(
        mocks.MockSettings(
            monitor=monitor,
            monitor_features=features,
            engine=mocks.MockEngine(None),
            project="tonnage",
            stack=stack,
            organization="organization",
            dry_run=True,
            callbacks=None,
            outputs=set(),
            package_refs={},
            base_providers_by_ref={},
        )
    )
    pulumi.runtime.settings.ROOT.set(None)
    set_all_config(config, [])

    def start() -> None:
        program()

    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(run_in_stack(start))
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
