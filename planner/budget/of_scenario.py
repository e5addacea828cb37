"""A published scenario as a budget: with the sheet that reproduces it, or with today's prices beside it."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

from planner.budget import LUMP_SUM, Commitment, Draft, Money, Rounding, Supposed, WhatIfDraft, advice
from planner.budget.of_plan import memory_curves, reservation_note
from planner.catalog import load_model
from planner.catalog.prices import EVERYWHERE, PriceSheet, Priority
from planner.catalog.scenarios import Item, Scenario, reference
from planner.cost.lines import Line, alternatives, figure, group_of, meter_line, total, vm_line
from planner.cost.schedule import MONTH_HOURS
from planner.fit import Fit, Settings, Task, candidates, default_headroom
from planner.memory.serving import ServingSettings
from planner.memory.training import FinetuneSettings
from planner.model import ModelSpec
from planner.plan.choices import excluded, fit_on

LEFT_OUT = (
    "as published, the scenario leaves out the cluster's system nodes, their disks, the control plane, the container"
    " registry and the time that evictions cost; the budget of a plan counts them"
)


def rounding_of(scenario: Scenario) -> Rounding:
    return Rounding(round_to=scenario.round_to, request_to=scenario.request_to, request_up=scenario.request_up)


def money_of(scenario: Scenario, money: Money) -> Money:
    """The scenario's rounding in the currency asked for."""
    return money.model_copy(update={"rounding": rounding_of(scenario)})


def draft_of_scenario(scenario: Scenario, sheet: PriceSheet, region: str | None = None) -> Draft:
    """The budget's draft of a scenario: its lines at list arithmetic, hours x price, without evictions."""
    where = sheet.region(region or scenario.region)
    lines = tuple(_line(item, sheet, where) for item in scenario.items)
    return Draft(
        name=scenario.name,
        title=f"Budget: {scenario.name}",
        subject=f"{scenario.title}; {scenario.model}, Azure region {where}.",
        region=where,
        lines=lines,
        round_up=frozenset(item.key for item in scenario.items if item.round_up),
        buffer=scenario.buffer,
        assumptions=_stated(scenario),
        what_ifs=tuple(_what_ifs(scenario, sheet, where, lines)),
        commitments=tuple(_commitments(scenario, sheet, where)),
        memory=memory_curves(_tasks(scenario, scenario.context)),
        notes=(LEFT_OUT,),
        inputs={"scenario": scenario.model_dump_json(), "region": where},
    )


def _is_gpu(item: Item) -> bool:
    return item.key.startswith("gpu/")


def _line(
    item: Item, sheet: PriceSheet, region: str, *, priority: Priority | None = None, times: int = 1, sku: str = ""
) -> Line:
    """The line of an item; priority, sku, times: bought otherwise, on another size, so many times."""
    if item.sku:
        return vm_line(
            sheet,
            key=item.key,
            label=item.label,
            sku=sku or item.sku,
            region=region,
            priority=priority or item.priority,
            count=item.count * times,
            hours=item.hours,
        )
    lump = item.meter or item.flat
    if item.meter or sheet.meter(item.flat, EVERYWHERE):
        found = sheet.meter(lump, region)
        unit = found.unit if found else "unit"
        return meter_line(
            sheet,
            key=item.key,
            label=item.label,
            basis=f"{figure(item.units)} {unit}" if item.meter else LUMP_SUM,
            meter=lump,
            region=region,
            units=item.units,
            service=item.service,
        )
    return _sum_of_parts(item, sheet, region)


def _sum_of_parts(item: Item, sheet: PriceSheet, region: str) -> Line:
    """A lump of the reference, counted from its parts where a sheet prices those."""
    parts = [
        meter_line(
            sheet,
            key=item.key,
            label=meter,
            basis="",
            meter=meter,
            region=region,
            units=units,
            service=item.service,
        )
        for meter, units, _ in item.parts
    ]
    missing = [part.label for part in parts if not part.priced]
    usd = None if missing else total(tuple(parts))
    dated = [part.provenance for part in parts if part.provenance is not None]
    return Line(
        key=item.key,
        group=group_of(item.key),
        label=item.label,
        basis="; ".join(words for _, _, words in item.parts),
        quantity=Decimal(1),
        unit="month",
        unit_usd=usd,
        low_usd=usd,
        usd=usd,
        high_usd=usd,
        formula=" + ".join(f"({part.formula})" for part in parts),
        provenance=min(dated, key=lambda p: p.as_of) if dated else None,
        service=item.service,
        region=region,
        note=f"no price for {', '.join(missing)}" if missing else "added up from its parts",
    )


