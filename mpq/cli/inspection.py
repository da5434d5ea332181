"""The contents of a checkpoint or packed file, or of a model that a recipe describes: layers, shapes, bits, bytes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.loading import load_model, model_files
from mpq.models.hybrid import HybridConformer
from mpq.pipeline.read import load_recipe
from mpq.runtime import choose_device
from mpq.speech.manifests import read_data
from mpq.speech.text import Tokenizer, WordTokenizer, train_tokenizer
from mpq.training.building import build_model


@dataclass(frozen=True)
class LayerInspection:
    """One quantizable weight.

    Attributes:
        name, kind, shape, numel: The fields of `mpq.models.base.WeightRef`.
        bits: The width of its codes in a packed file (16 or 32: stored as floats); None in a float checkpoint.
        bytes: The bytes that it takes in a packed file, scales and zero points included; 4 a weight where it is float.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    bits: float | None
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """`mpq.inspection/1`.

    Attributes:
        family: The framework that wrote the checkpoint; "mpq" for a packed file.
        architecture: The kind of model, such as "conformer-ctc".
        parameters: {"total", "encoder_blocks"}, BatchNorm running mean and variance included.
        file_bytes: The size of the file; None for a recipe, whose model is not there yet.
        layers: The quantizable weights in the model's order.
    """

    family: str
    architecture: str
    parameters: dict[str, int]
    file_bytes: int | None
    layers: tuple[LayerInspection, ...]

    def to_json(self) -> dict[str, Any]:
        return {"format": "mpq.inspection/1"} | asdict(self)


def inspect(path: Path, device: str = "auto", overrides: Sequence[str] = ()) -> Inspection:
    """Returns the contents of a checkpoint or packed file, or of the model that a recipe (`.toml`) describes.

    Args:
        path: The file, or a checkpoint folder.
        device: The device to compute on, such as "auto" (`mpq.runtime.choose_device`).
        overrides: "section.key=value" for each value that replaces a recipe's.

    Raises:
        MpqError: A file that cannot be read, a faulty recipe, or overrides without a recipe.
    """
    is_recipe = path.suffix == ".toml"
    if overrides and not is_recipe:
        raise MpqError(f"{path}: --set replaces values of a recipe (.toml); leave it out")
    model = _described_model(path, overrides) if is_recipe else load_model(path, choose_device(device))
    return Inspection(
        family="mpq" if model.quantized_bits else model.family,
        architecture=model.architecture,
        parameters=model.parameter_counts(),
        file_bytes=None if is_recipe else sum(file.stat().st_size for file in model_files(path)),
        layers=tuple(
            LayerInspection(
                **asdict(ref),
                bits=model.quantized_bits.get(ref.name),
                bytes=model.quantized_bytes.get(ref.name, 4 * ref.numel),
            )
            for ref in model.weights()
        ),
    )


def _described_model(path: Path, overrides: Sequence[str] = ()) -> HybridConformer:
    """Returns the model of a recipe file with weights drawn at random.

    The size of a BPE vocabulary is in the recipe; characters and words are counted in the training transcripts.

    Raises:
        MpqError: A faulty recipe, or a vocabulary that cannot be counted because the data are not there.
    """
    recipe = load_recipe(path, overrides, stages=[], need_files=False)
    if recipe.checkpoint:
        raise MpqError(f"{path}: describes no model but names one; inspect {recipe.checkpoint}")
    if size := recipe.tokens.vocabulary_size:
        tokenizer: Tokenizer = WordTokenizer([str(index) for index in range(size)])
    elif not recipe.data.train:
        raise MpqError(
            f"{path}: [data] train: expected a manifest, got none; the vocabulary ([tokens] type = "
            f"{recipe.tokens.type!r}) is that of the training transcripts"
        )
    else:
        try:
            names, skip_bad = recipe.data.train, recipe.data.skip_bad
            texts = [item.text or "" for name in names for item in read_data(recipe.path(name), skip_bad)]
        except MpqError as error:
            raise MpqError(
                f"{path}: the vocabulary ([tokens] type = {recipe.tokens.type!r}) is that of the training transcripts, "
                f"which are not there: {error}"
            ) from None
        tokenizer = train_tokenizer(recipe.tokens.type, texts)
    try:
        return build_model(recipe, tokenizer)
    except MpqError as error:
        raise MpqError(f"{path}: {error}") from None
