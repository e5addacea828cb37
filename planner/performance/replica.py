"""A server and its requests in closed form: the seconds of its steps in a table, and the most requests it completes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from planner.performance.simulate import Limits
from planner.performance.step import Speeds, Work, distinct_experts, step_parts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

FINE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.94, 0.96, 0.98, 0.99, 0.995)  # where a law is cut into slices
COARSE = (0.2, 0.45, 0.7, 0.85, 0.93, 0.97, 0.99)
ROWS = 24  # numbers of sequences in the table, besides 0 and 1
SIZES = 14  # prompt tokens of a step in the table


@dataclass(frozen=True)
class Asked:
    """Requests as the formulas take them.

    prompts, outputs: equally likely lengths in tokens; hit: share of a prompt that the prefix cache holds
    gain: tokens that a decode step yields for a sequence, 1 without speculation
    """

    prompts: Array
    outputs: Array
    hit: float = 0.0
    gain: float = 1.0

    @cached_property
    def computed(self) -> Array:
        """Prompt tokens that are computed, the last one always."""
        import numpy as np

        found: Array = self.prompts - np.minimum(np.floor(self.hit * self.prompts), self.prompts - 1)
        return found

    @cached_property
    def tokens(self) -> float:
        return float(self.computed.mean())

    @cached_property
    def density(self) -> float:
        """(query, key) pairs for each computed token."""
        held = self.prompts - self.computed
        return float((self.prompts**2 - held**2).sum() / 2 / self.computed.sum())

    @cached_property
    def answer(self) -> float:
        return float(self.outputs.mean())

    @cached_property
    def some_computed(self) -> tuple[Array, Array]:
        """A few values that stand for `computed`, with their weights."""
        return slices(self.computed, None, COARSE)

    @cached_property
    def some_outputs(self) -> tuple[Array, Array]:
        """A few values that stand for `outputs`, with their weights."""
        return slices(self.outputs, None, FINE)

    @property
    def steps(self) -> float:
        """Decode steps of a request: the first token comes with the prompt."""
        return (self.answer - 1) / self.gain

    @cached_property
    def context(self) -> float:
        """Mean KV tokens of a decoding sequence at a moment: prompt + E[o^2] / 2 E[o]."""
        return float(self.prompts.mean() + (self.outputs**2).mean() / (2 * self.answer))


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters that requests choose among evenly: bytes of one on a rank, operations that it adds to a token."""

    count: int
    bytes_each: float
    flops: float


@dataclass(frozen=True)
class Decoder:
    """What a step does beside the model's own work: verify `extra` drafted tokens for each sequence, run the model that
    drafts them, and apply adapters."""

    work: Work
    speeds: Speeds
    limits: Limits
    extra: int = 0
    draft: tuple[Work, Speeds] | None = None
    adapters: Adapters | None = None

    def seconds(self, decode: Any, context: Any, prefill: Any, pairs: Any, sampled: Any) -> Any:
        """Seconds of a step, arrays welcome. Drafted tokens look at the cache that their sequence reads anyway."""
        drafted = self.extra * decode
        tokens = decode + prefill + drafted
        total = step_parts(
            self.work,
            self.speeds,
            decode=decode,
            context=context,
            prefill=prefill + drafted,
            pairs=pairs + self.extra * context,
            sampled=sampled + drafted,
        ).total
        if self.extra:
            total = total - self.speeds.mixed * ((drafted > 0) & (prefill < 1))  # decoding alone keeps its CUDA graph
        if self.draft is not None:
            work, speeds = self.draft
            drafts = step_parts(work, speeds, decode=decode, context=context).total
            total = total + (drafted > 0) * self.extra * drafts
        if self.adapters is not None:
            used = distinct_experts(self.adapters.count, 1, sampled)  # sequences choose adapters as tokens do experts
            total = total + used * self.adapters.bytes_each / self.speeds.weight_bytes
            total = total + tokens * self.adapters.flops / self.speeds.head_flops
        return total


