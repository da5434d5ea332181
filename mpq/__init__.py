"""Mixed-precision quantization of Conformer speech recognisers.

`mpq.load_model(path)` returns the model in a checkpoint or packed file. The packages are named after the steps of the
work; docs/architecture.md has the map. Nothing heavy is imported here, so that `mpq --help` starts without torch.
"""

from typing import TYPE_CHECKING

from mpq.public import names

if TYPE_CHECKING:
    from mpq.loading import load_model as load_model

__version__ = "0.1.0"

__getattr__ = names(__name__, load_model="loading")
