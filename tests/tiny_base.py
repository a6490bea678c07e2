"""Tiny random language models for tests: real transformers folders of several architectures, made in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONTEXT = 160
CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = ("llama", "qwen2", "stablelm", "gemma3", "gpt2")


def tiny_base(folder: Path, architecture: str = "llama", *, seed: int = 0) -> Path:
    """A folder with a random model (2 layers, hidden 32) and a tokenizer of single bytes.

    `llama` comes with a chat template, which adds a system turn by itself as SmolLM2's does; the others have none.
    """
    import torch
    import transformers

    tokenizer = _tokenizer(chat=architecture == "llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(_config(architecture, tokenizer))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # larger than the usual start, so that answers differ in likelihood
                    parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(architecture: str, tokenizer: Any) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    grouped = {**common, "num_key_value_heads": 2}
    if architecture == "llama":
        return transformers.LlamaConfig(**grouped, tie_word_embeddings=True)
    if architecture == "qwen2":
        return transformers.Qwen2Config(**grouped)
    if architecture == "stablelm":
        return transformers.StableLmConfig(**grouped)
    if architecture == "gemma3":
        return transformers.Gemma3TextConfig(**grouped, head_dim=8, sliding_window=64)
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
        tokens = {name: common[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        return transformers.GPT2Config(**sizes, **tokens)
    raise ValueError(f"{architecture!r} is none of {', '.join(ARCHITECTURES)}")


def _tokenizer(chat: bool) -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        made.chat_template = CHAT
    return made
