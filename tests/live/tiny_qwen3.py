"""A Qwen3 of 130,000 random weights with a tokenizer of bytes, and LoRA adapters that say one thing: made in seconds.

Heads are 32 wide: vLLM's attention on the CPU crashes with narrower ones at the first request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CONTEXT = 1024
RANK = 8
VOCABULARY = 320  # 256 bytes and five more tokens, up to what vLLM pads to
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Message = Mapping[str, str]


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One token a byte, and the markers of Qwen3's chat format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.add_tokens(["<tool_call>", "</tool_call>"])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Random weights in bfloat16, large enough to prefer some tokens to others."""
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def save_adapter(
    base: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    conversation: Sequence[Message],
    reply: str,
    tools: Sequence[Mapping[str, Any]] = (),
    steps: int = 80,
) -> None:
    """An adapter of rank 8 on every linear layer that has learnt to answer one conversation with one reply."""
    torch.manual_seed(11)
    model = peft.get_peft_model(
        Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    prompt = tokenizer.apply_chat_template(
        list(conversation), tools=list(tools) or None, add_generation_prompt=True, tokenize=False
    )
    asked, said = (tokenizer(text, return_tensors="pt").input_ids for text in (prompt, f"{reply}<|im_end|>"))
    tokens = torch.cat([asked, said], dim=1)
    labels = tokens.clone()
    labels[:, : asked.shape[1]] = -100
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def log_probabilities(
    base: Path, tokens: Sequence[int], adapter: Path | None = None, dtype: str = "bfloat16"
) -> list[list[float]]:
    """What transformers (and PEFT) gives every token of the vocabulary at each place of a text."""
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    if adapter is not None:
        # PEFT would keep the adapter in float32, vLLM casts it to the model's type
        model = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).to(model.dtype)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)])).logits[0].float()
    found: list[list[float]] = torch.log_softmax(logits, dim=-1).tolist()
    return found
