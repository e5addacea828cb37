"""The commands. Each reads its options, asks one function of the planner, and prints its answer.

Exit codes: 0 done, 1 does not fit or over budget, 2 usage or bad input, 3 a check against reality failed.
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal

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

SERVE, TRAIN, OUT = "Serving (vLLM's own flags)", "Fine-tuning", "Output"
Option = typer.Option


def main() -> None:
    """Entry point of `planner` and `tonnage`: a refusal is one sentence on stderr and an exit code, no traceback."""
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
    concurrency: Annotated[
        int, Option(min=1, help="Sequences at the full context at once.", rich_help_panel=SERVE)
    ] = 1,
    quantization: Annotated[
        str | None, Option("--quantization", "-q", help="Weights: fp8, awq, gptq, w4a16, ...", rich_help_panel=SERVE)
    ] = None,
    kv_cache_dtype: Annotated[str, Option(help="auto or fp8.", rich_help_panel=SERVE)] = "auto",
    gpu_memory_utilization: Annotated[float | None, Option(rich_help_panel=SERVE)] = None,
    max_num_seqs: Annotated[int | None, Option(rich_help_panel=SERVE)] = None,
    max_num_batched_tokens: Annotated[int | None, Option(rich_help_panel=SERVE)] = None,
    block_size: Annotated[int, Option(rich_help_panel=SERVE)] = 16,
    pipeline_parallel_size: Annotated[int, Option("--pp", "--pipeline-parallel-size", rich_help_panel=SERVE)] = 1,
    enforce_eager: Annotated[bool, Option("--enforce-eager", rich_help_panel=SERVE)] = False,
    enable_prefix_caching: Annotated[bool, Option(rich_help_panel=SERVE)] = True,
    hybrid_kv_cache: Annotated[
        bool, Option(help="Off: every layer keeps the whole context.", rich_help_panel=SERVE)
    ] = True,
    enable_lora: Annotated[bool, Option("--enable-lora", rich_help_panel=SERVE)] = False,
    max_loras: Annotated[int, Option(rich_help_panel=SERVE)] = 1,
    max_lora_rank: Annotated[int, Option(rich_help_panel=SERVE)] = 16,
    draft_model: Annotated[
        str | None, Option(help="Model that drafts tokens (speculative decoding).", rich_help_panel=SERVE)
    ] = None,
    num_speculative_tokens: Annotated[int, Option(rich_help_panel=SERVE)] = 0,
    engine_version: Annotated[str | None, Option(help="vLLM version.", rich_help_panel=SERVE)] = None,
    method: Annotated[str, Option(help="full, lora, qlora, dora, qdora.", rich_help_panel=TRAIN)] = "qlora",
    trainer: Annotated[
        str, Option(help="Whose defaults: trl, transformers, unsloth, torchtune ...", rich_help_panel=TRAIN)
    ] = "trl",
    micro_batch: Annotated[int, Option(help="Sequences a GPU takes at once.", rich_help_panel=TRAIN)] = 1,
    gradient_accumulation_steps: Annotated[int, Option(rich_help_panel=TRAIN)] = 1,
    lora_rank: Annotated[int, Option("--lora-rank", "--lora-r", rich_help_panel=TRAIN)] = 16,
    lora_targets: Annotated[
        str, Option(help="all-linear, attention, default, or module names with commas.", rich_help_panel=TRAIN)
    ] = "all-linear",
    adapter_dtype: Annotated[str | None, Option(help="bf16 or fp32.", rich_help_panel=TRAIN)] = None,
    weights_dtype: Annotated[
        str, Option(help="bf16, fp16 or fp32 (fp32 masters under autocast).", rich_help_panel=TRAIN)
    ] = "bf16",
    optimizer: Annotated[
        str | None, Option(help="adamw_torch_fused, adamw_torch, adamw_8bit, sgd ...", rich_help_panel=TRAIN)
    ] = None,
    loss: Annotated[str | None, Option(help="chunked, liger, hf, in_place ...", rich_help_panel=TRAIN)] = None,
    gradient_checkpointing: Annotated[bool, Option(rich_help_panel=TRAIN)] = True,
    attention: Annotated[str | None, Option(help="flash, efficient or eager.", rich_help_panel=TRAIN)] = None,
    parallelism: Annotated[
        str, Option(help="none, ddp, zero1, zero2, zero3, fsdp, fsdp2.", rich_help_panel=TRAIN)
    ] = "none",
    n_gpus: Annotated[int, Option(min=1, help="GPUs of the training run.", rich_help_panel=TRAIN)] = 1,
    offload: Annotated[
        str, Option(help="optimizer, parameters, activations; several with commas.", rich_help_panel=TRAIN)
    ] = "",
    dpo: Annotated[
        bool, Option("--dpo", help="DPO: two sequences a sample and a reference.", rich_help_panel=TRAIN)
    ] = False,
    explain: Annotated[
        bool, Option("--explain", help="Formula, inputs and source of every component.", rich_help_panel=OUT)
    ] = False,
    trace: Annotated[
        bool,
        Option("--trace", help="Run the training step on fake tensors too (extra: trace).", rich_help_panel=OUT),
    ] = False,
    as_json: Annotated[bool, Option("--json", help="JSON on stdout.", rich_help_panel=OUT)] = False,
    as_csv: Annotated[bool, Option("--csv", help="CSV on stdout, one line a component.", rich_help_panel=OUT)] = False,
) -> None:
    """VRAM budget of a model at context lengths, and the smallest GPU or Azure size that fits."""
    from planner import report
    from planner import size as sizing

    spec, request = sizing.request_from_options(locals())
    answer = sizing.size(spec, request)
    report.emit_size(answer, as_json=as_json, as_csv=as_csv, explain=explain)
    if trace:
        from planner import trace as tracing

        tracing.print_comparison(spec, request, answer)
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
        max_parameters=None if max_parameters is None else round(max_parameters * 1e9),
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
    """Azure's GPU sizes."""
    from planner import report
    from planner.catalog.hardware import select_skus

    report.emit_skus(select_skus(gpu_name=gpu, region=region, everything=everything), as_json=as_json)


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
