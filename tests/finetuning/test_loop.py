"""Which epochs are kept, averages, the running average, divergence, and the schedule of the General Quantizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_finetune import (
    Spy,
    assert_holds,
    assert_same_training,
    four,
    speech,
    tune,
    with_data,
    write_allocation,
)
from torch import Tensor

from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.finetuning import loop as finetune_loop
from mpq.finetuning.loop import Finetuner
from mpq.finetuning.record import FinetuneResult
from mpq.loading import load_model
from mpq.quantization.mu_law import MUS, mu_law_centroids
from mpq.quantization.soft_assignment import SoftToHard
from mpq.quantization.spec import QuantSpec

__all__ = ["four", "speech"]  # fixtures


def held_out(patch: pytest.MonkeyPatch, *results: tuple[float, float]) -> None:
    """Lets dev have these divergences and WERs, one after the other, then the last again and again."""
    left = list(results)
    patch.setattr(finetune_loop, "changed_errors", lambda *_: left.pop(0) if len(left) > 1 else left[0])


def by_hand(state: dict[str, Tensor], bits: int = 4) -> dict[int, Tensor]:
    """Returns {index of the weight: (C, K) weight} of learned asymmetric grids with one group a row, in doubles."""
    found = {}
    for index in range(sum(key.startswith("weights.latents.") for key in state)):
        grid = {
            key: state[f"weights.quantizers.{index}:{bits}.{key}"].double()
            for key in ("unit", "scale", "zero_point", "log_scale")
        }
        assert grid["scale"].shape[1] == 1
        scale = (grid["scale"] * grid["log_scale"].exp()).half().double()
        steps = state[f"weights.latents.{index}"].double() * grid["unit"] / scale
        codes = (steps.round() + grid["zero_point"]).clamp(0, 2**bits - 1)
        found[index] = (codes - grid["zero_point"]) * scale
    return found


def assert_packed(out: Path, state: dict[str, Tensor]) -> None:
    """The artifact has the weights of a state, but for a few that lie between two codes, and its other tensors."""
    model = load_model(out)
    packed = model.state_dict()
    names = [ref.name for ref in model.weights()]
    for index, weight in by_hand(state).items():
        found = packed[names[index]].double().reshape(weight.shape)
        assert float(((found - weight).abs() < 1e-3 * weight.abs().max()).double().mean()) > 0.995, names[index]
    for key, tensor in state.items():
        if key.startswith("rest."):
            torch.testing.assert_close(packed[key.removeprefix("rest.")], tensor.float(), rtol=1e-3, atol=1e-5)


# ---- which epochs


@pytest.mark.parametrize(
    ("select", "average", "results", "expected"),
    [
        ("wer", 2, [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (9, 0.3), (9, 0.3)], (1, 2)),
        ("wer", 2, [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (9, 0.31), (9, 0.3)], (1,)),
        ("wer", 1, [(1, 0.5), (3, 0.3), (2, 0.3), (4, 0.3), (9, 0.3)], (2,)),
        ("wer", 1, [(1, 0.1), (0.5, 0.2), (0.5, 0.3), (0.5, 0.4), (9, 0.1)], (0,)),
        ("wer", 1, [(1, 0.2), (1, 0.2), (1, 0.2), (1, 0.2), (9, 0.1)], (0,)),
        ("loss", 2, [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (1, 0.9), (1, 0.3)], (0, 1)),
        ("loss", 3, [(4, 0.5), (3, 0.3), (2, 0.4), (1, 0.6), (1.1, 0.1), (1, 0.9)], (3,)),
        ("last", 1, [(1, 0.1), (2, 0.3), (3, 0.4), (4, 0.6), (9, 0.6)], (3,)),
        ("last", 3, [(1, 0.1), (2, 0.3), (3, 0.4), (4, 0.6), (9, 0.5), (9, 0.6)], (1, 2, 3)),
    ],
)
def test_which_epochs_are_kept(
    select: str, average: int, results: list[tuple[float, float]], expected: tuple[int, ...],
    speech: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The start and three epochs, then the average and the best alone, which takes its place where it is better."""
    held_out(monkeypatch, *results)
    spy = Spy().watch(monkeypatch)
    recipe = with_data(speech, epochs=3, select=select, average=average, batch_frames=10000)
    result = tune(speech / "hybrid", four, recipe, tmp_path)
    assert result.averaged == expected
    assert [(one.dev_loss, one.dev_wer) for one in result.epochs] == results[:4]
    assert result.sizes[0].dev == tuple(results[:4])
    assert (result.sizes[0].start_divergence, result.sizes[0].start_wer) == results[0]
    states = [spy.states[epoch] for epoch in expected]
    mean = {
        key: torch.stack([state[key].double() for state in states]).mean(dim=0) if one.is_floating_point() else one
        for key, one in states[0].items()
    }
    assert_packed(tmp_path, mean)
    if len(expected) == 1:
        assert_holds(tmp_path, spy.seen[expected[0]][0])


