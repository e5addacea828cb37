"""The final norm, the output head and the loss on the byte tape, as each trainer computes them."""

from __future__ import annotations

from collections.abc import Callable

from planner.catalog.trainers import LossHead, constant
from planner.memory.activations import HeadShape, LayerShape, StepSettings
from planner.memory.layer_tape import Player
from planner.memory.tape import Tape, Value


def play_head(head: HeadShape, step: StepSettings, loss: LossHead) -> Callable[[Tape], Value]:
    """The final norm, the head and the loss for `tape.run`; the output is the scalar loss."""
    layer = _headless(head)

    def play(tape: Tape) -> Value:
        player = Player(tape, layer, step)
        x = tape.new(step.tokens * head.hidden, step.residual_itemsize)
        hidden = player.norm(x)
        tape.drop(x)
        loss_value = tape.new(1, 4)
        if loss == "none":
            wide, _ = player.cast(hidden, 4)
            tape.drop(hidden)
            tape.record(loss_value, [wide])
            if wide is not hidden:
                tape.drop(wide)
            return loss_value
        if loss == "chunked":
            return _chunked_head(player, head, hidden, loss_value)
        if loss == "liger":
            return _liger_head(player, head, hidden, loss_value)
        return _full_head(player, head, hidden, loss_value, loss)

    return play


def _headless(head: HeadShape) -> LayerShape:
    """A layer of no width beside the hidden one: what the final norm and the head need of a LayerShape."""
    widths = dict.fromkeys(
        ("heads", "q", "kv", "v", "attention_out", "ffn", "experts_per_token", "expert_ffn", "expert_count"), 0
    )
    return LayerShape(
        hidden=head.hidden,
        norm=head.norm,
        window=None,
        fused_qkv=False,
        qk_norm=False,
        post_norms=False,
        copies_attention=False,
        parallel=False,
        gated=False,
        fused_gate_up=False,
        shared_ffn=0,
        mla=None,
        modules={},
        **widths,
    )


def _chunked_head(player: Player, head: HeadShape, hidden: Value, loss: Value) -> Value:
    """TRL: hidden[mask] is a copy; forward and backward each take one tile; gradients are summed in fp32.

    Source: trl/kernels/chunked_logprob.py (TOKEN_CHUNK_SIZE 4096), trl/trainer/utils.py (chunk size 32768).
    """
    tape, step = player.tape, player.step
    compact = tape.new(hidden.elements, hidden.itemsize)
    tape.record(compact, [hidden])
    tape.drop(hidden)
    tiles = constant("trl_tile")
    rows = min(step.tokens, int(tiles["tokens"]))
    columns = min(int(tiles["vocab"]), head.vocab)
    tile = 2 * rows * int(tiles["vocab"])
    chunk = 2 * rows * head.hidden if hidden.itemsize == 4 else 0
    tape.scratch(tile + chunk + 7 * 4 * step.tokens)
    weight_scratch = kept = 0
    if step.trains_head:
        weight_scratch = 4 * head.vocab * head.hidden
        kept = step.grad_itemsize * head.vocab * head.hidden
        if step.grad_itemsize == 4:  # the fp32 sum is handed over as it is
            weight_scratch = 0
    weight_tile = 2 * columns * head.hidden if step.weight_itemsize == 4 else 0
    scratch = 4 * hidden.elements * (hidden.itemsize == 2) + tile + chunk + weight_tile + weight_scratch
    tape.record(loss, [compact], [compact], scratch_bytes=scratch, kept_bytes=kept)
    tape.drop(compact)
    return loss


def _liger_head(player: Player, head: HeadShape, hidden: Value, loss: Value) -> Value:
    """Liger: gradients are made in the forward, chunk by chunk; a chunk is about hidden/vocab of the tokens.

    chunk = next_power_of_2(ceil(tokens / ceil(vocab / hidden))). Source: liger_kernel fused_linear_cross_entropy.py.
    """
    tape, step = player.tape, player.step
    parts = -(-head.vocab // head.hidden)
    chunk = 1 << (max(1, -(-step.tokens // parts)) - 1).bit_length()
    chunk = min(chunk, step.tokens)
    grad = tape.new(hidden.elements, hidden.itemsize)
    if step.trains_head:
        weight_grad = tape.new(head.vocab * head.hidden, step.weight_itemsize, needs_grad=False)
        tape.scratch(2 * chunk * head.vocab * 2 + head.vocab * head.hidden * step.weight_itemsize)
        tape.record(loss, [hidden], [grad, weight_grad], kept_bytes=weight_grad.size_bytes)
        tape.drop(weight_grad)
    else:
        tape.scratch(2 * chunk * head.vocab * 2)
        tape.record(loss, [hidden], [grad])
    tape.drop(grad, hidden)
    return loss


def _full_head(player: Player, head: HeadShape, hidden: Value, loss: Value, kind: LossHead) -> Value:
    """Heads that materialise tokens x vocab logits."""
    tape, step = player.tape, player.step
    cells = step.tokens * head.vocab
    logits = player.linear(hidden, head.hidden, head.vocab, "lm_head", trained=step.trains_head)
    tape.drop(hidden)
    if head.softcap:  # logits / cap, tanh (saved), * cap
        for keep in (False, True, False):
            capped = tape.new(cells, logits.itemsize)
            tape.record(capped, [logits], [capped] if keep else [], scratch_bytes=capped.size_bytes * keep)
            tape.drop(logits)
            logits = capped
    extra = tape.new(cells, 2, needs_grad=False) if step.kernels.keeps_logits else None
    if kind == "hf_shifted":
        wide, fresh = player.cast(logits, 4)
        if fresh:
            tape.drop(logits)
        logits = wide
    if kind == "hf_outputs":
        outputs = tape.new(cells, 4, needs_grad=False)
        shifted = tape.new(cells, logits.itemsize)
        tape.record(shifted, [logits])
        wide, _ = player.cast(shifted, 4)
        probabilities = tape.new(cells, 4)
        tape.record(probabilities, [wide], [probabilities, outputs, logits, shifted])
        tape.drop(wide, outputs, logits, shifted)
        tape.record(loss, [probabilities])
        tape.drop(probabilities)
    elif kind in ("hf_shifted", "hf_16bit", "in_place"):
        upcast = kind == "in_place" and step.kernels.upcasts_logits
        wide, fresh = player.cast(logits, 4) if upcast else (logits, False)
        if fresh:
            tape.drop(logits)
            logits = wide
        copies = tape.new(cells * step.kernels.logit_copies, logits.itemsize, needs_grad=False)
        shifted = tape.new(cells, logits.itemsize)
        tape.record(shifted, [logits])
        if kind == "in_place":
            tape.record(loss, [shifted], [shifted], in_place=True)
            tape.drop(shifted, logits)
        else:
            probabilities = tape.new(cells, shifted.itemsize)
            tape.record(probabilities, [shifted], [probabilities])
            tape.record(loss, [probabilities])
            tape.drop(probabilities, shifted, logits)
        tape.drop(copies)
    elif kind == "logit_chunks":
        probabilities = tape.new(cells, logits.itemsize)
        tape.record(probabilities, [logits], [probabilities])
        tape.record(loss, [probabilities])
        tape.drop(probabilities, logits)
    else:  # hf
        wide, fresh = player.cast(logits, 4)
        probabilities = tape.new(cells, 4)
        tape.record(probabilities, [wide], [probabilities])
        if fresh:
            tape.drop(wide)
        tape.record(loss, [probabilities])
        tape.drop(probabilities, logits)
    if extra is not None:
        tape.drop(extra)
    return loss
