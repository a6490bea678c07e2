"""The registry of formats, by `--format`."""

from __future__ import annotations

from ..registry import Registry
from .gguf import Gguf
from .mlx import Mlx
from .ollama import Ollama
from .peft import Peft
from .target import Format

FORMATS: Registry[Format] = Registry("format")
for each in (Peft(), Gguf(), Ollama(), Mlx()):
    FORMATS.add(each.name, each)