def test_patience(speech: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_data(speech, epochs=9, select="wer", batch_frames=10000, patience=2)
    held_out(monkeypatch, (1, 0.5), (1, 0.4), (1, 0.45), (1, 0.41), (1, 0.1))
    assert len(tune(speech / "hybrid", four, recipe, tmp_path / "a").epochs) == 1 + 3
    held_out(monkeypatch, (1, 0.3), (1, 0.4), (0.9, 0.3), (1, 0.45), (1, 0.41), (1, 0.1))
    assert len(tune(speech / "hybrid", four, recipe, tmp_path / "b").epochs) == 1 + 4
    held_out(monkeypatch, (1, 0.3), (1, 0.4))
    result = tune(speech / "hybrid", four, recipe, tmp_path / "c")
    assert len(result.epochs) == 1 + 2 and result.averaged == (0,)


# ---- the running average


def test_running_average_by_hand(speech: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what is evaluated, kept and packed; its decay rises from 1/10, so that the start does not linger."""
    spy, seen = Spy().watch(monkeypatch), []
    evaluated = finetune_loop.changed_errors

    def watched(teacher: Any, student: Any, *others: Any) -> Any:
        seen.append({key: one.clone() for key, one in student.state_dict().items()})
        return evaluated(teacher, student, *others)

    monkeypatch.setattr(finetune_loop, "changed_errors", watched)
    monkeypatch.setattr(finetune_loop, "clean_up", lambda _: None)
    tune(speech / "hybrid", four, with_data(speech, ema=0.35, epochs=2, batch_frames=140), tmp_path)
    mean, *updates = [[one.double() for one in tensors] for tensors in spy.updates]
    assert len(updates) >= 6
    for step, tensors in enumerate(updates, start=1):
        decay = min(0.35, step / (step + 9))
        mean = [decay * old + (1 - decay) * new for old, new in zip(mean, tensors, strict=True)]
    tuner, kept = spy.tuner, load_file(tmp_path / "epochs/0002.safetensors")
    names = [f"weights.{name}" for name, _ in tuner.weights.named_parameters()]
    names += [f"rest.{name}" for name in tuner.rest]
    for name, expected, last in zip(names, mean, updates[-1], strict=True):
        torch.testing.assert_close(kept[name].double(), expected, rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(expected, last) or not last.any()
    assert_packed(tmp_path, kept)
    packed = load_model(tmp_path).state_dict()
    for name in (ref.name for ref in load_model(tmp_path).weights()):
        assert torch.equal(seen[2][name], packed[name]) and torch.equal(seen[-1][name], packed[name])


def test_averages_of_the_running_average_are_judged_by_themselves(
    speech: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the running average at the end: both candidates are seen on dev, and the one that is kept is packed."""
    seen, evaluated = [], finetune_loop.changed_errors

    def watched(teacher: Any, student: Any, *others: Any) -> Any:
        seen.append({name: one.clone() for name, one in student.named_parameters()})
        return evaluated(teacher, student, *others)

    monkeypatch.setattr(finetune_loop, "changed_errors", watched)
    result = tune(speech / "hybrid", four, with_data(speech, ema=0.35, average=2), tmp_path)
    packed = load_model(tmp_path).state_dict()
    assert len(seen) == 6 and any(not torch.equal(seen[3][name], seen[4][name]) for name in seen[3])
    names = [ref.name for ref in load_model(tmp_path).weights()]
    for name in names:
        assert torch.equal(seen[4][name], seen[2][name])  # the best alone is the last epoch
        assert torch.equal(packed[name], seen[3 if result.averaged == (1, 2) else 4][name])


# ---- divergence


PLACES = ("encoder.pre_encode.conv.0.weight", "encoder.layers.0.feed_forward1.linear1.weight", "ctc.weight",
          "decoder.layers.0.linear1.weight")  # fmt: skip


def spoilt(patch: pytest.MonkeyPatch, name: str, kind: str, step: int) -> None:
    """Makes a layer's latent weights, or only their gradient, not finite before the update after so many."""
    prepare = Finetuner.prepare_update

    def spoiling(tuner: Finetuner) -> None:
        prepare(tuner)
        if tuner.step == step:
            latent = tuner.weights.latents[tuner.weights.names.index(name)]
            if kind == "gradient":
                latent.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
            else:
                latent.data[0, 0] = float(kind)

    patch.setattr(Finetuner, "prepare_update", spoiling)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize(("kind", "step"), [("nan", 1), ("gradient", 3)])
def test_divergence_names_update_and_layer_and_keeps_the_best(
    name: str, kind: str, step: int, speech: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once the fault is gone, the training goes on from the state before it."""
    recipe, spy = with_data(speech, save_minutes=1e-9), Spy()
    with monkeypatch.context() as patch:
        spy.watch(patch)
        spoilt(patch, name, kind, step)
        with pytest.raises(MpqError) as error:
            tune(speech / "hybrid", four, recipe, tmp_path / "out")
    text, epoch = str(error.value), len(spy.seen)
    assert "\n" not in text and f"epoch {epoch}, update {step + 1}" in text and "not finite" in text
    layer = name.rpartition(".")[0] if kind == "gradient" else name.rsplit(".", 2)[0].removesuffix(".conv")
    assert f" {layer}" in text and ("of " if kind == "gradient" else "from the layer ") in text, text
    assert f"the best weights until then (epoch {epoch - 1}, dev WER " in text and "keeps the last saved state" in text
    assert_holds(tmp_path / "out", spy.seen[epoch - 1][0])
    assert not (tmp_path / "out/finetune.json").exists()
    if name == PLACES[0]:
        tune(speech / "hybrid", four, recipe, tmp_path / "out")
        tune(speech / "hybrid", four, recipe, tmp_path / "whole")
        assert_same_training(tmp_path / "out", tmp_path / "whole")


def test_divergence_keeps_the_best_epoch_rather_than_the_last(
    speech: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out(monkeypatch, (1, 0.5), (1, 0.3), (1, 0.4))
    spy = Spy().watch(monkeypatch)
    spoilt(monkeypatch, PLACES[1], "nan", 2)
    recipe = with_data(speech, epochs=3, select="wer", average=2, batch_frames=10000)
    with pytest.raises(
        MpqError, match=r"epoch 3, update 3, .*last saved state.*until then \(epoch 1, dev WER 30\.00%\)"
    ):
        tune(speech / "hybrid", four, recipe, tmp_path)
    assert_holds(tmp_path, spy.seen[1][0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale_rate": 1e4}, r"epoch 1, update 2: [\w.]+\.weight: scale inf does not fit into float16"),
        ({"scale_rate": 1e4, "batch_frames": 9999}, r"after update 1: [\w.]+\.weight: scale inf does not fit"),
        ({"rest_rate": 1e12}, r"epoch 1, update 2, .* not finite \(from the layer encoder\.[\w.]+ on\)"),
        ({"rest_rate": 1e12, "batch_frames": 9999}, r"after update 1: the divergence on .* \(from the layer encoder\."),
    ],
)
def test_rates_that_are_too_high(
    options: dict[str, Any], words: str, speech: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy().watch(monkeypatch)
    with pytest.raises(MpqError, match=words) as error:
        tune(speech / "hybrid", four, with_data(speech, **options), tmp_path)
    assert "the best weights until then (epoch 0, dev WER" in str(error.value) and "lower " in str(error.value)
    assert "state" not in str(error.value)  # none was saved
    assert_holds(tmp_path, spy.seen[0][0])
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize("scheme", ["asymmetric", "mulaw"])
def test_latents_that_are_not_finite_are_named_where_grids_are_made_from_them(
    scheme: str, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_format = WeightFormat(QuantSpec(8, scheme, "channel", rounding="nearest"))
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", 3, weight_format)
    spoilt(monkeypatch, PLACES[1], "nan", 2)
    with pytest.raises(MpqError, match=rf"update 3: {PLACES[1]}: .*; lower learning_rate"):
        changes = {} if scheme == "mulaw" else {"scales": "recomputed"}
        tune(speech / "hybrid", path, with_data(speech, **changes), tmp_path / "out")
    assert load_model(tmp_path / "out").quantized_bits


@pytest.mark.parametrize(
    ("scheme", "key", "value"),
    [("mulaw", "scales", "frozen"), ("asymmetric", "alpha", [5.0, 50.0]), ("symmetric", "anneal", [0.1, 0.9])],
)
def test_options_that_do_nothing_for_the_scheme_are_refused(
    scheme: str, key: str, value: object, speech: Path, tmp_path: Path
) -> None:
    weight_format = WeightFormat(QuantSpec(8, scheme, rounding="nearest"))
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", 3, weight_format)
    with pytest.raises(MpqError, match=rf"finetune\.{key}: does nothing for the scheme {scheme} of the allocation"):
        tune(speech / "hybrid", path, with_data(speech, **{key: value}), tmp_path / "out")


# ---- the General Quantizer


@pytest.mark.parametrize(("anneal", "soft"), [((0.0, 0.5), 0.5), ((0.25, 0.75), 0.75), ((0.5, 1.0), 1.0)])
def test_alpha_rises_and_the_weights_end_on_their_centroids(
    anneal: tuple[float, float], soft: float, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_format = WeightFormat(QuantSpec(8, "mulaw", "channel", rounding="nearest"))
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", lambda name: 2 + len(name) % 3, weight_format)
    prepare, choose = Finetuner.prepare_update, SoftToHard.choose_mu
    schedule: list[tuple[float, bool, int]] = []
    chosen: list[float] = []

    def watched(tuner: Finetuner) -> None:
        chosen.clear() if tuner.step else None
        prepare(tuner)
        kernels = [one.kernel for one in tuner.weights.quantizers.values()]
        alphas = {(kernel.alpha, kernel.is_hard) for kernel in kernels}
        assert (len(alphas) == 1 and len(chosen) in (0, len(kernels), 2 * len(kernels))) or not tuner.step
        schedule.append((*alphas.pop(), len(chosen)))

    def counted(kernel: SoftToHard, weight: Tensor) -> float:
        chosen.append(kernel.alpha)
        return choose(kernel, weight)

    spy = Spy().watch(monkeypatch)
    monkeypatch.setattr(Finetuner, "prepare_update", watched)
    monkeypatch.setattr(SoftToHard, "choose_mu", counted)
    recipe = with_data(speech, alpha=[20.0, 120.0], anneal=list(anneal), epochs=3, search_every=2, batch_frames=140)
    tune(speech / "hybrid", path, recipe, tmp_path / "out")
    total = len(schedule)
    first, last = round(anneal[0] * total), round(anneal[1] * total)
    for step, (alpha, is_hard, searches) in enumerate(schedule):
        expected = 20 + 100 * min(1.0, max(0.0, (step - first) / (last - first)))
        assert alpha == pytest.approx(expected) and is_hard == (step >= last), step
        if step:
            assert (searches > 0) == ((step % 2 == 0 and step < last) or step == last), step
    assert any(is_hard for _, is_hard, _ in schedule) == (soft < 1)
    model = load_model(tmp_path / "out")
    stored = spy.tuner.weights.quantized()
    for name, bits in model.quantized_bits.items():
        rows, scale = model.state_dict()[name].flatten(1).double(), stored[name].scale.double()
        levels = [mu_law_centroids(bits, mu).double() / 128 for mu in MUS]
        away = [((rows / scale)[..., None] - values).abs().amin(dim=-1).max() for values in levels]
        assert float(min(away)) < 1e-5, name


def test_the_first_mu_is_that_of_the_first_alpha(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_format = WeightFormat(QuantSpec(8, "mulaw", "channel", "none", rounding="nearest"))
    path = write_allocation(tmp_path / "a.json", speech / "hybrid", 4, weight_format)
    found: list[tuple[float, list[int]]] = []
    prepare = Finetuner.prepare_update

    def preparing(tuner: Finetuner) -> None:
        prepare(tuner)
        for key, quantizer in tuner.weights.quantizers.items():
            found.append((quantizer.kernel.alpha, quantizer.kernel.centroids.tolist()))
            kernel = SoftToHard(QuantSpec(4, "mulaw", "channel", "none"), alpha=90.0)
            weight = load_model(speech / "hybrid").state_dict()[tuner.weights.names[int(key.split(":")[0])]]
            kernel.choose_mu(weight)
            assert found[-1] == (90.0, kernel.centroids.tolist())

    monkeypatch.setattr(Finetuner, "prepare_update", preparing)
    recipe = with_data(speech, alpha=[90.0, 100.0], epochs=1, batch_frames=10000)
    result: FinetuneResult = tune(speech / "hybrid", path, recipe, tmp_path / "out")
    assert found and result.epochs[-1].step == 1
