"""The Transformer decoder against torch's layer and by hand."""

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from tiny_hybrids import CLASSES, hybrid
from torch import Tensor, nn

from mpq.models.attention_decoder import TransformerDecoder


@cache
def random_inputs() -> tuple[TransformerDecoder, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    encoded = torch.randn(3, 9, 16, generator=generator)
    prefixes = torch.randint(0, CLASSES, (3, 6), generator=generator)
    return hybrid().decoder, prefixes, encoded, torch.tensor([9, 4, 1])


def test_a_decoder_layer_is_torchs() -> None:
    decoder, prefixes, encoded, lengths = random_inputs()
    layer = decoder.layers[1]
    reference = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=True).eval()
    state = {}
    for theirs, ours in (("self_attn", layer.self_attn), ("multihead_attn", layer.src_attn)):
        for kind in ("weight", "bias"):
            q, k, v = (getattr(linear, kind) for linear in (ours.linear_q, ours.linear_k, ours.linear_v))
            state[f"{theirs}.in_proj_{kind}"] = torch.cat([q, k, v])
            state[f"{theirs}.out_proj.{kind}"] = getattr(ours.linear_out, kind)
    norms = {"norm1": layer.norm_self_att, "norm2": layer.norm_src_att, "norm3": layer.norm_feed_forward}
    for theirs, ours in (norms | {"linear1": layer.linear1, "linear2": layer.linear2}).items():
        state |= {f"{theirs}.{name}": tensor for name, tensor in ours.state_dict().items()}
    reference.load_state_dict(state)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0][1], output[1]]))
    with torch.no_grad():
        decoder(prefixes, encoded, lengths)
        handle.remove()
        expected = reference(
            seen[0],
            encoded,
            tgt_mask=torch.ones(6, 6, dtype=torch.bool).triu(1),
            memory_key_padding_mask=torch.arange(9) >= lengths[:, None],
        )
    torch.testing.assert_close(seen[1], expected, rtol=1e-5, atol=1e-5)


def test_embedding_positions_and_output_by_hand() -> None:
    """A decoder whose layers add nothing: what is left is the table, the sinusoids, the last norm and the last map."""
    decoder, prefixes, encoded, lengths = random_inputs()
    bare = TransformerDecoder(16, CLASSES, replace(decoder.options, layers=1)).eval()
    bare.load_state_dict({name: value for name, value in decoder.state_dict().items() if "layers.1" not in name})
    for module in (bare.layers[0].self_attn.linear_out, bare.layers[0].src_attn.linear_out, bare.layers[0].linear2):
        nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    with torch.no_grad():
        got = bare(prefixes, encoded, lengths)[1, 3].numpy()
        x = 4 * bare.embed.weight[prefixes[1, 3]].double().numpy()
        x += [(np.sin, np.cos)[i % 2](3 / 10000 ** (i // 2 * 2 / 16)) for i in range(16)]
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        x = x * bare.after_norm.weight.numpy() + bare.after_norm.bias.numpy()
        np.testing.assert_allclose(got, bare.output.weight.numpy() @ x + bare.output.bias.numpy(), atol=1e-5)


def test_padding_takes_no_part_and_no_position_looks_ahead() -> None:
    decoder, prefixes, encoded, lengths = random_inputs()
    with torch.no_grad():
        together = decoder(prefixes, encoded, lengths)
        noise = torch.randn(encoded.shape, generator=torch.Generator().manual_seed(5))
        padding = (torch.arange(9) >= lengths[:, None])[:, :, None]
        torch.testing.assert_close(decoder(prefixes, torch.where(padding, noise, encoded), lengths), together)
        for i, length in enumerate(lengths.tolist()):
            alone = decoder(prefixes[i : i + 1, :4], encoded[i : i + 1, :length], lengths[i : i + 1])
            torch.testing.assert_close(alone[0], together[i, :4], rtol=1e-5, atol=1e-5)
        changed = decoder((prefixes + (torch.arange(6) >= 4)) % CLASSES, encoded, lengths)
        torch.testing.assert_close(changed[:, :4], together[:, :4], rtol=1e-6, atol=1e-6)
        assert bool(((changed[:, 4:] - together[:, 4:]).abs().amax(dim=-1) > 1e-3).all())
