"""The losses of a padded batch against plain loops over utterances in double precision."""

import copy
from itertools import groupby
from typing import NamedTuple

import pytest
import torch
from tiny_finetune import disturbed
from tiny_models import tiny_model
from tiny_training import recipe, write_speech
from torch import Tensor
from torch.nn import functional as F

from mpq.artifact.weights import WeightFormat
from mpq.finetuning.fake_quant import QuantizedWeights
from mpq.models.base import AsrModel
from mpq.models.heads import Targets
from mpq.quantization.spec import QuantSpec
from mpq.speech.text import CharTokenizer
from mpq.training.building import build_model
from mpq.training.distillation import Distillation, DistillationLosses

FRAMES = (61, 96, 33, 80)
TOKENS = ([0, 1, 2], [3], [], [4, 4, 5])
KNOWN = (True, False, True, True)
"""The second utterance has a transcript that is not to be used; the third has an empty one."""


class Case(NamedTuple):
    student: AsrModel
    teacher: AsrModel
    weights: QuantizedWeights
    features: Tensor
    masked: Tensor

    def loss(self, bound: float = 1.0, smoothing: float = 0.1, hidden: bool = True, told: bool = True) -> Distillation:
        return Distillation(self.student, self.weights, self.teacher, bound, smoothing, hidden, told)

    def found(self, **options: float | bool) -> DistillationLosses:
        heard = (self.masked, self.features, torch.tensor(FRAMES), targets(), torch.tensor(KNOWN))
        with torch.no_grad():
            return self.loss(**options)(*heard, 0)


def targets() -> Targets:
    return Targets.of([list(one) for one in TOKENS])


