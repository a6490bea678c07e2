"""Rows of different tasks in one forward pass: each as alone, whatever joins, leaves or breaks beside it; sampling."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

from lorashelf import Adapter, BaseId, Factors, Modules
from lorashelf.errors import ModelError, OutOfMemory, ShapeMismatch
from lorashelf.models import hooks
from lorashelf.models.hf import HFBackend
from lorashelf.models.protocol import Row
from lorashelf.models.sampling import Sampler, Sampling, Token
from tiny_base import ARCHITECTURES, tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a first text", "b", "something rather longer than the others, for the padding", "d e f", "again"]
TARGETS = {"gpt2": ("c_attn", "c_proj", "c_fc")}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFBackend]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: HFBackend.open(str(tiny_base(folder / name, name)), device="cpu", dtype="f32") for name in ARCHITECTURES
    }


@pytest.fixture
def llama(bases: dict[str, HFBackend]) -> HFBackend:
    return bases["llama"]


def adapter(backend: HFBackend, seed: int, architecture: str = "llama", *, size: float = 0.3) -> Adapter:
    """Random factors; rank and modules differ from adapter to adapter."""
    rng = np.random.default_rng(seed)
    names = TARGETS.get(architecture, ("q_proj", "v_proj", "o_proj", "down_proj"))[: 2 + seed % 3]
    modules = {}
    for path, layer in backend.base.model.named_modules():
        if path.rpartition(".")[2] in names and (there := hooks.sizes(layer)):
            a, b = rng.standard_normal((2 + seed % 4, there[1])), rng.standard_normal((there[0], 2 + seed % 4))
            modules[path] = Factors((size * a).astype("f4"), (size * b).astype("f4"), 1.5)
    return Adapter(Modules(modules), BaseId(backend.base.name), "f32", {"fan_in_fan_out": architecture == "gpt2"})


def row(backend: HFBackend, adapted: Adapter | None, text: str, **sampling: object) -> Row:
    options = {"logprobs": 8, **sampling}
    return Row(backend.text.query("Do:", text), adapted, Sampler(Sampling(**options)))


def alone(backend: HFBackend, one: Row, written: list[int]) -> np.ndarray:
    """log p of every token after the prompt and what was written, in a forward pass of this text without a cache."""
    ids = torch.tensor([[*one.prompt, *written]])
    with backend.adapters.on_base(one.adapter), torch.inference_mode():
        logits = backend.base.model(input_ids=ids, use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.double(), -1).numpy()


class Watched:
    """A batch whose every token is compared with the same text alone."""

    def __init__(self, backend: HFBackend, most: int = 8) -> None:
        self.backend, self.batch = backend, backend.decoding(most)
        self.written: dict[int, list[int]] = {}

    def join(self, *rows: Row) -> None:
        self.written.update({id(one): [] for one in rows})
        self._seen(rows, self.batch.join(rows))

    def step(self) -> None:
        self._seen(self.batch.rows, self.batch.step())

    def _seen(self, rows: object, tokens: list[Token | ModelError]) -> None:
        for one, token in zip(list(rows), tokens, strict=True):
            assert isinstance(token, Token)
            written = self.written[id(one)]
            expected = alone(self.backend, one, written)
            for other, logprob in [(token.id, token.logprob), *token.alternatives]:
                assert logprob == pytest.approx(expected[other], abs=2e-4)
            assert token.alternatives[0][1] == pytest.approx(expected.max(), abs=2e-4)
            written.append(token.id)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_is_as_alone_while_others_join_and_leave(bases: dict[str, HFBackend], architecture: str) -> None:
    backend = bases[architecture]
    rows = [
        row(backend, None if seed == 2 else adapter(backend, seed % 3, architecture), text)
        for seed, text in enumerate(TEXTS)
    ]
    watched = Watched(backend)
    assert watched.batch.most == 8
    watched.join(rows[0], rows[1], rows[2])
    watched.step()
    watched.join(rows[3])
    watched.step()
    watched.batch.keep([rows[0], rows[3]])  # the longest leaves
    watched.step()
    watched.join(rows[4], rows[2])
    for _ in range(3):
        watched.step()
    assert [one for one in watched.batch.rows if one is rows[1]] == []
    watched.batch.keep([])
    watched.join(rows[1])
    watched.step()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backend.base.model.modules())


def test_the_comparison_sees_another_rows_adapter(llama: HFBackend) -> None:
    rows = [row(llama, adapter(llama, seed), text) for seed, text in enumerate(TEXTS[:2])]
    watched = Watched(llama)
    watched.join(*rows)
    watched.batch._placed.reverse()
    with pytest.raises(AssertionError):
        watched.step()


def test_one_adapter_over_many_rows_is_one_product(llama: HFBackend) -> None:
    """Rows of one adapter stand side by side, in whatever order they came."""
    pair = [adapter(llama, seed) for seed in range(2)]
    watched = Watched(llama)
    watched.join(*(row(llama, pair[i % 2], text) for i, text in enumerate(TEXTS[:4])))
    watched.join(row(llama, pair[0], TEXTS[4]))
    placed = [id(each) for each in watched.batch._placed]
    assert sum(a != b for a, b in pairwise(placed)) == 1
    watched.step()


def test_a_full_pool_serves_the_rows_that_it_has_dropped(llama: HFBackend) -> None:
    rows = [row(llama, adapter(llama, seed), TEXTS[seed]) for seed in range(3)]
    small, expected = HFBackend(llama.base, adapters=1), llama.decoding(3)
    batch = small.decoding(1)
    batch.most = 3
    first = {i: token.id for i, token in enumerate(expected.join(rows))}
    assert {i: token.id for i, token in enumerate(batch.join(rows))} == first
    by_row = {id(one): token.id for one, token in zip(expected.rows, expected.step(), strict=True)}
    assert {id(one): token.id for one, token in zip(batch.rows, batch.step(), strict=True)} == by_row
    assert small.adapters.uploads == 3


def test_a_row_that_breaks_leaves_the_others_as_they_are(llama: HFBackend) -> None:
    sound, broken = row(llama, adapter(llama, 1), "a"), row(llama, adapter(llama, 2, size=1e30), "b")
    batch = llama.decoding(4)
    first, fault = batch.join([sound, broken])
    assert isinstance(first, Token)
    assert isinstance(fault, ModelError)
    second = batch.step()[batch.rows.index(sound)]
    batch.keep([sound])
    (third,) = batch.step()
    lonely = llama.decoding(1)
    expected = [*lonely.join([row(llama, adapter(llama, 1), "a")]), *lonely.step(), *lonely.step()]
    assert [t.id for t in (first, second, third)] == [t.id for t in expected]


def test_an_adapter_of_another_base_joins_nothing(bases: dict[str, HFBackend]) -> None:
    batch = bases["llama"].decoding(2)
    with pytest.raises(ShapeMismatch):
        batch.join([row(bases["llama"], adapter(bases["gpt2"], 0, "gpt2"), "a")])
    assert batch.rows == []


def test_out_of_memory_is_our_error(llama: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = llama.decoding(2)

    def scarce(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(llama.base.model, "forward", scarce)
    with pytest.raises(OutOfMemory):
        batch.join([row(llama, None, "a")])


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    """A base that keeps convolutions beside keys and values."""
    import transformers

    from tiny_base import tokenizer

    folder = tmp_path_factory.mktemp("lfm2")
    sizes = {"vocab_size": 261, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
    config = transformers.Lfm2Config(**sizes, **heads, bos_token_id=0, eos_token_id=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(chat=True).save_pretrained(folder)
    return HFBackend.open(str(folder), device="cpu", dtype="f32")


def test_a_base_with_another_state_continues_one_row_at_a_time(recurrent: HFBackend) -> None:
    batch = recurrent.decoding(8)
    assert batch.most == 1
    one = row(recurrent, None, "a text")
    (first,), (second,) = batch.join([one]), batch.step()
    assert isinstance(first, Token)
    assert second.logprob == pytest.approx(alone(recurrent, one, [first.id])[second.id], abs=1e-3)


# sampling -------------------------------------------------------------------------------------------------------------


def draws(logits: list[float], count: int, **options: float) -> Iterator[int]:
    sampler = Sampler(Sampling(seed=1, **options))
    return (sampler.choose(np.array(logits, np.float32)).id for _ in range(count))


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = [0.0, 1.0, 2.0]
    counts = np.bincount(list(draws(logits, 20_000, temperature=2.0)), minlength=3)
    weights = np.exp(np.array(logits) / 2)
    np.testing.assert_allclose(counts / counts.sum(), weights / weights.sum(), atol=0.015)


@pytest.mark.parametrize(("top_p", "expected"), [(0.5, {2}), (0.7, {1, 2}), (0.92, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_tokens_with_that_share(top_p: float, expected: set[int]) -> None:
    logits = np.log([0.24, 0.15, 0.6, 0.01]).tolist()
    logits[0], logits[1] = logits[1], logits[0]  # 1 is the second likeliest
    assert set(draws(logits, 3000, temperature=1.0, top_p=top_p)) == expected


def test_top_p_over_more_tokens_than_are_sorted_first() -> None:
    flat = [0.0] * 1000
    assert len(set(draws(flat, 20_000, temperature=1.0, top_p=0.9))) == pytest.approx(900, abs=2)
    assert len(set(draws([*flat, 9.0], 500, temperature=1.0, top_p=0.5))) == 1


def test_a_seed_fixes_the_draws_and_temperature_0_needs_none() -> None:
    logits = list(np.random.default_rng(0).standard_normal(50))
    assert list(draws(logits, 20, temperature=1.0)) == list(draws(logits, 20, temperature=1.0))
    likeliest = {int(np.argmax(logits))}
    assert set(draws(logits, 20)) == set(draws(logits, 20, temperature=1e-300)) == likeliest
    unseeded = [Sampler(Sampling(1.0)).choose(np.array(logits, np.float32)).id for _ in range(40)]
    assert len(set(unseeded)) > 1


def test_logprobs_are_at_temperature_1() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    token = Sampler(Sampling(temperature=0.1, top_p=0.5, seed=0, logprobs=2)).choose(logits)
    expected = logits - np.log(np.exp(logits).sum())
    assert token.logprob == pytest.approx(expected[1], abs=1e-6)
    assert [i for i, _ in token.alternatives] == [1, 2]
