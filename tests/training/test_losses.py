"""The joint loss against sums over all alignments, a hand-written cross entropy, and itself under padding."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mpq.models.attention_decoder import DecoderOptions
from mpq.models.conformer import ConformerOptions
from mpq.models.heads import Targets, with_ends
from mpq.models.hybrid import HybridConformer
from mpq.speech.features import LogMelOptions
from mpq.speech.text import CharTokenizer
from mpq.training.losses import JointLoss


def small_model(has_decoder: bool = True, conv_norm: str = "batch_norm") -> HybridConformer:
    """Returns a model of three letters with random weights."""
    options = ConformerOptions(
        features=8,
        layers=2,
        width=16,
        heads=2,
        ffn_width=32,
        kernel_size=5,
        subsampling="striding",
        subsampling_factor=4,
        subsampling_channels=4,
        conv_norm=conv_norm,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = HybridConformer(
            options,
            DecoderOptions(2, 2, 32) if has_decoder else None,
            LogMelOptions(8000, 8, 256, 200, 80, fmax=4000.0),
            CharTokenizer("abc"),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def some_features(*lengths: int, padding: int = 0, seed: int = 0, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Returns (N, T, 8) features, each utterance's the same whatever the others are, and (N,) lengths."""
    features = torch.full((len(lengths), max(lengths) + padding, 8), fill)
    for row, length in enumerate(lengths):
        numbers = np.random.default_rng([seed, length]).normal(size=(length, 8))
        features[row, :length] = torch.from_numpy(numbers).float()
    return features, torch.tensor(lengths)


def all_alignments(probs: np.ndarray, tokens: list[int], blank: int) -> float:
    """Returns -log of the summed probability of every path that spells the tokens."""
    total = 0.0
    for path in itertools.product(range(probs.shape[1]), repeat=len(probs)):
        spelt = [token for token, _ in itertools.groupby(path) if token != blank]
        if spelt == tokens:
            total += math.prod(probs[frame, token] for frame, token in enumerate(path))
    return -math.log(total)


