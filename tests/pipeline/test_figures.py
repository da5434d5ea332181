"""The figures of a search and of an evaluation, against sizes of files and errors counted by hand."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_hybrids import hybrid
from tiny_models import tiny_model

from mpq.models.checkpoint import write_checkpoint
from mpq.pipeline.figures import evaluation_figures, search_figures
from mpq.scoring.evaluate import Evaluation
from mpq.scoring.metrics import measure
from mpq.search.record import Architecture, SearchedModule, SearchResult
from mpq.training.record import TrainingResult

MODULES = tuple(
    SearchedModule(f"block.{index}", width, 0, (4, 8), (0,), (0.5, 0.5), (1.0,)) for index, width in enumerate((4, 8))
)
FOUND = Architecture("f", MODULES, 1.25, 2.5, 1.3, 0.4, 0.2, 0.5, None, (), 7.0)
TRAINED = TrainingResult("f", (), (), 0.35, 0.125, {"total": 1250000}, 3, 0.1, 0, 0, 9.0, "cpu", 1)
RESULT = SearchResult(None, "widths", "gumbel", 0.5, None, "supernet", 60.0, FOUND, TRAINED)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint."""
    write_checkpoint(tmp_path / "model.safetensors", hybrid())
    return tmp_path / "model.safetensors"


def test_a_search_from_scratch_has_no_ratio(file: Path) -> None:
    assert search_figures(RESULT, file, None) == {
        "dev_wer": 0.125,
        "parameters": {"found": 1250000, "largest": 2500000},
        "widths": [[4, 8]],
        "size_bytes": os.path.getsize(file),
    }


def test_ranks_are_told_where_a_module_is_factored(file: Path) -> None:
    factored = replace(FOUND, modules=(MODULES[0], replace(MODULES[1], rank=3)))
    assert search_figures(replace(RESULT, architecture=factored), file, None)["ranks"] == [[0, 3]]


def test_the_baseline_is_a_checkpoint_file_or_an_archives_parameters(file: Path, tiny_archive: Path) -> None:
    size = os.path.getsize(file)
    (file.parent / "larger").mkdir()
    write_checkpoint(file.parent / "larger/model.safetensors", hybrid(decoder_layers=3))
    larger = os.path.getsize(file.parent / "larger/model.safetensors")
    found = search_figures(RESULT, file, file.parent / "larger")
    assert (found["baseline_bytes"], found["ratio"]) == (larger, larger / size)
    model = tiny_model()
    numbers = [*model.parameters(), *(one for name, one in model.named_buffers() if "running_" in name)]
    parameters = sum(one.numel() for one in numbers)
    assert search_figures(RESULT, file, tiny_archive)["baseline_bytes"] == 4 * parameters


def test_an_evaluation_is_its_word_errors() -> None:
    """One word is changed, one left out, and one too many, of five."""
    metrics = measure(["u", "v"], ["a b c", "d e"], ["a x", "d e f"], [1.0, 1.0])
    evaluation = Evaluation(metrics, 1.0, 0, 0, {}, {}, "cpu")
    assert evaluation_figures(evaluation) == {"wer": 3 / 5, "words": 5, "sub": 1, "del": 1, "ins": 1}
