"""A decoder layer's forward and backward on the byte tape.

Each method mirrors the order of operations, casts and Python names of the reference implementation (transformers'
Llama family, peft's LoRA layer, bitsandbytes' 4-bit matmul), so that the peak is derived rather than fitted.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.catalog.trainers import constant
from planner.memory.activations import LayerShape, Norm, StepSettings
from planner.memory.tape import Buffer, Node, Tape, Value


class Player:
    """Plays the operations of one model on one tape; every method mirrors one line or module of the reference."""

    def __init__(self, tape: Tape, shape: LayerShape, step: StepSettings) -> None:
        self.tape = tape
        self.shape = shape
        self.step = step
        self.tokens = step.tokens

    def cast(self, x: Value, itemsize: int) -> tuple[Value, bool]:
        """x.to(dtype): x itself when it has that width already."""
        if x.itemsize == itemsize:
            return x, False
        y = self.tape.new(x.elements, itemsize, needs_grad=x.needs_grad)
        self.tape.record(y, [x])
        return y, True

    def norm(self, x: Value, *, style: Norm | None = None) -> Value:
        tape, style = self.tape, style or self.shape.norm
        trained = self.step.trains_weights
        out_itemsize = 4 if trained and self.step.weight_itemsize == 4 else x.itemsize
        if style == "layer":
            # under autocast layer_norm runs and answers in fp32; it saves its input and two numbers a row
            wide, fresh = self.cast(x, 4) if self.step.autocast else (x, False)
            y = tape.new(x.elements, wide.itemsize)
            tape.record(y, [wide], [wide])
            if fresh:
                tape.drop(wide)
            return y
        if self.step.kernels.norm:
            y = tape.new(x.elements, x.itemsize)
            return tape.record(y, [x], [x])
        wide, fresh = self.cast(x, 4)
        # x.pow(2).mean(): the square is a temporary forward; backward expands the mean's gradient and makes
        # grad * (2 * x.pow(1)), each step a tensor of its own until the expression ends
        tape.scratch(4 * x.elements)
        mean = tape.new(max(1, x.elements // max(1, self.shape.hidden)), 4)
        tape.record(mean, [wide], [wide], scratch_bytes=3 * 4 * x.elements)
        normed = tape.new(x.elements, 4)
        tape.record(normed, [wide, mean], [wide, mean], scratch_bytes=4 * x.elements)
        tape.drop(mean)
        if fresh:
            tape.drop(wide)
        if style == "gemma":
            scaled = tape.new(x.elements, 4)
            tape.record(scaled, [normed], [normed] if trained else [], scratch_bytes=4 * x.elements * trained)
            tape.drop(normed)
            y, fresh = self.cast(scaled, x.itemsize)
            if fresh:
                tape.drop(scaled)
            return y
        narrow, fresh = self.cast(normed, x.itemsize)
        y = tape.new(x.elements, out_itemsize)
        tape.record(y, [narrow], [narrow] if trained else [], scratch_bytes=x.size_bytes * trained)
        tape.drop(normed)
        if fresh:
            tape.drop(narrow)
        return y

    def linear(
        self, x: Value, n_in: int, n_out: int, name: str, *, rows: int = 0, trained: bool | None = None
    ) -> Value:
        """nn.Linear, its 4-bit stand-in, and peft's LoRA layer around either."""
        tape, step = self.tape, self.step
        rows = rows or self.tokens
        trained = step.trains_weights if trained is None else trained
        lora = self.shape.modules.get(name) in step.lora_targets
        weights = n_in * n_out
        quantized = step.quantized and name != "lm_head" and not name.startswith("experts.")
        source, fresh = self.cast(x, 2) if (step.autocast or quantized) else (x, False)
        width = step.head_itemsize if name == "lm_head" else step.weight_itemsize
        y = tape.new(rows * n_out, 2 if step.autocast or quantized else max(x.itemsize, width if trained else 2))
        scratch = 0
        if quantized:  # the whole weight in 16 bits, and its scales
            scratch = 2 * weights
            if rows > int(constant("bnb_fused_rows")["value"]):
                tape.scratch(2 * weights + weights // 8)
        saved = [source] if trained else []
        copy = None
        if step.autocast and width == 4 and not quantized:
            # the product saves a 16-bit copy of the weight; autocast caches it only where the weight is trained
            copy = tape.cast_weight(weights) if trained else tape.new(weights, 2, needs_grad=False)
            scratch += 2 * weights if trained else 0  # the 16-bit gradient before it is cast to the master's width
            saved.append(copy)
        routed = self.shape.expert_count if name.startswith("experts.") else 1
        if routed > 1 and step.lora_experts:
            # peft adapts experts stored as one parameter by making W + B A anew, which the product saves
            tape.scratch(2 * 2 * weights * routed)
            copy = tape.new(weights * routed, 2, needs_grad=False)
            scratch += 2 * weights * routed
            saved += [source, copy]
        kept = weights * routed * step.grad_itemsize if trained else 0
        tape.record(y, [source], saved, scratch_bytes=scratch, kept_bytes=kept)
        if copy is not None:
            tape.drop(copy)
        if fresh:
            tape.drop(source)
        if quantized:  # Linear4bit answers in its input's width, and peft clones the answer before it adds to it
            y = self._as(y, x.itemsize)
            if lora:
                clone = tape.new(y.elements, y.itemsize)
                y = self._replace(y, tape.record(clone, [y]))
        return self.adapter(x, y, n_in, n_out, rows) if lora else y

    def adapter(self, x: Value, y: Value, n_in: int, n_out: int, rows: int) -> Value:
        """result + lora_B(lora_A(dropout(x.to(A.dtype)))) * scaling, then back to the result's width."""
        tape, step = self.tape, self.step
        if step.kernels.lora:  # one fused kernel: saves x alone, adds in place
            narrow = tape.new(rows * step.lora_rank, 2)
            tape.record(y, [x], [x, narrow], passes_through=False)
            tape.drop(narrow)
            return y
        width = 2 if step.autocast else step.lora_itemsize
        # on a 4-bit base peft leaves the cast to autocast, elsewhere it widens the input to the adapter first
        shares_input = step.autocast and step.quantized and not step.kernels.widens_adapter_input
        asked = x.itemsize if shares_input else step.lora_itemsize
        wide, wide_fresh = self.cast(x, asked)
        source = wide
        dropped = None
        if step.lora_dropout:
            mask = tape.new(wide.elements, 1, needs_grad=False)
            dropped = tape.new(wide.elements, wide.itemsize)
            tape.record(dropped, [wide], [mask])
            tape.drop(mask)
            source = dropped
        narrow, fresh = self.cast(source, width)
        if dropped is not None:
            tape.drop(dropped)
        copies = step.autocast and step.lora_itemsize == 4
        a = self._adapter_product(narrow, n_in, rows * step.lora_rank, width, copies)
        if fresh:
            tape.drop(narrow)
        b = self._adapter_product(a, n_out, rows * n_out, width, copies)
        tape.drop(a)
        if step.dora:
            return self._dora(x, y, b, rows, n_in, n_out, wide if wide_fresh else None)
        scaled = tape.new(rows * n_out, width)
        tape.record(scaled, [b])
        tape.drop(b)
        out = self.add(y, scaled)
        tape.drop(y, scaled)
        narrowed, fresh = self.cast(out, y.itemsize)
        if fresh:
            tape.drop(out)
        if wide_fresh:
            tape.drop(wide)
        return narrowed

    def _adapter_product(self, x: Value, outer: int, elements: int, width: int, copies: bool) -> Value:
        """x times lora_A or lora_B (rank x outer), whose fp32 weight autocast copies to 16 bits."""
        tape = self.tape
        copy = tape.cast_weight(self.step.lora_rank * outer) if copies else None
        y = tape.new(elements, width)
        tape.record(y, [x], [x] if copy is None else [x, copy])
        if copy is not None:
            tape.drop(copy)
        return y

    def _dora(self, x: Value, y: Value, b: Value, rows: int, n_in: int, n_out: int, wide: Value | None) -> Value:
        """y + (m - 1) * y + m * b * scaling, in the magnitude's width: its gradient needs y and b.

        The norm of W + B A is made anew at each call from lora_B(lora_A(eye(in))). Source: peft tuners/lora/dora.py.
        """
        tape, width = self.tape, self.step.lora_itemsize
        tape.scratch((width + 2 * self.step.autocast) * n_in * n_in + 2 * n_in * n_out)
        base = tape.new(rows * n_out, max(y.itemsize, width))
        tape.record(base, [y], [y], scratch_bytes=base.size_bytes)
        magnified = tape.new(rows * n_out, max(b.itemsize, width))
        tape.record(magnified, [b], [b], scratch_bytes=magnified.size_bytes)
        tape.drop(b)
        scaled = tape.new(rows * n_out, magnified.itemsize)
        tape.record(scaled, [magnified])
        tape.drop(magnified)
        delta = self.add(base, scaled)
        tape.drop(base, scaled)
        out = self.add(y, delta)
        tape.drop(y, delta)
        narrowed, fresh = self.cast(out, y.itemsize)
        if fresh:
            tape.drop(out)
        if wide is not None:
            tape.drop(wide)
        return narrowed

    def add(self, left: Value, right: Value) -> Value:
        itemsize = max(left.itemsize, right.itemsize)
        out = self.tape.new(left.elements, itemsize)
        same = left.itemsize == right.itemsize
        return self.tape.record(out, [left, right], passes_through=same)

    def rope(self, x: Value) -> Value:
        """x * cos + rotate_half(x) * sin; cos and sin need no gradient, so nothing is saved."""
        if self.step.kernels.rope:
            return x
        self.tape.scratch(2 * x.size_bytes)
        y = self.tape.new(x.elements, x.itemsize)
        self.tape.record(y, [x], scratch_bytes=2 * x.size_bytes)
        self.tape.drop(x)
        return y

    def attention(self, x: Value) -> Value:
        tape, shape, tokens = self.tape, self.shape, self.tokens
        if shape.mla is not None:
            q, k, v = self._latent(x)
        elif shape.fused_qkv:
            width = shape.q + shape.kv + shape.v
            packed = self.linear(x, shape.hidden, width, "qkv")
            q, k, v = tape.split(packed, (tokens * shape.q, tokens * shape.kv, tokens * shape.v))
            tape.drop(packed)
            q, k = self.rope(q), self.rope(k)
        else:
            q = self.linear(x, shape.hidden, shape.q, "q")
            if shape.qk_norm:
                q = self._replace(q, self.norm(q))
            k = self.linear(x, shape.hidden, shape.kv, "k")
            if shape.qk_norm:
                k = self._replace(k, self.norm(k))
            v = self.linear(x, shape.hidden, shape.v, "v")
            q, k = self.rope(q), self.rope(k)
        return self._attend(q, k, v)

    def _as(self, value: Value, itemsize: int) -> Value:
        """value = value.to(dtype): the old name goes."""
        other, fresh = self.cast(value, itemsize)
        return self._replace(value, other) if fresh else value

    def _replace(self, old: Value, new: Value) -> Value:
        self.tape.drop(old)
        return new

    def _latent(self, x: Value) -> tuple[Value, Value, Value]:
        """DeepSeek's attention in training: latent projections, their norms, then full heads."""
        tape, shape, tokens = self.tape, self.shape, self.tokens
        assert shape.mla is not None
        q_rank, kv_rank, rope_dim, _ = shape.mla
        if q_rank:
            qa = self.linear(x, shape.hidden, q_rank, "q_a")
            qn = self._replace(qa, self.norm(qa))
            q = self._replace(qn, self.linear(qn, q_rank, shape.q, "q_b"))
        else:
            q = self.linear(x, shape.hidden, shape.q, "q")
        kv_a = self.linear(x, shape.hidden, kv_rank + rope_dim, "kv_a")
        kn = self._replace(kv_a, self.norm(kv_a))
        nope = shape.q - shape.heads * rope_dim
        kv = self._replace(kn, self.linear(kn, kv_rank, nope + shape.attention_out, "kv_b"))
        q = self.rope(q)
        k = tape.new(tokens * shape.q, kv.itemsize)  # cat of the nope part and the broadcast rope part
        tape.record(k, [kv])
        v = tape.new(tokens * shape.attention_out, kv.itemsize)
        tape.record(v, [kv])
        tape.drop(kv)
        return q, k, v

    def _attend(self, q: Value, k: Value, v: Value) -> Value:
        tape, shape, step, tokens = self.tape, self.shape, self.step, self.tokens
        if q.itemsize == 4:  # flash kernels take 16 bits; under autocast sdpa casts
            q, k, v = (self._as(t, 2) for t in (q, k, v))
        expand = step.kernels.repeat_kv or step.attention == "eager"
        if expand and shape.kv < shape.q:
            wide_k, wide_v = tape.new(tokens * shape.q, k.itemsize), tape.new(tokens * shape.attention_out, v.itemsize)
            tape.record(wide_k, [k])
            tape.record(wide_v, [v])
            tape.drop(k, v)
            k, v = wide_k, wide_v
        if step.attention == "eager":
            out = self._eager(q, k, v)
        else:
            out = tape.new(tokens * shape.attention_out, q.itemsize)
            lse = tape.new(tokens * shape.heads, 4, needs_grad=False)
            # FlashAttention 2's backward: dq in fp32, a row sum, and dk, dv for every query head where heads share them
            scratch = 4 * q.elements + 4 * lse.elements + (4 * q.elements if shape.kv < shape.q else 0)
            tape.record(out, [q, k, v], [q, k, v, out, lse], scratch_bytes=scratch)
            tape.drop(lse)
        if shape.copies_attention:
            packed = tape.new(out.elements, out.itemsize)
            tape.record(packed, [out])
            out = self._replace(out, packed)
        y = self.linear(out, shape.attention_out, shape.hidden, "o")
        tape.drop(q, k, v, out)
        return y

    def _eager(self, q: Value, k: Value, v: Value) -> Value:
        """softmax(q k^T * scale + mask) v with every S x S matrix in memory."""
        tape, shape, step = self.tape, self.shape, self.step
        cells = step.tokens * step.seq_len * shape.heads
        scores = tape.new(cells, 2)
        tape.record(scores, [q, k], [q, k])
        scaled = tape.new(cells, 2)
        tape.record(scaled, [scores])
        tape.drop(scores)
        masked = tape.new(cells, 2)
        tape.record(masked, [scaled], passes_through=True)
        tape.drop(scaled)
        probabilities = tape.new(cells, 4)
        tape.record(probabilities, [masked], [probabilities])
        tape.drop(masked)
        narrow, _ = self.cast(probabilities, 2)
        tape.drop(probabilities)
        out = tape.new(step.tokens * shape.attention_out, 2)
        tape.record(out, [narrow, v], [narrow, v])
        tape.drop(narrow)
        return out

    def feed_forward(self, x: Value) -> Value:
        shape = self.shape
        if shape.experts_per_token:
            return self._experts(x)
        return self._mlp(x, shape.ffn, self.tokens, ("gate", "up", "down"))

    def _mlp(self, x: Value, ffn: int, rows: int, names: tuple[str, str, str]) -> Value:
        tape, shape, hidden = self.tape, self.shape, self.shape.hidden
        if not shape.gated:
            wide = self.linear(x, hidden, ffn, names[1], rows=rows)
            act = tape.new(rows * ffn, wide.itemsize)
            tape.record(act, [wide], [wide])
            tape.drop(wide)
            down = self.linear(act, ffn, hidden, names[2], rows=rows)
            tape.drop(act)
            return down
        up: Value | None = None
        held: tuple[Value, ...]
        if names[0] == "experts.gate_up" or (shape.fused_gate_up and names[0] == "gate"):
            fused = "gate_up" if names[0] == "gate" else names[0]
            packed = self.linear(x, hidden, 2 * ffn, fused, rows=rows)
            gate, up = tape.split(packed, (rows * ffn, rows * ffn))
            tape.drop(packed)
            held = (gate, up)
        else:
            gate = self.linear(x, hidden, ffn, names[0], rows=rows)
            held = (gate,)
        if self.step.kernels.swiglu:
            if up is None:
                up = self.linear(x, hidden, ffn, names[1], rows=rows)
                held = (gate, up)
            product = tape.new(rows * ffn, gate.itemsize)
            tape.record(product, [gate, up], [gate, up], in_place=True)
        else:
            act = tape.new(rows * ffn, gate.itemsize)
            tape.record(act, [gate], [gate])
            if up is None:
                tape.drop(*held)
                up = self.linear(x, hidden, ffn, names[1], rows=rows)
                held = (up,)
            product = tape.new(rows * ffn, gate.itemsize)
            tape.record(product, [act, up], [act, up])
            tape.drop(act)
        tape.drop(*held)
        down = self.linear(product, ffn, hidden, names[2], rows=rows)
        tape.drop(product)
        return down

    def _experts(self, x: Value) -> Value:
        """Routed experts: each token's row is copied once for every expert it visits."""
        tape, shape = self.tape, self.shape
        rows = self.tokens * shape.experts_per_token
        router = tape.new(self.tokens * shape.expert_count, 4)
        tape.record(router, [x], [router])
        if self.step.kernels.expert_loop:
            return self._expert_loop(x, router, rows)
        gathered = tape.new(rows * shape.hidden, 2)
        tape.record(gathered, [x])
        y = self._mlp(gathered, shape.expert_ffn, rows, ("experts.gate_up", "", "experts.down"))
        tape.drop(gathered)
        weighted = tape.new(rows * shape.hidden, 2)
        tape.record(weighted, [y, router], [y, router], scratch_bytes=y.size_bytes)
        tape.drop(y, router)
        out = tape.new(self.tokens * shape.hidden, x.itemsize if not self.step.autocast else 2)
        tape.record(out, [weighted])
        tape.drop(weighted)
        if shape.shared_ffn:
            shared = self._mlp(x, shape.shared_ffn, self.tokens, ("gate", "up", "down"))
            total = self.add(out, shared)
            tape.drop(out, shared)
            return total
        return out

    def _expert_loop(self, x: Value, router: Value, rows: int) -> Value:
        """One expert after another on its share of the rows, each added into one output (index_add_)."""
        tape, shape = self.tape, self.shape
        out = tape.new(self.tokens * shape.hidden, x.itemsize)
        share = -(-rows // shape.expert_count)
        for _ in range(shape.expert_count):
            gathered = tape.new(share * shape.hidden, x.itemsize)
            # backward scatters into a zeroed tensor of all tokens, summed into x's gradient
            tape.record(gathered, [x])
            y = self._mlp(gathered, shape.expert_ffn, share, ("w1", "w3", "w2"))
            tape.drop(gathered)
            weighted = tape.new(share * shape.hidden, y.itemsize)
            tape.record(weighted, [y, router], [y], scratch_bytes=y.size_bytes)
            tape.drop(y)
            tape.nodes.append(Node((out,), (weighted,), (), False, False, 0, 0, keeps_output_grad=True))
            tape.drop(weighted)
        tape.drop(router)
        return out

    def layer(self, x: Value) -> Value:
        """One decoder layer, residual stream in and out."""
        tape, shape = self.tape, self.shape
        h = self.norm(x)
        attended = self.attention(h)
        if shape.parallel:
            fed = self.feed_forward(h)
            tape.drop(h)
            both = self.add(attended, fed)
            tape.drop(attended, fed)
            out = self.add(x, both)
            tape.drop(both)
            return out
        tape.drop(h)
        if shape.post_norms:
            attended = self._replace(attended, self.norm(attended))
        middle = self.add(x, attended)
        tape.drop(attended)
        h = self.norm(middle)
        fed = self.feed_forward(h)
        tape.drop(h)
        if shape.post_norms:
            fed = self._replace(fed, self.norm(fed))
        out = self.add(middle, fed)
        tape.drop(fed, middle)
        return out


def play_layer(shape: LayerShape, step: StepSettings, *, checkpointed: bool) -> Callable[[Tape], Value]:
    """A decoder layer's forward for `tape.run`. A checkpointed layer's input is counted by the caller."""

    def play(tape: Tape) -> Value:
        elements = step.tokens * shape.hidden
        if checkpointed:
            x = Value(Buffer(0), elements, step.residual_itemsize)
            return Player(tape, shape, step).layer(x)
        x = tape.new(elements, step.residual_itemsize)
        out = Player(tape, shape, step).layer(x)
        tape.drop(x)
        return out

    return play
