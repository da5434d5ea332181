"""A hybrid CTC/attention model whose outputs are far from uniform, and its outputs by whole forward passes."""

import torch
from torch import Tensor

from mpq.models.attention_decoder import DecoderOptions
from mpq.models.base import AsrModel
from mpq.models.conformer import ConformerOptions
from mpq.models.hybrid import HybridConformer
from mpq.speech.features import LogMelOptions
from mpq.speech.text import CharTokenizer

LABELS = [" ", *"adeforsw"]


CLASSES = len(LABELS) + 1


def hybrid(decoder_layers: int = 2) -> HybridConformer:
    """Returns a model with random weights whose outputs are far from uniform; 0 decoder layers: a CTC model."""
    encoder = ConformerOptions(
        features=40,
        layers=2,
        width=16,
        heads=2,
        ffn_width=32,
        kernel_size=5,
        subsampling="striding",
        subsampling_factor=4,
        subsampling_channels=6,
        subsampling_padding=0,
    )
    decoder = DecoderOptions(decoder_layers, heads=2, ffn_width=24) if decoder_layers else None
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = HybridConformer(encoder, decoder, LogMelOptions(16000, 40, 512, 400, 160), CharTokenizer(LABELS))
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if name.endswith("norm_out.weight"):
                    tensor.uniform_(0.5, 1.5)
                else:
                    tensor.add_(0.3 * torch.randn_like(tensor))
    return model


SAMPLES = (16000, 12000, 7000, 3300)


def waves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [0.1 * torch.randn(size, generator=generator) for size in SAMPLES]


def utterances(model: AsrModel) -> list[tuple[Tensor, Tensor]]:
    """Returns the features of each utterance on its own, without padding."""
    found = [model.features(wave[None], torch.tensor([len(wave)])) for wave in waves()]
    return [(features[:, : int(lengths)], lengths) for features, lengths in found]


def spoken(model: HybridConformer, encoded: Tensor) -> list[int]:
    """Returns the tokens of the best CTC path of (1, T', D), in plain Python."""
    path = model.ctc(encoded)[0].argmax(dim=-1).tolist()
    return [new for old, new in zip([None, *path], path, strict=False) if new not in (old, CLASSES - 1)]


@torch.inference_mode()
def plain_rows(model: HybridConformer, changed: HybridConformer, output: str, features, lengths) -> Tensor:
    """Returns (rows, classes) probabilities of the changed model for one utterance, by one whole forward pass."""
    encoded = changed.encode(features, lengths)[0]
    if output == "encoder":
        logits = encoded[0]
    elif output == "ctc":
        logits = changed.ctc(encoded)[0]
    else:
        tokens = spoken(model, model.encode(features, lengths)[0])
        logits = changed.decoder(torch.tensor([[CLASSES - 1, *tokens]]), encoded, torch.tensor([encoded.shape[1]]))[0]
    return logits.double().softmax(dim=-1)
