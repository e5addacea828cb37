"""Every allocation of a traced step: the ledger and its peaks, and from two shallow depths to the whole one.

Knows tensors only as storages with a size, and no library.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal

from planner.model import Frozen

Method = Literal["full", "lora", "qlora", "dora"]
Loss = Literal["hf", "chunked", "none"]
Attention = Literal["flash", "eager", "math"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_torch_single", "sgd"]
Dtype = Literal["bf16", "fp32"]
Moment = Literal["forward", "loss_forward", "loss_backward", "backward", "optimizer_step"]

ALLOCATOR_ROUNDING = 512
"""CUDACachingAllocator.cpp, kMinBlockSize: every block is a multiple of this many bytes."""


class Components(Frozen):
    """Bytes live at one moment, by what they are.

    base: frozen (or fully trained) weights and buffers; adapter: LoRA parameters; gradients: of trainable parameters
    optimizer: its state; weight_casts: bf16 copies of weights that autocast made
    saved: made in the forward pass and alive at its end (what the backward pass needs)
    logits: tensors of tokens x vocabulary; transient: everything else
    """

    base: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    weight_casts: int = 0
    saved: int = 0
    logits: int = 0
    transient: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in COMPONENTS)


COMPONENTS = tuple(Components.model_fields)


class Trace(Frozen):
    """What one steady-state training step allocates.

    peak_bytes: torch.cuda.max_memory_allocated() of the step, up to what the package does not count
    peak_instant, peak_layer, peak_operation: when, in which layer (None outside the stack) and in which ATen operation
    peak: its components; instants: the highest point of each moment of the step; end_of_forward: just before backward()
    trainable_parameters: of the whole depth; depth: layers of the model; layers_traced: the two depths, or the one
    """

    peak_bytes: int
    peak_instant: Moment
    peak_layer: int | None
    peak_operation: str
    peak: Components
    instants: dict[Moment, Components]
    end_of_forward: Components
    parameters: int
    trainable_parameters: int
    depth: int
    layers_traced: tuple[int, ...]
    seconds: float
    versions: dict[str, str]


Segment = tuple[Moment, int | None]
"""A moment and, inside the stack, the layer: -1 is before the first, depth is after the last."""
Peaks = dict[Segment, tuple[Components, str]]


# --------------------------------------------------------------------------------------------- extending to full depth


class Run(Frozen):
    layers: int
    peaks: dict[Segment, tuple[Components, str]]
    end_of_forward: Components
    parameters: int
    trainable_parameters: int


def pattern(signatures: Sequence[object]) -> tuple[int, int]:
    """(irregular layers at the start, period of the rest): the shortest description of the sequence."""
    total = len(signatures)
    for length in range(1, total + 1):  # start + period
        for period in range(1, length + 1):
            start = length - period
            if all(signatures[i] == signatures[i + period] for i in range(start, total - period)):
                return start, period
    return 0, total


def depths_to_trace(signatures: Sequence[object], shapes: Sequence[object]) -> list[int]:
    """Two depths that end like the full one, one period apart, or the full depth alone if that is as shallow.

    signatures: what tells layers apart; shapes: of their weights alone. The shallow stack has two periods of shapes,
    and every kind of layer once: each kind may have rotary tables of its own, alive as long as one layer needs them.
    """
    depth = len(signatures)
    start, period = pattern(signatures)
    shape_start, shape_period = pattern(shapes)
    kinds = 1 + max(signatures.index(signature) for signature in set(signatures))
    shallow = start + (depth - start) % period
    shallow += -(-(max(4, kinds, shape_start + 2 * shape_period) - shallow) // period) * period
    return [shallow, shallow + period] if shallow + period < depth else [depth]


def line_int(values: Sequence[int], depths: Sequence[int], depth: int) -> int:
    if len(values) == 1:
        return values[0]
    slope, rest = divmod(values[1] - values[0], depths[1] - depths[0])
    periods, odd = divmod(depth - depths[0], depths[1] - depths[0])
    if odd:
        raise AssertionError(f"depth {depth} is not a whole number of periods from {depths}")
    return values[0] + periods * (slope * (depths[1] - depths[0]) + rest)


def line(parts: Sequence[Components], depths: Sequence[int], depth: int) -> Components:
    """The straight line through two depths, component by component."""
    return Components(**{name: line_int([getattr(part, name) for part in parts], depths, depth) for name in COMPONENTS})


def extrapolate(runs: Sequence[Run], depth: int) -> Peaks:
    """Peaks of the full depth.

    A segment in the lower half of the shallow stack is matched from the bottom, one in the upper half from the top.
    Bytes in the backward of layer i are linear in i (checkpoints go, gradients come), so the layers between the two
    ends cannot be above both.
    """
    if len(runs) == 1:
        return dict(runs[0].peaks)
    low, high = runs
    peaks: Peaks = {}
    for segment, (components, operation) in low.peaks.items():
        moment, layer = segment
        above = layer is not None and layer >= low.layers / 2
        there = (moment, layer + high.layers - low.layers) if above and layer is not None else segment
        target = (moment, layer + depth - low.layers) if above and layer is not None else segment
        pair = [components, high.peaks[there][0]]
        peaks[target] = (line(pair, [low.layers, high.layers], depth), operation)
    return peaks


def by_moment(peaks: Peaks) -> dict[Moment, Components]:
    best: dict[Moment, Components] = {}
    for (moment, _), (components, _) in peaks.items():
        if moment not in best or components.total > best[moment].total:
            best[moment] = components
    return best


# --------------------------------------------------------------------------------------------- recording and replaying


class Storage:
    """One allocation: its size, what made it, and the label it ends up with."""

    __slots__ = ("label", "nbytes", "operation", "segment", "shape")

    def __init__(
        self, nbytes: int, label: str, operation: str, segment: Segment | None, shape: tuple[int, ...]
    ) -> None:
        self.nbytes = nbytes
        self.label = label
        self.operation = operation
        self.segment = segment
        self.shape = shape


class Ledger:
    """Allocations and frees in order; peaks are found afterwards, when the fate of every storage is known."""

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self.events: list[int] = []  # storage + 1 when allocated, -(storage + 1) when freed
        self.marks: list[tuple[int, Segment]] = []  # (events so far, segment that begins here)
        self.backward_at = 0
        self.live: dict[int, int] = {}  # address of the storage -> its number
        self._watch: dict[int, object] = {}

    def begin(self, segment: Segment) -> None:
        if segment == ("loss_backward", None):
            self.backward_at = len(self.events)
        self.marks.append((len(self.events), segment))

    def allocate(self, tensor: Any, label: str, operation: str = "") -> None:
        """Note the tensor's storage, unless it is known or empty."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        nbytes = storage.nbytes()
        if address in self.live or nbytes == 0:
            return
        number = self._record(nbytes, label, operation, tuple(tensor.shape))
        self.live[address] = number
        self._watch[number] = weakref.ref(storage, lambda _: self._free(address, number))

    def passing(self, nbytes: int, operation: str) -> None:
        """A workspace that a kernel allocates and frees inside one operation."""
        if nbytes:
            self.events.append(-(self._record(nbytes, "", operation, ()) + 1))

    def relabel(self, tensor: Any, label: str) -> None:
        number = self.live.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self.storages[number].label = label

    def label(self, tensor: Any) -> str | None:
        number = self.live.get(tensor.untyped_storage()._cdata)
        return None if number is None else self.storages[number].label

    def _record(self, nbytes: int, label: str, operation: str, shape: tuple[int, ...]) -> int:
        rounded = -(-nbytes // ALLOCATOR_ROUNDING) * ALLOCATOR_ROUNDING
        segment = self.marks[-1][1] if self.marks else None
        self.storages.append(Storage(rounded, label, operation, segment, shape))
        self.events.append(len(self.storages))
        return len(self.storages) - 1

    def _free(self, address: int, number: int) -> None:
        del self.live[address], self._watch[number]
        self.events.append(-(number + 1))

    def replay(self) -> tuple[Peaks, Components]:
        """The highest point of every segment, and what is alive when backward() is called."""
        self._label_saved()
        now = dict.fromkeys(COMPONENTS, 0)
        total = 0
        peaks: dict[Segment, tuple[int, dict[str, int], str]] = {}
        end_of_forward: dict[str, int] = {}
        marks = iter([*self.marks, (len(self.events) + 1, None)])
        upcoming, following = next(marks)
        segment: Segment | None = None
        for index, event in enumerate(self.events):
            while index >= upcoming:
                segment = following
                if segment is not None and (segment not in peaks or total > peaks[segment][0]):
                    peaks[segment] = (total, dict(now), "")
                upcoming, following = next(marks)
            if index == self.backward_at:
                end_of_forward = dict(now)
            storage = self.storages[abs(event) - 1]
            size = storage.nbytes if event > 0 else -storage.nbytes
            now[storage.label] += size
            total += size
            if segment is not None and total > peaks[segment][0]:
                peaks[segment] = (total, dict(now), storage.operation)
        for _, following in self.marks:  # a segment that allocated nothing begins and ends at this level
            peaks.setdefault(following, (total, dict(now), ""))
        return (
            {key: (Components(**parts), operation) for key, (_, parts, operation) in peaks.items()},
            Components(**end_of_forward),
        )

    def _label_saved(self) -> None:
        """Storages without a label: `saved` if they were alive when backward() began, else `transient`."""
        alive: set[int] = set()
        for event in self.events[: self.backward_at]:
            (alive.add if event > 0 else alive.discard)(abs(event) - 1)
        for number, storage in enumerate(self.storages):
            if not storage.label:
                storage.label = "saved" if number in alive else "transient"
