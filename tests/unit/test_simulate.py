"""Continuous batching by events, beside a second simulation that takes every step and every token by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.performance.simulate import Limits, Served, simulate


def one_second(decode: float, context: float, prefill: float, pairs: float, sampled: float) -> float:
    return 1.0


def by_work(decode: float, context: float, prefill: float, pairs: float, sampled: float) -> float:
    """Linear in the context, as steps that only decode are; no two sums of it meet an arrival by accident."""
    return 0.0101 + 1.3e-4 * decode + 1.9e-4 * context + 2.9e-5 * prefill + 1.1e-8 * pairs + 3.1e-5 * sampled


# ---------------------------------------------------------------------------------------- a slow simulation, by token


@dataclass
class Sequence1:
    number: int
    prompt: int
    output: int
    generated: int = 0
    computed: int = 0  # tokens whose keys and values the cache holds
    cached: int = 0
    decodes: bool = False  # its prompt, and what it had before it was put back, are computed

    @property
    def known(self) -> int:
        return self.prompt + self.generated


@dataclass
class Slow:
    """Each step of vLLM's scheduler on its own: nothing is summed up, taken together or remembered."""

    limits: Limits
    arrivals: list[float]
    waiting: list[Sequence1] = field(default_factory=list)
    running: list[Sequence1] = field(default_factory=list)

    def run(self, sequences: Sequence[Sequence1]) -> Served:
        served = Served([0.0] * len(sequences), [0.0] * len(sequences), [0.0] * len(sequences))
        now, coming = 0.0, list(zip(self.arrivals, sequences, strict=True))
        while coming or self.waiting or self.running:
            while coming and coming[0][0] <= now:
                moment, sequence = coming.pop(0)
                served.sent[sequence.number] = moment
                self.waiting.append(sequence)
            if not self.waiting and not self.running:
                now = coming[0][0]
                continue
            chunks, evicted = self.schedule()
            served.preemptions += evicted
            decoding = [s for s in self.running if s.decodes]
            if self.limits.prefill_first and chunks:
                decoding = []
            if not decoding and not chunks:
                continue
            pairs = sum(size * (start + size / 2) for _, start, size in chunks)
            prefill = sum(size for _, _, size in chunks)
            ended = [s for s, start, size in chunks if start + size == s.known]
            context = sum(s.known for s in decoding)
            now += by_work(len(decoding), context, prefill, pairs, len(decoding) + len(ended))
            for sequence, start, size in chunks:
                sequence.computed = start + size
            for sequence in decoding:
                sequence.computed += 1
            for sequence in (*decoding, *ended):
                sequence.generated += 1
                sequence.decodes = True
                if sequence.generated == 1:
                    served.first[sequence.number] = now
                if sequence.generated == sequence.output:
                    served.done[sequence.number] = now
                    self.running.remove(sequence)
        served.seconds = now
        return served

    def schedule(self) -> tuple[list[tuple[Sequence1, int, int]], int]:
        """(sequence, first token, tokens) of the prompts of this step, and how many were put back for it."""
        evicted = 0
        while sum(s.known if s.decodes else s.computed for s in self.running) > self.limits.kv_tokens:
            self.put_back(self.running[-1])
            evicted += 1
        chunks: list[tuple[Sequence1, int, int]] = []
        if evicted:
            return chunks, evicted
        decoding = sum(s.decodes for s in self.running)
        room = self.limits.max_num_batched_tokens - (0 if self.limits.prefill_first else decoding)
        held = sum(s.known if s.decodes else s.computed for s in self.running)
        while room > 0:
            chunked = {id(s) for s, _, _ in chunks}
            under_way = [s for s in self.running if not s.decodes and id(s) not in chunked]
            if under_way:
                sequence = under_way[0]
            elif self.waiting and len(self.running) < self.limits.max_num_seqs:
                sequence = self.waiting[0]
                if self.running and held + sequence.known + len(self.running) + 1 > self.limits.kv_tokens:
                    break
                self.running.append(self.waiting.pop(0))
                if not sequence.generated:
                    sequence.computed = min(sequence.cached, sequence.prompt - 1)
                    held += sequence.computed
            else:
                break
            size = min(room, sequence.known - sequence.computed)
            if held + size > self.limits.kv_tokens:
                self.put_back(sequence)
                return chunks, evicted + 1
            chunks.append((sequence, sequence.computed, size))
            room, held = room - size, held + size
            if sequence.computed + size < sequence.known:
                break
        return chunks, evicted

    def put_back(self, sequence: Sequence1) -> None:
        self.running.remove(sequence)
        sequence.computed, sequence.decodes = 0, False
        self.waiting.insert(0, sequence)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[float], Limits]:
    count = draw(st.integers(1, 14))
    prompts = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    outputs = draw(st.lists(st.integers(1, 16), min_size=count, max_size=count))
    cached = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    gaps = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    arrivals = [0.00037 * (number + 1) + 0.01237 * sum(gaps[: number + 1]) for number in range(count)]
    longest = max(p + o for p, o in zip(prompts, outputs, strict=True))
    budget = draw(st.one_of(st.integers(2, 6), st.integers(7, 60)))  # vLLM wants max_num_seqs within it
    limits = Limits(
        max_num_seqs=draw(st.integers(1, min(6, budget))),
        max_num_batched_tokens=budget,
        kv_tokens=draw(st.one_of(st.just(inf), st.integers(longest, 2 * longest + 8))),
        prefill_first=draw(st.booleans()),
    )
    return prompts, outputs, cached, arrivals, limits


