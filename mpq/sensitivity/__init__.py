"""How much the output suffers from each layer at each bit-width (`mpq sensitivity`).

`measure` is the command, by the exact divergence of `divergence` (Li et al. 2023, Eq. 7) or the second-order score of
`fisher`; `calibration` draws the audio, `statistics` gathers what the layers see of it, `records` is the table. It may
use the packages from `scoring` down.
"""
