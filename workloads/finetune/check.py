"""What `planner data check` and the program say of the data before any GPU time is spent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from planner.errors import PlannerError
from workloads.finetune.chat import Chat
from workloads.finetune.config import Strict
from workloads.finetune.data import (
    SHOWN_FAULTS,
    Example,
    Fault,
    File,
    LossOn,
    Task,
    _keys,
    examples,
    is_evaluation,
    read,
)


class Bin(Strict):
    """Conversations of at most so many tokens, and more than the bin before."""

    up_to_tokens: int
    conversations: int


class Lengths(Strict):
    """Tokens of the conversations. learned_tokens: those with a label."""

    tokens: int
    learned_tokens: int
    shortest: int
    median: int
    p95: int
    p99: int
    longest: int
    histogram: tuple[Bin, ...]


class Truncation(Strict):
    """What a maximum length costs.

    lost_tokens, lost_learned_tokens: beyond the maximum; unlearnable: conversations whose answer is gone whole
    fits_99, fits_all: the maximum lengths that would keep 99 % and all of the conversations whole
    padded_share: of a micro batch's positions that hold nothing, one conversation each, were it not packed
    packed_sequences: how many sequences of the maximum the data fill when packed, at best
    """

    max_length: int
    truncated: int
    lost_tokens: int
    lost_learned_tokens: int
    unlearnable: int
    fits_99: int
    fits_all: int
    padded_share: float
    packed_sequences: int


class Report(Strict):
    """A file's check. faults: as text, the first of them; leaked: lines that stand in the evaluation file too."""

    file: str
    sha256: str
    conversations: int
    turns: dict[str, int]
    fault_count: int
    faults: tuple[str, ...]
    duplicates: tuple[tuple[int, int], ...]
    contradictions: tuple[tuple[int, int], ...]
    leaked: tuple[tuple[int, int], ...] = ()
    characters: int
    lengths: Lengths | None = None
    truncation: Truncation | None = None

    @property
    def sound(self) -> bool:
        return self.fault_count == 0


def report_on(
    path: Path,
    *,
    task: Task = "sft",
    chat: Chat | None = None,
    max_length: int | None = None,
    loss_on: LossOn = "completion",
    against: Path | None = None,
) -> Report:
    """The check of a file: tokens where a chat is given, truncation where a maximum is.

    against: the evaluation file, whose lines must not be learned.
    """
    found = read(path, task)
    made: list[Example] = []
    faults = list(found.faults)
    if chat is not None:
        for one in examples(found, chat, task, loss_on):
            (faults if isinstance(one, Fault) else made).append(one)  # type: ignore[arg-type]
        faults.sort(key=lambda fault: fault.line)
    lengths = lengths_of(made) if made else None
    return Report(
        file=str(path),
        sha256=found.sha256,
        conversations=len(found.records),
        turns=dict(found.turns),
        fault_count=len(faults),
        faults=tuple(str(fault) for fault in faults[:SHOWN_FAULTS]),
        duplicates=tuple(found.duplicates),
        contradictions=tuple(found.contradictions),
        leaked=_leaked(found, read(against, task)) if against else (),
        characters=sum(_characters(record, task) for _, record in found.records),
        lengths=lengths,
        truncation=truncation_of(made, max_length) if lengths and max_length else None,
    )


def _characters(record: dict[str, Any], task: Task) -> int:
    lists = [record["messages"]] if task == "sft" else [record[key] for key in ("prompt", "chosen", "rejected")]
    return sum(len(message.get("content") or "") for messages in lists for message in messages)


def _leaked(found: File, evaluation: File) -> tuple[tuple[int, int], ...]:
    return tuple((line, evaluation.keys[key]) for key, line in found.keys.items() if key in evaluation.keys)


def lengths_of(made: Sequence[Example]) -> Lengths:
    """How long conversations are; percentiles by nearest rank, bins by powers of two."""
    sizes = sorted(example.longest for example in made)
    bins: list[Bin] = []
    low, top = 0, 16
    while low < sizes[-1]:
        inside = sum(low < size <= top for size in sizes)
        if inside or bins:
            bins.append(Bin(up_to_tokens=top, conversations=inside))
        low, top = top, top * 2
    return Lengths(
        tokens=sum(_positions(example) for example in made),
        learned_tokens=sum(_learned(example) for example in made),
        shortest=sizes[0],
        median=_rank(sizes, 50),
        p95=_rank(sizes, 95),
        p99=_rank(sizes, 99),
        longest=sizes[-1],
        histogram=tuple(bins),
    )


def _rank(ordered: Sequence[int], percent: int) -> int:
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _positions(example: Example) -> int:
    """Tokens that a model reads for it: of dpo both answers, each after the prompt."""
    return len(example.tokens) + (len(example.prompt) + len(example.rejected) if example.rejected else 0)


def _learned(example: Example) -> int:
    return sum(label >= 0 for label in example.labels) + len(example.rejected)


