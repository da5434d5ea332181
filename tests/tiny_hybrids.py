"""A hybrid CTC/attention model whose outputs are far from uniform."""

import torch

from mpq.models.attention_decoder import DecoderOptions
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
