"""Exact training memory without a GPU: one real training step on fake tensors, every storage counted.

The step is transformers, peft, TRL and torch.optim themselves; only the tensors are fake (shape and type, no bytes), so
a laptop can trace a 70B model. A shallow stack is traced at two depths and extended linearly, separately for each
moment of the step; the peak is the largest moment. Needs the extra `trace`.

What differs between this host's CPU kernels and CUDA is put right here: flash attention without an S x S matrix and
with the workspaces of its backward, Triton loss kernels that work in place, TRL's gather of the labelled positions,
bitsandbytes' dequantised weights, foreach optimizers, sums in fp32 under autocast, and the rounding of the caching
allocator. Not counted: the CUDA context, cuBLAS workspaces (8 to 32 MiB a handle), fragmentation, and blocks that the
allocator does not split (up to 1 MiB each). Vision towers stay out: the text model alone is traced. Linear-attention
layers are traced in their PyTorch form, not with the kernels of the fla package.
"""

from __future__ import annotations

import contextlib
import importlib
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from planner.errors import NotModelled, PlannerError, UnknownArchitecture
from planner.model import Frozen

Method = Literal["full", "lora", "qlora", "dora"]
Loss = Literal["hf", "chunked", "none"]
Attention = Literal["flash", "eager", "math"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_torch_single", "sgd"]
Dtype = Literal["bf16", "fp32"]
Moment = Literal["forward", "loss_forward", "loss_backward", "backward", "optimizer_step"]

ALLOCATOR_ROUNDING = 512
"""CUDACachingAllocator.cpp, kMinBlockSize: every block is a multiple of this many bytes."""
NF4_BLOCK = 64
NF4_NESTED_BLOCK = 256
"""bitsandbytes functional.py, quantize_4bit: weights per absmax, and absmax values per second-level absmax."""
GEMM_4BIT_KERNEL_ROWS = 512
"""bitsandbytes backends/cuda/ops.py: with more rows than this the CUDA gemm_4bit dequantises the whole weight first."""


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

    peak_bytes: torch.cuda.max_memory_allocated() of the step, up to what the module does not count
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


def trace_training(
    config: Mapping[str, Any],
    *,
    method: Method,
    seq_len: int,
    micro_batch: int = 1,
    gradient_checkpointing: bool = True,
    loss: Loss = "chunked",
    lora_rank: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    adapter_dtype: Dtype = "fp32",
    autocast: bool = True,
    optimizer: Optimizer = "adamw_torch_fused",
    base_dtype: Dtype = "bf16",
    kbit_prepare: bool = False,
    attention: Attention = "flash",
    accumulate: bool = False,
    kernel_workspaces: bool = True,
    full_depth: bool = False,
) -> Trace:
    """Peak allocated bytes of one training step of the model that `config` (a config.json) describes.

    method: full trains every weight in base_dtype; lora and dora freeze them; qlora stores the linear ones in NF4 with
        double quantisation. loss: hf makes the logits, chunked is TRL's fused head, none stops at the last hidden
        state.
    autocast: the forward pass runs in bf16 autocast, as accelerate does with mixed_precision=bf16.
    kbit_prepare: peft.prepare_model_for_kbit_training casts what is not 4-bit to fp32.
    accumulate: gradients of an earlier micro-batch are still there (gradient_accumulation_steps > 1).
    full_depth: trace every layer instead of extrapolating from two shallow stacks; same figures, more seconds.
    Every token is labelled and no padding mask is passed (packed sequences).

    Raises PlannerError when torch is missing or a setting is inconsistent, UnknownArchitecture for a model_type that
    transformers does not have, NotModelled for a combination that the step cannot be traced with.
    """
    started = time.perf_counter()
    torch = _require("torch")
    _check(method, seq_len, micro_batch, autocast, base_dtype, kbit_prepare, attention)
    step = _Step(
        torch=torch,
        config=dict(config),
        method=method,
        seq_len=seq_len,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        loss=loss,
        lora_rank=lora_rank,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        adapter_dtype=adapter_dtype,
        autocast=autocast,
        optimizer=optimizer,
        base_dtype=base_dtype,
        kbit_prepare=kbit_prepare,
        attention=attention,
        accumulate=accumulate,
        kernel_workspaces=kernel_workspaces,
    )
    depth, depths = step.depths(full_depth)
    runs = [step.run(layers) for layers in depths]
    peaks = _extrapolate(runs, depth)
    (moment, layer), (peak, operation) = max(peaks.items(), key=lambda item: item[1][0].total)
    return Trace(
        peak_bytes=peak.total,
        peak_instant=moment,
        peak_layer=layer if layer is not None and 0 <= layer < depth else None,
        peak_operation=operation,
        peak=peak,
        instants=_by_moment(peaks),
        end_of_forward=_line([run.end_of_forward for run in runs], depths, depth),
        parameters=_line_int([run.parameters for run in runs], depths, depth),
        trainable_parameters=_line_int([run.trainable_parameters for run in runs], depths, depth),
        depth=depth,
        layers_traced=tuple(depths),
        seconds=round(time.perf_counter() - started, 2),
        versions=library_versions(),
    )


def _check(
    method: Method,
    seq_len: int,
    micro_batch: int,
    autocast: bool,
    base: Dtype,
    kbit_prepare: bool,
    attention: Attention,
) -> None:
    if seq_len < 2 or micro_batch < 1:
        raise PlannerError(
            f"cannot trace {micro_batch} sequences of {seq_len} tokens: give at least 1 sequence of at least 2 tokens"
        )
    if kbit_prepare and method != "qlora":
        raise PlannerError(f"kbit_prepare belongs to a quantised base: use method qlora, or leave it off for {method}")
    if base == "fp32" and method == "qlora":
        raise PlannerError("a qlora base is NF4 computed in bf16: leave base_dtype at bf16, or use kbit_prepare")
    if not autocast and attention == "flash" and (base == "fp32" or kbit_prepare):
        raise NotModelled("flash attention has no fp32 kernel: turn autocast on, or choose attention math or eager")


# --------------------------------------------------------------------------------------------- extending to full depth


class _Run(Frozen):
    layers: int
    peaks: dict[Segment, tuple[Components, str]]
    end_of_forward: Components
    parameters: int
    trainable_parameters: int


def _period(signatures: Sequence[object]) -> tuple[int, int]:
    """(irregular layers at the start, period of the rest): the shortest description of the sequence."""
    total = len(signatures)
    for length in range(1, total + 1):  # start + period
        for period in range(1, length + 1):
            start = length - period
            if all(signatures[i] == signatures[i + period] for i in range(start, total - period)):
                return start, period
    return 0, total


def _depths(signatures: Sequence[object], shapes: Sequence[object]) -> list[int]:
    """Two depths that end like the full one, one period apart, or the full depth alone if that is as shallow.

    signatures: what tells layers apart; shapes: of their weights alone. The shallow stack has two periods of shapes,
    and every kind of layer once: each kind may have rotary tables of its own, alive as long as one layer needs them.
    """
    depth = len(signatures)
    start, period = _period(signatures)
    shape_start, shape_period = _period(shapes)
    kinds = 1 + max(signatures.index(signature) for signature in set(signatures))
    shallow = start + (depth - start) % period
    shallow += -(-(max(4, kinds, shape_start + 2 * shape_period) - shallow) // period) * period
    return [shallow, shallow + period] if shallow + period < depth else [depth]


def _line_int(values: Sequence[int], depths: Sequence[int], depth: int) -> int:
    if len(values) == 1:
        return values[0]
    slope, rest = divmod(values[1] - values[0], depths[1] - depths[0])
    periods, odd = divmod(depth - depths[0], depths[1] - depths[0])
    if odd:
        raise AssertionError(f"depth {depth} is not a whole number of periods from {depths}")
    return values[0] + periods * (slope * (depths[1] - depths[0]) + rest)


def _line(parts: Sequence[Components], depths: Sequence[int], depth: int) -> Components:
    """The straight line through two depths, component by component."""
    return Components(
        **{name: _line_int([getattr(part, name) for part in parts], depths, depth) for name in COMPONENTS}
    )


def _extrapolate(runs: Sequence[_Run], depth: int) -> Peaks:
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
        peaks[target] = (_line(pair, [low.layers, high.layers], depth), operation)
    return peaks


def _by_moment(peaks: Peaks) -> dict[Moment, Components]:
    best: dict[Moment, Components] = {}
    for (moment, _), (components, _) in peaks.items():
        if moment not in best or components.total > best[moment].total:
            best[moment] = components
    return best


# --------------------------------------------------------------------------------------------- recording and replaying


class _Storage:
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


class _Ledger:
    """Allocations and frees in order; peaks are found afterwards, when the fate of every storage is known."""

    def __init__(self) -> None:
        self.storages: list[_Storage] = []
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
        self.storages.append(_Storage(rounded, label, operation, segment, shape))
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


def _recorder(torch: Any, ledger: _Ledger, vocabulary: int, rows: range, kernel_workspaces: bool) -> Any:
    """A dispatch mode that notes the outputs of every ATen operation in the ledger."""
    mode = _require("torch.utils._python_dispatch").TorchDispatchMode
    leaves = _require("torch.utils._pytree").tree_iter
    tensor_type = torch.Tensor

    class Recorder(mode):  # type: ignore[misc,valid-type]  # torch is imported lazily: the base is Any
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func._schema.name
            for leaf in leaves(out):
                if isinstance(leaf, tensor_type):
                    label = ""
                    if leaf.shape and leaf.shape[-1] == vocabulary and leaf.numel() // vocabulary in rows:
                        label = "logits"
                    elif name == "aten::_to_copy" and ledger.label(args[0]) in ("base", "adapter"):
                        label = "weight_casts"
                    ledger.allocate(leaf, label, name)
            if kernel_workspaces:
                ledger.passing(_workspace(name, args), name)
            return out

    return Recorder()


def _workspace(name: str, args: Sequence[Any]) -> int:
    """Bytes that a CUDA kernel allocates and frees itself, which its fake implementation does not show.

    flash backward (pytorch flash_api.cpp, mha_bwd): dQ in fp32 and the row sums, padded to 128 rows; dK and dV of every
    query head when heads are grouped. gemm_4bit (bitsandbytes backends/cuda/ops.py, _dequant_linear_fallback): the
    weight in 16 bits, its absmax twice in fp32.
    """
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        query, key = args[1], args[2]
        batch, heads, length, head_dim = query.shape
        rows = -(-length // 128) * 128
        padded = -(-head_dim // 32) * 32 if head_dim <= 128 else -(-head_dim // 64) * 64
        workspace: int = batch * heads * rows * (4 * padded + 4)
        if key.shape[1] != heads:
            workspace += 2 * batch * heads * key.shape[2] * head_dim * query.element_size()
        return workspace
    if name == "bitsandbytes::gemm_4bit":
        activations, shape = args[0], args[2]
        if activations.numel() // activations.shape[-1] <= GEMM_4BIT_KERNEL_ROWS:
            return 0
        weights = int(shape[0]) * int(shape[1])
        return weights * int(activations.element_size()) + 2 * (weights // NF4_BLOCK) * 4
    return 0


# ------------------------------------------------------------------------------------------------------- the real step


class _Step:
    """One configuration of a training step, run at a chosen number of layers."""

    def __init__(self, *, torch: Any, config: dict[str, Any], **settings: Any) -> None:
        self.torch = torch
        self.config = config
        self.bf16 = torch.bfloat16
        self.method: Method = settings["method"]
        self.seq_len: int = settings["seq_len"]
        self.micro_batch: int = settings["micro_batch"]
        self.gradient_checkpointing: bool = settings["gradient_checkpointing"]
        self.loss: Loss = settings["loss"]
        self.lora_rank: int = settings["lora_rank"]
        self.target_modules: str | list[str] = settings["target_modules"]
        self.adapter_dtype: Dtype = settings["adapter_dtype"]
        self.autocast: bool = settings["autocast"]
        self.optimizer: Optimizer = settings["optimizer"]
        self.base_dtype: Dtype = settings["base_dtype"]
        self.kbit_prepare: bool = settings["kbit_prepare"]
        self.attention: Attention = settings["attention"]
        self.accumulate: bool = settings["accumulate"]
        self.kernel_workspaces: bool = settings["kernel_workspaces"]

    def depths(self, full_depth: bool) -> tuple[int, list[int]]:
        """Layers of the model, and the depths at which to trace it."""
        model = self._meta_model()
        layers = _layers(model)
        wide = self.base_dtype == "fp32" or self.kbit_prepare
        if wide and any(p.dim() > 2 and p.shape[0] > 1 for layer in layers for p in layer.parameters()):
            raise NotModelled(
                "torch's grouped matrix product of the experts takes bf16 weights only: "
                "leave base_dtype at bf16 and kbit_prepare off"
            )
        kinds = getattr(model.config, "layer_types", None) or [None] * len(layers)
        shapes = [tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers]
        return len(layers), [len(layers)] if full_depth else _depths(list(zip(kinds, shapes, strict=True)), shapes)

    def run(self, depth: int) -> _Run:
        """Trace the step at this depth; the optimizer already holds its state, as it does from the second step on."""
        fake = _require("torch._subclasses.fake_tensor")
        try:
            return self._run(depth, fake.FakeTensorMode(allow_non_fake_inputs=True))
        except (fake.DataDependentOutputException, fake.DynamicOutputShapeException) as error:
            raise NotModelled(
                f"a shape in {self.config.get('model_type')} depends on the data ({error}), which a trace without data "
                "cannot follow: use the closed-form estimate (leave out --trace)"
            ) from error

    def _run(self, depth: int, fake_mode: Any) -> _Run:
        torch = self.torch
        with _as_on_cuda(torch, self.micro_batch, self.seq_len):
            model = self._prepare(self._meta_model(depth))
            with fake_mode:
                _materialise(torch, model)
                model.train()
                trainable = [p for p in model.parameters() if p.requires_grad]
                optimizer = self._optimizer(trainable)
                ids = torch.zeros(self.micro_batch, self.seq_len, dtype=torch.long)
                ledger = _Ledger()
                for tensor in [*model.parameters(), *model.buffers()]:
                    adapter = self.method != "full" and tensor.requires_grad
                    ledger.allocate(tensor, "adapter" if adapter else "base")
                ledger.allocate(ids, "transient")
                for state in optimizer.state.values():
                    for value in state.values():
                        if isinstance(value, torch.Tensor) and value.dim() > 0:  # step counters live on the host
                            ledger.allocate(value, "optimizer")
                if self.accumulate:
                    for parameter in trainable:
                        parameter.grad = torch.empty_like(parameter)
                        ledger.allocate(parameter.grad, "gradients")
                self._follow(model, ledger)
                vocabulary = model.get_output_embeddings().weight.shape[0]
                tokens = self.micro_batch * self.seq_len
                rows = range(tokens - self.micro_batch, tokens + 1)
                with _recorder(torch, ledger, vocabulary, rows, self.kernel_workspaces):
                    self._step(model, ids, trainable, optimizer, ledger)
                peaks, end_of_forward = ledger.replay()
                return _Run(
                    layers=depth,
                    peaks=peaks,
                    end_of_forward=end_of_forward,
                    parameters=self._parameters(model),
                    trainable_parameters=sum(p.numel() for p in trainable),
                )

    def _meta_model(self, depth: int | None = None) -> Any:
        """The causal language model on the meta device, cut to its first `depth` layers. Vision towers stay out."""
        transformers = _require("transformers")
        config = dict(self.config)
        text = dict(config.get("text_config") or config)
        model_type = text.pop("model_type", None)
        for key in ("architectures", "torch_dtype", "dtype", "transformers_version", "quantization_config"):
            text.pop(key, None)
        if "text_config" in config and "tie_word_embeddings" in config:
            text.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
        known = _require("transformers.models.auto.configuration_auto").CONFIG_MAPPING
        causal = _require("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING
        if model_type not in known or known[model_type] not in causal:
            raise UnknownArchitecture(
                f"transformers {transformers.__version__} has no causal language model of type {model_type!r}: "
                "update transformers, or use the closed-form estimate (leave out --trace)"
            )
        built = known[model_type](**text)
        built.use_cache = False
        built._attn_implementation = {"flash": _FLASH, "math": _MATH, "eager": "eager"}[self.attention]
        _register_attention(self.torch)
        previous = self.torch.get_default_dtype()
        self.torch.set_default_dtype(self.bf16 if self.base_dtype == "bf16" else self.torch.float32)
        try:
            with self.torch.device("meta"), _require("transformers.initialization").no_init_weights():
                model = causal[known[model_type]](built)
            model.tie_weights()  # left out together with the initialisation
        except KeyError as error:  # an old model with attention classes of its own, by name
            raise NotModelled(
                f"{model_type} does not take attention {self.attention} from transformers' registry: "
                "use attention eager, or the closed-form estimate (leave out --trace)"
            ) from error
        finally:
            self.torch.set_default_dtype(previous)
        if depth is not None:
            backbone = model.base_model
            backbone.layers = backbone.layers[:depth]
            model.config.num_hidden_layers = backbone.config.num_hidden_layers = depth
        return model

    def _prepare(self, model: Any) -> Any:
        """What the training script does to a loaded model: quantise, fuse the head, checkpoint, add adapters."""
        if self.method == "qlora":
            _quantise(self.torch, model)
        if self.loss == "chunked":
            # what SFTTrainer asks for: is_top1 feeds its token accuracy, entropy its log
            _require("trl.trainer.utils").add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if self.kbit_prepare:
            _require("peft").prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if self.gradient_checkpointing:
            # the RNG state that CUDA would keep is a few bytes on the host
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
            )
        if self.method == "full":
            return model
        if self.gradient_checkpointing:
            model.enable_input_require_grads()
        peft = _require("peft")
        lora = peft.LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank,
            lora_dropout=0.0,
            target_modules=self.target_modules,
            use_dora=self.method == "dora",
            task_type="CAUSAL_LM",
        )
        with self.torch.device("meta"):
            try:
                adapted = peft.get_peft_model(model, lora)
            except ValueError as error:
                raise PlannerError(f"peft cannot put adapters on {self.target_modules!r}: {error}") from error
        if self.adapter_dtype == "bf16":
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "lora_magnitude_vector" not in name:  # as SFTTrainer does
                    parameter.data = parameter.data.to(self.bf16)
        return adapted

    def _optimizer(self, trainable: Sequence[Any]) -> Any:
        torch = self.torch
        if self.optimizer == "sgd":
            return torch.optim.SGD(trainable, lr=1e-4, foreach=True)
        adamw = torch.optim.AdamW(
            trainable,
            lr=1e-4,
            foreach=self.optimizer == "adamw_torch",
            fused=True if self.optimizer == "adamw_torch_fused" else None,
        )
        for parameter in trainable:
            adamw.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.empty_like(parameter),
                "exp_avg_sq": torch.empty_like(parameter),
            }
        return adamw

    def _follow(self, model: Any, ledger: _Ledger) -> None:
        """Hooks that tell the ledger which moment and which layer the step is in."""
        causal = model if self.method == "full" else model.get_base_model()
        layers = _layers(causal)
        forward = True

        def enter(index: int) -> Any:
            def hook(_module: Any, args: Any, kwargs: Any) -> None:
                if forward:
                    ledger.begin(("forward", index))
                    hidden = args[0] if args else kwargs["hidden_states"]
                    if index == 0 and hidden.requires_grad:
                        hidden.register_hook(lambda _: ledger.begin(("backward", -1)))

            return hook

        def leave(index: int) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                if forward:
                    hidden = output if isinstance(output, self.torch.Tensor) else output[0]
                    hidden.register_hook(lambda _: ledger.begin(("backward", index)))
                    if index == len(layers) - 1:
                        ledger.begin(("forward", index + 1))

            return hook

        def trunk_done(_module: Any, _args: Any, output: Any) -> None:
            nonlocal forward
            if forward:
                forward = False
                output.last_hidden_state.register_hook(lambda _: ledger.begin(("backward", len(layers))))
                ledger.begin(("loss_forward", None))

        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(enter(index), with_kwargs=True)
            layer.register_forward_hook(leave(index))
        causal.base_model.register_forward_hook(trunk_done)

    def _step(self, model: Any, ids: Any, trainable: Sequence[Any], optimizer: Any, ledger: _Ledger) -> None:
        torch = self.torch
        ledger.begin(("forward", -1))
        context = torch.autocast("cpu", dtype=self.bf16) if self.autocast else contextlib.nullcontext()
        with context:
            if self.loss == "none":
                causal = model if self.method == "full" else model.get_base_model()
                hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
                loss = hidden.float().mean()
                del hidden
            elif self.loss == "hf":
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            else:
                loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        ledger.begin(("loss_backward", None))
        loss.backward()
        del loss
        for parameter in trainable:
            if parameter.grad is not None:
                ledger.relabel(parameter.grad, "gradients")
        ledger.begin(("optimizer_step", None))
        optimizer.step()

    def _parameters(self, model: Any) -> int:
        total = 0
        for module in model.modules():
            shape = getattr(module, "nf4_shape", None)
            if shape is not None:
                total += shape[0] * shape[1] - module.weight.numel()
        return total + sum(int(p.numel()) for p in model.parameters())


def _layers(causal: Any) -> Any:
    layers = getattr(causal.base_model, "layers", None)
    if layers is None:
        raise NotModelled(
            f"{type(causal).__name__} keeps its layers in a place that is not known here: "
            "use the closed-form estimate (leave out --trace)"
        )
    return layers


def _materialise(torch: Any, model: Any) -> None:
    """Swap every meta tensor for a fake CPU tensor of the same shape; shared parameters stay shared."""
    twins: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in twins:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    twins[id(parameter)] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = twins[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    del twins


def _quantise(torch: Any, model: Any) -> None:
    """Replace every linear layer but the head by a bitsandbytes Linear4bit with NF4 storage of the real sizes."""
    bitsandbytes = _require("bitsandbytes")
    quant_state, linear_4bit = bitsandbytes.functional.QuantState, bitsandbytes.nn.Linear4bit

    class Nf4Linear(linear_4bit):  # type: ignore[misc,valid-type]  # imported lazily: the base is Any
        """Params4bit quantises on the GPU; this one is born quantised, with its statistics as buffers."""

        def __init__(self, linear: Any) -> None:
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.nf4_shape = tuple(linear.weight.shape)
            self.bias = linear.bias
            self.compute_dtype, self.compute_type_is_set, self.quant_type = torch.bfloat16, True, "nf4"
            weights = linear.weight.numel()
            blocks = -(-weights // NF4_BLOCK)
            packed = torch.empty(-(-weights // 2), 1, dtype=torch.uint8, device="meta")
            self.weight = torch.nn.Parameter(packed, requires_grad=False)
            self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
            for name, size, dtype in (
                ("absmax", (blocks,), torch.uint8),
                ("nested_absmax", (-(-blocks // NF4_NESTED_BLOCK),), torch.float32),
                ("nested_code", (256,), torch.float32),
                ("offset", (), torch.float32),
                ("code", (16,), torch.float32),
            ):
                self.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"))

        def forward(self, x: Any) -> Any:
            nested = quant_state(
                absmax=self.nested_absmax, code=self.nested_code, blocksize=NF4_NESTED_BLOCK, dtype=torch.float32
            )
            state = quant_state(
                absmax=self.absmax,
                shape=self.nf4_shape,
                code=self.code,
                blocksize=NF4_BLOCK,
                quant_type="nf4",
                dtype=torch.bfloat16,
                offset=self.offset,
                state2=nested,
            )
            bias = None if self.bias is None else self.bias.to(torch.bfloat16)
            out = bitsandbytes.matmul_4bit(x.to(torch.bfloat16), self.weight, quant_state=state, bias=bias)
            return out.to(x.dtype)

    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child is not head:
                setattr(module, name, Nf4Linear(child))
    model.is_loaded_in_4bit = True


# --------------------------------------------------------------------------------------------- CUDA behaviour on a CPU

_FLASH = "tonnage_fused"  # transformers loads the flash_attn package for any name with "flash" in it
_MATH = "tonnage_math"


def _register_attention(torch: Any) -> None:
    """Attention kernels as CUDA runs them; names of this module's own carry no S x S mask."""
    registry = _require("transformers").AttentionInterface

    def in_autocast(*tensors: Any) -> list[Any]:
        # scaled_dot_product_attention is on CUDA autocast's list of 16-bit operations
        if torch.is_autocast_enabled("cpu"):
            return [t.to(torch.bfloat16) if t.dtype == torch.float32 else t for t in tensors]
        return list(tensors)

    def refuse_mask(mask: Any) -> None:
        if mask is not None:
            raise NotModelled(
                "this model builds an attention mask, which flash attention cannot take: use attention eager"
            )

    def flash(_module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        refuse_mask(mask)
        if value.shape[-1] != query.shape[-1]:
            raise NotModelled("flash attention needs values as wide as the queries, these are not: use attention eager")
        query, key, value = in_autocast(query, key, value)
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        return attend(query, key, value, 0.0, True, False, scale=scaling)[0].transpose(1, 2), None

    def math(_module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        refuse_mask(mask)
        query, key, value = in_autocast(query, key, value)
        attend = torch.ops.aten._scaled_dot_product_attention_math
        out = attend(query, key, value, None, 0.0, True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1])[0]
        return out.transpose(1, 2), None

    registry.register(_FLASH, flash)
    registry.register(_MATH, math)


@contextlib.contextmanager
def _as_on_cuda(torch: Any, batch: int, length: int) -> Iterator[None]:
    """While this lasts, libraries that look at the device take their CUDA path although the tensors are on the CPU."""
    with contextlib.ExitStack() as stack:
        # peft asks torch.is_autocast_enabled() without a device, which means CUDA
        asked = torch.is_autocast_enabled
        _swap(stack, torch, "is_autocast_enabled", lambda *device: asked(*device) if device else asked("cpu"))
        with contextlib.suppress(ImportError):
            kernels = importlib.import_module("trl.kernels.chunked_logprob")
            utils = importlib.import_module("trl.trainer.utils")
            # Triton folds a tile of logits in place, and addmm(out_dtype=fp32, out=acc) makes no temporary
            _swap(stack, kernels, "_forward_tile", lambda *_, **__: None)
            _swap(stack, kernels, "_backward_tile", lambda *_, **__: None)
            _swap(stack, kernels, "_addmm_fp32", lambda *_: None)
            if hasattr(utils, "_use_triton"):
                _swap(stack, utils, "_use_triton", lambda _device: True)
        stack.enter_context(_cuda_functions(torch, batch * (length - 1)))
        yield


def _swap(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack unwinds. A library without it has changed too much to be traced."""
    if not hasattr(owner, name):
        raise NotModelled(
            f"{owner.__name__} no longer has {name}, so its CUDA path cannot be traced: "
            "install the versions of the trace extra"
        )
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _cuda_functions(torch: Any, labelled: int) -> Any:
    """Functions that do something else on CUDA, or that need data which a fake tensor does not have."""
    mode = _require("torch.overrides").TorchFunctionMode
    getitem, scatter, total = torch.Tensor.__getitem__, torch.Tensor.masked_scatter, torch.Tensor.sum

    class CudaFunctions(mode):  # type: ignore[misc,valid-type]  # torch is imported lazily: the base is Any
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is getitem and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
                # TRL gathers the labelled positions, here all of them: CUDA turns the mask into one int64 index a
                # dimension (nonzero) and keeps them for the backward
                index = tuple(torch.empty(labelled, dtype=torch.long) for _ in range(args[1].dim()))
                return func(args[0], index)
            if func is scatter:
                return args[2].reshape(args[0].shape).clone()
            if func is total and torch.is_autocast_enabled("cpu") and args[0].is_floating_point():
                # on CUDA autocast's list of sums in fp32, not on the CPU's; mixture-of-experts layers end in one
                kwargs.setdefault("dtype", torch.float32)
            return func(*args, **kwargs)

    return CudaFunctions()


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PlannerError(
            f"an exact trace needs {module.split('.')[0]}, which is not installed: "
            "install it with `pip install 'tonnage[trace]'`, or leave out --trace"
        ) from error


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose step is traced, those that are installed."""
    metadata = importlib.import_module("importlib.metadata")
    found = {}
    for name in ("torch", "transformers", "peft", "trl", "bitsandbytes"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
