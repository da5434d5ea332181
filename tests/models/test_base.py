"""Which tensors of a model can be quantized."""

import pytest
import torch
from tiny_models import tiny_model


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
