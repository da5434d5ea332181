"""Mixed-precision quantization of Conformer speech recognisers.

The package imports nothing here, so that `mpq --help` starts without torch. Start at `mpq.models.load_model`,
`mpq.sensitivity.measure_sensitivity`, `mpq.allocation.allocate`, `mpq.artifact.pack` and `mpq.compare.compare`.
"""

__version__ = "0.1.0"
