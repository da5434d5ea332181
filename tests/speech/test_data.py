"""Data with faults of every kind; batches and subsets are held to their rules by hypothesis."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq.errors import MpqError
from mpq.speech.audio import AudioReader, read_audio
from mpq.speech.data import CheckedData, batches, calibration_subset, check_data, read_batch, require_good
from mpq.speech.manifests import Fault, Utterance, read_data
from mpq.speech.text import CharTokenizer, train_tokenizer

RATE = 16000
LETTERS = CharTokenizer(" abcdefghijklmnopqrstuvwxyz'").missing


def audio(path: Path, seconds: float = 1.0, channels: int = 1, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).standard_normal((round(seconds * rate), channels)) * 1000
    soundfile.write(path, noise.astype(np.int16), rate)
    return path


def utterance(utt_id: str, path: Path = Path("a.wav"), **fields: Any) -> Utterance:
    return replace(Utterance(utt_id, path, "a b", None, None, None, f"dev.jsonl:{utt_id}"), **fields)


def test_check_measures_what_will_be_read(tmp_path: Path) -> None:
    long = audio(tmp_path / "a.flac", 3.0)
    utterances = [
        utterance("whole", long, duration=3.04),
        utterance("part", long, offset=0.5, duration=1.25),
        utterance("rest", long, offset=1.0),
        utterance("past the end", long, offset=2.5, duration=0.55),
        utterance("other rate", audio(tmp_path / "b.wav", 1.0001, rate=44100)),
        utterance("stereo", audio(tmp_path / "c.wav", 0.5, channels=2)),
    ]
    checked = check_data(utterances, sample_rate=RATE, channel="mix", missing=LETTERS, need_text=True)
    assert checked == CheckedData(tuple(utterances), (3.0, 1.25, 2.0, 0.5, 16002 / RATE, 0.5), (), 0)
    for one, seconds in zip(checked.utterances, checked.durations, strict=True):
        assert len(read_audio(one.audio_path, RATE, "mix", one.offset, one.duration)) == round(seconds * RATE)
    assert require_good(checked) is checked


def test_all_faults_of_the_data_are_reported_at_once(tmp_path: Path) -> None:
    good = audio(tmp_path / "good.wav", 2.0)
    cut = audio(tmp_path / "cut.flac", 2.0)
    cut.write_bytes(cut.read_bytes()[:-9000])
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    utterances = [
        utterance("1", good),
        utterance("2", tmp_path / "missing.wav", text="na\u00efve 7"),
        utterance("3", cut),
        utterance("4", audio(tmp_path / "zero.wav", 0)),
        utterance("5", audio(tmp_path / "short.wav", 0.0249)),
        utterance("6", audio(tmp_path / "stereo.wav", channels=2)),
        utterance("7", tmp_path / "nan.wav"),
        utterance("8", good, duration=2.2),
        utterance("9", good, offset=1.5, duration=1.0),
        utterance("10", good, text=None),
        utterance("11", good, text="tab\there"),
        utterance("12", good, text=""),
    ]
    options = {"sample_rate": RATE, "min_samples": 400, "missing": LETTERS, "need_text": True}
    checked = check_data(utterances, **options)
    expected = [
        ("2", "missing.wav: no such file"),
        ("2", "what the vocabulary lacks: '\u00ef' (U+00EF), '7' (U+0037); "),
        ("3", "cut.flac: cut short or damaged"),
        ("4", "zero.wav: no samples"),
        ("5", "short.wav: too short: expected at least 0.025 s (400 samples at 16000 Hz), got 0.025 s (398)"),
        ("6", "stereo.wav: expected 1 channel, got 2; say which with --channel mix|0|1"),
        ("7", "nan.wav: a sample that is not finite"),
        ("8", "good.wav: cut short: expected 2.20 s as its line says, got 2.00 s"),
        ("9", "good.wav: the segment 1.5 s to 2.5 s is not within"),
        ("10", '"10" has no text'),
        ("11", "lacks: '\\t' (U+0009)"),
    ]
    assert len(checked.faults) == len(expected)
    for fault, (number, words) in zip(checked.faults, expected, strict=True):
        assert fault.startswith(f"dev.jsonl:{number}: ") and words in fault
    assert [u.utt_id for u in checked.utterances] == ["1", "12"]
    assert checked.durations == (2.0, 2.0) and checked.skipped == 10
    with pytest.raises(MpqError) as error:
        require_good(checked)
    assert str(error.value).split("\n")[:-1] == list(checked.faults)
    assert str(error.value).endswith(
        "\n10 of 12 utterances cannot be used; mend them, or leave them out with --skip-bad"
    )
    assert require_good(checked, skip_bad=True) is checked
    assert check_data([utterances[9]], sample_rate=RATE, missing=LETTERS).faults == ()


def test_faults_of_lines_and_of_audio_are_one_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = audio(tmp_path / "good.wav", 2.0)
    lines = [
        Fault("dev.jsonl:5", "no JSON", "expected a JSON object"),
        Fault("dev.jsonl:6", "text", "expected a string"),
    ]
    utterances = [utterance("1", good), utterance("2", tmp_path / "gone.wav"), utterance("3", good, text="7")]
    checked = check_data(utterances, sample_rate=RATE, missing=LETTERS, need_text=True, lines=lines)
    assert [fault.split(": ")[0] for fault in checked.faults] == [f"dev.jsonl:{n}" for n in (5, 6, 2, 3)]
    with pytest.raises(MpqError, match="4 of 5 utterances cannot be used"):
        require_good(checked)
    assert require_good(checked, skip_bad=True).skipped == 4
    assert caplog.messages == [
        "4 of 5 utterances are left out (no JSON: 1, text: 1, no such audio file: 1, text that the vocabulary lacks: 1)"
    ]


def test_what_is_read_otherwise_than_one_may_think_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = audio(tmp_path / "long.wav", 3.0)
    utterances = [
        utterance("1", long, duration=1.0),
        utterance("2", long, duration=2.0),
        utterance("3", long, duration=2.95),
        utterance("4", long, offset=2.0, duration=1.3),
        utterance("5", long, offset=1.0, duration=1.0),
    ]
    checked = check_data(utterances, sample_rate=RATE)
    assert checked.durations == (1.0, 2.0, 3.0, 1.0, 1.0)
    require_good(checked)
    assert caplog.messages == [
        "2 utterances: no offset, and a duration that is shorter than the file: only that much is read from 0 s (the "
        f"first is dev.jsonl:1: 1.00 s of the 3.00 s of {long})",
        "1 utterances: the segment ends after its recording, and is cut there (the first is dev.jsonl:4: 0.30 s)",
    ]


def test_each_line_may_choose_its_channel(tmp_path: Path) -> None:
    stereo = audio(tmp_path / "a.wav", channels=2)
    chosen = [utterance(str(n), stereo, channel=one) for n, one in enumerate(("1", "mix", "0", "2", None))]
    checked = check_data(chosen, sample_rate=RATE)
    assert checked.utterances == tuple(chosen[:3]) and len(checked.faults) == 2
    waveforms, _ = read_batch(checked.utterances, RATE)
    reader = AudioReader(RATE, "error")
    for one, waveform in zip(checked.utterances, waveforms, strict=True):
        assert torch.equal(waveform, read_audio(stereo, RATE, one.channel or ""))
        assert torch.equal(waveform, reader.read(stereo, channel=one.channel))


def test_the_text_that_was_checked_is_the_text_that_is_scored(tmp_path: Path) -> None:
    good = audio(tmp_path / "good.wav")
    model = train_tokenizer("bpe", ["a fine day", "the end of it"], 30)
    texts = ["a\u00a0fine\u3000day", "\uff46\uff49ne", "\ufb01ne", "a  fine day", "THE", "fine\uff5b", "na\u00efve"]
    utterances = [utterance(str(n), good, text=text) for n, text in enumerate(texts)]
    checked = check_data(utterances, sample_rate=RATE, missing=model.missing, spelled=model.spelled, need_text=True)
    assert [one.text for one in checked.utterances] == ["a fine day", "fine", "fine", "a  fine day"]
    assert [fault.split(": ")[0] for fault in checked.faults] == [f"dev.jsonl:{n}" for n in (4, 5, 6)]
    assert "(the first is dev.jsonl:0: 'a fine day')" in checked.notes[0] and checked.notes[0].startswith("3 utt")
    words = train_tokenizer("words", ["a fine day"])
    checked = check_data(utterances[:1], sample_rate=RATE, spelled=words.spelled, need_text=True)
    assert checked.utterances[0].text == "a fine day"


def test_nothing_left_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    many = [utterance(str(n), tmp_path / f"{n}.wav") for n in range(30)]
    checked = check_data(many, sample_rate=RATE)
    with pytest.raises(MpqError) as error:
        require_good(checked, skip_bad=True)
    lines = str(error.value).split("\n")
    assert len(lines) == 22 and lines[20] == "and 10 more faults"
    assert lines[21] == "30 of 30 utterances cannot be used; mend them"
    with pytest.raises(MpqError, match="no utterances"):
        require_good(check_data([], sample_rate=RATE))
    with pytest.raises(MpqError, match="--channel"):
        check_data(many, sample_rate=RATE, channel="left")


ids = st.lists(st.text("abcdef", min_size=1, max_size=4), unique=True, max_size=30)


@given(ids, st.data(), st.floats(0.5, 60))
def test_batches_hold_to_their_rules(utt_ids: list[str], data: st.DataObject, max_seconds: float) -> None:
    seconds = {u: data.draw(st.sampled_from([0.5, 1.0, 1.1, 7.3, 30.0]) | st.floats(0.01, 40)) for u in utt_ids}
    utterances = [utterance(u) for u in utt_ids]
    result = batches(utterances, list(seconds.values()), max_seconds)
    flat = [u.utt_id for batch in result for u in batch]
    assert flat == sorted(utt_ids, key=lambda u: (-seconds[u], u))
    for batch in result:
        longest = max(seconds[u.utt_id] for u in batch)
        assert len(batch) == 1 or longest * len(batch) <= max_seconds
        assert batch is result[-1] or longest * (len(batch) + 1) > max_seconds  # no batch is closed early
    order = data.draw(st.permutations(utterances))
    assert batches(order, [seconds[u.utt_id] for u in order], max_seconds) == result


def test_batches_by_hand() -> None:
    utterances = [utterance(u) for u in "abcde"]
    result = batches(utterances, [1.0, 3.0, 2.0, 9.0, 2.0], 6.0)
    assert [[u.utt_id for u in batch] for batch in result] == [["d"], ["b", "c"], ["e", "a"]]
    assert batches([], [], 6.0) == []
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(MpqError, match="more than 0 seconds"):
            batches(utterances, [1.0] * 5, wrong)
        with pytest.raises(MpqError, match="more than 0 seconds"):
            calibration_subset(utterances, [1.0] * 5, wrong, 0)


@given(ids, st.data(), st.floats(0.1, 100), st.floats(0.1, 100), st.integers(0, 5))
def test_calibration_subset_holds_to_its_rules(
    utt_ids: list[str], data: st.DataObject, one: float, other: float, seed: int
) -> None:
    seconds = {u: data.draw(st.floats(0.1, 30)) for u in utt_ids}
    utterances = [utterance(u) for u in utt_ids]
    less, more = (calibration_subset(utterances, list(seconds.values()), s, seed) for s in sorted((one, other)))
    for (chosen, durations), limit in zip((less, more), sorted((one, other)), strict=True):
        assert [u for u in utterances if u in chosen] == chosen  # in the manifest's order
        assert durations == [seconds[u.utt_id] for u in chosen]
        assert bool(chosen) == bool(utt_ids) and (len(chosen) <= 1 or sum(durations) <= limit + 1e-9)
    order = data.draw(st.permutations(utterances))
    assert set(calibration_subset(order, [seconds[u.utt_id] for u in order], one, seed)[0]) == set(
        calibration_subset(utterances, list(seconds.values()), one, seed)[0]
    )


def test_calibration_subset_by_hand() -> None:
    utterances, durations = [utterance(u) for u in "abcde"], [1.0, 2.0, 3.0, 4.0, 5.0]
    # printf 0:a | sha256sum and so on: d 7d98, a 9df3, c be08, b e021, e e078
    chosen = {
        s: "".join(u.utt_id for u in calibration_subset(utterances, durations, s, 0)[0]) for s in (1, 6, 7, 8, 15)
    }
    assert chosen == {1: "d", 6: "ad", 7: "abd", 8: "acd", 15: "abcde"}
    assert calibration_subset(utterances, durations, None, 0) == (utterances, durations)
    assert len({tuple(calibration_subset(utterances, durations, 6.0, seed)[0]) for seed in range(9)}) > 1


def test_real_speech_passes(shared: Path) -> None:
    utterances = read_data(shared / "data/read_speech/dev.jsonl")
    checked = require_good(check_data(utterances, sample_rate=RATE, min_samples=400, missing=LETTERS, need_text=True))
    assert len(checked.utterances) == 155
    assert all(abs(u.duration - s) < 1e-3 for u, s in zip(checked.utterances, checked.durations, strict=True))
    kept, durations = calibration_subset(checked.utterances, checked.durations, 60.0, 0)
    assert 50 < sum(durations) <= 60
    assert sum(len(batch) for batch in batches(kept, durations, 20.0)) == len(kept)
