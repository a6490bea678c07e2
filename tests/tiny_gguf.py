"""A GGUF file of a llama of one layer with random weights and a tokenizer of single bytes, as BPE or SentencePiece."""

from __future__ import annotations

from pathlib import Path

import numpy as np

HIDDEN, INNER, CONTEXT = 16, 32, 64


def tiny_gguf(path: Path, seed: int = 0, *, context: int = CONTEXT, pieces: bool = False) -> Path:
    """Write the file and return its path; `pieces`: a vocabulary of SentencePiece, with a space before each text."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
    types = [3, 3, *[1] * (len(tokens) - 2)]
    if pieces:
        tokens = ["<s>", "</s>", "<|im_start|>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "\u2581the"]
        types = [3, 3, 4, *[6] * 256, 1, 1]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(HIDDEN // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_unk_token_id(1)
        writer.add_add_space_prefix(True)
    else:
        writer.add_token_merges(["a b"])
    writer.add_token_types(types)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    square, rng = (HIDDEN, HIDDEN), np.random.default_rng(seed)
    shapes = {
        "token_embd": (len(tokens), HIDDEN),
        "output": (len(tokens), HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        **{f"blk.0.attn_{name}": square for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else 0.3 * rng.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
