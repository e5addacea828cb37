"""The shape of a model from its config.json: tensors, layers, quantisation, LoRA, and refusals of broken files."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import catalog
from planner.catalog import load_model
from planner.errors import NotModelled, PlannerError, UnknownArchitecture
from planner.model import ModelSpec, lora_parameter_count, lora_targets, spec_from_config

ORACLES = Path(__file__).parents[1] / "oracles"

QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def build(config: dict[str, Any]) -> ModelSpec:
    return spec_from_config(config, "m", "test")


def groups(name: str) -> list[tuple[str, int, int | None]]:
    return [(g.kind, g.count, g.window) for g in catalog.model(name).layers]


# ------------------------------------------------------------------------------------------------------ parameters


def test_qwen3_8b_adds_up_by_hand() -> None:
    attention = 4096 * 4096 + 2 * 1024 * 4096 + 4096 * 4096  # q, k and v, o
    mlp = 3 * 12288 * 4096
    norms = 2 * 4096 + 2 * 128  # before attention and feed-forward; q and k
    by_hand = 2 * 151936 * 4096 + 36 * (attention + mlp + norms) + 4096
    assert build(QWEN3_8B).parameter_count == by_hand == 8_190_735_360


def test_the_first_qwen_counts_both_gated_halves_in_intermediate_size() -> None:
    attention = 3 * 4096 * 4096 + 3 * 4096 + 4096 * 4096  # c_attn with bias, c_proj
    mlp = 3 * 11008 * 4096  # 22016 / 2
    by_hand = 2 * 151936 * 4096 + 32 * (attention + mlp + 2 * 4096) + 4096
    assert catalog.model("qwen-7b").parameter_count == by_hand == 7_721_324_544


def test_a_tied_head_is_counted_once() -> None:
    untied, tied = build(QWEN3_8B), build(QWEN3_8B | {"tie_word_embeddings": True})
    assert untied.parameter_count - tied.parameter_count == 151936 * 4096
    assert not [t for t in tied.tensors if t.part == "lm_head"]


@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", False), ("gemma", True), ("cohere", True), ("starcoder2", True), ("phi", False)]
)
def test_an_unstated_tie_is_what_transformers_assumes(model_type: str, tied: bool) -> None:
    config = {k: v for k, v in QWEN3_8B.items() if k != "tie_word_embeddings"}
    assert build(config | {"model_type": model_type}).tied_embeddings is tied


def test_a_token_of_a_mixture_visits_only_its_experts() -> None:
    spec = catalog.model("qwen3-30b-a3b")
    one_expert = 3 * 2048 * 768
    idle = 48 * (128 - 8) * one_expert  # layers x experts it does not visit
    assert spec.active_parameter_count == 30_532_122_624 - idle == 3_353_032_704


def test_vision_tower_and_text_are_told_apart() -> None:
    # google/gemma-3-4b-it: SigLIP so400m and the projector beside 3,880,263,168 of text
    spec = catalog.model("gemma-3-4b")
    assert spec.text_parameter_count == 3_880_263_168
    assert spec.parameter_count == 4_300_079_472


def test_fields_that_gemma3_leaves_out_are_those_of_its_configuration_class() -> None:
    config = copy.deepcopy(catalog.model_entry("gemma-3-4b").config)
    for field in ("num_attention_heads", "num_key_value_heads"):  # the published file omits both: 8 and 4
        del config["text_config"][field]
    assert build(config).parameter_count == 4_300_079_472


def test_fused_matrices_say_which_rows_are_keys_and_values() -> None:
    (qkv,) = [t for t in catalog.model("phi-4").tensors if t.leaf == "qkv_proj"]
    assert qkv.shape == (7680, 5120)  # 40 + 2 x 10 heads of 128
    assert qkv.kv_rows == 2560


def test_shards_follow_vllm() -> None:
    shards = {t.leaf: t.shard for t in catalog.model("deepseek-v2-lite").tensors if t.part == "attention"}
    assert shards == {"q_proj": "out", "kv_a_proj_with_mqa": "none", "kv_b_proj": "out", "o_proj": "in"}
    shards = {t.leaf: t.shard for t in catalog.model("qwen3-8b").tensors}
    assert (shards["k_proj"], shards["down_proj"], shards["lm_head"], shards["norm"]) == ("kv", "in", "vocab", "none")


# ---------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3-8b", [("full", 36, None)]),
        ("mistral-7b-v0.1", [("sliding", 32, 4096)]),
        ("mistral-7b-v0.3", [("full", 32, None)]),  # sliding_window: null
        ("ministral-8b", [("full", 36, None)]),  # the window is the whole context
        ("phi-4-mini", [("full", 32, None)]),  # a window of 262,144 for a context of 131,072
        ("phi-3-mini", [("sliding", 32, 2047)]),
        ("gemma-2-9b", [("sliding", 21, 4096), ("full", 21, None)]),
        ("gemma-3-27b", [("sliding", 52, 1024), ("full", 10, None)]),  # 62 layers, every sixth full
        ("gpt-oss-20b", [("sliding", 12, 128), ("full", 12, None)]),
        ("olmo-3-7b", [("sliding", 24, 4096), ("full", 8, None)]),
        ("llama-4-scout", [("chunked", 36, 8192), ("full", 12, None)]),
        ("deepseek-v3", [("mla", 61, None)]),
        ("qwen3-coder-next", [("linear", 36, None), ("full", 12, None)]),
        ("qwen2.5-7b", [("full", 28, None)]),  # use_sliding_window: false
    ],
)
def test_layers_by_attention_kind(name: str, expected: list[tuple[str, int, int | None]]) -> None:
    assert groups(name) == expected


def test_qwen_slides_from_max_window_layers_on_when_asked_to() -> None:
    config = QWEN3_8B | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 30}
    assert [(g.kind, g.count) for g in build(config).layers] == [("full", 30), ("sliding", 6)]


def test_latent_attention_keeps_rank_and_rope_for_a_token() -> None:
    (group,) = catalog.model("deepseek-v2-lite").layers
    assert group.latent_dim == 512 + 64
    assert (group.head_dim, group.value_head_dim) == (128 + 64, 128)


def test_a_linear_layer_keeps_a_convolution_window_and_a_matrix_a_head() -> None:
    linear = catalog.model("qwen3-coder-next").layers[0]
    assert linear.conv_state_elements == (2 * 16 * 128 + 32 * 128) * 3  # queries, keys, values; kernel 4
    assert linear.recurrent_state_elements == 32 * 128 * 128


def test_mtp_layers_are_said_to_be_left_out() -> None:
    assert any("multi-token-prediction" in note for note in catalog.model("deepseek-v3").notes)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "linear", "factor": 8.0}, 8 * 40960),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 40960),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32768}, 40960),
    ],
)
def test_rope_scaling_stretches_the_context_once(rope: dict[str, Any], context: int) -> None:
    assert build(QWEN3_8B | {"rope_scaling": rope}).max_context == context


# -------------------------------------------------------------------------------------------------- quantisation

CT_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
            {"method": "fp8", "bits": 8, "block": (128, 128), "activation_bits": 8, "ignored": ("lm_head",)},
        ),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, {"method": "fp8", "group_size": 0, "block": None}),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
            {"method": "awq", "bits": 4, "group_size": 128, "symmetric": False, "activation_bits": 16},
        ),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True, "desc_act": True},
            {"method": "gptq", "bits": 8, "group_size": -1, "symmetric": True},
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": CT_WEIGHTS, "input_activations": {"num_bits": 8}}},
                "ignore": ["lm_head"],
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            },
            {"bits": 8, "group_size": -1, "activation_bits": 8, "ignored": ("lm_head",), "kv_bits": 8},
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}},
            },
            {"bits": 4, "group_size": 128, "activation_bits": 16, "kv_bits": None},
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            {"method": "bitsandbytes", "bits": 4, "group_size": 64, "double_quant": True},
        ),
        ({"quant_method": "mxfp4"}, {"method": "mxfp4", "bits": 4, "group_size": 32}),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"bits": 4, "group_size": 16}),
    ],
)
def test_quantization_config_is_read(config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = build(QWEN3_8B | {"quantization_config": config}).quantization
    assert found is not None
    assert {name: getattr(found, name) for name in expected} == expected


def test_an_unknown_quantisation_is_refused_by_name() -> None:
    with pytest.raises(NotModelled, match="aqlm"):
        build(QWEN3_8B | {"quantization_config": {"quant_method": "aqlm"}})


def test_groups_in_different_formats_are_refused() -> None:
    group = {"g0": {"weights": CT_WEIGHTS}, "g1": {"weights": CT_WEIGHTS | {"num_bits": 4}}}
    with pytest.raises(NotModelled, match="different quantised formats"):
        build(QWEN3_8B | {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": group}})


def compressed(**group: Any) -> dict[str, Any]:
    groups = {"g0": {"weights": CT_WEIGHTS} | group}
    return QWEN3_8B | {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


def test_a_scheme_for_some_modules_alone_is_refused() -> None:
    assert build(compressed(targets=["Linear"])).quantization is not None
    with pytest.raises(NotModelled, match=r"quantises re:\.\*self_attn\.\* alone"):
        build(compressed(targets=["re:.*self_attn.*"]))
    with pytest.raises(NotModelled, match=r"their own GPTQ format \(dynamic\)"):
        build(QWEN3_8B | {"quantization_config": {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*mlp.*": {}}}})


def test_a_broken_regular_expression_among_the_ignored_modules_is_refused() -> None:
    config = compressed()
    config["quantization_config"]["ignore"] = ["lm_head", "re:("]
    with pytest.raises(PlannerError, match=r"quantization_config\.ignore holds a broken regular expression, 're:\('"):
        build(config)


def test_a_float32_checkpoint_has_four_bytes_a_weight() -> None:
    assert build(QWEN3_8B | {"torch_dtype": "float32"}).torch_dtype_bytes == 4
    assert catalog.model("santacoder").torch_dtype_bytes == 4


# ----------------------------------------------------------------------------------------------------------- LoRA


def test_lora_on_attention_adds_up_by_hand() -> None:
    # rank 8 on q and o (4096 + 4096) and k and v (4096 + 1024), 36 layers
    by_hand = 36 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert lora_parameter_count(catalog.model("qwen3-8b"), 8, names) == by_hand == 7_667_712
    assert lora_parameter_count(catalog.model("qwen3-8b"), 8, "attention") == by_hand


def test_attention_means_the_fused_projection_where_there_is_one() -> None:
    assert [t.leaf for t in lora_targets(catalog.model("phi-4"), "attention")] == ["qkv_proj", "o_proj"]


def test_lora_counts_equal_pefts() -> None:
    wrong, rows = [], 0
    with (ORACLES / "lora_counts.csv").open() as file:
        for row in csv.DictReader(file):
            attn = ("q_proj", "k_proj", "v_proj", "o_proj")
            targets: Any = attn if row["targets"] == "attn" else row["targets"]
            try:
                count = str(lora_parameter_count(catalog.model(row["model"]), int(row["rank"]), targets))
            except PlannerError:
                count = "refused"
            rows += 1
            if count != row["trainable"]:
                wrong.append((row, count))
    assert not wrong
    names = {entry.name for entry in catalog.model_entries()}
    with (ORACLES / "params_meta.csv").open() as file:
        known = {row["model"] for row in csv.DictReader(file)} & names
    assert rows == 6 * len(known)  # three kinds of targets at two ranks, for each model transformers knows


@pytest.mark.parametrize("rank", [0, -8])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(PlannerError, match="rank"):
        lora_parameter_count(catalog.model("qwen3-8b"), rank, "attention")


def test_a_target_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(PlannerError, match="gate_up_proj, o_proj, qkv_proj"):
        lora_targets(catalog.model("phi-4"), ("q_proj",))


def test_half_of_a_fused_expert_pair_is_refused() -> None:
    with pytest.raises(PlannerError, match="gate_proj and up_proj"):
        lora_targets(catalog.model("qwen3-30b-a3b"), ("gate_proj",))


def test_pefts_default_is_unknown_for_a_mixture_and_says_so() -> None:
    with pytest.raises(PlannerError, match="no default LoRA targets"):
        lora_targets(catalog.model("qwen3-30b-a3b"), "default")


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": 4096.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 10**5000}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers"),
        ({"vocab_size": 2**26}, "vocab_size"),
        ({"num_key_value_heads": 7}, "num_key_value_heads"),
        ({"max_position_embeddings": math.nan}, "max_position_embeddings"),
        ({"layer_types": ["full_attention"] * 35}, "layer_types"),
        ({"layer_types": ["dense"] * 36, "use_sliding_window": True, "sliding_window": 9}, "layer_types"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"torch_dtype": "int3"}, "dtype"),
        ({"quantization_config": [4]}, "quantization_config"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 400}}, "quantization_config.bits"),
        ({"rope_scaling": {"type": "linear", "factor": math.inf}}, "rope_scaling.factor"),
    ],
)
def test_a_broken_field_is_named_in_one_sentence(change: dict[str, Any], field: str) -> None:
    config = dict(QWEN3_8B)
    if "layer_types" in change:
        config["use_sliding_window"], config["sliding_window"] = True, 4096
    with pytest.raises(PlannerError) as caught:
        build(config | change)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    config = {k: v for k, v in QWEN3_8B.items() if k != "head_dim"} | {"model_type": "llama", "hidden_size": 4100}
    with pytest.raises(PlannerError, match="num_attention_heads must divide hidden_size"):
        build(config)


@pytest.mark.parametrize("kind", ["t5", "mamba2", "", "x" * 10_000])
def test_an_unknown_architecture_is_named(kind: str) -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        build(QWEN3_8B | {"model_type": kind})
    assert kind[:60] in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_unknown_vision_tower_is_named() -> None:
    config = copy.deepcopy(catalog.model_entry("gemma-3-4b").config)
    config["vision_config"]["model_type"] = "intern_vit"
    with pytest.raises(UnknownArchitecture, match="intern_vit"):
        build(config)


@pytest.mark.parametrize(
    "content",
    [
        b'{"model_type": "llama", "hidden_size": 40',
        b"",
        b"[1, 2]",
        b'"llama"',
        b"\xff\xfe\x00broken",
        b"[" * 1_000_000 + b"]" * 1_000_000,
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        b'{"hidden_size": ' + b"9" * 100_000 + b"}",
        b"{" + b" " * (5 << 20) + b"}",
        b'{"model_type": "llama"}',
    ],
    ids=["cut", "empty", "list", "text", "bytes", "deep-list", "deep-object", "long-number", "large", "bare"],
)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(PlannerError) as caught:
        load_model(str(file))
    assert "\n" not in str(caught.value)


# Values that a damaged or hostile config.json may hold where something else belongs.
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, -1, 7, 64, 10**9, 2**31, 2**63, 10**30, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["yarn", "linear", "sliding_attention", "fp8", "gptq", "compressed-tensors", "qwen2_vl", "llama"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["model_type", "factor", "type", "bits", "weights", "a"]), inner, max_size=4)
    ),
    max_leaves=6,
)
ENTRIES = [entry.config for entry in catalog.model_entries()]


def model_or_refusal(config: dict[str, Any]) -> ModelSpec | str:
    """The model, or the one sentence that refuses it; any other exception fails the test."""
    try:
        return build(config)
    except PlannerError as refusal:
        sentence = str(refusal)
    assert "\n" not in sentence
    return sentence


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(v for v in config.values() if isinstance(v, dict))]


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_a_damaged_config_gives_a_model_or_a_refusal_and_nothing_else(data: st.DataObject) -> None:
    config = copy.deepcopy(data.draw(st.sampled_from(ENTRIES)))
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(_sections(config)))
        if not section:
            continue
        field = data.draw(st.sampled_from(sorted(section)))
        if data.draw(st.booleans()):
            section[field] = data.draw(JSON)
        else:
            del section[field]
    answer = model_or_refusal(config)
    if isinstance(answer, str):
        assert len(answer) < 600
    else:
        assert answer.parameter_count > 0
        assert answer.num_layers == config.get("text_config", config).get("num_hidden_layers", answer.num_layers)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*QWEN3_8B, "text_config", "vision_config", "quantization_config"]), JSON))
def test_any_object_gives_a_model_or_a_refusal(config: dict[str, Any]) -> None:
    model_or_refusal(config)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_a_damaged_file_gives_a_model_or_a_refusal(noise: bytes, at: int) -> None:
    raw = json.dumps(QWEN3_8B).encode()
    damaged = raw[:at] + noise + raw[at + len(noise) :]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(damaged)
        with contextlib.suppress(PlannerError):
            load_model(folder)