def truncation_of(made: Sequence[Example], max_length: int) -> Truncation:
    """What keeping the first max_length tokens of each conversation loses."""
    sizes = sorted(example.longest for example in made)
    kept = [min(size, max_length) for size in sizes]
    lost = lost_learned = unlearnable = 0
    for example in made:
        lost += max(0, len(example.tokens) - max_length)
        left = sum(label >= 0 for label in example.labels[:max_length])
        lost_learned += sum(label >= 0 for label in example.labels[max_length:])
        other = max(0, len(example.prompt) + len(example.rejected) - max_length) if example.rejected else 0
        lost += other
        lost_learned += min(other, len(example.rejected))
        unlearnable += left == 0
    return Truncation(
        max_length=max_length,
        truncated=sum(size > max_length for size in sizes),
        lost_tokens=lost,
        lost_learned_tokens=lost_learned,
        unlearnable=unlearnable,
        fits_99=_rank(sizes, 99),
        fits_all=sizes[-1],
        padded_share=round(1 - sum(kept) / (len(kept) * max_length), 4),
        packed_sequences=-(-sum(kept) // max_length),
    )


class Prepared(NamedTuple):
    """What is trained and evaluated on. digest: of both files' bytes and how they were cut; told: for the log."""

    train: list[Example]
    evaluation: list[Example]
    digest: str
    told: dict[str, Any]


def prepare(
    data: Any, *, task: Task, chat: Chat, max_length: int, train: Path, evaluation: Path | None = None
) -> Prepared:
    """The examples of a run after its data section. PlannerError for the first fault, and for nothing to learn.

    data: the `Data` of the configuration; train, evaluation: where its files lie on this machine.
    """
    found = read(train, task)
    made = _all(found, chat, task, data.loss_on)
    if found.duplicates and data.duplicates == "refuse":
        line, first = found.duplicates[0]
        raise PlannerError(
            f"{found.name}:{line}: the same as line {first} ({len(found.duplicates)} such lines): take them out, or set"
            " data.duplicates to warn or drop"
        )
    if data.duplicates == "drop":
        twice = {line for line, _ in found.duplicates}
        made = [example for example in made if example.line not in twice]
    set_aside: list[Example] = []
    digest = found.sha256
    leaked = 0
    if evaluation is not None:
        other = read(evaluation, task)
        set_aside = _all(other, chat, task, data.loss_on)
        digest += other.sha256
        leaked = len(_leaked(found, other))
    elif data.evaluation_share:
        by_line = {line: _keys(record, task)[0] for line, record in found.records}
        set_aside = [e for e in made if is_evaluation(by_line[e.line], data.evaluation_share)]
        made = [e for e in made if not is_evaluation(by_line[e.line], data.evaluation_share)]
        if not set_aside or not made:
            raise PlannerError(
                f"{found.name}: a share of {data.evaluation_share:g} leaves {len(made)} lines to learn and"
                f" {len(set_aside)} to evaluate: give more data, or an evaluation file"
            )
    told = {
        "conversations": len(made),
        "evaluated": len(set_aside),
        "tokens": sum(_positions(example) for example in made),
        "duplicates": len(found.duplicates),
        "contradictions": len(found.contradictions),
        "leaked": leaked,
        **_cut_costs(made, max_length),
    }
    made, set_aside = (_cut(part, found.name, max_length, data.too_long) for part in (made, set_aside))
    if not made:
        raise PlannerError(f"{found.name}: nothing is left to learn at max_length {max_length}: raise it")
    return Prepared(made, set_aside, digest, told)


def _all(found: File, chat: Chat, task: Task, loss_on: LossOn) -> list[Example]:
    faults = list(found.faults)
    made: list[Example] = []
    for one in examples(found, chat, task, loss_on):
        if isinstance(one, Fault):
            faults.append(one)
        else:
            made.append(one)
    if faults:
        first = min(faults, key=lambda fault: fault.line)
        more = f" ({len(faults)} faults in all)" if len(faults) > 1 else ""
        raise PlannerError(f"{first}{more}: correct it, then `planner data check {found.name}`")
    return made


def _cut_costs(made: Iterable[Example], max_length: int) -> dict[str, int]:
    made = list(made)
    if not made:
        return {}
    costs = truncation_of(made, max_length)
    return {"truncated": costs.truncated, "lost_tokens": costs.lost_tokens, "unlearnable": costs.unlearnable}


def _cut(made: Sequence[Example], name: str, max_length: int, too_long: str) -> list[Example]:
    """Examples that fit. What has no token to learn left is gone: it would teach nothing."""
    longer = [example for example in made if example.longest > max_length]
    if longer and too_long == "refuse":
        raise PlannerError(
            f"{name}:{longer[0].line}: {longer[0].longest:,} tokens are beyond max_length {max_length:,}"
            f" ({len(longer)} such lines): raise it, or set data.too_long to truncate or drop"
        )
    kept = []
    for example in made:
        if example.longest > max_length:
            if too_long == "drop":
                continue
            room = max(0, max_length - len(example.prompt))
            example = Example(
                example.line,
                example.tokens[:max_length],
                example.labels[:max_length],
                example.prompt[:max_length],
                example.rejected[:room],
            )
        if any(label >= 0 for label in example.labels):
            kept.append(example)
    return kept
