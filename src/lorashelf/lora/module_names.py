"""Names of the base's modules: additions of training tools, and different spellings of one module.

A base's modules have different names in other versions or classes of transformers: `language_model.model.layers.0` of
transformers 4 is `model.language_model.layers.0` in 5, and `layers.0` if AutoModel was trained instead of
AutoModelForCausalLM. `canonical` maps all of them to one name for comparison, by the rules with which transformers
5.23 renames weights on loading (conversion_mapping.py, base_model_prefix), and PEFT an adapter's keys
(transformers_weight_conversion.py); tests/test_module_names.py compares them with the installed libraries.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import lru_cache

WRAPPERS = frozenset(["model", "language_model", "text_model", "llm", "vlm", "thinker"])
"""Attributes between a model and its language model, which versions and classes of transformers add or omit."""

TOWERS = {"vision_tower": "vision", "vision_model": "vision", "visual": "vision", "vit": "vision"}
"""Names of the image encoder; `vision_tower.vision_model` (CLIP, SigLIP) is `vision_tower` alone in transformers 5."""

_BASE_PREFIXES = """
aimv2 albert align altclip backbone beit bert bert_model biogpt bit blip bridgetower bros canine chinese_clip
chmv2 clap clip coarse_acoustics convbert convnext convnextv2 cpmant cvt dac data2vec_text deberta
decision_transformer deit depth_anything depth_pro detector_model dinat dinov2 dinov2_with_registers distilbert
donut dpt edgetam efficientloftr efficientnet electra emuvideovq encodec eomt eomt_dinov3 ernie esm esmc
esmfold2 fastspeech2_conformer fine_acoustics flava fnet focalnet funnel git glpn gpt_neox gpt_neox_japanese
groupvit gte hgnetv2 hiera hubert ibert ijepa layoutlm layoutlmv2 layoutlmv3 led levit lightglue lilt
longformer luke lw_detr_vit lxmert markuplm metaclip_2 mgp_str mimi mobilebert mobilenet_v1 mobilenet_v2
mobilevit mobilevitv2 mpnet mra neucodec nomic_bert nystromformer owlv2 owlvit perceiver pixio poolformer
prompt_depth_anything prophetnet pvt pvt_v2 rag reformer regnet rembert resnet rf_detr_dinov2 roberta
roberta_prelayernorm roc_bert roformer rwkv sam sam2 sam3 sam3_tracker sam_hq seamless_m4t seamless_m4t_v2
segformer semantic sew sew_d siglip siglip2 span_predictor speecht5 splinter superglue superpoint swiftformer
swin swin2sr swinv2 switch_transformers tapas textnet timesformer timm_model tracker_model transformer
unispeech unispeech_sat vibevoice_acoustic_tokenizer videomae videomt vilt visual_bert vitdet vits vivit vjepa2
wav2vec2 wav2vec2_bert wav2vec2_conformer wavlm x_clip xcodec xcodec2 yoso zoedepth
"""
BASE_PREFIXES = frozenset(_BASE_PREFIXES.split())
"""base_model_prefix: the attribute of a model with a head that holds the model without one (`model`: WRAPPERS)."""

_DROPPED = (
    *((tower, "vision_model") for tower in ("vision_tower", "image_tower", "video_tower", "vision_model")),
    *((wrapper, "model") for wrapper in ("language_model", "text_model", "vlm", "thinker")),
)
"""Pairs of names of which transformers 5 omits the second."""

_PARTS = frozenset(["vision", "image", "video", "audio", "speech", "sound", "encoder", "decoder", "talker"])
_RENAMED: tuple[tuple[str, str], ...] = (
    (r"\bencoder\.layer\.(?=\d)", "layers."),  # ViT, BEiT, DeiT, …
    (r"\battention\.(?:attention|self)\.(query|key|value)$", r"attention.\1"),  # the same, DINOv2, Swin, SegFormer
    (r"\battention\.query$", "attention.q_proj"),
    (r"\battention\.key$", "attention.k_proj"),
    (r"\battention\.value$", "attention.v_proj"),
    (r"\battention\.output\.dense$", "attention.o_proj"),
    (r"\bintermediate\.dense$", "mlp.fc1"),
    (r"\boutput\.dense$", "mlp.fc2"),
    (r"\b(self_attn|encoder_attn)\.out_proj$", r"\1.o_proj"),  # DETR and its relatives
    (r"\b(layers\.\d+)\.(fc[12])$", r"\1.mlp.\2"),
    (r"\bblock_sparse_moe\b", "mlp"),  # Mixtral, PhiMoE
    (r"^embed_out$", "lm_head"),  # GPT-NeoX
    (r"^backbone\.", "model."),  # Nemotron-H
    (r"^mlp_AR\.", "projector."),  # PaddleOCR-VL
    (r"^(model\.)?vision_projector$", "projector"),  # HyperCLOVA X
)
_OLD = frozenset(
    [
        *("layer", "query", "key", "value", "dense", "out_proj", "fc1", "fc2"),
        *("block_sparse_moe", "embed_out", "backbone", "mlp_AR", "vision_projector"),
    ]
)
"""A word of each rule: most names have none of them and need no check."""

_TOOLS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
_PEFT = "base_model.model."
_LEFT = re.compile(rf"(?:^|\.)(?:{'|'.join(_TOOLS)}|module|base_model)\.")
_SAVE = "save it again with PEFT's save_pretrained"
_IMPOSSIBLE = {
    "base_layer": (
        "a layer below another adapter: trained on top of that adapter",
        "merge the other adapter into the base (merge_and_unload), and train on that",
    ),
    "modules_to_save": ("a whole module", "train it again without modules_to_save"),
    "original_module": ("a whole module", "train it again without modules_to_save"),
    "lora_A": ("a layer inside an adapter", _SAVE),
    "lora_B": ("a layer inside an adapter", _SAVE),
}


def cleaned(key: str) -> str:
    """Return a tensor's key without additions of training tools: torch.compile, FSDP, activation checkpointing, Fabric,
    DDP and DeepSpeed (`module.` in front of the base), PEFT applied twice.

    >>> cleaned("module.base_model.model._orig_mod.model.layers.0.q_proj.lora_A.weight")
    'base_model.model.model.layers.0.q_proj.lora_A.weight'
    """
    if not _LEFT.search(key):
        return key
    key = ".".join(part for part in key.split(".") if part not in _TOOLS).removeprefix("module.")
    if not key.startswith(_PEFT):
        return key
    path = key
    while path.startswith((_PEFT, "module.")):
        path = path.removeprefix("module.").removeprefix(_PEFT)
    return _PEFT + path


def impossible(path: str) -> Iterator[tuple[str, str]]:
    """Yield the reasons why no base can have a module of this name, each with the cure."""
    parts = path.split(".")
    if "" in parts:
        yield "an empty part of a module's name", _SAVE
    if parts[-1] == "default":
        yield "an adapter's name inside a module's name", _SAVE
    yield from (_IMPOSSIBLE[part] for part in parts if part in _IMPOSSIBLE)


def canonical(path: str) -> str:
    """Return a name that is equal for all spellings of one module; not itself a module's name."""
    head, tail = split(path)
    return ".".join((*head, tail))


