"""From sensitivities and a size to a packed file (`mpq allocate`, `mpq pack`).

`decisions` turns floors, exclusions and ties into choices, `knapsack` solves them exactly (Li et al. 2023, Eq. 8),
`solve` is the command, `refine` measures the answer and looks for better ones, `assignment` applies an answer to a
model, `pack` writes its file, `records` is the answer. It may use the packages from `training` down.
"""

from mpq.public import names

__getattr__ = names(__name__, allocate="solve", pareto_frontier="knapsack")
