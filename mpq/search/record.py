"""The results of an architecture search: the architecture that was chosen, and the whole search."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpq.files import read_json
from mpq.training.record import EpochResult, TrainingResult

ARCHITECTURE_FORMAT = "mpq.architecture/1"
SEARCH_FORMAT = "mpq.search/1"


@dataclass(frozen=True)
class SearchedModule:
    """One feed-forward module.

    Attributes:
        name: The module's name in the model.
        width, rank: The width and the rank that were chosen; rank 0 is a module that is not factored.
        widths, ranks: The candidates, ascending.
        width_probabilities, rank_probabilities: softmax(alpha) of the candidates at the end of the second phase.
    """

    name: str
    width: int
    rank: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    width_probabilities: tuple[float, ...]
    rank_probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Architecture:
    """`mpq.architecture/1`: the choice that the second phase of a search made.

    Attributes:
        fingerprint: The digest of the inputs: supernet, options and held-out data.
        modules: Each block's first module, then its second.
        millions: Parameters of the whole model, BatchNorm's running statistics included.
        largest_millions, expected_millions: Parameters of the supernet, and their mean over the probabilities.
        largest_loss, largest_wer: The loss of the supernet as a whole on the held-out data, nats a token (in a
            distillation: its divergence), and its WER, a fraction; None without transcripts.
        loss, wer: The same loss and WER for the architecture, with the supernet's weights.
        epochs: The epochs of the second phase; their losses have the penalty in them.
        seconds: Wall-clock time of the second phase.
        inputs: All that the choice depends on, as in `mpq.identity.Inputs`.
    """

    fingerprint: str
    modules: tuple[SearchedModule, ...]
    millions: float
    largest_millions: float
    expected_millions: float
    largest_loss: float
    largest_wer: float | None
    loss: float
    wer: float | None
    epochs: tuple[EpochResult, ...]
    seconds: float
    inputs: dict[str, Any] = field(default_factory=dict)

    def shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Returns for each block the (width, rank) of its first and of its second module."""
        flat = [(one.width, one.rank) for one in self.modules]
        return list(zip(flat[::2], flat[1::2], strict=True))

    def to_json(self) -> dict[str, Any]:
        return {"format": ARCHITECTURE_FORMAT} | asdict(self)

    @classmethod
    def load(cls, path: Path) -> "Architecture":
        """Reads an `architecture.json`."""
        return cls.of(read_json(path, ARCHITECTURE_FORMAT))

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "Architecture":
        """Returns the architecture from the JSON that `to_json` returned."""
        rest = {key: value for key, value in raw.items() if key != "format"}
        modules = tuple(SearchedModule(**{key: _frozen(value) for key, value in one.items()}) for one in raw["modules"])
        return cls(**rest | {"modules": modules, "epochs": tuple(EpochResult(**one) for one in raw["epochs"])})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class SearchResult:
    """`mpq.search/1`: a finished search.

    Attributes:
        checkpoint: {"path", "sha256"} of the trained model that the search began with; None: it began from scratch.
        space: The quantities that were searched: "widths", "ranks" or "both".
        method: The weights of the candidates: "gumbel" or "softmax".
        eta, target_millions: The penalty, or the target that replaces it; one of them is None.
        supernet: The folder of the supernet.
        supernet_seconds: Wall-clock time of the first phase, whichever search did it.
        architecture: The choice of the second phase.
        training: The result of the third phase, the training of the model found.
    """

    checkpoint: dict[str, str] | None
    space: str
    method: str
    eta: float | None
    target_millions: float | None
    supernet: str
    supernet_seconds: float
    architecture: Architecture
    training: TrainingResult

    def to_json(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in self.__dataclass_fields__}
        parts = {"architecture": self.architecture.to_json(), "training": self.training.to_json()}
        return {"format": SEARCH_FORMAT} | own | parts
