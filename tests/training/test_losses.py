"""The joint loss against sums over all alignments, a hand-written cross entropy, and itself under padding."""

import pytest
import torch
from tiny_models import small_model, some_features
from torch import Tensor

from mpq.models.heads import Targets
from mpq.training.losses import JointLoss


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
