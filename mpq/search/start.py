"""The start of an architecture search: a model and its candidates; a trained model's hidden units are put in order."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from mpq.config import Recipe, SearchConfig
from mpq.errors import MpqError
from mpq.loading import model_file, open_float_model
from mpq.models.base import AsrModel
from mpq.models.checkpoint import checkpoint_family
from mpq.models.hybrid import HybridConformer
from mpq.models.reshaping import FfnShapes, conformer, sliced
from mpq.search.importance import order_units, unit_importance
from mpq.search.low_rank import factored
from mpq.search.space import SearchSpace, search_space
from mpq.search.supernet import budget
from mpq.sensitivity.calibration import draw, one_by_one
from mpq.sensitivity.statistics import input_grams
from mpq.speech.text import train_tokenizer
from mpq.training.building import build_model, encoder_options
from mpq.training.data import read_transcripts

STATISTICS_SECONDS = 60.0
"""Length of the calibration audio on which units and ranks of a trained model are measured, seconds."""


@dataclass(frozen=True)
class Start:
    """The start of a search.

    Attributes:
        model: The recipe's model, untrained, or the trained one.
        checkpoint: {"path", "sha256"} of the trained model; None for a search from scratch.
        space: The candidates.
        is_imitating: Whether the trained model is the teacher.
        most_parameters: The largest number of parameters that the architecture may have; None for any number.
    """

    model: AsrModel
    checkpoint: dict[str, str] | None
    space: SearchSpace
    is_imitating: bool
    most_parameters: int | None

    @property
    def largest(self) -> FfnShapes:
        """The shapes of the supernet: in each module, the largest candidate."""
        return largest_shapes(self.space)


def largest_shapes(space: SearchSpace) -> FfnShapes:
    """Returns the largest (width, rank) of each block's first and second module."""
    return [(first.largest, second.largest) for first, second in space]


def imitates(options: SearchConfig, checkpoint: Path | None) -> bool:
    """Returns whether a search goes by the outputs of a trained model, not by transcripts.

    Args:
        options: The options of the search. Unless they say which, a model that mpq did not train is imitated.
        checkpoint: The trained model that the search begins with; None: it begins from scratch.
    """
    if options.loss is not None or checkpoint is None:
        return options.loss == "distillation"
    return checkpoint_family(model_file(checkpoint)) != HybridConformer.family


def search_start(recipe: Recipe, where: torch.device) -> Start:
    """Returns the model that the search of a recipe begins with, and its candidates.

    Raises:
        MpqError: A checkpoint that cannot be searched; candidates that do not fit the model.
    """
    return _untrained(recipe, where) if recipe.checkpoint is None else _trained(recipe, Path(recipe.checkpoint), where)


def _untrained(recipe: Recipe, where: torch.device) -> Start:
    """Returns the start of a search from scratch: the model of the recipe, as large as its largest candidates."""
    options = recipe.search
    tokenizer = train_tokenizer(recipe.tokens.type, read_transcripts(recipe.data), recipe.tokens.vocabulary_size)
    own = encoder_options(recipe)
    space = search_space(options, own.ffn_shapes(), own.width, is_trained=False)
    largest = own.with_ffn_shapes(largest_shapes(space))
    torch.manual_seed(recipe.seed)
    keys = ("ffn_width", "ffn2_width", "ffn_rank", "ffn2_rank")
    widened = recipe.model.model_copy(update={key: getattr(largest, key) for key in keys})
    model = build_model(recipe.model_copy(update={"model": widened}), tokenizer).to(where)
    return Start(model, None, space, imitates(options, None), _most(recipe, model, space))


def _trained(recipe: Recipe, checkpoint: Path, where: torch.device) -> Start:
    """Returns the start of a search from a trained checkpoint."""
    options, opened = recipe.search, open_float_model(checkpoint, where, "search")
    path, model, sha256 = opened.path, opened.model, opened.sha256
    is_imitating = imitates(options, path)
    if len(model.heads) > 1 and not is_imitating and recipe.train.ctc_weight == 1:
        raise MpqError("[train] ctc_weight: 1 would leave the decoder untrained; give less, as with --set")
    own = conformer(model).options
    try:
        space = search_space(options, own.ffn_shapes(), own.width, is_trained=True)
    except MpqError as error:
        raise MpqError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return Start(model, {"path": str(path), "sha256": sha256}, space, is_imitating, _most(recipe, model, space))


def _most(recipe: Recipe, model: AsrModel, space: SearchSpace) -> int | None:
    """Returns the largest number of parameters that the architecture may have; None for any number."""
    millions = recipe.search.target_millions
    return None if millions is None else budget(model, space, millions)


def largest_model(recipe: Recipe, start: Start) -> AsrModel:
    """Returns the model of the largest candidates: untrained, or cut out of the trained one."""
    if start.checkpoint is None:
        return start.model
    model, data = copy.deepcopy(start.model), recipe.data
    source = recipe.path(recipe.calibration())
    audio = draw(model, source, STATISTICS_SECONDS, recipe.seed, data.channel, skip_bad=data.skip_bad)
    features = one_by_one(model, audio)
    order_units(model, unit_importance(model, input_grams(model, features)))
    own, largest = conformer(model).options.ffn_shapes(), start.largest
    widths = [
        ((first[0], old_first[1]), (second[0], old_second[1]))
        for (old_first, old_second), (first, second) in zip(own, largest, strict=True)
    ]
    model = sliced(model, widths)
    if recipe.search.space != "widths":
        ranks = [(first[1], second[1]) for first, second in largest]
        model = factored(model, ranks, input_grams(model, features))
    return model
