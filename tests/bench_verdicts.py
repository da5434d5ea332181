"""How far the verdicts of `mpq compare` can be trusted: simulated pairs of systems with known differences.

    python tests/bench_verdicts.py [SETS]

For each pair, SETS (2000) test sets are drawn three times: with equally good systems (does the test keep its level of
5 %?), with a b that is worse by the margin of 0.2 points (does the bound hold 95 % of the time? how often is
non-inferiority shown, which must not be above 5 %?), and with a b that is worse by what the first draws say can be
found (is it found four times in five?). In brackets, the same with the variance that MAPSSWE itself takes, n s^2.
"""

import math
import sys

import numpy as np
from tiny_pairs import WORDS_PER_UTTERANCE, Pair

from mpq.scoring.significance import mapsswe
from mpq.scoring.verdicts import detectable, non_inferiority

PAIRS = {
    "independent words": Pair(0.05, 0.012, 0.012),
    "unlike systems": Pair(0.004, 0.05, 0.05),
    "bursts": Pair(0.05, 0.012, 0.012, stay=0.6),
    "bursts, unlike utterances": Pair(0.05, 0.012, 0.012, stay=0.5, spread=1.0),
    "few errors": Pair(0.002, 0.0005, 0.0005),
    "few errors, bursts": Pair(0.002, 0.0005, 0.0005, stay=0.6),
}
MARGIN, BAD = 0.002, 0.01


def main() -> None:
    sets = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print(
        "| pair | words | segments | level % | bound holds % | shown at the margin % | would show, points | found % |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for number, (name, pair) in enumerate(PAIRS.items()):
        for words in (1500, 3600, 15000):
            random, utterances = np.random.default_rng([number, words]), words // WORDS_PER_UTTERANCE

            def draw(pair: Pair, random=random, utterances=utterances) -> list[list[tuple[int, int]]]:
                return [pair.draw(random, utterances) for _ in range(sets)]

            equal = draw(pair)
            tests = [mapsswe(one) for one in equal]
            losses = [detectable(one, words) or math.nan for one in equal]
            theirs = [2.8016 * math.sqrt(test.segments) * test.std / words for test in tests]
            cells = [f"{np.mean([test.segments for test in tests]):.0f}", percent(test.significant for test in tests)]
            at_margin = draw(pair.worse_by(MARGIN))
            bounds = [bound(one, words) for one in at_margin]
            cells += [holds(bounds, MARGIN), percent(one < MARGIN for one, _ in bounds)]
            found = [np.nanmedian(losses), np.nanmedian(theirs)]
            cells.append(f"{100 * found[0]:.2f} ({100 * found[1]:.2f})")
            powers = [percent(mapsswe(one).significant for one in draw(pair.worse_by(loss))) for loss in found]
            cells.append(f"{powers[0]} ({powers[1]})")
            print(f"| {name} | {words} | {' | '.join(cells)} |", flush=True)
    words, pair = 15000, Pair(0.001, 0.0005, 0.0005).worse_by(BAD)
    random = np.random.default_rng(99)
    drawn = [pair.draw(random, words // WORDS_PER_UTTERANCE) for _ in range(sets)]
    segments = np.mean([len(one) for one in drawn])
    cells = [f"{segments:.0f}", "", holds([bound(one, words) for one in drawn], BAD), "", "", ""]
    print(f"| b is {100 * BAD:g} points worse, a nearly perfect | {words} | {' | '.join(cells)} |")


def bound(segments: list[tuple[int, int]], words: int) -> tuple[float, float]:
    """Returns the bound and what it would be with MAPSSWE's variance; without one, nothing is excluded."""
    test, found = mapsswe(segments), non_inferiority(segments, words, MARGIN)
    theirs = (-test.segments * test.mean + 1.6448536 * math.sqrt(test.segments) * test.std) / words
    return (math.inf, math.inf) if found.upper is None else (found.upper, theirs)


def holds(bounds: list[tuple[float, float]], loss: float) -> str:
    """Returns how often the two bounds are above the loss."""
    return f"{percent(ours >= loss for ours, _ in bounds)} ({percent(theirs >= loss for _, theirs in bounds)})"


def percent(answers) -> str:
    """Returns the share of yes."""
    return f"{100 * np.mean(list(answers)):.1f}"


if __name__ == "__main__":
    main()
