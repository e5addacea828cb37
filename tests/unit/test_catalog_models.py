"""The model catalog: every record equals its oracle, names match forgivingly, the hub is answered in one sentence."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from planner import catalog
from planner.catalog import load_model, model, model_entries, model_entry
from planner.errors import PlannerError

ORACLES = Path(__file__).parents[1] / "oracles"

# Models whose code lives in their own hub repository, so that transformers builds none to compare with: the total of
# the tensors on the model's page (safetensors metadata, or the model card).
HUB_ONLY = {
    "qwen-1.8b": 1_836_828_672,  # Qwen/Qwen-1_8B-Chat
    "qwen-7b": 7_721_324_544,  # Qwen/Qwen-7B-Chat
    "qwen-14b": 14_167_290_880,  # Qwen/Qwen-14B-Chat
    "qwen-72b": 72_287_920_128,  # Qwen/Qwen-72B-Chat
    "chatglm3-6b": 6_243_584_000,  # THUDM/chatglm3-6b
    "baichuan2-7b": 7_505_973_248,  # baichuan-inc/Baichuan2-7B-Chat
    "baichuan2-13b": 13_896_668_160,  # baichuan-inc/Baichuan2-13B-Chat
    "kimi-vl-a3b": 16_407_657_776,  # moonshotai/Kimi-VL-A3B-Instruct; 1,728 elements more than the shapes explain
}
LISTED_NAMES = """
qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b qwen3-32b qwen3-30b-a3b qwen3-235b-a22b qwen3-coder-30b-a3b
qwen3-coder-next qwen2.5-0.5b qwen2.5-7b qwen2.5-14b qwen2.5-72b qwen2.5-coder-32b llama-3.1-8b llama-3.1-70b
llama-3.1-405b llama-3.2-1b llama-3.2-3b llama-3.3-70b llama-4-scout mistral-7b-v0.1 mistral-7b-v0.3 mistral-nemo-12b
mistral-small-3.1-24b mixtral-8x7b phi-3-mini phi-3-medium phi-4 phi-4-mini gemma-2-2b gemma-2-9b gemma-2-27b gemma-3-1b
gemma-3-4b gemma-3-12b gemma-3-27b gpt-oss-20b gpt-oss-120b deepseek-v2-lite deepseek-v3 deepseek-r1-distill-qwen-32b
yi-coder-9b granite-3.3-8b
"""


def oracle() -> dict[str, dict[str, str]]:
    with (ORACLES / "params_meta.csv").open() as file:
        return {row["model"]: row for row in csv.DictReader(file)}


# ------------------------------------------------------------------------------------------------------ the records


def test_the_catalog_lists_the_models_it_promises() -> None:
    assert sorted(e.name for e in model_entries() if e.listed) == sorted(LISTED_NAMES.split())


@pytest.mark.parametrize("entry", model_entries(), ids=lambda e: e.name)
def test_parameters_equal_transformers(entry: catalog.ModelEntry) -> None:
    spec = model(entry.name)
    row = oracle().get(entry.name)
    if row is None:
        assert entry.name in HUB_ONLY, f"{entry.name} has no row in params_meta.csv: run tests/oracles/params_meta.py"
        assert spec.parameter_count == pytest.approx(HUB_ONLY[entry.name], rel=2e-7)
    else:
        assert spec.parameter_count == int(row["parameters"]) + int(row["persistent_buffers"])
        assert spec.text_parameter_count == int(row["text_only"])
    assert entry.parameter_count == spec.parameter_count


def test_no_oracle_row_is_left_over() -> None:
    assert set(oracle()) | set(HUB_ONLY) == {e.name for e in model_entries()}
    assert not set(oracle()) & set(HUB_ONLY)


@pytest.mark.parametrize("entry", model_entries(), ids=lambda e: e.name)
def test_a_record_is_complete(entry: catalog.ModelEntry) -> None:
    spec = model(entry.name)
    assert spec.name == entry.name
    assert spec.hub_id == entry.hub_id
    assert spec.source == entry.source
    assert spec.max_context == entry.max_context >= 2048
    assert spec.num_layers > 0
    assert entry.hub_id.split("/")[0] in entry.source
    assert entry.as_of <= date.today()
    assert entry.license
    assert entry.use_cases
    assert set(entry.use_cases) <= set(catalog._data()["use_cases"])
    assert len(entry.released) == 7
    assert entry.released <= "2026-11"


def test_a_vision_model_says_so_and_no_other_does() -> None:
    for entry in model_entries():
        seen = any(t.part == "vision" for t in model(entry.name).tensors)
        assert seen == ("vision" in entry.use_cases), entry.name


def test_published_totals_hold() -> None:
    # As the hub's model pages state them from safetensors metadata.
    published = {
        "qwen3-235b-a22b": 235_093_634_560,
        "qwen3-coder-next": 79_674_391_296,
        "llama-3.1-405b": 405_853_388_800,
        "llama-4-scout": 108_641_793_536,
        "mixtral-8x7b": 46_702_792_704,
        "mistral-small-3.1-24b": 24_011_361_280,
        "gemma-3-27b": 27_432_406_640,
        "deepseek-v2-lite": 15_706_484_224,
        "phi-4": 14_659_507_200,
    }
    assert {name: model(name).parameter_count for name in published} == published


def test_reading_the_catalog_takes_milliseconds() -> None:
    def seconds(work: Callable[[], object], *caches: Any) -> float:
        best = 1.0
        for _ in range(5):
            for cached in caches:
                cached.cache_clear()
            began = time.process_time()
            work()
            best = min(best, time.process_time() - began)
        return best

    assert seconds(catalog._data, catalog.read_facts) < 0.010
    assert seconds(lambda: model("llama-4-scout"), catalog._spec_of) < 0.010


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("Qwen3-8B", "qwen3-8b"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("qwen3 8b", "qwen3-8b"),
        ("Llama 3.1 8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("NousResearch/Hermes-3-Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-2-70b-hf", "llama-2-70b"),
        ("NousResearch/Llama-2-70b-chat-hf", "llama-2-70b"),
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral-small-3.1-24b"),
        ("google/gemma-3-12b-it", "gemma-3-12b"),
        ("microsoft/Phi-4", "phi-4"),
        ("microsoft/phi-1_5", "phi-1.5"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-v2-lite"),
        ("Qwen-7B(-Chat)", "qwen-7b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b-2507"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
    ],
)
def test_a_name_is_matched_forgivingly(asked: str, name: str) -> None:
    assert model_entry(asked).name == name
    assert model(asked).quantization is None


@pytest.mark.parametrize(
    ("asked", "name", "expected"),
    [
        ("RedHatAI/Llama-3.3-70B-Instruct-quantized.w8a8", "llama-3.3-70b", ("compressed-tensors", 8, -1, 8)),
        ("RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", "llama-3.3-70b", ("compressed-tensors", 8, -1, 8)),
        ("redhatai/Qwen2.5-7B-Instruct-quantized.w4a16", "qwen2.5-7b", ("compressed-tensors", 4, 128, 16)),
        ("Qwen/Qwen3-8B-FP8", "qwen3-8b", ("fp8", 8, 0, 8)),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8", "llama-3.1-8b", ("compressed-tensors", 8, 0, 8)),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "qwen2.5-7b", ("awq", 4, 128, 16)),
        ("gaunernst/gemma-3-27b-it-int4-awq", "gemma-3-27b", ("awq", 4, 128, 16)),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "qwen2.5-7b", ("gptq", 4, 128, 16)),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8", "qwen2.5-7b", ("gptq", 8, 128, 16)),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "mistral-7b-v0.1", ("gptq", 4, 128, 16)),
        ("unsloth/meta-llama-3.1-8b-instruct-bnb-4bit", "llama-3.1-8b", ("bitsandbytes", 4, 64, 16)),
        ("unsloth/Qwen3-14B-Base-unsloth-bnb-4bit", "qwen3-14b", ("bitsandbytes", 4, 64, 16)),
        ("openai/gpt-oss-20b", "gpt-oss-20b", ("mxfp4", 4, 32, 16)),
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1", ("fp8", 8, 0, 8)),
    ],
)
def test_the_end_of_a_name_tells_how_it_is_stored(asked: str, name: str, expected: tuple[str, int, int, int]) -> None:
    spec = model(asked)
    q = spec.quantization
    assert q is not None
    assert (q.method, q.bits, q.group_size, q.activation_bits) == expected
    assert spec.tensors == model(name).tensors


def test_a_16_bit_copy_of_a_quantised_model_is_16_bit() -> None:
    assert model("unsloth/gpt-oss-20b-BF16").quantization is None


def test_a_re_upload_keeps_its_own_address() -> None:
    spec = model("RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic")
    assert spec.hub_id == "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic"
    assert "one scale per output channel" in spec.source


@pytest.mark.parametrize("asked", ["lama-3.1-8b", "llama-3-18b", "qwen4-8b", "gpt-5", "", "a" * 5000, "\x00"])
def test_an_unknown_name_is_answered_with_the_nearest(asked: str) -> None:
    with pytest.raises(PlannerError) as caught:
        model(asked)
    assert "catalog" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_nearest_name_is_near() -> None:
    with pytest.raises(PlannerError, match=r"the nearest are llama-3\.1-8b"):
        model("lama-3.1-8b")


# ------------------------------------------------------------------------------------------------- folders and hub


def test_a_folder_and_its_file_are_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model_entry("phi-4").config))
    from_folder, from_file = load_model(str(tmp_path)), load_model(str(tmp_path / "config.json"))
    assert from_folder.tensors == from_file.tensors == model("phi-4").tensors
    assert from_folder.source == str(tmp_path / "config.json")


def test_a_folder_named_like_a_model_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qwen3-8b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_model("qwen3-8b") == model("qwen3-8b")


@pytest.mark.parametrize("text", ["/nowhere/at/all", "./missing", "missing.json", "", "x\x00y", "a" * 5000, "a b/c d"])
def test_what_is_nowhere_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(PlannerError) as caught:
        load_model(text)
    assert "\n" not in str(caught.value)


TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
# 32 x 8 embedding; 2 layers of 4 x 8 x 8 attention, 3 x 16 x 8 feed-forward, 2 x 8 norms; 8 at the end
TINY_PARAMETERS = 256 + 2 * (256 + 384 + 16) + 8


def _header(elements: int) -> bytes:
    """A safetensors file's head: one tensor of that many elements, and a head that is tied to it."""
    tensors = {
        "model.embed_tokens.weight": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]},
        "lm_head.weight": {"dtype": "BF16", "shape": [256], "data_offsets": [2 * elements, 2 * elements + 512]},
    }
    body = json.dumps(tensors).encode()
    return len(body).to_bytes(8, "little") + body


