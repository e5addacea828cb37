"""What the program makes itself, against the frameworks: tokens as transformers makes them, widths as fp16 wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny_chat import TEMPLATE, write_tokenizer

from workloads.finetune.chat import load_chat

transformers = pytest.importorskip("transformers", reason="the comparison needs transformers: run make live")

USER = {"role": "user", "content": "Straße, naïve 😀\n  indented"}
ANSWER = {"role": "assistant", "content": "<b>Ja</b> & 'nein' \"so\"  "}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "now", "description": "Zeit für <dich>", "parameters": {}}}]
# what templates on the hub make use of: namespaces, loop controls, whitespace control, tojson, strings' methods, tools,
# the mark around answers, and tests of what is defined
RICH = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | map('tojson') | join('\\n')) + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}{%- break %}{%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- message.content.strip('\\n') + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message['content'] + eos_token + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt is defined and add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@pytest.mark.parametrize("template", [TEMPLATE, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize(
    ("messages", "answer", "tools"),
    [
        ([USER, ANSWER], False, None),
        ([SYSTEM, USER], True, None),
        ([SYSTEM, USER, ANSWER, USER, ANSWER], False, TOOLS),
    ],
)
def test_tokens_are_those_of_transformers(
    template: str, messages: list[dict[str, str]], answer: bool, tools: Any, tmp_path: Path
) -> None:
    folder = write_tokenizer(tmp_path / "model", template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=answer, tokenize=True, return_dict=False
    )
    chat = load_chat(str(folder))
    assert chat.tokens(chat.text(messages, answer=answer, tools=tools)) == list(expected)


def test_what_is_trained_in_fp16_is_kept_in_32_bits_and_the_rest_stays() -> None:
    torch = pytest.importorskip("torch", reason="the widths need torch: run make live")
    from workloads.finetune.train import widen_trained

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    widen_trained(model)
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # a layer: q and o 128 x 128, k and v 128 x 64, three of 128 x 256, norms of 2 x 128 and 2 x 32: 147,776; two of
        # them, the tied embedding as head 320 x 128 and the last norm 128: N = 336,640; attention 6 x 2 layers x 128 x
        # 128 tokens = 196,608; full: 6 N and that
        ("full", 6 * 336_640 + 196_608),
        # rank 8: a layer's adapters 8 x (256 + 192 + 192 + 256 + 3 x 384) = 16,384, T = 32,768, which a token passes
        # too: 4 (N + T) + 2 T and attention
        ("lora", 4 * (336_640 + 32_768) + 2 * 32_768 + 196_608),
        ("qlora", 4 * (336_640 + 32_768) + 2 * 32_768 + 196_608),  # a packed weight is still a weight
    ],
)
def test_the_arithmetic_of_a_token_is_that_of_the_paper(method: str, expected: int, tmp_path: Path) -> None:
    for needed in ("torch", "peft", "trl", "bitsandbytes"):
        pytest.importorskip(needed, reason=f"the program needs {needed}: run make live")
    import peft

    from workloads.finetune import train
    from workloads.finetune.config import parse_config
    from workloads.finetune.watching import flops_per_token

    model = tiny.write_model(tmp_path / "model")
    config = parse_config(tiny.settings(tmp_path, model, "none.jsonl", method=method), "x")
    made = train._model(config, str(model))
    adapter = train._adapter(config)
    assert flops_per_token(peft.get_peft_model(made, adapter) if adapter else made, config) == expected
