"""The heat map: what its figure shows, what its file holds whole, and what a name can do to it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as pictures
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from factory import make_adapter, write_peft
from lorashelf.errors import MissingExtra
from lorashelf.report.arrangement import arranged
from lorashelf.report.figure import NUMBERED, heatmap
from lorashelf.report.fonts import families
from lorashelf.report.formats import FORMATS
from lorashelf.report.heatmap import LONGEST, draw_heatmap, heatmap_format, label

SCRIPTS = [
    "gec-de",
    "質問応答",
    "résumé",
    "한국어-문법",
    "🚀-notes",
    "ملخص",
    "सारांश",
    "$x_1$",
    "a" * 300,
    "two\nlines",
    "ไทย",
]
SIZES = pytest.mark.parametrize("n", [1, 2, 3, 12, 31, 100])


def planted(n: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of cosines of n points around `clusters` centres, and the centre of each point."""
    rng = np.random.default_rng(n)
    centre = rng.permutation(np.arange(n) % clusters)
    points = 0.7 * rng.standard_normal((clusters, 400))[centre] + rng.standard_normal((n, 400))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points @ points.T, centre


def named(n: int) -> list[str]:
    return [label(f"{SCRIPTS[i % len(SCRIPTS)]}-{i}") for i in range(n)]


def of(n: int, metric: str = "cosine") -> tuple[Figure, np.ndarray]:
    matrix, _ = planted(n, max(1, n // 8))
    return heatmap(named(n), matrix, metric), matrix


def parts(figure: Figure) -> tuple[Axes, Axes]:
    cells, bar = figure.axes
    return cells, bar


def lines(axes: Axes) -> set[tuple[float, float]]:
    """Positions of the lines across the cells, as (vertical, horizontal) pairs of equal place."""
    upright = sorted(line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1])
    level = sorted(line.get_ydata()[0] for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[1])
    return set(zip(upright, level, strict=True))


@SIZES
def test_an_adapter_beside_itself_is_masked_and_grey(n: int) -> None:
    figure, matrix = of(n)
    (image,) = parts(figure)[0].images
    shown = image.get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), np.eye(n, dtype=bool))
    assert sorted(shown.compressed()) == sorted(matrix[~np.eye(n, dtype=bool)])
    red, green, blue, alpha = image.to_rgba(shown)[0, 0]
    assert (red == green == blue, alpha) == (True, 1.0)


@pytest.mark.parametrize("metric", ["cosine", "svd_features"])
@SIZES
def test_colours_of_a_metric_with_a_sign_are_centred_at_0_and_reach_the_farthest_pair(n: int, metric: str) -> None:
    figure, matrix = of(n, metric)
    (image,) = parts(figure)[0].images
    reach = np.abs(matrix[~np.eye(n, dtype=bool)]).max() if n > 1 else 1.0
    assert image.norm(0.0) == 0.5
    assert image.get_clim() == pytest.approx((-reach, reach))
    low, high = image.to_rgba([-reach, reach])[:, :3]
    assert low[2] > low[0]  # blue
    assert high[0] > high[2]  # red


@pytest.mark.parametrize("value", [None, 0.25, 1.0])
def test_colours_of_l2_span_the_pairs(value: float | None) -> None:
    matrix = planted(9, 3)[0] / 4 + 0.5 if value is None else np.full((4, 4), value)
    (image,) = parts(heatmap(named(len(matrix)), matrix, "l2"))[0].images
    pairs = matrix[~np.eye(len(matrix), dtype=bool)]
    assert image.get_clim() == ((pairs.min(), pairs.max()) if value is None else (0.0, value))


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2", "linf", "svd_features"])
def test_the_colour_bar_bears_the_metric_and_shows_what_is_in_use(metric: str) -> None:
    figure, matrix = of(31, metric)
    bar = parts(figure)[1]
    pairs = matrix[~np.eye(31, dtype=bool)]
    assert bar.get_ylabel() == f"{metric} similarity"
    assert bar.get_ylim() == pytest.approx((pairs.min(), pairs.max()))


def test_a_bar_of_positive_similarities_begins_at_0() -> None:
    matrix = np.array([[1.0, 0.3], [0.3, 1.0]])
    assert parts(heatmap(["a", "b"], matrix, "cosine"))[1].get_ylim() == pytest.approx((0.0, 0.3))


# order and clusters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "clusters"), [(6, 2), (9, 3), (31, 6), (100, 9)])
def test_lines_stand_where_planted_clusters_meet(n: int, clusters: int) -> None:
    matrix, centre = planted(n, clusters)
    names = [f"{c}" for c in centre]
    axes = parts(heatmap(names, matrix, "cosine"))[0]
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        shown = [tick.get_text() for tick in ticks]
        changes = [i + 0.5 for i, (a, b) in enumerate(itertools.pairwise(shown)) if a != b]
        assert len(changes) == clusters - 1
        assert lines(axes) == {(place, place) for place in changes}
    assert f"{clusters} clusters" in " ".join(text.get_text() for text in axes.texts)


