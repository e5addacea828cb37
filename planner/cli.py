"""The commands. Each reads its options, asks one function of the planner, and prints its answer.

Exit codes: 0 done, 1 does not fit, over budget or (preview) a grave finding of the policy without a reason, 2 usage
or bad input, 3 a check against reality failed.
"""

from __future__ import annotations

import os
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
    help="Capacity planner for small language models on Azure: bytes, GPU, VM size, price, budget.",
)
validate_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Predictions against measurements.")
app.add_typer(validate_app, name="validate")
prices_app = typer.Typer(
    invoke_without_command=True, rich_markup_mode=None, help="List prices of VM sizes, and how to refresh them."
)
app.add_typer(prices_app, name="prices")
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Data to fine-tune on, before it is paid for.")
app.add_typer(data_app, name="data")

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
    except OSError as error:
        said = f"{error.filename} cannot be used ({error.strerror}): see that it is there, and its rights"
        if error.filename is None:  # a full disk under stdout
            said = f"the output cannot be written ({error.strerror}): free space or write elsewhere"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"planner: {said}", file=sys.stderr)
        sys.exit(2)


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
        str | None,
        Option("--ctx", "--max-model-len", "--context", help="Tokens: 32768, 32k, or several: 2k,8k,32k."),
    ] = None,
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
    samples: Annotated[int | None, _train("samples of a run: its hours and cost too.")] = None,
    tokens_per_sample: Annotated[str | None, _train("their mean length.")] = None,
    max_tokens_per_sample: Annotated[
        str | None, _train("the longest, which a batch is padded to. [default: --ctx]")
    ] = None,
    epochs: Annotated[float | None, _train("passes over the samples. [default: 1]")] = None,
    packing: Annotated[bool | None, _train("whole contexts of several samples. [default: no]")] = None,
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
    asked = None
    if ctx is None or {samples, tokens_per_sample, max_tokens_per_sample, epochs, packing} != {None}:
        from planner import run  # prices, spot and speed, which most answers do without

        asked = run.run_request(locals())
        ctx = run.default_context(asked) if ctx is None else ctx
    spec, request = sizing.request_from_options(locals())
    answer = sizing.size(spec, request)
    if asked is not None:
        answer = run.with_runs(spec, request, answer, asked)
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


@validate_app.command("training")
def validate_training(file: File, as_json: Json = False, summary: Summary = False) -> None:
    """Training runs: tokens a second, by source and GPU, and the share of rows within the stated interval."""
    from planner import report
    from planner.validate import load_rows
    from planner.validate_training import COLUMNS, validate_training

    report.emit_validation(validate_training(load_rows(file, COLUMNS)), as_json=as_json, summary=summary)


@validate_app.command("throughput")
def validate_throughput(file: File, as_json: Json = False, summary: Summary = False) -> None:
    """Serving benchmarks, replayed: TTFT, time per token, throughput, by source and GPU, and what the ranges hold."""
    from planner import report
    from planner.validate import load_rows
    from planner.validate_throughput import COLUMNS, validate_throughput

    report.emit_validation(validate_throughput(load_rows(file, COLUMNS)), as_json=as_json, summary=summary)


Stack = Annotated[str | None, Option(help="Read the intent of stacks/Pulumi.STACK.yaml.")]
Prices = Annotated[
    str | None, Option(help="Price sheet: a name or a file. [default: the newest refreshed, else the bundled one]")
]
MaxAge = Annotated[int | None, Option(help="Refuse machine prices older than so many days. [default: 365]", min=0)]


