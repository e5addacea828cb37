"""A tape of one step of autograd that counts bytes instead of computing.

A forward pass is recorded as operations on sizes: what each allocates, what it saves for its backward, what its
backward allocates on the way. Replaying the tape backwards gives the peak that torch's caching allocator would
report, because buffers are counted once, freed when the last Python name and the last saved tensor let go of them,
and gradients are summed in place where autograd may. Nothing here knows a model; `activations.py` plays one on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


@dataclass(slots=True, eq=False)
class Buffer:
    """A storage: its bytes and how many names, saved tensors or gradients hold it."""

    size_bytes: int
    holders: int = 1


@dataclass(slots=True, eq=False)
class Value:
    """A tensor: its storage, elements and bytes an element, and the gradient that waits for it."""

    buffer: Buffer
    elements: int
    itemsize: int
    needs_grad: bool = True
    grad: Buffer | None = None

    @property
    def size_bytes(self) -> int:
        return self.elements * self.itemsize


@dataclass(slots=True, eq=False)
class Node:
    outputs: tuple[Value, ...]
    inputs: tuple[Value, ...]
    saved: tuple[Buffer, ...]
    passes_through: bool
    """the gradient of each input is the output's gradient itself (an addition, a view), not a new tensor"""
    in_place: bool
    """the backward writes the inputs' gradients over buffers that it owns: saved tensors or the output's gradient"""
    scratch_bytes: int
    kept_bytes: int
    """bytes that the backward leaves behind: gradients of weights"""
    keeps_output_grad: bool = False
    """the output is written by several operations, so its gradient must serve the others too"""


@dataclass(slots=True)
class Tape:
    """Live bytes now, their peak, and the operations so far."""

    live_bytes: int = 0
    peak_bytes: int = 0
    kept_bytes: int = 0
    cast_bytes: int = 0
    """16-bit copies of fp32 weights, which autocast caches until the forward ends"""
    peak_at_last_save_bytes: int = 0
    """the forward's peak by the time the last tensor was saved: non-reentrant checkpointing recomputes no further"""
    _peak_before_new_bytes: int = 0
    nodes: list[Node] = field(default_factory=list)

    def _grow(self, size_bytes: int) -> None:
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def new(self, elements: int, itemsize: int, *, needs_grad: bool = True) -> Value:
        """Allocate a tensor, held by one name."""
        size = elements * itemsize
        self._peak_before_new_bytes = self.peak_bytes
        self._grow(size)
        return Value(Buffer(size), elements, itemsize, needs_grad)

    def cast_weight(self, elements: int) -> Value:
        """A 16-bit copy of an fp32 weight: cached by autocast, and saved by the product that uses it."""
        self.cast_bytes += 2 * elements
        return self.new(elements, 2, needs_grad=False)

    def hold(self, buffer: Buffer) -> None:
        buffer.holders += 1

    def release(self, buffer: Buffer) -> None:
        buffer.holders -= 1
        if buffer.holders == 0:
            self.live_bytes -= buffer.size_bytes

    def drop(self, *values: Value) -> None:
        """Names that go out of scope."""
        for value in values:
            self.release(value.buffer)

    def scratch(self, size_bytes: int) -> None:
        """Memory taken and given back inside one forward operation."""
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + size_bytes)

    def record(
        self,
        output: Value,
        inputs: Sequence[Value],
        saved: Sequence[Value] = (),
        *,
        passes_through: bool = False,
        in_place: bool = False,
        scratch_bytes: int = 0,
        kept_bytes: int = 0,
    ) -> Value:
        """Append an operation. Its saved tensors stay until its backward has run."""
        tracked = tuple(value for value in inputs if value.needs_grad)
        if not tracked and not kept_bytes:
            output.needs_grad = False
            return output
        buffers = tuple(value.buffer for value in saved)
        for buffer in buffers:
            self.hold(buffer)
        if buffers:  # inputs are saved before the operation allocates its output, outputs after
            saves_output = output.buffer in buffers
            self.peak_at_last_save_bytes = self.peak_bytes if saves_output else self._peak_before_new_bytes
        self.nodes.append(Node((output,), tracked, buffers, passes_through, in_place, scratch_bytes, kept_bytes))
        return output

    def split(self, packed: Value, widths: Sequence[int]) -> tuple[Value, ...]:
        """chunk() or split(): views of one storage, each a name; backward joins their gradients in a new tensor."""
        parts = tuple(Value(packed.buffer, width, packed.itemsize, packed.needs_grad) for width in widths)
        for _ in parts:
            self.hold(packed.buffer)
        if packed.needs_grad:
            self.nodes.append(Node(parts, (packed,), (), False, False, 0, 0))
        return parts

    def backward(self, output: Value) -> None:
        """Replay from the last operation to the first, starting from the gradient of `output`."""
        self._seed(output)
        while self.nodes:
            self._step_back(self.nodes.pop())

    def _seed(self, output: Value) -> None:
        self._grow(output.size_bytes)
        output.grad = Buffer(output.size_bytes)

    def _step_back(self, node: Node) -> None:
        grads = [value.grad for value in node.outputs if value.grad is not None]
        if not grads:  # nothing downstream used it
            for buffer in node.saved:
                self.release(buffer)
            return
        self._grow(node.kept_bytes)
        self.kept_bytes += node.kept_bytes
        self._grow(node.scratch_bytes)
        given: list[Buffer] = []
        for value in node.inputs:
            if node.passes_through:
                self.hold(grads[0])
                given.append(grads[0])
            else:
                if not node.in_place:
                    self._grow(value.size_bytes)
                given.append(Buffer(value.size_bytes))
        self.live_bytes -= node.scratch_bytes
        for buffer in node.saved:
            self.release(buffer)
        if not node.keeps_output_grad:
            for value in node.outputs:
                value.grad = None
            for grad in grads:
                self.release(grad)
        if node.in_place:  # the gradients outlive the buffers they were written over
            self._grow(sum(buffer.size_bytes for buffer in given))
        for value, buffer in zip(node.inputs, given, strict=True):
            self._accumulate(value, buffer)

    def _accumulate(self, value: Value, buffer: Buffer) -> None:
        if value.grad is None:
            value.grad = buffer
            return
        if value.grad.holders == 1:  # ours alone: summed in place
            self.release(buffer)
            return
        if buffer.holders == 1:
            self.release(value.grad)
            value.grad = buffer
            return
        self._grow(value.size_bytes)
        self.release(value.grad)
        self.release(buffer)
        value.grad = Buffer(value.size_bytes)


