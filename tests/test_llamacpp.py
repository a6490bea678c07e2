"""The engine llamacpp, held against transformers on the same weights; swaps, caches, contexts, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorashelf import (
    Adapter,
    BaseId,
    Factors,
    Modules,
    Shelf,
    evaluate,
    new_settings,
    open_model,
    plan_add,
    read_adapter,
    read_tasks,
    write_adapter,
)
from lorashelf.cache_folder import cache_folder
from lorashelf.errors import ModelError, ShapeMismatch, TooLong, UsageError
from lorashelf.models import llama_adapters
from lorashelf.models.hf import HFBackend
from lorashelf.models.protocol import Answers, Continues, LanguageModel, Row, Scores, mean_loss
from lorashelf.models.sampling import Sampler, Sampling, Token
from lorashelf.result_store import ResultStore
from lorashelf.serving.scheduler import Scheduler
from lorashelf.tasks.folders import Example, ExampleSet
from test_scheduler import ask
from tiny_gguf import HIDDEN, INNER, tiny_gguf

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from lorashelf.models.llama_adapters import LlamaAdapters
from lorashelf.models.llama_library import TOGETHER
from lorashelf.models.llamacpp import LlamaCppBackend

ROOT = Path(__file__).parent.parent
TEXTS = ["the cats sleeps", "äöü ab", "It go"]
SET = ExampleSet("mend", "Do:", tuple(Example(text, text[::-1]) for text in TEXTS))
MOST = 12
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("LORASHELF_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("base") / "tiny.gguf", context=2048)


@pytest.fixture(scope="module")
def theirs(base: Path) -> HFBackend:
    return HFBackend.open(str(base), device="cpu", dtype="f32")


@pytest.fixture
def model(base: Path) -> LlamaCppBackend:
    return LlamaCppBackend.open(str(base))


def adapter(seed: int, size: float = 0.4, base: str = "") -> Adapter:
    """A random adapter of every linear layer of the tiny base."""
    rng, modules = np.random.default_rng(seed), {}
    sizes = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (HIDDEN, HIDDEN))
    sizes |= {"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    for name, (dout, din) in sizes.items():
        a, b = rng.standard_normal((3, din), np.float32), size * rng.standard_normal((dout, 3), np.float32)
        modules[f"model.layers.0.{name}"] = Factors(a, b, 0.7)
    return Adapter(Modules(modules), BaseId(base))


# the same as transformers ---------------------------------------------------------------------------------------------


def test_losses_are_those_of_transformers(model: LlamaCppBackend, theirs: HFBackend) -> None:
    pairs = [(x, SET) for x in (None, adapter(1), adapter(2), None)]
    ours, others = model.nll(pairs), theirs.nll(pairs)
    for found, wanted in zip(ours, others, strict=True):
        assert [loss.tokens for loss in found] == [loss.tokens for loss in wanted]
        assert [loss.nll for loss in found] == pytest.approx([loss.nll for loss in wanted], rel=1e-5)
    means = [mean_loss(found) for found in ours]
    assert means[0] == means[3]
    assert min(abs(means[0] - means[1]), abs(means[1] - means[2])) > 0.05  # the adapters matter


def test_answers_and_streams_are_those_of_transformers(model: LlamaCppBackend, theirs: HFBackend) -> None:
    for x in (None, adapter(1), adapter(2)):
        wanted = theirs.answers(x, "Do:", TEXTS, max_new_tokens=MOST)
        assert model.answers(x, "Do:", TEXTS, max_new_tokens=MOST) == wanted
        streams = ["".join(model.stream(x, "Do:", text, max_new_tokens=MOST)) for text in TEXTS]
        assert streams == wanted
    assert len({model.answers(x, "Do:", TEXTS)[0] for x in (adapter(1), adapter(2))}) == 2


def test_tokens_and_prompts_are_those_of_transformers(smollm2: HFBackend) -> None:
    """Every example of the few-shot tasks, in eight languages."""
    ours = open_model(None, "llamacpp", capability=Scores)
    assert isinstance(ours, LlamaCppBackend)
    assert (ours.template, ours.prompt_id, ours.context) == (smollm2.template, smollm2.prompt_id, smollm2.context)
    assert ours.text.stops == smollm2.text.stops
    for task in read_tasks(ROOT / "examples" / "fewshot").values():
        for split in ("train", "validation"):
            examples = task.examples(split)
            for example in examples.examples:
                query, answer = tokens = ours.text.tokens(examples, example)
                assert tokens == smollm2.text.tokens(examples, example)
                for special in (False, True):
                    decode = [each._tokenizer.decode for each in (ours.text, smollm2.text)]
                    assert len({one([*query, *answer], skip_special_tokens=special) for one in decode}) == 1


def test_other_tokens_than_transformers_are_announced(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A known disagreement: llama.cpp puts SentencePiece's space after special tokens, too."""
    LlamaCppBackend.open(str(base))
    assert "SentencePiece" not in caplog.text
    path = str(tiny_gguf(tmp_path / "pieces.gguf", pieces=True))
    ours = LlamaCppBackend.open(path)
    assert "compare its losses with those of llama.cpp only" in caplog.text
    theirs = HFBackend.open(path, device="cpu", dtype="f32")
    assert ours.text.encoded("the") == theirs.text.encoded("the")
    assert ours.text.encoded("<|im_start|>the") != theirs.text.encoded("<|im_start|>the")