def _stated(context: typer.Context) -> frozenset[str]:
    """The options that were written on the command line, by parameter."""
    return frozenset(name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE"))


@app.command()
def plan(
    context: typer.Context,
    stack: Stack = None,
    model: Annotated[str | None, Option(help="Catalog name, folder, config.json or hub id.")] = None,
    ctx: Annotated[str | None, Option("--ctx", "--context", help="Tokens: 32k, or several: 2k,8k,32k.")] = None,
    task: Annotated[Literal["serve", "finetune", "both"], Option(help="What the machines are for.")] = "both",
    method: Annotated[str, Option(help="Fine-tuning: full, lora, qlora, dora or qdora.")] = "qlora",
    finetune_hours: Annotated[str, Option(help="Training: 80h a month, or windows.")] = "80h",
    serve_hours: Annotated[str, Option(help="Serving: always, 60h, or 'mon-fri 08:00-18:00'.")] = "always",
    quantization: Annotated[str | None, Option("--quantization", "-q", help="Serving: weights as awq, fp8 ...")] = None,
    concurrency: Annotated[int, Option(help="Serving: sequences at the full context at once.", min=1)] = 1,
    replicas: Annotated[int, Option(help="Serving: servers at once.", min=1)] = 1,
    rope_scaling: Annotated[str | None, Option(help="Rope extension you will serve with, such as yarn:4.")] = None,
    region: Annotated[str, Option(help="Azure regions allowed: eastus,westeurope, or any.")] = "eastus",
    spot: Annotated[bool, Option(help="Spot machines are allowed.")] = True,
    commitment: Annotated[
        list[str] | None, Option(help="May be signed: reserved-1y, reserved-3y, savings-plan-1y, savings-plan-3y.")
    ] = None,
    take_turns: Annotated[bool, Option("--take-turns", help="The workloads never run at the same time.")] = False,
    sku: Annotated[list[str] | None, Option(help="Only this size; may be repeated.")] = None,
    prefer_family: Annotated[list[str] | None, Option(help="Stay in this quota family while it fits.")] = None,
    quota: Annotated[list[str] | None, Option(help="FAMILY=VCPUS that the subscription has; may be repeated.")] = None,
    spot_quota: Annotated[int | None, Option(help="Spot vCPUs that the subscription has.", min=0)] = None,
    posture: Annotated[Literal["dev", "prod"], Option(help="How the cluster around is built.")] = "dev",
    developers: Annotated[int, Option(help="People with a D4s_v5 of their own, 200 hours a month.", min=0)] = 0,
    approved: Annotated[str | None, Option(help="USD a month that are approved.")] = None,
    prices: Prices = None,
    max_price_age: MaxAge = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Do not write the plan into the stack's file.")] = False,
    explain: Annotated[bool, Option("--explain", help="Every formula, size and way to buy.")] = False,
    as_json: Json = False,
) -> None:
    """The cheapest machines that hold the workloads, what a month costs, and why the others lost.

    With --stack the plan goes into stacks/Pulumi.STACK.yaml, where `pulumi up` reads it.
    """
    from planner import money

    done = money.plans({**context.params, "stated": _stated(context)})
    # before printing: a reader who has seen enough ends the command
    written = money.lock_plan(done, dry_run=dry_run)
    money.emit_plans(done, as_json=as_json, explain=explain)
    money.emit_written(done, written, as_json=as_json, dry_run=dry_run)
    money.check(done)


@app.command()
def new(
    stack: Annotated[str, typer.Argument(metavar="STACK", help="Its name: lower-case letters, digits and hyphens.")],
    model: Annotated[str | None, Option(help="Catalog name, folder, config.json or hub id.")] = None,
    ctx: Annotated[str | None, Option("--ctx", "--context", help="Tokens, such as 32k.")] = None,
    task: Annotated[str | None, Option(help="serve, finetune or both. [default: both]")] = None,
    posture: Annotated[str | None, Option(help="How the cluster is built: dev or prod. [default: dev]")] = None,
    region: Annotated[str | None, Option(help="Azure regions allowed, or any. [default: eastus]")] = None,
    approved: Annotated[str | None, Option(help="USD a month that are approved.")] = None,
    serve_hours: Annotated[str, Option(help="Serving: always, 60h, or 'mon-fri 08:00-18:00'.")] = "always",
    finetune_hours: Annotated[str, Option(help="Training: 80h a month, or windows.")] = "80h",
    spot: Annotated[bool, Option(help="Spot machines are allowed.")] = True,
    email: Annotated[list[str] | None, Option(help="Who hears of money and failures; may be repeated.")] = None,
    admin_group: Annotated[list[str] | None, Option(help="Entra ID group (object id) of administrators.")] = None,
    ip_range: Annotated[list[str] | None, Option(help="CIDR that may call the cluster's API; may be repeated.")] = None,
    prices: Prices = None,
    max_price_age: MaxAge = None,
) -> None:
    """A new stack: its intent with comments, and the plan; asks for what is missing."""
    from planner import new as stacks

    stacks.emit_new(stack, stacks.new_stack(stack, locals()))


@app.command()
def preview(
    stack: Annotated[str, Option(help="Preview the stack in stacks/Pulumi.STACK.yaml.")],
    form: Annotated[
        Literal["text", "md"], Option("--format", help="text, or md for a comment on a pull request.")
    ] = "text",
    as_json: Json = False,
) -> None:
    """What `pulumi up` would make and what it costs, without the CLI or an Azure account (extra: infra)."""
    from planner import preview as previews

    if as_json and form == "md":
        raise PlannerError("--json and --format md both write to stdout: give one of them")
    made = previews.preview(stack)
    previews.emit(made, "json" if as_json else form)
    previews.check_preview(made)


@app.command()
def render(
    stack: Annotated[str, Option(help="Render the plan of stacks/Pulumi.STACK.yaml.")],
    output: Annotated[
        str | None, Option("-o", "--output", metavar="DIR", help="A file an object in this folder.")
    ] = None,
    explain: Annotated[bool, Option("--explain", help="Where every argument, probe and limit comes from.")] = False,
    emit: Annotated[
        Literal["axolotl", "unsloth"] | None, Option(help="Its fine-tuning runs for this trainer instead.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The Kubernetes manifests of a stack's plan, as `pulumi up` applies them."""
    from planner import manifests

    manifests.render(stack, output, explain=explain, as_json=as_json, emit=emit)


@app.command()
def budget(
    stack: Stack = None,
    scenario: Annotated[str | None, Option(help="A published scenario: dev-2k, dev-32k, prod-budget ...")] = None,
    output: Annotated[str | None, Option("-o", "--output", help="Write to this file instead of stdout.")] = None,
    form: Annotated[
        Literal["md", "html", "json", "csv"] | None,
        Option("--format", help="md, html, json or csv. [default: by the file's name, else md]"),
    ] = None,
    against: Annotated[str | None, Option(help="Earlier budget (its JSON) to show the variance against.")] = None,
    currency: Annotated[str, Option(help="Currency of the page, by the sheet's exchange rate.")] = "USD",
    region: Annotated[str | None, Option(help="Another Azure region than the stack's or scenario's.")] = None,
    prices: Prices = None,
    max_price_age: MaxAge = None,
) -> None:
    """The budget page for finance: totals, what if, commitments, assumptions, where every price comes from."""
    from planner import money

    made = money.budget(locals())
    money.emit_budget(made, output, form)
    money.check_budget(made)


@app.command()
def chat(
    stack: Annotated[str | None, Option(help="Talk to the server of stacks/Pulumi.STACK.yaml, by kubectl.")] = None,
    url: Annotated[str | None, Option(help="Talk to this server, such as http://localhost:8000.")] = None,
    workload: Annotated[str | None, Option(help="Which server, where the stack has several.")] = None,
    model: Annotated[
        str | None, Option(help="A model or adapter that the server has. [default: its first one]")
    ] = None,
    message: Annotated[str | None, Option("-m", "--message", help="Ask this one question and stop.")] = None,
    system: Annotated[str | None, Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int | None, Option(help="Tokens of an answer. [default: the server's]", min=1)] = None,
    temperature: Annotated[float | None, Option(help="0 always takes the likeliest token.", min=0, max=2)] = None,
    as_json: Json = False,
) -> None:
    """Talk to a server, to see that it works and how fast; its key is in TONNAGE_API_KEY, or the stack's own."""
    from planner import chat as chats

    chats.chat(locals())


@data_app.command("check")
def data_check(
    file: Annotated[str, typer.Argument(metavar="FILE.jsonl", help="Conversations, one a line.")],
    task: Annotated[Literal["sft", "dpo"], Option(help="sft: messages; dpo: prompt, chosen, rejected.")] = "sft",
    tokenizer: Annotated[str | None, Option("--tokenizer", "--model", help="Folder or hub id of the model.")] = None,
    max_length: Annotated[str | None, Option("--max-length", "--ctx", help="Tokens of a sequence: 2048, 2k.")] = None,
    loss_on: Annotated[
        Literal["completion", "assistant", "all"], Option(help="Learned: the last answer, every answer, or all.")
    ] = "completion",
    against: Annotated[str | None, Option(help="Evaluation file, whose lines must not be learned.")] = None,
    as_json: Json = False,
) -> None:
    """Check chat JSONL line by line: roles, empty turns, duplicates, tokens, and what truncation costs."""
    from planner import dataset

    report = dataset.check_data(
        file, model=tokenizer, max_length=max_length, task=task, loss_on=loss_on, against=against
    )
    dataset.emit_report(report, as_json=as_json)
    raise typer.Exit(dataset.exit_code(report))


@prices_app.callback()
def prices_table(
    context: typer.Context,
    sku: Annotated[str | None, Option(help="One size in every region.")] = None,
    region: Annotated[str | None, Option(help="Every size in this region, or this size there.")] = None,
    prices: Prices = None,
    as_json: Json = False,
) -> None:
    """A size across regions and ways to buy, or all sizes of a region."""
    if context.invoked_subcommand is None:
        from planner import money

        money.emit_prices(sku, region, prices, as_json=as_json)


@prices_app.command("refresh")
def prices_refresh(
    currency: Annotated[str, Option(help="Fetch this currency's exchange rate too.")] = "USD",
    endpoint: Annotated[
        str, Option(help="Address of the Retail Prices API.", envvar="TONNAGE_PRICES_ENDPOINT")
    ] = "https://prices.azure.com",
) -> None:
    """Read today's prices from the Azure Retail Prices API into the cache, and show what changed."""
    from planner import money

    money.refresh(currency, endpoint)


@app.command()
def scale(
    model: Annotated[str, Option(help="Catalog name, folder, config.json or hub id.")],
    rps: Annotated[float | None, Option(help="Requests a second at the busiest time.")] = None,
    qps: Annotated[float | None, Option(help="The same for classification: one output token each.")] = None,
    input_tokens: Annotated[str | None, Option("--input", help="Tokens of a prompt, mean.")] = None,
    output_tokens: Annotated[str | None, Option("--output", help="Tokens of an answer, mean.")] = None,
    spread: Annotated[float | None, Option(help="Sigma of the log of both lengths. [default: 0, all equal]")] = None,
    ttft_p95: Annotated[str | None, Option(help="Limit to the first token, such as 800ms.")] = None,
    tpot_p95: Annotated[str | None, Option(help="Limit a later token, such as 50ms.")] = None,
    latency: Annotated[str | None, Option("--latency", "--latency-p95", help="Limit to the last token, p95.")] = None,
    trace: Annotated[str | None, Option(help="CSV of arrival_seconds, prompt_tokens, output_tokens.")] = None,
    measured: Annotated[str | None, Option(help="CSV of your own runs, in place of the model.")] = None,
    region: Annotated[str, Option(help="Azure regions allowed, or any.")] = "eastus",
    sku: Annotated[list[str] | None, Option(help="Only this size; may be repeated.")] = None,
    tp: Annotated[int | None, Option("--tp", "--tensor-parallel-size", help="GPUs of a replica.", min=1)] = None,
    quantization: Annotated[
        str | None, Option("--quantization", "-q", help="Weights as fp8, awq ... [default: 16-bit, fp8 and int4]")
    ] = None,
    kv_cache_dtype: Annotated[str | None, Option(help="auto or fp8. [default: both, with fp8 weights]")] = None,
    ctx: Annotated[str | None, Option("--ctx", "--context", help="max_model_len. [default: a request's]")] = None,
    rope_scaling: Annotated[str | None, Option(help="Rope extension you will serve with, such as yarn:4.")] = None,
    prefix_hit_rate: Annotated[float, Option(help="Share of a prompt that the prefix cache holds.")] = 0.0,
    max_num_seqs: Annotated[int | None, Option(help="Sequences in one batch. [default: vLLM's]")] = None,
    max_num_batched_tokens: Annotated[int | None, Option(help="Tokens of a step. [default: vLLM's]")] = None,
    gpu_memory_utilization: Annotated[float | None, Option(help="Share that vLLM takes. [default: its own]")] = None,
    engine_version: Annotated[str | None, Option(help="vLLM version. [default: the catalog's]")] = None,
    spot: Annotated[bool, Option("--spot", help="Order by spot prices, as --priority spot.")] = False,
    priority: Annotated[str | None, Option(help="Order by on-demand, spot, reserved-1y ...")] = None,
    spare: Annotated[int, Option(help="Machines beside those needed: 1 for N+1.", min=0)] = 0,
    at_expected: Annotated[bool, Option("--at-expected", help="The expected latency keeps the limits.")] = False,
    peak_to_mean: Annotated[float | None, Option(help="Busiest hour of the day / its mean.")] = None,
    daily: Annotated[str | None, Option(help="CSV of hour, requests_per_s: a day's load.")] = None,
    simulate: Annotated[bool, Option("--simulate", help="Percentiles by simulation.")] = False,
    seed: Annotated[int, Option(help="Of the simulation.", min=0)] = 0,
    output: Annotated[str | None, Option("-o", help="Write .html, .svg, .md or .json.")] = None,
    prices: Prices = None,
    max_price_age: MaxAge = None,
    explain: Annotated[bool, Option("--explain", help="Every size, formula and way to buy.")] = False,
    as_json: Json = False,
) -> None:
    """Machines, replicas and cost that keep a latency at a load, cheapest first, and what cheaper ones fail on."""
    from planner import money
    from planner import scale as scaling
    from planner.catalog.prices import load_sheet
    from planner.report.scale import emit_scale

    options = {**locals(), "drawn": output is not None}
    wanted, sheet = scaling.wanted_from_options(options), load_sheet(prices)
    runs = scaling.read_measured(measured, wanted.traffic.output.mean) if measured else ()
    answer = scaling.scale(wanted, sheet, runs)
    money.check_age(scaling.machine_lines(answer, sheet), sheet, options)
    if output is not None:
        from planner.pages.speed import write_scale

        write_scale(answer, output)
    if output is None or as_json or not answer.choices:
        emit_scale(answer, as_json=as_json, explain=explain)
    if not answer.choices:
        raise typer.Exit(DOES_NOT_FIT)


@app.command()
def compare(
    tokens_per_month: Annotated[str, Option(help="Tokens in and out: 5e9, 300M.")],
    api: Annotated[str, Option(help="The API's USD a million tokens: in,out or one for both.")],
    input_share: Annotated[str, Option(help="Share of the tokens that go in.")] = "0.75",
    model: Annotated[str, Option(help="The model to host instead.")] = "qwen3-8b",
    ctx: Annotated[str, Option("--ctx", "--context", help="Its context in tokens.")] = "8k",
    quantization: Annotated[str | None, Option("--quantization", "-q", help="Weights as awq, fp8 ...")] = None,
    tokens_per_second: Annotated[
        list[str] | None, Option(help="SIZE=RATE that one machine sustains under load, measured; may be repeated.")
    ] = None,
    utilization: Annotated[str, Option(help="Mean load / what the machines could do.")] = "0.5",
    server: Annotated[str | None, Option(help="A server at this price a month instead of Azure sizes.")] = None,
    region: Annotated[str, Option(help="Azure regions allowed, or any.")] = "eastus",
    spot: Annotated[bool, Option(help="Spot machines are allowed.")] = True,
    commitment: Annotated[list[str] | None, Option(help="May be signed: reserved-1y ...")] = None,
    sku: Annotated[list[str] | None, Option(help="Only this size; may be repeated.")] = None,
    prices: Prices = None,
    max_price_age: MaxAge = None,
    as_json: Json = False,
) -> None:
    """Make or buy: your own machines against an API that bills by the token, with the break-even."""
    from planner import money

    money.emit_comparison(money.comparison(locals()), as_json=as_json)
