"""Continuous batching step by step: vLLM's scheduler over a queue of requests, with the time of each step from a model.

Steps between two events (an arrival, a prompt, an end, a full cache) are alike but for the growing context, in which
their time is linear, so they are taken together; a run costs a few microseconds for each request, not for each token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil, inf, sqrt

from planner.errors import PlannerError

StepSeconds = Callable[[float, float, float, float, float], float]
"""(decode, context, prefill, pairs, sampled) -> seconds, as planner.performance.step.step_parts takes them."""


@dataclass(frozen=True)
class Limits:
    """What the scheduler may put into a step and the cache: vLLM's max_num_seqs, max_num_batched_tokens, KV tokens.

    prefill_first: a step is either prompts or decoding, and prompts go first (SGLang), not both in one (vLLM)
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: float = inf
    prefill_first: bool = False


@dataclass
class Served:
    """What the clients saw, by request and in seconds, and what the engine did.

    sent, first, done: when a request was sent, when its first and its last token came
    steps: (decode, context, prefill, pairs, sampled, count, seconds of all, waiting, decoding, slowness) of groups of
    equal steps, where waiting are requests without a first token and slowness is the sum over the decoding requests of
    1 / (output - 1)
    """

    sent: list[float]
    first: list[float]
    done: list[float]
    seconds: float = 0.0
    preemptions: int = 0
    steps: list[tuple[float, ...]] = field(default_factory=list)


def simulate(
    step: StepSeconds,
    prompts: Sequence[int],
    outputs: Sequence[int],
    limits: Limits,
    *,
    arrivals: Sequence[float] | None = None,
    concurrency: int | None = None,
    cached: Sequence[int] | None = None,
    keep_steps: bool = False,
    pause: float = 0.0,
) -> Served:
    """Serves requests of `prompts` and `outputs` tokens in order.

    arrivals: seconds at which they are sent, ascending; without them all are there at once, or with `concurrency` each
    client sends its next one `pause` seconds after its last has ended. cached: prompt tokens that the prefix cache
    holds already; each sequence holds them anew, although vLLM shares their blocks. A token counts as one of
    limits.kv_tokens: blocks that are filled in part are left out.
    Each step gives every running sequence a token first and fills the rest of max_num_batched_tokens with prompts in
    the order of their arrival, each once the cache has room for the whole of it; when the cache is full the newest
    sequence is put back to the head of the queue and computed again. Times are exact where a step's time is linear in
    the context.
    Raises PlannerError where a request is longer than the cache. Source: vllm/v1/core/sched/scheduler.py.
    """
    for prompt, output in zip(prompts, outputs, strict=True):
        if prompt < 1 or output < 1:
            raise PlannerError("a request needs a prompt and an answer of at least 1 token: raise the lengths")
        if prompt + output > limits.kv_tokens:
            raise PlannerError(
                f"a request of {prompt + output:,} tokens is longer than the KV cache of {int(limits.kv_tokens):,}"
                " tokens: take a larger GPU, or lower the lengths"
            )
    run = _Run(step, prompts, outputs, limits, cached, keep_steps)
    if arrivals is not None:
        run.coming.extend(zip(arrivals, range(len(prompts)), strict=True))
        run.unsent = len(prompts)
    else:
        clients = min(len(prompts), concurrency or len(prompts))
        run.coming.extend((0.0, request) for request in range(clients))
        run.unsent, run.pause = clients, pause
    run.serve()
    return run.served