@pytest.mark.long
def test_the_packaged_base_loses_what_its_quantised_products_lose(smollm2: HFBackend) -> None:
    """Transformers multiplies dequantised weights, llama.cpp quantised ones with activations in eight bits."""
    ours = open_model(None, "llamacpp", capability=Scores)
    tasks = read_tasks(ROOT / "examples" / "fewshot")
    for name in ("gec-de", "tone-en"):
        own, examples = read_adapter(ROOT / "examples" / "zoo" / name), tasks[name].examples("validation").drawn(4)
        pairs = [(None, examples), (own, examples)]
        wanted, found = ([mean_loss(losses) for losses in each.nll(pairs)] for each in (smollm2, ours))
        assert found == pytest.approx(wanted, abs=0.03)
        assert found[0] - found[1] > 0.05


def test_a_result_is_kept_under_its_engine_and_its_file(tmp_path: Path, model: LlamaCppBackend, theirs: Any) -> None:
    other = LlamaCppBackend.open(str(tiny_gguf(tmp_path / "tiny.gguf", seed=1, context=2048)))
    assert len({model.id, other.id, theirs.id}) == 3
    assert model.prompt_id == theirs.prompt_id
    assert model.weights != other.weights
    assert "llama.cpp" in model.id
    with pytest.raises(UsageError, match="cannot represent texts"):
        open_model(str(tmp_path / "tiny.gguf"), "llamacpp", capability=LanguageModel)
    assert isinstance(model, Scores)
    assert isinstance(model, Answers)
    assert isinstance(model, Continues)


# swaps ----------------------------------------------------------------------------------------------------------------


def test_nothing_of_another_text_or_adapter_is_left(model: LlamaCppBackend) -> None:
    """The same losses to the last bit, whatever was read before."""
    one, two = adapter(1), adapter(2)
    alone = [model.nll([(x, SET)])[0] for x in (None, one, two)]
    assert model.nll([(two, SET), (None, SET), (one, SET), (None, SET)]) == [alone[i] for i in (2, 0, 1, 0)]
    _ = model.answers(two, "Do:", TEXTS)
    assert model.nll([(None, SET)])[0] == alone[0]


