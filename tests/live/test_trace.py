"""The exact trace of a training step, against arithmetic done by hand and against CUDA's own list of operations."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner import trace
from planner.errors import NotModelled, PlannerError, UnknownArchitecture
from planner.trace import COMPONENTS, Components, Trace
from planner.trace.cuda import as_on_cuda
from planner.trace.ledger import Ledger, depths_to_trace, line, pattern
from planner.trace.step import Step, materialise

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = [
    pytest.mark.live,
    # warnings of the traced libraries, not of this package
    pytest.mark.filterwarnings("ignore:::torch.*"),
    pytest.mark.filterwarnings("ignore:::transformers.*"),
    pytest.mark.filterwarnings("ignore:::peft.*"),
    pytest.mark.filterwarnings("ignore:::trl.*"),
    pytest.mark.filterwarnings("ignore:::bitsandbytes.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
CONFIGS = {
    entry["name"]: entry["config"] for entry in json.loads((ROOT / "planner/catalog/models.json").read_text())["models"]
}
TABLE = ROOT / "tests" / "oracles" / "training_trace.csv"
GQA = {
    "model_type": "llama",
    "hidden_size": 1920,
    "intermediate_size": 4608,
    "num_hidden_layers": 2,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 50_000,
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def torch() -> Any:
    for needed in ("transformers", "peft", "trl", "bitsandbytes"):
        pytest.importorskip(needed, reason=f"{needed} is missing: pip install 'tonnage[trace]'")
    return pytest.importorskip("torch", reason="torch is missing: pip install 'tonnage[trace]'")


def lora(name: str, seq_len: int = 2048, **settings: Any) -> Trace:
    return trace.trace_training(CONFIGS[name], **{"method": "lora", "seq_len": seq_len, **settings})


# ------------------------------------------------------------------------------------------------------- without torch


def depths(*kinds: str, shapes: str = "") -> list[int]:
    """Depths for layers of these kinds; their weights differ by kind, or as `shapes` says."""
    return depths_to_trace(list(zip(kinds, shapes or kinds, strict=True)), list(shapes or kinds))


def test_a_uniform_stack_is_traced_at_four_and_five_layers() -> None:
    assert depths(*["a"] * 36) == [4, 5]


def test_a_stack_with_a_pattern_keeps_its_beginning_and_its_end() -> None:
    qwen3_next = ["linear", "linear", "linear", "full"] * 12
    assert pattern(qwen3_next) == (0, 4)
    assert depths(*qwen3_next) == [8, 12]  # both end in a softmax layer, as 48 does
    assert depths("dense", *["moe"] * 26) == [4, 5]
    assert depths(*["a", "b"] * 13, "a") == [5, 7]


def test_windowed_layers_of_equal_shape_are_traced_in_one_period_and_one_more() -> None:
    gemma_3_4b = (["sliding"] * 5 + ["full"]) * 5 + ["sliding"] * 4
    assert depths(*gemma_3_4b, shapes="w" * 34) == [10, 16]  # both end in four sliding layers, as 34 does


def test_a_shallow_stack_is_traced_whole() -> None:
    assert depths(*["a"] * 5) == [5]


def test_bytes_extend_along_the_straight_line_through_two_depths() -> None:
    low, high = Components(base=100, saved=40), Components(base=120, saved=50)
    # per layer: 20 and 10; from 4 to 36 layers: 32 of them
    assert line([low, high], [4, 5], 36) == Components(base=740, saved=360)


def test_the_ledger_tells_saved_from_transient_by_what_happens_later() -> None:
    ledger = Ledger()
    ledger._record(512, "base", "", ())
    ledger.begin(("forward", 0))
    ledger._record(1000, "", "saved", ())  # rounded up to 1024
    ledger.passing(4096, "workspace")
    ledger.begin(("loss_backward", None))
    ledger._record(2048, "", "gradient", ())
    peaks, end_of_forward = ledger.replay()
    assert end_of_forward == Components(base=512, saved=1024)
    assert peaks[("forward", 0)] == (Components(base=512, saved=1024, transient=4096), "workspace")
    assert peaks[("loss_backward", None)] == (Components(base=512, saved=1024, transient=2048), "gradient")


def test_a_missing_library_is_a_refusal_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(PlannerError, match=r"needs torch.*pip install 'tonnage\[trace\]'"):
        trace.trace_training(GQA, method="lora", seq_len=512)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kbit_prepare": True}, PlannerError, "kbit_prepare belongs to a quantised base"),
        ({"seq_len": 1}, PlannerError, "at least 2 tokens"),
        ({"method": "qlora", "base_dtype": "fp32"}, PlannerError, "NF4"),
        ({"base_dtype": "fp32", "autocast": False}, NotModelled, "no fp32 kernel"),
        ({"target_modules": ["no_such_proj"]}, PlannerError, "cannot put adapters on"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: dict[str, Any], error: type[PlannerError], message: str
) -> None:
    with pytest.raises(error, match=message):
        trace.trace_training(GQA, **{"method": "lora", "seq_len": 512, **settings})


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("deepseek-v2-lite", {}, "values as wide as the queries"),  # latent attention: 192 against 128
        ("falcon-7b", {}, "does not take attention flash"),
        ("qwen3-30b-a3b", {"method": "full", "base_dtype": "fp32"}, "bf16 weights only"),
    ],
)
def test_a_model_whose_step_cannot_be_traced_is_refused(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NotModelled, match=message):
        lora(model, 512, **settings)


@pytest.mark.usefixtures("torch")
def test_an_architecture_that_transformers_does_not_have_is_refused() -> None:
    with pytest.raises(UnknownArchitecture, match="no causal language model of type 'warp_drive'"):
        trace.trace_training({"model_type": "warp_drive"}, method="lora", seq_len=512)


# ------------------------------------------------------------------------------------------------- arithmetic by hand


@pytest.mark.usefixtures("torch")
def test_a_lora_adapter_takes_16_bytes_a_parameter_at_the_optimizer_step() -> None:
    # 32 layers, rank 16, in + out of q and o (8192 each), k and v (5120), gate, up and down (18,432):
    # 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) = 41,943,040
    found = lora("llama-3.1-8b")
    assert found.trainable_parameters == 41_943_040
    assert found.parameters == 8_030_261_248 + 41_943_040
    step = found.instants["optimizer_step"]
    assert (step.adapter, step.gradients, step.optimizer) == (4 * 41_943_040, 4 * 41_943_040, 8 * 41_943_040)
    # bf16 weights and two fp32 buffers of 64 inverse frequencies, 512 bytes each once rounded
    assert step.base == 2 * 8_030_261_248 + 2 * 512


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("base_dtype", "optimizer", "bytes_per_parameter"),
    [
        ("bf16", "adamw_torch_fused", 8),  # weight, gradient and two moments, 2 bytes each
        ("bf16", "adamw_torch", 10),  # foreach keeps the square roots of all second moments at once
        ("fp32", "adamw_torch_fused", 16),
        ("fp32", "adamw_torch", 20),
        ("bf16", "sgd", 4),
    ],
)
def test_full_fine_tuning_takes_the_known_bytes_a_parameter_at_the_optimizer_step(
    base_dtype: str, optimizer: str, bytes_per_parameter: int
) -> None:
    settings = {"base_dtype": base_dtype, "optimizer": optimizer, "autocast": base_dtype == "fp32"}
    found = lora("qwen3-0.6b", 512, method="full", **settings)
    assert found.parameters == 596_049_920  # tied embeddings counted once
    expected = bytes_per_parameter * found.parameters
    # norm weights of 128 elements are rounded up to 512 bytes: 56 of them, five tensors each
    assert found.instants["optimizer_step"].total == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("torch")
def test_the_huggingface_loss_peaks_at_12_bytes_a_token_and_vocabulary_entry() -> None:
    # log-probabilities, their gradient and the gradient of the logits, all fp32
    found = lora("llama-3.1-8b", 8192, loss="hf")
    assert found.peak_instant == "loss_backward"
    assert found.peak.logits == 12 * 8192 * 128_256


@pytest.mark.usefixtures("torch")
def test_checkpointing_keeps_one_bf16_hidden_state_a_layer() -> None:
    tokens, hidden, layers = 8192, 4096, 32
    found = lora("llama-3.1-8b", tokens, loss="none")
    checkpoints = 2 * tokens * hidden * layers
    rope = 2 * 2 * tokens * 128  # cosines and sines in bf16
    positions = 8 * tokens
    final_norm = 4 * tokens * hidden + 4 * tokens  # its input in fp32 and the inverse root mean square
    assert found.end_of_forward.saved == pytest.approx(checkpoints + rope + positions + final_norm, abs=1024)


@pytest.mark.usefixtures("torch")
def test_without_checkpointing_a_llama_layer_saves_what_its_backward_reads() -> None:
    # Per token, fp32 adapters under autocast: two norm inputs in fp32 (8 h), five bf16 copies of the inputs of
    # q, k, v, gate and up (10 h), of o (2 q) and of down (2 f); rotated q and k, v, the attention output (4 q + 4 kv)
    # and its fp32 row sums (4 heads); gate, up and silu(gate) (6 f); the seven rank-16 products (14 r); two scalars.
    # Per layer: seed and offset of the dropout that flash attention does not do, 512 bytes each once rounded.
    hidden, ffn, query, kv, heads, rank, tokens = 4096, 14336, 4096, 1024, 32, 16, 2048
    per_token = 18 * hidden + 8 * ffn + 6 * query + 4 * kv + 4 * heads + 14 * rank + 8
    low = trace.trace_training({**CONFIGS["llama-3.1-8b"], "num_hidden_layers": 3}, method="lora", seq_len=tokens,
                               gradient_checkpointing=False, loss="none")  # fmt: skip
    high = trace.trace_training({**CONFIGS["llama-3.1-8b"], "num_hidden_layers": 4}, method="lora", seq_len=tokens,
                                gradient_checkpointing=False, loss="none")  # fmt: skip
    assert high.end_of_forward.saved - low.end_of_forward.saved == per_token * tokens + 2 * 512


@pytest.mark.usefixtures("torch")
def test_nf4_with_double_quantisation_takes_4_127_bits_a_weight() -> None:
    found = lora("llama-3.1-8b", 512, method="qlora", adapter_dtype="bf16")
    quantised = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    sixteen_bit = 2 * (8_030_261_248 - quantised)
    # 4 bits, 8 bits per 64 weights, 32 bits per 64 * 256 weights; 1.5 KiB of code tables a matrix
    expected = sixteen_bit + quantised * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    assert found.peak.base == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("torch")
def test_autocast_over_fp32_masters_holds_a_bf16_copy_of_every_linear_weight_at_the_end_of_the_forward_pass() -> None:
    found = lora("qwen3-0.6b", 512, method="full", base_dtype="fp32", gradient_checkpointing=False, loss="none")
    linear = 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072)
    assert found.end_of_forward.weight_casts == 2 * linear


# ----------------------------------------------------------------------------------------------- extrapolation and CUDA


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("qwen3-0.6b", {"gradient_checkpointing": False}),
        ("qwen3-0.6b", {"method": "full", "autocast": False, "optimizer": "adamw_torch"}),
        ("qwen3-0.6b", {"method": "full", "base_dtype": "fp32", "loss": "hf"}),
        ("llama-3.1-8b", {"method": "qlora", "adapter_dtype": "bf16", "seq_len": 512}),
        ("gemma-3-1b", {"seq_len": 512}),
        ("gemma-3-1b", {"seq_len": 8192}),  # here the top layers are the peak, at 512 tokens the bottom ones
        ("gemma-3-4b", {"seq_len": 8192, "gradient_checkpointing": False, "loss": "none"}),
    ],
)
def test_the_extrapolated_trace_equals_the_trace_of_every_layer(model: str, settings: dict[str, Any]) -> None:
    shallow, whole = lora(model, **settings), lora(model, **settings, full_depth=True)
    assert len(shallow.layers_traced) == 2
    ignored = {"seconds", "layers_traced"}
    assert shallow.model_dump(exclude=ignored) == whole.model_dump(exclude=ignored)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lora"},
        {"method": "dora"},
        {"method": "full", "base_dtype": "fp32"},
        {"method": "full", "autocast": False},
    ],
)
def test_the_step_issues_the_operations_that_cuda_would(torch: Any, settings: dict[str, Any]) -> None:
    assert _forward_operations(torch, "cpu", settings) == _forward_operations(torch, "cuda", settings)


def _forward_operations(torch: Any, device: str, settings: dict[str, Any]) -> list[str]:
    """ATen operations of a forward pass on fake tensors of this device, with the shapes and types of their results.

    Fake CUDA tensors run forward without a GPU (their backward does not), under CUDA's own autocast.
    """
    dispatch = importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode
    leaves = importlib.import_module("torch.utils._pytree").tree_iter
    fake = importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode
    autocast = settings.get("autocast", True)
    chosen = {
        "seq_len": 512, "micro_batch": 1, "gradient_checkpointing": False, "loss": "hf", "lora_rank": 16,
        "target_modules": "all-linear", "adapter_dtype": "fp32", "autocast": True, "optimizer": "sgd",
        "base_dtype": "bf16", "kbit_prepare": False, "attention": "flash", "accumulate": False,
        "kernel_workspaces": True, **settings,
    }  # fmt: skip
    step = Step(torch=torch, config=GQA, **chosen)
    seen: list[str] = []

    class Listen(dispatch):  # type: ignore[misc,valid-type]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func._schema.name != "prim::device":
                shapes = [(tuple(t.shape), t.dtype) for t in leaves(out) if isinstance(t, torch.Tensor)]
                seen.append(f"{func._schema.name} {shapes}")
            return out

    with contextlib.ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(as_on_cuda(torch, 1, 512))
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast))
        else:
            stack.enter_context(_cuda_autocast(torch, autocast))
        model = step._prepare(step._meta_model(2))
        stack.enter_context(fake(allow_non_fake_inputs=True))
        with torch.device(device):
            materialise(torch, model)
            ids = torch.zeros(1, 512, dtype=torch.long)
        model.train()
        with Listen():
            model(input_ids=ids, labels=ids, use_cache=False)
    return seen


@contextlib.contextmanager
def _cuda_autocast(torch: Any, enabled: bool) -> Iterator[None]:
    """torch.autocast("cuda") turns itself off without a GPU; the switch behind it does not."""
    asked = torch.is_autocast_enabled
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.is_autocast_enabled = lambda *_: asked("cuda")
    try:
        yield
    finally:
        torch.is_autocast_enabled = asked
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


# ------------------------------------------------------------------------------------------------------------ the table


def test_every_row_of_the_table_adds_up() -> None:
    with TABLE.open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) > 300
    for row in rows:
        assert sum(int(row[f"peak_{name}"]) for name in COMPONENTS) == int(row["peak_bytes"])
        assert int(row["peak_bytes"]) == int(row[f"{row['peak_instant']}_bytes"])


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("model", "settings", "peak"),
    [
        # counted by a second tracer, written apart from this one, over all 36 layers; it lacks the kernel workspaces
        # and counts the optimizer's step counters (504 of 512 bytes), which live on the host
        ("qwen3-8b", {"seq_len": 2048, "loss": "hf"}, 21_278_115_840 - 504 * 512),
        ("qwen3-8b", {"seq_len": 32768}, 37_611_809_792 - 504 * 512),
        ("qwen3-8b", {"seq_len": 8192, "gradient_checkpointing": False}, 83_319_829_504 - 504 * 512),
        ("qwen3-8b", {"seq_len": 8192, "method": "qlora", "adapter_dtype": "bf16"}, 10_773_752_832 - 504 * 512),
    ],
)
def test_the_peak_agrees_with_an_independent_tracer(model: str, settings: dict[str, Any], peak: int) -> None:
    assert lora(model, **settings, kernel_workspaces=False).peak_bytes == peak