class Replica:
    """A server and its requests: the table of step times, and what can be read from it at any rate.

    levels: numbers of sequences, the rows of the table; sizes: prompt tokens, its columns; most: sequences at a time
    room: prompt tokens that a step takes beside the sequences of a row; full: seconds of a step with that many
    """

    def __init__(self, decoder: Decoder, asked: Asked) -> None:
        import numpy as np

        limits = decoder.limits
        self.asked, self.limits = asked, limits
        self.each = 0 if limits.prefill_first else 1 + decoder.extra  # of the budget, for each sequence
        budget = float(limits.max_num_batched_tokens)
        by_cache = (limits.kv_tokens - asked.prompts.mean() / 2) / asked.context
        by_budget = (budget - 1) / max(self.each, 1)
        self.most = max(1, int(min(limits.max_num_seqs, by_cache, by_budget)))
        self.by_cache = by_cache < limits.max_num_seqs
        levels = np.unique(np.round(np.concatenate(([0, 1], np.geomspace(1, self.most, ROWS)))))
        sizes = np.concatenate(([0.0], np.geomspace(1, budget, SIZES)))
        running, size = levels[:, None], sizes[None, :]
        self.levels, self.sizes = levels, sizes
        self.table: Array = decoder.seconds(
            running, running * asked.context, size, size * asked.density, running + size / asked.tokens
        )
        if limits.prefill_first:  # a step of prompts alone, then one that decodes
            self.table[1:, 1:] = self.table[0, 1:] + self.table[1:, :1]
        some, pairs = asked.tokens, asked.tokens * asked.density
        self.pair_seconds = (
            float(decoder.seconds(0.0, 0.0, some, 2 * pairs, 1.0) - decoder.seconds(0.0, 0.0, some, pairs, 1.0)) / pairs
        )
        self.room = self.room_beside(levels)
        self.full = self.seconds(levels, self.room)

    def room_beside(self, running: Any) -> Any:
        """Prompt tokens that a step takes beside that many sequences."""
        import numpy as np

        left = self.limits.max_num_batched_tokens - self.each * running
        return np.clip(left, 1.0, self.limits.max_num_seqs * self.asked.tokens)

    def seconds(self, running: Any, size: Any) -> Array:
        """Seconds of a step with that many sequences and prompt tokens, linear between the entries of the table."""
        import numpy as np

        running, size = np.asarray(running, dtype=float), np.asarray(size, dtype=float)
        levels, sizes, table = self.levels, self.sizes, self.table
        row = np.maximum(np.searchsorted(levels, running) - 1, 0)
        next_row = np.minimum(row + 1, len(levels) - 1)
        down = (running - levels[row]) / np.maximum(levels[next_row] - levels[row], 1e-9)
        some = np.minimum(np.maximum(size, 1.0), sizes[-1])  # one prompt token makes a mixed step, which costs more
        column = np.minimum(np.maximum(np.searchsorted(sizes, some) - 1, 1), len(sizes) - 2)
        across = np.where(size > 0, (some - sizes[column]) / (sizes[column + 1] - sizes[column]), 0.0)
        column = np.where(size > 0, column, 0)
        above = table[row, column] + across * (table[row, column + 1] - table[row, column])
        below = table[next_row, column] + across * (table[next_row, column + 1] - table[next_row, column])
        found: Array = above + down * (below - above)
        return found

    @cached_property
    def long_prompts(self) -> Array:
        """Seconds that each of asked.some_computed takes beyond what the mean prompt's pairs a token would make it."""
        computed, _ = self.asked.some_computed
        pairs = computed**2 * (1 / (1 - self.asked.hit) - 0.5)
        found: Array = self.pair_seconds * (pairs - computed * self.asked.density)
        return found

    @cached_property
    def chunks(self) -> Array:
        """Steps that a prompt alone takes, by row."""
        import numpy as np

        found: Array = np.ceil(self.asked.computed[:, None] / self.room).mean(axis=0)
        return found

    @cached_property
    def saturation(self) -> float:
        """Requests a second at most, with a queue that is never empty.

        With n sequences a step ends n / steps answers and admits (budget - n) / prompt prompts; n grows until both are
        equal or the places are taken, which a prompt holds for a step too. Where the cache is what is full, prompts
        have taken the room into which answers grow, and as many tokens as are generated are computed again.
        """
        import numpy as np

        asked, limits = self.asked, self.limits
        tokens, steps = asked.tokens, asked.steps
        if steps <= 0:
            return float(self.room[0] / tokens / self.full[0])
        if self.by_cache:
            tokens += asked.answer
        running = self.most * steps / (steps + 1)
        if self.each:
            running = min(running, limits.max_num_batched_tokens * steps / (tokens + self.each * steps))
        room = self.room_beside(running)
        come = running / steps  # prompts a step
        chunk = min(room, max(tokens / np.ceil(tokens / room), tokens * come / -np.expm1(-come)))
        decode, mixed = self.seconds(running, [0.0, chunk])
        return float(come / (decode + min(1.0, come * tokens / chunk) * (mixed - decode)))


def slices(ordered: Array, weights: Array | None, cuts: tuple[float, ...]) -> tuple[Array, Array]:
    """A law in a few values, with their weights: means of its slices between the cuts; no weights: equally likely."""
    import numpy as np

    weights = np.ones(len(ordered)) if weights is None else weights
    ladder = np.cumsum(weights)
    part = np.searchsorted(np.array(cuts), (ladder - weights / 2) / ladder[-1])
    shares = np.bincount(part, weights, len(cuts) + 1)
    sums = np.bincount(part, weights * ordered, len(cuts) + 1)
    found = shares > 0
    return sums[found] / shares[found], shares[found] / ladder[-1]
