"""A decoder of levels written from docs/coded.md alone, in plain Python and NumPy's float32, without the package."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

PAGE = (Path(__file__).parent.parent / "docs" / "coded.md").read_text()
DICTIONARY = re.search(r"<!-- dictionary -->\n```text\n(.*?)```", PAGE, re.DOTALL)[1].replace("\n", "").encode()
STEPS = [int(n) for n in re.search(r"With the steps\n\n```text\n(.*?)```", PAGE, re.DOTALL)[1].split()]
WORD, STATE, TOTAL = 2**32, 2**64, 2**24
OUTLIER = "outlier"


# law and quantisers


def _density_nodes():
    v, f, c, nodes = 2**62, 18444492411329227605, 18442241023793258495, []
    for _ in range(641):
        nodes.append(v // 2**32)
        v, f = v * f // 2**64, f * c // 2**64
    return nodes


P = _density_nodes()
S = [0, *accumulate(512 * (P[i] + P[i + 1]) for i in range(640))]


def density(x):
    i, j = divmod(x, 1024)
    return P[i] + (P[i + 1] - P[i]) * j // 1024


def mass(x):
    i, j = divmod(x, 1024)
    return S[i] + P[i] * j + (P[i + 1] - P[i]) * j * j // 2048


def frequencies(masses):
    q = sum(masses) // (TOTAL - len(masses)) + 1
    found = [1 + m // q for m in masses]
    found[0] += TOTAL - sum(found)
    return found


def edges_of(chain):
    start, *ratios = chain
    d, z = (STEPS[start], STEPS[start] // 2) if start < 22 else (STEPS[start - 21], 3 * STEPS[start - 21] // 4)
    edges = [z]
    while edges[-1] < 393216:
        edges.append(edges[-1] + d)
    for ratio in ratios:
        finer = [edges[0] // 3, edges[0]]
        for a, b in pairwise(edges):
            finer += [a + (b - a) * j // ratio for j in range(1, ratio + 1)]
        edges = finer
    return edges


def centre(edges, k):
    if k == 0:
        return 0
    a, b = edges[k - 1], edges[k]
    if mass(a) == mass(b):
        return (a + b) // 2
    return min(max(2**32 * (density(a) - density(b)) // (mass(b) - mass(a)), a), b)


# range coder


class RangeDecoder:
    def __init__(self, words):
        self.words = iter(words)
        self.low, self.range = 0, STATE - 1
        self.point = next(self.words, 0) * WORD + next(self.words, 0)

    def symbol(self, table):
        if len(table) == 1:
            return 0
        q = self.range // TOTAL
        y = (self.point - self.low) % STATE // q
        symbol = before = 0
        while y >= before + table[symbol]:  # an IndexError is data that no coder makes
            before += table[symbol]
            symbol += 1
        f = table[symbol]
        self.low, self.range = (self.low + q * before) % STATE, q * f
        if self.range < WORD:
            self.low, self.range = self.low * WORD % STATE, self.range * WORD
            self.point = (self.point * WORD + next(self.words, 0)) % STATE
        return symbol


# levels


class Bytes:
    def __init__(self, data):
        self.data = data

    def take(self, n):
        assert len(self.data) >= n
        found, self.data = self.data[:n], self.data[n:]
        return found

    def varint(self):
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


def bodies(levels):
    for n, level in enumerate(levels):
        assert level[:3] == b"LSC"
        assert level[3] == 1
        assert level[4] == n
        rest = Bytes(level[5:-4])
        size = rest.varint()
        if n:
            assert rest.take(8) == blake2b(levels[n - 1], digest_size=32).digest()[:8]
        assert len(rest.data) == size
        assert zlib.crc32(level[:-4]) == int.from_bytes(level[-4:], "little")
        yield rest


def description(data):
    document = json.loads(zlib.decompressobj(-15, DICTIONARY).decompress(data))
    shapes = {}
    for template, numbers, *shape in document["modules"]:
        if not numbers:
            shapes[template] = shape
        for run in filter(None, numbers.split(",")):
            first, _, last = run.partition("-")
            for number in range(int(first), int(last or first) + 1):
                shapes[template.replace("*", str(number), 1)] = shape
    return document, dict(sorted(shapes.items()))


def number_list(tables, coder, count):
    if not count:
        return []
    n = tables.varint()
    packed = tables.take((n + 1) // 2)
    weights = [packed[i // 2] >> 4 * (i % 2) & 15 for i in range(n)]
    table = frequencies([2 ** (w - 1 + 24) if w else 0 for w in weights])
    return [coder.symbol(table) for _ in range(count)]


def groups(sides):
    for chain in sorted({tuple(side["chain"]) for side in sides}):
        yield chain, [side for side in sides if tuple(side["chain"]) == chain]


def read_new(coder, sides):
    for (start,), group in groups(sides):
        edges = edges_of([start])
        parts = [mass(b) - mass(a) for a, b in pairwise(edges)]
        table = frequencies([2 * mass(edges[0]), *(m for part in parts for m in (part, part)), 0, 0])
        largest, far = len(edges) - 1, []
        for side in group:
            side["indices"] = []
            for _ in range(side["length"]):
                k, negative = divmod(coder.symbol(table) + 1, 2)
                index = -k if negative else k
                if k > largest:
                    index = (OUTLIER, -1 if negative else 1)
                    far.append((side, len(side["indices"])))
                side["indices"].append(index)
        for side, place in far:
            c = coder.symbol([65536] * 256)
            size = edges[-1] * (33 + 2 * (c % 16)) * 2 ** (c // 16) // 32
            side["indices"][place] = (OUTLIER, size * side["indices"][place][1])


def refine(coder, sides):
    for chain, group in groups(sides):
        edges, finer, ratio = edges_of(chain[:-1]), edges_of(chain), chain[-1]
        places = [(side["indices"], i) for side in group for i in range(side["length"])]
        sizes = [abs(indices[i]) if not isinstance(indices[i], tuple) else None for indices, i in places]
        e = edges[0] // 3
        inner = frequencies([2 * mass(e), mass(edges[0]) - mass(e), mass(edges[0]) - mass(e)])
        for k in range(len(edges)):
            borders = finer[1 + (k - 1) * ratio :][: ratio + 1]
            table = frequencies([mass(b) - mass(a) for a, b in pairwise(borders)]) if k else inner
            for (indices, i), size in zip(places, sizes):
                if size == k:
                    symbol = coder.symbol(table)
                    new = 2 + (k - 1) * ratio + symbol if k else [0, 1, -1][symbol]
                    indices[i] = -new if indices[i] < 0 else new


def decode(levels):
    """(description, path → (A, B)) of levels."""
    modules = {}
    for n, body in enumerate(bodies(levels)):
        _, s = struct.unpack("<HH", body.take(4))
        if n == 0:
            (top,) = struct.unpack("<f", body.take(4))
            document, shapes = description(body.take(body.varint()))
            modules = {path: [] for path in shapes}
        tables = Bytes(body.take(body.varint()))
        coder = RangeDecoder(struct.unpack(f"<{len(body.data) // 4}I", body.data))
        earlier = [direction for found in modules.values() for direction in found]
        counts = number_list(tables, coder, len(shapes))
        high, low, *starts = (number_list(tables, coder, sum(counts)) for _ in range(4))
        ratios = [number_list(tables, coder, len(earlier)) for _ in range(2)]
        refined = []
        for side, places in enumerate(ratios):
            for direction, place in zip(earlier, places):
                if place:
                    direction[side]["chain"] = [*direction[side]["chain"], place + 1]
                    refined.append(direction[side])
        new, at = [], 0
        for (path, (dout, _, din)), count in zip(shapes.items(), counts):
            for _ in range(count):
                below = modules[path][-1]["gain"] if modules[path] else 0
                sides = [{"chain": [starts[i][at]], "length": length} for i, length in enumerate((dout, din))]
                modules[path].append({0: sides[0], 1: sides[1], "gain": below + 32 * high[at] + low[at]})
                new.append(sides)
                at += 1
        read_new(coder, [u for u, _ in new] + [v for _, v in new])
        refine(coder, refined)
    return document, {path: factors(found, shapes[path], top, s) for path, found in modules.items()}


def factors(directions, shape, top, s):
    dout, _, din = shape
    w, t = 2**64, []
    for _ in range(64):
        t.append(w // 2**40)
        w = 18248035989933441396 * w // 2**64
    rows, columns = [], []
    for direction in directions:
        octaves, part = divmod(direction["gain"], 64)
        root = np.float32(math.ldexp(float(np.float32(top)) * t[part], -40 - octaves))
        scaled = np.float32(math.ldexp(float(root) * float(s * s), -28))
        rows.append([root * r for r in values(direction[1])])
        columns.append([scaled * r for r in values(direction[0])])
    if not directions:
        rows, columns = [[0.0] * din], [[0.0] * dout]
    return np.array(rows, np.float32), np.array(columns, np.float32).T


def values(side):
    edges, found = edges_of(side["chain"]), []
    for index in side["indices"]:
        if isinstance(index, tuple):
            found.append(np.float32(index[1]))
        else:
            found.append(np.float32(math.copysign(1, index) * centre(edges, abs(index))))
    return found
