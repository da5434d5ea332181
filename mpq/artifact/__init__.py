"""The packed file. `weights` turns one weight into its bytes, `parts` what else a model has, `file` both into the file.

Elsewhere, `mpq.coding` turns numbers into bytes, `mpq.allocation.assignment` says which width each weight gets, and
`mpq.allocation.pack` is the command that writes such a file. It may use the packages from `models` down.
"""
