"""Training of float models, and what every training shares (`mpq train`).

`run` is the command, `building` makes the model of a recipe, `data` reads batches and `batch` is one of them, `losses`
and `distillation` are what is minimised, `objectives` puts them together, `loop` and `weights` do the updates,
`optimization` and `orthogonal` what they need, `held_out` evaluates, `folder`, `state`, `log` and `record` are what is
on the disk. It may use the packages from `sensitivity` down.
"""
