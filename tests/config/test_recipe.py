"""The schema of a recipe: its defaults are values that it takes, and its stages are those that `mpq run` knows."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from mpq.config import STAGES, Recipe, sections
from mpq.pipeline import stages


@pytest.mark.parametrize("section", [Recipe, *sections().values()], ids=lambda section: section.__name__)
def test_the_defaults_are_taken_and_given_back(section: type[BaseModel]) -> None:
    """Pydantic does not check defaults itself."""
    written = section().model_dump_json()
    assert section.model_validate_json(written) == section()


def test_the_stages_are_those_of_the_pipeline_in_their_order() -> None:
    assert [stage.name for stage in stages.STAGES] == list(STAGES)
    assert set(STAGES) - set(Recipe().stages) == {"search", "finetune"}  # these two are asked for


def test_every_section_is_a_key_and_the_keys_of_the_top_are_none() -> None:
    tables = {key for key, value in Recipe().model_dump().items() if isinstance(value, dict)}
    assert set(sections()) == tables
    assert set(Recipe.model_fields) - tables == {"stages", "seed", "checkpoint"}


@pytest.mark.parametrize(
    ("root", "name", "expected"), [("", "a.jsonl", "a.jsonl"), ("/d", "a", "/d/a"), ("/d", "/e/a", "/e/a")]
)
def test_paths_of_data_start_at_the_root(root: str, name: str, expected: str) -> None:
    assert Recipe.model_validate({"data": {"root": root}}).path(name) == Path(expected)


@pytest.mark.parametrize(
    ("section", "table"),
    [
        ("data", {"channel": "left"}),
        ("features", {"sample_rate": 3999}),
        ("model", {"subsampling_padding": 2}),
        ("sensitivity", {"bits": [0]}),
        ("sensitivity", {"granularity": "group:0"}),
        ("sensitivity", {"clip": "percentile"}),
        ("allocate", {"keep": {"a": 0}}),
        ("compare", {"alpha": 1.0}),
    ],
)
def test_values_beyond_their_borders_are_refused(section: str, table: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({section: table})
    assert caught.value.errors()[0]["loc"][:2] == (section, *table)
