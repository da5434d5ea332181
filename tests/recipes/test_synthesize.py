"""The demo's synthetic corpus: its format, what its parts do not share, the same bytes each time."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from mpq.errors import MpqError

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "demo" / "synthesize.py"
SIZES = {"train": 12, "dev": 4, "test": 4}
SMALL = [word for part, count in SIZES.items() for word in (f"--{part}", str(count))]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_synthesize", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "new" / "folder"
    assert script.main([str(out), *SMALL]) == 0
    return out


def rows(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {part: [json.loads(line) for line in (out / f"{part}.jsonl").read_text().splitlines()] for part in SIZES}


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_format(corpus: Path) -> None:
    for part, count in SIZES.items():
        found = rows(corpus)[part]
        assert len({row["utt_id"] for row in found}) == len(found) == count
        for row in found:
            assert set(row) == {"audio_filepath", "text", "duration", "speaker", "utt_id"}
            info = soundfile.info(corpus / row["audio_filepath"])
            assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16000, 1)
            assert row["duration"] == info.frames / 16000
            assert 0.7 < row["duration"] < 6
    assert len(list(corpus.rglob("*.flac"))) == sum(SIZES.values())
    assert not list(corpus.rglob("*.partial"))


def test_parts_share_neither_speakers_nor_sentences(script: ModuleType, corpus: Path) -> None:
    texts = [row["text"] for part in rows(corpus).values() for row in part]
    assert len(set(texts)) == len(texts)
    variants = {part: {speaker.split("+")[1] for speaker in script.speakers_of(part)} for part in SIZES}
    for part, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not variants[part] & variants[other]
    for part, found in rows(corpus).items():
        assert {row["speaker"] for row in found} <= set(script.speakers_of(part))
        assert len({row["speaker"] for row in found}) == min(len(found), len(script.speakers_of(part)))


def test_sentences(script: ModuleType) -> None:
    words = script.words_of(script.GRAMMAR)
    assert 80 <= len(words) <= 120
    assert set("".join(words)) <= set("abcdefghijklmnopqrstuvwxyz'")
    texts = script.draw_texts(3000, set(), np.random.default_rng(1))
    assert len(set(texts)) == 3000
    assert {word for text in texts for word in text.split(" ")} == words  # no double space, no word that never comes
    assert {len(text.split()) for text in texts} <= set(range(3, 10))
    with pytest.raises(MpqError, match="too small"):
        script.draw_texts(1, set(texts) | Everything(), np.random.default_rng(1))


class Everything(set):
    """A set in which everything is, as if each sentence had been used."""

    def __contains__(self, _: object) -> bool:
        return True

    def __ror__(self, _: object) -> "Everything":
        return self


def test_sound(corpus: Path) -> None:
    for row in (row for part in rows(corpus).values() for row in part):
        samples, rate = soundfile.read(corpus / row["audio_filepath"])
        assert 0.5 < len(row["text"].split()) / row["duration"] < 5  # words a second
        level = 20 * np.log10(np.sqrt(np.mean(samples**2)))
        assert -30 < level < -19  # dBFS
        assert np.abs(samples).max() < 0.96
        frames = samples[: len(samples) // 160 * 160].reshape(-1, 160)  # (T, 10 ms)
        powers = 10 * np.log10(np.mean(frames**2, axis=1))
        assert np.percentile(powers, 95) - powers.min() > 10  # speech stands out of the noise
        assert np.argmax(powers > level) * 160 / rate < 0.5  # and begins soon


def test_every_voice_exists_and_differs(script: ModuleType) -> None:
    voices = [voice for part in SIZES for voice in script.speakers_of(part)]
    assert len(set(voices)) == len(voices)
    sounds = set()
    with script.fresh_espeak() as espeak:
        assert espeak.sample_rate == 22050
        for voice in voices:
            samples = espeak.speak("one", voice, 175, 50, 50)
            assert 0.05 < np.abs(samples).max() < 0.99
            sounds.add(samples.tobytes())
        for unknown in ("en-us+nobody", "xx-nowhere+m1"):
            with pytest.raises(MpqError, match="no voice"):
                espeak.speak("one", unknown, 175, 50, 50)
    assert len(sounds) == len(voices)


def test_every_voice_is_the_same_at_another_time(script: ModuleType) -> None:
    def sounds() -> dict[str, bytes]:
        with script.fresh_espeak() as espeak:
            voices = [voice for part in SIZES for voice in script.speakers_of(part)]
            return {voice: espeak.speak("set a timer", voice, 175, 50, 50).tobytes() for voice in voices}

    first = sounds()
    time.sleep(1.1)  # eSpeak NG seeds itself with the clock's seconds
    second = sounds()
    assert [voice for voice in first if first[voice] != second[voice]] == []


def test_same_arguments_same_bytes(script: ModuleType, corpus: Path, tmp_path: Path) -> None:
    assert script.main([str(tmp_path / "again"), *SMALL]) == 0
    assert contents(tmp_path / "again") == contents(corpus)
    assert script.main([str(tmp_path / "more"), *SMALL, "--train", "13"]) == 0
    again, more = contents(tmp_path / "again"), contents(tmp_path / "more")
    held_out = [name for name in again if name.startswith(("test", "dev"))]
    assert all(again[name] == more[name] for name in held_out)  # however much there is to train on


def test_second_run_and_rebuild(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [str(tmp_path / "x"), "--train", "3", "--dev", "1", "--test", "1"]
    assert script.main(run) == 0
    before = contents(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(script, "make_part", None)  # nothing is spoken
        capsys.readouterr()
        assert script.main(run) == 0
    assert "complete; nothing to do" in capsys.readouterr().out
    assert contents(tmp_path / "x") == before

    assert script.main([*run, "--train", "2", "--seed", "7"]) == 0
    after = contents(tmp_path / "x")
    assert "train/wav/train-00002.flac" in before.keys() - after.keys()
    assert before["test.jsonl"] != after["test.jsonl"]

    for name in ("dev/wav/dev-00000.flac", "train.jsonl"):  # incomplete: made again
        (tmp_path / "x" / name).unlink()
        assert script.main([*run, "--train", "2", "--seed", "7"]) == 0
        assert contents(tmp_path / "x") == after

    def cut_off(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "make_part", cut_off)
        with pytest.raises(KeyboardInterrupt):
            script.main(run)
    assert not list((tmp_path / "x").glob("*.jsonl"))  # half a corpus is never taken for a whole one
    assert script.main(run) == 0
    assert contents(tmp_path / "x") == before


def test_errors(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "train.jsonl").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "corpus.json").write_text("{")
    for out, message in (
        (file, "cannot be written"),
        (file / "below", "cannot be written"),
        (foreign, "in the way"),
        (tmp_path / "broken", "not JSON"),
    ):
        assert script.main([str(out), *SMALL]) == 2
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and message in error and error.count("\n") == 1
    assert (foreign / "train.jsonl").read_text() == file.read_text() == "mine"

    for option in ("--train=0", "--dev=-1", "--test=x", "--seed=-1"):
        with pytest.raises(SystemExit, match="2"):
            script.main([str(tmp_path / "y"), option])
        assert "expected a whole number" in capsys.readouterr().err

    monkeypatch.setattr(script, "espeakng_loader", None)
    assert script.main([str(tmp_path / "y"), *SMALL]) == 2
    assert "pip install 'mpq[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
