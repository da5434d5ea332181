"""A recipe's untrained model: its parameters counted by hand, its features, and what does not go together."""

from typing import Any

import pytest
import torch

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.speech.text import CharTokenizer
from mpq.training.building import build_model, encoder_options, mel_options

WIDTH, KERNEL, FFN, CHANNELS, TOKENS = 16, 5, 24, 6, 4
MODEL = {
    "layers": 2, "width": WIDTH, "heads": 2, "ffn_width": FFN, "kernel_size": KERNEL, "subsampling_channels": CHANNELS,
    "decoder_layers": 1, "decoder_heads": 2, "decoder_ffn_width": 20,
}  # fmt: skip


def recipe(model: dict[str, Any] | None = None, **features: Any) -> Recipe:
    features = {"sample_rate": 8000, "n_mels": 20} | features
    return Recipe.model_validate({"features": features, "model": MODEL | (model or {})})


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def parameters(model: torch.nn.Module, prefix: str) -> int:
    return sum(one.numel() for name, one in model.named_parameters() if name.startswith(prefix))


def test_the_parameters_of_a_block_and_of_the_heads_by_hand() -> None:
    model = build_model(recipe({"ffn2_width": [8, 12]}), CharTokenizer(list(" abc")))
    norms = 5 * 2 * WIDTH  # of the four modules, and of the block's output
    attention = 4 * linear(WIDTH, WIDTH) + WIDTH * WIDTH + 2 * WIDTH  # with positions, and a bias for each of two heads
    convolution = linear(WIDTH, 2 * WIDTH) + WIDTH * KERNEL + WIDTH + 2 * WIDTH + linear(WIDTH, WIDTH)
    for block, second in enumerate((8, 12)):
        modules = sum(linear(WIDTH, hidden) + linear(hidden, WIDTH) for hidden in (FFN, second))
        assert parameters(model, f"encoder.layers.{block}.") == norms + attention + convolution + modules
    assert parameters(model, "ctc.") == linear(WIDTH, TOKENS + 1)
    bands = 20 // 2 // 2  # after two convolutions of stride 2 and padding 1
    front = 9 * CHANNELS + CHANNELS + 9 * CHANNELS * CHANNELS + CHANNELS + linear(CHANNELS * bands, WIDTH)
    assert parameters(model, "encoder.pre_encode.") == front


def test_without_decoder_layers_there_is_ctc_alone() -> None:
    assert len(build_model(recipe(), CharTokenizer(list("ab"))).heads) == 2
    assert len(build_model(recipe({"decoder_layers": 0}), CharTokenizer(list("ab"))).heads) == 1


def test_the_weights_are_drawn_from_torchs_generator() -> None:
    drawn = []
    with torch.random.fork_rng():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(build_model(recipe(), CharTokenizer(list("ab"))).ctc.weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_pitch_widens_the_input_by_three() -> None:
    assert [encoder_options(recipe(pitch=pitch)).features for pitch in (False, True)] == [20, 23]


@pytest.mark.parametrize(
    ("rate", "window", "hop", "expected"),
    [(16000, 25.0, 10.0, (512, 400, 160)), (8000, 32.0, 10.0, (256, 256, 80)), (22050, 25.0, 12.5, (1024, 551, 276))],
)
def test_milliseconds_become_samples(rate: int, window: float, hop: float, expected: tuple[int, int, int]) -> None:
    mel = mel_options(recipe(sample_rate=rate, window_ms=window, hop_ms=hop))
    assert (mel.n_fft, mel.win_length, mel.hop_length, mel.fmax) == (*expected, rate / 2)


def test_features_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(MpqError, match=r"\[features\] n_mels: \d+ of 80 bands lie between the frequencies of a window"):
        build_model(recipe(n_mels=80, window_ms=4.0), CharTokenizer(["a"]))
    with pytest.raises(MpqError, match=r"\[features\] n_mels: 2 leaves no band after the subsampling"):
        build_model(recipe({"subsampling_padding": 0}, n_mels=2), CharTokenizer(["a"]))
