"""The cheapest way to put all workloads somewhere in one region: exact, by branch and bound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal

from planner.catalog.prices import COMMITTED, Priority
from planner.cost.schedule import MONTH_HOURS
from planner.plan.choices import Choice, Limits, Placement, exceeded


class Search:
    """The cheapest placement of all jobs in one region, by depth first and bounds.

    tables: of each job its choices. turns: jobs in the same pool share its machines, so that a pool needs the most that
    any of them needs, and a commitment is paid once; otherwise they stand side by side and needs add up. fallback: spot
    pools have twins on demand.
    """

    def __init__(
        self,
        tables: Sequence[Sequence[Choice]],
        limit: Limits,
        *,
        turns: bool,
        fallback: bool,
    ) -> None:
        self.turns, self.fallback, self.limit = turns, fallback, limit
        self.best: Placement | None = None
        shared = _kept_pools(tables, limit) if self.turns else set()
        roomy = sum((max((c.work_hours for c in t), default=Decimal(0)) for t in tables), Decimal(0)) <= MONTH_HOURS
        self.tables = [
            _kept(table, shared, limit, turns=self.turns, fallback=self.fallback, roomy=roomy) for table in tables
        ]
        # what each job costs at least on machines of its own, and as its part of a commitment that others may share
        self.alone = [_least(c.usd for c in table if not self._shares(c)) for table in self.tables]
        self.together = [_least(c.committed_usd for c in table if self._shares(c)) for table in self.tables]

    def _shares(self, choice: Choice) -> bool:
        return self.turns and choice.priority in COMMITTED

    def _rest(self, chosen: Sequence[Choice]) -> Decimal:
        """What the jobs not yet placed cost at least.

        A job costs what it costs alone, or its part of a commitment, split over no more jobs than are left, or nothing
        where a commitment is already there that it might join.
        """
        left = len(self.tables) - len(chosen)
        opened = {choice.pool for choice in chosen if self._shares(choice)}
        rest = Decimal(0)
        for index in range(len(chosen), len(self.tables)):
            if opened and any(c.pool in opened for c in self.tables[index]):
                continue
            alone, together = self.alone[index], self.together[index]
            costs = [*([] if alone is None else [alone]), *([] if together is None else [together / left])]
            rest += min(costs, default=Decimal(0))
        return rest

    def run(self) -> Placement | None:
        """The cheapest placement, None where a job has no choice or the quota allows none."""
        if all(self.tables):
            self._descend([], Decimal(0))
        return self.best

    def _descend(self, chosen: list[Choice], so_far: Decimal) -> None:
        depth = len(chosen)
        if depth == len(self.tables):
            usd = so_far + self.shared_usd(chosen)
            if self.best is None or usd < self.best.usd:
                self.best = Placement(tuple(chosen), usd)
            return
        for choice in self.tables[depth]:
            # choices come by usd: once that alone is too dear, all that follow are
            if self.best is not None and so_far + choice.usd >= self.best.usd:
                break
            chosen.append(choice)
            bound = so_far + choice.usd + self.shared_usd(chosen) + self._rest(chosen)
            if (self.best is None or bound < self.best.usd) and self.allowed(chosen):
                self._descend(chosen, so_far + choice.usd)
            chosen.pop()

    def shared_usd(self, chosen: Sequence[Choice]) -> Decimal:
        """What commitments cost that jobs taking turns share: once a pool, for the most machines any of them needs."""
        most: dict[tuple[str, Priority], Decimal] = {}
        for choice in chosen:
            if self._shares(choice):
                most[choice.pool] = max(most.get(choice.pool, Decimal(0)), choice.committed_usd)
        return sum(most.values(), Decimal(0))

    def allowed(self, chosen: Sequence[Choice]) -> bool:
        """Whether the quota holds these pools, and the month the work on each: more never need less."""
        if self.turns and any(hours > MONTH_HOURS for hours in _pool_hours(chosen).values()):
            return False
        return not exceeded(chosen, self.limit, turns=self.turns, fallback=self.fallback)


def _least(amounts: Iterable[Decimal]) -> Decimal | None:
    return min(amounts, default=None)


def _pool_hours(chosen: Sequence[Choice]) -> dict[tuple[str, Priority], Decimal]:
    """Hours a month that each pool's machines work, one workload after the other."""
    hours: dict[tuple[str, Priority], Decimal] = {}
    for choice in chosen:
        hours[choice.pool] = hours.get(choice.pool, Decimal(0)) + choice.work_hours
    return hours


def _kept(
    table: Sequence[Choice],
    shared: set[tuple[str, Priority]],
    limit: Limits,
    *,
    turns: bool,
    fallback: bool,
    roomy: bool,
) -> tuple[Choice, ...]:
    """The choices of a job, cheapest first, that could be in a cheapest placement.

    Dropped: of commitments that turns share, those not in `shared`; and what a cheaper choice replaces without wanting
    more of any quota. Jobs that take turns may join a pool for nothing, so there that holds only where nothing limits
    them (roomy: all their work fits one machine's month, whichever way it is bought).
    """
    free = roomy and not limit.family and limit.spot is None and limit.total is None
    kept: list[Choice] = []
    for choice in table:
        if turns and choice.priority in COMMITTED:
            if choice.pool in shared:
                kept.append(choice)
            continue
        others = (other for other in kept if not (turns and other.priority in COMMITTED))
        if (free or not turns) and any(_wants_no_more(other, choice, limit, fallback=fallback) for other in others):
            continue
        kept.append(choice)
    return tuple(kept)


def _wants_no_more(one: Choice, other: Choice, limit: Limits, *, fallback: bool) -> bool:
    """Whether one wants no more of any quota than the other."""
    spot, others_spot = one.priority == "spot", other.priority == "spot"
    if spot and limit.spot is not None and not (others_spot and one.vcpus <= other.vcpus):
        return False
    if not spot or fallback:
        on_demand_too = not others_spot or fallback
        if limit.total is not None and not (on_demand_too and one.vcpus <= other.vcpus):
            return False
        family = one.option.size.quota_family
        same = on_demand_too and family == other.option.size.quota_family and one.vcpus <= other.vcpus
        if family.lower() in limit.family and not same:
            return False
    return True


def _kept_pools(tables: Sequence[Sequence[Choice]], limit: Limits) -> set[tuple[str, Priority]]:
    """The commitments that workloads taking turns might share: those that no other one replaces.

    One replaces another that holds no workload more, costs no less for any of them, takes no fewer vCPUs, and whose
    quota family is the same, or that family is not limited.
    """
    pools: dict[tuple[str, Priority], dict[int, Choice]] = {}
    for table in tables:
        for choice in table:
            if choice.priority in COMMITTED:
                pools.setdefault(choice.pool, {})[choice.job] = choice

    def replaces(one: dict[int, Choice], other: dict[int, Choice]) -> bool:
        family = next(iter(one.values())).option.size.quota_family
        theirs = next(iter(other.values())).option.size.quota_family
        if family != theirs and family.lower() in limit.family:
            return False
        return all(
            job in one and one[job].committed_usd <= choice.committed_usd and one[job].vcpus <= choice.vcpus
            for job, choice in other.items()
        )

    kept: list[tuple[str, Priority]] = []
    # cheapest first, so that of two that replace each other the first stays
    for pool in sorted(pools, key=lambda p: (next(iter(pools[p].values())).rate, p)):
        if not any(replaces(pools[known], pools[pool]) for known in kept):
            kept.append(pool)
    return set(kept)
