"""Files are written with soundfile, then cut or changed byte by byte; resampling is held against SciPy."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import firwin, resample_poly

from mpq.errors import MpqError
from mpq.speech.audio import (
    AudioInfo,
    AudioReader,
    pad_batch,
    probe_audio,
    read_audio,
    resample,
    resampled_length,
    selected_samples,
)

RATE = 16000
FORMATS = {  # name -> libsndfile's format and subtype
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "sph": ("NIST", "PCM_16"),
}
LOSSLESS = ("wav", "flac", "sph")


def integers(seconds: float, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(S, C) int16: a tone with noise, and the two ends of the range."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE))[:, None] / RATE
    tone = 8000 * np.sin(2 * np.pi * (300 + 100 * np.arange(channels)) * time)
    samples = np.round(tone + 500 * generator.standard_normal(tone.shape)).astype(np.int16)
    samples[:2] = [[-32768], [32767]]
    return samples


def write(path: Path, samples: np.ndarray, rate: int = RATE, kind: str | None = None) -> Path:
    container, subtype = FORMATS[kind or path.suffix[1:]]
    soundfile.write(path, samples, rate, format=container, subtype=subtype)
    return path


def fault_of(path: Path) -> str:
    """The message with which the file is refused, which must be the same for a check and for reading."""
    with pytest.raises(MpqError) as probed:
        probe_audio(path)
    with pytest.raises(MpqError) as read:
        read_audio(path, RATE)
    assert str(probed.value) == str(read.value)
    assert str(probed.value).startswith(f"{path}: ") and "\n" not in str(probed.value)
    return str(probed.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_read(tmp_path: Path, kind: str) -> None:
    samples = integers(1.5)
    path = write(tmp_path / f"a.{kind}", samples)
    assert probe_audio(path) == AudioInfo(RATE, 1, len(samples))
    waveform = read_audio(path, RATE)
    assert waveform.dtype == torch.float32 and waveform.shape == (len(samples),)
    if kind in LOSSLESS:
        assert torch.equal(waveform, torch.from_numpy(samples[:, 0].astype(np.float32) / 32768))
        assert waveform.min() == -1 and waveform.max() == 32767 / 32768
    else:  # compressed, but in time and at the right level
        expected = samples[:, 0] / 32768
        error = np.sqrt(np.mean((waveform.numpy() - expected) ** 2) / np.mean(expected**2))
        assert error < 0.2


@pytest.mark.parametrize("kind", FORMATS)
def test_segment_is_that_part_of_the_whole(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a.{kind}", integers(3))
    whole = read_audio(path, RATE)
    part = read_audio(path, RATE, offset=1.25, duration=0.5)
    # an OPUS decoder that starts in the middle only approaches the state of one that started before (RFC 7845, 4.6)
    torch.testing.assert_close(part, whole[20000:28000], rtol=0, atol={"opus": 1e-3, "mp3": 2e-7}.get(kind, 0))
    assert torch.equal(part, read_audio(path, RATE, offset=1.25, duration=0.5))
    assert torch.equal(read_audio(path, RATE, offset=0.0), whole)
    assert torch.equal(read_audio(path, RATE, duration=0.5), read_audio(path, RATE, offset=0.0, duration=0.5))
    for rounded in (2.9, 2.999, 3.0, 3.3):  # of the whole file
        assert torch.equal(read_audio(path, RATE, duration=rounded), whole)
    assert len(read_audio(path, RATE, offset=2.5, duration=0.99)) == 8000  # past the end, as Kaldi's extract-segments
    for offset, duration in [(2.5, 1.0), (3.0, 0.1), (4.0, None), (1.0, 1e-6)]:
        with pytest.raises(MpqError, match="segment"):
            read_audio(path, RATE, offset=offset, duration=duration)


def test_long_file_is_read_block_by_block_without_a_seam(tmp_path: Path) -> None:
    samples = integers(9)  # more than two blocks
    path = write(tmp_path / "a.flac", samples)
    assert torch.equal(read_audio(path, RATE), torch.from_numpy(samples[:, 0] / np.float32(32768)))
    assert probe_audio(path).frames == len(samples)


@pytest.mark.parametrize("kind", FORMATS)
def test_channels_are_chosen(tmp_path: Path, kind: str) -> None:
    samples = integers(0.5, channels=2)
    path = write(tmp_path / f"a.{kind}", samples)
    left, right, mix = (read_audio(path, RATE, channel) for channel in ("0", "1", "mix"))
    torch.testing.assert_close(mix, (left + right) / 2, rtol=0, atol=1e-7)
    if kind in LOSSLESS:
        assert torch.equal(left, torch.from_numpy(samples[:, 0] / np.float32(32768)))
        assert torch.equal(right, torch.from_numpy(samples[:, 1] / np.float32(32768)))
    assert not torch.equal(left, right)
    with pytest.raises(MpqError, match=r"expected 1 channel, got 2; say which with --channel mix\|0\|1"):
        read_audio(path, RATE)
    with pytest.raises(MpqError, match="there is no channel 2"):
        read_audio(path, RATE, "2")
    for wrong in ("left", "-1", "", "1.0", "\u0661"):
        with pytest.raises(MpqError, match="--channel: expected error, mix or"):
            read_audio(path, RATE, wrong)
    mono = write(tmp_path / f"mono.{kind}", samples[:, :1])
    assert torch.equal(read_audio(mono, RATE, "mix"), read_audio(mono, RATE, "0"))


@pytest.mark.parametrize("fraction", [0.0, 0.002, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", FORMATS)
def test_cut_file_is_refused(tmp_path: Path, kind: str, fraction: float) -> None:
    path = write(tmp_path / f"a.{kind}", integers(20))
    data = path.read_bytes()
    path.write_bytes(data[: round(fraction * len(data))])
    assert any(words in fault_of(path) for words in ("cut short", "cut in its header", "the file is empty"))


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_ogg_is_refused_without_its_last_page(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a.{kind}", integers(20))
    data = path.read_bytes()
    for cut in (len(data) - 1, data.rfind(b"OggS") + 20, data.rfind(b"OggS") + 2, data.rfind(b"OggS")):
        path.write_bytes(data[:cut])
        assert "without its last page" in fault_of(path)


def test_wav_from_a_pipe_promises_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", integers(1))
    data = bytearray(path.read_bytes())
    for size in (0xFFFFFFFF, 0x7FFFF000, 0x80000000):
        data[40:44] = size.to_bytes(4, "little")
        path.write_bytes(data)
        assert probe_audio(path).frames == RATE
    data[40:44] = (64000).to_bytes(4, "little")
    path.write_bytes(data)
    assert "expected 2.00 s as it says itself, and it can be read up to 1.00 s" in fault_of(path)


def test_damaged_flac_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", integers(9))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 100] = bytes(100)
    path.write_bytes(data)
    assert "cut short or damaged: expected 9.00 s" in fault_of(path)


def test_flac_without_a_length_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", integers(9))
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # STREAMINFO's 36 bits of total samples
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert "header has no length" in fault_of(path)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_mp3_of_variable_bitrate_without_its_header_is_refused(tmp_path: Path, rate: int) -> None:
    """libsndfile would return about half of it: as much as the bitrate of the first frame suggests."""
    samples = np.random.default_rng(0).standard_normal(10 * rate) * 0.1
    samples[: len(samples) // 2] *= 0.001
    path = write(tmp_path / "a.mp3", samples, rate)
    data, tag = path.read_bytes(), b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128)
    without_header = data[data.find(data[:2], 4) :]  # the first frame holds the Xing header
    for content in (data, tag + data):
        path.write_bytes(content)
        assert probe_audio(path).frames == len(samples)
    for content in (without_header, tag + without_header):
        path.write_bytes(content)
        assert soundfile.info(path).frames < 0.6 * len(samples)
        assert "cut short" in fault_of(path)
    soundfile.write(path, samples, rate, bitrate_mode="CONSTANT", compression_level=0.5)
    data = path.read_bytes()
    path.write_bytes(data[data.find(data[:2], 4) :])  # without a header too, but its length follows from its size
    assert probe_audio(path).frames >= len(samples)


def test_a_short_mp3_without_its_header_is_refused(tmp_path: Path) -> None:
    """At 8 kHz what encoders pad a file by is longer than a word, but a file without a Xing header is not trimmed."""
    samples = np.random.default_rng(0).standard_normal(8000) * 0.1
    path = write(tmp_path / "a.mp3", samples, 8000)
    data = path.read_bytes()
    path.write_bytes(data[data.find(data[:2], 4) :])
    assert soundfile.info(path).frames < len(samples) - 2000
    assert "cut short" in fault_of(path)


@pytest.mark.parametrize("kind", ["mp3", "ogg", "opus", "flac"])
@pytest.mark.parametrize("between", [b"", b"ID3\x04\0\0\0\0\0\x05title"])
def test_files_put_end_to_end_are_refused(tmp_path: Path, kind: str, between: bytes) -> None:
    path = write(tmp_path / f"a.{kind}", integers(1.5), 8000 if kind == "mp3" else RATE)
    first, second = path.read_bytes(), write(tmp_path / f"b.{kind}", integers(0.5), 8000 if kind == "mp3" else RATE)
    probe_audio(path)
    path.write_bytes(first + between + second.read_bytes())
    assert any(words in fault_of(path) for words in ("files put end to end", "cut short"))
    with pytest.raises(MpqError, match=r"end to end|cut short"):
        read_audio(path, RATE)


@pytest.mark.parametrize("kind", ["wav", "sph", "ogg"])
def test_file_of_no_samples_is_refused(tmp_path: Path, kind: str) -> None:
    assert fault_of(write(tmp_path / f"a.{kind}", np.zeros((0, 1), np.int16))) == "no samples (zero length)"


def test_what_is_no_audio_is_refused(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "missing.wav") == fault_of(tmp_path / ("long" * 100)) == "no such file"
    assert "a folder" in fault_of(tmp_path)
    for name, content, words in [
        ("text.wav", b"hello" * 100, "not audio that libsndfile reads"),
        ("samples.raw", bytes(1000), "raw samples without a header"),
        ("empty.flac", b"", "the file is empty"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert words in fault_of(tmp_path / name)


@pytest.mark.parametrize(("value", "words"), [(np.nan, "not finite"), (np.inf, "not finite"), (-20000.0, "got 20000")])
def test_float_samples_must_be_finite_and_scaled(tmp_path: Path, value: float, words: str) -> None:
    samples = np.zeros(5 * RATE, np.float32)
    samples[-8000] = value
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    assert words in fault_of(path) and "at 4.500 s" in fault_of(path)
    samples[-8000] = 1.5  # an overshoot is left as it is
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    assert torch.equal(read_audio(path, RATE), torch.from_numpy(samples))


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000])
def test_resampling_agrees_with_scipy_and_the_tone_itself(rate: int) -> None:
    common = math.gcd(rate, RATE)
    frequency = 0.85 * min(rate, RATE) / 2
    tone = np.sin(2 * np.pi * frequency * np.arange(rate) / rate)
    result = resample(torch.from_numpy(tone.astype(np.float32)), rate, RATE).numpy()
    up, down = RATE // common, rate // common
    taps = firwin(2 * 100 * max(up, down) + 1, 0.96 / max(up, down), window=("kaiser", 9.0))
    witness = resample_poly(tone, up, down, window=taps)
    middle = slice(RATE // 10, -RATE // 10)
    assert len(result) == len(witness) == RATE
    assert np.abs(result - witness)[middle].max() < 5e-4
    assert np.abs(result - np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE))[middle].max() < 2e-4
    if rate > RATE:  # a tone that 16 kHz cannot hold must not fold down
        above = np.sin(2 * np.pi * 8800 * np.arange(rate) / rate).astype(np.float32)
        assert np.abs(resample(torch.from_numpy(above), rate, RATE).numpy()[middle]).max() < 1e-3


@settings(deadline=None)  # the first call imports torchaudio
@given(st.integers(1, 3000), st.sampled_from([8000, 11025, 16000, 44100, 48000]), st.sampled_from([8000, 16000]))
def test_resampled_length_is_the_length_of_the_result(samples: int, rate: int, sample_rate: int) -> None:
    result = resample(torch.ones(samples), rate, sample_rate)
    assert result.shape == (resampled_length(samples, rate, sample_rate),)
    assert resampled_length(samples, rate, sample_rate) == math.ceil(samples * sample_rate / rate)


def test_other_rates_are_resampled_when_read(tmp_path: Path) -> None:
    samples = integers(1.001)
    path = write(tmp_path / "a.wav", samples, rate=44100)
    expected = resample(torch.from_numpy(samples[:, 0] / np.float32(32768)), 44100, RATE)
    assert torch.equal(read_audio(path, RATE), expected)
    info = probe_audio(path)
    assert selected_samples(path, info, RATE, "error", None, None) == len(expected)
    assert (
        selected_samples(path, info, RATE, "error", 0.1, 0.1) == len(read_audio(path, RATE, "error", 0.1, 0.1)) == 1600
    )


def test_rates_without_a_small_ratio_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", integers(0.1), rate=16001)
    with pytest.raises(MpqError, match="16001 Hz has no small common ratio with the model's 16000 Hz"):
        read_audio(path, RATE)
    for rate in (8000, 11025, 22050, 32000, 44056, 44100, 48000, 96000, 192000):
        assert selected_samples(path, AudioInfo(rate, 1, rate), RATE, "error", None, None) == RATE


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("rate", [RATE, RATE // 2])
def test_a_reader_gives_the_very_samples_again_without_reading(tmp_path: Path, rate: int, subtype: str) -> None:
    """Down to the bit pattern, the ends of the 16-bit range and samples beyond them included."""
    samples = integers(0.2, channels=2) / 32768 * (2.0 if subtype == "FLOAT" else 1.0)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype=subtype)
    reader = AudioReader(RATE, "1")
    segments = [(None, None), (0.05, None), (0.05, 0.1)]
    expected = [read_audio(tmp_path / "a.wav", RATE, "1", *segment) for segment in segments]
    for there in (True, False):
        for segment, waveform in zip(segments, expected, strict=True):
            found = reader.read(tmp_path / "a.wav", *segment)
            assert found.dtype == torch.float32
            assert torch.equal(found.view(torch.int32), waveform.view(torch.int32))
        if there:
            (tmp_path / "a.wav").unlink()


def test_a_reader_keeps_what_was_asked_for_last(tmp_path: Path) -> None:
    """Room for two of three: 1000 samples of 16 bits are 2000 bytes; and for none."""
    paths = [write(tmp_path / f"{name}.wav", integers(1000 / RATE)) for name in "abc"]
    reader, nothing = AudioReader(RATE, "error", kept_bytes=4999), AudioReader(RATE, "error", kept_bytes=0)
    for path in (paths[0], paths[1], paths[0], paths[2]):  # 1 goes, not 0
        assert torch.equal(reader.read(path), read_audio(path, RATE))
        assert torch.equal(nothing.read(path), read_audio(path, RATE))
    for path in paths:
        path.unlink()
    reader.read(paths[0]), reader.read(paths[2])
    with pytest.raises(MpqError, match=r"b\.wav: no such file"):
        reader.read(paths[1])
    with pytest.raises(MpqError, match=r"c\.wav: no such file"):
        nothing.read(paths[2])


def test_pad_batch() -> None:
    batch, lengths = pad_batch([torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 5.0, 6.0])])
    assert torch.equal(batch, torch.tensor([[1.0, 2, 0], [3, 0, 0], [4, 5, 6]]))
    assert torch.equal(lengths, torch.tensor([2, 1, 3])) and lengths.dtype == torch.int64
    batch, lengths = pad_batch([torch.tensor([1.0])])
    assert batch.shape == (1, 1) and lengths.tolist() == [1]


def test_real_speech_is_whole(shared: Path) -> None:
    path = shared / "data/read_speech/kathleen/wav/arctic_a0010_1592748378.flac"
    expected, rate = soundfile.read(path, dtype="int16")
    assert probe_audio(path) == AudioInfo(rate, 1, len(expected))
    assert torch.equal(read_audio(path, rate), torch.from_numpy(expected / np.float32(32768)))