def test_streams_side_by_side_are_the_streams_alone(model: LlamaCppBackend) -> None:
    pair = (adapter(1), adapter(2))
    alone = ["".join(model.stream(x, "Do:", text, max_new_tokens=MOST)) for x in pair for text in TEXTS]
    streams = [model.stream(x, "Do:", text, max_new_tokens=MOST) for x in pair for text in TEXTS]
    pieces: list[list[str]] = [[] for _ in streams]
    left = dict(enumerate(streams))
    while left:
        for i, stream in list(left.items()):
            piece = next(stream, None)
            if piece is None:
                del left[i]
            else:
                pieces[i].append(piece)
    assert ["".join(each) for each in pieces] == alone


def test_a_scheduler_of_requests_gives_each_what_it_gets_alone(model: LlamaCppBackend) -> None:
    """One text at a time, tasks in turn, with a text longer than the first context."""
    tasks, texts = [adapter(1), None, adapter(2)], ["It go", "ab " * 200, "the cats"]
    wanted = [model.answers(x, "Do:", [text], max_new_tokens=MOST)[0] for x, text in zip(tasks, texts, strict=True)]
    scheduler = Scheduler(LlamaCppBackend.open(model.name))
    assert scheduler.most_rows == 1
    heard = [ask(scheduler, model, x, text, most=MOST) for x, text in zip(tasks, texts, strict=True)]
    assert [each.result()[0] for each in heard] == wanted
    scheduler.close()


def test_a_row_reports_what_its_sampler_is_asked_for(model: LlamaCppBackend) -> None:
    query = model.text.query("Do:", "It go")
    batch = model.decoding(4)
    row = Row(query, adapter(1), Sampler(Sampling(logprobs=3)))
    ids, steps = [], [*batch.join([row])]
    while len(ids) < MOST:
        (token,) = steps
        assert isinstance(token, Token)
        assert token.logprob == pytest.approx(token.alternatives[0][1])
        ids.append(token.id)
        steps = batch.step()
    whole = ExampleSet("mend", "Do:", (Example("It go", ""),))
    assert model.text.decoded(ids) == model.answers(adapter(1), "Do:", ["It go"], max_new_tokens=MOST)[0]
    assert model.nll([(None, whole)])[0][0].tokens == 1  # another user in between
    (again,) = batch.step()
    assert isinstance(again, Token)
    batch.keep([])
    assert batch.step() == []


def test_threads_take_turns(model: LlamaCppBackend) -> None:
    pair = (adapter(1), adapter(2))
    expected = [model.nll([(x, SET)]) for x in pair]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: model.nll([(pair[i % 2], SET)]), range(8)))
    assert found == expected * 4


