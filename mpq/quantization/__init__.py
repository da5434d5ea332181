"""Weights to codes and back: pure functions of tensors.

`spec` says how, `quantizers` does it, `grids` and `mu_law` choose the levels, `gptq` rounds by what a layer sees,
`soft_assignment` is the General Quantizer (Zhen et al. 2022). It may use the modules at the top of `mpq`.
"""

from mpq.public import names

__getattr__ = names(
    __name__, QuantSpec="spec", quantize="quantizers", dequantize="quantizers", fake_quantize="quantizers"
)