class StepBytes(NamedTuple):
    """Bytes of one forward and its backward.

    forward_peak: while the forward runs; saved: kept for the backward; backward_peak: with saved tensors and recompute
    kept: gradients of weights that the backward leaves; resaved: what one pass keeps, recomputed or not
    casts: autocast's cached weight copies
    """

    forward_peak: int
    saved: int
    backward_peak: int
    kept: int
    resaved: int
    casts: int


Checkpointing = Literal["none", "reentrant", "non_reentrant"]


def run(play: Callable[[Tape], Value], checkpointing: Checkpointing = "none") -> StepBytes:
    """Play a forward and its backward, in bytes.

    `play` records the forward and returns its output, whose name is the only one it leaves.
    none: the forward's saved tensors wait for the backward.
    reentrant: the whole forward is played again with the output's gradient alive, and its output stays alive too.
    non_reentrant: it is played again when the first saved tensor is asked for, up to the last one that is.
    Source: torch/utils/checkpoint.py.
    """
    tape = Tape()
    output = play(tape)
    forward_peak = tape.peak_bytes
    if checkpointing != "reentrant":
        tape.drop(output)
    saved = tape.live_bytes
    if checkpointing == "none":
        tape.peak_bytes = saved
        tape.backward(output)
        return StepBytes(forward_peak, saved, tape.peak_bytes, tape.kept_bytes, saved, tape.cast_bytes)
    if checkpointing == "reentrant":
        tape.peak_bytes = forward_peak + output.size_bytes
        tape.backward(output)
        return StepBytes(forward_peak, 0, tape.peak_bytes, tape.kept_bytes, saved, tape.cast_bytes)
    tape.live_bytes = tape.peak_bytes = 0  # nothing is recomputed yet
    tape._seed(output)
    while tape.nodes and not tape.nodes[-1].saved:
        tape._step_back(tape.nodes.pop())
    recompute_peak = tape.live_bytes + tape.peak_at_last_save_bytes
    tape.live_bytes += saved
    tape.peak_bytes = max(tape.peak_bytes, recompute_peak, tape.live_bytes)
    while tape.nodes:
        tape._step_back(tape.nodes.pop())
    return StepBytes(forward_peak, 0, tape.peak_bytes, tape.kept_bytes, saved, tape.cast_bytes)
