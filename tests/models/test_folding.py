"""Folded models compute what they did before, for utterances alone and padded, whatever the options."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from tiny_hybrids import hybrid
from tiny_models import large, small_model, tiny_hybrid, tiny_model
from torch import Tensor

from mpq.models.base import AsrModel, load_state
from mpq.models.folding import folded_state

MODELS: dict[str, Callable[[], AsrModel]] = {
    "dw_striding": lambda: tiny_model(subsampling_factor=8),
    "striding": lambda: tiny_model(subsampling="striding"),
    "no biases": lambda: tiny_model(use_bias=False),
    "layer norm": lambda: tiny_model(conv_norm="layer_norm"),
    "no masks of the convolution": lambda: tiny_model(conv_mask="none", attention_mask="key", subsampling_padding=0),
    "masks of keys": lambda: tiny_model(attention_mask="key"),
    "a mask of queries that the convolution reads": lambda: tiny_model(conv_mask="none"),
    "other epsilon": lambda: tiny_model(norm_eps=0.1),
    "factored nemo": lambda: large("nemo"),
    "factored hybrid": lambda: large("mpq"),
    "hybrid": tiny_hybrid,
    "two decoder layers": hybrid,
    "no decoder": lambda: small_model(has_decoder=False),
}


def shaken(make: Callable[[], AsrModel]) -> AsrModel:
    """Returns a model none of whose vectors is constant."""
    model = make()
    generator = torch.Generator().manual_seed(11)
    weights = {ref.name for ref in model.weights()}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.1, 3, generator=generator)
            elif tensor.is_floating_point() and "featurizer" not in name and name not in weights:
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model


def folded(model: AsrModel) -> AsrModel:
    found = copy.deepcopy(model)
    load_state(found, folded_state(model))
    return found


@torch.inference_mode()
def outputs(model: AsrModel, features: Tensor, lengths: Tensor) -> list[Tensor]:
    """Returns the valid rows of the encoder's output and of all logits."""
    encoded, frames = model.encode(features, lengths)
    rows = torch.arange(encoded.shape[1]) < frames[:, None]
    found = [encoded[rows], model.head("ctc").logits(encoded, None)[rows]]
    if "attention" in model.heads:
        prefixes = torch.tensor([[model.blank_id, 1, 2]] * len(features))
        found.append(model.attention_logits(prefixes, encoded, frames))
    return found


def differences(model: AsrModel, other: AsrModel) -> list[float]:
    """Returns by how much each output differs, in parts of its largest value; two lengths, alone and in a batch."""
    size = model.encoder.options.features
    features = torch.randn(2, 61, size, generator=torch.Generator().manual_seed(2))
    features[1, 38:] = 0
    found = []
    for some, lengths in ((features, [61, 38]), (features[:1], [61]), (features[1:, :38], [38])):
        pairs = zip(*(outputs(one, some, torch.tensor(lengths)) for one in (model, other)), strict=True)
        found += [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_a_folded_model_computes_the_same(kind: str) -> None:
    model = shaken(MODELS[kind])
    found = folded(model)
    assert max(differences(model, found)) < 2e-5
    before, after = model.state_dict(), found.state_dict()
    assert all(torch.equal(before[ref.name], after[ref.name]) for ref in model.weights())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_every_vector_that_is_left_counts() -> None:
    """The witness can see a fault: each tensor changed by a tenth of its size changes an output."""
    model = shaken(MODELS["two decoder layers"])
    found = folded(model)
    weights = {ref.name for ref in model.weights()}
    for name, tensor in found.state_dict().items():
        if name not in weights and "featurizer" not in name and "tracked" not in name and bool(tensor.any()):
            before = tensor.clone()
            tensor *= 1.1
            assert max(differences(model, found)) > 2e-5, name
            tensor.copy_(before)


def test_the_vectors_that_become_constants() -> None:
    state = folded_state(shaken(lambda: tiny_model(subsampling_factor=8)))
    block = "encoder.layers.1."
    assert {name for name, tensor in state.items() if name.startswith((block, "encoder.pre")) and not tensor.any()} == {
        "encoder.pre_encode.conv.2.bias",  # depthwise
        "encoder.pre_encode.conv.5.bias",
        f"{block}norm_feed_forward1.bias",
        f"{block}norm_self_att.bias",
        f"{block}self_attn.linear_q.bias",
        f"{block}self_attn.linear_k.bias",
        f"{block}self_attn.linear_v.bias",
        f"{block}norm_conv.bias",
        f"{block}conv.depthwise_conv.bias",
        f"{block}conv.batch_norm.running_mean",
        f"{block}conv.batch_norm.num_batches_tracked",
        f"{block}norm_feed_forward2.bias",
    }
    assert bool((state[f"{block}conv.batch_norm.running_var"] == 1).all())


def test_the_vectors_of_a_decoder_that_become_constants() -> None:
    state = folded_state(shaken(hybrid))
    layer = "decoder.layers.0."
    zeros = {name for name, tensor in state.items() if name.startswith(("decoder.after", layer)) and not tensor.any()}
    attention = {f"{layer}{which}.linear_{one}.bias" for which in ("self_attn", "src_attn") for one in "kv"}
    norms = {f"{layer}norm_{one}.bias" for one in ("self_att", "src_att", "feed_forward")}
    assert zeros == attention | norms | {"decoder.after_norm.bias"}


def test_the_scale_and_shift_of_batch_norm_by_hand() -> None:
    model = tiny_model()
    state = model.state_dict()
    name = "encoder.layers.0.conv.batch_norm."
    for key, value in (("weight", 3.0), ("bias", 5.0), ("running_mean", 2.0), ("running_var", 4.0 - 1e-5)):
        state[name + key].fill_(value)
    state["encoder.layers.0.conv.depthwise_conv.bias"].fill_(10.0)
    found = folded_state(model)
    # ((x + 10) - 2) / 2 * 3 + 5 = 1.5 x + 17
    assert found[f"{name}weight"][0].item() == pytest.approx(1.5 * math.sqrt(1 + 1e-5), rel=1e-7)
    assert found[f"{name}bias"][0].item() == pytest.approx(17, rel=1e-6)


def test_a_bias_that_masked_queries_do_not_get_stays() -> None:
    """Their frames reach valid ones through the convolution, so they have to stay as they are."""
    name = "encoder.layers.0.self_attn.linear_v.bias"
    assert bool(folded_state(shaken(lambda: tiny_model(conv_mask="none")))[name].any())


def test_folding_twice_is_folding_once() -> None:
    once = folded(shaken(tiny_hybrid))
    for name, tensor in folded_state(once).items():
        assert torch.equal(tensor, once.state_dict()[name]), name