@given(case=cases())
@settings(max_examples=300, deadline=None)
def test_events_give_what_every_single_step_gives(
    case: tuple[list[int], list[int], list[int], list[float], Limits],
) -> None:
    prompts, outputs, cached, arrivals, limits = case
    quick = simulate(by_work, prompts, outputs, limits, arrivals=arrivals, cached=cached)
    sequences = [Sequence1(i, p, o, cached=c) for i, (p, o, c) in enumerate(zip(prompts, outputs, cached, strict=True))]
    slow = Slow(limits, arrivals).run(sequences)
    assert quick.sent == slow.sent
    assert quick.first == pytest.approx(slow.first, rel=1e-9)
    assert quick.done == pytest.approx(slow.done, rel=1e-9)
    assert quick.seconds == pytest.approx(slow.seconds, rel=1e-9)
    assert quick.preemptions == slow.preemptions


# ------------------------------------------------------------------------------------------------- worked by hand


def test_a_prompt_longer_than_the_budget_takes_several_steps_and_then_a_token_comes_with_each() -> None:
    # 10 prompt tokens in steps of 4, 4, 2: the first token at 3 s; four more steps for the other four tokens
    served = simulate(one_second, [10], [5], Limits(8, 4))
    assert (served.first, served.done) == ([3.0], [7.0])


def test_a_decoding_sequence_leaves_the_rest_of_the_budget_to_the_next_prompt() -> None:
    # step 1: prompt 0 (3 tokens) and 1 of prompt 1; step 2: a token of 0 and 3 of prompt 1; step 3: 0 ends, 1 has all 5
    served = simulate(one_second, [3, 5], [3, 1], Limits(8, 4))
    assert (served.first, served.done) == ([1.0, 3.0], [3.0, 3.0])


def test_prompts_go_first_where_a_step_does_not_mix_them_with_decoding() -> None:
    # vLLM: 0 has its tokens after steps 1 and 2. Prompts first: steps 1 to 3 are the prompts', and 0 ends in step 4
    mixed = simulate(one_second, [4, 8], [2, 1], Limits(8, 4))
    first = simulate(one_second, [4, 8], [2, 1], Limits(8, 4, prefill_first=True))
    assert (mixed.done[0], first.done[0]) == (2.0, 4.0)
    assert (mixed.first[1], first.first[1]) == (4.0, 3.0)  # 3, 3 and 2 tokens beside 0 and alone; or 4 and 4 at once


def test_no_more_sequences_run_than_max_num_seqs() -> None:
    # two at a time, three steps each (prompt, token, token): the third starts when both are done
    served = simulate(one_second, [1, 1, 1], [3, 3, 3], Limits(2, 100))
    assert served.first == [1.0, 1.0, 4.0]


def test_a_full_cache_puts_the_newest_back_and_computes_it_again() -> None:
    # 24 tokens of cache. Step 1 takes both prompts (8 + 8); then they hold 9 + 9, 10 + 10, 11 + 11, 12 + 12 in steps
    # 2 to 5, and 26 would not fit: in step 6 the second is put back with 5 tokens made, and the first decodes alone
    # until its 12th token in step 12. The second's 13 tokens are computed in step 13, which gives its 6th; the other
    # six come in steps 14 to 19.
    served = simulate(one_second, [8, 8], [12, 12], Limits(8, 100, kv_tokens=24))
    assert served.preemptions == 1
    assert served.first == [1.0, 1.0]
    assert served.done == [12.0, 19.0]


def test_tokens_of_the_prefix_cache_are_not_computed_but_the_last_always_is() -> None:
    served = simulate(one_second, [10, 10], [1, 1], Limits(1, 4), cached=[6, 10])
    assert served.first == [1.0, 2.0]  # 4 tokens, then 1
    steps = simulate(one_second, [10, 10], [1, 1], Limits(1, 4), cached=[6, 10], keep_steps=True).steps
    assert [step[2] for step in steps] == [4, 1]
    assert [step[3] for step in steps] == [4 * (6 + 2), 1 * (9 + 0.5)]  # pairs: p (done + p / 2)


