"""The command line: whole outputs, exit codes, one sentence on stderr for every bad input, and what it imports."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import pytest
from typer.testing import CliRunner

from planner import catalog
from planner.cli import app
from planner.size import SCHEMA, SizeAnswer

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "tests" / "measured"
SIZE = ("size", "--model", "qwen3-8b", "--ctx", "8k")


GOLDENS = tuple(golden.goldens())


def refused(*argv: str) -> str:
    """The sentence of a refusal: exit code 2, nothing on stdout, one line on stderr and no traceback."""
    outcome = golden.run(argv)
    assert outcome.exit_code == 2, outcome
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("planner: ")
    assert outcome.stderr.endswith("\n")
    assert outcome.stderr.count("\n") == 1
    assert "Traceback" not in outcome.stderr
    return outcome.stderr.removeprefix("planner: ").strip()


# -------------------------------------------------------------------------------------------------- whole outputs


@pytest.mark.parametrize(("case", "columns"), GOLDENS, ids=lambda x: getattr(x, "name", x))
def test_the_whole_output_is_the_golden_file(case: Any, columns: int) -> None:
    # `make golden` rebuilds them
    outcome = golden.run(case.argv, columns)
    assert outcome.exit_code == case.exit_code
    warnings = outcome.stderr.splitlines()
    assert len(warnings) == case.warns
    assert all(line.startswith("planner: machine prices in the sheet") for line in warnings)
    assert golden.folded(outcome.stdout) == case.file(columns).read_text(encoding="utf-8")


def test_every_golden_file_belongs_to_a_case() -> None:
    wanted = {case.file(columns) for case, columns in GOLDENS}
    assert {path for path in golden.GOLDEN.iterdir() if path.is_file()} == wanted


@pytest.mark.parametrize(("case", "columns"), GOLDENS, ids=lambda x: getattr(x, "name", x))
def test_no_line_is_wider_than_the_terminal(case: Any, columns: int) -> None:
    if case.suffix != "txt":
        return
    lines = case.file(columns).read_text(encoding="utf-8").splitlines()
    # a command stays in one piece, so that it can be copied
    assert [line for line in lines if len(line) > columns and "pulumi config set --secret" not in line] == []


def test_the_typer_app_and_the_entry_point_print_the_same() -> None:
    outcome = golden.run((*SIZE, "--csv"))
    assert CliRunner().invoke(app, [*SIZE, "--csv"]).stdout == outcome.stdout


# ------------------------------------------------------------------------------------------------------ as JSON


def test_json_is_nothing_but_the_answer() -> None:
    outcome = golden.run((*SIZE, "--json"))
    assert outcome.stderr == ""
    loaded = json.loads(outcome.stdout)
    assert loaded["schema_version"] == SCHEMA == "tonnage.size/1"
    answer = SizeAnswer.model_validate_json(outcome.stdout)
    assert answer.fits
    assert [(a.task, a.context) for a in answer.answers] == [("serve", 8192), ("finetune", 8192)]
    assert json.loads(answer.model_dump_json()) == loaded


def test_json_of_what_does_not_fit_is_still_json() -> None:
    outcome = golden.run(("size", "--model", "qwen3-8b", "--ctx", "32k", "--gpu", "t4", "--json"))
    assert (outcome.exit_code, outcome.stderr) == (1, "")
    answers = json.loads(outcome.stdout)["answers"]
    assert not any(a["fits"] for a in answers)
    assert all(a["reason"] for a in answers)


@pytest.mark.parametrize(
    "argv",
    [
        ("models", "--json"),
        ("skus", "--json"),
        ("skus", "--all", "--json"),
        ("validate", "serving", str(MEASURED / "inference.csv"), "--json"),
        ("validate", "finetune", str(MEASURED / "training.csv"), "--json"),
    ],
)
def test_every_command_has_json(argv: tuple[str, ...]) -> None:
    outcome = golden.run(argv)
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)


def test_the_json_of_a_validation_counts_its_rows() -> None:
    loaded = json.loads(golden.run(("validate", "finetune", str(MEASURED / "training.csv"), "--json")).stdout)
    summary = loaded["summary"]
    assert loaded["schema_version"] == "tonnage.validation/1"
    assert summary["predicted"] + summary["refused"] == summary["rows"]
    assert len(loaded["rows"]) == summary["predicted"]
    assert len(loaded["refusals"]) == summary["refused"] == sum(summary["refused_reasons"].values())


def test_the_components_in_the_csv_sum_to_their_totals() -> None:
    rows = list(csv.DictReader(io.StringIO(golden.run((*SIZE, "--csv")).stdout)))
    sums: dict[tuple[str, str], int] = {}
    totals: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row["task"], row["context"])
        if row["component"] == "total":
            totals[key] = int(row["expected_bytes"])
        else:
            sums[key] = sums.get(key, 0) + int(row["expected_bytes"])
    assert sums == totals
    assert set(totals) == {("serve", "8192"), ("finetune", "8192")}


# ------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (SIZE, 0),
        ((*SIZE, "--gpu", "a10"), 0),
        ((*SIZE, "--gpu", "t4", "--task", "serve"), 1),
        (("size", "--model", "llama-3.1-405b", "--ctx", "8k", "--task", "finetune", "--method", "full"), 1),
        (("size", "--model", "gemma-3-4b", "--ctx", "1k", "--gpu", "t4", "--task", "serve"), 1),
        (("size", "--model", "qwen3-8b", "--ctx", "2k,32k", "--gpu", "a10", "--task", "serve"), 1),
        (("size", "--model", "llama-3.3-70b", "--ctx", "8k", "--sku", "NC24ads_A100_v4", "--task", "serve"), 1),
        (("models",), 0),
        (("skus",), 0),
        (("--version",), 0),
        (("--help",), 0),
        (("size", "--help"), 0),
    ],
)
def test_the_exit_code_says_whether_it_fits(argv: tuple[str, ...], code: int) -> None:
    outcome = golden.run(argv)
    assert outcome.exit_code == code
    assert outcome.stdout
    assert outcome.stderr == ""


def test_other_spellings_of_the_context_option_are_vllm_s_and_everybody_s() -> None:
    outputs = {
        golden.run(("size", "--model", "qwen3-8b", flag, "8k", "--csv")).stdout for flag in ("--ctx", "--context")
    }
    outputs.add(golden.run(("size", "--model", "qwen3-8b", "--max-model-len", "8192", "--csv")).stdout)
    assert len(outputs) == 1


@pytest.mark.parametrize("argv", [("size",), ("frobnicate",), (*SIZE, "--nope"), (*SIZE, "--task", "sing"), ()])
def test_a_wrong_command_line_is_a_usage_error(argv: tuple[str, ...]) -> None:
    outcome = golden.run(argv)
    assert outcome.exit_code == 2
    assert "Traceback" not in outcome.stderr
    if argv:
        assert outcome.stdout == ""
        assert "Error: " in outcome.stderr


# -------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpu", "a1000"), "'a1000' is not a GPU in the catalog: did you mean"),
        (("--sku", "NC1_T9"), "'NC1_T9' is not an Azure GPU size in the catalog: did you mean"),
        (("--gpu", "a10", "--sku", "NC24ads_A100_v4"), "give one of them"),
        (("--tp", "3"), "32 attention heads, which 3 GPUs cannot share"),
        (("--tp", "16"), "no Azure size has 16 GPUs in one VM"),
        (("--quantization", "foo"), "foo"),
        (("--kv-cache-dtype", "fp7"), "fp7"),
        (("--method", "foo"), "--method 'foo' cannot be planned"),
        (("--optimizer", "foo"), "--optimizer 'foo' cannot be planned"),
        (("--loss", "foo"), "--loss 'foo' cannot be planned"),
        (("--attention", "foo"), "--attention 'foo' cannot be planned"),
        (("--parallelism", "foo"), "--parallelism 'foo' cannot be planned"),
        (("--adapter-dtype", "fp8"), "--adapter-dtype 'fp8' cannot be planned"),
        (("--weights-dtype", "int3"), "--weights-dtype 'int3' cannot be planned"),
        (("--trainer", "foo"), "no trainer is called 'foo'"),
        (("--offload", "disk"), "disk"),
        (("--headroom", "3"), "a headroom of 3 is not a share"),
        (("--headroom", "1"), "a headroom of 1 is not a share"),
        (("--headroom", "-0.1"), "a headroom of -0.1 is not a share"),
        (("--headroom", "nan"), "a headroom of nan is not a share"),
        (("--rope-scaling", "junk"), "'junk' is not a rope extension"),
        (("--rope-scaling", ""), "'' is not a rope extension"),
        (("--rope-scaling", "yarn:0"), "'yarn:0' is not a rope extension"),
        (("--rope-scaling", "yarn:1000"), "'yarn:1000' is not a rope extension"),
        (("--micro-batch", "0"), "--micro-batch 0 cannot be planned"),
        (("--lora-rank", "0"), "--lora-rank 0 cannot be planned"),
        (("--block-size", "0"), "--block-size 0 cannot be planned"),
        (("--pp", "0"), "parallel sizes start at 1"),
        (("--max-num-seqs", "0"), "--max-num-seqs 0 cannot be planned"),
        (("--gpu-memory-utilization", "1.5"), "--gpu-memory-utilization 1.5 cannot be planned"),
        (("--gpu-memory-utilization", "nan"), "--gpu-memory-utilization nan cannot be planned"),
        (("--draft-model", "nope"), "'nope' is not in the model catalog"),
        (("--offload", "disk"), "--offload disk cannot be planned"),
        (("--offload", "parameters"), "parameters are offloaded only by --parallelism"),
        (("--method", "full", "--weights-dtype", "fp16"), "fp16 weights cannot be trained in full"),
        (("--lora-targets", "zebra"), "has none of these LoRA targets"),
        (("--n-gpus", "2"), "2 GPUs need a --parallelism"),
        (("--num-speculative-tokens", "3"), "needs a model that drafts them"),
        (("--num-speculative-tokens", "-3", "--draft-model", "qwen3-0.6b"), "--num-speculative-tokens -3"),
        (("--json", "--csv"), "give one of them"),
        (("--gpu", ""), "--gpu is empty"),
        (("--sku", " "), "--sku is empty"),
        (("--block-size", "8"), "--block-size 8 is not a multiple of 16"),
        (("--enable-lora", "--max-lora-rank", "24"), "vLLM has no --max-lora-rank 24: choose one of 1, 8, 16"),
        (("--draft-model", "llama-3.2-1b"), "vLLM refuses a draft with another vocabulary"),
        (("--offload", "activations", "--no-gradient-checkpointing"), "add --gradient-checkpointing"),
        (("--pp", "16"), "no Azure size has 16 GPUs in one VM: lower --tp or --pp"),
        (
            ("--task", "finetune", "--n-gpus", "16", "--parallelism", "fsdp2"),
            "no Azure size has 16 GPUs in one VM: lower --n-gpus",
        ),
        (("--tp", "4", "--pp", "2", "--sku", "NC24ads_A100_v4"), "has 1 GPU, not 8"),
    ],
)
def test_a_bad_option_is_refused_in_one_sentence(options: tuple[str, ...], words: str) -> None:
    assert words in refused(*SIZE, *options)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ("0", "a context of 0 tokens cannot be planned"),
        ("-5", "'-5' is not a token count"),
        ("abc", "'abc' is not a token count"),
        ("1e5", "'1e5' is not a token count"),
        ("1.5", "'1.5' is not a whole number of tokens"),
        ("nan", "'nan' is not a token count"),
        ("", "no context was given"),
        (",", "no context was given"),
        ("9" * 400, "is not a token count"),
        (
            "9" * 30,
            "999,999,999,999,999,999,999,999,999,999 tokens are beyond qwen3-8b's context of 40,960: lower --ctx",
        ),
        ("40961", "40,961 tokens are beyond qwen3-8b's context of 40,960"),
        ("8k,0", "a context of 0 tokens cannot be planned"),
        (",".join(["8k"] * 65), "65 contexts are too many for one table"),
    ],
)
def test_a_bad_context_is_refused_in_one_sentence(context: str, words: str) -> None:
    assert words in refused("size", "--model", "qwen3-8b", "--ctx", context)


@pytest.mark.parametrize("model", ["qwen9-99b", "x" * 5000, "", "a/b/c", "..", "/nowhere/at/all", "./nothing.json"])
def test_a_model_that_is_nowhere_is_refused_in_one_sentence(model: str) -> None:
    assert len(refused("size", "--model", model, "--ctx", "8k")) < 400


def test_a_hub_id_without_a_network_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sentence = refused("size", "--model", "nobody-at-all/no-such-model", "--ctx", "8k")
    assert "the Hugging Face hub cannot be reached: go online, or download its config.json" in sentence


def _config(**changes: Any) -> str:
    config = {**catalog.model_entry("qwen3-8b").config, **changes}
    return json.dumps({key: value for key, value in config.items() if value is not ...})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "qwen3", "hidden_si', "is not a JSON file that can be read"),
        ("", "is not a JSON file that can be read"),
        ("\x00\xff", "is not a JSON file that can be read"),
        ("[]", "does not hold a JSON object"),
        ("null", "does not hold a JSON object"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "is not a JSON file that can be read"),
        ("[" * 5_000_000 + "]" * 5_000_000, "has 10,000,000 bytes, more than the 4 MiB"),
        (_config(num_hidden_layers=10**30), "num_hidden_layers must be between 1 and"),
        (_config(hidden_size=10**300), "hidden_size must be between 1 and"),
        (_config(vocab_size=1e308), "vocab_size must be a whole number"),
        (_config(num_hidden_layers="many"), "num_hidden_layers must be a whole number, not 'many'"),
        (_config(hidden_size=[1]), "hidden_size must be a whole number"),
        (_config(num_attention_heads=-4), "num_attention_heads must be between 1 and"),
        (_config(num_key_value_heads=0), "num_key_value_heads must be between 1 and"),
        (_config(hidden_size=...), "hidden_size is missing"),
        (_config(model_type=...), "model_type is missing"),
        (_config(model_type="mamba9"), "model_type 'mamba9', whose tensors are not known here"),
    ],
    ids=range(17),
)
def test_a_config_that_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert words in refused("size", "--model", str(tmp_path), "--ctx", "1k")
    assert words in refused("size", "--model", str(tmp_path / "config.json"), "--ctx", "1k")


def test_a_folder_without_a_config_is_refused_in_one_sentence(tmp_path: Path) -> None:
    assert "config.json is not there" in refused("size", "--model", str(tmp_path), "--ctx", "1k")


def test_a_good_config_in_a_folder_is_planned_like_the_catalog_s(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(_config(), encoding="utf-8")
    ours = json.loads(golden.run((*SIZE[:2], str(tmp_path), "--ctx", "8k", "--json")).stdout)
    theirs = json.loads(golden.run((*SIZE, "--json")).stdout)
    assert ours["model"] == str(tmp_path)
    assert [a["needed_bytes"] for a in ours["answers"]] == [a["needed_bytes"] for a in theirs["answers"]]


@pytest.mark.parametrize("table", ["serving", "finetune"])
def test_a_table_that_cannot_be_read_is_refused_in_one_sentence(tmp_path: Path, table: str) -> None:
    assert "cannot be read as a CSV file" in refused("validate", table, str(tmp_path / "absent.csv"))
    assert "cannot be read as a CSV file" in refused("validate", table, str(tmp_path))
    short = tmp_path / "short.csv"
    short.write_text("id,model\n1,qwen3-8b\n", encoding="utf-8")
    assert "lacks the columns " in refused("validate", table, str(short))
    short.write_bytes(b"\xff\xfe\x00id")
    assert "short.csv" in refused("validate", table, str(short))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("models", "--use-case", "zzz"), "'zzz' is not a use case of the catalog"),
        (("models", "--recommend"), "a recommendation needs a use case"),
        (("models", "--min-context", "abc"), "'abc' is not a token count"),
        (("models", "--max-parameters", "0.0001"), "no model of the catalog matches"),
        (("models", "--license", "zzz"), "no model of the catalog matches"),
        (("skus", "--gpu", "zzz"), "'zzz' is not a GPU in the catalog"),
        (("skus", "--region", "mars"), "'mars' is not a region with a priced GPU size"),
    ],
)
def test_a_filter_that_matches_nothing_is_refused_in_one_sentence(argv: tuple[str, ...], words: str) -> None:
    assert words in refused(*argv)


# ------------------------------------------------------------------------------------------------- real processes


def _process(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")}
    clean |= {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(argv, capture_output=True, text=True, env=clean | env, timeout=60, check=False)


@pytest.mark.parametrize("script", ["planner", "tonnage"])
def test_both_installed_scripts_run_the_same_app(script: str) -> None:
    done = _process(str(Path(sys.executable).with_name(script)), *SIZE, "--csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == golden.run((*SIZE, "--csv")).stdout


def test_a_refusal_of_the_installed_script_is_one_line_and_code_2() -> None:
    done = _process(str(Path(sys.executable).with_name("planner")), *SIZE, "--gpu", "zzz")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("planner: 'zzz' is not a GPU")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_stops_early_gets_no_traceback() -> None:
    script = Path(sys.executable).with_name("planner")
    done = _process("bash", "-c", f"'{script}' skus --all --json | head -c 10")
    assert done.stderr == ""
    assert len(done.stdout) == 10


HEAVY = ("torch", "transformers", "peft", "trl", "vllm", "pulumi", "numpy", "httpx", "huggingface_hub", "pandas")


@pytest.mark.parametrize("form", ["--csv", "--json", "--explain"])
def test_size_imports_no_heavy_package(form: str) -> None:
    code = (
        "import sys\n"
        "from planner.cli import main\n"
        f"sys.argv = ['planner', *{SIZE!r}, {form!r}]\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    done = _process(sys.executable, "-c", code)
    assert done.returncode == 0
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "planner" in loaded
    assert not loaded & set(HEAVY)


def test_a_path_is_printed_as_it_is_and_never_read_as_markup(tmp_path: Path) -> None:
    folder = tmp_path / "m[red]y[bold]"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(catalog.model_entry("qwen3-4b").config))
    result = CliRunner().invoke(app, ["size", "--model", str(folder), "--ctx", "8k", "--task", "serve"])
    assert result.exit_code == 0
    assert "m[red]y[bold]" in result.stdout.replace("\n", "")


def test_a_stated_training_parallelism_decides_how_many_gpus_are_used() -> None:
    argv = "size --model qwen3-8b --ctx 8k --task finetune --method full --n-gpus 4 --parallelism zero3 --json"
    result = CliRunner().invoke(app, argv.split())
    (row,) = json.loads(result.stdout)["answers"]
    assert row["gpus"] == 4


@pytest.mark.parametrize("number", ["nan", "-1", "0"])
def test_a_size_that_no_model_has_finds_none(number: str) -> None:
    assert "no model of the catalog matches" in refused("models", "--max-parameters", number)