@pytest.mark.parametrize("matrix", [np.eye(1), np.eye(2), planted(3, 1)[0], np.eye(8), np.ones((8, 8))])
def test_without_clusters_there_are_no_lines(matrix: np.ndarray) -> None:
    order, borders = arranged(matrix)
    assert sorted(order) == list(range(len(matrix)))
    assert borders == []
    assert lines(parts(heatmap(named(len(matrix)), matrix, "cosine"))[0]) == set()


def test_neighbours_in_the_order_are_alike() -> None:
    """Points on a line come out in their order on it, either way round."""
    places = np.random.default_rng(0).permutation(20) / 20
    order, _ = arranged(1 - np.abs(places[:, None] - places))
    steps = np.diff(places[order])
    assert np.all(steps > 0) or np.all(steps < 0)


def test_160_adapters_are_arranged_in_less_than_a_few_seconds() -> None:
    """It takes 0.2 s of a processor; an ordering that recomputes all means at every step took 15 s."""
    matrix, centre = planted(160, 8)
    begun = time.process_time()
    order, borders = arranged(matrix)
    assert time.process_time() - begun < 4.0
    assert len(borders) == 7
    assert np.count_nonzero(np.diff(centre[order])) == 7


# what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, NUMBERED])
def test_a_small_map_has_its_numbers_in_the_cells(n: int) -> None:
    matrix = planted(n, 1)[0]
    axes = parts(heatmap(named(n), matrix, "cosine"))[0]
    shown = axes.images[0].get_array()
    written = {text.get_position(): text.get_text() for text in axes.texts if "." in text.get_text()}
    assert written == {
        (column, row): f"{shown[row, column]:.2f}".replace("-", "−")
        for row, column in itertools.permutations(range(n), 2)
    }


def test_small_similarities_keep_a_digit_more_and_a_large_map_has_no_numbers() -> None:
    axes = parts(heatmap(["a", "b"], np.array([[1, -0.0213], [-0.0213, 1]]), "cosine"))[0]
    assert [text.get_text() for text in axes.texts] == ["−0.021", "−0.021"]
    assert not [text for text in parts(of(NUMBERED + 1)[0])[0].texts if "." in text.get_text()]


@SIZES
def test_names_stand_apart_from_each_other_and_titles_from_the_bar(n: int) -> None:
    names = [name for name in named(2 * n) if families(name)[0] == ["DejaVu Sans"] and not families(name)[1]]
    figure = heatmap((names * 2)[:n], planted(n, max(1, n // 8))[0], "cosine")
    figure.draw_without_rendering()
    cells, bar = parts(figure)
    rows, columns = (
        [tick.get_window_extent() for tick in ticks] for ticks in (cells.get_yticklabels(), cells.get_xticklabels())
    )
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(rows))
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(columns))
    heads = [
        text.get_window_extent() for text in cells.findobj(Text) if text.get_text().startswith(("Sim", "One", str(n)))
    ]
    feet = [text.get_window_extent() for text in (bar.yaxis.label, *bar.get_yticklabels())]
    assert len(heads) >= 1
    assert not [one for one in heads for other in (*heads, *feet) if one is not other and one.overlaps(other)]


def rim(picture: bytes) -> np.ndarray:
    """The outermost 8 pixels of a picture, as one row of colours in 0…1."""
    pixels = pictures.imread(BytesIO(picture), format="png")[..., :3]
    assert min(pixels.shape[:2]) > 100
    return np.concatenate([side.reshape(-1, 3) for side in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:])])


