"""What a feature of the engine buys on this server: speed ratios for a lone request and at saturation."""

from __future__ import annotations

from collections.abc import Mapping

from planner.errors import PlannerError
from planner.memory.weights import lora_slot_bytes
from planner.model import Frozen
from planner.performance.load import ALONE, check_lengths, requests_of
from planner.performance.queueing import first_token, open_chain
from planner.performance.replica import Adapters, Asked, Decoder, Replica
from planner.performance.server import Server
from planner.performance.traffic import Traffic


class Feature(Frozen):
    """What a feature does to speed; above 1 is faster.

    setting: how it was set; alone: seconds of a lone request without it / with it; saturated: requests a second at
    saturation with it / without it
    """

    name: str
    setting: str
    alone: float
    saturated: float
    note: str


def what_it_buys(
    server: Server,
    traffic: Traffic,
    *,
    hit_rate: float = 0.5,
    acceptance: float = 0.7,
    draft_tokens: int = 3,
    draft: Server | None = None,
    adapters: int = 8,
    lora_rank: int = 16,
    formats: Mapping[str, Server] | None = None,
) -> tuple[Feature, ...]:
    """Prefix caching, speculative decoding, LoRA adapters in one batch and other weight formats, each beside `server`.

    draft: the server of the model that drafts, on the same card; None for n-gram look-up, which costs nothing
    formats: by name, servers of the same model on the same GPUs with other weights (FP8, AWQ).
    The cache that a draft model or adapters take is what the server's own settings reserve for them.
    Raises PlannerError for a share outside 0 to 1, no draft tokens and no adapters.
    """
    check_lengths(server, traffic)
    if _share("prefix hit rate", hit_rate) == 1:
        raise PlannerError("the prefix hit rate 1 leaves no prompt to compute: give less")
    asked = requests_of(server, traffic)
    plain = Replica(_decoder(server), asked)
    cached = Replica(_decoder(server), Asked(asked.prompts, asked.outputs, hit=hit_rate))
    guessed = Asked(asked.prompts, asked.outputs, asked.hit, gain=tokens_per_step(acceptance, draft_tokens))
    speculating = Replica(speculator(server, draft_tokens, draft), guessed)
    adapted = Replica(with_adapters(server, adapters, lora_rank), asked)
    found = [
        _feature("prefix caching", f"{hit_rate:.0%} of the prompt tokens found", plain, cached, _CACHING),
        _feature(
            "speculative decoding",
            f"{draft_tokens} drafted tokens by {draft.spec.name if draft is not None else 'n-gram look-up'},"
            f" {acceptance:.0%} accepted",
            plain,
            speculating,
            _SPECULATION,
        ),
        _feature("LoRA adapters", f"{adapters} of rank {lora_rank} in one batch", plain, adapted, _ADAPTERS),
    ]
    for name, other in (formats or {}).items():
        replica = Replica(_decoder(other), requests_of(other, traffic))
        found.append(_feature(f"{name} weights", f"in place of {server.speed.kernel}", plain, replica, _FORMAT))
    return tuple(found)


_CACHING = "Saves prefill, so it helps long prompts and a loaded server; decoding is as it was."
_SPECULATION = (
    "Drafted tokens ride on the reading of the weights; once the matmuls take longer, they cost as others do."
)
_ADAPTERS = "Bytes and operations of the adapters; the launches of their kernels come on top."
_FORMAT = "Fewer bytes help while reading the weights takes longest; at saturation it is the matmul kernel that counts."


def tokens_per_step(acceptance: float, draft_tokens: int) -> float:
    """Expected tokens of a sequence in a step: (1 - a^(k + 1)) / (1 - a) (Leviathan et al. 2023, equation 1)."""
    if draft_tokens < 1:
        raise PlannerError(f"{draft_tokens} draft tokens are no speculation: draft at least 1")
    if _share("acceptance", acceptance) == 1:
        return draft_tokens + 1.0
    gained: float = (1 - acceptance ** (draft_tokens + 1)) / (1 - acceptance)
    return gained


def speculation_by_batch(
    server: Server,
    sequences: int,
    *,
    context: float,
    acceptance: float,
    draft_tokens: int,
    draft: Server | None = None,
) -> float:
    """How many times faster `sequences` sequences of `context` tokens decode with speculation: gain * t / t with it."""
    if sequences < 1:
        raise PlannerError(f"{sequences} sequences decode nothing: ask for at least 1")
    held = sequences * context
    plain = _decoder(server).seconds(sequences, held, 0.0, 0.0, sequences)
    drafted = speculator(server, draft_tokens, draft).seconds(sequences, held, 0.0, 0.0, sequences)
    return float(tokens_per_step(acceptance, draft_tokens) * plain / drafted)


def speculator(server: Server, draft_tokens: int, draft: Server | None) -> Decoder:
    """The server that verifies k + 1 tokens of each sequence in a step, after k steps of the model that drafts them."""
    model = (draft.work, draft.speeds) if draft is not None else None
    return Decoder(server.work, server.speeds, server.limits, extra=draft_tokens, draft=model)


def with_adapters(server: Server, adapters: int, rank: int) -> Decoder:
    """The server with that many adapters on its linear layers, which requests choose among evenly.

    Bytes of one: 2 rank (inputs + outputs) over the layers of a GPU; operations for a token: as many.
    """
    if adapters < 1:
        raise PlannerError(f"{adapters} adapters change nothing: ask for at least 1")
    each = lora_slot_bytes(server.spec, rank=rank, slots=1, tp=server.settings.tensor_parallel_size)
    experts = server.spec.experts
    visited = each if experts is None else each * experts.per_token / experts.count
    return Decoder(
        server.work, server.speeds, server.limits, adapters=Adapters(adapters, bytes_each=each, flops=visited)
    )


def _decoder(server: Server) -> Decoder:
    return Decoder(server.work, server.speeds, server.limits)


def _feature(name: str, setting: str, plain: Replica, other: Replica, note: str) -> Feature:
    return Feature(
        name=name,
        setting=setting,
        alone=_alone(plain) / _alone(other),
        saturated=other.saturation / plain.saturation,
        note=note,
    )


def _alone(replica: Replica) -> float:
    """Seconds of a request that meets no other, inside the engine."""
    rate = replica.saturation * ALONE
    chain = open_chain(replica, rate)
    values, weights = first_token(replica, rate, chain)
    return float((values * weights).sum()) + replica.asked.steps * chain.step_seconds


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise PlannerError(f"the {name} {value:g} is not a share: give 0 to 1")
    return value
