"""Training a LoRA on a base model: PEFT's layers and AdamW, one step at a time; the base stays frozen.

Not transformers' Trainer: here a step's draws are seeded by its number, so an interrupted run ends at the same
weights; batches are cut by tokens; and the loss is that of evaluation, by the same code.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..errors import MissingExtra, OutOfMemory, UsageError
from ..formats.peft import rounded
from ..lora.adapter import Adapter, BaseId, Factors, Modules
from ..models.hf import HFBackend
from ..models.hooks import sizes
from ..models.loading import libraries
from ..models.memory import within_memory
from ..models.protocol import Loss
from ..models.tokens import Tokens
from ..tasks.folders import ExampleSet
from .config import Hyperparameters

LARGEST_GRADIENT = 1.0  # the norm is clipped to this
_NAME = "default"  # PEFT's name for the only adapter
_PREFIX = "base_model.model."
_logger = logging.getLogger("lorashelf")


def peft_library() -> Any:
    """Import peft. Raises MissingExtra."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("training", "peft", "llm") from error
    return peft


def target_layers(model: Any, names: Sequence[str] | None = None) -> list[str]:
    """Return the paths of the layers to adapt: the linear ones inside attention blocks, or those named in `names`.

    For most bases q_proj, k_proj, v_proj, o_proj; for GPT-2 c_attn and attn.c_proj. Raises UsageError.
    """
    linear = [path for path, layer in model.named_modules() if sizes(layer) is not None]
    if names is None:
        chosen = [path for path in linear if "attn" in _block(path) or "attention" in _block(path)]
        unknown = [] if chosen else ["attention"]
    else:
        chosen = [path for path in linear if any(path == name or path.endswith(f".{name}") for name in names)]
        unknown = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in linear)]
    if unknown:
        known = sorted({path.rpartition(".")[2] for path in linear})
        what = f"the base has no linear layer named {' or '.join(map(repr, unknown))}"
        raise UsageError(what, cure=f"choose targets from {', '.join(known)}")
    return chosen


def _block(path: str) -> str:
    return path.rpartition(".")[0].lower()


class LoraTrainer:
    """A backend's base with a fresh LoRA on it. `close` restores the base."""

    def __init__(self, backend: HFBackend, hyperparameters: Hyperparameters, layers: Sequence[str]) -> None:
        peft = peft_library()
        self.backend, self._torch = backend, libraries()[0]
        model = backend.base.model
        transposed = any(type(model.get_submodule(path)).__name__ == "Conv1D" for path in layers)
        config = peft.LoraConfig(
            r=hyperparameters.rank,
            lora_alpha=hyperparameters.alpha,
            lora_dropout=hyperparameters.dropout,
            target_modules=list(layers),
            fan_in_fan_out=transposed,
            task_type="CAUSAL_LM",
        )
        fields = ("task_type", "lora_dropout", "bias", "fan_in_fan_out", "init_lora_weights")
        self._config = {name: value for name, value in config.to_dict().items() if name in fields}
        with self._drawing(hyperparameters.init_seed), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, to PEFT
            self._peft = peft.get_peft_model(model, config)
        self._peft.eval()  # keep the base's own dropout off: the loss is that of evaluation
        self._parameters = {n: p for n, p in self._peft.named_parameters() if p.requires_grad}
        self._optimizer = self._torch.optim.AdamW(self._parameters.values(), lr=0.0, weight_decay=0.0)
        self._one_by_one = False

    def learn(self, batch: Sequence[Tokens], seed: int) -> list[float]:
        """Compute the gradient of Σ NLL / Σ tokens over a batch; returns the NLL of each example.

        If memory runs out, the examples are taken one by one from then on: the same gradient, more slowly. Raises
        OutOfMemory if that is too much as well.
        """
        cure = "lower --max-length, free memory, or take a smaller base"
        limit = partial(within_memory, "out of memory, even with one example at a time", self.backend.base.name, cure)
        if not self._one_by_one:
            try:
                with limit():
                    return self._gradients(batch, seed)
            except OutOfMemory:
                _logger.warning("out of memory with %d examples in a step; taking them one at a time", len(batch))
                self._one_by_one = True
        with limit():
            return self._gradients(batch, seed)

    def update(self, rate: float) -> float:
        """Step along the clipped gradient; returns the norm before clipping. If that is not finite, nothing changes."""
        clip = self._torch.nn.utils.clip_grad_norm_
        norm = float(clip(list(self._parameters.values()), LARGEST_GRADIENT))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        return norm

    def measure(self, adapter: Adapter | None, examples: ExampleSet) -> list[Loss]:
        """Return the losses with an adapter, as measured by the backend, without the factors in training."""
        with self._peft.disable_adapter():
            return self.backend.nll([(adapter, examples)])[0]

    def adapter(self, dtype: str) -> Adapter:
        """Return the current factors, rounded to the dtype in which they will be stored."""
        modules = {}
        for name, layer in self._peft.named_modules():
            if _NAME in getattr(layer, "lora_A", {}):
                a, b = (
                    half[_NAME].weight.detach().float().cpu().numpy().copy() for half in (layer.lora_A, layer.lora_B)
                )
                modules[name.removeprefix(_PREFIX)] = Factors(a, b, layer.scaling[_NAME])
        return rounded(Adapter(Modules(modules), BaseId(self.backend.base.name), dtype, self._config))

    def state(self) -> dict[str, Any]:
        """Return a copy of all that the next steps depend on."""
        parameters = {name: p.detach().clone() for name, p in self._parameters.items()}
        return {"parameters": parameters, "optimizer": copy.deepcopy(self._optimizer.state_dict())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a state."""
        with self._torch.no_grad():
            for name, values in state["parameters"].items():
                self._parameters[name].copy_(values)
        self._optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        """Remove the LoRA from the base."""
        self._peft.unload()

    def _gradients(self, batch: Sequence[Tokens], seed: int) -> list[float]:
        self._optimizer.zero_grad(set_to_none=True)
        count = sum(len(answer) for _, answer in batch)
        cuts = [[i] for i in range(len(batch))] if self._one_by_one else self.backend.batches(batch)
        sums = [0.0] * len(batch)
        with self._drawing(seed), self._dropping():
            for members in cuts:
                row, losses = self.backend.token_losses([batch[i] for i in members])
                (losses.sum() / count).backward()
                for i, loss in zip(members, self.backend.sums(row, losses, len(members)), strict=True):
                    sums[i] = loss
        return sums

    @contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        """Seed torch's generators for the block; the caller's are restored afterwards."""
        device = self.backend.base.model.device
        with self._torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._torch.manual_seed(seed)
            yield

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """Turn the LoRA's dropout on for the block."""
        layers = [m.lora_dropout for m in self._peft.modules() if hasattr(m, "lora_dropout")]
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()
