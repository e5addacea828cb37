"""The step itself: the model of a config.json on fake tensors, as the training script prepares it, run once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from planner.errors import NotModelled, PlannerError, UnknownArchitecture
from planner.trace.cuda import FLASH, MATH, as_on_cuda, kernel_workspace, quantise, register_attention, require
from planner.trace.ledger import Attention, Dtype, Ledger, Loss, Method, Optimizer, Run, depths_to_trace


class Step:
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
        layers = layers_of(model)
        wide = self.base_dtype == "fp32" or self.kbit_prepare
        if wide and any(p.dim() > 2 and p.shape[0] > 1 for layer in layers for p in layer.parameters()):
            raise NotModelled(
                "torch's grouped matrix product of the experts takes bf16 weights only: "
                "leave base_dtype at bf16 and kbit_prepare off"
            )
        kinds = getattr(model.config, "layer_types", None) or [None] * len(layers)
        shapes = [tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers]
        if full_depth:
            return len(layers), [len(layers)]
        return len(layers), depths_to_trace(list(zip(kinds, shapes, strict=True)), shapes)

    def run(self, depth: int) -> Run:
        """Trace the step at this depth; the optimizer already holds its state, as it does from the second step on."""
        fake = require("torch._subclasses.fake_tensor")
        try:
            return self._run(depth, fake.FakeTensorMode(allow_non_fake_inputs=True))
        except (fake.DataDependentOutputException, fake.DynamicOutputShapeException) as error:
            raise NotModelled(
                f"a shape in {self.config.get('model_type')} depends on the data ({error}), which a trace without data "
                "cannot follow: drop --trace for the closed-form estimate"
            ) from error

    def _run(self, depth: int, fake_mode: Any) -> Run:
        torch = self.torch
        with as_on_cuda(torch, self.micro_batch, self.seq_len):
            model = self._prepare(self._meta_model(depth))
            with fake_mode:
                materialise(torch, model)
                model.train()
                trainable = [p for p in model.parameters() if p.requires_grad]
                optimizer = self._optimizer(trainable)
                ids = torch.zeros(self.micro_batch, self.seq_len, dtype=torch.long)
                ledger = Ledger()
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
                with recorder(torch, ledger, vocabulary, rows, self.kernel_workspaces):
                    self._step(model, ids, trainable, optimizer, ledger)
                peaks, end_of_forward = ledger.replay()
                return Run(
                    layers=depth,
                    peaks=peaks,
                    end_of_forward=end_of_forward,
                    parameters=self._parameters(model),
                    trainable_parameters=sum(p.numel() for p in trainable),
                )

    def _meta_model(self, depth: int | None = None) -> Any:
        """The causal language model on the meta device, cut to its first `depth` layers. Vision towers stay out."""
        transformers = require("transformers")
        config = dict(self.config)
        text = dict(config.get("text_config") or config)
        model_type = text.pop("model_type", None)
        for key in ("architectures", "torch_dtype", "dtype", "transformers_version", "quantization_config"):
            text.pop(key, None)
        if "text_config" in config and "tie_word_embeddings" in config:
            text.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
        known = require("transformers.models.auto.configuration_auto").CONFIG_MAPPING
        causal = require("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING
        if model_type not in known or known[model_type] not in causal:
            raise UnknownArchitecture(
                f"transformers {transformers.__version__} has no causal language model of type {model_type!r}: "
                "update transformers, or drop --trace for the closed-form estimate"
            )
        built = known[model_type](**text)
        built.use_cache = False
        built._attn_implementation = {"flash": FLASH, "math": MATH, "eager": "eager"}[self.attention]
        register_attention(self.torch)
        previous = self.torch.get_default_dtype()
        self.torch.set_default_dtype(self.bf16 if self.base_dtype == "bf16" else self.torch.float32)
        try:
            with self.torch.device("meta"), require("transformers.initialization").no_init_weights():
                model = causal[known[model_type]](built)
            model.tie_weights()  # left out together with the initialisation
        except KeyError as error:  # an old model with attention classes of its own, by name
            raise NotModelled(
                f"{model_type} does not take attention {self.attention} from transformers' registry: "
                "use attention eager, or drop --trace for the closed-form estimate"
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
            quantise(self.torch, model)
        if self.loss == "chunked":
            # what SFTTrainer asks for: is_top1 feeds its token accuracy, entropy its log
            require("trl.trainer.utils").add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if self.kbit_prepare:
            require("peft").prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if self.gradient_checkpointing:
            # the RNG state that CUDA would keep is a few bytes on the host
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
            )
        if self.method == "full":
            return model
        if self.gradient_checkpointing:
            model.enable_input_require_grads()
        peft = require("peft")
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

    def _follow(self, model: Any, ledger: Ledger) -> None:
        """Hooks that tell the ledger which moment and which layer the step is in."""
        causal = model if self.method == "full" else model.get_base_model()
        layers = layers_of(causal)
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

    def _step(self, model: Any, ids: Any, trainable: Sequence[Any], optimizer: Any, ledger: Ledger) -> None:
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


def recorder(torch: Any, ledger: Ledger, vocabulary: int, rows: range, kernel_workspaces: bool) -> Any:
    """A dispatch mode that notes the outputs of every ATen operation in the ledger."""
    mode = require("torch.utils._python_dispatch").TorchDispatchMode
    leaves = require("torch.utils._pytree").tree_iter
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
                ledger.passing(kernel_workspace(name, args), name)
            return out

    return Recorder()


def layers_of(causal: Any) -> Any:
    layers = getattr(causal.base_model, "layers", None)
    if layers is None:
        raise NotModelled(
            f"model type {causal.config.model_type} cannot be traced, {type(causal).__name__} keeps its layers in a "
            "place that is not known here: drop --trace for the closed-form estimate"
        )
    return layers


def materialise(torch: Any, model: Any) -> None:
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
