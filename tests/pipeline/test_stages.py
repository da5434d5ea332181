"""What a stage is made of: a class in one file, and its name in the schema."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from mpq import config
from mpq.config import Recipe
from mpq.identity import Inputs
from mpq.pipeline import stages
from mpq.pipeline.run import run
from mpq.pipeline.setting import Setting


class Greet(stages.Stage):
    """A toy: it greets the recipe's seed."""

    name: ClassVar[str] = "greet"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.after, self.outputs = (), (self.out / "greeting.txt",)

    def inputs(self) -> Inputs:
        return Inputs.of(seed=self.recipe.seed)

    def act(self) -> dict[str, Any]:
        self.outputs[0].write_text(f"hello {self.recipe.seed}")
        return {"words": 2}


def test_every_stage_of_the_schema_has_its_class_in_its_order() -> None:
    assert tuple(stage.name for stage in stages.STAGES) == config.STAGES


def test_a_new_stage_is_a_class_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is put into `STAGES`, the name into the schema; it is then run, skipped and set aside as all are."""
    monkeypatch.setattr(stages, "STAGES", (*stages.STAGES, Greet))

    def done(seed: int) -> tuple[str, dict[str, Any]]:
        recipe = Recipe().model_copy(update={"stages": ["greet"], "seed": seed})
        (report,) = run(recipe, tmp_path, device="cpu", quiet=True).stages
        return report.action, report.result

    assert [done(0), done(0), done(1)] == [("run", {"words": 2}), ("skipped", {"words": 2}), ("run", {"words": 2})]
    assert (tmp_path / "greeting.txt").read_text() == "hello 1"
    assert (tmp_path / "replaced-1/greeting.txt").read_text() == "hello 0"
