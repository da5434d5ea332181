"""Word errors and their significance (`mpq evaluate`, `mpq compare`).

`metrics` counts, `significance` tests (MAPSSWE as NIST SCTK has it, McNemar, bootstrap), `evaluate` and `compare` are
the commands, `records` what a comparison says. It may use `loading` and the packages below it.
"""

from mpq.public import names

__getattr__ = names(__name__, mapsswe="significance")
