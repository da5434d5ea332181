"""The options of a quantizer, and the tables of schemes and roundings."""

import doctest
import subprocess
import sys

import pytest

from mpq.errors import MpqError
from mpq.quantization import spec
from mpq.quantization.spec import MAX_BITS, MIN_BITS, SCHEMES, QuantSpec


def test_doctests() -> None:
    result = doctest.testmod(spec)
    assert result.attempted >= 1 and result.failed == 0


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bits": 0}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": 4, "granularity": 64}, "granularity"),
        ({"bits": 4, "clip": None}, "clip"),
        ({"bits": 4, "scheme": "affine"}, "scheme"),
        ({"bits": 4, "granularity": "group:0"}, "granularity"),
        ({"bits": 4, "granularity": "row"}, "granularity"),
        ({"bits": 4, "clip": "percentile:50"}, "clip"),
        ({"bits": 4, "clip": "percentile:101"}, "clip"),
        ({"bits": 4, "clip": "max"}, "clip"),
        ({"bits": 4, "rounding": "up"}, "rounding"),
        ({"bits": 4, "scale_dtype": "bfloat16"}, "scale_dtype"),
    ],
)
def test_bad_specs_are_refused(options: dict, words: str) -> None:
    with pytest.raises(MpqError, match=f"^{words}: expected"):
        QuantSpec(**options)


def test_a_rounding_that_the_scheme_lacks_is_refused_with_the_remedy() -> None:
    with pytest.raises(MpqError, match="rounding: the scheme mulaw has no gptq; use --rounding nearest"):
        QuantSpec(4, "mulaw", rounding="gptq")


def test_codes_by_hand() -> None:
    assert list(QuantSpec(2, "symmetric").codes) == [-1, 0, 1] and list(QuantSpec(1, "symmetric").codes) == [-1, 1]
    assert list(QuantSpec(2, "asymmetric").codes) == list(QuantSpec(2, "mulaw").codes) == [0, 1, 2, 3]
    signs = [(bits, scheme) for bits in range(1, 9) for scheme in SCHEMES if QuantSpec(bits, scheme).is_sign]
    assert signs == [(1, "symmetric")]


@pytest.mark.parametrize("scheme", [name for name, one in SCHEMES.items() if not one.is_entropy_coded])
def test_codes_fit_their_width(scheme: str) -> None:
    for bits in range(MIN_BITS, MAX_BITS + 1):
        assert 2 ** (bits - 1) <= len(QuantSpec(bits, scheme).codes) <= 2**bits


def test_what_a_spec_says_of_itself() -> None:
    assert not QuantSpec(4).needs_statistics and QuantSpec(4, rounding="gptq").needs_statistics
    assert (
        QuantSpec(4, granularity="group:12").group_size == 12 and QuantSpec(4, granularity="channel").group_size is None
    )
    assert QuantSpec(4, clip="percentile:99.5").percentile == 99.5 and QuantSpec(4, clip="mse").percentile is None


def test_the_tables_are_read_without_torch() -> None:
    code = "import sys, mpq.quantization.spec, mpq.config\nassert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
