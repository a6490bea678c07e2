"""A coded adapter's metadata in a few bytes: base, dtype, PEFT fields, module paths and shapes."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ...digest import canonical_json
from ...errors import AdapterFormatError
from ...lora.adapter import WIDTHS, Adapter, BaseId, Shape
from ..peft_config import config_faults, encodable
from .stream import malformed

LONGEST = 2**22
"""The most bytes of a description's JSON."""
LARGEST = 2**24
"""The largest dimension of a module."""
_MOST_MODULES = 2**17
_MOST_CHARACTERS = 2**24
DICTIONARY = (
    b'"Qwen/Qwen2.5-0.5B-Instruct""google/gemma-3-1b-it""meta-llama/Llama-3.2-1B-Instruct""bf16""f32","embed_tokens"'
    b'"lm_head""fc1","fc2""c_attn""query_key_value","dense_h_to_4h","dense_4h_to_h""out_proj""gate_proj","up_proj",'
    b'"down_proj"["model.layers.*.mlp.down_proj","0-15",2048,32,8192],["model.layers.*.mlp.gate_proj","0-15",8192,32,'
    b'2048],["model.layers.*.mlp.up_proj","0-15",8192,32,2048]"SEQ_CLS""task_type":null,{"base":"HuggingFaceTB/SmolLM2-'
    b'135M-Instruct","config":{"alora_invocation_tokens":null,"arrow_config":null,"auto_mapping":null,"bias":"none",'
    b'"corda_config":null,"ensure_weight_tying":false,"eva_config":null,"exclude_modules":null,"fan_in_fan_out":false,'
    b'"inference_mode":true,"init_lora_weights":true,"kasa_config":null,"layer_replication":null,"layers_pattern":null,'
    b'"layers_to_transform":null,"loftq_config":{},"lora_bias":false,"lora_dropout":0.05,"lora_ga_config":null,'
    b'"megatron_config":null,"megatron_core":"megatron.core","modules_to_save":null,"monteclora_config":null,'
    b'"peft_type":"LORA","peft_version":"0.21.2","qalora_group_size":16,"target_modules":["k_proj","o_proj","q_proj",'
    b'"v_proj"],"target_parameters":null,"task_type":"CAUSAL_LM","trainable_token_indices":null,"use_bdlora":null,'
    b'"use_dora":false,"use_qalora":false,"velora_config":null},"dtype":"f16","modules":[["model.layers.*.self_attn.'
    b'k_proj","0-29",192,8,576],["model.layers.*.self_attn.o_proj","0-29",576,8,576],["model.layers.*.self_attn.q_proj"'
    b',"0-29",576,8,576],["model.layers.*.self_attn.v_proj","0-29",192,8,576]],"revision":null}'
)
"""DEFLATE's preset dictionary; part of the format, never changed."""


class Description(NamedTuple):
    """A coded adapter's metadata; `shapes` are those of the adapter that was coded."""

    base: BaseId
    dtype: str
    config: Mapping[str, Any]
    shapes: Mapping[str, Shape]


def packed(adapter: Adapter) -> bytes:
    """Encode the description of an adapter: canonical JSON, compressed by DEFLATE with the dictionary."""
    document = {
        "base": adapter.base.name,
        "revision": adapter.base.revision,
        "dtype": adapter.dtype,
        "config": dict(adapter.config),
        "modules": list(_families(adapter.shapes)),
    }
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    return deflate.compress(canonical_json(document)) + deflate.flush()


def unpacked(data: bytes) -> Description:
    """Decode what `packed` encoded. Raises AdapterFormatError."""
    inflate = zlib.decompressobj(-15, DICTIONARY)
    try:
        document = json.loads(inflate.decompress(data, LONGEST))
    except (zlib.error, ValueError, RecursionError) as error:
        raise malformed("the description cannot be read") from error
    if not inflate.eof or inflate.unused_data:
        raise malformed("the description is truncated, or longer than 4 MiB")
    try:
        found = Description(
            BaseId(document["base"], document["revision"]),
            document["dtype"],
            document["config"],
            dict(sorted(_shapes(document["modules"]))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise malformed("a field of the description is missing or mistyped") from error
    sound = isinstance(found.base.name, str) and isinstance(found.base.revision, str | None)
    if not sound or found.dtype not in WIDTHS or not isinstance(found.config, dict) or not found.shapes:
        raise malformed("a field of the description is missing or mistyped")
    if not all(path and path.isprintable() for path in found.shapes):
        raise malformed("a module's path is empty or not printable")
    names = {"base_model_name_or_path": found.base.name, "revision": found.base.revision}
    if faults := list(config_faults({**found.config, **names}, stored=True)):
        raise AdapterFormatError(faults)
    if not encodable(found.config):
        raise malformed("a field of the description is not Unicode (a lone surrogate)")
    return found


def _families(shapes: Mapping[str, Shape]) -> Iterator[list[Any]]:
    """Yield modules of one shape with paths that differ in the first number as [path with *, numbers, shape]."""
    families: dict[tuple[str, Shape], list[int]] = {}
    for path, shape in shapes.items():
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if re.fullmatch(r"0|[1-9][0-9]{0,8}", part)), None)
        if at is None or "*" in path:
            yield [path, "", *shape]
            continue
        template = ".".join([*parts[:at], "*", *parts[at + 1 :]])
        families.setdefault((template, shape), []).append(int(parts[at]))
    for (template, shape), numbers in sorted(families.items()):
        yield [template, _ranges(numbers), *shape]


def _ranges(numbers: Iterable[int]) -> str:
    """Format numbers as ranges.

    >>> _ranges([4, 0, 1, 2])
    '0-2,4'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)


def _shapes(families: Any) -> Iterator[tuple[str, Shape]]:
    seen: set[str] = set()
    characters = 0
    for template, numbers, dout, rank, din in families:
        shape = Shape(dout, rank, din)
        whole = all(type(n) is int for n in shape) and min(shape) >= 1 and max(shape) <= LARGEST
        if not whole or not isinstance(template, str) or not isinstance(numbers, str):
            raise malformed(f"a module has shape {tuple(shape)}"[:200])
        for path in _paths(template, numbers):
            if path in seen or len(seen) >= _MOST_MODULES:
                raise malformed("a module is listed twice" if path in seen else f"more than {_MOST_MODULES} modules")
            characters += len(path)
            if characters > _MOST_CHARACTERS:
                raise malformed(f"the modules' paths have more than {_MOST_CHARACTERS} characters")
            seen.add(path)
            yield path, shape


def _paths(template: str, numbers: str) -> Iterator[str]:
    if not numbers:
        yield template
        return
    for run in numbers.split(","):
        low, _, high = run.partition("-")
        first, last = int(low), int(high or low)
        if last - first >= _MOST_MODULES:
            raise malformed(f"more than {_MOST_MODULES} modules")
        for number in range(first, last + 1):
            yield template.replace("*", str(number), 1)