@pytest.fixture(params=["hybrid", "nemo"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model, its 3-bit version, and random features; SpecAugment's mask is a band and some frames of zeros."""
    if request.param == "hybrid":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("recipe")
            write_speech(folder)
            write_speech(folder, name="dev.jsonl")
            teacher: AsrModel = build_model(recipe(folder, model__layers=2), CharTokenizer([" ", *"abcde"]))
        disturbed(teacher)
    else:
        teacher = tiny_model()
    student = copy.deepcopy(teacher)
    state = teacher.state_dict()
    trained = {ref.name: state[ref.name].clone() for ref in teacher.weights()}
    weight_format = WeightFormat(QuantSpec(3, granularity="group:8", rounding="nearest"))
    weights = QuantizedWeights(trained, [{name: 3 for name in trained}], weight_format, {}, "learned")
    random = torch.Generator().manual_seed(5)
    features = torch.randn((4, max(FRAMES), teacher.mel.n_mels), generator=random)
    for row, count in zip(features, FRAMES, strict=True):
        row[count:] = 0  # as the features of the models are
    masked = features.clone()
    masked[:, 10:14] = 0
    masked[:, :, 3:7] = 0
    return Case(student, teacher, weights, features, masked)


def states(model: AsrModel, features: Tensor) -> tuple[list[Tensor], Tensor]:
    """Returns the (T', D) states after each stage of one utterance and its (T', C) log-probabilities of the CTC."""
    hidden, found = features[None], []
    context = model.context(torch.tensor([len(features)]), len(features))
    for stage in model.segments:
        hidden = stage.run(hidden, context)
        found.append(hidden[0].double())
    return found, model.head("ctc").logits(hidden, None)[0].double().log_softmax(dim=-1)


def attention(model: AsrModel, tokens: list[int], encoded: Tensor) -> Tensor:
    """Returns (U + 1, C) log-probabilities of the tokens and <eos>."""
    prefix = torch.tensor([[model.blank_id, *tokens]])
    logits = model.attention_logits(prefix, encoded[None].float(), torch.tensor([len(encoded)]))
    return logits[0].double().log_softmax(dim=-1)


def saturating(wanted: Tensor, given: Tensor, bound: float) -> float:
    total = 0.0
    for one, other in zip(wanted, given, strict=True):
        kl = float(F.kl_div(other, one, reduction="sum", log_target=True))
        total += kl / (1 + kl / bound) if bound else kl
    return total


@torch.no_grad()
def by_hand(case: Case, bound: float, smoothing: float) -> Tensor:
    """Returns the (7, N) losses of each utterance, alone and unpadded."""
    teacher, student = case.teacher, copy.deepcopy(case.student)
    student.load_state_dict(case.weights.rounded(0), strict=False)
    rows = []
    for index, count in enumerate(FRAMES):
        clean, heard = (one[index, :count] for one in (case.features, case.masked))
        wanted_states, wanted = states(teacher, clean)
        given_states, given = states(student, heard)
        errors = [
            float((one - other).square().sum() / (other - other.mean()).square().sum())
            for one, other in zip(given_states, wanted_states, strict=True)
        ]
        hidden = sum(errors) / len(errors) * len(wanted)
        greedy = [token for token, _ in groupby(wanted.argmax(dim=-1).tolist()) if token != teacher.blank_id]
        tokens = TOKENS[index] if KNOWN[index] else greedy
        ctc = attention_kl = smoothed = count_tokens = 0.0
        if KNOWN[index]:
            ctc = float(
                F.ctc_loss(
                    given[:, None], torch.tensor([TOKENS[index]], dtype=torch.long), torch.tensor([len(given)]),
                    torch.tensor([len(TOKENS[index])]), blank=teacher.blank_id, reduction="sum",
                )
            )  # fmt: skip
        if "attention" in teacher.heads:
            expected = attention(teacher, tokens, wanted_states[-1])
            log_probs = attention(student, tokens, given_states[-1])
            attention_kl, count_tokens = saturating(expected, log_probs, bound), len(tokens) + 1.0
            if KNOWN[index]:
                picked = log_probs[range(len(tokens) + 1), [*tokens, teacher.blank_id]]
                smoothed = float(-((1 - smoothing) * picked + smoothing * log_probs.mean(dim=-1)).sum())
        divergence = saturating(wanted, given, bound)
        rows.append((divergence, attention_kl, hidden, float(len(wanted)), count_tokens, ctc, smoothed))
    return torch.tensor(rows).T


@pytest.mark.parametrize("bound", [0.0, 0.2, 1.0])
def test_losses_are_those_of_utterances_alone(case: Case, bound: float) -> None:
    found = case.found(bound=bound, smoothing=0.2)
    expected = by_hand(case, bound, 0.2)
    heads = case.teacher.heads
    given = {
        "ctc_kl": found.kl["ctc"], "attention_kl": found.kl.get("attention"), "hidden": found.hidden,
        "frames": found.frames, "tokens": found.rows.get("attention"), "ctc": found.transcripts["ctc"],
        "attention": found.transcripts.get("attention"),
    }  # fmt: skip
    assert set(found.kl) == set(found.rows) == set(found.transcripts) == set(heads)
    assert torch.equal(found.rows["ctc"], found.frames)
    for (name, one), other in zip(given.items(), expected, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5, msg=name)
    parts = [name for name, one in given.items() if one is not None and name not in ("frames", "tokens")]
    torch.testing.assert_close(found.each(), sum(given[name] for name in parts))
    assert min(found.kl["ctc"].tolist()) > 0.1 and min(found.hidden.tolist()) > 0.1  # the case is there
    if "attention" in case.teacher.heads:
        assert found.rows["attention"][1] > 1  # the teacher does recognise something in the one without a transcript


def test_what_is_not_wanted_is_0(case: Case) -> None:
    found = case.found(hidden=False, told=False)
    whole = case.found()
    assert all(torch.equal(one, whole.kl[head]) for head, one in found.kl.items())
    assert not found.hidden.any() and found.transcripts == {}


def test_a_student_that_is_the_teacher_has_no_loss(case: Case) -> None:
    trained = {name: case.teacher.state_dict()[name] for name in case.weights.names}
    exact = QuantizedWeights(trained, [dict.fromkeys(trained, 32)], WeightFormat(QuantSpec(8)), {}, "frozen")
    same = case._replace(weights=exact, masked=case.features).found()
    assert all(float(one.max()) < 1e-6 for one in same.kl.values())
    assert float(same.hidden.max()) < 1e-9
    assert float(case._replace(weights=exact).found().kl["ctc"].min()) > 1e-3  # it hears something else


def test_gradients_reach_all_that_is_trained_and_nothing_of_the_teacher(case: Case) -> None:
    for parameter in case.teacher.parameters():
        parameter.requires_grad_(True)
    loss = case.loss()
    found = loss(case.masked, case.features, torch.tensor(FRAMES), targets(), torch.tensor(KNOWN), 0)
    found.each().sum().backward()
    for parameter in case.weights.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
    assert all(parameter.grad is None for parameter in case.teacher.parameters())
    own = {name for name, _ in loss.named_parameters()}
    assert not any("teacher" in name for name in own)
    assert {name for name, _ in case.student.named_parameters()} <= {
        name.removeprefix("outputs.model.") for name in own
    }


def test_a_silent_teacher_gives_finite_errors() -> None:
    """All states of the teacher equal: no variance to measure in, and no NaN."""
    from mpq.training.distillation import _relative_error

    valid = torch.tensor([[True, True, False], [True, True, True]])
    still = torch.zeros(2, 3, 4)
    assert torch.equal(_relative_error(still, still, valid), torch.zeros(2))
    moved = torch.arange(24.0).reshape(2, 3, 4)
    other = moved + 1
    other[0, 2] = 99  # padding
    expected = [8 / float((moved[0, :2] - moved[0, :2].mean()).square().sum()), 12 / 143.0]
    assert float((moved[1] - moved[1].mean()).square().sum()) == 143
    assert _relative_error(other, moved, valid).tolist() == pytest.approx(expected)
