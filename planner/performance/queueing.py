"""A replica under load in closed form: how many sequences decode, and how long prompts wait.

Sequences that decode share the steps as customers share a processor: with n of them a step lasts t(n), and n is a
birth-death chain whose stationary law hardly depends on the law of the output lengths (Kelly 1979, Reversibility and
Stochastic Networks, section 3.3). Prompts go through an embedded Markov chain from step to step: each step serves a
budget of tokens, and meanwhile a Poisson number of prompts comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from planner.performance.replica import Asked, Replica

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

CHANCE_WEIGHTS = (0.2, 0.3, 0.3, 0.1, 0.05, 0.03, 0.01, 0.01)
CHANCES = (0.1, 0.35, 0.65, 0.85, 0.925, 0.965, 0.985, 0.995)  # middles of those
RARE = 0.004  # share of the time of steps that are left out where first tokens are looked at
LEVELS = (0.45, 0.35, 0.15, 0.05)  # slices of the number of sequences that prompts find
AHEAD = (0.3, 0.7, 0.9, 0.97)  # slices of the tokens that wait before a prompt
UNITS = 96  # states of the prompt queue
MOMENTS = 2  # of a step at which a request arrives
LONGER = 1.5  # phases of two-phase chains have no long ones: so much longer they agree with the simulation


@dataclass(frozen=True)
class Chain:
    """How many sequences decode.

    probability: of 0, 1, .. at a moment
    taken: probability that every place is taken, requests that wait for one included; running: mean sequences
    step_seconds: of a step as a sequence sees it; variance: of it, by the number of sequences
    memory_steps: over which the number of sequences forgets what it was; prompt_seconds: that a prompt adds
    """

    probability: Array
    taken: float = 0.0
    running: float = 0.0
    step_seconds: float = 0.0
    variance: float = 0.0
    memory_steps: float = 1.0
    prompt_seconds: float = 0.0


def open_chain(replica: Replica, rate: float) -> Chain:
    """How many sequences decode when requests come at random moments, `rate` a second."""
    import numpy as np

    asked = replica.asked
    tokens, steps = asked.tokens, asked.steps
    decode = replica.table[:, 0]
    mean = decode
    for _ in range(5):
        come = np.maximum(rate * mean, 1e-12)
        chunk = np.minimum(replica.room, np.maximum(tokens / replica.chunks, tokens * come / -np.expm1(-come)))
        mixed = replica.seconds(replica.levels, chunk)
        free = 1 - rate * tokens * (mixed - decode) / chunk
        mean = np.minimum(mixed, decode / np.maximum(free, 1e-9))
    if steps <= 0:
        return Chain(probability=np.ones(1))
    every = np.arange(replica.most + 1, dtype=float)
    decodes, mixes, own = (
        np.interp(every, replica.levels, values) for values in (decode, mixed, mixed * tokens / chunk)
    )
    decodes = np.maximum(decodes, 1e-12)
    uneven = float(asked.computed.var() / tokens**2)
    idle, busy = _two_phases(rate, own, uneven, every / (steps * decodes), every / (steps * mixes))
    taken = min(rate / replica.saturation, 1 - 1e-9)  # each further one that finds no place is this likely
    beyond = (idle[-1] + busy[-1]) * taken / (1 - taken)
    total = idle.sum() + busy.sum() + beyond
    probability = (idle + busy) / total
    share = busy / np.maximum(idle + busy, 1e-300)
    times = 1 / ((1 - share) / decodes + share / mixes)
    running = float((probability * every).sum() + beyond / total * replica.most)
    seen = probability * every
    seen = seen / seen.sum()
    average = float((seen * times).sum())
    slope = float((seen * np.gradient(times) * every / times).sum()) if replica.most > 1 else 0.0
    return Chain(
        probability=probability,
        taken=float(probability[-1] + beyond / total + (probability[:-1] * _blocked(replica, every[:-1])).sum()),
        running=running,
        step_seconds=running / (rate * steps),
        variance=float((seen * (times - average) ** 2).sum()),
        memory_steps=steps / max(1 - slope, 0.05),
        prompt_seconds=float((seen * own * (1 - decodes / mixes)).sum()),
    )


def _two_phases(rate: float, prompt: Array, uneven: float, ends_idle: Array, ends_busy: Array) -> tuple[Array, Array]:
    """Stationary weights of (n, idle) and (n, busy): prompts come at `rate`, each takes prompt[n] seconds of the busy
    phase and then decodes, and answers end at the two rates.

    The phases last as long as makes the busy time vary as it does in an M/G/1 queue, where the variance of a busy
    period of services S with squared variation c is (c + rho) / (1 - rho)^3 S^2. Only the busy phase goes up, so both
    weights of n are multiples of the busy weight of n - 1, found from the top down (a matrix-geometric solution).
    """
    import numpy as np

    most = len(prompt) - 1
    rho = np.minimum(rate * prompt, 0.98)
    together = np.maximum(1.0, LONGER * (1 + uneven) / (2 * (1 - rho) ** 2))  # prompts of a busy phase
    births, last = (1 / prompt).tolist(), (1 / together).tolist()
    wakes = (rate / (together * (1 - rho))).tolist()
    down, slow = ends_idle.tolist(), ends_busy.tolist()
    to_idle, to_busy = [0.0] * (most + 1), [0.0] * (most + 1)
    # with every place taken no prompt is computed
    to_idle[most] = births[most - 1] / down[most]
    from_above = births[most - 1]  # what flows down into (n, idle) for a weight of 1 in (n, busy)
    for n in range(most - 1, 0, -1):
        up = births[n - 1]
        leave = wakes[n] + down[n] + from_above * down[n] / slow[n]
        to_idle[n] = (up * last[n - 1] + from_above * up / slow[n]) / leave
        to_busy[n] = max(0.0, (up - down[n] * to_idle[n]) / slow[n])
        from_above = down[n] * to_idle[n]
    idle, busy, weight = [from_above / wakes[0]], [1.0], 1.0
    for n in range(1, most + 1):
        idle.append(weight * to_idle[n])
        weight *= to_busy[n]
        busy.append(weight)
        if weight > 1e200:  # only ratios matter
            idle, busy, weight = [x * 1e-200 for x in idle], [x * 1e-200 for x in busy], weight * 1e-200
    return np.array(idle), np.array(busy)


def _blocked(replica: Replica, running: Array) -> Array:
    """Probability that the cache has no room for a prompt beside that many sequences, whose lengths vary."""
    import numpy as np

    asked = replica.asked
    if not replica.by_cache:
        return np.zeros_like(running)
    outputs, mean = asked.outputs, asked.context - float(asked.prompts.mean())
    variance = float(asked.prompts.var() + (outputs**3).mean() / (3 * asked.answer) - mean**2)
    spare = replica.limits.kv_tokens - running * asked.context - float(asked.prompts.mean())
    normal = spare / np.sqrt(np.maximum(running * variance, 1.0))
    return np.array([NormalDist().cdf(-value) for value in normal])


def closed_chain(replica: Replica, count: int) -> tuple[float, Chain, Array, Array]:
    """A closed loop: each of that many clients sends its next request when the last is answered.

    With n that decode the others' prompts are computed, so n is a birth-death chain; the requests a second, the
    chain, and seconds to the first token with their weights (their mean by Little's law).
    """
    import numpy as np

    asked = replica.asked
    tokens, steps = asked.tokens, asked.steps
    if steps <= 0:
        size = min(count * tokens, replica.room[0])
        rate = float(size / tokens / replica.seconds(0, size))
        return rate, Chain(np.ones(1)), np.array([count / rate]), np.ones(1)
    every = np.arange(min(count, replica.most) + 1, dtype=float)
    prompts = np.minimum(count - every, replica.most - every)
    room = replica.room_beside(every)
    size = np.minimum(prompts * tokens, room)
    times = replica.seconds(every, size)
    births = size / tokens / times
    deaths = every / (steps * times)
    logs = np.concatenate(([0.0], np.cumsum(np.log(births[:-1] / deaths[1:]))))
    probability = np.exp(logs - logs.max())
    probability /= probability.sum()
    rate = float((probability * deaths).sum())
    ended = probability * deaths / rate  # what a request finds, by how many decoded when the one before it ended
    rate = min(rate, replica.saturation)
    running = float((probability * every).sum())
    ahead = (count - every + 1) * tokens
    full = np.ceil(ahead / room - 1e-9) - 1
    values = full * replica.seconds(every, room) + replica.seconds(every, ahead - full * room)
    values *= (count - running) / rate / float((values * ended).sum())
    average = float((ended * times).sum())
    chain = Chain(
        probability=probability,
        running=running,
        step_seconds=running / (rate * steps),
        variance=float((ended * (times - average) ** 2).sum()) / steps,
    )
    return rate, chain, values, ended


def first_token(replica: Replica, rate: float, chain: Chain) -> tuple[Array, Array]:
    """Seconds from a request to its first token, as values and their weights."""
    import numpy as np

    found = [_prompt_queue(replica, rate, level, weight) for level, weight in _met(chain)]
    values = np.concatenate([values for values, _ in found])
    weights = np.concatenate([weights for _, weights in found])
    if chain.taken > 1e-6:
        drain = 1 / replica.saturation
        outputs = replica.asked.outputs
        uneven = (1 + float(outputs.var() / outputs.mean() ** 2)) / 2  # of M/G/n against M/M/n
        wait = drain / max(1 - rate * drain, 1e-9) * uneven
        own = float((found[-1][0] * found[-1][1]).sum() / found[-1][1].sum())
        nodes, shares = exponential_nodes()
        values = np.concatenate((values, own + wait * nodes))
        weights = np.concatenate((weights * (1 - chain.taken), shares * chain.taken))
    return values, weights / weights.sum()


def _met(chain: Chain) -> list[tuple[int, float]]:
    """Numbers of sequences that a request with a free place meets, with weights that are finer in the tail."""
    import numpy as np

    free = chain.probability[:-1] if len(chain.probability) > 1 else chain.probability
    ladder = np.cumsum(free) / free.sum()
    shares = np.array(LEVELS)
    met = np.searchsorted(ladder, np.cumsum(shares) - shares / 2)
    return [(int(level), float(shares[met == level].sum())) for level in np.unique(met)]


def _prompt_queue(replica: Replica, rate: float, running: int, weight: float) -> tuple[Array, Array]:
    """Seconds to the first token beside `running` sequences: values, and weights that add up to `weight`.

    A request waits for the rest of the step under way, then for the steps that take the tokens before it and its own,
    the last of which also takes those that come behind it in time.
    """
    import numpy as np

    asked = replica.asked
    room = float(np.interp(running, replica.levels, replica.room))
    beside = 0 if replica.limits.prefill_first else running
    places = max(1, round(room / max(asked.tokens / 4, room / 32)))
    unit = room / places
    times = replica.seconds(beside, np.arange(places + 1) * unit)
    times[0] = replica.seconds(running, 0.0)
    length = _in_units(asked.computed / unit)
    shape = np.fft.rfft(length, 2 * UNITS)
    spent = _waiting(rate, length, shape, times, idle=not running)
    taken = np.minimum(np.arange(UNITS), places)
    moments = (np.arange(MOMENTS) + 0.5) / MOMENTS
    values, weights = [], []
    parts = np.array([0, 1, places // 3 + 1, 2 * places // 3 + 1, places, places + 1])
    for low, high in pairwise(np.unique(parts)):  # by what the step under way takes: nothing, some, or all of the room
        group = (taken >= low) & (taken < high)
        total = float(spent[group].sum())
        if total < RARE:
            continue
        under_way = float((spent * times[taken])[group].sum() / total)
        if not running and group[0]:  # whoever finds the engine idle is alone
            under_way = 0.0
        left = np.zeros(UNITS)
        np.add.at(left, np.arange(UNITS)[group] - taken[group], spent[group] / total)
        before = _compound(rate * under_way * moments, shape, left)
        ahead, chance = _few(before)
        behind, likely = _come_after(rate * under_way * (1 - moments))
        own, share = _own(replica, beside, room, ahead * unit, behind * asked.tokens)
        values.append(((1 - moments)[:, None, None, None] * under_way + own).ravel())
        law = chance[:, :, None, None] * likely[:, None, :, None] * share
        weights.append((law * (total * weight / MOMENTS)).ravel())
    return np.concatenate(values), np.concatenate(weights)


def _in_units(lengths: Array) -> Array:
    """The law of equally likely lengths in whole units, each length between the two next to it."""
    import numpy as np

    lengths = np.minimum(lengths, UNITS - 2)
    low = lengths.astype(int)
    counts = np.bincount(low, 1 - lengths + low, UNITS) + np.bincount(low + 1, lengths - low, UNITS)
    found: Array = counts / len(lengths)
    return found


def _waiting(rate: float, length: Array, shape: Any, times: Array, *, idle: bool) -> Array:
    """Shares of the time by units of prompts that a step finds: waiting' = max(waiting - places, 0) + those that come.

    times: seconds of a step that takes 0, 1, .. places units; idle: a step that finds none waits for the first to come
    """
    import numpy as np

    come = _compound(rate * times, shape, np.eye(1, UNITS)[0])
    if idle:
        times[0], come[0] = 1 / rate, length
    places = len(times) - 1
    taken = np.minimum(np.arange(UNITS), places)
    offset = np.arange(UNITS) - (np.arange(UNITS) - taken)[:, None]
    moves = np.where(offset >= 0, come[taken[:, None], np.maximum(offset, 0)], 0.0)
    moves[:, -1] += 1 - moves.sum(axis=1)
    spent = _stationary(moves) * times[taken]
    found: Array = spent / spent.sum()
    return found


def _come_after(mean: Array) -> tuple[Array, Array]:
    """Poisson numbers of that mean as none, one, and the mean of more, with their weights; a row for each mean."""
    import numpy as np

    none, one = np.exp(-mean), mean * np.exp(-mean)
    more = np.maximum(1 - none - one, 0.0)
    number = np.where(more > 1e-9, (mean - one) / np.maximum(more, 1e-9), 2.0)
    return np.stack([np.zeros_like(mean), np.ones_like(mean), number], axis=1), np.stack([none, one, more], axis=1)


def _own(replica: Replica, beside: int, room: float, ahead: Array, behind: Array) -> tuple[Array, Array]:
    """Seconds of the steps that compute a prompt, by moment, by the tokens before it and behind it, by its length.

    ahead, behind: moments x values, in tokens; also the shares of the lengths
    """
    import numpy as np

    computed, shares = replica.asked.some_computed
    before = ahead[:, :, None, None] + computed
    full = np.ceil(before / room - 1e-9) - 1
    size = np.minimum(before - full * room + behind[:, None, :, None], room)
    return full * replica.seconds(beside, room) + replica.seconds(beside, size) + replica.long_prompts, shares


def _compound(arrivals: Array, shape: Any, start: Array) -> Array:
    """Laws of units after a Poisson number of prompts, by mean number, on top of a law.

    shape: the Fourier transform of the law of one prompt; of the sum it is exp(number (shape - 1)) times that of start
    """
    import numpy as np

    size = 2 * UNITS
    laws = np.fft.irfft(np.fft.rfft(start, size) * np.exp(arrivals[:, None] * (shape - 1)), size)
    found: Array = np.maximum(laws[:, :UNITS], 0.0)
    return found


def _few(laws: Array) -> tuple[Array, Array]:
    """Each law of units in a few values with weights: means of its slices, weight 0 where a slice has none."""
    import numpy as np

    ladder = laws.cumsum(axis=1)
    part = np.searchsorted(np.array(AHEAD), (ladder - laws / 2) / ladder[:, -1:])
    cell = (part + (len(AHEAD) + 1) * np.arange(len(laws))[:, None]).ravel()
    count = (len(AHEAD) + 1) * len(laws)
    shares = np.bincount(cell, laws.ravel(), count).reshape(len(laws), -1)
    sums = np.bincount(cell, (laws * np.arange(laws.shape[1])).ravel(), count).reshape(len(laws), -1)
    return sums / np.maximum(shares, 1e-300), shares / ladder[:, -1:]


def _stationary(moves: Array) -> Array:
    """The stationary law of a Markov chain with those probabilities from row to column."""
    import numpy as np

    system = moves.T - np.eye(len(moves))
    system[-1] = 1.0
    right = np.zeros(len(moves))
    right[-1] = 1.0
    found: Array = np.maximum(np.linalg.solve(system, right), 0.0)
    return found


def later_tokens(asked: Asked, rate: float, chain: Chain) -> tuple[Array, Array, Array]:
    """Mean seconds a later token of a request: values by answer length and by chance (CHANCES), and those lengths with
    their weights.

    Over a life of x memories the mean of what varies keeps 2 (x - 1 + exp(-x)) / x^2 of its variance. A request of s
    steps meets Poisson prompts, which prolong its life so that it meets more (the variance of a busy period), and its
    own prompt is likely to be followed by others, the fewer steps the likelier that they matter.
    """
    import numpy as np

    outputs, weights = asked.some_outputs
    normal = np.array([NormalDist().inv_cdf(share) for share in CHANCES])
    if asked.steps <= 0:
        return np.zeros((1, len(normal))), outputs, weights
    steps = np.maximum((outputs - 1) / asked.gain, 1.0)
    square = (1 + float(asked.computed.var() / asked.tokens**2)) * chain.prompt_seconds**2
    free = max(1 - rate * chain.prompt_seconds, 0.02)
    followed = rate * square / 2 / free
    middle = max(chain.step_seconds - followed / asked.steps, chain.step_seconds / 2)
    life = steps / chain.memory_steps
    kept = 2 * (life - 1 + np.exp(-life)) / life**2
    met = rate * chain.step_seconds / steps * square / free**2
    values = gamma_values((middle + followed / steps)[:, None], (chain.variance * kept + met)[:, None], normal)
    return values / asked.gain, outputs, weights


def exponential_nodes() -> tuple[Array, Array]:
    """Values and weights that stand for an exponential variable of mean 1: means of slices, finer in the tail."""
    import numpy as np

    edges = np.array((0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0))
    beyond = (1 - edges) * (1 - np.log(np.maximum(1 - edges, 1e-300)))  # the mean's part above a quantile
    weights = np.diff(edges)
    return -np.diff(beyond) / weights, weights


def gamma_values(mean: Array, variance: Array, normal: Array) -> Array:
    """Gamma-distributed values at standard normal ones (Wilson and Hilferty 1931)."""
    import numpy as np

    shape = mean**2 / np.maximum(variance, 1e-12 * mean**2)
    found: Array = mean * np.maximum(1 - 1 / (9 * shape) + normal / (3 * shape**0.5), 0.0) ** 3
    return found
