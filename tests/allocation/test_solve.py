"""Allocation against brute force and hand-computed cases."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from knapsacks import random_options

from mpq.allocation.solve import MB, allocate
from mpq.errors import MpqError
from mpq.sensitivity.records import LayerSensitivity, SensitivityTable


def table(layers: list[tuple[str, int, dict[int, int], dict[int, float]]], **options) -> SensitivityTable:
    bits = tuple(layers[0][2])
    entries = tuple(
        LayerSensitivity(name, "linear", (numel,), numel, sizes, kl, None, 2 * numel)
        for name, numel, sizes, kl in layers
    )
    return SensitivityTable(entries, bits, fixed_bytes=100, **options)


NAMES = ("enc.0.q", "enc.0.k", "enc.1.q", "enc.1.k", "head")


def small(seed: int = 0) -> SensitivityTable:
    random = np.random.default_rng(seed)
    return table(
        [
            (name, 80 * (i + 1), {b: 10 * (i + 1) * b + 7 for b in (2, 4, 8)},
             {b: float(random.uniform(0.5, 2)) * 4.0 ** -b for b in (2, 4, 8)})
            for i, name in enumerate(NAMES)
        ]
    )  # fmt: skip


def all_allocations(t: SensitivityTable, allowed=lambda bits: True):
    """Yields (kl, bytes, bits) of every combination of widths that is allowed."""
    for widths in itertools.product(t.bits, repeat=len(t.layers)):
        bits = {layer.name: width for layer, width in zip(t.layers, widths, strict=True)}
        if allowed(bits):
            kl = math.fsum(layer.kl[bits[layer.name]] for layer in t.layers)
            yield kl, t.fixed_bytes + sum(layer.size_bytes[bits[layer.name]] for layer in t.layers), bits


@pytest.mark.parametrize("target", range(800, 1500, 37))
def test_answer_and_frontier(target: int) -> None:
    t = small()
    found = allocate(t, target_bytes=target)
    kl, size, bits = min(choice for choice in all_allocations(t) if choice[1] <= target)
    assert (found.predicted_kl, found.predicted_bytes, found.bits) == (pytest.approx(kl), size, bits)
    assert found.target_bytes == target and list(found.bits) == list(NAMES)
    assert found.average_bits == pytest.approx(
        sum(bits[x.name] * x.numel for x in t.layers) / sum(x.numel for x in t.layers)
    )
    sizes, kls = zip(*found.frontier, strict=True)
    assert list(sizes) == sorted(set(sizes)) and all(a > b for a, b in itertools.pairwise(kls))
    assert [point for point in found.frontier if point[0] <= target][-1] == (size, found.predicted_kl)
    for point_size, point_kl in found.frontier:
        assert point_kl == pytest.approx(min(c for c in all_allocations(t) if c[1] <= point_size)[0])


def test_units_of_the_target() -> None:
    t = small()
    numel = sum(layer.numel for layer in t.layers)
    assert allocate(t, target_mb=1200 / MB).target_bytes == 1200
    assert allocate(t, target_ratio=4).target_bytes == (100 + 4 * numel) // 4
    assert allocate(t, target_mb=1).bits == {name: 8 for name in NAMES}  # above the largest


def test_budgets_are_the_decimals_that_were_asked_for() -> None:
    """3.3 bits admit 33 bits for 10 weights, though the float 3.3 is a little less than 33/10; a ratio likewise."""
    widths = range(1, 9)
    layers = [(name, n, {b: b * n for b in widths}, {b: 1 / b for b in widths}) for name, n in (("a", 3), ("b", 7))]
    assert allocate(table(layers), average_bits=3.3).bits == {"a": 4, "b": 3}
    assert allocate(table(layers), target_ratio=1.12).target_bytes == 125  # (100 + 4 * 10) / 1.12


@pytest.mark.parametrize("average", [2.0, 2.5, 3.7, 4.0, 6.123, 8.0, 9.0])
def test_average_bits(average: float) -> None:
    t = small(3)
    numel = {layer.name: layer.numel for layer in t.layers}

    def codes(bits: dict[str, int]) -> int:
        return sum(width * numel[name] for name, width in bits.items())

    found = allocate(t, average_bits=average)
    best = min(c for c in all_allocations(t) if codes(c[2]) <= average * sum(numel.values()))
    assert found.predicted_kl == pytest.approx(best[0]) and found.average_bits <= average
    assert found.target_bytes == found.predicted_bytes
    assert [p for p in found.frontier if p[0] <= found.target_bytes][-1] == (found.predicted_bytes, found.predicted_kl)
    sizes, kls = zip(*found.frontier, strict=True)
    assert list(sizes) == sorted(set(sizes)) and all(a > b for a, b in itertools.pairwise(kls))


def test_floors_ties_and_exclusions() -> None:
    t, target = small(), 1000
    numel = {layer.name: layer.numel for layer in t.layers}

    def check(found, allowed) -> None:
        kl, size, bits = min(c for c in all_allocations(t, allowed) if c[1] <= target)
        assert (found.bits, found.predicted_bytes, found.predicted_kl) == (bits, size, pytest.approx(kl))

    check(allocate(t, target_bytes=target, keep={"head": 3}), lambda bits: bits["head"] >= 4)
    check(
        allocate(t, target_bytes=target, keep={"enc.*": 4, "enc.1.q": 8}),
        lambda bits: min(bits[name] for name in NAMES[:4]) >= 4 and bits["enc.1.q"] == 8,
    )
    check(
        allocate(t, target_bytes=target, tie=["enc.*.[qk]"]),
        lambda bits: bits["enc.0.q"] == bits["enc.0.k"] and bits["enc.1.q"] == bits["enc.1.k"],
    )
    check(
        allocate(t, target_bytes=target, tie=["enc.?.[qk]"]), lambda bits: len({bits[name] for name in NAMES[:4]}) == 1
    )
    grouped = replace(t, layers=tuple(replace(x, group="g" if x.name[-1] == "q" else None) for x in t.layers))
    check(
        allocate(grouped, target_bytes=target, tie=["enc.0.*", "enc.0.?"]),
        lambda bits: bits["enc.0.q"] == bits["enc.1.q"] == bits["enc.0.k"],
    )
    found = allocate(t, target_bytes=1500, exclude=["enc.0.*"])
    assert found.bits["enc.0.q"] == found.bits["enc.0.k"] == 16
    rest = replace(t, layers=t.layers[2:], fixed_bytes=100 + 2 * numel["enc.0.q"] + 2 * numel["enc.0.k"])
    expected = allocate(rest, target_bytes=1500)
    assert found.predicted_bytes == expected.predicted_bytes and found.predicted_kl == expected.predicted_kl


def test_worse_at_more_bits() -> None:
    """A width that is larger and no better is never chosen."""
    t = table([("a", 8, {2: 2, 4: 4}, {2: 0.1, 4: 0.3}), ("b", 8, {2: 2, 4: 4}, {2: 0.2, 4: 0.2})])
    assert allocate(t, target_bytes=10**6).bits == {"a": 2, "b": 2}


def test_thinned_frontier_keeps_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    import mpq.allocation.solve

    options = random_options(5, 40, 6, "falling")
    t = table([(f"l{i}", 8, dict(enumerate((s for s, _ in row), 1)), dict(enumerate((k for _, k in row), 1)))
               for i, row in enumerate(options)])  # fmt: skip
    target = t.fixed_bytes + sum(row[2][0] for row in options)
    whole = allocate(t, target_bytes=target, whole_frontier=True)
    monkeypatch.setattr(mpq.allocation.solve, "MOST_POINTS", 10)
    thin = allocate(t, target_bytes=target, whole_frontier=True)
    assert "thinned" in thin.frontier_note and "thinned" not in whole.frontier_note
    assert len(thin.frontier) < len(whole.frontier) and set(thin.frontier) <= set(whole.frontier)
    sizes = [size for size, _ in thin.frontier]
    for size, kl in whole.frontier:
        assert thin.frontier[np.searchsorted(sizes, size, "right") - 1][1] <= kl * 1.001 * (1 + 1e-9)
    assert [p for p in thin.frontier if p[0] <= target][-1] == (thin.predicted_bytes, thin.predicted_kl)


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "expected one of"),
        ({"target_bytes": 900, "average_bits": 4}, "expected one of"),
        ({"target_bytes": 434}, r"smallest possible: 435 bytes \(0\.0005 MB, ratio 11\.2"),
        ({"target_mb": 0.0004}, "smallest possible: 435 bytes"),
        ({"target_ratio": 12}, "smallest possible: 435 bytes"),
        ({"average_bits": 1.9}, r"smallest possible: 2; no file is smaller than 435 bytes"),
        ({"target_bytes": 1000, "exclude": ["head"], "keep": {"enc*": 8}}, "smallest possible"),
        ({"target_mb": math.nan}, "positive"),
        ({"target_mb": math.inf}, "positive"),
        ({"target_ratio": 0}, "positive"),
        ({"average_bits": -1}, "positive"),
        ({"average_bits": 4, "keep": {"x*": 4}}, r"keep x\*: matches none"),
        ({"average_bits": 4, "exclude": ["x*"]}, r"exclude x\*: matches none"),
        ({"average_bits": 4, "tie": ["x*"]}, r"tie x\*: matches none"),
        ({"average_bits": 4, "keep": {"ENC*": 4}}, "matches none"),
        ({"average_bits": 4, "keep": {"head": 9}}, "from 1 to 8"),
        ({"average_bits": 4, "keep": {"head": 8}, "exclude": ["h*"]}, "floor"),
        ({"average_bits": 4, "tie": ["enc.0.?"], "exclude": ["enc.0.q"]}, "tied to an excluded"),
    ],
)
def test_what_cannot_be_asked(options: dict, words: str) -> None:
    with pytest.raises(MpqError, match=words):
        allocate(small(), **options)


def test_hull_keeps_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every listed point is one of the whole frontier; the answer is the same and listed."""
    import mpq.allocation.solve

    t = small()
    whole = allocate(t, target_bytes=1000)
    monkeypatch.setattr(mpq.allocation.solve, "QUICK", 0)
    hull = allocate(t, target_bytes=1000)
    assert "hull" in hull.frontier_note and hull.bits == whole.bits
    assert len(hull.frontier) < len(whole.frontier)
    kls = dict(whole.frontier)
    assert all(kl == pytest.approx(kls[size]) for size, kl in hull.frontier)
    assert [p for p in hull.frontier if p[0] <= 1000][-1] == (hull.predicted_bytes, hull.predicted_kl)


@pytest.mark.parametrize("bits", [15, 17])
def test_excluded_layers_are_half_or_single_precision(bits: int) -> None:
    t = small()
    t = replace(t, layers=tuple(replace(layer, float_bytes=layer.numel * bits // 8) for layer in t.layers))
    with pytest.raises(MpqError, match="float_bytes: expected"):
        allocate(t, target_bytes=10_000, exclude=["head"])


def test_exclusion_needs_to_know_the_size() -> None:
    t = small()
    t = replace(t, layers=tuple(replace(layer, float_bytes=None) for layer in t.layers))
    with pytest.raises(MpqError, match="no float_bytes"):
        allocate(t, average_bits=4, exclude=["head"])
