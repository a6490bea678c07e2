"""llama.cpp by its C functions: a model, its vocabulary, LoRA adapters, and one context that reads tokens.

The functions return null pointers on failure, which are objects but false, and explain it in the log only.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingExtra, ModelError, OutOfMemory
from ..lora.arrays import Array32, Float32

TOGETHER = 256  # tokens read in one call: their logits are in memory at once
SHORTEST = 512  # the context's length at first; it grows to the power of two that a text needs
_EXACT = (0, 0, 0)  # no flash attention, which computes in f16; keys and values in f32
_WARNING = 3  # llama.cpp's level
_said: deque[str] = deque(maxlen=8)
_callbacks: list[Any] = []
"""The log's callback: the library calls it as long as the process lives."""


def library() -> Any:
    """Return the module llama_cpp, whose log is kept instead of printed. Raises MissingExtra."""
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingExtra("the engine llamacpp", "llama-cpp-python", "llamacpp") from error
    if not _callbacks:
        _callbacks.append(llama_cpp.llama_log_callback(_noted))
        llama_cpp.llama_log_set(_callbacks[0], ctypes.c_void_p(0))
    return llama_cpp


def _noted(level: int, text: bytes, _: object) -> None:
    if level >= _WARNING and text.strip(b" .\n"):
        _said.append(text.decode("utf-8", "replace").strip())


def threads() -> int:
    """Return the number of threads to compute with: $OMP_NUM_THREADS, else the cores of this process."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(wanted) if wanted.isdecimal() and int(wanted) else cores


class LlamaModel:
    """A GGUF file in llama.cpp. Raises ModelError."""

    def __init__(self, path: Path, name: str, *, offload: bool) -> None:
        self._c, self.name = library(), name
        options = self._c.llama_model_default_params()
        options.n_gpu_layers = -1 if offload else 0
        self._model = self._made(self._c.llama_model_load_from_file, os.fsencode(path), options)
        self._context: list[Any] = []
        weakref.finalize(self, _free, self._c, self._model, self._context)
        self.vocabulary = self._c.llama_model_get_vocab(self._model)
        self.tokens = int(self._c.llama_vocab_n_tokens(self.vocabulary))
        self.positions = int(self._c.llama_model_n_ctx_train(self._model)) or None
        """The most tokens that the base was trained to read."""
        self.length = 0
        """The positions of the context."""
        self._applied: Any = None

    @property
    def description(self) -> str:
        """The model's architecture, size and types, as llama.cpp words it."""
        text = ctypes.create_string_buffer(256)
        self._c.llama_model_desc(self._model, text, len(text))
        return text.value.decode("utf-8", "replace")

    # adapters -----------------------------------------------------------------------------------------------------

    def load_adapter(self, path: Path) -> Any:
        """Load a LoRA file; it stays in memory until `free_adapter`. Raises ModelError."""
        return self._made(self._c.llama_adapter_lora_init, self._model, os.fsencode(path))

    def free_adapter(self, adapter: Any) -> None:
        """Free a loaded adapter, which is first taken off the context."""
        self._apply(None)
        self._c.llama_adapter_lora_free(adapter)

    def begin(self, adapter: Any, positions: int) -> None:
        """Prepare to read a text of so many positions with an adapter, or with none: what was read before is forgotten.

        The context grows if needed. Raises OutOfMemory.
        """
        if positions > self.length:
            self._open(positions)
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context[0]), True)
        self._apply(adapter)

    def _apply(self, adapter: Any) -> None:
        if self._context and adapter is not self._applied:
            one = (self._c.llama_adapter_lora_p_ctypes * 1)(*([adapter] if adapter else []))
            self._c.llama_set_adapters_lora(self._context[0], one, 1 if adapter else 0, (ctypes.c_float * 1)(1.0))
        self._applied = adapter

    def _open(self, positions: int) -> None:
        while self._context:
            self._c.llama_free(self._context.pop())
        self._applied, self.length = None, 0
        options = self._c.llama_context_default_params()
        options.n_ctx = max(SHORTEST, 1 << (positions - 1).bit_length())
        options.n_batch = options.n_ubatch = TOGETHER
        options.flash_attn_type, options.type_k, options.type_v = _EXACT
        options.n_threads = options.n_threads_batch = threads()
        self._context.append(self._made(self._c.llama_init_from_model, self._model, options, error=OutOfMemory))
        self.length = int(options.n_ctx)

    # tokens -------------------------------------------------------------------------------------------------------

    def read(self, tokens: Sequence[int], start: int, wanted: Sequence[bool]) -> Float32[Array32, "wanted vocabulary"]:
        """Read at most TOGETHER tokens at the positions from `start` on; return the logits after the wanted ones.

        Raises ModelError.
        """
        batch = self._c.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, (token, output) in enumerate(zip(tokens, wanted, strict=True)):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, output
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if code := self._c.llama_decode(self._context[0], batch):
                raise ModelError(f"llama.cpp cannot read the text ({code}): {_reason()}", where=self.name)
        finally:
            self._c.llama_batch_free(batch)
        if not any(wanted):
            return np.empty((0, self.tokens), np.float32)
        return np.ctypeslib.as_array(self._c.llama_get_logits(self._context[0]), (sum(wanted), self.tokens))

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the token ids of a text, in which special tokens are recognised; `special` adds those at the ends."""
        data = text.encode("utf-8", "replace")
        count = len(data) + 8
        while True:
            ids = (self._c.llama_token * count)()
            found = self._c.llama_tokenize(self.vocabulary, data, len(data), ids, count, special, True)
            if found >= 0:
                return list(ids[:found])
            count = -found

    def decode(self, tokens: Sequence[int], special: bool) -> str:
        """Return the text of tokens, with that of special ones if `special`; an incomplete character is \ufffd."""
        ids = (self._c.llama_token * len(tokens))(*tokens)
        count = 16 * len(tokens) + 16
        while True:
            data = ctypes.create_string_buffer(count)
            found = self._c.llama_detokenize(self.vocabulary, ids, len(tokens), data, count, False, special)
            if found >= 0:
                return data.raw[:found].decode("utf-8", "replace")
            count = -found

    def _made(self, make: Any, *arguments: Any, error: type[ModelError] = ModelError) -> Any:
        """Return the pointer that a function of the library makes. Raises `error`."""
        _said.clear()
        pointer = make(*arguments)
        if not pointer:  # a null pointer is not None
            cure = "free memory, or give shorter texts" if error is OutOfMemory else "check the file, or make it again"
            raise error(f"llama.cpp cannot do this: {_reason()}", where=self.name, cure=cure)
        return pointer


def _free(c: Any, model: Any, context: list[Any]) -> None:
    while context:
        c.llama_free(context.pop())
    c.llama_model_free(model)  # with its adapters


def _reason() -> str:
    return "; ".join(dict.fromkeys(_said)) or "no reason given"
