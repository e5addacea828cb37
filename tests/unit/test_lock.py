"""The lock: its digest through every reader, refusals in one sentence, and what a person reads of a change."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.catalog.prices import load_sheet
from planner.errors import DoesNotFit, PlannerError
from planner.plan import Intent, make_plan, parse_intent
from planner.plan.lock import Lock, _digest, changes, check_lock, lock_of, parse_lock
from planner.stack import PLAN_KEY, with_lock
from planner.units import format_gib

FILE = Path("stacks/Pulumi.mine.yaml")
WANTED: dict[str, Any] = {
    "model": "qwen3-8b",
    "regions": ["eastus"],
    "workloads": [
        {"kind": "finetune", "context": 2048, "schedule": "80h"},
        {"kind": "serve", "context": 2048, "schedule": "mon-fri 08:00-18:00", "settings": {"quantization": "awq"}}
        | {"checkpoint": "Qwen/Qwen3-8B-AWQ"},
    ],
    "pricing": {"fallback_on_demand": True},
    "approved_usd_per_month": 900,
}


def intent(**changed: Any) -> Intent:
    return parse_intent(WANTED | changed, "the test")


@cache
def lock() -> Lock:
    return lock_of(make_plan(intent(), load_sheet("2026-11")), intent())


def sealed(data: Mapping[str, Any]) -> Lock:
    """A lock whose digest is right for what it says."""
    return parse_lock({**data, "digest": _digest(data)}, "the test")


def written(held: Lock) -> str:
    return with_lock("config:\n  tonnage:intent: {}\n", held, FILE)


def is_one_sentence(text: str) -> bool:
    return "\n" not in text and not text.endswith(".") and not re.search(r"[.!?] +[A-Z]", text)


# ------------------------------------------------------------------------------------------------------ what it holds


def test_amounts_are_in_cents_and_defaults_are_written_out() -> None:
    held = lock()
    assert all(usd is None or usd == usd.quantize(Decimal("0.01")) for usd in held.lines_usd.values())
    # of the posture dev: two system nodes, no private endpoints, cheapest redundancy, an API for all addresses
    assert (held.around.cluster.system_nodes, held.around.cluster.private_endpoints) == (2, 0)
    assert (held.around.storage.redundancy, held.around.private_cluster) == ("lrs", False)
    # sunday 00:00-06:00: six days of 1440 minutes after monday, and six hours
    assert held.around.maintenance.model_dump() == {"start_minute": 8640, "end_minute": 9000}
    assert not [name for name, value in held.around.cluster if value is None]


def test_a_pool_holds_what_aks_must_be_told() -> None:
    pools = {pool.name: pool for pool in lock().pools}
    assert list(pools) == ["t4spot", "t4fb"]
    # NC4as_T4_v3: 4 vCPUs, 28 GiB, a temporary disk of 176 GB, which is more than the 128 that AKS asks for
    assert (pools["t4spot"].vcpus_per_node, pools["t4spot"].ram_gib_per_node) == (4, 28)
    assert (pools["t4spot"].os_disk_type, pools["t4spot"].driver) == ("Ephemeral", "Install")
    assert pools["t4fb"].fallback
    assert lock().pool("t4fb") == pools["t4fb"]


@pytest.mark.parametrize(
    ("quota", "surge"),
    [
        ({}, 0),  # not known
        ({"*": {"spot_vcpus": 100}}, 0),
        # the twin on demand needs two machines of 4 vCPUs, one a workload; an upgrade one more
        ({"*": {"family_vcpus": {"Standard NCASv3_T4 Family": 8}}}, 0),
        ({"*": {"family_vcpus": {"Standard NCASv3_T4 Family": 12}}}, 1),
        ({"East US": {"family_vcpus": {"Standard NCASv3_T4 Family": 12}}, "*": {}}, 1),
        # of the region 8 and 3 x 4 of the system nodes with one more: 20, and 24 with another machine
        ({"*": {"family_vcpus": {"Standard NCASv3_T4 Family": 12}, "total_vcpus": 23}}, 0),
        ({"*": {"family_vcpus": {"Standard NCASv3_T4 Family": 12}, "total_vcpus": 24}}, 1),
        ({"West US": {"family_vcpus": {"Standard NCASv3_T4 Family": 12}}}, 0),
    ],
)
def test_an_upgrade_adds_a_machine_only_where_the_quota_is_known_to_allow_it(quota: Any, surge: int) -> None:
    wanted = intent(quota=quota)
    held = lock_of(make_plan(wanted, load_sheet("2026-11")), wanted)
    assert [pool.max_surge for pool in held.pools] == [0, surge]  # a spot pool is upgraded without


def test_the_room_of_a_quota_is_handed_out_once() -> None:
    # a pool of one NC4as machine (4 vCPUs), to which a pool of one NC8as (8 vCPUs) of the same family is added
    serve = {"kind": "serve", "context": 2048, "settings": {"quantization": "awq"}, "spot": False}
    plan = make_plan(intent(workloads=[serve]), load_sheet("2026-11"))
    assert [(pool.sku, pool.max_nodes, pool.priority) for pool in plan.pools] == [
        ("Standard_NC4as_T4_v3", 1, "on-demand")
    ]
    other = plan.pools[0].model_copy(update={"name": "second", "sku": "Standard_NC8as_T4_v3"})
    family = "Standard NCASv3_T4 Family"
    asks = tuple(
        ask.model_copy(update={"vcpus": ask.vcpus + 8}) if ask.name in (family, "Total Regional vCPUs") else ask
        for ask in plan.quota
    )
    both = plan.model_copy(update={"pools": (*plan.pools, other), "quota": asks})
    # 12 are asked for: 4 more let the first pool add a machine, 12 more both
    for granted, surges in ((15, [0, 0]), (16, [1, 0]), (23, [1, 0]), (24, [1, 1])):
        wanted = intent(workloads=[serve], quota={"*": {"family_vcpus": {family: granted}}})
        assert [pool.max_surge for pool in lock_of(both, wanted).pools] == surges


def test_a_workload_holds_its_windows() -> None:
    serve = lock().workloads[1]
    # monday to friday, 08:00 to 18:00: minutes 480 to 1080 of each day
    assert [(w.start_minute, w.end_minute) for w in serve.windows] == [
        (day * 1440 + 480, day * 1440 + 1080) for day in range(5)
    ]
    assert serve.memory_bytes["weights"] > 0
    assert sum(serve.memory_bytes.values()) == serve.needed_bytes


# ------------------------------------------------------------------------------------------------------------- digest


def test_the_digest_survives_yaml_and_the_json_that_pulumi_makes_of_it() -> None:
    from_yaml = yaml.safe_load(written(lock()))["config"][PLAN_KEY]
    from_json = json.loads(json.dumps(from_yaml))
    assert parse_lock(from_yaml, "yaml") == parse_lock(from_json, "json") == lock()
    # Go sorts the keys of a map
    assert parse_lock(json.loads(json.dumps(from_yaml, sort_keys=True)), "sorted").digest == lock().digest


def test_the_same_plan_has_the_same_digest() -> None:
    assert lock_of(make_plan(intent(), load_sheet("2026-11")), intent()) == lock()


WORDS = [
    *("1e5", "12e3", "0x1F", "0o17", "017", "1_000", "12:30", "12:30:45", "2026-11", "2026-11-22", "1.36", ".5", "+1"),
    *(
        "-1",
        "-.5e3",
        ".inf",
        ".nan",
        "yes",
        "No",
        "on",
        "OFF",
        "y",
        "N",
        "true",
        "null",
        "~",
        "",
        "=",
        "<<",
        " a",
        "a ",
    ),
    *("a: b", "# a", "a #b", "'", '"', "- a", "{a}", "[a]", "*a", "&a", "!a", "%a", "@a", "`a", "|", ">", "?", "a:"),
    *("\u00e4", "\u4e2d", "\U0001f600", "a" * 300, "a b " * 60, "0.20", "1e400", "0b1", "0" * 16, "123456789e123456"),
]


@pytest.mark.parametrize("word", WORDS)
def test_a_text_stays_a_text_for_readers_of_yaml_1_1_and_1_2(word: str) -> None:
    text = written(sealed(lock().plain() | {"region": word}))
    assert yaml.safe_load(text)["config"][PLAN_KEY]["region"] == word  # PyYAML reads 1.1
    node = dict(_scalars(yaml.compose(text, Loader=yaml.SafeLoader)))["region"]
    assert node.value == word
    if node.style is None:  # plain: YAML 1.2 must not take it for a number, a yes or a null
        assert not re.fullmatch(r"[-+]?(\.?[0-9].*|\.(inf|nan))|true|false|null|~|", word, re.IGNORECASE)


def _scalars(node: yaml.Node) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Every key with its scalar, from the outside in."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(value, yaml.ScalarNode):
                yield key.value, value
            yield from _scalars(value)
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            yield from _scalars(inner)


@given(st.text(alphabet="0123456789e", min_size=16, max_size=16))
@settings(max_examples=40, deadline=None)
def test_any_digest_is_read_as_text(digest: str) -> None:
    short = {"lines_usd": {}, "quota": {}, "workloads": (), "pools": lock().pools[:1]}
    held = lock().model_copy(update={"intent": digest, **short})
    plan = yaml.safe_load(written(held))["config"][PLAN_KEY]
    assert plan["intent"] == digest


# ---------------------------------------------------------------------------------------------------------- tampering


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))
    else:
        yield path


def _changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return "99" if re.fullmatch(r"[0-9.]+", value) else value + "x"
    return 1 if value is None else None


def test_whatever_is_edited_by_hand_is_refused_in_one_sentence() -> None:
    whole = json.dumps(lock().plain())
    leaves = list(_leaves(lock().plain()))
    assert len(leaves) > 100
    for path in leaves:
        data = json.loads(whole)
        inner = data
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = _changed(inner[path[-1]])
        with pytest.raises(PlannerError) as refusal:
            parse_lock(data, "the plan")
        assert is_one_sentence(str(refusal.value)), path
        assert "planner plan --stack" in str(refusal.value) or path == ("version",)


def _itself() -> dict[str, Any]:
    data = lock().plain()
    data["quota"]["itself"] = data
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "holds no plan: run `planner plan --stack STACK` and commit the result"),
        ("text", "holds no plan"),
        ([], "holds no plan"),
        ({}, "is not whole"),
        ({"version": 2}, "was written by a newer Tonnage (format 2, this one reads 1): upgrade tonnage"),
        ({"version": 99, "whatever": {}}, "newer Tonnage (format 99"),
        (lock().plain() | {"version": 0}, "is not whole (see its version)"),
        (lock().plain() | {"unknown": 1}, "is not whole (see its unknown)"),
        ({k: v for k, v in lock().plain().items() if k != "pools"}, "is not whole (see its pools)"),
        (lock().plain() | {"digest": ""}, "was edited by hand"),
        # unquoted, a date is no text any more
        (yaml.safe_load(written(lock()).replace("'2026-11'", "2026-11-01"))["config"][PLAN_KEY], "is not whole"),
        (lock().plain() | {"approved_usd_per_month": 900.0}, "was edited by hand"),
        (_itself(), "is not whole"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused_in_one_sentence(data: object, words: str) -> None:
    with pytest.raises(PlannerError) as refusal:
        parse_lock(data, "the plan")
    assert words in str(refusal.value)
    assert is_one_sentence(str(refusal.value))


# -------------------------------------------------------------------------------------------------- may it be applied


def _with_workload(**changed: Any) -> Lock:
    plain = lock().plain()
    plain["workloads"][0] |= changed
    return sealed(plain)


@pytest.mark.parametrize(
    ("held", "wanted", "words", "code"),
    [
        (lock, {"buffer": "0.21"}, "the plan answers another intent than the one beside it: run", 2),
        # 10 GiB and 8 GiB
        (
            lambda: _with_workload(needed_bytes=10 << 30, usable_bytes=8 << 30),
            {},
            "finetune needs 10.0 GiB of a GPU that has 8.00 GiB: change the intent",
            1,
        ),
        (
            lambda: sealed(lock().plain() | {"usd": "900.01"}),
            {},
            "the plan costs $900.01 a month and $900.00 is approved: raise the approval or change the intent",
            1,
        ),
        (
            lambda: sealed(lock().plain() | {"approved_usd_per_month": None}),
            {},
            "nothing is approved for this stack: write approved_usd_per_month into its intent",
            2,
        ),
    ],
)
def test_a_plan_that_must_not_be_applied_is_refused_in_one_sentence(
    held: Any, wanted: Any, words: str, code: int
) -> None:
    with pytest.raises(PlannerError) as refusal:
        check_lock(held(), intent(**wanted), "the plan")
    assert words in str(refusal.value)
    assert is_one_sentence(str(refusal.value))
    assert refusal.value.exit_code == code
    assert isinstance(refusal.value, DoesNotFit) == (code == 1)


def test_a_plan_at_the_last_byte_and_the_last_cent_may_be_applied() -> None:
    usable = lock().workloads[0].usable_bytes
    exact = sealed(_with_workload(needed_bytes=usable).plain() | {"usd": "900"})
    check_lock(exact, intent(), "the plan")


def test_the_digest_of_an_intent_is_the_same_from_pulumi_as_from_the_file() -> None:
    # Pulumi hands 900.0 on as 900, 0.20 as 0.2 and 1e3 as 1000
    assert intent(approved_usd_per_month=900.0).digest == intent().digest
    assert intent(storage={"dataset_gb": 1e3}).digest == intent(storage={"dataset_gb": 1000}).digest
    assert intent(buffer=0.20).digest == intent(buffer=0.2).digest


# ------------------------------------------------------------------------------------------------------------ changes


def _edited(*edits: tuple[tuple[Any, ...], Any]) -> Lock:
    plain = lock().plain()
    for (*path, last), value in edits:
        inner: Any = plain
        for step in path:
            inner = inner[step]
        inner[last] = value
    return sealed(plain)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("pools", 0, "max_nodes"), 3, "pool t4spot: maximum of machines 2 -> 3"),
        (("pools", 0, "sku"), "Standard_X", "pool t4spot: size Standard_NC4as_T4_v3 -> Standard_X"),
        (("usd",), "1000.50", "cost a month {usd} -> $1,000.50"),
        (("approved_usd_per_month",), "1000", "approved a month $900.00 -> $1,000.00"),
        (("approved_usd_per_month",), None, "approved a month $900.00 -> none"),
        (("region",), "westus3", "region eastus -> westus3"),
        (("quota", "Total Regional vCPUs"), 99, "quota Total Regional vCPUs {total} -> 99"),
        (("quota", "More"), 8, "quota More is new: 8"),
        (("lines_usd", "gpu/serve"), None, "cost of gpu/serve {serve} -> unpriced"),
        (("around", "private_cluster"), True, "private cluster no -> yes"),
        (("around", "cluster", "tier"), "standard", "cluster: tier free -> standard"),
        (("around", "maintenance", "start_minute"), 0, "maintenance: start minute 8640 -> 0"),
        (("platform", "kubernetes_version"), "1.99", "platform: kubernetes version {kubernetes} -> 1.99"),
        (("workloads", 0, "context"), 4096, "workload finetune: context 2048 -> 4096"),
        (
            ("workloads", 0, "memory_bytes", "new part"),
            2 << 30,
            "workload finetune memory: new part is new: 2.00 GiB",
        ),
        (("pools", 0, "gpu_instance_profile"), "MIG1g", "pool t4spot: MIG profile none -> MIG1g"),
        (("workloads", 1, "hub_id"), "a/b", "workload serve: checkpoint Qwen/Qwen3-8B-AWQ -> a/b"),
        (("workloads", 0, "needed_bytes"), 2 << 30, "workload finetune: memory needed {needed} -> 2.00 GiB"),
        (("pools", 0, "workloads"), [], "pool t4spot: workloads finetune, serve -> none"),
    ],
)
def test_a_change_is_a_line_that_a_person_understands(path: tuple[Any, ...], value: Any, line: str) -> None:
    held = lock()
    line = line.format(
        usd=f"${held.usd}",
        total=held.quota["Total Regional vCPUs"],
        serve=f"${held.lines_usd['gpu/serve']}",
        kubernetes=held.platform.kubernetes_version,
        needed=format_gib(held.workloads[0].needed_bytes),
    )
    assert changes(held, _edited((path, value))) == (line,)


def test_a_pool_that_comes_or_goes_is_one_line() -> None:
    other = lock().plain()["pools"][0] | {
        "name": "a100od",
        "sku": "Standard_B",
        "priority": "on-demand",
        "max_nodes": 4,
    }
    made = _edited((("pools",), [other]), (("workloads",), lock().plain()["workloads"][:1]))
    assert changes(lock(), made) == (
        "pool a100od is new: up to 4 x Standard_B, on-demand",
        "pool t4spot is gone: up to 2 x Standard_NC4as_T4_v3, spot",
        "pool t4fb is gone: up to 2 x Standard_NC4as_T4_v3, on-demand",
        "workload serve is gone: qwen3-8b at 2,048 tokens on t4spot",
    )


def test_bytes_that_round_to_the_same_are_written_out() -> None:
    # 8 GiB and one byte more, of which three figures say nothing
    before = _edited((("workloads", 0, "needed_bytes"), 8 << 30))
    after = _edited((("workloads", 0, "needed_bytes"), (8 << 30) + 1))
    assert changes(before, after) == ("workload finetune: memory needed 8589934592 -> 8589934593",)


def test_of_arguments_only_what_comes_and_goes_is_told() -> None:
    before = _edited((("workloads", 1, "arguments"), ["--a", "1", "--b", "--c", "2"]))
    after = _edited((("workloads", 1, "arguments"), ["--a", "1", "--c", "3", "--d"]))
    assert changes(before, after) == ("workload serve: arguments with --c 3, with --d, without --b, without --c 2",)


def test_logs_are_told_in_tenths_of_a_gb() -> None:
    path = ("around", "cluster", "log_gb_per_month")
    assert changes(_edited((path, "5.4321")), _edited((path, "20.0499"))) == ("cluster: GB of logs a month 5.4 -> 20",)


def test_cost_comes_first_then_pools_then_quota() -> None:
    after = _edited(
        (("around", "private_cluster"), True),
        (("quota", "Total Regional vCPUs"), 99),
        (("pools", 0, "max_nodes"), 3),
        (("approved_usd_per_month",), "1000"),
    )
    firsts = [line.split(" ")[0] for line in changes(lock(), after)]
    assert firsts == ["approved", "pool", "quota", "private"]


def test_what_only_programs_read_is_no_change() -> None:
    assert changes(lock(), lock()) == ()
    assert changes(lock(), sealed(lock().plain() | {"intent": "0" * 16})) == ()
    assert changes(None, lock()) == ("the first plan of this stack",)
