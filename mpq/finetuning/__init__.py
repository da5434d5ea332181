"""Quantization-aware training of an allocation's widths (`mpq finetune`).

`fake_quant` holds the weights that are trained and `straight_through` rounds one of them, `loop` trains them,
`averages` keeps running means, `overflow` finds the layer that broke down, `run` prepares the loop and writes the
artifacts, `record` is the result and `learning_curve` its picture. It may use the packages from `allocation` down.
"""
