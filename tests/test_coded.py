"""The encoding `coded`: two decoders agree on golden and fresh bytes; levels refine; damage is found and named."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import second_decoder
from factory import BASE, make_adapter
from lorashelf import Adapter, BaseId, Factors, Modules, norm, read_adapter
from lorashelf.errors import AdapterFormatError, UsageError
from lorashelf.formats.coded import decoder
from lorashelf.formats.coded.decoder import decode, inspect
from lorashelf.formats.coded.description import DICTIONARY, packed, unpacked
from lorashelf.formats.coded.encoder import Encoder
from lorashelf.formats.coded.files import divided, encode_for, encode_together, encode_within, read_levels, write_coded
from lorashelf.formats.coded.frame import MAGIC, framed
from lorashelf.formats.coded.ladder import ladder
from lorashelf.formats.coded.stream import StreamReader, StreamWriter, varint
from lorashelf.lora.algebra import combine
from lorashelf.lora.allocation import SLOPES, slope_within, slopes_within
from lorashelf.lora.quality import MEASURED, energy_for, quality, restoration, worth
from lorashelf.lora.quantiser import RATIOS, STARTS, TOTAL, quantiser, start_table

ZOO = Path(__file__).parent.parent / "examples" / "zoo"


def golden() -> tuple[list[bytes], list[str]]:
    (text,) = re.findall(r"<!-- golden: coded -->\n```\n(.*?)```", second_decoder.PAGE, re.DOTALL)
    *levels, digests = re.split(r"level \d+\n|digests\n", text)[1:]
    return [base64.b64decode(level) for level in levels], digests.split()


def adapter(
    seed: int = 0, *, layers: int = 3, rank: int = 4, dout: int = 96, din: int = 64, fall: float = 0.6
) -> Adapter:
    """Random modules whose singular values fall by a factor from one to the next."""
    rng = np.random.default_rng(seed)
    modules = {
        f"model.layers.{layer}.self_attn.{name}": Factors(
            rng.standard_normal((rank, din)).astype(np.float32),
            (rng.standard_normal((size, rank)) * fall ** np.arange(rank)).astype(np.float32),
            0.5,
        )
        for layer in range(layers)
        for name, size in (("q_proj", dout), ("v_proj", dout // 2))
    }
    config = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "x_unknown": [1, {"é": None}]}
    return Adapter(Modules(modules), BaseId(BASE, "main"), "f16", config)


def levels_of(x: Adapter, *slopes: float) -> list[bytes]:
    encoder = Encoder(x)
    for slope in slopes or (1e-4, 1e-5, 1e-6):
        encoder.add(slope)
    return encoder.levels


def lost(x: Adapter, y: Adapter) -> float:
    return norm(combine([x, y], [1, -1])) ** 2 / norm(x) ** 2


def assert_both_decoders_agree(levels: list[bytes]) -> None:
    _, found = second_decoder.decode(levels)
    modules = decode(levels).modules
    assert list(found) == list(modules)
    for path, (a, b) in found.items():
        assert a.tobytes() == modules[path].a.tobytes()
        assert np.ascontiguousarray(b).tobytes() == modules[path].b.tobytes()


# the format ----------------------------------------------------------------------------------------------------------


def test_golden_bytes_decode_to_their_digests() -> None:
    levels, digests = golden()
    assert [decode(levels[: n + 1]).digest for n in range(len(levels))] == digests
    assert len(set(digests)) == len(levels) == 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_second_decoder_reads_the_golden_bytes(count: int) -> None:
    assert_both_decoders_agree(golden()[0][:count])


def test_golden_bytes_refine_by_every_ratio() -> None:
    outlined = inspect(golden()[0])[2]
    assert [level.directions for level in outlined] == sorted(level.directions for level in outlined)
    chains = {ratio for chain in chains_of(golden()[0]) for ratio in chain[1:]}
    assert chains == set(RATIOS) - {1}


def chains_of(levels: list[bytes]) -> list[tuple[int, ...]]:
    from lorashelf.formats.coded.decoder import Outline

    coded = Outline(levels).coded
    return [side.chain for found in coded.values() for direction in found for side in (direction.u, direction.v)]


@pytest.mark.parametrize("seed", range(3))
def test_both_decoders_agree_on_fresh_levels(seed: int) -> None:
    levels = levels_of(adapter(seed), 3e-4, 5e-5, 1e-5, 2e-6)
    assert {len(chain) for chain in chains_of(levels)} >= {2, 3}
    assert_both_decoders_agree(levels)


def test_both_decoders_agree_on_a_real_adapter() -> None:
    encoder = Encoder(read_adapter(ZOO / "gec-de"))
    for size in (1500, 3000, 6000):
        encoder.add_within(size)
    assert_both_decoders_agree(encoder.levels)


def test_the_page_has_the_dictionary_and_the_steps() -> None:
    assert second_decoder.DICTIONARY == DICTIONARY
    assert [step for step, _ in STARTS[:22]] == second_decoder.STEPS


@pytest.mark.parametrize("chain", [(0,), (9,), (21,), (25,), (4, 2), (4, 3), (22, 2, 3), (30, 3, 3, 2)])
def test_the_two_laws_are_one(chain: tuple[int, ...]) -> None:
    q, edges = quantiser(chain), second_decoder.edges_of(chain)
    assert q.edges.tolist() == edges
    assert q.centres.tolist() == [second_decoder.centre(edges, k) for k in range(len(edges))]


@pytest.mark.parametrize("start", range(len(STARTS)))
def test_frequencies_follow_the_gaussian(start: int) -> None:
    q = quantiser((start,))
    table = q.start_frequencies()
    assert table.sum() == TOTAL
    assert table.min() >= 1
    x = np.abs(np.random.default_rng(0).standard_normal(400_000)) * 2**16
    counted = np.bincount(np.searchsorted(q.edges, x, side="right"), minlength=q.bins + 2) / len(x)
    expected = np.append(table[0], table[1::2] + table[2::2]) / TOTAL
    assert np.abs(counted - expected).max() < 0.003
    inside = [x[np.searchsorted(q.edges, x, side="right") == k].mean() for k in range(1, min(q.bins, 3))]
    assert q.centres[1 : min(q.bins, 3)] == pytest.approx(inside, rel=0.01)


def test_no_element_takes_less_than_a_ninth_of_a_bit() -> None:
    assert all(-np.log2(start_table((start,)).max() / TOTAL) > 1 / 9 for start in range(len(STARTS)))


@pytest.mark.parametrize("values", [[0], [0] * 9, [3], [0, 1, 2, 2, 2, 7], list(range(300)) * 3])
def test_lists_of_small_numbers_come_back(values: list[int]) -> None:
    writer = StreamWriter()
    writer.numbers(np.array(values))
    from lorashelf.formats.coded.stream import Scanner

    assert StreamReader(Scanner(writer.finished())).numbers(len(values)).tolist() == values


# what comes back -----------------------------------------------------------------------------------------------------


def test_levels_refine() -> None:
    x = adapter()
    levels = levels_of(x, 3e-4, 3e-5, 3e-6, 3e-7)
    kept = [level.kept for level in inspect(levels)[2]]
    assert kept == sorted(kept)
    assert kept[-1] > 0.99
    assert lost(x, decode(levels)) < 0.01


def test_the_energy_kept_is_what_decoding_gives() -> None:
    x = adapter()
    levels = levels_of(x, 1e-5)
    (level,) = inspect(levels)[2]
    assert 0.965 < level.kept < 1  # nothing is restored here
    assert 1 - lost(x, decode(levels)) == pytest.approx(level.kept, abs=2e-5)


def test_a_coarse_code_is_scaled_up_by_the_rule() -> None:
    x = adapter(fall=0.95)
    levels = levels_of(x, 1.5e-4)
    (level,) = inspect(levels)[2]
    assert 0.1 < level.kept < 0.5
    assert norm(decode(levels)) == pytest.approx(norm(x), rel=0.1)
    assert restoration(level.kept) == pytest.approx(level.kept**-0.5, rel=0.05)


def test_what_is_not_a_value_comes_back_exactly() -> None:
    x = adapter()
    y = decode(levels_of(x, 1e-4))
    assert (y.base, y.dtype, y.config) == (x.base, x.dtype, x.config)
    assert [(p, s.dout, s.din) for p, s in y.shapes.items()] == [(p, s.dout, s.din) for p, s in x.shapes.items()]


@pytest.mark.parametrize(
    "paths", [["q"], ["h.0.q", "h.2.q", "h.10.q"], ["h.1.a.0.q", "h.1.a.1.q"], ["a.*.q", "a.1.q"], ["h.01.q", "h.1.q"]]
)
def test_any_module_paths_come_back(paths: list[str]) -> None:
    one = Factors(np.ones((1, 3), np.float32), np.ones((2, 1), np.float32))
    x = Adapter(Modules(dict.fromkeys(paths, one)))
    assert list(unpacked(packed(x)).shapes) == sorted(paths)


def test_a_progressive_file_costs_few_bytes_more_than_one_of_a_single_level() -> None:
    """On real adapters, where it holds the error of the file of one level at 1.1 times its bytes."""
    for name in ("gec-de", "qa-en", "tone-fr"):
        x = read_adapter(ZOO / name)
        for percent in (5, 12.5):
            size = int(2 * x.parameters * percent / 100)
            single, progressive = Encoder(x), Encoder(x)
            encode_within(single, size, 1)
            encode_within(progressive, int(1.1 * size))
            assert len(progressive.levels) >= 3
            assert progressive.kept >= single.kept


@pytest.mark.parametrize("percent", [1, 5, 25])
@pytest.mark.parametrize("levels", [1, 6])
def test_the_size_asked_for_is_used_and_never_exceeded(percent: int, levels: int) -> None:
    x = read_adapter(ZOO / "sum-en")
    size = int(2 * x.parameters * percent / 100)
    encoder = Encoder(x)
    encode_within(encoder, size, levels)
    assert 0.95 * size <= encoder.size <= size


@pytest.mark.parametrize("wanted", [0.5, 0.97, 0.9995])
def test_the_quality_asked_for_is_reached_with_few_bytes_to_spare(wanted: float) -> None:
    x = read_adapter(ZOO / "sum-en")
    encoder, cheaper = Encoder(x), Encoder(x)
    encode_for(encoder, wanted, 1)
    assert inspect(encoder.levels)[2][-1].quality >= wanted - 1e-4  # a level states its energy to 2^-16
    cheaper.add_within(int(encoder.size * 0.95))
    assert quality(cheaper.kept) < wanted


@pytest.mark.parametrize("slope", [3e-6, 1e-6, 3e-7])
def test_a_quality_just_above_an_attained_one_is_reached(slope: float) -> None:
    x = read_adapter(ZOO / "sum-en")
    first = Encoder(x)
    first.add(slope)
    wanted = quality(first.kept + 1e-7)  # within the error of the estimates
    finer = Encoder(x)
    finer.add_for(wanted)
    assert wanted <= quality(finer.kept) + 1e-9
    assert finer.size <= 1.06 * first.size


@pytest.mark.parametrize("size", [1, 40, 110])
def test_too_few_bytes_are_refused_with_the_number_that_would_do(size: int) -> None:
    with pytest.raises(UsageError, match=f"{size} bytes are too few") as raised:
        Encoder(adapter()).add_within(size)
    needed = int(re.findall(r"at least (\d+) bytes", raised.value.cure or "")[0])
    encoder = Encoder(adapter())
    encoder.add_within(needed)
    assert size < encoder.size <= needed
    assert encoder.kept > 0


@pytest.mark.parametrize("size", [1500, 3000, 6000])
def test_no_level_of_a_file_is_too_small_for_a_direction(size: int) -> None:
    """One wide module: a 400th of its bytes holds none."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((8, 3000)).astype(np.float32), rng.standard_normal((3000, 8)).astype(np.float32)
    encoder = Encoder(Adapter(Modules({"h.0.up_proj": Factors(a, b * 0.5 ** np.arange(8, dtype=np.float32))})))
    encode_within(encoder, size)
    assert encoder.size <= size
    assert inspect(encoder.levels)[2][0].directions >= 1


