"""The commands. Each reads its options, asks one function of the planner, and prints its answer.

Exit codes: 0 done, 1 does not fit or over budget, 2 usage or bad input, 3 a check against reality failed.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

from planner.errors import DOES_NOT_FIT, PlannerError
from planner.units import parse_tokens

app = typer.Typer(
    name="planner",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Capacity planner for small language models on Azure: bytes, GPU, VM size.",
)
validate_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Predictions against measurements.")
app.add_typer(validate_app, name="validate")

Option = typer.Option


def _serve(text: str, *names: str, **more: Any) -> Any:
    """An option of serving, under vLLM's own name."""
    return typer.Option(*names, help=f"Serving: {text}", **more)


def _train(text: str, *names: str, **more: Any) -> Any:
    """An option of fine-tuning."""
    return typer.Option(*names, help=f"Fine-tuning: {text}", **more)


def main() -> None:
    """Run the app: a refusal is one sentence on stderr and an exit code, no traceback."""
    try:
        app()
    except PlannerError as error:
        print(f"planner: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"tonnage {installed('tonnage')}")
        raise typer.Exit


@app.command()
def size(
    model: Annotated[str, Option(help="Catalog name, folder, config.json or hub id.")],
    ctx: Annotated[
        str, Option("--ctx", "--max-model-len", "--context", help="Tokens: 32768, 32k, or several: 2k,8k,32k.")
    ],
    task: Annotated[Literal["serve", "finetune", "both"], Option(help="What the GPU is for.")] = "both",
    gpu: Annotated[str | None, Option(help="Plan for this card (a desk, or any cloud) instead of Azure sizes.")] = None,
    sku: Annotated[str | None, Option(help="Plan for this Azure VM size instead of searching.")] = None,
    tp: Annotated[
        int | None, Option("--tp", "--tensor-parallel-size", help="GPUs of one VM to spread over.", min=1)
    ] = None,
    headroom: Annotated[
        float | None, Option(help="Share of each GPU to leave free. [default: 0 serving, 0.05 fine-tuning]")
    ] = None,
    rope_scaling: Annotated[str | None, Option(help="Rope extension you will serve with, such as yarn:4.")] = None,
    concurrency: Annotated[int, _serve("sequences at the full context at once.", min=1)] = 1,
    quantization: Annotated[
        str | None, _serve("weights as fp8, awq, gptq, w4a16, bitsandbytes ...", "--quantization", "-q")
    ] = None,
    kv_cache_dtype: Annotated[str, _serve("auto or fp8.")] = "auto",
    gpu_memory_utilization: Annotated[
        float | None, _serve("share of the GPU that vLLM takes. [default: its own]")
    ] = None,
    max_num_seqs: Annotated[int | None, _serve("sequences in one batch. [default: vLLM's for the card]")] = None,
    max_num_batched_tokens: Annotated[int | None, _serve("tokens of a step. [default: vLLM's for the card]")] = None,
    block_size: Annotated[int, _serve("tokens of a KV block.")] = 16,
    pipeline_parallel_size: Annotated[int, _serve("pipeline stages.", "--pp", "--pipeline-parallel-size")] = 1,
    enforce_eager: Annotated[bool, _serve("no CUDA graphs.", "--enforce-eager")] = False,
    enable_prefix_caching: Annotated[bool, _serve("keep the KV of shared prefixes.")] = True,
    disable_hybrid_kv_cache_manager: Annotated[
        bool, _serve("every layer keeps the whole context.", "--disable-hybrid-kv-cache-manager")
    ] = False,
    enable_lora: Annotated[bool, _serve("slots for adapters.", "--enable-lora")] = False,
    max_loras: Annotated[int, _serve("adapters in one batch.")] = 1,
    max_lora_rank: Annotated[int, _serve("largest adapter rank.")] = 16,
    draft_model: Annotated[str | None, _serve("model that drafts tokens (speculative decoding).")] = None,
    num_speculative_tokens: Annotated[int, _serve("tokens drafted a step.")] = 0,
    engine_version: Annotated[str | None, _serve("vLLM version, such as 0.19.0. [default: the catalog's]")] = None,
    method: Annotated[str, _train("full, lora, qlora, dora or qdora.")] = "qlora",
    trainer: Annotated[str, _train("whose defaults: trl, transformers, unsloth, torchtune, litgpt ...")] = "trl",
    micro_batch: Annotated[int, _train("sequences a GPU takes at once.")] = 1,
    gradient_accumulation_steps: Annotated[int, _train("above 1 the gradients stay alive.")] = 1,
    lora_rank: Annotated[int, _train("rank of the adapter.", "--lora-rank", "--lora-r")] = 16,
    lora_targets: Annotated[str, _train("all-linear, attention, default, or modules with commas.")] = "all-linear",
    adapter_dtype: Annotated[str | None, _train("bf16 or fp32. [default: the trainer's]")] = None,
    weights_dtype: Annotated[str, _train("bf16, fp16 or fp32 (fp32 masters under autocast).")] = "bf16",
    optimizer: Annotated[
        str | None, _train("adamw_torch_fused, adamw_torch, adamw_8bit, sgd ... [default: the trainer's]")
    ] = None,
    loss: Annotated[str | None, _train("chunked, liger, hf, in_place ... [default: the trainer's]")] = None,
    gradient_checkpointing: Annotated[
        bool | None, _train("recompute the layers in the backward. [default: the trainer's]")
    ] = None,
    attention: Annotated[str | None, _train("flash, efficient or eager. [default: what the card allows]")] = None,
    parallelism: Annotated[str, _train("none, ddp, zero1, zero2, zero3, fsdp or fsdp2.")] = "none",
    n_gpus: Annotated[int, _train("GPUs of the run.", min=1)] = 1,
    offload: Annotated[str, _train("optimizer, parameters, activations; several with commas.")] = "",
    dpo: Annotated[bool, _train("DPO: two sequences a sample and a reference model.", "--dpo")] = False,
    explain: Annotated[bool, Option("--explain", help="Formula, inputs and source of every component.")] = False,
    trace: Annotated[bool, Option("--trace", help="Run the training step on fake tensors too (extra: trace).")] = False,
    as_json: Annotated[bool, Option("--json", help="JSON on stdout.")] = False,
    as_csv: Annotated[bool, Option("--csv", help="CSV on stdout, one line a component.")] = False,
) -> None:
    """VRAM budget of a model at context lengths, and the smallest GPU or Azure size that fits."""
    from planner import report
    from planner import size as sizing

    if as_json and as_csv:
        raise PlannerError("--json and --csv both write to stdout: give one of them")
    spec, request = sizing.request_from_options(locals())
    answer = sizing.size(spec, request)
    if trace:
        import gc

        from planner import exact

        gc.enable()  # torch makes more garbage than a short command may keep
        answer = exact.with_traces(model, request, answer)
    report.emit_size(answer, as_json=as_json, as_csv=as_csv, explain=explain)
    if not answer.fits:
        raise typer.Exit(DOES_NOT_FIT)


@app.command()
def models(
    use_case: Annotated[str | None, Option(help="Only models for this use case: chat, code, reasoning ...")] = None,
    max_parameters: Annotated[float | None, Option(help="Only models up to this many billion parameters.")] = None,
    min_context: Annotated[str | None, Option(help="Only models with at least this context, such as 128k.")] = None,
    licence: Annotated[str | None, Option("--license", "--licence", help="Part of the licence's name.")] = None,
    recommend: Annotated[
        bool, Option("--recommend", help="The best fit for the use case first, with the reason.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """The models of the catalog, filtered."""
    from planner import report
    from planner.catalog import select_models

    entries = select_models(
        use_case=use_case,
        max_parameters=None if max_parameters is None else max_parameters * 1e9,
        min_context=None if min_context is None else parse_tokens(min_context),
        licence=licence,
        recommend=recommend,
    )
    report.emit_models(entries, as_json=as_json)


@app.command()
def skus(
    gpu: Annotated[str | None, Option(help="Only sizes with this card.")] = None,
    region: Annotated[str | None, Option(help="Only sizes priced in this region.")] = None,
    everything: Annotated[bool, Option("--all", help="Retired and unpublished sizes too.")] = False,
    as_json: Annotated[bool, Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Azure's GPU sizes, and the cards that --gpu of `planner size` takes."""
    from planner import report
    from planner.catalog.hardware import gpus, select_skus

    sizes = select_skus(gpu_name=gpu, region=region, everything=everything)
    report.emit_skus(sizes, () if gpu or region else gpus(), as_json=as_json)


File = Annotated[str, typer.Argument(metavar="FILE.csv", help="Measurements, one run a row.")]
Json = Annotated[bool, Option("--json", help="JSON on stdout.")]
Summary = Annotated[bool, Option("--summary", help="Without the rows.")]


@validate_app.command("serving")
def validate_serving(file: File, as_json: Json = False, summary: Summary = False) -> None:
    """vLLM start-up logs: weights, activation peak, KV cache, tokens."""
    from planner import report
    from planner.validate import load_rows, validate_serving

    report.emit_validation(validate_serving(load_rows(file)), as_json=as_json, summary=summary)


@validate_app.command("finetune")
def validate_finetune(file: File, as_json: Json = False, summary: Summary = False) -> None:
    """Training runs: peak memory, and whether runs that ran out of it were predicted to."""
    from planner import report
    from planner.validate import load_rows
    from planner.validate_finetune import COLUMNS, validate_finetune

    report.emit_validation(validate_finetune(load_rows(file, COLUMNS)), as_json=as_json, summary=summary)
