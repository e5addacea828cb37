"""The words of a budget page that a finance person may not know, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Sequence

from planner.pages.blocks import Block, Bullets, Section, Subheading, Table, Text
from planner.pages.svg import Figure

# word to look for (a regular expression), the word as printed, what it means
GLOSSARY: tuple[tuple[str, str, str], ...] = (
    (r"adapters?", "adapter", "the small file of changes that fine-tuning adds to a model"),
    (r"break-even", "break-even", "the hours of use in a month from which one way to buy costs less than another"),
    (r"buffer", "buffer", "what is requested above the expected cost, for what nobody can foresee"),
    (r"checkpoints?", "checkpoint", "a saved state of a training run, from which it goes on after an interruption"),
    (r"clusters?", "cluster", "the group of machines that runs the work, managed by Azure Kubernetes Service"),
    (r"(?:container )?registry", "container registry", "the store of the programs that the cluster runs"),
    (r"contexts?", "context", "how much text a model handles at once, counted in tokens"),
    (r"control plane", "control plane", "the part of a cluster that Azure runs to steer the machines"),
    (r"digest", "digest", "a short number computed from data: if the data changes, so does the number"),
    (r"evict\w+", "eviction", "Azure takes a spot machine back; the work goes on later, on another machine"),
    (r"fine-tun\w+", "fine-tuning", "further training of an existing model on one's own examples"),
    (r"gb-months?", "GB-month", "one gigabyte kept for one month"),
    (r"gib", "GiB", "a unit of memory: 1,073,741,824 bytes, about a gigabyte"),
    (r"gpus?", "GPU", "the processor that runs a language model, and the dearest part of a machine"),
    (r"inference|serv(?:e|es|ing|ers?)", "inference, serving", "running a finished model so that it answers"),
    (r"list prices?", "list price", "what Azure publishes, before tax and before any discount of a contract"),
    (
        r"n[cdv]\d+\w*|d\d+\w*_v\d",
        "NC..., NV..., ND..., D...",
        "Azure's names for sizes of machines; the first three have GPUs",
    ),
    (r"nodes?", "node", "one machine of a cluster"),
    (r"on[- ]demand", "on demand", "paid by the hour, without a promise on either side"),
    (r"private endpoints?", "private endpoint", "a connection to a service that does not cross the public internet"),
    (r"qlora|lora", "LoRA, QLoRA", "ways to fine-tune with little memory: only a small addition is trained"),
    (r"replicas?", "replica", "one of several equal copies that work at the same time"),
    (r"reserved|reservations?", "reserved, reservation", "a machine paid for one or three years, used or not"),
    (r"savings plans?", "savings plan", "a promise to spend so much an hour for one or three years, used or not"),
    (r"spot", "spot", "spare machines at a low, changing price, which Azure may take back at any time"),
    (r"tokens?", "token", "a piece of text, in English about three quarters of a word"),
    (r"unpriced", "unpriced", "no price is known; the cost is not 0, and the total leaves it out"),
    (r"vcpus?|vcpu-\w+", "vCPU", "one processor of a machine, as Azure counts them"),
    (r"weights", "weights", "the numbers that make up a trained model, stored as files"),
)


def words_of(title: str, subject: str, opening: Sequence[Block], sections: Sequence[Section]) -> str:
    parts = [title, subject, *(section.heading for section in sections)]
    for block in (*opening, *(block for section in sections for block in section.blocks)):
        if isinstance(block, Table):
            parts += [column.heading for column in block.columns]
            parts += [cell.text for row in block.rows for cell in row.cells]
        elif isinstance(block, Text | Subheading):
            parts.append(block.text)
        elif isinstance(block, Bullets):
            parts += block.entries
        elif isinstance(block, Figure):
            parts.append(block.caption)
    return " ".join(parts)


def glossary(text: str) -> tuple[tuple[str, str], ...]:
    """The words of the glossary that occur in a text, and what they mean, in alphabetical order."""
    plain = text.lower()
    found = [(word, meaning) for pattern, word, meaning in GLOSSARY if re.search(rf"(?<!\w)(?:{pattern})(?!\w)", plain)]
    return tuple(sorted(found, key=lambda entry: entry[0].lower()))
