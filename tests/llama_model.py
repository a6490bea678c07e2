"""Bases of transformers as GGUF files in float32, and llama.cpp's logits: written apart from what is tested."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiny_base import BYTES, SPECIAL

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": len(SPECIAL) + BYTES,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MODELS: Mapping[str, Mapping[str, Any]] = {  # llama.cpp's architecture → the configuration of transformers
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 16},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
    "stablelm": {"model_type": "stablelm", "tie_word_embeddings": False, "partial_rotary_factor": 0.25},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False, "original_max_position_embeddings": 256},
}
INSIDE = {  # transformers' names inside a layer → llama.cpp's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_2 = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny(architecture: str, seed: int = 0) -> Any:
    """A random model of two layers in transformers, with weights large enough for every module to matter."""
    import torch
    import transformers

    options = {**SIZES, **MODELS[architecture]}
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.15 if weight.ndim == 2 else 0.1)
        if weight.ndim == 1 and "norm" in name and "gemma" not in config.model_type:
            weight.data += 1
    return model.float().eval()


def tensor_name(architecture: str, path: str) -> str:
    """llama.cpp's name of a module of transformers."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    _, _, layer, inside = path.split(".", 3)
    names = {**INSIDE, **(GEMMA_2 if architecture in ("gemma2", "gemma3") else {})}
    return f"blk.{layer}.{names[inside]}"


def by_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp's `llama` has them, one by one: pair i of a head is its rows i and i + d/2."""
    size = len(weight) // heads
    rows = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[rows]


def write_gguf(model: Any, architecture: str, path: Path) -> Path:
    """A model of transformers as a GGUF file without a vocabulary, in float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * (0.25 if architecture == "stablelm" else 1)))
    rope = config.rope_parameters
    writer.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
    if architecture == "stablelm":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(False)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            query = module.endswith("q_proj")
            values = by_pairs(values, config.num_attention_heads if query else config.num_key_value_heads)
        if architecture.startswith("gemma") and "norm" in module:
            values = values + 1
        writer.add_tensor(f"{tensor_name(architecture, module)}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Llama:
    """A GGUF file in llama.cpp, by its C functions."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self._c = llama_cpp
        llama_cpp.llama_log_set(_silent(), None)
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model, f"llama.cpp cannot load {path}"

    def logits(self, ids: Sequence[int], lora: Path | None = None) -> np.ndarray:
        """The logits (n, vocabulary) at every token, with a LoRA file."""
        c = self._c
        parameters = c.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 256
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.type_k = parameters.type_v = 0  # float32
        parameters.flash_attn_type = 0  # which computes in float16
        context = c.llama_init_from_model(self._model, parameters)
        if lora is not None:
            adapter = c.llama_adapter_lora_init(self._model, str(lora).encode())
            assert adapter, f"llama.cpp refuses {lora}"
            one = (c.llama_adapter_lora_p_ctypes * 1)(adapter)
            assert c.llama_set_adapters_lora(context, one, 1, (ctypes.c_float * 1)(1.0)) == 0
        batch = c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert c.llama_decode(context, batch) == 0
        wide = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        found = np.ctypeslib.as_array(c.llama_get_logits(context), (len(ids), wide)).copy()
        c.llama_batch_free(batch)
        c.llama_free(context)
        return found

    def close(self) -> None:
        self._c.llama_model_free(self._model)


_LOGS: list[Any] = []


def _silent() -> Any:
    import llama_cpp

    if not _LOGS:
        _LOGS.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    return _LOGS[0]
