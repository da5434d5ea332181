"""Waveform -> three pitch features a frame, in the manner of Kaldi: how voiced, how high, rising or falling.

Speech is compared with itself a period later: the normalised cross-correlation (NCCF) of a 25 ms window with the one
that starts `lag` after it is near 1 where `lag` is a period of a voiced sound. A best path through the lags of all
frames chooses one for each, voiced or not, so that the pitch has no gaps that a recogniser would have to know of.
A ballast in the denominator makes the NCCF of quiet frames small: there the path follows its neighbours.

Source: Ghahremani, BabaAli, Povey, Riedhammer, Trmal, Khudanpur, "A pitch extraction algorithm tuned for automatic
speech recognition" (ICASSP 2014), with the constants and the formulas of Kaldi's pitch-functions.h and .cc (batch
mode, defaults of compute-and-process-kaldi-pitch-feats). Unlike Kaldi: frames are centred where
`mpq.speech.features.LogMel` centres them; no noise is added to the delta, so that the result is the same each time; the
power that scales the ballast is the whole utterance's.

Legend: N utterances, S samples, T frames, L integer lags, K lags in geometric steps; c is the NCCF on the path.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.errors import MpqError

RATE = 4000  # Hz at which the NCCF is computed
MIN_F0, MAX_F0 = 50.0, 400.0  # Hz
_CUTOFF = 1000.0  # Hz, of the low-pass filter
_WINDOW = RATE * 25 // 1000  # samples of 25 ms
_STEP = math.log(1.005)  # between neighbouring lags of the path: half a percent
_SOFT_MIN_F0 = 10.0  # Hz; prefers the shorter of two lags that are equally good
_PENALTY = 0.1  # of a change of log-pitch, per square
_BALLAST = 7000.0  # relative to the squared energy of an average window
_SILENCE = 1e-9  # the same for c, where Kaldi has none: keeps rounding errors of a silent window from being divided
_INTERPOLATION = 5  # samples on either side that an NCCF between integer lags is made of
_LAGS = range(math.ceil(RATE / MAX_F0) - _INTERPOLATION, math.floor(RATE / MIN_F0) + _INTERPOLATION + 1)  # samples
_MEAN_SECONDS = 0.75  # on either side, of the mean that is taken off the log-pitch
_DELTA_FRAMES = 2  # on either side, of the slope
_SCALES = (2.0, 2.0, 10.0)  # of the features


def pitch_features(waveforms: Tensor, lengths: Tensor, sample_rate: int, hop_length: int, frames: int) -> Tensor:
    """Returns voicing, normalised log-pitch and delta log-pitch of every frame.

    With the NCCF c and the pitch f of `pitch_track`:

    * voicing: 2 ((1.0001 - c)^0.15 - 1), from -1.5 (c = 1, voiced) to 0 (c = 0) and above: the warped NCCF is the
      lower, the more voiced;
    * normalised log-pitch: 2 (log f - m), m the mean of log f over 1.5 s around the frame (as much of it as there
      is), weighted by the probability of voicing p = 1 / (1 + exp(-r)),
      r = -5.2 + 5.4 exp(7.5 (a - 1)) + 4.8 a - 2 exp(-10 a) + 4.2 exp(20 (a - 1)), a = |c|;
    * delta: 10 times the slope of log f by regression over five frames, sum_n n (x[t+n] - x[t-n]) / (2 sum_n n^2),
      the first and last frame repeated beyond the ends.

    Args:
        waveforms: (N, S) float32, right-padded; the result does not depend on their level.
        lengths: (N,) samples.
        sample_rate: Hz, at least 4000.
        hop_length: Samples from one frame to the next; frame t is centred on sample t * hop_length.
        frames: T, at least the valid frames (samples // hop_length) of each utterance.

    Returns:
        (N, T, 3) float32, zero beyond the valid frames.

    Raises:
        MpqError: The rate is too low, or there are more valid frames than `frames`.
    """
    nccf, f0 = pitch_track(waveforms, lengths, sample_rate, hop_length, frames)
    valid_frames = lengths // hop_length
    t = torch.arange(frames, device=nccf.device)
    valid = t < valid_frames[:, None]  # (N, T)
    a = nccf.abs()
    r = -5.2 + 5.4 * (7.5 * (a - 1)).exp() + 4.8 * a - 2 * (-10 * a).exp() + 4.2 * (20 * (a - 1)).exp()
    weights = r.sigmoid().masked_fill(~valid, 0.0)
    log_f0 = f0.log()

    side = round(_MEAN_SECONDS * sample_rate / hop_length)
    sums = F.pad(torch.stack((weights * log_f0, weights)).cumsum(2), (1, 0))  # (2, N, T+1)
    first, stop = (t - side).clamp(min=0), (t + side + 1).clamp(max=frames)
    weighted, total = sums[:, :, stop] - sums[:, :, first]  # (N, T) each
    normalised = log_f0 - weighted / total.masked_fill(~valid, 1.0)

    last = (valid_frames[:, None] - 1).clamp(min=0)
    slope = torch.zeros_like(log_f0)
    for n in range(1, _DELTA_FRAMES + 1):
        after, before = torch.minimum(t + n, last), torch.minimum((t - n).clamp(min=0), last)
        slope += n * (log_f0.gather(1, after) - log_f0.gather(1, before))
    slope /= 2 * sum(n * n for n in range(1, _DELTA_FRAMES + 1))

    voicing = (1.0001 - nccf) ** 0.15 - 1
    features = torch.stack((voicing, normalised, slope), dim=2) * nccf.new_tensor(_SCALES)  # (N, T, 3)
    return features.masked_fill(~valid[:, :, None], 0.0).float()


@torch.no_grad()
def pitch_track(
    waveforms: Tensor, lengths: Tensor, sample_rate: int, hop_length: int, frames: int
) -> tuple[Tensor, Tensor]:
    """Returns the NCCF c on the best path, from -1 to 1, and the pitch f, Hz; both (N, T) float64.

    The path minimises the sum over the frames of 1 - phi (1 - 10 Hz lag) + 0.1 (log lag - log lag of the frame
    before)^2, with phi(lag) = <v_0, v_lag> / sqrt(|v_0|^2 |v_lag|^2 + ballast), v_lag the window `lag` after that of
    the frame, less the mean of v_0, and ballast = 7000 (samples of a window * variance of the utterance)^2; c is phi
    without the ballast. Arguments as in `pitch_features`; beyond the valid frames the values mean nothing.
    """
    if sample_rate < RATE:
        raise MpqError(f"pitch: expected a sample rate of at least {RATE} Hz, got {sample_rate}")
    if (most := int((lengths // hop_length).max()) if len(lengths) else 0) > frames:
        raise MpqError(f"pitch: expected room for {most} frames ({hop_length} samples each), got {frames}")
    steps = torch.arange(int(math.log(MAX_F0 / MIN_F0) / _STEP) + 1, dtype=torch.float64, device=waveforms.device)
    lags = (steps * _STEP).exp() / MAX_F0  # (K,) seconds
    if not waveforms.numel() or not frames:
        return (waveforms.new_ones(len(waveforms), frames, dtype=torch.float64),) * 2
    with_ballast, without = _nccf(*_low_passed(waveforms, lengths, sample_rate), sample_rate, hop_length, frames)
    between = _interpolation(lags)
    local = 1 - (with_ballast @ between * (1 - _SOFT_MIN_F0 * lags)).float()  # (N, T, K)
    path = _best_path(local, lengths // hop_length, (_PENALTY * (_STEP * steps) ** 2).float())  # (N, T)
    return (without * between.T[path]).sum(2).clamp(-1, 1), 1 / lags[path]


def _low_passed(waveforms: Tensor, lengths: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
    """Returns the waveforms at 4 kHz with a mean square of 1 (silence stays 0), (N, S') float64, and (N,) variances.

    The filter is Kaldi's: a sinc of 1 kHz under a Hann window of 1 ms.
    """
    from torchaudio.functional import resample  # slow to import

    def outside(x: Tensor, samples: Tensor) -> Tensor:
        return torch.arange(x.shape[1], device=x.device) >= samples[:, None]

    x = waveforms.double().masked_fill(outside(waveforms, lengths), 0.0)
    if sample_rate != RATE:
        x = resample(x, sample_rate, RATE, lowpass_filter_width=1, rolloff=2 * _CUTOFF / RATE)
    samples = -(-lengths * RATE // sample_rate)
    x = x.masked_fill(outside(x, samples), 0.0)
    count = samples.clamp(min=1)
    mean_square = x.square().sum(1) / count
    x = x / torch.where(mean_square > 0, mean_square, 1.0).sqrt()[:, None]
    return x, (x.square().sum(1) / count - (x.sum(1) / count).square()).clamp(min=0.0)


def _nccf(x: Tensor, variances: Tensor, sample_rate: int, hop_length: int, frames: int) -> tuple[Tensor, Tensor]:
    """Returns the NCCF at `_LAGS` with the ballast and without, (N, T, L) float64 each."""
    span = _WINDOW + _LAGS[-1]
    centres = (2 * RATE * hop_length * torch.arange(frames, device=x.device) + sample_rate) // (2 * sample_rate)
    x = F.pad(x, (span // 2, max(0, int(centres[-1]) + span - x.shape[1])))
    windows = x[:, centres[:, None] + torch.arange(span, device=x.device)]  # (N, T, span)
    windows = windows - windows[:, :, :_WINDOW].mean(2, keepdim=True)
    head = windows[:, :, :_WINDOW]
    later = [windows[:, :, lag : lag + _WINDOW] for lag in _LAGS]
    products = torch.stack([(head * window).sum(2) for window in later], dim=2)  # (N, T, L)
    energies = torch.stack([window.square().sum(2) for window in later], dim=2)  # (N, T, L)
    energies = energies * head.square().sum(2, keepdim=True)
    ballast = _BALLAST * (_WINDOW * variances[:, None, None]) ** 2 + _SILENCE
    return products / (energies + ballast).sqrt(), products / (energies + _SILENCE).sqrt()


def _interpolation(lags: Tensor) -> Tensor:
    """Returns the (L, K) weights that make an NCCF at `lags`, seconds, of one at `_LAGS`: a windowed sinc."""
    distance = lags * RATE - torch.tensor(_LAGS, device=lags.device)[:, None]  # (L, K) samples
    hann = 0.5 * (1 + (math.pi * distance / _INTERPOLATION).cos()) * (distance.abs() < _INTERPOLATION)
    return distance.sinc() * hann


def _best_path(local: Tensor, valid_frames: Tensor, penalty: Tensor) -> Tensor:
    """Returns the (N, T) lag indices of least cost: local cost (N, T, K) plus `penalty` (K,) by the index's change."""
    states = torch.arange(local.shape[2], device=local.device)
    change = penalty[(states[:, None] - states).abs()]  # (K, K), symmetric
    sums = local.new_empty(len(local), *change.shape)  # one for all frames: asking for memory each time is slow
    costs = [local[:, 0]]
    for t in range(1, local.shape[1]):
        best = torch.add(costs[-1][:, None], change, out=sums).amin(2)  # (N, K)
        costs.append(local[:, t] + best - best.amin(1, keepdim=True))
    path = [costs[-1].argmin(1)]
    for t in range(local.shape[1] - 2, -1, -1):
        goes_on = (t + 1 < valid_frames)[:, None]  # else the utterance ends here, or has ended
        path.append((costs[t] + change[path[-1]] * goes_on).argmin(1))
    return torch.stack(path[::-1], dim=1)
