"""Hybrid CTC/attention models: the decoder against torch's own layer, and every step against whole forward passes."""

import itertools

import numpy as np
import pytest
import torch
from tiny_hybrids import CLASSES, hybrid, plain_rows, spoken, utterances, waves
from tiny_models import tiny_model
from torch import Tensor

from mpq.artifact.weights import WeightFormat
from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.hybrid import HybridConformer
from mpq.models.segment import Segment
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.divergence import JointDivergence, OutputBatch, SegmentTree, output_divergence, owner
from mpq.sensitivity.fisher import fisher_scores, rounding_errors
from mpq.sensitivity.measure import measure_kl
from mpq.sensitivity.statistics import input_grams
from mpq.speech.audio import pad_batch

EMBED, SOURCE, OUTPUT = "decoder.embed.weight", "decoder.layers.0.src_attn.linear_k.weight", "decoder.output.weight"
HEAD, ENCODER = "ctc.weight", "encoder.layers.0.conv.depthwise_conv.weight"


def batched(model: AsrModel, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    each = iter(waves())
    return [model.features(*pad_batch(list(itertools.islice(each, size)))) for size in sizes]


def with_weights(weights: dict[str, Tensor]) -> HybridConformer:
    model = hybrid()
    for name, tensor in weights.items():
        dict(model.named_parameters())[name].data = tensor.clone()
    return model


def rounded(bits: int, *names: str) -> dict[str, Tensor]:
    model = hybrid()
    parameters = dict(model.named_parameters())
    chosen = names or [ref.name for ref in model.weights()]
    return {name: fake_quantize(parameters[name].data, QuantSpec(bits)) for name in chosen}


def plain_kl(changed: HybridConformer, output: str) -> list[Tensor]:
    """Returns the KL of each row of each utterance."""
    model = hybrid()
    found = []
    for one in utterances(model):
        p, q = (plain_rows(model, of, output, *one) for of in (model, changed))
        found.append((p * (p / q).log()).sum(dim=-1))
    return found


def plain_sums(changed: HybridConformer, *outputs: str) -> Tensor:
    """Returns (utterances, 2): the sum of KL, at most 1 a row, over the rows of all outputs, and their number."""
    each = [torch.cat(rows) for rows in zip(*(plain_kl(changed, output) for output in outputs), strict=True)]
    return torch.tensor([[float(rows.clamp(max=1.0).sum()), len(rows)] for rows in each], dtype=torch.float64)


def test_what_a_search_asks_is_the_forward_pass() -> None:
    model = hybrid()
    waveforms, lengths = pad_batch(waves())
    with torch.inference_mode():
        encoded, valid = model.encode(*model.features(waveforms, lengths))
        prefixes = torch.randint(0, CLASSES, (7, 5), generator=torch.Generator().manual_seed(1))
        utterances = torch.tensor([3, 0, 0, 2, 1, 3, 0])
        expected = model.decoder(prefixes, encoded[utterances], valid[utterances])[:, -1].log_softmax(dim=-1)
        torch.testing.assert_close(
            model.decoder.scorer(encoded, valid)(prefixes, utterances), expected, atol=1e-5, rtol=0
        )


def test_decoder_segments_are_its_forward_pass_and_own_every_weight() -> None:
    model = hybrid()
    (features, lengths) = batched(model, 4)[0]
    with torch.inference_mode():
        context = model.output_context(features, lengths)
        inputs, rows = context.inputs["attention"], context.rows["decoder"].sum(dim=1)
        encoded, frames = model.encode(features, lengths)
        hidden = encoded
        for segment in model.head("attention").segments:
            hidden = segment.run(hidden, inputs)
        assert torch.equal(hidden, model.decoder(inputs.prefixes, encoded, frames))
    assert hidden.shape == (4, int(rows.max()), CLASSES)
    tree = SegmentTree(model)
    owners = [owner(ref.name, tree.segments) for ref in model.weights()]
    assert set(owners) == set(range(len(tree.segments))) and len(model.head("attention").segments) == 4
    assert sum(ref.numel for ref in model.weights() if ref.name.startswith("decoder.")) == 2 * 16 * CLASSES + 2 * (
        8 * 16 * 16 + 2 * 16 * 24
    )


def told(model: HybridConformer, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the (N, U + 1) prefixes that the attention head is given, and its (N,) rows that count."""
    context = model.output_context(features, lengths)
    return context.inputs["attention"].prefixes, context.rows["decoder"].sum(dim=1)


def test_the_tokens_are_the_models_own_and_depend_on_no_batch() -> None:
    model = hybrid()
    together, rows = told(model, *batched(model, 4)[0])
    for i, (features, lengths) in enumerate(utterances(model)):
        with torch.no_grad():
            expected = [CLASSES - 1, *spoken(model, model.encode(features, lengths)[0])]
        alone, own = told(model, features, lengths)
        assert alone.tolist() == [expected] and int(rows[i]) == int(own) == len(expected)
        assert together[i, : len(expected)].tolist() == expected
    assert sorted(rows.tolist())[::3] == [1, 7]  # one of them is empty
    with torch.no_grad():  # only blanks: <eos> after <sos> is left
        model.ctc.weight.zero_()
        model.ctc.bias.copy_(torch.eye(CLASSES)[-1])
    silent, rows = told(model, *batched(model, 4)[0])
    assert silent.tolist() == [[CLASSES - 1]] * 4 and rows.tolist() == [1] * 4
    batch = OutputBatch(model, *batched(model, 4)[0])
    assert batch.log_distributions(SegmentTree(model), ("decoder",))["decoder"].shape == (4, CLASSES)


def measured_over(name: str, output: str) -> str:
    """The rule, written down again: over the chosen output, or over one that the weight takes part in."""
    if name.startswith("ctc."):
        return "ctc"
    return "decoder" if name.startswith("decoder.") else output


@pytest.mark.parametrize("output", ["ctc", "encoder", "decoder"])
def test_exact_sensitivity_is_whole_forward_passes(output: str) -> None:
    model = hybrid()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [
        ENCODER,
        "encoder.pre_encode.out.weight",
        HEAD,
        EMBED,
        SOURCE,
        "decoder.layers.1.linear2.weight",
        OUTPUT,
    ]
    points = [(name, bits) for name in names for bits in (2, 5)]
    got = measure_kl(model, batched(model, 2, 2), points, WeightFormat(QuantSpec(8)), output)
    assert set(got) == set(points)
    for name, bits in points:
        rows = torch.cat(plain_kl(with_weights(rounded(bits, name)), measured_over(name, output)))
        assert got[name, bits] == pytest.approx(float(rows.mean()), rel=1e-4, abs=1e-10)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert min(got.values()) > 1e-9 and max(got.values()) > 0.01


def test_the_encoder_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring decoder weights runs no segment of the encoder, but for the tokens, the references and the one walk."""
    model, ran = hybrid(), []
    segments = tuple(
        Segment(segment.prefixes, lambda x, context, run=segment.run, index=index: ran.append(index) or run(x, context))
        for index, segment in enumerate(model.segments)
    )
    monkeypatch.setattr(HybridConformer, "segments", property(lambda _: segments))
    points = [(ref.name, bits) for ref in model.weights() for bits in (2, 3) if not ref.name.startswith("encoder.")]
    measure_kl(model, batched(model, 4), points, WeightFormat(QuantSpec(8)))
    assert ran == 3 * list(range(9))


@pytest.mark.parametrize("output", ["ctc", "encoder", "decoder"])
def test_second_order_scores_approach_exact_ones(output: str) -> None:
    model = hybrid()
    errors = rounding_errors(model, WeightFormat(QuantSpec(8)), (6, 7), {})
    sums, frames, rows = torch.zeros(len(errors), 2, dtype=torch.float64), 0, []
    for features, lengths in utterances(model):
        draws = [fisher_scores(model, errors, features, lengths, seed, output) for seed in range(8)]
        sums += torch.stack([scores for scores, _ in draws]).mean(dim=0)
        rows.append(draws[0][1])
    frames = sum(rows)
    assert rows == [len(one) for one in plain_kl(model, output)]
    points = [(name, bits) for name in errors for bits in (6, 7)]
    exact = measure_kl(model, batched(model, 4), points, WeightFormat(QuantSpec(8)), output)
    ratios = {point: float(sums[i // 2, i % 2]) / frames / exact[point] for i, point in enumerate(points)}
    logs = {name: np.mean([np.log(ratios[name, bits]) for bits in (6, 7)]) for name in errors}
    of_decoder = [log for name, log in logs.items() if name.startswith("decoder.")]
    assert len(of_decoder) == 22 and np.abs(np.median(of_decoder)) < 0.35
    assert np.abs(np.median(list(logs.values()))) < 0.35 and max(map(abs, logs.values())) < 1.6
    both = np.log([[float(sums[i // 2, i % 2]), exact[point]] for i, point in enumerate(points)])
    assert np.corrcoef(both.T)[0, 1] > 0.9


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (4,), (1, 3)])
def test_a_whole_model_is_measured_over_all_that_recognition_uses(sizes: tuple[int, ...]) -> None:
    model = hybrid()
    data = batched(model, *sizes)
    weights = rounded(3)
    expected = plain_sums(with_weights(weights), "ctc", "decoder")
    mean = float(expected[:, 0].sum() / expected[:, 1].sum())
    assert output_divergence(model, with_weights(weights), data) == pytest.approx(mean, rel=1e-5)
    joint = JointDivergence(model, data)
    assert joint.frames == int(expected[:, 1].sum()) and joint.mean == 0
    torch.testing.assert_close(joint.measure(weights), expected[:, 0], rtol=1e-5, atol=1e-6)
    for output in ("ctc", "encoder", "decoder"):
        alone = plain_sums(with_weights(weights), output)
        mean = float(alone[:, 0].sum() / alone[:, 1].sum())
        assert mean > 0.01
        assert output_divergence(model, with_weights(weights), data, output) == pytest.approx(mean, rel=1e-5)
        torch.testing.assert_close(
            JointDivergence(model, data, output).measure(weights), alone[:, 0], atol=1e-6, rtol=1e-5
        )


def test_one_change_after_another_is_all_at_once() -> None:
    """Changes of the encoder, of the head and of the decoder, in any order, and back."""
    model = hybrid()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    joint = JointDivergence(model, batched(model, 2, 2))
    now: dict[str, Tensor] = {}
    for step in (
        rounded(2, OUTPUT),
        rounded(2, HEAD),
        rounded(3, ENCODER, EMBED),
        rounded(3, SOURCE),
        {HEAD: state[HEAD]},
        rounded(2, "encoder.layers.1.self_attn.linear_q.weight"),
        {OUTPUT: state[OUTPUT], ENCODER: state[ENCODER]},
        {},
    ):
        promised = joint.measure(step)
        joint.change(step)
        now |= step
        assert torch.equal(joint.kl, promised)
        expected = plain_sums(with_weights(now), "ctc", "decoder")[:, 0]
        torch.testing.assert_close(joint.kl, expected, rtol=1e-5, atol=1e-6)
    joint.restore()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_statistics_of_every_weight() -> None:
    """The decoder's by hand, the encoder's as those of the same model without a decoder."""
    model = hybrid()
    grams = input_grams(model, utterances(model))
    assert set(grams) == {ref.name for ref in model.weights()}
    memory, outputs, tokens = torch.zeros(16, 16), torch.zeros(16, 16), 0
    with torch.no_grad():
        for features, lengths in utterances(model):
            encoded = model.encode(features, lengths)[0]
            memory += encoded[0].T @ encoded[0]
            prefix = torch.tensor([[CLASSES - 1, *spoken(model, encoded)]])
            tokens += prefix.shape[1]
            seen: list[Tensor] = []
            handle = model.decoder.after_norm.register_forward_hook(lambda *found, seen=seen: seen.append(found[2][0]))
            model.decoder(prefix, encoded, torch.tensor([encoded.shape[1]]))
            handle.remove()
            outputs += seen[0].T @ seen[0]
    torch.testing.assert_close(grams[SOURCE][0], memory, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grams[OUTPUT][0], outputs, rtol=1e-4, atol=1e-3)
    assert torch.equal(grams[EMBED], 4 * torch.eye(16)[None])
    bare = hybrid(0)
    bare.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in bare.state_dict()})
    for name, gram in input_grams(bare, utterances(bare)).items():
        torch.testing.assert_close(grams[name], gram)


@pytest.mark.parametrize("model", [tiny_model(), hybrid(0)], ids=["nemo", "hybrid without decoder"])
def test_a_model_without_decoder_has_no_decoder_output(model: AsrModel) -> None:
    data = batched(model, 4)
    words = "output: expected encoder or ctc, which this model has, got 'decoder'"
    name = model.weights()[0].name
    errors = rounding_errors(model, WeightFormat(QuantSpec(8)), (2,), {})
    for measure in (
        lambda: measure_kl(model, data, [(name, 2)], WeightFormat(QuantSpec(8)), "decoder"),
        lambda: fisher_scores(model, errors, *utterances(model)[0], output="decoder"),
        lambda: JointDivergence(model, data, "decoder"),
        lambda: output_divergence(model, model, data, "decoder"),
    ):
        with pytest.raises(MpqError, match=words):
            measure()
    assert model.heads == ("ctc",) and SegmentTree(model).recognition == ("ctc",)
    assert set(model.output_context(*data[0]).rows) == {"encoder", "ctc"}
    assert output_divergence(model, model, data) == 0