def _what_ifs(scenario: Scenario, sheet: PriceSheet, region: str, lines: tuple[Line, ...]) -> list[WhatIfDraft]:
    def otherwise(how: Callable[[Item], Line]) -> tuple[Line, ...]:
        pairs = zip(scenario.items, lines, strict=True)
        return tuple(how(item) if _is_gpu(item) else line for item, line in pairs)

    machines = [item for item in scenario.items if _is_gpu(item)]
    rows = []
    if any(item.priority == "spot" for item in machines):
        rows.append(
            WhatIfDraft(
                change="No spot: every GPU machine on demand",
                lines=otherwise(lambda item: _line(item, sheet, region, priority="on-demand")),
                note="same machine, same hours",
            )
        )
    longer = min(scenario.context * 2, load_model(scenario.model).max_context)
    size, why = _size_for(scenario, longer, sheet, region)
    rows.append(
        WhatIfDraft(
            change=f"Contexts twice as long, or the model's longest ({longer:,} tokens)",
            lines=otherwise(lambda item: _line(item, sheet, region, sku=size)) if size else None,
            note=why,
        )
    )
    rows.append(
        WhatIfDraft(
            change="A second replica of every GPU machine",
            lines=otherwise(lambda item: _line(item, sheet, region, times=2)),
            note="twice the machines, the same hours",
        )
    )
    if any(item.priority != "reserved-1y" for item in machines):
        # one machine for all its uses: they take turns
        reserved = _line(machines[0], sheet, region, priority="reserved-1y")
        others = tuple(line for item, line in zip(scenario.items, lines, strict=True) if not _is_gpu(item))
        rows.append(
            WhatIfDraft(
                change="The same GPU machine, reserved for a year",
                lines=(reserved, *others),
                note=reservation_note((reserved,)),
            )
        )
    return rows


def _size_for(scenario: Scenario, context: int, sheet: PriceSheet, region: str) -> tuple[str, str]:
    """The size that holds every task of the scenario at that context, and in words; empty where none does.

    Of those that hold them all and have a price bought the scenario's way: its own size, else the cheapest.
    """
    tasks = _tasks(scenario, context)
    machine = next(item for item in scenario.items if _is_gpu(item))
    holding = []
    for size in candidates():
        rate = sheet.rate(size.name, region, machine.priority)
        if rate is None or excluded(size, ()):
            continue
        fits = (fit_on(m, s, size, h) for _, m, s, h in tasks)
        if all(isinstance(fit, Fit) for fit in fits):
            holding.append((size.name != machine.sku, rate, size))
    if not holding:
        return "", "no size with a price there holds it"
    own_is_too_small, _, size = min(holding, key=lambda row: (row[0], row[1], row[2].name))
    if own_is_too_small:
        return size.name, f"the cheapest size that holds it is {size.short_name}"
    return size.name, f"{size.short_name} holds it"


def _commitments(scenario: Scenario, sheet: PriceSheet, region: str) -> list[Commitment]:
    hours: dict[str, Decimal] = {}
    bought: dict[str, Priority] = {}
    for item in scenario.items:
        if _is_gpu(item):
            hours[item.sku] = hours.get(item.sku, Decimal(0)) + item.hours
            bought[item.sku] = item.priority
    found = []
    for sku, used in hours.items():
        ways = alternatives(sheet, sku, region, min(used, MONTH_HOURS))
        found.append(
            Commitment(
                machine=sku.removeprefix("Standard_"),
                sku=sku,
                hours_per_month=used,
                ways=ways,
                advice=advice(ways, used, bought[sku]),
            )
        )
    return found


def _tasks(scenario: Scenario, context: int) -> list[tuple[Task, ModelSpec, Settings, float]]:
    """What the scenario's machines do, at a context: fine-tuning where it has such a line, and serving."""
    spec = load_model(scenario.model)
    tasks: list[tuple[Task, ModelSpec, Settings, float]] = []
    if any(item.key == "gpu/finetune" for item in scenario.items):
        tasks.append(("finetune", spec, FinetuneSettings(seq_len=context), default_headroom("finetune")))
    serving = ServingSettings(max_model_len=context, quantization=scenario.quantization)
    tasks.append(("serve", spec, serving, default_headroom("serve")))
    return tasks


def _stated(scenario: Scenario) -> tuple[Supposed, ...]:
    """What the scenario itself says and somebody must stand for."""
    source = f"{reference().source}, {reference().as_of}"
    rows = [
        Supposed(
            text=f"{item.label}: hours a month.",
            value=f"{figure(item.hours)} hours",
            owner="platform engineer" if item.key.startswith("people/") else "machine-learning engineer",
            source=source,
        )
        for item in scenario.items
        if item.sku
    ]
    rows += [
        Supposed(
            text=f"{item.label}: how much.", value=f"{figure(item.units)} GB", owner="platform engineer", source=source
        )
        for item in scenario.items
        if item.meter
    ]
    rows.append(
        Supposed(
            text="Azure's list prices: no discount of a contract, no credit, no tax.",
            value="list prices",
            owner="finance",
            source="price sheet",
        )
    )
    return tuple(rows)