def test_few_adapters_are_in_memory_and_few_files_in_the_cache(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORASHELF_CACHE", str(tmp_path))
    monkeypatch.setattr(llama_adapters, "FILES", 3)
    model = LlamaCppBackend.open(str(base))
    pool = model.adapters = LlamaAdapters(model._model, model.adapters._base, 2)
    one, two, three, four = (adapter(seed) for seed in range(4))
    first = model.nll([(one, SET)])

    def loads(*several: Adapter) -> int:
        for x in several:
            model.nll([(x, SET)])
        return pool.loads

    assert loads(two, one) == 2
    assert loads(three, one) == 3  # two left
    assert loads(two, four) == 5
    assert len(pool._held) == 2
    assert model.nll([(one, SET)]) == first
    files = [path for path in (cache_folder() / "gguf").iterdir() if not path.name.startswith(".")]
    assert len(files) == 3


def test_a_file_of_the_cache_is_checked_before_it_is_used(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORASHELF_CACHE", str(tmp_path))
    x = adapter(1)
    wanted = LlamaCppBackend.open(str(base)).nll([(x, SET)])
    (file,) = (tmp_path / "gguf").iterdir()
    whole, stamp = file.read_bytes(), file.stat().st_ino
    assert LlamaCppBackend.open(str(base)).nll([(x, SET)]) == wanted
    assert file.stat().st_ino == stamp  # taken as it is
    file.write_bytes(whole[:-8] + bytes(8))
    assert LlamaCppBackend.open(str(base)).nll([(x, SET)]) == wanted
    assert file.read_bytes() == whole


# contexts -------------------------------------------------------------------------------------------------------------


def test_the_context_grows_with_the_text_up_to_the_base_s(model: LlamaCppBackend, theirs: HFBackend) -> None:
    """More than one call of llama.cpp, and more than its first context."""
    long = ExampleSet("mend", "Do:", (Example("xy " * 250, "yx " * 100), Example("It go", "og")))
    x = adapter(1)
    (found,), (wanted,) = model.nll([(x, long)]), theirs.nll([(x, long)])
    assert [loss.nll for loss in found] == pytest.approx([loss.nll for loss in wanted], rel=1e-4)
    assert model.nll([(x, SET)]) == LlamaCppBackend.open(model.name).nll([(x, SET)])
    text = "ab " * 1500
    assert model.fitting(ExampleSet("mend", "Do:", (Example(text, "a"),)))[1] == 1
    with pytest.raises(TooLong, match="too long to answer"):
        model.stream(None, "Do:", text)
    assert model.answers(None, "Do:", [text]) == [""]
    with pytest.raises(ModelError, match="longer than the model's context"):
        model.nll([(None, ExampleSet("mend", "Do:", (Example(text, "a"),)))])


# refusals -------------------------------------------------------------------------------------------------------------


def test_adapters_of_another_base_are_named_together(model: LlamaCppBackend, caplog: pytest.LogCaptureFixture) -> None:
    wide = Factors(np.ones((1, 2 * HIDDEN), "f4"), np.ones((HIDDEN, 1), "f4"))
    odd = Adapter(Modules({"model.layers.0.self_attn.q_proj": wide, "model.layers.4.mlp.up_proj": wide}))
    with pytest.raises(ShapeMismatch) as refused:
        model.fits({"a": odd, "b": odd, "c": adapter(1)})
    assert len(refused.value.faults) == 2
    assert all(fault.startswith("a and 1 more adapters: ") for fault in refused.value.faults)
    with pytest.raises(ShapeMismatch, match=r"mlp\.up_proj: the base .* has 1 block"):
        model.nll([(odd, SET)])
    with pytest.raises(ShapeMismatch):
        model.stream(odd, "Do:", "x")
    model.fits({"a": adapter(1, base="acme/other")})
    assert "acme/other" in caplog.text


def test_a_loss_that_is_not_finite_is_an_error(model: LlamaCppBackend) -> None:
    x = Factors(np.full((1, HIDDEN), 1e30, "f4"), np.full((HIDDEN, 1), 1e30, "f4"))
    with pytest.raises(ModelError, match="has a loss that is not finite"):
        model.nll([(Adapter(Modules({"model.layers.0.self_attn.o_proj": x})), SET)])


def test_a_file_that_llama_cpp_refuses_is_an_error_and_no_crash(model: LlamaCppBackend, tmp_path: Path) -> None:
    """The library returns a null pointer, which is not None."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    for path in (tmp_path / "x.gguf", tmp_path / "missing.gguf"):
        with pytest.raises(ModelError, match=r"llama\.cpp cannot do this: .+") as refused:
            model._model.load_adapter(path)
        assert "no reason given" not in refused.value.what
    model.nll([(None, SET)])


def test_a_text_beyond_the_context_is_an_error_and_no_crash(model: LlamaCppBackend) -> None:
    model._model.begin(None, 8)
    for start in range(0, model._model.length, TOGETHER):
        model._model.read([1] * TOGETHER, start, [False] * TOGETHER)
    with pytest.raises(ModelError, match=r"llama\.cpp cannot read the text"):
        model._model.read([1], model._model.length, [True])
    model.nll([(None, SET)])


def test_a_base_that_is_cut_off_is_refused(base: Path, tmp_path: Path) -> None:
    whole = base.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-5000])
    with pytest.raises(ModelError) as refused:
        LlamaCppBackend.open(str(tmp_path / "cut.gguf"))
    assert refused.value.exit_code == 5
    with pytest.raises(ModelError, match="there is no GGUF file of this name"):
        LlamaCppBackend.open(str(tmp_path / "none.gguf"))
    with pytest.raises(ModelError, match="the base is not a GGUF file"):
        LlamaCppBackend.open(str(tmp_path))


def test_options_of_transformers_are_refused(base: Path) -> None:
    with pytest.raises(UsageError, match="types of the GGUF file"):
        LlamaCppBackend.open(str(base), dtype="f16")
    with pytest.raises(UsageError, match="'npu' is not available"):
        LlamaCppBackend.open(str(base), device="npu")


# commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Four adapters of the tiny base, a shelf of two of them, and their tasks."""
    shelf = Shelf.create(tmp_path / "s", new_settings(2, encoding="coded", policy="kmerge"))
    for i, name in enumerate(("a", "b", "c", "d")):
        write_adapter(adapter(i), tmp_path / "zoo" / name)
        folder = tmp_path / "tasks" / name
        folder.mkdir(parents=True)
        (folder / "task.toml").write_text('prompt = "Do:"\nmetric = "rouge_l"\nmax_new_tokens = 9\n')
        for split in ("train", "validation"):
            lines = [{"input": f"in {k} {name}", "output": f"out {k}"} for k in range(3)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if i < 2:
            shelf.commit(plan_add(shelf.snapshot(), adapter(i), name, details={"prompt": "Do:", "max_new_tokens": 9}))
    return tmp_path


def test_the_commands_run_on_llama_cpp(house: Path, base: Path, theirs: HFBackend, run: Any) -> None:
    engine = ("--base", base, "--engine", "llamacpp")
    code, found = run("eval", house / "s", "--data", house / "tasks", "--tasks", "a,b", *engine)
    assert code == 0
    snapshot, tasks = Shelf(house / "s").snapshot(), read_tasks(house / "tasks")
    wanted = evaluate(theirs, {name: snapshot.adapter(name) for name in ("a", "b")}, tasks, journal=ResultStore())
    for name, record in wanted.document()["tasks"].items():
        assert found["tasks"][name]["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert found["tasks"][name]["score"] == record["score"]
    code, answered = run("generate", house / "s", "a", "It go", *engine)
    assert code == 0
    assert answered["text"] == theirs.answers(snapshot.adapter("a"), "Do:", ["It go"], max_new_tokens=9)[0]
    code, refused = run("generate", house / "s", "--auto", "It go", "--examples", house / "tasks", *engine)
    assert (code, refused["error"]["kind"]) == (2, "usage")
    search = ("--slots", 2, "--method", "d2c", "--examples", house / "tasks", "--iterations", 6)
    zoo = [house / "zoo" / name for name in ("a", "b", "c", "d")]
    code, ours = run("cluster", *zoo, "-o", house / "ours", *search, *engine)
    assert code == 0
    assert run("cluster", *zoo, "-o", house / "hf", *search, "--base", base)[1]["partition"] == ours["partition"]
    code, refused = run("cluster", *zoo, "-o", house / "x", "--slots", 2, "--method", "random", *engine)
    assert code == 2
    assert "--engine" in refused["error"]["message"]


def test_neither_torch_nor_transformers_is_needed(house: Path, base: Path) -> None:
    code = """
import sys
sys.modules |= dict.fromkeys(("torch", "transformers", "peft", "huggingface_hub"))  # importing them fails
from lorashelf.cli import main
main(sys.argv[1:])
"""
    for words in (
        ("generate", house / "s", "a", "It go", "--engine", "llamacpp"),
        ("eval", house / "s", "--data", house / "tasks", "--tasks", "a", "--engine", "llamacpp", "--loss-only"),
        ("export", house / "s", "-o", house / "out", "--format", "ollama"),
    ):
        run = [sys.executable, "-c", code, *map(str, words), "--base", str(base), "--json"]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)
