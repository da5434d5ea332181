"""Pairs of simulated systems whose word error rates are known: their segments on random test sets."""

from dataclasses import dataclass, replace

import numpy as np

from mpq.scoring.significance import segments

WORDS_PER_UTTERANCE = 15


@dataclass(frozen=True)
class Pair:
    """How often two systems get a word wrong.

    Attributes:
        both, only_a, only_b: The probabilities that both get it wrong, that only a does, that only b does.
        stay: The probability that a word is like the word before it: errors come in bursts.
        spread: The variance of how difficult utterances are (1 is the mean); 0: all alike.
    """

    both: float
    only_a: float
    only_b: float
    stay: float = 0.0
    spread: float = 0.0

    @property
    def difference(self) -> float:
        """WER(b) - WER(a)."""
        return self.only_b - self.only_a

    def worse_by(self, difference: float) -> "Pair":
        """Returns the pair whose b makes more errors, at other places than a."""
        return replace(self, only_b=self.only_b + difference)

    def draw(self, random: np.random.Generator, utterances: int) -> list[tuple[int, int]]:
        """Returns the segments of a test set, as (errors of a, errors of b)."""
        shape = (utterances, WORDS_PER_UTTERANCE)
        difficulty = random.gamma(1 / self.spread, self.spread, utterances) if self.spread else np.ones(utterances)
        limits = np.cumsum([self.both, self.only_a, self.only_b])[:, None, None] * difficulty[None, :, None]
        drawn, is_kept = random.random(shape), random.random(shape) < self.stay
        states = (drawn < limits).sum(0)  # 3: both are wrong, 2: a is, 1: b is, 0: neither
        for word in range(1, WORDS_PER_UTTERANCE):
            states[:, word] = np.where(is_kept[:, word], states[:, word - 1], states[:, word])
        return [pair for row in states[states.any(1)].tolist() for pair in segments(*map(_letters, (row, row), "ab"))]


def _letters(states: list[int], system: str) -> str:
    """Returns the alignment of a system."""
    return "".join("S" if state in ((2, 3) if system == "a" else (1, 3)) else "C" for state in states)
