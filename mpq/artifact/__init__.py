"""The packed file. `codes` turns codes into bits, `weights` one weight into its bytes, `file` a model into the file.

Elsewhere, `mpq.allocation.assignment` says which width each weight gets, and `mpq.allocation.pack` is the command that
writes such a file. It may use the packages from `models` down.
"""
