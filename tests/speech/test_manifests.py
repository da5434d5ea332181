"""Manifests and Kaldi directories are written by hand, faults and all."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpq.errors import MpqError
from mpq.speech.manifests import Utterance, read_data, read_manifest


def manifest(folder: Path, *records: dict[str, Any] | str) -> Path:
    path = folder / "dev.jsonl"
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records),
        encoding="utf-8",
    )
    return path


def faults_of(path: Path) -> list[str]:
    """The faults with which `read_data` refuses, without the folder's name."""
    with pytest.raises(MpqError) as error:
        read_data(path)
    folder = path if path.is_dir() else path.parent
    return str(error.value).replace(f"{folder}/", "").split("\n")


def test_manifest_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        {
            "audio_filepath": "wav/a.wav",
            "text": "one two",
            "duration": 1.5,
            "speaker": "s",
            "utt_id": "u",
            "lang": "en",
        },
        "",
        {"audio_filepath": "/data/b.c.flac", "duration": 2, "offset": 0, "text": "caf\u00e9 \u2028"},
        {"audio_filepath": "c.wav", "text": None, "duration": None, "offset": None},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_data(path) == [
        Utterance("u", tmp_path / "wav/a.wav", "one two", 1.5, None, "s", f"{path}:1", None, (("lang", "en"),)),
        Utterance("b.c", Path("/data/b.c.flac"), "caf\u00e9 \u2028", 2.0, 0.0, None, f"{path}:3"),
        Utterance("c", tmp_path / "c.wav", None, None, None, None, f"{path}:4"),
    ]


def test_all_faults_of_a_manifest_are_reported_at_once(tmp_path: Path) -> None:
    good = {"audio_filepath": "good.wav", "text": "a", "duration": 1.0}
    path = manifest(
        tmp_path,
        good,
        "{not json",
        '["a list"]',
        {"text": "a"},
        {"audio_filepath": 3, "text": 4, "duration": -1, "offset": -0.5, "speaker": [7], "utt_id": ["u"]},
        {**good, "utt_id": "u", "duration": -1},
        '{"audio_filepath": "a.wav", "duration": NaN}',
        '{"audio_filepath": "a.wav", "duration": 1' + "0" * 400 + "}",
        '{"audio_filepath": "a.wav", "duration": true}',
        '{"audio_filepath": ""}',
        '{"audio_filepath": "a\\u0000.wav", "text": "\\ud800"}',
        "[" * 100_000,
        {**good, "utt_id": "good"},
        {"audio_filepath": "a.wav", "utt_id": "a (1)"},
        {"audio_filepath": "a.wav", "utt_id": ""},
    )
    path.write_bytes(path.read_bytes() + b'{"audio_filepath": "\xff.wav"}\n')
    lines = faults_of(path)
    assert [line.split(" ")[0] for line in lines] == [
        f"dev.jsonl:{n}:" for n in (2, 3, 4, 5, 5, 5, 5, 5, 5, 6, 7, 8, 9, 10, 11, 11, 12, 13, 14, 15)
    ] + ["and"]
    assert lines[1] == "dev.jsonl:3: expected a JSON object, got a list"
    assert lines[2] == "dev.jsonl:4: audio_filepath: this key is missing"
    assert lines[5] == "dev.jsonl:5: duration: expected 0 or more, got -1"
    assert 'utt_id "good" is already that of dev.jsonl:1' in lines[17] and "give each its own" in lines[17]
    assert 'utt_id: expected no whitespace and no parentheses, got "a (1)"' in lines[18]
    assert lines[20] == "and 1 more faults"


def test_segments_of_one_file_need_their_own_ids(tmp_path: Path) -> None:
    records = [{"audio_filepath": "a.wav", "offset": start, "duration": 1.0} for start in (0.0, 1.0)]
    assert [u.utt_id for u in read_data(manifest(tmp_path, *records))] == ["a", "a-1"]
    named = [{**record, "utt_id": f"a-{i}"} for i, record in enumerate(records)]
    assert [u.offset for u in read_data(manifest(tmp_path, *named))] == [0.0, 1.0]
    clash = [{**record, "utt_id": utt_id} for record, utt_id in zip(records, ("a", "A"), strict=True)]
    assert "give each its own" in faults_of(manifest(tmp_path, *clash))[0]


