"""The setting of a recipe's stages: the paths of the run folder, the models, and the identity of the data.

The *baseline* is the trained float model: that of the stage train, or the recipe's checkpoint. What is quantized is the
model that the stage search has found, if there is one, else the baseline. A search from scratch without a baseline is
its own: its model is what the packed ones are compared with.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mpq.allocation.records import Allocation
from mpq.artifact.weights import WeightFormat
from mpq.config import Recipe
from mpq.identity import data_identity, options_of
from mpq.loading import PACKED_FILE
from mpq.models.checkpoint import MODEL_FILE
from mpq.quantization.spec import scheme_and_widths
from mpq.speech.decoding import DecodeOptions
from mpq.speech.manifests import read_data
from mpq.training.folder import weight_options
from mpq.training.record import TRAINING_FORMAT


@dataclass(frozen=True)
class Setting:
    """A recipe and its run folder.

    Attributes:
        recipe: The recipe.
        out: The run folder.
        device: The device to compute on, such as "auto" (`mpq.runtime.choose_device`).
        quiet: Show no progress.
    """

    recipe: Recipe
    out: Path
    device: str
    quiet: bool

    # ---- models

    @property
    def is_searched(self) -> bool:
        return "search" in self.recipe.stages

    @property
    def baseline(self) -> Path | None:
        """The trained float model; None where a search from scratch is all there is."""
        if "train" in self.recipe.stages:
            return self.out / "train"
        return Path(self.recipe.checkpoint) if self.recipe.checkpoint else None

    @property
    def checkpoint(self) -> Path:
        """The float model that is quantized."""
        return self.found if self.is_searched else self.baseline or Path()

    @property
    def maker(self) -> str:
        """The stage that writes the model that is quantized."""
        return "search" if self.is_searched else "train"

    @property
    def reference(self) -> Path:
        """The float model that the packed ones are compared with."""
        return self.baseline or self.checkpoint

    @property
    def start(self) -> Path | None:
        """The trained model that the search begins with; None for a search from scratch."""
        if self.recipe.search.trained:
            return self.out / "train" / MODEL_FILE
        return Path(self.recipe.checkpoint) if self.recipe.checkpoint else None

    # ---- files

    @property
    def found(self) -> Path:
        return self.out / "search"

    @property
    def table(self) -> Path:
        return self.out / "sensitivity.json"

    @property
    def allocation(self) -> Path:
        return self.out / "allocation.json"

    @property
    def packed(self) -> Path:
        return self.out / PACKED_FILE

    @property
    def tuned(self) -> Path:
        return self.out / "finetune"

    @property
    def tests(self) -> dict[str, str]:
        return self.recipe.data.test

    # ---- options and data

    @property
    def calibration(self) -> Path:
        """The audio that sensitivities are measured on."""
        return self.recipe.path(self.recipe.calibration())

    @property
    def decode(self) -> DecodeOptions:
        return DecodeOptions(**self.recipe.decode.model_dump())

    def quantizer(self) -> WeightFormat:
        """Returns the quantizer of the recipe."""
        return recipe_quantizer(self.recipe)

    def moved_calibration(self, allocation: Allocation) -> Path | None:
        """Returns where the calibration audio is now, for a rounding that needs it; None where it is still there."""
        was = allocation.data.get("path")
        is_needed = allocation.quantizer.get("rounding") == "gptq" and "sha256" in allocation.data
        return self.calibration if is_needed and was and not Path(was).exists() else None

    @cached_property
    def _identities(self) -> dict[Path, str]:
        return {}

    def identity(self, name: str) -> str:
        """Returns the identity of the data in a manifest or Kaldi directory of the recipe (`mpq.identity`)."""
        path = self.recipe.path(name)
        if path not in self._identities:
            self._identities[path] = data_identity(read_data(path, self.recipe.data.skip_bad))
        return self._identities[path]

    def calibration_identity(self) -> str:
        return self.identity(self.recipe.calibration())

    def reading(self) -> dict[str, Any]:
        """Returns the options by which audio is read and faulty utterances are left out."""
        return {"channel": self.recipe.data.channel, "skip_bad": self.recipe.data.skip_bad}

    def training_data(self) -> dict[str, Any]:
        """Returns the identity of the data of a training, as a part of its inputs."""
        data = self.recipe.data
        return self.reading() | {
            "max_seconds": data.max_seconds,
            "train": [self.identity(name) for name in data.train],
            "dev": self.identity(data.dev) if data.dev else None,
        }

    def training_inputs(self) -> dict[str, Any]:
        """Returns all that the weights of a training depend on."""
        start = {"format": TRAINING_FORMAT, "seed": self.recipe.seed, "data": self.training_data()}
        return start | weight_options(self.recipe)

    def test_inputs(self) -> dict[str, Any]:
        """Returns what an evaluation depends on besides the model."""
        tests = {name: self.identity(path) for name, path in self.tests.items()}
        return {"data": self.reading() | {"test": tests}, "decode": options_of(self.recipe.decode)}


def recipe_quantizer(recipe: Recipe) -> WeightFormat:
    """Returns the quantizer of a recipe."""
    options = recipe.sensitivity.model_dump(include={"granularity", "clip", "rounding"}, exclude_none=True)
    return WeightFormat.from_options(options | {"scheme": scheme_and_widths_of(recipe)[0]})


def scheme_and_widths_of(recipe: Recipe) -> tuple[str, list[float]]:
    """Returns the scheme of a recipe, and the widths or rates to measure."""
    options = recipe.sensitivity
    return scheme_and_widths(options.scheme, options.bits, options.rates, bool(options.granularity or options.clip))
