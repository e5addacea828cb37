"""CUDA on a host without it: attention kernels, libraries' CUDA paths, kernel workspaces and NF4 weights.

Whatever a GPU would do otherwise than this host's CPU kernels stands here; the rest of the package knows no device.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from planner.errors import NotModelled, PlannerError

NF4_BLOCK = 64
NF4_NESTED_BLOCK = 256
"""bitsandbytes functional.py, quantize_4bit: weights per absmax, and absmax values per second-level absmax."""
GEMM_4BIT_KERNEL_ROWS = 512
"""bitsandbytes backends/cuda/ops.py: with more rows than this the CUDA gemm_4bit dequantises the whole weight first."""

FLASH = "tonnage_fused"  # transformers loads the flash_attn package for any name with "flash" in it
MATH = "tonnage_math"


def register_attention(torch: Any) -> None:
    """Attention kernels as CUDA runs them; names of this module's own carry no S x S mask."""
    registry = require("transformers").AttentionInterface

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

    registry.register(FLASH, flash)
    registry.register(MATH, math)


@contextlib.contextmanager
def as_on_cuda(torch: Any, batch: int, length: int) -> Iterator[None]:
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
    mode = require("torch.overrides").TorchFunctionMode
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


def kernel_workspace(name: str, args: Sequence[Any]) -> int:
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


def quantise(torch: Any, model: Any) -> None:
    """Replace every linear layer but the head by a bitsandbytes Linear4bit with NF4 storage of the real sizes."""
    bitsandbytes = require("bitsandbytes")
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


def require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PlannerError(
            f"an exact trace needs {module.split('.')[0]}, which is not installed: "
            "install it with `pip install 'tonnage[trace]'`, or drop --trace"
        ) from error
