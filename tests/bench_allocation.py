"""The allocator against SciPy's MILP: time for one budget, time for the whole frontier, and whether they agree.

    python tests/bench_allocation.py [SENSITIVITY.json]

With a sensitivity file its layers are one more instance.
"""

import sys
import time
from pathlib import Path

from knapsacks import by_milp, random_options, totals

from mpq.allocation.frontier import pareto_frontier
from mpq.allocation.knapsack import smallest_cost
from mpq.sensitivity.records import SensitivityTable


def main() -> None:
    instances = {
        f"200 layers x 8 widths, {kind}": random_options(0, 200, 8, kind) for kind in ("falling", "random", "repeated")
    }
    for path in sys.argv[1:]:
        table = SensitivityTable.load(Path(path))
        instances[f"{path}, {len(table.layers)} x {len(table.bits)}"] = [
            [(layer.size_bytes[bits], layer.kl[bits]) for bits in table.bits] for layer in table.layers
        ]
    print("| instance | one budget ms | MILP ms | ratio | same optimum | frontier s | points |")
    print("|---|---|---|---|---|---|---|")
    for name, options in instances.items():
        smallest, largest = (sum(pick(size for size, _ in row) for row in options) for pick in (min, max))
        ours = theirs = 0.0
        same = True
        shares = (0.1, 0.3, 0.5, 0.7, 0.9)
        for share in shares:
            budget = smallest + int(share * (largest - smallest))
            start = time.perf_counter()
            kl, size = totals(options, smallest_cost(options, budget))
            middle = time.perf_counter()
            optimum = by_milp(options, budget, kl)
            end = time.perf_counter()
            ours, theirs = ours + middle - start, theirs + end - middle
            same &= size <= budget and abs(kl - optimum) <= 1e-7 * abs(optimum)
        start = time.perf_counter()
        frontier = pareto_frontier(options)
        seconds = time.perf_counter() - start
        kind = "" if frontier.is_whole else " (hull)"
        print(
            f"| {name} | {1e3 * ours / len(shares):.0f} | {1e3 * theirs / len(shares):.0f} | {theirs / ours:.1f} "
            f"| {'yes' if same else 'NO'} | {seconds:.1f} | {len(frontier.cost)}{kind} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
