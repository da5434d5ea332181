"""Divergences against plain whole forward passes of every utterance on its own."""

import itertools

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.segment import Segment
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.divergence import JointDivergence, OutputBatch, SegmentTree, output_divergence, owner
from mpq.speech.audio import pad_batch

SAMPLES = (16000, 12000, 7000, 3300)
HEAD = "decoder.decoder_layers.0.weight"


def waves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [0.1 * torch.randn(size, generator=generator) for size in SAMPLES]


def batched(model: AsrModel, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Returns the utterances in batches of these sizes."""
    each = iter(waves())
    return [model.features(*pad_batch(list(itertools.islice(each, size)))) for size in sizes]


def rounded(model: AsrModel, bits: int, names: list[str] | None = None) -> dict[str, Tensor]:
    """Returns weights of the model at a width, by name."""
    return {
        ref.name: fake_quantize(dict(model.named_parameters())[ref.name], QuantSpec(bits))
        for ref in model.weights()
        if names is None or ref.name in names
    }


def with_weights(weights: dict[str, Tensor]) -> AsrModel:
    """Returns another copy of the model that has these weights."""
    model = tiny_model()
    for name, tensor in weights.items():
        dict(model.named_parameters())[name].data = tensor.clone()
    return model


def plain_kl(changed: AsrModel, output: str = "ctc") -> tuple[Tensor, list[int]]:
    """Returns the (utterances,) sums over the frames of KL, at most 1 each, and the numbers of frames."""
    model, sums, frames = tiny_model(), [], []
    with torch.inference_mode():
        for wave in waves():
            features, lengths = model.features(wave[None], torch.tensor([len(wave)]))
            rows = []
            for of in (model, changed):
                encoded, count = of.encode(features[:, : int(lengths)], lengths)
                assert encoded.shape[1] == int(count)
                x = encoded if output == "encoder" else of.decoder.decoder_layers(encoded.transpose(1, 2)).mT
                rows.append(x[0].double().softmax(dim=-1))
            p, q = rows
            sums.append(sum(min(float((a * (a / b).log()).sum()), 1.0) for a, b in zip(p, q, strict=True)))
            frames.append(len(p))
    return torch.tensor(sums, dtype=torch.float64), frames


@pytest.mark.parametrize("output", ["ctc", "encoder"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (4,), (1, 3)])
def test_equal_to_plain_forward_passes(sizes: tuple[int, ...], output: str) -> None:
    """Whatever the batches: padding takes no part."""
    model = tiny_model()
    weights = rounded(model, 3)
    expected, frames = plain_kl(with_weights(weights), output)
    data = batched(model, *sizes)
    got = output_divergence(model, with_weights(weights), data, output)
    assert got == pytest.approx(float(expected.sum()) / sum(frames), rel=1e-5)
    joint = JointDivergence(model, data, output)
    assert joint.frames == sum(frames) and joint.mean == 0 and bool((joint.kl == 0).all())
    torch.testing.assert_close(joint.measure(weights), expected, rtol=1e-5, atol=1e-6)
    joint.change(weights)
    torch.testing.assert_close(joint.kl, expected, rtol=1e-5, atol=1e-6)
    assert joint.mean == pytest.approx(got, rel=1e-6)
    assert joint.mean * joint.frames == pytest.approx(float(joint.kl.sum()))
    assert joint.mean > 0.01 and bool((joint.kl > 0).all())


def test_no_change_is_no_divergence_and_more_bits_are_less() -> None:
    model = tiny_model()
    data = batched(model, 2, 2)
    assert output_divergence(model, tiny_model(), data) == 0
    found = [output_divergence(model, with_weights(rounded(model, bits)), data) for bits in (2, 4, 6, 8)]
    assert found == sorted(found, reverse=True) and found[-1] > 0


@pytest.mark.parametrize("output", ["ctc", "encoder"])
def test_one_change_after_another_is_all_at_once(output: str) -> None:
    """Late layers before early ones and the other way round, one layer twice, two at a time: as from scratch."""
    model = tiny_model()
    joint = JointDivergence(model, batched(model, 2, 2), output)
    original = {ref.name: dict(model.named_parameters())[ref.name].data.clone() for ref in model.weights()}
    two, four = rounded(model, 2), rounded(model, 4)
    names = list(original)
    steps = [
        {names[-3]: two[names[-3]]},
        {names[4]: four[names[4]]},
        {names[0]: two[names[0]], names[-5]: four[names[-5]]},
        {HEAD: two[HEAD]},
        {names[4]: two[names[4]]},
        {names[-3]: original[names[-3]], HEAD: four[HEAD]},
        {},
    ]
    now: dict[str, Tensor] = {}
    for step in steps:
        tried = rounded(tiny_model(), 3, [names[2], names[-2]])
        wanted, _ = plain_kl(with_weights(now | tried), output)
        torch.testing.assert_close(joint.measure(tried), wanted, rtol=1e-5, atol=1e-6)
        promised = joint.measure(step)
        joint.change(step)
        now |= step
        assert torch.equal(joint.kl, promised)
        torch.testing.assert_close(joint.kl, plain_kl(with_weights(now), output)[0], rtol=1e-5, atol=1e-6)
        for name, tensor in original.items():
            assert torch.equal(dict(model.named_parameters())[name], now.get(name, tensor))
    fresh = tiny_model()
    at_once = JointDivergence(fresh, batched(fresh, 2, 2), output)
    at_once.change(now)
    assert torch.equal(at_once.kl, joint.kl)


def test_measuring_leaves_everything_as_it_was() -> None:
    model = tiny_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    joint = JointDivergence(model, batched(model, 4))
    for weights in (rounded(model, 2), rounded(model, 2, [HEAD])):
        first = joint.measure(weights)
        assert torch.equal(joint.measure(weights), first) and bool((first > 0).all())
        assert joint.mean == 0 and bool((joint.measure({}) == 0).all())
    broken = {HEAD: torch.zeros(29, 5, 1)}
    with pytest.raises(RuntimeError):  # a bug of the caller, and yet
        joint.measure(broken)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert places == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_only_stages_from_the_change_on_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = tiny_model(), []

    def counted(index: int, segment: Segment) -> Segment:
        return Segment(segment.prefixes, lambda x, context: ran.append(index) or segment.run(x, context))

    segments = tuple(counted(index, segment) for index, segment in enumerate(model.segments))
    monkeypatch.setattr(type(model), "segments", property(lambda _: segments))
    joint = JointDivergence(model, batched(model, 4))
    assert ran == list(range(9))
    for name, segments in (("encoder.layers.1.conv.depthwise_conv.weight", [7, 8]), (HEAD, []), (None, [])):
        ran.clear()
        joint.measure({} if name is None else rounded(model, 2, [name]))
        assert ran == segments


def test_restore_brings_every_bit_back() -> None:
    model = tiny_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    joint = JointDivergence(model, batched(model, 2, 2))
    joint.change(rounded(model, 2))
    joint.change(rounded(model, 1, [HEAD]))
    assert sum(not torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items()) > 20
    joint.restore()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_the_head_is_no_part_of_the_encoders_output() -> None:
    model = tiny_model()
    weights = rounded(model, 1, [HEAD])
    data = batched(model, 2, 2)
    joint = JointDivergence(model, data, "encoder")
    assert bool((joint.measure(weights) == 0).all())
    assert output_divergence(model, with_weights(weights), data, "encoder") == 0
    expected, _ = plain_kl(with_weights(weights))
    torch.testing.assert_close(JointDivergence(model, data).measure(weights), expected, rtol=1e-5, atol=1e-6)


def test_distributions_are_of_the_valid_frames() -> None:
    model = tiny_model()
    (features, lengths) = batched(model, 4)[0]
    batch = OutputBatch(model, features, lengths)
    with torch.inference_mode():
        tree = SegmentTree(model)
        early = batch.log_distribution(tree, tree.path("ctc"), "ctc")
        for index in range(len(model.segments)):
            batch.advance(tree, index)
        assert torch.equal(batch.log_distribution(tree, (len(model.segments),), "ctc"), early)
        (encoded,) = batch.states.values()  # nothing is kept that no later segment reads
    assert early.dtype == torch.float64 and early.shape == (int(model.encoded_lengths(lengths).sum()), 29)
    logits = 10 * torch.randn(4, encoded.shape[1], 29, generator=torch.Generator().manual_seed(1))
    rows = [x[:count].double() for x, count in zip(logits, batch.counts["ctc"].tolist(), strict=True)]
    expected = torch.cat(rows) - torch.cat(rows).exp().sum(dim=-1, keepdim=True).log()
    # float32 would drown what 8 bits do
    torch.testing.assert_close(batch.log_softmax(logits, "ctc"), expected, rtol=1e-12, atol=1e-12)


def test_an_unknown_output_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(MpqError, match="output: expected encoder or ctc, which this model has, got 'ctx'"):
        JointDivergence(model, batched(model, 4), "ctx")
    with pytest.raises(MpqError, match="output: expected encoder or ctc, which this model has, got 'decoder'"):
        JointDivergence(model, batched(model, 4), "decoder")


def test_every_weight_has_one_stage() -> None:
    model = tiny_model()
    segments = SegmentTree(model).segments
    owners = [owner(ref.name, segments) for ref in model.weights()]
    assert owners[0] == 0 and owners[-1] == len(segments) - 1 and set(owners) == set(range(len(segments)))
    assert owner("encoder.layers.1.conv.depthwise_conv.weight", segments) == 1 + 4 + 2
    with pytest.raises(AssertionError, match="do not own each weight once"):
        owner("nobody.weight", segments)