def test_a_quality_beyond_the_finest_level_is_refused_with_one_that_would_do() -> None:
    with pytest.raises(UsageError, match="no level is fine enough") as raised:
        Encoder(adapter()).add_for(0.999999)
    most = float(re.findall(r"at most ([\d.]+)", raised.value.cure or "")[0])
    encoder = Encoder(adapter())
    encoder.add_for(most - 1e-4)
    assert quality(encoder.kept) >= most - 1e-4


def test_one_slope_spends_bytes_where_they_count() -> None:
    """A module of 1/100 the norm gets nothing as long as the other is not coded to 1/10000 of its energy."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 64)).astype(np.float32), rng.standard_normal((64, 2)).astype(np.float32)
    x = Adapter(Modules({"h.0.big": Factors(a, b), "h.0.small": Factors(a, b, 0.01)}))
    assert decode(levels_of(x, 1e-4)).modules["h.0.big"].b.any()
    assert not decode(levels_of(x, 1e-4)).modules["h.0.small"].b.any()


def test_one_slope_spreads_bits_over_adapters() -> None:
    steep, flat = Encoder(adapter(fall=0.1)), Encoder(adapter(fall=0.95))
    options = [steep.options(), flat.options()]
    bits = 8 * 1500.0
    slope = slope_within(options, bits)
    assert sum(each.choose(slope)[1] for each in options) == pytest.approx(bits, rel=0.03)
    assert len(flat.add(slope)) > len(steep.add(slope))


def test_several_adapters_share_bytes_by_predicted_quality() -> None:
    """Where an equal share leaves one adapter behind, the mean and the least of the predicted qualities rise."""
    kinds = {"steep": 0.3, "middle": 0.7, "flat": 0.98}
    adapters = [adapter(seed, rank=8, layers=6, fall=fall) for seed, fall in enumerate(kinds.values())]
    total = 3 * 4000
    alone = [Encoder(x) for x in adapters]
    for each in alone:
        encode_within(each, total // 3)
    together = [Encoder(x) for x in adapters]
    levels = encode_together(together, total)
    assert 0.97 * total < sum(each.size for each in together) <= total
    assert [decode(each).digest for each in levels] == [decode(each.levels).digest for each in together]
    qualities = [[quality(each.kept) for each in encoders] for encoders in (together, alone)]
    assert np.mean(qualities[0]) > np.mean(qualities[1])
    assert min(qualities[0]) > min(qualities[1])


def test_a_byte_more_is_worth_as_much_in_every_adapter() -> None:
    """Of all ways to split the bits over two adapters, none has a higher mean of predicted qualities."""
    options = [Encoder(adapter(fall=fall)).options() for fall in (0.3, 0.95)]
    bits = 8 * 2500.0
    slopes = slopes_within(options, bits, worth)
    chosen = [each.choose(slope) for each, slope in zip(options, slopes, strict=True)]
    assert sum(each[1] for each in chosen) == pytest.approx(bits, rel=0.02)
    best = -math.inf
    for share in np.linspace(0.05, 0.95, 37):
        split = zip(options, (share, 1 - share), strict=True)
        kept = [each.choose(slope_within([each], bits * part))[2] for each, part in split]
        best = max(best, sum(quality(k) for k in kept))
    assert sum(quality(each[2]) for each in chosen) == pytest.approx(best, abs=0.01)


def test_the_worth_of_energy_never_rises() -> None:
    rises = worth(np.linspace(0, 1, 200))
    assert np.all(rises > 0)
    assert np.all(np.diff(rises) <= 0)


@pytest.mark.parametrize("size", [1, 300])
def test_too_few_bytes_for_all_are_refused_with_a_number_that_would_do(size: int) -> None:
    with pytest.raises(
        UsageError, match=f"{size} bytes are too few: the descriptions and first directions of 3 adapters"
    ) as raised:
        encode_together([Encoder(adapter(seed)) for seed in range(3)], size)
    needed = int(re.findall(r"at least (\d+) bytes", raised.value.cure or "")[0])
    encoders = [Encoder(adapter(seed)) for seed in range(3)]
    encode_together(encoders, needed)
    assert sum(each.size for each in encoders) <= needed
    assert all(each.kept > 0 for each in encoders)


# hard adapters -------------------------------------------------------------------------------------------------------


def hard(kind: str) -> Adapter:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    made: dict[str, Callable[[], dict[str, Factors]]] = {
        "zero": lambda: {"h.0.q": Factors(normal(2, 8), np.zeros((6, 2), np.float32))},
        "one module zero": lambda: {
            "h.0.q": Factors(normal(2, 8), np.zeros((6, 2), np.float32)),
            "h.1.q": Factors(normal(2, 64), normal(48, 2)),
        },
        "rank-deficient": lambda: {"h.0.q": Factors(np.repeat(normal(1, 64), 4, 0), np.repeat(normal(48, 1), 4, 1))},
        "one module": lambda: {"lm_head": Factors(normal(4, 64), normal(48, 4))},
        "rank above the sides": lambda: {"h.0.q": Factors(normal(40, 16), normal(12, 40))},
        "1 by 1": lambda: {"h.0.q": Factors(normal(1, 1), normal(1, 1))},
        "norms a million apart": lambda: {
            "h.0.q": Factors(normal(4, 64), normal(48, 4), 1e3),
            "h.1.q": Factors(normal(4, 64), normal(48, 4), 1e-3),
        },
        "sparse": lambda: {"h.0.q": Factors(np.eye(2, 900, dtype=np.float32), np.eye(700, 2, dtype=np.float32))},
        "huge": lambda: {"h.0.q": Factors(normal(4, 64) * 1e12, normal(48, 4) * 1e12)},
        "tiny": lambda: {"h.0.q": Factors(normal(4, 64) * 1e-12, normal(48, 4) * 1e-12)},
    }
    return Adapter(Modules(made[kind]()), BaseId(BASE), "f32")


KINDS = (
    *("zero", "one module zero", "rank-deficient", "one module", "rank above the sides", "1 by 1"),
    *("norms a million apart", "sparse", "huge", "tiny"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_hard_adapters_come_back(kind: str) -> None:
    x = hard(kind)
    levels = levels_of(x, 1e-3, 1e-5, 1e-7)
    assert_both_decoders_agree(levels)
    y = decode(levels)
    if kind == "zero":
        assert norm(y) == 0
        assert inspect(levels)[2][-1].kept == 1
    else:
        assert lost(x, y) < (0.05 if kind == "1 by 1" else 0.01)  # a centre is a mean of many
        assert inspect(levels)[2][-1].kept > 0.98 - 0.03 * (kind == "1 by 1")


def test_an_untrained_adapter_takes_its_description_alone() -> None:
    x = hard("zero")
    encoder = Encoder(x)
    encode_within(encoder, 10_000)
    assert encoder.size < 400
    assert inspect(encoder.levels)[2][-1].quality == 1
    assert encode_for(Encoder(x), 0.5)


@pytest.mark.parametrize("df", [1.5, 2.0, 2.5, 3.0])
@pytest.mark.parametrize("wanted", [0.95, 0.997])
def test_levels_of_heavy_tailed_sides_end_and_come_back(df: float, wanted: float) -> None:
    rng = np.random.default_rng(3)
    b, a = rng.standard_t(df, size=(4000, 4)), rng.normal(size=(4, 64))
    encoder = Encoder(Adapter(Modules({"lm_head": Factors(a.astype(np.float32), b.astype(np.float32))})))
    levels = list(ladder(encoder, wanted))
    assert 1 <= len(levels) <= 24
    assert encoder.kept >= energy_for(wanted)
    decoded, exact = decode(levels).modules["lm_head"], b @ a
    error = np.square(exact - decoded.scale * decoded.b @ decoded.a).sum() / np.square(exact).sum()
    assert error < 1.25 * (1 - encoder.kept)  # a coarse code is scaled up, which adds error


def test_no_quantiser_is_finer_than_a_reader_takes() -> None:
    encoder = Encoder(make_adapter(3, rank=2))
    for _ in range(30):
        encoder.add(SLOPES[0])
    assert decode(encoder.levels).digest


def test_an_outlier_is_kept_through_refinements() -> None:
    x = hard("sparse")
    for levels in (levels_of(x, 1e-3), levels_of(x, 1e-3, 1e-5, 1e-7)):
        assert decode(levels).modules["h.0.q"].delta()[:2, :2] == pytest.approx(np.eye(2), abs=0.1)


# damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(3))
def test_every_flipped_bit_is_found(place: int) -> None:
    levels, _ = golden()
    for at in range(8 * len(levels[place])):
        damaged = bytearray(levels[place])
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(AdapterFormatError, match=f"level {place}: "):
            decode([*levels[:place], bytes(damaged), *levels[place + 1 :]])


@pytest.mark.parametrize("place", range(3))
def test_every_cut_is_found(place: int) -> None:
    levels, _ = golden()
    for size in range(len(levels[place])):
        with pytest.raises(AdapterFormatError, match=f"level {place}: "):
            decode([*levels[:place], levels[place][:size]])
    with pytest.raises(AdapterFormatError, match=rf"level {place}: 1 bytes after the end"):
        decode([*levels[:place], levels[place] + b"\0"])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "there are no levels"),
        ([1], "level 0: this is level 1 of its adapter; level 0 is needed"),
        ([0, 2], "level 1: this is level 2 of its adapter; level 1 is needed"),
        ([0, 0], "level 1: this is level 0 of its adapter; level 1 is needed"),
    ],
)
def test_levels_need_those_before_them(given: list[int], match: str) -> None:
    levels, _ = golden()
    with pytest.raises(AdapterFormatError, match=match) as raised:
        decode([levels[i] for i in given])
    assert raised.value.cure


def test_a_level_of_another_coding_is_refused() -> None:
    one, other = levels_of(adapter(0)), levels_of(adapter(1))
    with pytest.raises(AdapterFormatError, match="level 1: it does not follow the level before it"):
        decode([one[0], other[1]])


def test_all_faults_come_at_once() -> None:
    levels, _ = golden()
    with pytest.raises(AdapterFormatError) as raised:
        decode([levels[0][:-9], levels[1][:-1] + bytes([levels[1][-1] ^ 1])])
    assert [fault.split(":")[0] for fault in raised.value.faults] == ["level 0", "level 1"]


def test_a_newer_version_is_refused() -> None:
    level = bytearray(golden()[0][0])
    level[3] = 2
    with pytest.raises(
        AdapterFormatError, match="version 2 of the encoding; this lorashelf reads up to version 1"
    ) as e:
        decode([bytes(level)])
    assert e.value.cure == "update lorashelf"


def crafted(document: dict[str, object] | bytes, lists: Callable[[StreamWriter], None]) -> bytes:
    """A base level with a right checksum around what no writer makes."""
    writer = StreamWriter()
    lists(writer)
    return framed([], crafted_head(document) + writer.finished())


def crafted_head(document: dict[str, object] | bytes) -> bytes:
    if not isinstance(document, bytes):
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
        document = deflate.compress(json.dumps(document).encode()) + deflate.flush()
    return b"\0\0\0\x40" + np.float32(1).tobytes() + varint(len(document)) + document


def described(*modules: list[object]) -> dict[str, object]:
    return {"base": "", "revision": None, "dtype": "f32", "config": {}, "modules": list(modules)}


def lists(*values: list[int]) -> Callable[[StreamWriter], None]:
    return lambda writer: [writer.numbers(np.array(each, np.int64)) for each in values] and None


@pytest.mark.parametrize(
    ("document", "content", "match"),
    [
        (described(["h.q", "", 2**24, 1, 2**24]), lists([1], [0], [0], [0], [0]), "need more bits than there are"),
        (described(["h.*.q", "0-99999", 9999, 9999, 9999]), lists([9999] * 100000), "need more bits than there are"),
        (described(["h.q", "", 2**40, 1, 8]), lists([0]), "a module has shape"),
        (described(["h.*.q", "0-99999999", 8, 1, 8]), lists([0]), "more than 131072 modules"),
        (
            described(["h.*." + 30_000 * "q", "0-131071", 8, 1, 8]),
            lists([0]),
            "paths have more than 16777216 characters",
        ),
        (described(["h.q", "", 8, 2, 8]), lists([300], [0] * 300), "has 300 directions, but rank 2"),
        (described(["h.q", "", 8, 8, 8]), lists([1], [0], [0], [40], [0]), "a start quantiser is unknown"),
        (described(["h.q", "", 8, 8, 8]), lists([1], [200], [0], [0], [0]), "a gain is too small"),
        (described(["h.q", "", 8, 0, 8]), lists([0]), "a module has shape"),
        (described(["", "", 8, 1, 8]), lists([0]), "a module's path is empty or not printable"),
        (described(["h.\x1b.q", "", 8, 1, 8]), lists([0]), "a module's path is empty or not printable"),
        ({**described(["h.q", "", 8, 1, 8]), "config": {"use_dora": True}}, lists([0]), "use_dora is set"),
        ({**described(["h.q", "", 8, 1, 8]), "config": {"x": "\ud800"}}, lists([0]), "not Unicode"),
        ({**described(["h.q", "", 8, 1, 8]), "base": "a\nb"}, lists([0]), "with a control character or a line break"),
        (described(["h.q", "", 8, 1, 8], ["h.q", "", 8, 1, 8]), lists([0, 0]), "a module is listed twice"),
        (described(), lists(), "a field of the description is missing"),
        ({"base": ""}, lists(), "a field of the description is missing"),
        ({**described(["h.q", "", 8, 1, 8]), "dtype": "f8"}, lists([0]), "a field of the description is missing"),
        ([], lists(), "a field of the description is missing"),
        (b"\xff\xff", lists(), "the description cannot be read"),
        (b"", lists(), "the description"),
    ],
)
def test_absurd_headers_are_refused_before_anything_is_allocated(
    document: dict[str, object] | bytes, content: Callable[[StreamWriter], None], match: str
) -> None:
    import tracemalloc

    level = crafted(document, content)
    tracemalloc.start()
    with pytest.raises(AdapterFormatError, match=match):
        decode([level])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80 * 2**20


def test_words_that_no_coder_makes_never_become_values() -> None:
    """The number of directions is right; the first element lies where no symbol is. What failed once fails again."""
    one, other = second_decoder.frequencies([0, 2**38])
    point = (2**64 - 1) // 2**24 * (one + other) - 1
    streams = bytes([10, *[2, 0xF0], *[1, 0x0F] * 4]) + struct.pack("<II", point >> 32, point % 2**32)
    x = decode([framed([], crafted_head(described(["h.q", "", 1, 1, 1])) + streams)], "a.lsc")
    for _ in range(2):
        with pytest.raises(AdapterFormatError, match=r"level 0: .* cannot come from the coder") as raised:
            _ = x.modules["h.q"]
        assert raised.value.where == "a.lsc"


def test_modules_are_decoded_once_by_many_threads() -> None:
    x = decode(levels_of(adapter(layers=8)))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda path: x.modules[path].a.tobytes(), list(x.modules) * 3))
    assert found == [f.a.tobytes() for f in decode(levels_of(adapter(layers=8))).modules.values()] * 3


def test_a_description_that_inflates_without_end_is_refused() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(b" " * 2**26) + deflate.flush()
    with pytest.raises(AdapterFormatError, match=r"cannot be read|longer than 4 MiB"):
        decode([crafted(bomb, lists())])


# files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [MemoryError, KeyboardInterrupt])
def test_modules_are_read_whole_after_an_interrupted_read(stop: type[BaseException], monkeypatch: Any) -> None:
    levels, digests = golden()
    decoded, read, calls = decode(levels), decoder.read_elements, []

    def interrupted(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise stop
        read(*given)

    monkeypatch.setattr(decoder, "read_elements", interrupted)
    with pytest.raises(stop):
        _ = decoded.digest
    assert decoded.digest == digests[-1]


def test_a_file_of_many_levels_is_divided_in_one_pass() -> None:
    """A copy of the rest for each of 50,000 levels would take 50 GB of copying."""
    level = framed([], b"")
    assert sum(1 for _ in divided(level * 50_000)) == 50_000


def test_a_file_is_divided_into_its_levels(tmp_path: Path) -> None:
    levels, digests = golden()
    write_coded(levels, tmp_path / "new" / "a.lsc")
    assert read_levels(tmp_path / "new" / "a.lsc") == levels
    assert decode(read_levels(tmp_path / "new" / "a.lsc", 2)).digest == digests[1]
    assert [child.name for child in (tmp_path / "new").iterdir()] == ["a.lsc"]


def test_a_file_that_is_cut_off_names_its_last_level_and_has_those_before(tmp_path: Path) -> None:
    levels, digests = golden()
    (tmp_path / "a.lsc").write_bytes(b"".join(levels)[:-5])
    with pytest.raises(AdapterFormatError, match="level 2: truncated"):
        decode(read_levels(tmp_path / "a.lsc"))
    assert decode(read_levels(tmp_path / "a.lsc", 2)).digest == digests[1]


@pytest.mark.parametrize("content", [b"", b"hello", MAGIC, MAGIC + b"\1\0"])
def test_what_is_not_a_coding_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.lsc").write_bytes(content)
    with pytest.raises(AdapterFormatError) as raised:
        decode(read_levels(tmp_path / "a.lsc"), str(tmp_path / "a.lsc"))
    assert raised.value.where == str(tmp_path / "a.lsc")
    assert raised.value.cure


def test_dividing_keeps_every_byte() -> None:
    data = b"".join(golden()[0])
    for cut in range(len(data)):
        assert b"".join(divided(data[:cut])) == data[:cut]


# predictions ---------------------------------------------------------------------------------------------------------


def test_predictions_are_monotone_and_invertible() -> None:
    energies = np.linspace(0, 1, 101)
    found = [quality(energy) for energy in energies]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0, 1)
    assert [energy_for(quality(energy)) for energy, _ in MEASURED] == pytest.approx([energy for energy, _ in MEASURED])


def test_restoration_is_full_for_coarse_codes_and_none_for_fine_ones() -> None:
    assert restoration(0.97) == 1
    assert restoration(0.4) == pytest.approx(0.4**-0.5)
    assert 0.4**-0.25 * 0.8 < restoration(0.7) / (0.7**-0.25) * 0.4**-0.25 < 0.4**-0.25 * 1.05
    factors = [restoration(kept) for kept in np.linspace(0.1, 1, 50)]
    assert factors == sorted(factors, reverse=True)


def test_small_adapters_of_other_tests_code_too() -> None:
    x = make_adapter(dtype="f16")
    assert lost(x, decode(levels_of(x, 1e-3, 1e-6))) < 0.02