def test_default_ids_are_unique_and_can_stand_in_trn(tmp_path: Path) -> None:
    paths = ["x/a.wav", "y/a.wav", "my file (1).wav", "b.wav"]
    records = [{"audio_filepath": path, "speaker": 7} for path in paths]
    utterances = read_data(manifest(tmp_path, *records))
    assert [u.utt_id for u in utterances] == ["a", "a-2", "my_file_1_", "b"]
    assert utterances[0].speaker == "7"


def test_a_path_without_utterances_is_refused(tmp_path: Path) -> None:
    assert "no utterances" in faults_of(manifest(tmp_path, "", "  "))[0]
    assert "no such file" in faults_of(tmp_path / "missing.jsonl")[0]
    (tmp_path / "empty").mkdir()
    assert "has no wav.scp" in faults_of(tmp_path / "empty")[0]
    assert "no utterances" in faults_of(kaldi(tmp_path / "data", wav_scp=""))[0]
    binary = tmp_path / "a.wav"
    binary.write_bytes(b"RIFF\xff\xff")
    assert "expected UTF-8 text" in faults_of(binary)[0]


def kaldi(folder: Path, **tables: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in tables.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return folder


def test_kaldi_directory_is_read(tmp_path: Path) -> None:
    folder = kaldi(
        tmp_path, wav_scp="r1 wav/a b.wav\nr2\t/data/c.flac\r\n", text="r1 one  two\nr2\n", utt2spk="r1 s1\nr2 s2\n"
    )
    scp = f"{folder}/wav.scp"
    assert read_data(folder) == [
        Utterance("r1", folder / "wav/a b.wav", "one  two", None, None, "s1", f"{scp}:1"),
        Utterance("r2", Path("/data/c.flac"), "", None, None, "s2", f"{scp}:2"),
    ]
    (folder / "text").unlink()
    (folder / "utt2spk").unlink()
    assert [(u.text, u.speaker) for u in read_data(folder)] == [(None, None)] * 2


def test_kaldi_segments_are_read(tmp_path: Path) -> None:
    folder = kaldi(
        tmp_path, wav_scp="r1 a.wav\nunused b.wav\n", segments="u2 r1 1.5 2.75\nu1 r1 0 -1\n", text="u1 one\nu2 two\n"
    )
    assert read_data(folder) == [
        Utterance("u2", folder / "a.wav", "two", 1.25, 1.5, None, f"{folder}/segments:1"),
        Utterance("u1", folder / "a.wav", "one", None, 0.0, None, f"{folder}/segments:2"),
    ]


def test_a_shell_command_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    folder = kaldi(tmp_path, wav_scp=f"r1 touch {victim} |\nr2 a.wav\nr3 | touch {victim}\nr4 x.ark:17\nr5\n")
    lines = faults_of(folder)
    assert [line.split(" ")[0] for line in lines] == [f"wav.scp:{n}:" for n in (1, 3, 4, 5)]
    assert "a shell command, which mpq never runs" in lines[0] and "Kaldi archive" in lines[2]
    assert not victim.exists()


def test_all_faults_of_a_kaldi_directory_are_reported_at_once(tmp_path: Path) -> None:
    bad = [
        "u1 r1 0",
        "u2 r1 0 1 A",
        "u3 r1 2 1",
        "u4 r1 -1 1",
        "u5 r1 0 nan",
        "u6 r1 x 1",
        "u7 other 0 1",
        "u8 r1 0 inf",
    ]
    folder = kaldi(
        tmp_path, wav_scp="r1 a.wav\nr1 b.wav\n", segments="\n".join(bad) + "\nu9 r1 0 1\n", text="u9 a\nu9 b\nu1 c\n"
    )
    lines = faults_of(folder)
    assert [line.split(" ")[0] for line in lines] == ["wav.scp:2:", "text:2:", *(f"segments:{n}:" for n in range(1, 9))]
    assert '"u9" is already on text:1; remove one' in lines[1]


def test_more_utterances_than_audio_are_counted_and_the_channel_is_read(tmp_path: Path) -> None:
    folder = kaldi(
        tmp_path,
        wav_scp="r1 a.wav\nr2 x.sh |\n",
        segments="u9 r1 0 1 1\nu8 r1 1 2 -1\nu7 r2 0 1\n",
        text="u9 a\nu7 c\nu1 b\n",
        utt2spk="u3 s\nu4 s\n",
    )
    found = read_manifest(folder)
    assert [(one.utt_id, one.channel, one.offset) for one in found.utterances] == [("u9", "1", 0.0), ("u8", None, 1.0)]
    assert [str(one).split(": ")[0] for one in found.faults] == [f"{folder}/wav.scp:2", f"{folder}/segments:3"]
    assert found.notes == (
        f"{folder}/text: 1 of 3 lines have no audio and are left out: u1",
        f"{folder}/utt2spk: 2 of 2 lines have no audio and are left out: u3, u4",
    )


def test_keys_mean_what_they_mean_in_nemo(tmp_path: Path) -> None:
    chosen = [0, 1, "average", "1", None]
    records = [{"audio_filepath": f"{i}.wav", "channel_selector": one, "duration": 0} for i, one in enumerate(chosen)]
    found = read_data(manifest(tmp_path, *records))
    assert [one.channel for one in found] == ["0", "1", "mix", "1", None]
    assert {one.duration for one in found} == {None}  # 0 is unknown
    for wrong in (-1, 1.5, True, "left", [0, 1]):
        assert (
            "channel_selector: expected" in faults_of(manifest(tmp_path, {**records[0], "channel_selector": wrong}))[0]
        )


@pytest.mark.parametrize("key", ["channel", "Offset", "start_time", "endTime", "offset_ms", "speed", "channel_id"])
def test_a_key_that_would_change_what_is_heard_is_refused(tmp_path: Path, key: str) -> None:
    lines = faults_of(manifest(tmp_path, {"audio_filepath": "a.wav", key: 1, "num_channels": 2}))
    assert lines == [
        f'dev.jsonl:1: "{key}": not read, but sounds as if it changed what is heard; say it with offset, duration and '
        "channel_selector, or remove it"
    ]


def test_other_keys_are_named(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"audio_filepath": "a.wav", "num_channels": 2, "lang": "en", "end": None, "words": [1]})
    found = read_manifest(path)
    assert found.notes == (f'{path}: keys that only mpq compare --by reads: "lang", "num_channels", "words"',)
    assert found.utterances[0].others == (("num_channels", "2"), ("lang", "en"))  # no lists, nothing that is null
    path.write_text('{"audio_filepath": "a.wav", "is_far": true, "snr": 1.5, "x\\ud800": "\\ud800"}\n')
    others = (("is_far", "true"), ("snr", "1.5"), ("x\\ud800", "\\ud800"))  # what is no Unicode is escaped
    assert read_data(path)[0].others == others
    assert read_manifest(path).faults == ()


def test_faulty_lines_may_be_left_out(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"audio_filepath": "a.wav"}, "{", {"audio_filepath": "b.wav", "text": 5, "duration": -1})
    found = read_manifest(path)
    assert [(one.source, one.kind) for one in found.faults] == [
        (f"{path}:2", "no JSON"),
        (f"{path}:3", "text"),
        (f"{path}:3", "duration"),
    ]
    assert [one.utt_id for one in read_data(path, skip_bad=True)] == ["a"]
    assert len(faults_of(path)) == 3
    with pytest.raises(MpqError, match="expected a JSON object"):
        read_data(manifest(tmp_path, "{"), skip_bad=True)