def test_a_request_is_taken_at_the_step_that_begins_after_it_was_sent() -> None:
    served = simulate(one_second, [1, 1], [10, 1], Limits(8, 100), arrivals=[0.0, 3.5])
    assert served.first == [1.0, 5.0]
    assert served.sent == [0.0, 3.5]


def test_the_engine_sleeps_until_the_first_request_comes() -> None:
    served = simulate(one_second, [1], [1], Limits(8, 100), arrivals=[100.25])
    assert served.first == [101.25]


def test_a_client_sends_its_next_request_when_the_last_has_ended_and_the_pause_is_over() -> None:
    served = simulate(one_second, [1, 1, 1], [2, 2, 2], Limits(8, 100), concurrency=1)
    assert served.sent == [0.0, 2.0, 4.0]
    paused = simulate(one_second, [1, 1, 1], [2, 2, 2], Limits(8, 100), concurrency=1, pause=0.5)
    assert paused.sent == [0.0, 2.5, 5.0]


# ---------------------------------------------------------------------------------------------------- conservation


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_every_token_is_computed_once_where_nothing_is_put_back(
    case: tuple[list[int], list[int], list[int], list[float], Limits],
) -> None:
    prompts, outputs, _, arrivals, limits = case
    served = simulate(by_work, prompts, outputs, limits, arrivals=arrivals, keep_steps=True)
    if served.preemptions:
        return
    assert sum(step[2] for step in served.steps) == sum(prompts)
    assert sum(step[0] * step[5] for step in served.steps) == sum(outputs) - len(outputs)
    # a prompt's pairs are its triangle, however it is cut into steps
    assert sum(step[3] for step in served.steps) == pytest.approx(sum(p * p / 2 for p in prompts))


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_time_goes_forward_and_nobody_waits_for_less_than_a_step(
    case: tuple[list[int], list[int], list[int], list[float], Limits],
) -> None:
    prompts, outputs, cached, arrivals, limits = case
    served = simulate(by_work, prompts, outputs, limits, arrivals=arrivals, cached=cached)
    for sent, first, done, output in zip(served.sent, served.first, served.done, outputs, strict=True):
        assert first >= sent + 0.0101
        assert done >= first + 0.0101 * (output - 1) * (1 - 1e-12)
    assert max(served.done) == pytest.approx(served.seconds)


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_littles_law_holds_for_the_sequences_that_decode(
    case: tuple[list[int], list[int], list[int], list[float], Limits],
) -> None:
    prompts, outputs, _, arrivals, limits = case
    served = simulate(by_work, prompts, outputs, limits, arrivals=arrivals, keep_steps=True)
    if served.preemptions:
        return
    in_steps = sum(step[6] * step[8] for step in served.steps)  # seconds of a group x sequences that decode
    by_request = sum(done - first for first, done in zip(served.first, served.done, strict=True))
    assert in_steps == pytest.approx(by_request)


@given(case=cases(), clients=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_closed_loop_never_has_more_requests_under_way_than_clients(
    case: tuple[list[int], list[int], list[int], list[float], Limits], clients: int
) -> None:
    prompts, outputs, _, _, limits = case
    served = simulate(by_work, prompts, outputs, limits, concurrency=clients)
    moments = sorted([(t, 1) for t in served.sent] + [(t, -1) for t in served.done])  # at one moment ends come first
    under_way = 0
    for _, change in moments:
        under_way += change
        assert under_way <= clients


def test_the_same_run_gives_the_same_figures() -> None:
    lengths = [(17 * i % 90 + 1, 13 * i % 40 + 1) for i in range(200)]
    prompts, outputs = [p for p, _ in lengths], [o for _, o in lengths]
    runs = [simulate(by_work, prompts, outputs, Limits(8, 64, 400), concurrency=20, keep_steps=True) for _ in range(2)]
    assert runs[0] == runs[1]


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_request_longer_than_the_cache_is_refused_with_both_figures() -> None:
    with pytest.raises(PlannerError, match=r"a request of 1,100 tokens is longer than the KV cache of 1,000 tokens"):
        simulate(one_second, [1000], [100], Limits(8, 100, kv_tokens=1000))


@pytest.mark.parametrize(("prompt", "output"), [(0, 1), (1, 0), (-3, 1)])
def test_a_request_without_a_prompt_or_an_answer_is_refused(prompt: int, output: int) -> None:
    with pytest.raises(PlannerError, match="at least 1 token"):
        simulate(one_second, [prompt], [output], Limits(8, 100))
