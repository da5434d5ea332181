"""The effect of each layer's bit-width on the output (`mpq sensitivity`).

`measure` is the command, by the exact divergence of `divergence` (Li et al. 2023, Eq. 7) or the second-order score of
`fisher`; `calibration` draws the audio, `statistics` gathers the inputs of the layers, `records` is the table. It may
use the packages from `scoring` down.
"""