@pytest.mark.parametrize("texts", [[[0, 1], [2]], [[1, 1], []], [[], []]])
def test_ctc_is_the_sum_over_all_alignments(texts: list[list[int]]) -> None:
    model = small_model()
    features, lengths = some_features(22, 15)
    with torch.no_grad():
        ctc = JointLoss(model, 0.0)(features, lengths, Targets.of(texts))["ctc"]
        encoded, frames = model.encode(features, lengths)
        probs = model.ctc(encoded).double().softmax(dim=-1).numpy()
    assert frames.tolist() == [6, 4]
    for row, tokens in enumerate(texts):
        expected = all_alignments(probs[row, : int(frames[row])], tokens, blank=3)
        assert float(ctc[row]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_attention_loss_is_the_smoothed_cross_entropy_of_each_next_token(smoothing: float) -> None:
    """Of tokens and <eos>; a wrong class has smoothing / C of the target's probability (Szegedy et al. 2016)."""
    model = small_model()
    features, lengths = some_features(30, 24, 20)
    texts = [[0, 2, 1], [1], []]
    with torch.no_grad():
        attention = JointLoss(model, smoothing)(features, lengths, Targets.of(texts))["attention"]
        for row, tokens in enumerate(texts):
            encoded, frames = model.encode(features[row : row + 1, : int(lengths[row])], lengths[row : row + 1])
            total = 0.0
            for step, token in enumerate([*tokens, 3]):
                prefix = torch.tensor([[3, *tokens[:step]]])  # one token at a time: no look at what follows
                logits = model.decoder(prefix, encoded, frames)[0, -1].double().numpy()
                log_probs = logits - np.log(np.exp(logits).sum())
                wanted = np.full(4, smoothing / 4)
                wanted[token] += 1 - smoothing
                total -= float((wanted * log_probs).sum())
            assert float(attention[row]) == pytest.approx(total, rel=1e-5)


def test_ends_are_put_around_the_tokens() -> None:
    prefixes, following = with_ends(Targets.of([[0, 2], [], [1]]), end=3)
    assert prefixes.tolist() == [[3, 0, 2], [3, 0, 0], [3, 1, 0]]
    assert following.tolist() == [[0, 2, 3], [3, -100, -100], [1, 3, -100]]


def test_targets_are_padded() -> None:
    targets = Targets.of([[1], [0, 2, 1], []])
    assert targets.tokens.tolist() == [[1, 0, 0], [0, 2, 1], [0, 0, 0]]
    assert targets.lengths.tolist() == [1, 3, 0]
    assert Targets.of([[]]).tokens.shape == (1, 1)


def test_padding_tokens_do_not_count() -> None:
    model, (features, lengths) = small_model(), some_features(30, 24)
    targets = Targets.of([[0, 2], [1]])
    longer = Targets(torch.nn.functional.pad(targets.tokens, (0, 3), value=2), targets.lengths)
    with torch.no_grad():
        for one, other in zip(
            JointLoss(model, 0.1)(features, lengths, targets).values(),
            JointLoss(model, 0.1)(features, lengths, longer).values(),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_a_model_without_decoder_has_the_ctc_loss_alone() -> None:
    model, (features, lengths) = small_model(has_decoder=False), some_features(30, 24)
    losses = JointLoss(model, 0.1)(features, lengths, Targets.of([[0], [1, 2]]))
    assert set(losses) == {"ctc"} and (losses["ctc"] > 0).all()


def test_outputs_alone_equal_those_in_a_padded_batch() -> None:
    model = small_model()
    lengths = (46, 17, 29, 30, 8)
    features, counts = some_features(*lengths, padding=11, fill=50.0)
    prefixes = torch.tensor([[3, 0, 1]] * len(lengths))
    with torch.no_grad():
        encoded, frames = model.encode(features, counts)
        log_probs, logits = model.ctc_log_probs(encoded), model.decoder(prefixes, encoded, frames)
        for row, length in enumerate(lengths):
            alone, count = model.encode(features[row : row + 1, :length], counts[row : row + 1])
            assert int(count) == int(frames[row]) == alone.shape[1]
            torch.testing.assert_close(encoded[row, : int(count)], alone[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(log_probs[row, : int(count)], model.ctc_log_probs(alone)[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(logits[row], model.decoder(prefixes[:1], alone, count)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("conv_norm", ["batch_norm", "layer_norm"])
@pytest.mark.parametrize("change", ["padding", "order"])
def test_training_does_not_depend_on_padding_or_order(change: str, conv_norm: str) -> None:
    """Losses, gradients and BatchNorm's statistics."""

    def trained(order: list[int], padding: int, fill: float) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        model = small_model(conv_norm=conv_norm).train()
        lengths, texts = (46, 17, 29, 30), [[0, 1, 2], [1], [], [2, 2]]
        features, counts = some_features(*(lengths[i] for i in order), padding=padding, fill=fill)
        ctc, attention = JointLoss(model, 0.1)(features, counts, Targets.of([texts[i] for i in order])).values()
        (ctc.sum() + attention.sum()).backward()
        losses = torch.stack((ctc, attention)).detach()[:, torch.tensor(order).argsort()]
        buffers = {name: one for name, one in model.named_buffers() if "running" in name}
        return losses, {name: one.grad for name, one in model.named_parameters()}, buffers

    first = trained([0, 1, 2, 3], 0, 0.0)
    second = trained([0, 1, 2, 3], 13, 40.0) if change == "padding" else trained([2, 0, 3, 1], 0, 0.0)
    torch.testing.assert_close(first[0], second[0], rtol=1e-5, atol=1e-5)
    assert bool(first[2]) == (conv_norm == "batch_norm")
    for name, one in first[2].items():
        torch.testing.assert_close(one, second[2][name], rtol=1e-5, atol=1e-6, msg=name)
    for name, one in first[1].items():
        torch.testing.assert_close(one, second[1][name], rtol=1e-3, atol=1e-4, msg=name)