_KEPT = 2**16  # names with cached parts, which every comparison and merge needs


@lru_cache(_KEPT)
def cut(path: str) -> tuple[str, str]:
    """Split a path into the part of the model, with its dot, and the module's place in it, from its layer on.

    >>> cut("model.layers.3.self_attn.q_proj"), cut("lm_head")
    (('model.', 'layers.3.self_attn.q_proj'), ('', 'lm_head'))
    """
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    start = max(number - 1, 0)
    return "".join(f"{part}." for part in parts[:start]), ".".join(parts[start:])


@lru_cache(_KEPT)
def split(path: str) -> tuple[tuple[str, ...], str]:
    """Split a canonical name into the part of the model and the place in it.

    >>> split("model.language_model.layers.3.self_attn.q_proj")
    ((), 'layers.3.self_attn.q_proj')
    >>> split("vision_tower.vision_model.encoder.layers.3.mlp.fc1")
    (('vision', 'encoder'), 'layers.3.mlp.fc1')
    """
    before, place = cut(_renamed(path))
    head: list[str] = []
    for part in before.split(".")[:-1]:
        inner = part == "vision_model" and head and head[-1].endswith(("_tower", "vision"))
        if part not in WRAPPERS and not inner:
            head.append(TOWERS.get(part, part))
    return tuple(head), place


def age(path: str) -> tuple[bool, ...]:
    """Return a sort key that is larger for the later of two spellings of one module, to which transformers renames."""
    parts = path.split(".")
    pairs = set(itertools.pairwise(parts))
    return (
        _renamed(path) == path,
        not any(pair in pairs for pair in _DROPPED),
        parts[0] == "model",
        "language_model" in parts or "text_model" in parts,
        parts[0] in BASE_PREFIXES,
    )


def _renamed(path: str) -> str:
    """Return the path with the names that transformers 5 uses inside a layer."""
    if not _OLD.isdisjoint(path.split(".")):
        for pattern, target in _RENAMED:  # compiled on first use and cached by `re`
            path = re.sub(pattern, target, path)
    return path


def without_prefix(path: str) -> str:
    """Return a path in the model without a head, that is without the base_model_prefix; "" if it has none."""
    first, _, rest = path.partition(".")
    return rest if first in BASE_PREFIXES else ""


def is_bare(path: str) -> bool:
    """Return whether a path starts with neither a base_model_prefix nor another wrapper of the language model."""
    first = path.partition(".")[0]
    return first not in BASE_PREFIXES and first not in WRAPPERS


def distinct(head: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Return whether two parts of a model are certainly different: text and vision, encoder and decoder."""
    kinds = {_kind(head), _kind(other)}
    return len(kinds) == 2 and "" not in kinds


def _kind(head: tuple[str, ...]) -> str:
    """Return the kind of a part of a model; "" if its name does not show it."""
    if not head:
        return "language"
    return next((word for part in head for word in part.split("_") if word in _PARTS), "")
