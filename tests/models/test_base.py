"""The interface of a model: the calls that others rely on, and which tensors can be quantized."""

import itertools
from pathlib import Path

import pytest
import torch
from tiny_hybrids import hybrid
from tiny_models import tiny_model

import mpq
from mpq.errors import MpqError
from mpq.models.base import WeightRef
from mpq.models.checkpoint import write_checkpoint


def test_weights_are_all_matrices_and_kernels() -> None:
    model = tiny_model()
    kinds = {ref.name: ref.kind for ref in model.weights()}
    assert kinds["encoder.pre_encode.conv.0.weight"] == "conv2d"
    assert kinds["encoder.pre_encode.conv.2.weight"] == "conv2d_depthwise"
    assert kinds["encoder.layers.0.conv.pointwise_conv1.weight"] == "conv1d"
    assert kinds["encoder.layers.0.conv.depthwise_conv.weight"] == "conv1d_depthwise"
    assert kinds["encoder.layers.1.self_attn.linear_pos.weight"] == "linear"
    assert kinds["decoder.decoder_layers.0.weight"] == "conv1d"
    matrices = {name for name, tensor in model.named_parameters() if tensor.ndim > 1 and "pos_bias" not in name}
    assert set(kinds) == matrices


def test_weights_of_modules_that_other_models_have() -> None:
    model = tiny_model()
    model.extra = torch.nn.ModuleDict(
        {"attention": torch.nn.MultiheadAttention(8, 2), "table": torch.nn.Embedding(5, 8), "lstm": torch.nn.LSTM(8, 4)}
    )
    kinds = {ref.name: ref.kind for ref in model.weights()}
    assert kinds["extra.attention.in_proj_weight"] == "packed_projection"
    assert kinds["extra.attention.out_proj.weight"] == "linear"
    assert kinds["extra.table.weight"] == "embedding"
    assert kinds["extra.lstm.weight_ih_l0"] == kinds["extra.lstm.weight_hh_l0"] == "recurrent"


def test_a_matrix_that_cannot_be_quantized_is_not_passed_over() -> None:
    model = tiny_model()
    model.extra = torch.nn.Bilinear(2, 3, 4)
    with pytest.raises(AssertionError, match=r"extra\.weight"):
        model.weights()


def merged(path: list[int], blank: int) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token != blank]


@pytest.mark.parametrize("kind", ["ctc", "hybrid"])
def test_the_calls_that_scripts_rely_on(kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors", tiny_model() if kind == "ctc" else hybrid())
    model = mpq.load_model(tmp_path, device="cpu")
    assert isinstance(model, torch.nn.Module) and not model.training and model.sample_rate == 16000
    assert model.heads == (("ctc",) if kind == "ctc" else ("ctc", "attention"))
    waveforms = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    waveform_lengths = torch.tensor([9000, 6000])
    features, feature_lengths = model.features(waveforms, waveform_lengths)
    assert features.ndim == 3 and feature_lengths.tolist() == [56, 37]
    encoded, encoded_lengths = model.encode(features, feature_lengths)
    assert encoded.shape[::2] == (2, 16) and int(encoded_lengths.max()) <= encoded.shape[1]
    log_probs = model.ctc_log_probs(encoded)
    assert log_probs.shape == (2, encoded.shape[1], len(model.tokenizer.pieces) + 1)
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(log_probs.shape[:2]))
    assert model.blank_id == len(model.tokenizer.pieces)
    paths = [row[:count] for row, count in zip(log_probs.argmax(dim=-1).tolist(), encoded_lengths, strict=True)]
    ids = model.greedy(encoded, encoded_lengths, head=None)
    assert ids == model.greedy(encoded, encoded_lengths, head="ctc") == [merged(path, model.blank_id) for path in paths]
    texts = [model.tokenizer.decode(one) for one in ids]
    assert texts == model.transcribe(waveforms, waveform_lengths)
    assert texts == model.transcribe(waveforms, waveform_lengths, head="ctc")
    assert all(texts) and texts[0] != texts[1]
    assert all(isinstance(ref, WeightRef) for ref in model.weights())
    state = model.state_dict()
    assert all(
        (tuple(state[ref.name].shape), state[ref.name].numel()) == (ref.shape, ref.numel) for ref in model.weights()
    )


def test_the_attention_head_of_a_model_that_has_one_and_of_one_that_has_not() -> None:
    model = hybrid()
    features, lengths = model.features(
        0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0)), torch.tensor([9000, 6000])
    )
    encoded, encoded_lengths = model.encode(features, lengths)
    prefixes = torch.tensor([[model.blank_id, 1, 2], [model.blank_id, 3, 0]])
    logits = model.attention_logits(prefixes, encoded, encoded_lengths)
    assert logits.shape == (2, 3, len(model.tokenizer.pieces) + 1)
    for row, count in enumerate(encoded_lengths.tolist()):  # without padding, a token at a time
        for length in range(1, 4):
            alone = model.decoder(
                prefixes[row : row + 1, :length], encoded[row : row + 1, :count], torch.tensor([count])
            )
            torch.testing.assert_close(logits[row, length - 1], alone[0, -1], rtol=1e-4, atol=1e-5)
    for row, found in enumerate(model.greedy(encoded, encoded_lengths, head="attention")):
        best = []
        while len(best) < int(encoded_lengths[row]):  # CTC cannot spell more tokens than frames
            prefix = torch.tensor([[model.blank_id, *best]])
            following = model.attention_logits(prefix, encoded[row : row + 1], encoded_lengths[row : row + 1])
            if (token := int(following[0, -1].argmax())) == model.blank_id:
                break
            best.append(token)
        assert found == best
    with pytest.raises(MpqError, match="head: expected ctc, which this model has, got 'attention'"):
        tiny_model().attention_logits(prefixes, encoded, encoded_lengths)
    with pytest.raises(MpqError, match="head: expected ctc, which this model has, got 'transducer'"):
        tiny_model().greedy(encoded, encoded_lengths, head="transducer")
