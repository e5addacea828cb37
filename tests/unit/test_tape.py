"""The byte tape: small forwards whose every byte can be followed by hand, and what holds for any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.memory.tape import Buffer, Node, StepBytes, Tape, Value, run

# ------------------------------------------------------------------------------------------------- linear chains


def one_product(tape: Tape) -> Value:
    """y = f(x): 10 bytes in, 20 out, and the backward needs x."""
    x = tape.new(10, 1)
    y = tape.new(20, 1)
    tape.record(y, [x], [x])
    tape.drop(x)
    return y


def test_a_saved_input_waits_for_the_backward() -> None:
    # forward: x 10 + y 20. Backward: x 10, the gradients of y 20 and of x 10.
    assert run(one_product) == StepBytes(forward_peak=30, saved=10, backward_peak=40, kept=0, resaved=10, casts=0)


def test_an_input_that_is_not_saved_goes_with_its_name() -> None:
    def play(tape: Tape) -> Value:
        x = tape.new(10, 1)
        y = tape.new(20, 1)
        tape.record(y, [x])
        tape.drop(x)
        return y

    # backward: the gradients of y 20 and x 10, nothing else
    assert run(play) == StepBytes(30, 0, 30, 0, 0, 0)


def three_products(tape: Tape) -> Value:
    """x 10 -> h 20 (saves x) -> y 30 (saves h) -> z 40 (saves nothing)."""
    x = tape.new(10, 1)
    h = tape.new(20, 1)
    tape.record(h, [x], [x])
    tape.drop(x)
    y = tape.new(30, 1)
    tape.record(y, [h], [h])
    tape.drop(h)
    z = tape.new(40, 1)
    tape.record(z, [y])
    tape.drop(y)
    return z


def test_a_chain_frees_each_saved_tensor_as_the_backward_passes_it() -> None:
    # forward: all four at once, 10 + 20 + 30 + 40. Kept for the backward: x and h, 30.
    # backward: 30 + dz 40 = 70; dy: + 30 = 100; dz goes: 60; dh: + 20 = 80; h, dy go: 30; dx: + 10 = 40.
    assert run(three_products) == StepBytes(100, 30, 100, 0, 30, 0)


def test_the_scratch_of_a_forward_operation_counts_in_its_peak_only() -> None:
    def play(tape: Tape) -> Value:
        x = tape.new(10, 1)
        tape.scratch(100)
        y = tape.new(5, 1)
        tape.record(y, [x])
        tape.drop(x)
        return y

    assert run(play) == StepBytes(forward_peak=110, saved=0, backward_peak=15, kept=0, resaved=0, casts=0)


def test_scratch_and_the_gradient_of_a_weight_join_in_the_backward() -> None:
    def play(tape: Tape) -> Value:
        x = tape.new(10, 1)
        y = tape.new(10, 1)
        tape.record(y, [x], [x], scratch_bytes=50, kept_bytes=100)
        tape.drop(x)
        return y

    # x 10 + dy 10 + dw 100 + scratch 50 + dx 10 = 180; the weight's gradient is what is left, with dx
    assert run(play) == StepBytes(20, 10, 180, 100, 10, 0)


def test_items_of_two_and_four_bytes_are_counted_as_such() -> None:
    tape = Tape()
    wide = tape.new(8, 4)
    assert (wide.size_bytes, tape.live_bytes) == (32, 32)
    assert tape.new(8, 2).size_bytes == 16


def test_casts_of_weights_are_counted_apart_and_saved_by_their_product() -> None:
    def play(tape: Tape) -> Value:
        x = tape.new(10, 2, needs_grad=False)
        copy = tape.cast_weight(100)  # 200 bytes
        y = tape.new(5, 2)
        tape.record(y, [x], [x, copy], kept_bytes=400)
        tape.drop(x, copy)
        return y

    # x 20 and the copy 200 wait; backward: dy 10 and the fp32 gradient 400
    assert run(play) == StepBytes(230, 220, 630, 400, 220, 200)


# ---------------------------------------------------------------------------------------------- sums of gradients


def residual(tape: Tape) -> Value:
    """out = x + f(x), 10 bytes each; f saves nothing."""
    x = tape.new(10, 1)
    a = tape.new(10, 1)
    tape.record(a, [x])
    out = tape.new(10, 1)
    tape.record(out, [x, a], passes_through=True)
    tape.drop(x, a)
    return out


def test_an_addition_hands_its_gradient_on_without_a_copy() -> None:
    # d(out) 10 is d(a) and the first part of d(x); f's backward adds 10, summed in place
    assert run(residual) == StepBytes(30, 0, 20, 0, 0, 0)


def test_a_residual_stream_of_many_layers_needs_two_gradients_only() -> None:
    def play(tape: Tape) -> Value:
        x = tape.new(10, 1)
        for _ in range(7):
            a = tape.new(10, 1)
            tape.record(a, [x])
            out = tape.new(10, 1)
            tape.record(out, [x, a], passes_through=True)
            tape.drop(x, a)
            x = out
        return x

    assert run(play).backward_peak == 20


def test_gradients_that_others_still_need_are_summed_in_a_new_tensor() -> None:
    def play(tape: Tape) -> Value:
        x = tape.new(10, 1)
        a, b = tape.new(10, 1), tape.new(10, 1)
        tape.record(a, [x])
        tape.record(b, [x])
        left, right = tape.new(10, 1), tape.new(10, 1)
        tape.record(left, [x, a], passes_through=True)
        tape.record(right, [x, b], passes_through=True)
        tape.drop(x, a, b)
        out = tape.new(10, 1)
        tape.record(out, [left, right], passes_through=True)
        tape.drop(left, right)
        return out

    # one gradient G serves left, right, a, b and x at first. x gets it twice: the sum is a new tensor (20), for a and
    # b still wait for G. The backward of b adds 10 to it (30), in place (20); then that of a (30).
    assert run(play).backward_peak == 30


def test_two_uses_of_one_tensor_sum_in_place() -> None:
    def play(tape: Tape) -> Value:
        x = tape.new(10, 1)
        a, b = tape.new(4, 1), tape.new(6, 1)
        tape.record(a, [x])
        tape.record(b, [x])
        tape.drop(x)
        out = tape.new(1, 1)
        tape.record(out, [a, b])
        tape.drop(a, b)
        return out

    # dout 1 + da 4 + db 6 = 11; dout goes, 10; dx of b 10: 20, b goes: 14; dx of a 10 more: 24
    assert run(play).backward_peak == 24


# ------------------------------------------------------------------------------------- in place, views, dead ends


def test_an_in_place_backward_writes_over_what_it_saved() -> None:
    def play(tape: Tape) -> Value:
        gate, up = tape.new(10, 1), tape.new(10, 1)
        product = tape.new(10, 1)
        tape.record(product, [gate, up], [gate, up], in_place=True)
        tape.drop(gate, up)
        return product

    # saved 20 + dproduct 10 = 30; the two gradients lie where gate and up lay: no more than that
    assert run(play) == StepBytes(30, 20, 30, 0, 20, 0)


def test_the_same_product_out_of_place_needs_its_gradients_beside() -> None:
    def play(tape: Tape) -> Value:
        gate, up = tape.new(10, 1), tape.new(10, 1)
        product = tape.new(10, 1)
        tape.record(product, [gate, up], [gate, up])
        tape.drop(gate, up)
        return product

    assert run(play).backward_peak == 50  # 30 + dgate 10 + dup 10


def test_views_share_one_storage_and_their_gradients_are_joined_anew() -> None:
    def play(tape: Tape) -> Value:
        packed = tape.new(30, 1)
        parts = tape.split(packed, (10, 10, 10))
        tape.drop(packed)
        out = tape.new(10, 1)
        tape.record(out, parts, parts)
        tape.drop(*parts)
        return out

    # forward: packed 30 + out 10. Backward: packed 30 + dout 10 + 3 x 10 = 70; saved and dout go: 30; joined: 60
    assert run(play) == StepBytes(40, 30, 70, 0, 30, 0)


def test_a_view_alone_keeps_the_whole_storage_alive() -> None:
    tape = Tape()
    packed = tape.new(30, 1)
    left, right = tape.split(packed, (20, 10))
    tape.drop(packed, left)
    assert tape.live_bytes == 30
    tape.drop(right)
    assert tape.live_bytes == 0


def test_a_branch_that_nothing_uses_frees_what_it_saved() -> None:
    tape = Tape()
    x = tape.new(10, 1)
    dead = tape.new(20, 1)
    tape.record(dead, [x], [x, dead])
    out = tape.new(5, 1)
    tape.record(out, [x])
    tape.drop(x, dead, out)
    assert tape.live_bytes == 30  # saved for a backward that will not come
    tape.backward(out)
    assert tape.live_bytes == 10  # dx


def test_an_operation_on_frozen_tensors_saves_nothing() -> None:
    tape = Tape()
    x = tape.new(10, 1, needs_grad=False)
    y = tape.new(10, 1)
    tape.record(y, [x], [x])
    assert not y.needs_grad
    assert tape.nodes == []
    tape.drop(x)
    assert tape.live_bytes == 10


def test_a_frozen_input_with_a_trained_weight_is_saved_but_gets_no_gradient() -> None:
    tape = Tape()
    x = tape.new(10, 1, needs_grad=False)
    y = tape.new(20, 1)
    tape.record(y, [x], [x], kept_bytes=7)
    tape.drop(x, y)
    tape.backward(y)
    assert tape.live_bytes == tape.kept_bytes == 7
    assert x.grad is None


def test_an_output_written_by_several_operations_keeps_its_gradient_for_all() -> None:
    tape = Tape()
    total = tape.new(10, 1)
    parts = [tape.new(10, 1) for _ in range(3)]
    for part in parts:
        tape.nodes.append(Node((total,), (part,), (), False, False, 0, 0, keeps_output_grad=True))
    tape.drop(total, *parts)
    tape.backward(total)
    assert all(part.grad is not None for part in parts)
    assert tape.live_bytes == 40  # three gradients, and the one they were made from


# -------------------------------------------------------------------------------------------------- checkpointing


def test_reentrant_checkpointing_recomputes_all_with_the_output_alive() -> None:
    # saved nothing. Recompute beside dz 40: 100 + 40 = 140. Its backward starts at x 10 + h 20 + z 40 + dz 40 = 110,
    # makes dy 30: 140, and so on downwards: 140 is the peak.
    assert run(three_products, "reentrant") == StepBytes(100, 0, 140, 0, 70, 0)


def test_non_reentrant_checkpointing_recomputes_up_to_the_last_saved_tensor() -> None:
    # dz 40, dy 30: 70; dz goes, 30. Recompute as far as h, the last that is saved: x 10 + h 20 beside dy: 60.
    # dh: 80; h and dy go: 30; dx: 40.
    assert run(three_products, "non_reentrant") == StepBytes(100, 0, 80, 0, 30, 0)


def test_a_saved_output_is_recomputed_too() -> None:
    def play(tape: Tape) -> Value:
        x = tape.new(10, 1)
        y = tape.new(20, 1)
        tape.record(y, [x], [y])  # a softmax: its backward needs what it answered
        tape.drop(x)
        return y

    # recompute: x 10 + y 20 beside dy 20 = 50; then y 20 + dy 20 + dx 10 = 50
    assert run(play, "non_reentrant") == StepBytes(30, 0, 50, 0, 20, 0)


def test_a_long_forward_scratch_after_the_last_save_is_not_recomputed() -> None:
    def play(tape: Tape) -> Value:
        x = tape.new(10, 1)
        y = tape.new(10, 1)
        tape.record(y, [x], [x])
        tape.drop(x)
        tape.scratch(1000)
        return y

    assert run(play).forward_peak == 1020
    assert run(play, "non_reentrant").backward_peak == 30  # x, dy, dx
    assert run(play, "reentrant").backward_peak == 1030  # the whole forward again, beside dy


# --------------------------------------------------------------------------------------------------- any tape


class Operation(NamedTuple):
    kind: str
    inputs: tuple[int, ...]
    elements: int
    saves_inputs: bool
    saves_output: bool
    scratch_bytes: int
    kept_bytes: int


class Drawn(NamedTuple):
    leaves: tuple[tuple[int, bool], ...]
    operations: tuple[Operation, ...]


@st.composite
def drawn_tapes(draw: st.DrawFn) -> Drawn:
    size = st.integers(1, 40)
    leaves = draw(st.lists(st.tuples(size, st.booleans()), min_size=1, max_size=3))
    sizes = [elements for elements, _ in leaves]
    operations = []
    for _ in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(("plain", "plain", "passes_through", "in_place", "split")))
        first = draw(st.integers(0, len(sizes) - 1))
        if kind == "passes_through":  # an addition: equal sizes
            alike = [i for i, s in enumerate(sizes) if s == sizes[first]]
            inputs = (first, draw(st.sampled_from(alike)))
            elements = sizes[first]
        else:
            inputs = (first, *draw(st.lists(st.integers(0, len(sizes) - 1), max_size=2)))
            elements = draw(size)
        if len(set(inputs)) < len(inputs):
            inputs = tuple(dict.fromkeys(inputs))
        if kind == "split" and sizes[first] < 2:
            kind = "plain"
        if kind == "split":
            left = draw(st.integers(1, sizes[first] - 1))
            operations.append(Operation("split", (first,), left, False, False, 0, 0))
            sizes += [left, sizes[first] - left]
            continue
        operations.append(
            Operation(
                kind,
                inputs,
                elements,
                draw(st.booleans()),
                draw(st.booleans()),
                draw(st.integers(0, 30)),
                draw(st.sampled_from((0, 0, 5, 50))),
            )
        )
        sizes.append(elements)
    return Drawn(tuple(leaves), tuple(operations))


def player(drawn: Drawn, leaves: list[Value] | None = None) -> Callable[[Tape], Value]:
    """A forward that plays the operations and drops every name but the last."""

    def play(tape: Tape) -> Value:
        values = [tape.new(elements, 1, needs_grad=needs) for elements, needs in drawn.leaves]
        if leaves is not None:
            leaves[:] = values
        for operation in drawn.operations:
            inputs = [values[i] for i in operation.inputs]
            if operation.kind == "split":
                (packed,) = inputs
                values += tape.split(packed, (operation.elements, packed.elements - operation.elements))
                continue
            output = tape.new(operation.elements, 1)
            saved = [*(inputs if operation.saves_inputs else ()), *([output] if operation.saves_output else ())]
            tape.record(
                output,
                inputs,
                saved,
                passes_through=operation.kind == "passes_through",
                in_place=operation.kind == "in_place",
                scratch_bytes=operation.scratch_bytes,
                kept_bytes=operation.kept_bytes,
            )
            values.append(output)
        tape.drop(*values[:-1])
        return values[-1]

    return play


@settings(max_examples=60)
@given(drawn_tapes())
def test_after_any_backward_only_kept_gradients_and_those_of_leaves_are_alive(drawn: Drawn) -> None:
    tape = Tape()
    leaves: list[Value] = []
    output = player(drawn, leaves)(tape)
    tape.drop(output)
    tape.backward(output)
    waiting: dict[int, Buffer] = {}
    for value in (*leaves, output):
        if value.grad is not None:
            waiting[id(value.grad)] = value.grad
    assert tape.live_bytes == tape.kept_bytes + sum(buffer.size_bytes for buffer in waiting.values())
    assert tape.nodes == []


@settings(max_examples=60)
@given(drawn_tapes())
def test_the_peak_is_never_below_what_is_alive(drawn: Drawn) -> None:
    tape = Tape()
    output = player(drawn)(tape)
    assert tape.peak_bytes >= tape.live_bytes >= output.size_bytes
    tape.drop(output)
    tape._seed(output)
    while tape.nodes:
        tape._step_back(tape.nodes.pop())
        assert tape.peak_bytes >= tape.live_bytes >= 0


@settings(max_examples=60)
@given(drawn_tapes())
def test_a_forward_s_peak_covers_what_it_keeps_and_the_backward_starts_from_it(drawn: Drawn) -> None:
    step = run(player(drawn))
    assert step.forward_peak >= step.saved >= 0
    assert step.backward_peak >= step.saved


@settings(max_examples=60)
@given(drawn_tapes())
def test_checkpointing_keeps_nothing_and_makes_the_same_weight_gradients(drawn: Drawn) -> None:
    plain, reentrant, lazy = (run(player(drawn), kind) for kind in ("none", "reentrant", "non_reentrant"))
    assert plain.kept == reentrant.kept == lazy.kept
    assert (reentrant.saved, lazy.saved) == (0, 0)
    assert plain.saved == plain.resaved == lazy.resaved
    assert plain.forward_peak == reentrant.forward_peak == lazy.forward_peak
    assert reentrant.backward_peak >= plain.backward_peak  # its output stays alive, and it recomputes all


@settings(max_examples=60)
@given(drawn_tapes(), st.integers(1, 1000))
def test_a_tape_played_k_times_as_wide_takes_k_times_the_bytes(drawn: Drawn, factor: int) -> None:
    wide = Drawn(
        tuple((elements * factor, needs) for elements, needs in drawn.leaves),
        tuple(
            o._replace(
                elements=o.elements * factor,
                scratch_bytes=o.scratch_bytes * factor,
                kept_bytes=o.kept_bytes * factor,
            )
            for o in drawn.operations
        ),
    )
    for kind in ("none", "reentrant", "non_reentrant"):
        assert run(player(wide), kind) == tuple(factor * size for size in run(player(drawn), kind))


@pytest.mark.parametrize("kind", ["none", "reentrant", "non_reentrant"])
def test_a_run_leaves_no_state_behind(kind: str) -> None:
    assert run(three_products, kind) == run(three_products, kind)  # type: ignore[arg-type]