FILES = {
    "org/good": {"config.json": json.dumps(TINY).encode(), "model.safetensors": _header(TINY_PARAMETERS)},
    "org/liar": {"config.json": json.dumps(TINY).encode(), "model.safetensors": _header(9999)},
    "org/bin": {"config.json": json.dumps(TINY).encode(), "pytorch_model.bin": b"x"},
    "org/cut": {"config.json": b'{"model_type": "lla'},
    "org/gguf": {"model.gguf": b"x"},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as loading a model touches: an API record, and files with range requests."""

    def _file(self) -> tuple[int, bytes, str]:
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            if repo in FILES:
                record = {"id": repo, "sha": "a" * 40, "siblings": [{"rfilename": f} for f in FILES[repo]]}
                return 200, json.dumps(record).encode(), ""
            return 401, b"{}", "RepoNotFound"
        repo, _, name = path.partition("/resolve/")
        if repo == "org/gated":
            return 403, b"", "GatedRepo"
        if repo not in FILES:
            return 401, b"", "RepoNotFound"
        name = name.partition("/")[2]
        if name not in FILES[repo]:
            return 404, b"", "EntryNotFound"
        return 200, FILES[repo][name], ""

    def do_GET(self) -> None:
        status, body, code = self._file()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("X-Repo-Commit", "a" * 40)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


ASK = """
import sys, warnings
warnings.simplefilter("error")
from planner.catalog import load_model
from planner.errors import PlannerError
assert "huggingface_hub" not in sys.modules
try:
    spec = load_model(sys.argv[1])
    print("ok", spec.hub_id, spec.parameter_count, spec.source)
except PlannerError as error:
    print("refused", error)
"""


def ask(hub_id: str, cache: Path, **environment: str) -> str:
    """load_model in a process of its own: huggingface_hub reads its environment when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, hub_id],
        capture_output=True,
        text=True,
        timeout=60,
        env=kept | {"HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_model_is_read_and_checked_against_its_tensors(endpoint: str, tmp_path: Path) -> None:
    answer = ask("org/good", tmp_path, HF_ENDPOINT=endpoint)
    source = "org/good config.json, checked against its safetensors headers"
    assert answer == f"ok org/good {TINY_PARAMETERS} {source}"


@pytest.mark.parametrize(
    ("hub_id", "said"),
    [
        ("org/liar", "the checkpoint of org/liar holds 9,999 parameters, but its config.json describes 1,576"),
        ("org/cut", "is not a JSON file that can be read"),
        ("org/gguf", "has no config.json"),
        ("org/absent", "neither in the catalog nor on the Hugging Face hub"),
        ("org/gated", "asks for its licence to be accepted"),
    ],
)
def test_the_hub_is_answered_in_one_sentence(endpoint: str, tmp_path: Path, hub_id: str, said: str) -> None:
    answer = ask(hub_id, tmp_path, HF_ENDPOINT=endpoint)
    assert answer.startswith("refused ")
    assert said in answer
    assert "\n" not in answer


def test_weights_that_are_not_safetensors_leave_the_count_unchecked(endpoint: str, tmp_path: Path) -> None:
    assert ask("org/bin", tmp_path, HF_ENDPOINT=endpoint).endswith("not checked against its tensors")


def test_offline_a_model_that_was_read_before_is_still_known(endpoint: str, tmp_path: Path) -> None:
    refused = ask("org/good", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert refused.startswith("refused org/good is not in the catalog and the Hugging Face hub cannot be reached")
    ask("org/good", tmp_path, HF_ENDPOINT=endpoint)
    again = ask("org/good", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert again.startswith(f"ok org/good {TINY_PARAMETERS}")
    assert again.endswith("not checked against its tensors")


def test_a_hub_that_does_not_answer_is_said_to_be_out_of_reach(tmp_path: Path) -> None:
    answer = ask("org/good", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")  # the discard port: nothing listens
    assert answer.startswith("refused org/good is not in the catalog and the Hugging Face hub cannot be reached")
