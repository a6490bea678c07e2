"""Tiny random models of every class that transformers 5 renames the modules of, and those modules' earlier names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

CLASSES = {
    "aria": "AriaForConditionalGeneration",
    "audioflamingo3": "AudioFlamingo3ForConditionalGeneration",
    "aya_vision": "AyaVisionForConditionalGeneration",
    "cohere2_vision": "Cohere2VisionForConditionalGeneration",
    "colpali": "ColPaliForRetrieval",
    "colqwen2": "ColQwen2ForRetrieval",
    "deepseek_vl": "DeepseekVLForConditionalGeneration",
    "fuyu": "FuyuForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "got_ocr2": "GotOcr2ForConditionalGeneration",
    "granite_speech": "GraniteSpeechForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "lfm2_vl": "Lfm2VlForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "paddleocr_vl": "PaddleOCRVLForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "shieldgemma2": "ShieldGemma2ForImageClassification",
    "t5gemma2": "T5Gemma2ForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration",
    "vipllava": "VipLlavaForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
}
"""Model type → class: those of the table of conversions that hold a language model beside another part."""

_SIZES: dict[str, float] = {
    **dict.fromkeys(["hidden_size", "embed_dim", "d_model", "projection_dim", "out_hidden_size", "output_dim"], 16),
    **dict.fromkeys(["projector_hidden_dim", "hidden_dim", "image_size"], 16),
    **dict.fromkeys(["intermediate_size", "mlp_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"], 24),
    **dict.fromkeys(["num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"], 2),
    **dict.fromkeys(["num_hidden_layers", "attention_heads", "mlp_ratio", "num_experts", "num_local_experts"], 2),
    **dict.fromkeys(["num_key_value_heads", "depth", "encoder_layers", "decoder_layers", "num_layers"], 1),
    **dict.fromkeys(["num_global_layers", "num_experts_per_tok"], 1),
    **dict.fromkeys(["head_dim", "patch_size", "window_size", "num_mel_bins"], 8),
    **dict.fromkeys(["vocab_size", "max_position_embeddings"], 64),
    "n_window": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "image_token_id": 3,
    "image_token_index": 3,
    "video_token_id": 4,
    "video_token_index": 4,
    "audio_token_id": 5,
    "audio_token_index": 5,
    "vision_start_token_id": 6,
    "vision_end_token_id": 7,
}


def tiny_model(kind: str) -> torch.nn.Module:
    """A model of the class with its sizes cut down, two layers of language model, random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind)
    return getattr(transformers, CLASSES[kind])(type(config).from_dict(_cut(config.to_dict()))).eval()


def _cut(fields: dict[str, Any]) -> dict[str, Any]:
    cut: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "rope_parameters" and "mrope_section" in (value or {}):
            cut[name] = {**value, "mrope_section": [1, 1, 2]}
        elif isinstance(value, dict) and name != "rope_parameters":
            cut[name] = _cut(value)
        elif name in _SIZES and type(value) in (int, float):
            cut[name] = _SIZES[name]
        elif name == "layer_types" and value:
            cut[name] = value[:2]
        elif name not in ("architectures", "transformers_version", "dtype"):
            cut[name] = value
    return cut


def linear_modules(model: torch.nn.Module) -> list[str]:
    """The paths of the modules that an adapter may have."""
    return [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def earlier_name(model: torch.nn.Module) -> Callable[[str], str]:
    """A module's path → its path before transformers 5, by the reverse of what transformers applies on loading."""
    renamings = [t for t in get_model_conversion_mapping(model, add_legacy=False) if isinstance(t, WeightRenaming)]
    reverse = [renaming.reverse_transform() for renaming in reversed(renamings)]

    def before(path: str) -> str:
        renamed, _ = rename_source_key(f"{path}.weight", reverse, [], reverse=True)
        return renamed.removesuffix(".weight")

    return before
