"""A base model of two layers with random weights and a tokenizer of single bytes, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BYTES = 256
ARCHITECTURES = ("llama", "qwen2", "stablelm", "gemma3", "gpt2")
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_base(
    folder: Path,
    architecture: str = "llama",
    *,
    context: int = 512,
    chat: bool = True,
    seed: int = 0,
    chat_template: str | None = None,
) -> Path:
    """A base model in a folder; `architecture` is one of ARCHITECTURES; `chat_template` None is ChatML."""
    import torch
    import transformers

    kind = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    config = transformers.AutoConfig.for_model(kind, **_sizes(architecture, context))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)  # so that answers depend on what was asked
    model.save_pretrained(folder)
    made = tokenizer(chat)
    made.chat_template = chat_template or made.chat_template
    made.save_pretrained(folder)
    return folder


def _sizes(architecture: str, context: int) -> dict[str, int]:
    ends = {"vocab_size": len(SPECIAL) + BYTES, "bos_token_id": 0, "eos_token_id": 1}
    if architecture == "gpt2":
        return {**ends, "n_positions": context, "n_embd": 16, "n_layer": 2, "n_head": 2}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": context}
    own = {
        "gemma3": {"head_dim": 8, "sliding_window": 64},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }
    return {**ends, **heads, **sizes, **own.get(architecture, {})}


def tokenizer(chat: bool) -> Any:
    """A tokenizer of single bytes, with ChatML or without a chat template."""
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # how byte-level BPE spells each byte
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    end = "<|im_end|>" if chat else "</s>"
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token=end,
        unk_token="<unk>",
        additional_special_tokens=[SPECIAL[1], *SPECIAL[3:]],
    )
    wrapped.chat_template = CHATML if chat else None
    return wrapped
