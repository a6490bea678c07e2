"""Run in a process that has vLLM's own Python files: what they make of an export and of a shelf, as JSON.

usage: python vllm_classes.py EXPORT BASE TASK…       with LORASHELF_SHELVES set
"""

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import torch
from vllm.config.lora import LoRAConfig
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora import lora_model
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.plugins import load_general_plugins
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

lora_model.PIN_MEMORY = False  # there is no GPU


def sums(path: str, rank: int) -> dict[str, float]:
    """Module → the sum of (i + 1) (j + 2) ΔW_ij as vLLM computes the update of a folder."""
    helper = PEFTHelper.from_local_dir(path, None)
    helper.validate_legal(LoRAConfig(max_lora_rank=rank, lora_dtype=torch.float32))
    modules = {"q_proj", "v_proj"}
    model = lora_model.LoRAModel.from_local_checkpoint(
        path, modules, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    found = {}
    for name, lora in model.loras.items():
        delta = (lora.lora_b @ lora.lora_a * lora.scaling).double()
        rows, columns = (torch.arange(size, dtype=torch.float64) for size in delta.shape)
        found[name] = float((delta * (rows[:, None] + 1) * (columns + 2)).sum())
    return found


async def main(export: str, base: str, *tasks: str) -> dict[str, object]:
    files = FilesystemResolver(export)
    by_files = {task: await files.resolve_lora(base, task) for task in tasks}
    other = await files.resolve_lora("another/base", tasks[0])
    load_general_plugins()
    added = []

    async def add_lora(request: LoRARequest) -> bool:
        added.append(msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=LoRARequest))
        return True

    engine = SimpleNamespace(
        model_config=SimpleNamespace(model=base, max_model_len=8),
        add_lora=add_lora,
        renderer=None,
        input_processor=None,
    )
    models = OpenAIServingModels(engine, [BaseModelPath(name=base, model_path=base)])
    resolved = {task: await models.resolve_lora(task) for task in tasks}
    missing = await models.resolve_lora("nothing")
    engine.model_config.model = "another/base"
    models.lora_requests.clear()
    wrong = await models.resolve_lora(tasks[0])
    (resolver,) = (LoRAResolverRegistry.get_resolver(name) for name in LoRAResolverRegistry.get_supported_resolvers())
    return {
        "files": {task: sums(request.lora_path, 8) for task, request in by_files.items()},
        "files_of_another_base": other is None,
        "resolver": isinstance(resolver, LoRAResolver),
        "shelf": {task: sums(request.lora_path, 8) for task, request in resolved.items()},
        "ids": {task: request.lora_int_id for task, request in resolved.items()},
        "names": {task: request.lora_name for task, request in resolved.items()},
        "equal": all(request == LoRARequest(task, 1, "x") for task, request in resolved.items()),
        "added": [[request.lora_name, request.lora_int_id] for request in added],
        "missing": missing.error.code,
        "wrong": wrong.error.code,
        "there": all(Path(request.lora_path).exists() for request in resolved.values()),
    }


print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
