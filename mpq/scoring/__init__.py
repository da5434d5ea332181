"""Word errors and their significance (`mpq evaluate`, `mpq compare`).

`metrics` counts, `significance` tests (MAPSSWE as NIST SCTK has it, McNemar, bootstrap), `verdicts` says what a test
set could show at all, `groups` tells speakers apart, `evaluate` and `compare` are the commands, `records` is the result
of a comparison. It may use `loading` and the packages below it.
"""

from typing import TYPE_CHECKING

from mpq.public import names

if TYPE_CHECKING:
    from mpq.scoring.significance import mapsswe as mapsswe

__getattr__ = names(__name__, mapsswe="significance")
