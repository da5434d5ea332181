"""Waveform -> normalised log-mel features, as NeMo's `AudioToMelSpectrogramPreprocessor` computes them.

Checked against NeMo 3.0.0's outputs. Legend: N utterances, S samples, T frames, F mel bands.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.errors import MpqError

WINDOWS = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
    "blackman": torch.blackman_window,
    "bartlett": torch.bartlett_window,
}
NORMALIZATIONS = ("per_feature", "all_features", "none")


@dataclass(frozen=True)
class LogMelOptions:
    """The options of log-mel features.

    Attributes:
        sample_rate: Hz.
        n_mels: F, number of mel bands (Slaney scale, Slaney area norm).
        n_fft, win_length, hop_length: Samples.
        window: A name in WINDOWS; the symmetric form.
        preemphasis: Coefficient of y[t] = x[t] - c x[t-1]; 0 for none.
        fmin, fmax: Hz, ends of the filter bank.
        log_guard: Added to the mel energies before the logarithm.
        normalize: "per_feature": mean and unbiased standard deviation of each band over the valid frames;
            "all_features": of all bands together; "none".
        pad_to: The number of frames is rounded up to a multiple of this; 0 for none.
    """

    sample_rate: int
    n_mels: int
    n_fft: int
    win_length: int
    hop_length: int
    window: str = "hann"
    preemphasis: float = 0.97
    fmin: float = 0.0
    fmax: float = 8000.0
    log_guard: float = 2.0**-24
    normalize: str = "per_feature"
    pad_to: int = 0

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise MpqError(f"features: window: expected one of {', '.join(WINDOWS)}, got {self.window!r}")
        if self.normalize not in NORMALIZATIONS:
            raise MpqError(f"features: normalize: expected one of {', '.join(NORMALIZATIONS)}, got {self.normalize!r}")


def slaney_filter_bank(options: LogMelOptions) -> Tensor:
    """Returns the (F, n_fft//2 + 1) float32 Slaney filter bank (as librosa's `filters.mel` default)."""
    from torchaudio.functional import melscale_fbanks

    bins = options.n_fft // 2 + 1
    bank: Tensor = melscale_fbanks(
        bins, options.fmin, options.fmax, options.n_mels, options.sample_rate, norm="slaney", mel_scale="slaney"
    )
    return bank.T.contiguous()


class LogMel(nn.Module):
    """The feature extractor. Its buffers `window` (win_length,) and `fb` (1, F, n_fft//2 + 1) are in the state dict."""

    window: Tensor
    fb: Tensor

    def __init__(self, options: LogMelOptions) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("window", WINDOWS[options.window](options.win_length, periodic=False))
        self.register_buffer("fb", slaney_filter_bank(options)[None])

    @property
    def min_samples(self) -> int:
        """The shortest waveform with a defined result: two frames, as a standard deviation needs."""
        return 2 * self.options.hop_length

    def lengths(self, waveform_lengths: Tensor) -> Tensor:
        """Returns the (N,) valid frames of (N,) samples: samples // hop_length."""
        return torch.div(waveform_lengths, self.options.hop_length, rounding_mode="floor")

    def forward(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features and the number of valid frames of each utterance.

        Args:
            waveforms: (N, S) float32 in [-1, 1), right-padded.
            waveform_lengths: (N,) samples.

        Returns:
            (N, T, F) float32, zero beyond the valid frames; (N,) int64, samples // hop_length. T is one frame more
            than the longest utterance has (then rounded up to pad_to), as NeMo returns it.
        """
        options = self.options
        x = waveforms.float()
        if options.preemphasis:
            x = torch.cat((x[:, :1], x[:, 1:] - options.preemphasis * x[:, :-1]), dim=1)
        x = x.masked_fill(torch.arange(x.shape[1], device=x.device) >= waveform_lengths[:, None], 0.0)
        spectrum = torch.stft(
            x,
            options.n_fft,
            options.hop_length,
            options.win_length,
            self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )  # (N, n_fft//2 + 1, T)
        energies = self.fb @ (spectrum.real.square() + spectrum.imag.square())  # (N, F, T)
        features = torch.log(energies + options.log_guard).transpose(1, 2)  # (N, T, F)
        lengths = self.lengths(waveform_lengths)
        valid = (torch.arange(features.shape[1], device=x.device) < lengths[:, None])[:, :, None]  # (N, T, 1)
        features = self._normalized(features, valid, lengths).masked_fill(~valid, 0.0)
        if options.pad_to and (excess := features.shape[1] % options.pad_to):
            features = F.pad(features, (0, 0, 0, options.pad_to - excess))
        return features, lengths

    def _normalized(self, features: Tensor, valid: Tensor, lengths: Tensor) -> Tensor:
        if self.options.normalize == "none":
            return features
        axes, count = (1, lengths) if self.options.normalize == "per_feature" else ((1, 2), lengths * features.shape[2])
        count = count[:, None, None]
        mean = features.masked_fill(~valid, 0.0).sum(axes, keepdim=True) / count.clamp(min=1)
        squares = (features - mean).masked_fill(~valid, 0.0).square()
        variance = squares.sum(axes, keepdim=True) / (count - 1).clamp(min=1)  # (a single frame has none)
        return (features - mean) / (variance.sqrt() + 1e-5)
