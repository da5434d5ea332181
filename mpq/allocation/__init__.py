"""From sensitivities and a size to a packed file (`mpq allocate`, `mpq pack`).

`decisions` turns floors, exclusions and ties into choices, `knapsack` solves them exactly (Li et al. 2023, Eq. 8),
`frontier` lists every trade-off, `solve` is the command. `refine` measures the answer with all layers quantized
together (`meter`) and looks for a better one (`moves`). `assignment` applies an answer to a model, `pack` writes its
file, `records` is the answer. It may use the packages from `training` down.
"""

from typing import TYPE_CHECKING

from mpq.public import names

if TYPE_CHECKING:
    from mpq.allocation.frontier import pareto_frontier as pareto_frontier
    from mpq.allocation.solve import allocate as allocate

__getattr__ = names(__name__, allocate="solve", pareto_frontier="frontier")
