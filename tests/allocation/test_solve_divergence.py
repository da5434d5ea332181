"""The smallest file for a divergence, against brute force over all allocations; with floors, exclusions and ties."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.allocation.solve import allocate
from mpq.errors import MpqError
from mpq.sensitivity.records import LayerSensitivity, SensitivityTable

BITS = (2, 4, 8)
NAMES = ("enc.0.q", "enc.0.k", "enc.1.q", "enc.1.k", "head")


def table(kls: list[list[float]], numel: list[int]) -> SensitivityTable:
    layers = [
        LayerSensitivity(
            name=name,
            kind="linear",
            shape=(count,),
            numel=count,
            size_bytes={bits: count * bits // 8 + 7 for bits in BITS},
            kl=dict(zip(BITS, kl, strict=True)),
            float_bytes=2 * count,
        )
        for name, kl, count in zip(NAMES, kls, numel, strict=False)
    ]
    return SensitivityTable(tuple(layers), BITS, fixed_bytes=100)


def falling(seed: int) -> SensitivityTable:
    random = np.random.default_rng(seed)
    kls = [[float(random.uniform(0.5, 2)) * 4.0**-bits for bits in BITS] for _ in NAMES]
    return table(kls, random.integers(30, 400, len(NAMES)).tolist())


def all_choices(
    t: SensitivityTable, excluded: tuple[str, ...] = (), allowed: Callable[[dict[str, int]], bool] = lambda bits: True
) -> list[tuple[int, float, dict[str, int]]]:
    """Returns (bytes, kl, bits) of every combination of widths that is allowed."""
    found = []
    for widths in itertools.product(*([16] if layer.name in excluded else BITS for layer in t.layers)):
        bits = {layer.name: width for layer, width in zip(t.layers, widths, strict=True)}
        if allowed(bits):
            size, kl = t.fixed_bytes, []
            for layer, width in zip(t.layers, widths, strict=True):
                size += layer.float_bytes if width == 16 else layer.size_bytes[width]
                kl.append(0.0 if width == 16 else layer.kl[width])
            found.append((size, math.fsum(kl), bits))
    return found


def check(t: SensitivityTable, limit: float, choices: list | None = None, **options) -> None:
    """The answer is the smallest file of all, of these the best, and a point of a frontier of such points."""
    choices = all_choices(t) if choices is None else choices
    size, kl = min((size, kl) for size, kl, _ in choices if kl <= limit)
    found = allocate(t, max_divergence=limit, **options)
    assert (found.predicted_bytes, found.predicted_kl) == (size, kl)
    assert (size, kl, found.bits) in choices
    assert found.target_bytes == size
    assert [point for point in found.frontier if point[0] <= size][-1] == (size, kl)
    sizes, kls = zip(*found.frontier, strict=True)
    assert list(sizes) == sorted(set(sizes)) and all(a > b for a, b in itertools.pairwise(kls))
    for point_size, point_kl in found.frontier:
        assert point_kl == pytest.approx(min(choice[1] for choice in choices if choice[0] <= point_size))


# multiples of 2^-10 add up exactly, so a limit can be exactly met, and many choices tie
EXACT = st.integers(0, 64).map(lambda k: k / 1024)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(EXACT, min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.sampled_from([8, 16, 24, 40, 41]), min_size=4, max_size=4),
    st.integers(1, 200),
)
def test_smallest_file_equals_brute_force(kls: list[list[float]], numel: list[int], limit: int) -> None:
    t = table(kls, numel)
    choices = all_choices(t)
    best = min(kl for _, kl, _ in choices)
    if limit / 1024 < best:
        with pytest.raises(MpqError, match=r"max_divergence .* is less than the smallest possible with these widths"):
            allocate(t, max_divergence=limit / 1024)
    else:
        check(t, limit / 1024, choices)


@pytest.mark.parametrize("seed", range(4))
def test_every_limit_of_a_falling_table(seed: int) -> None:
    """Limits between the sums of divergences, so that rounding plays no part; all from reachable to anything goes."""
    t = falling(seed)
    choices = all_choices(t)
    kls = sorted({kl for _, kl, _ in choices})
    limits = [(a + b) / 2 for a, b in itertools.pairwise(kls) if b > a * (1 + 1e-9)]
    for limit in limits[:: len(limits) // 12]:
        check(t, limit, choices)
    for limit in (kls[-1] * 1.001, 1e6):
        found = allocate(t, max_divergence=limit)
        assert found.bits == {name: 2 for name in NAMES}


def test_a_limit_that_cannot_be_kept() -> None:
    t = falling(0)
    best = math.fsum(layer.kl[8] for layer in t.layers)
    with pytest.raises(MpqError, match="max_divergence 1e-12 is less than the smallest possible with these widths"):
        allocate(t, max_divergence=1e-12)
    found = allocate(t, max_divergence=best * (1 + 1e-9))
    assert found.bits == {name: 8 for name in NAMES}
    with pytest.raises(MpqError, match="measure wider ones"):
        allocate(t, max_divergence=best * (1 - 1e-9))


@pytest.mark.parametrize("seed", range(6))
def test_the_limit_that_the_error_names_can_be_kept(seed: int) -> None:
    t = falling(seed)
    with pytest.raises(MpqError) as caught:
        allocate(t, max_divergence=1e-12)
    figure = re.search(r"widths: (\S+) nats per frame", str(caught.value))
    assert figure is not None
    assert float(figure[1]) == pytest.approx(math.fsum(layer.kl[8] for layer in t.layers), rel=2e-3)
    allocate(t, max_divergence=float(figure[1]))


def test_floors_exclusions_and_ties() -> None:
    t = falling(5)
    limit = 0.08
    for options, allowed in (
        ({"keep": {"head": 3, "enc.1.*": 8}}, lambda b: b["head"] >= 4 and b["enc.1.q"] == b["enc.1.k"] == 8),
        ({"tie": ["enc.*.[qk]"]}, lambda b: b["enc.0.q"] == b["enc.0.k"] and b["enc.1.q"] == b["enc.1.k"]),
        (
            {"tie": ["enc.?.?"], "keep": {"enc.0.k": 4}},
            lambda b: len({b[n] for n in NAMES[:4]}) == 1 and b[NAMES[0]] > 2,
        ),
    ):
        check(t, limit, all_choices(t, allowed=allowed), **options)
    grouped = replace(t, layers=tuple(replace(x, group="g" if x.name[-1] == "q" else None) for x in t.layers))
    check(grouped, limit, all_choices(t, allowed=lambda b: b["enc.0.q"] == b["enc.1.q"]))
    check(t, limit, all_choices(t, ("enc.0.q", "head")), exclude=["enc.0.q", "h*"])
    everything = allocate(t, max_divergence=1e-30, exclude=["*"])
    assert set(everything.bits.values()) == {16} and everything.predicted_kl == 0


@pytest.mark.parametrize(
    "options, words",
    [
        ({"target_bytes": 900}, "expected one of .* got target_bytes, max_divergence"),
        ({"target_mb": 1}, "expected one of"),
        ({"target_ratio": 4}, "expected one of"),
        ({"average_bits": 4}, "expected one of .* got average_bits, max_divergence"),
        ({"max_divergence": 0}, "max_divergence: expected a positive number, got 0"),
        ({"max_divergence": -0.1}, "positive"),
        ({"max_divergence": math.nan}, "positive"),
        ({"max_divergence": math.inf}, "positive"),
        ({"max_divergence": True}, "positive"),
        ({"keep": {"x*": 4}}, r"keep x\*: matches none"),
        ({"keep": {"head": 8}, "exclude": ["head"]}, "has a floor of 8 bits"),
    ],
)
def test_what_cannot_be_asked(options: dict, words: str) -> None:
    with pytest.raises(MpqError, match=words):
        allocate(falling(0), **({"max_divergence": 0.1} | options))
