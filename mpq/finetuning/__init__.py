"""Quantization-aware training of an allocation's widths (`mpq finetune`).

`fake_quant` holds the weights that are trained, `loop` trains them, `run` prepares the loop and writes the artifacts,
`record` is the result and `learning_curve` its picture. It may use the packages from `allocation` down.
"""
