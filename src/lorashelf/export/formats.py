"""The registry of formats, by `--format`."""

from __future__ import annotations

from ..registry import Registry
from .gguf import Gguf
from .mlx import Mlx
from .ollama import Ollama
from .onnx import Onnx
from .peft import Peft
from .target import Format
from .vllm import Vllm

FORMATS: Registry[Format] = Registry("format")
for each in (Peft(), Vllm(), Gguf(), Ollama(), Mlx(), Onnx()):
    FORMATS.add(each.name, each)