class _Run:
    """The state of a run between two steps.

    coming: (second, request) of those that are sent later, ascending; unsent: the first request without a moment yet
    made: tokens that a request had before it was put back; started: decoding requests in the order of admission, with
    the number of the step at which they began; ends: (number of its last step, request, number of its first)
    context: tokens that the decoding requests hold in the next step; partial, computed: the prompt under way
    """

    def __init__(
        self,
        step: StepSeconds,
        prompts: Sequence[int],
        outputs: Sequence[int],
        limits: Limits,
        cached: Sequence[int] | None,
        keep_steps: bool,
    ) -> None:
        count = len(prompts)
        self.step, self.prompts, self.outputs, self.limits, self.cached = step, prompts, outputs, limits, cached
        self.keep_steps = keep_steps
        self.served = Served(sent=[0.0] * count, first=[0.0] * count, done=[0.0] * count)
        self.coming: deque[tuple[float, int]] = deque()
        self.waiting: deque[int] = deque()
        self.unsent, self.pause = count, 0.0
        self.made = [0] * count
        self.started: dict[int, int] = {}
        self.ends: list[tuple[int, int, int]] = []
        self.context, self.partial, self.computed = 0, -1, 0
        self.now, self.index, self.unfirst, self.slowness = 0.0, 0, 0, 0.0

    def serve(self) -> None:
        """Steps until every request is done."""
        coming = self.coming
        while True:
            while coming and coming[0][0] <= self.now:
                moment, request = coming.popleft()
                self.served.sent[request] = moment
                self.waiting.append(request)
                self.unfirst += 1
            if not self.started and self.partial < 0 and not self.waiting:
                if not coming:
                    break
                self.now = coming[0][0]
                continue
            crowded = self._make_room()
            prefill, pairs, finished = (0, 0.0, []) if crowded else self._take_prompts()
            if prefill:
                number = self._step_with_prompts(prefill, pairs, len(finished))
            elif self.started:
                number = self._decode_steps()
            else:  # the prompt under way was put back, and is admitted again by the next round
                continue
            self._end(number)
            self._begin(finished)
        self.served.seconds = self.now

    def _make_room(self) -> bool:
        """Puts back the newest while the cache cannot hold the next token of every sequence; whether it had to."""
        if self.context + self.computed <= self.limits.kv_tokens:
            return False
        if self.partial >= 0:
            self._put_back_prompt()
        while self.context > self.limits.kv_tokens:
            newest, begun = self.started.popitem()
            self.made[newest] += self.index - begun + 1
            self.context -= self.prompts[newest] + self.made[newest]
            self.slowness -= self._slowness_of(newest)
            self.waiting.appendleft(newest)
            self.served.preemptions += 1
        return True

    def _put_back_prompt(self) -> None:
        self.waiting.appendleft(self.partial)
        self.partial, self.computed = -1, 0
        self.served.preemptions += 1

    def _take_prompts(self) -> tuple[int, float, list[int]]:
        """What of the prompts goes into this step: tokens, (query, key) pairs, and the prompts that it completes."""
        limits, waiting = self.limits, self.waiting
        running = len(self.started)
        room = limits.max_num_batched_tokens - (0 if limits.prefill_first else running)
        held = self.context + self.computed
        prefill, pairs, finished = 0, 0.0, []
        while room > 0:
            if self.partial < 0:
                if not waiting or running >= limits.max_num_seqs:
                    break
                request = waiting[0]
                length = self.prompts[request] + self.made[request]
                if running and held + length + running + 1 > limits.kv_tokens:
                    break
                waiting.popleft()
                self.partial = request
                if self.cached is not None and not self.made[request]:
                    self.computed = min(self.cached[request], length - 1)
                    held += self.computed
            left = self.prompts[self.partial] + self.made[self.partial] - self.computed
            chunk = min(room, left)
            if held + chunk > limits.kv_tokens:
                self._put_back_prompt()
                break
            pairs += chunk * (self.computed + chunk / 2)
            prefill += chunk
            held += chunk
            room -= chunk
            self.computed += chunk
            if chunk < left:
                break
            finished.append(self.partial)
            self.partial, self.computed = -1, 0
            running += 1
        return prefill, pairs, finished

    def _step_with_prompts(self, prefill: int, pairs: float, ended: int) -> int:
        """Time of the step; 1 where it gave the running sequences a token too, else 0."""
        alone = self.limits.prefill_first
        running, held = (0, 0) if alone else (len(self.started), self.context)
        seconds = self.step(running, held, prefill, pairs, running + ended)
        if self.keep_steps:
            self._keep(running, held, prefill, pairs, running + ended, 1, seconds)
        self.now += seconds
        return 0 if alone else 1

    def _decode_steps(self) -> int:
        """Steps without prompts until something changes: an end, an arrival, or a full cache. Their number."""
        running, context, ends = len(self.started), self.context, self.ends
        while self.started.get(ends[0][1]) != ends[0][2]:  # it was put back since
            heappop(ends)
        number = ends[0][0] - self.index + 1
        if self.limits.kv_tokens < inf:
            number = min(number, int((self.limits.kv_tokens - context - self.computed) // running) + 1)
        if self.coming and number > 1:
            number = min(number, self._steps_until(self.coming[0][0] - self.now, running, context, number))
        middle = context + running * (number - 1) / 2
        seconds = number * self.step(running, middle, 0, 0, running)
        if self.keep_steps:
            self._keep(running, middle, 0, 0, running, number, seconds)
        self.now += seconds
        return number

    def _steps_until(self, gap: float, running: int, context: int, most: int) -> int:
        """The fewest steps that last `gap` seconds together: n one + n (n - 1) growth / 2 >= gap."""
        one = self.step(running, context, 0, 0, running)
        last = self.step(running, context + running * (most - 1), 0, 0, running)
        growth = (last - one) / (most - 1)
        if growth <= 0:
            return max(1, ceil(gap / one))
        half = one / growth - 0.5
        return max(1, ceil(2 * gap / growth / (half + sqrt(half * half + 2 * gap / growth))))

    def _end(self, number: int) -> None:
        """Counts `number` tokens for every running sequence, and lets go of those that have their last."""
        self.index += number
        self.context += len(self.started) * number
        ends = self.ends
        while ends and ends[0][0] < self.index:
            _, request, begun = heappop(ends)
            if self.started.get(request) != begun:
                continue
            del self.started[request]
            self.context -= self.prompts[request] + self.outputs[request]
            self.slowness -= self._slowness_of(request)
            self._done(request)

    def _begin(self, finished: list[int]) -> None:
        """Prompts that were computed: each has one token more, and decodes from the next step on."""
        for request in finished:
            if not self.made[request]:
                self.served.first[request] = self.now
                self.unfirst -= 1
            left = self.outputs[request] - self.made[request] - 1
            if not left:
                self._done(request)
                continue
            self.started[request] = self.index
            heappush(self.ends, (self.index + left - 1, request, self.index))
            self.context += self.prompts[request] + self.made[request] + 1
            self.slowness += self._slowness_of(request)

    def _done(self, request: int) -> None:
        self.served.done[request] = self.now
        if self.unsent < len(self.prompts):
            self.coming.append((self.now + self.pause, self.unsent))
            self.unsent += 1

    def _slowness_of(self, request: int) -> float:
        return 1 / (self.outputs[request] - 1) if self.outputs[request] > 1 else 0.0

    def _keep(self, *values: float) -> None:
        self.served.steps.append((*values, self.unfirst, len(self.started), self.slowness))