@pytest.mark.parametrize("n", [1, 2, 31, 100])
def test_nothing_is_cut_at_the_edge_of_the_file(n: int, tmp_path: Path) -> None:
    names = ["W" * LONGEST if i % 3 else SCRIPTS[i % len(SCRIPTS)] for i in range(n)]
    draw_heatmap(names, planted(n, max(1, n // 8))[0], "svd_features", tmp_path / "map.png")
    assert np.all(rim((tmp_path / "map.png").read_bytes()) == 1.0)


def test_the_rim_sees_a_cut_title() -> None:
    figure = heatmap([str(i) for i in range(31)], planted(31, 4)[0], "cosine")
    cut = BytesIO()
    figure.savefig(cut, format="png", dpi=150)  # the canvas alone, without what stands around it
    assert np.any(rim(cut.getvalue()) != 1.0)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_map_is_a_file_of_its_format_and_the_same_every_time(ending: str, tmp_path: Path) -> None:
    matrix = planted(12, 3)[0]
    for name in ("a", "b"):
        draw_heatmap([*SCRIPTS, "gec-it"], matrix, "cosine", tmp_path / f"{name}.{ending.upper()}")
    drawn = (tmp_path / f"a.{ending.upper()}").read_bytes()
    assert drawn.lstrip().startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending])
    assert drawn == (tmp_path / f"b.{ending.upper()}").read_bytes()


def test_the_picture_of_a_large_map_has_fewer_pixels_an_inch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorashelf.report.figure.MOST_PIXELS", 500.0)
    draw_heatmap([f"t{i}" for i in range(31)], planted(31, 4)[0], "cosine", tmp_path / "map.png")
    height, width = pictures.imread(tmp_path / "map.png").shape[:2]
    assert 500 < height < width < 700


# names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["$\\frac{$", "$x_1$", "%_\\n", "a\nb", "\u202egnp.exe", "\ud800", "", " ", "<b>&amp;", "\x1b[2J"]
)
def test_any_name_is_drawn_as_it_is_written(name: str, tmp_path: Path) -> None:
    draw_heatmap([name, "b"], np.array([[1, 0.5], [0.5, 1]]), "cosine", tmp_path / "map.svg")
    shown = [tick.get_text() for tick in parts(heatmap([label(name), "b"], np.eye(2), "cosine"))[0].get_yticklabels()]
    assert shown == [label(name), "b"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("gec-de", "gec-de"),
        ("a" * 300, "a" * 16 + "…" + "a" * 15),
        ("質問応答" * 8, "質問応答" * 8),
        ("two\nlines\tand\u3000more", "two lines and more"),
        ("\u202ebidi\x1b[1m\ud800", "\ufffdbidi\ufffd[1m\ufffd"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_a_label_is_one_short_printable_line(name: str, shown: str) -> None:
    assert label(name) == shown
    assert len(shown) <= LONGEST


def test_fonts_beyond_matplotlibs_own_are_found_by_their_glyphs() -> None:
    """STIX comes with matplotlib and has signs that DejaVu Sans lacks; nothing has a noncharacter."""
    assert families("gec-de → Ω") == (["DejaVu Sans"], [])
    chosen, missing = families("a\u2af7\U0010ffff")
    assert (len(chosen), missing) == (2, ["\U0010ffff"])


def test_what_no_font_has_is_returned(tmp_path: Path) -> None:
    matrix = np.array([[1, 0.5], [0.5, 1]])
    assert draw_heatmap(["a", "b"], matrix, "cosine", tmp_path / "map.svg") == []
    assert draw_heatmap(["a\U000323ff", "b"], matrix, "cosine", tmp_path / "map.svg") in ([], ["\U000323ff"])


# the command -------------------------------------------------------------------------------------------------------


def compare(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "lorashelf", "compare", *words]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_command_prints_at_most_one_notice_beside_its_answer(tmp_path: Path) -> None:
    """Also where matplotlib finds no place for its cache."""
    names = ["質問応答", "🚀-notes", "सारांश", "$x$"]
    for seed, name in enumerate(names):
        write_peft(tmp_path / name, make_adapter(seed))
    (tmp_path / "file").write_text("")
    ran = compare(tmp_path, *names, "--plot", "map.svg", "--json", MPLCONFIGDIR=str(tmp_path / "file" / "cache"))
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["names"] == names
    _, missing = families("".join(names))
    listed = " ".join(missing[:10]) + (" …" if len(missing) > 10 else "")
    notice = f"no installed font has {listed}: map.svg shows boxes in their place"
    assert ran.stderr.splitlines() == ([notice] if missing else [])


def test_the_given_order_can_be_kept(tmp_path: Path) -> None:
    matrix, _ = planted(31, 4)
    axes = parts(heatmap(named(31), matrix, "cosine", arrange=False))[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == named(31)
    np.testing.assert_array_equal(axes.images[0].get_array().data, matrix)
    assert lines(axes) == set()


def test_a_dark_map_has_light_words_on_a_dark_rim(tmp_path: Path) -> None:
    draw_heatmap(named(31), planted(31, 4)[0], "cosine", tmp_path / "map.png", dark=True)
    (colour,) = np.unique(rim((tmp_path / "map.png").read_bytes()), axis=0)
    assert colour == pytest.approx(np.array([0x0D, 0x11, 0x17]) / 255)


@pytest.mark.parametrize("word", ["--keep-order", "--dark"])
def test_an_option_of_the_map_without_a_map_is_refused(word: str, tmp_path: Path) -> None:
    ran = compare(tmp_path, "nowhere", word)
    assert (ran.returncode, "give --plot as well" in ran.stderr) == (2, True)


@pytest.mark.parametrize("plot", ["a.jpg", "a", "a.png.txt", ".svg"])
def test_a_file_of_another_format_is_refused_before_an_adapter_is_read(plot: str, tmp_path: Path) -> None:
    ran = compare(tmp_path, "nowhere", "--plot", plot)
    assert ran.returncode == 2
    assert "cannot draw" in ran.stderr
    assert ".png, .svg, .pdf" in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("plot", "why"), [("no/a.svg", "folder does not exist"), ("a.svg", "path is a folder")])
def test_a_place_that_cannot_hold_a_file_is_refused_before_an_adapter_is_read(
    plot: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "a.svg").mkdir()
    ran = compare(tmp_path, "nowhere", "--plot", plot)
    assert (ran.returncode, why in ran.stderr, f"where: {plot}" in ran.stderr) == (2, True, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


@pytest.mark.parametrize("package", ["matplotlib", "scipy", "sklearn"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match="a heat map needs") as caught:
        heatmap_format(Path("map.svg"))
    assert caught.value.cure == "pip install 'lorashelf[report]'"
