"""Architecture search over the feed-forward modules of the encoder (`mpq search`; Li et al. 2023, section 2).

`space` has the candidates, `supernet` holds them all in one model, `importance` and `low_rank` begin it from a trained
one (`start`), `loop` chooses, `phases` are the three steps and `run` does them in order, `record` is the result and
`figure` its picture. It may use the packages from `finetuning` down.
"""
