"""The second phase of a search: what is chosen, and what becomes of weights, temperature and noise."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_search import (
    recipe,
    run,
    search_recipe,
    speech,
    supernet,
    whole,
)
from tiny_training import log_of
from torch import Tensor

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.models.reshaping import sliced
from mpq.runtime import processes
from mpq.search.loop import ArchitectureSearch
from mpq.search.record import Architecture
from mpq.search.supernet import Supernet
from mpq.training import objectives
from mpq.training.data import read_set

__all__ = ["recipe", "speech", "supernet", "whole"]  # fixtures


def test_the_logs_of_the_phases(whole: Path) -> None:
    first, second, last = (log_of(whole / name) for name in ("supernet", "architecture", "."))
    assert [line["epoch"] for line in first if "dev_wer" in line] == [1, 2]
    assert [line["epoch"] for line in last if "dev_wer" in line] == [1, 2]
    rates = [line["rate"] for line in second if "rate" in line]
    assert set(rates) == {0.2} and len(rates) == 3
    for line in second:
        if "rate" in line:
            total = 0.2 * line["ctc"] + 0.8 * line["attention"] + 50 * line["millions"]
            assert line["loss"] == pytest.approx(total, rel=1e-6)
            assert 2 * (33 * 4 + 16) < 1e6 * line["millions"] < 2 * (33 * 32 + 16)
    peak = max(line["rate"] for line in last if "rate" in line)
    assert peak == pytest.approx(0.0015) and max(line["rate"] for line in first if "rate" in line) == 0.003


def test_losses_of_the_choice_are_those_of_its_models(whole: Path, recipe: Recipe) -> None:
    """Of the supernet as a whole, and of what is cut out of it, on the held-out data."""
    found, largest = Architecture.load(whole / "architecture/architecture.json"), load_model(whole / "supernet")
    data = read_set(["dev.jsonl"], recipe.data, largest, 1.0, is_training=False)
    with processes(torch.device("cpu")) as workers:
        for model, loss, wer in (
            (largest, found.largest_loss, found.largest_wer),
            (sliced(largest, found.shapes()), found.loss, found.wer),
        ):
            expected = objectives.Transcripts(model, recipe.train, "error", workers).held_out(data)
            assert (loss, wer) == pytest.approx(expected, rel=1e-5)
    assert found.loss != found.largest_loss


def test_a_loss_of_the_choice_that_is_not_finite_is_told(
    speech: Path, supernet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "held_out_errors", lambda *_: (math.nan, 0.5))
    with pytest.raises(MpqError, match="the loss of the supernet on the held-out data is nan; lower"):
        run(search_recipe(speech, search__supernet=supernet, search__epochs=1, search__eta=0.0), tmp_path)


def test_the_penalty_decides(speech: Path, supernet: str, tmp_path: Path) -> None:
    common = {"search__supernet": supernet, "search__epochs": 25, "search__final_epochs": 0}
    heavy = run(search_recipe(speech, **common, search__eta=1000.0), tmp_path / "heavy")
    assert heavy.architecture.shapes() == [((4, 0), (4, 0))]
    assert heavy.architecture.expected_millions == pytest.approx(heavy.architecture.millions, rel=0.05)
    free = run(search_recipe(speech, **common, search__eta=0.0), tmp_path / "free")
    assert free.architecture.millions > heavy.architecture.millions
    plain = run(search_recipe(speech, **common, search__eta=1000.0, search__method="softmax"), tmp_path / "plain")
    assert plain.architecture.shapes() == [((4, 0), (4, 0))]
    assert plain.architecture.epochs[0].train_loss != heavy.architecture.epochs[0].train_loss
    assert heavy.training.averaged == () and heavy.training.epochs == ()
    largest = load_model(Path(supernet))
    cut = sliced(largest, heavy.architecture.shapes()).state_dict()
    assert all(torch.equal(one, cut[name]) for name, one in load_model(tmp_path / "heavy").state_dict().items())
    assert heavy.training.dev_loss == pytest.approx(heavy.architecture.loss, rel=1e-5)


def test_a_target_is_never_exceeded(speech: Path, supernet: str, tmp_path: Path) -> None:
    base = load_model(Path(supernet))
    sizes = sorted(
        {
            sliced(base, [((a, 0), (b, 0))]).parameter_counts()["total"]
            for a, b in itertools.product((4, 12, 32), repeat=2)
        }
    )
    common = {"search__supernet": supernet, "search__epochs": 1, "search__final_epochs": 0, "search__eta": None}
    found = {}
    for target in (sizes[0], sizes[1], sizes[2] - 1, sizes[3] + 100, 10**7):
        changed = search_recipe(speech, **common, search__target_millions=target / 1e6)
        result = run(changed, tmp_path / str(target))
        found[target] = load_model(tmp_path / str(target)).parameter_counts()["total"]
        assert found[target] <= target and result.architecture.millions * 1e6 == pytest.approx(found[target])
        assert result.target_millions == target / 1e6 and result.eta is None
    assert found[sizes[0]] == sizes[0]
    impossible = search_recipe(speech, **common, search__target_millions=(sizes[0] - 1) / 1e6)
    message = f"target_millions: expected {sizes[0] / 1e6:.6f} or more, what the smallest candidates make up, got"
    with pytest.raises(MpqError, match=message):
        run(impossible, tmp_path / "impossible")
    assert not (tmp_path / "impossible").exists()


def test_the_target_pulls_the_expected_size(speech: Path, supernet: str, tmp_path: Path) -> None:
    """Far below the start, so that the penalty outweighs the loss."""
    base = load_model(Path(supernet)).parameter_counts()["total"]
    target = round((base - 2 * 33 * 26) / 1e6, 6)
    options = {"search__supernet": supernet, "search__epochs": 40, "search__final_epochs": 0, "search__eta": None}
    result = run(search_recipe(speech, **options, search__target_millions=target), tmp_path)
    expected = [line["millions"] for line in log_of(tmp_path / "architecture") if "rate" in line]
    assert expected[-1] < expected[0]
    assert result.architecture.expected_millions < target * 1.01
    lines = [line for line in log_of(tmp_path / "architecture") if "rate" in line]
    rest = (base - 2 * (33 * 32 + 16)) / 1e6
    for line in lines:
        penalty = 10 * max(0.0, (rest + line["millions"]) / target - 1)
        assert line["loss"] == pytest.approx(0.2 * line["ctc"] + 0.8 * line["attention"] + penalty, rel=1e-6)


def test_no_choice_at_all(speech: Path, tmp_path: Path) -> None:
    fixed = search_recipe(speech, search__ffn_width=[12])
    result = run(fixed, tmp_path)
    assert result.architecture.shapes() == [((12, 0), (12, 0))] and result.architecture.epochs == ()
    assert not (tmp_path / "architecture/state.pt").exists()
    assert run(fixed, tmp_path).architecture == result.architecture


def spied(owner: Any, name: str, patch: pytest.MonkeyPatch, look: Any) -> None:
    """Has look(self) called before and after a method."""
    method = getattr(owner, name)

    def looking(self: Any, *arguments: Any) -> Any:
        look(self)
        result = method(self, *arguments)
        look(self)
        return result

    patch.setattr(owner, name, looking)


def test_the_choice_leaves_the_weights_alone(
    speech: Path, supernet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[dict[str, Tensor], list[Tensor]]] = []

    def look(loop: ArchitectureSearch) -> None:
        state = {name: one.clone() for name, one in loop.model.state_dict().items()}
        seen.append((state, [one.detach().clone() for one in loop.logits]))
        assert not any(one.requires_grad for one in loop.model.parameters())  # nor is a gradient computed

    spied(ArchitectureSearch, "choose", monkeypatch, look)
    run(search_recipe(speech, search__supernet=supernet), tmp_path)
    (before, start), (after, end) = seen
    assert any(name.endswith("running_mean") for name in before)
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    assert all(float(one.abs().max()) == 0 for one in start) and all(float(one.abs().max()) > 0.1 for one in end)


def test_temperature_falls_and_noise_is_new_in_each_update(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float | None]] = []
    be_sum = Supernet.be_sum

    def looking(self: Supernet, temperature: float, random: Any) -> None:
        drawn = None if random is None else float(copy.deepcopy(random).random())
        seen.append((temperature, drawn))
        be_sum(self, temperature, random)

    monkeypatch.setattr(Supernet, "be_sum", looking)
    common = {"search__supernet_epochs": 1, "search__final_epochs": 0, "search__epochs": 3, "train__batch_frames": 150}
    run(search_recipe(speech, **common, search__temperature=[2.0, 0.5]), tmp_path / "a")
    temperatures = [one for one, _ in seen]
    assert temperatures == pytest.approx([2.0 * 0.25 ** (step / (len(seen) - 1)) for step in range(len(seen))])
    assert len(seen) > 3 and len({drawn for _, drawn in seen}) == len(seen)  # some updates in an epoch
    seen.clear()
    run(search_recipe(speech, **common, search__method="softmax"), tmp_path / "b")
    assert set(seen) == {(1.0, None)}


def test_a_noise_seed_gives_another_choice_from_the_same_supernet(speech: Path, supernet: str, tmp_path: Path) -> None:
    common = {"search__supernet": supernet, "search__final_epochs": 0, "search__epochs": 2}
    drawn = {}
    for name, more in {"default": {}, "own": {"search__noise_seed": 0}, "other": {"search__noise_seed": 1}}.items():
        found = run(search_recipe(speech, **common, **more), tmp_path / name)
        drawn[name] = [one.width_probabilities for one in found.architecture.modules]
    assert drawn["default"] == drawn["own"] != drawn["other"]
