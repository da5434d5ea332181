"""A segment: one link of the chain that a model's forward pass is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Segment:
    """One link of a chain.

    Attributes:
        prefixes: The weights whose names start with one of these are used here and nowhere else.
        run: (hidden, context) -> hidden; the context is what `AsrModel.context` returned for the encoder, or the
            `inputs` of what `Head.context` returned for a head. The first hidden state is the features for the
            encoder and the encoder output for a head; the last of a head is its logits. What lies between is the
            model's own affair.
    """

    prefixes: tuple[str, ...]
    run: Callable[[Any, Any], Any]
