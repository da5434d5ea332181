"""Weights to codes and back: pure functions of tensors.

`spec` has the options and the tables of schemes and roundings, `quantizers` applies them. `levels` is the interface of
a scheme, `uniform` and `mu_law` are the schemes, `grids` and `scales` choose a group's levels; `gptq` rounds by what a
layer sees, `soft_assignment` is the General Quantizer (Zhen et al. 2022). It may use `errors` alone.
"""

from typing import TYPE_CHECKING

from mpq.public import names

if TYPE_CHECKING:
    from mpq.quantization.quantizers import dequantize as dequantize
    from mpq.quantization.quantizers import fake_quantize as fake_quantize
    from mpq.quantization.quantizers import quantize as quantize
    from mpq.quantization.spec import QuantSpec as QuantSpec

__getattr__ = names(
    __name__, QuantSpec="spec", quantize="quantizers", dequantize="quantizers", fake_quantize="quantizers"
)
