"""Audio files to waveforms: read whole and right, or refused.

soundfile (libsndfile) decodes WAV, FLAC, OGG Vorbis, OPUS, MP3 and SPH; torchaudio resamples. libsndfile is silent
about most damage: of a WAV, SPH, OGG or OPUS file that was cut it returns what is left, and of an MP3 with a variable
bitrate and no Xing header it returns as much as the first frame's bitrate suggests (46 % of one of the test files); of
Ogg or FLAC files that were put end to end it returns the first.
So the length that a file claims is compared with what can be read, for every read. Some damage is not found: a cut of
less than `TOLERANCE_SECONDS`, a cut MP3 without a Xing header, damage inside an OGG or OPUS file (the decoder
resynchronizes). The duration in the manifest guards against these.

Legend: N utterances, S samples, C channels; a frame is one sample of every channel.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from mpq.errors import MpqError
from mpq.files import file_start, foreign_content

TOLERANCE_SECONDS = 0.1  # a file may fall short of its header or the manifest by so much
OVERSHOOT_SECONDS = 0.5  # a segment that ends less than this after its recording is cut, as by Kaldi's extract-segments
MAX_PEAK = 8.0  # float samples above this are integers that nobody scaled; a decoder's overshoot stays below 2
_BLOCK_FRAMES = 1 << 16  # bounds the memory of a check, whatever the file's length
_MAX_KERNEL = 50_000_000  # numbers in a resampling kernel, 400 MB while torchaudio builds it
# torchaudio's default of 6 leaves an error of -17 dB at 85 % of the Nyquist frequency; 64 leaves -83 dB there, and
# -63 dB of aliasing 5 % above it. (Its Kaiser window has less aliasing, and loses everything above 90 %.)
_LOWPASS_FILTER_WIDTH = 64
_KEPT_BYTES = 1 << 29  # of a reader: 9 h of 16 bits at 8 kHz
_REWRITE = "copy the file again, or write it anew (ffmpeg -i OLD NEW.flac)"


@dataclass(frozen=True)
class AudioInfo:
    """The format and length of an audio file.

    Attributes:
        sample_rate: Hz.
        channels: C.
        frames: Samples per channel.
    """

    sample_rate: int
    channels: int
    frames: int


def probe_audio(path: Path, decode: bool = True) -> AudioInfo:
    """Returns the format and length of an audio file.

    Args:
        path: The file.
        decode: Decode all of it; else its header is believed, as far as the size of the file does not contradict it.

    Raises:
        MpqError: The file is missing, not audio, cut short, damaged or without a sample, or has samples that are not
            finite or above `MAX_PEAK`.
    """
    with _open(Path(path), is_read=decode) as file:
        frames = sum(len(block) for block in _decode(path, file, 0, file.frames)) if decode else file.frames
        return AudioInfo(file.samplerate, file.channels, frames)


def read_audio(
    path: Path, sample_rate: int, channel: str = "error", offset: float | None = None, duration: float | None = None
) -> torch.Tensor:
    """Returns a waveform of one channel at the rate asked for.

    16-bit PCM comes out as exactly integer / 32768 where the rates agree; other rates go through
    `torchaudio.functional.resample` (a Hann-windowed sinc of 64 zero crossings, rolloff 0.99). Lossy formats and
    resampling can overshoot 1.0 a little; nothing is clipped.

    Args:
        path: The file.
        sample_rate: The rate of the result, Hz.
        channel: "error" (more than one channel is refused), "mix" (their mean), or a channel's number from "0".
        offset: The start of the segment, seconds; None is 0.
        duration: The length of the segment, seconds; None is up to the end. Without an offset, a file that is at most
            `TOLERANCE_SECONDS` longer, or shorter, is read whole: durations are rounded.

    Returns:
        (S,) float32 in [-1, 1); see `selected_samples` for S.

    Raises:
        MpqError: As for `probe_audio` and `selected_samples`.
    """
    path = Path(path)
    with _open(path) as file:
        info = AudioInfo(file.samplerate, file.channels, file.frames)
        selected_samples(path, info, sample_rate, channel, offset, duration)
        start, stop = _segment(path, info, offset, duration)
        frames = np.concatenate(list(_decode(path, file, start, stop)))  # (S, C)
    if channel == "mix":
        waveform = frames.mean(axis=1, dtype=np.float32)  # (S,)
    else:
        waveform = np.ascontiguousarray(frames[:, 0 if channel == "error" else int(channel)])  # (S,)
    return resample(torch.from_numpy(waveform), info.sample_rate, sample_rate)


class AudioReader:
    """A reader of audio that keeps the segments that were asked for last, so that they are not decoded again.

    It keeps 16-bit integers where they give back the waveform bit for bit (16-bit files at their own rate), else the
    waveform.

    Args:
        sample_rate, channel: The rate of the waveforms in Hz, and their channel, as in `read_audio`.
        kept_bytes: The most bytes that are kept.
    """

    def __init__(self, sample_rate: int, channel: str, kept_bytes: int = _KEPT_BYTES) -> None:
        self.sample_rate, self.channel, self._room = sample_rate, channel, kept_bytes
        self._kept: dict[tuple[object, ...], torch.Tensor] = {}  # the last one was asked for last

    def read(
        self, path: Path, offset: float | None = None, duration: float | None = None, channel: str | None = None
    ) -> torch.Tensor:
        """Returns a waveform (S,) as `read_audio` does (channel None: the reader's); not to be changed in place."""
        key = (path, offset, duration, channel)
        samples = self._kept.pop(key, None)
        if samples is None:
            samples = _compact(read_audio(path, self.sample_rate, channel or self.channel, offset, duration))
            self._room -= samples.nbytes
        self._kept[key] = samples
        while self._room < 0:
            self._room += self._kept.pop(next(iter(self._kept))).nbytes
        return samples / 32768 if samples.dtype == torch.int16 else samples


def _compact(waveform: torch.Tensor) -> torch.Tensor:
    """Returns a waveform (S,) as 16-bit integers if these divided by 32768 are exactly the waveform; else as it is."""
    integers = (waveform * 32768).to(torch.int16)
    return integers if torch.equal(integers / 32768, waveform) else waveform


def selected_samples(
    path: Path, info: AudioInfo, sample_rate: int, channel: str, offset: float | None, duration: float | None
) -> int:
    """Returns how many samples `read_audio` returns with the same arguments, reading nothing.

    A segment may run past the end of the file by less than `OVERSHOOT_SECONDS`, and is shorter by as much then.

    Raises:
        MpqError: The channel cannot be chosen, the segment is not within the file, or the two rates have no small
            common ratio.
    """
    check_channel(channel)
    if channel == "error" and info.channels > 1:
        raise MpqError(f"{path}: expected 1 channel, got {info.channels}; say which with --channel mix|0|1")
    if channel.isdigit() and int(channel) >= info.channels:
        raise MpqError(f"{path}: there is no channel {channel}, the file has {info.channels} (counted from 0)")
    common = math.gcd(info.sample_rate, sample_rate)
    # torchaudio's kernel has a filter for each of the output's phases
    phases, period = sample_rate // common, info.sample_rate // common
    if phases * (period + 2 * _LOWPASS_FILTER_WIDTH * max(1, period // phases)) > _MAX_KERNEL:
        raise MpqError(
            f"{path}: {info.sample_rate} Hz has no small common ratio with the model's {sample_rate} Hz; "
            f"resample the file first (ffmpeg -i OLD -ar {sample_rate} NEW.flac)"
        )
    start, stop = _segment(path, info, offset, duration)
    return resampled_length(stop - start, info.sample_rate, sample_rate)


def check_channel(channel: str) -> None:
    """Raises MpqError unless `channel` is "error", "mix" or a number."""
    if not re.fullmatch(r"error|mix|[0-9]+", channel):
        raise MpqError(f"--channel: expected error, mix or a channel's number from 0, got {channel!r}")


def resample(waveform: torch.Tensor, rate: int, sample_rate: int) -> torch.Tensor:
    """Returns a waveform (S,) of `rate` Hz at `sample_rate` Hz: `resampled_length` samples."""
    if rate == sample_rate:
        return waveform
    from torchaudio.functional import resample as sinc_resample  # slow to import, and most data needs none

    # torchaudio rounds the length in float32, which is off beyond 2^24 samples; a second of the silence that it
    # assumes after the end anyway leaves enough to cut from.
    padded = torch.nn.functional.pad(waveform, (0, rate))
    resampled = sinc_resample(padded, rate, sample_rate, lowpass_filter_width=_LOWPASS_FILTER_WIDTH)
    cut: torch.Tensor = resampled[: resampled_length(len(waveform), rate, sample_rate)]
    return cut.contiguous()


def resampled_length(samples: int, rate: int, sample_rate: int) -> int:
    """Returns ceil(samples * sample_rate / rate): the samples that resampling yields, as torchaudio counts them."""
    return -(-samples * sample_rate // rate)


def pad_batch(waveforms: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns waveforms (S,) as one batch (N, S), zeros after the shorter ones, and their lengths (N,) int64."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), lengths


def _segment(path: Path, info: AudioInfo, offset: float | None, duration: float | None) -> tuple[int, int]:
    """Returns the first frame of a segment and the one after its last, at the file's own rate."""
    if offset is None:
        if duration is None or info.frames <= (duration + TOLERANCE_SECONDS) * info.sample_rate:
            return 0, info.frames
        offset = 0.0
    start = round(offset * info.sample_rate)
    stop = info.frames if duration is None else round((offset + duration) * info.sample_rate)
    if start >= info.frames or stop >= info.frames + OVERSHOOT_SECONDS * info.sample_rate:
        segment = f"{offset:g} s to " + ("the end" if duration is None else f"{offset + duration:g} s")
        raise MpqError(f"{path}: the segment {segment} is not within the {info.frames / info.sample_rate:.2f} s of it")
    if stop <= start:
        raise MpqError(f"{path}: the segment from {offset:g} s has no samples")
    return start, min(stop, info.frames)


@contextmanager
def _open(path: Path, is_read: bool = True) -> Iterator[soundfile.SoundFile]:
    """Yields an audio file that has samples, and all that its header promises as far as that shows without decoding.

    Args:
        path: The file.
        is_read: Whether all bytes may be looked at, for another file that was put behind the first.
    """
    if not os.path.exists(path):  # unlike Path.exists, also for a name that is too long
        raise MpqError(f"{path}: no such file")
    if not path.is_file():
        raise MpqError(f"{path}: expected an audio file, got a folder or a device")
    try:
        with open(path, "rb") as raw:
            if not raw.read(1):
                raise MpqError(f"{path}: the file is empty (0 bytes); {_REWRITE}")
        file = soundfile.SoundFile(path)
    except OSError as error:
        raise MpqError(f"{path}: cannot be read: {error.strerror or error}") from error
    except TypeError:  # soundfile's answer to the name *.raw
        raise MpqError(f"{path}: raw samples without a header; write a WAV or FLAC file of them") from None
    except soundfile.LibsndfileError as error:
        if what := foreign_content(file_start(path)):
            raise MpqError(f"{path}: expected audio, got {what}") from None
        raise MpqError(
            f"{path}: not audio that libsndfile reads, or cut in its header ({error.error_string.rstrip('.')}); "
            f"expected WAV, FLAC, OGG, OPUS, MP3 or SPH: convert it, or {_REWRITE}"
        ) from None
    with file:
        if file.frames >= 1 << 62:  # libsndfile cannot seek in such a file, and soundfile seeks after each read
            raise MpqError(f"{path}: a {file.format} file whose header has no length; {_REWRITE}")
        claimed = _claimed_frames(path, file)
        if claimed > file.frames + TOLERANCE_SECONDS * file.samplerate:
            raise _cut(path, file, file.frames, claimed)
        if file.format == "OGG" and _is_ogg_cut(path):
            raise MpqError(
                f"{path}: cut short: the stream ends after {file.frames / file.samplerate:.2f} s "
                f"without its last page; {_REWRITE}"
            )
        if file.frames == 0:
            raise MpqError(f"{path}: no samples (zero length)")
        if is_read and _is_chained(path, file):
            raise MpqError(
                f"{path}: several {file.format} files put end to end, of which only the first "
                f"{file.frames / file.samplerate:.2f} s can be read; {_REWRITE}"
            )
        yield file


def _decode(path: Path, file: soundfile.SoundFile, start: int, stop: int) -> Iterator[np.ndarray]:
    """Yields the frames from `start` to `stop` as blocks (S, C) float32; raises MpqError where they are not right."""
    position = start
    try:
        file.seek(start)
        while position < stop:
            block = file.read(min(_BLOCK_FRAMES, stop - position), dtype="float32", always_2d=True)  # (S, C)
            if not len(block):
                break
            peak = np.abs(block).max()
            if not peak <= MAX_PEAK:  # NaN too
                index = int(np.argmin((np.abs(block) <= MAX_PEAK).all(axis=1)))
                seconds = (position + index) / file.samplerate
                if not np.isfinite(peak):
                    raise MpqError(f"{path}: a sample that is not finite, at {seconds:.3f} s; write the file anew")
                raise MpqError(
                    f"{path}: expected float samples from -1 to 1, got {np.abs(block[index]).max():g} at "
                    f"{seconds:.3f} s; divide them by full scale (32768 for 16 bits)"
                )
            position += len(block)
            yield block
    except soundfile.SoundFileError:
        raise _cut(path, file, position, file.frames) from None
    if stop - position > TOLERANCE_SECONDS * file.samplerate:
        raise _cut(path, file, position, file.frames)


def _cut(path: Path, file: soundfile.SoundFile, frames: int, claimed: int) -> MpqError:
    return MpqError(
        f"{path}: cut short or damaged: expected {claimed / file.samplerate:.2f} s as it says itself, and it can be "
        f"read up to {frames / file.samplerate:.2f} s; {_REWRITE}"
    )


def _claimed_frames(path: Path, file: soundfile.SoundFile) -> int:
    """Returns the frames that the file itself says it has, where libsndfile replaces that by what it finds; else 0.

    WAV, AIFF and AU: the size of the data chunk, from libsndfile's log ("data : 64000 (should be 31978)"). Programs
    that write to a pipe do not know it and put down one near 2^31 or 2^32, which promises nothing. SPH: sample_count.
    MP3: see `_mp3_frames`.
    """
    if file.subtype == "MPEG_LAYER_III":
        return _mp3_frames(path.read_bytes())
    if file.format == "NIST":
        with open(path, "rb") as raw:
            count = re.search(rb"sample_count -i (\d+)", raw.read(1024))
        return int(count[1]) if count else 0
    size = re.search(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if size and int(size[2]) and int(size[1]) < 0x7FFF0000:
        return int(file.frames) * int(size[1]) // int(size[2])
    return 0


def _is_ogg_cut(path: Path) -> bool:
    """Returns whether an Ogg stream's last page is cut, or lacks the flag of a last page (RFC 3533, section 6)."""
    largest_page = 27 + 255 + 255 * 255
    with open(path, "rb") as raw:
        raw.seek(max(0, path.stat().st_size - largest_page))
        tail = raw.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _is_chained(path: Path, file: soundfile.SoundFile) -> bool:
    """Returns whether another Ogg or FLAC stream begins after the first (RFC 3533, section 4; RFC 9639, section 8)."""
    if file.format == "FLAC":
        return len(re.findall(rb"fLaC[\0\x80]\0\0\x22", path.read_bytes())) > 1
    if file.format != "OGG":
        return False
    firsts = [bool(flags[0] & 2) for flags in re.findall(rb"OggS\0([\0-\x07])", path.read_bytes())]
    return True in firsts[firsts.index(False) :] if False in firsts else False


_MP3_KBITS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG 1
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2, and 2.5
}
_MP3_PADDING = 5000  # the most frames that an encoder adds before and after the audio, with room to spare


def _mp3_frames(data: bytes) -> int:
    """Returns the audio that an MP3 file's chain of frame headers holds at least, less what decoders leave out of it.

    That is what encoders pad it by, where a Xing header in the first frame says how long it is; else a frame. The
    header's fields and the length of a frame are those of ISO/IEC 11172-3 (2.4.2.3) for layer III.
    """
    position, frames, samples, count = 0, 0, 0, 0
    promised = -1  # frames after the first
    while position + 4 <= len(data):
        if data[position : position + 3] == b"ID3":  # its size is four times seven bits
            size = zip(data[position + 6 : position + 10], (21, 14, 7, 0), strict=False)
            position += 10 + sum((byte & 0x7F) << shift for byte, shift in size)
            continue
        if data[position : position + 3] == b"TAG":
            position += 128
            continue
        sync, version, layer = data[position : position + 2], data[position + 1] >> 3 & 3, data[position + 1] >> 1 & 3
        bitrate, rate = data[position + 2] >> 4, data[position + 2] >> 2 & 3
        if sync[0] != 0xFF or sync[1] < 0xE0 or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
            break
        hertz = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
        samples = 1152 if version == 3 else 576
        if not count and (
            tag := re.search(
                rb"(?:Xing|Info)...[\x01\x03\x05\x07-\x0f](.{4})", data[position : position + 64], re.DOTALL
            )
        ):
            promised = int.from_bytes(tag[1], "big")
        count += 1
        bits = 1000 * _MP3_KBITS[3 if version == 3 else 2][bitrate]
        position += samples // 8 * bits // hertz + (data[position + 2] >> 1 & 1)
        frames += samples
    return frames - (_MP3_PADDING if count <= promised + 2 else samples)
