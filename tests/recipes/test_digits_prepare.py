"""The script that the shared manifests were made with is the witness: the same compositions, the same samples."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mpq.speech.data import check_data
from mpq.speech.manifests import read_data

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "digits" / "prepare.py"
spec = importlib.util.spec_from_file_location("digits_prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = prepare
spec.loader.exec_module(prepare)

FEW = 12  # utterances of each part: its first, so two of each speaker
NOISES = ["babble_0", "babble_5", "white_0", "white_5"]
CONDITIONS = ["clean", *NOISES]
PARTS = ["train", "dev", "test", "train_no_lucas", "test_only_lucas"]


@pytest.fixture(scope="module")
def digits(shared: Path) -> Path:
    folder = shared / "data" / "digits"
    if not folder.is_dir():
        pytest.skip(f"not run: needs the recordings of FSDD, which are not at {folder}")
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_utterances() -> Iterator[dict]:
    """Parts are cut to their first utterances; yields them whole."""
    with pytest.MonkeyPatch.context() as patch:
        whole = prepare.PARTS
        cut = {name: dataclasses.replace(part, utterances=FEW) for name, part in whole.items()}
        patch.setattr(prepare, "PARTS", cut)
        yield whole


@pytest.fixture(scope="module")
def corpus(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sets, a few utterances each."""
    out = tmp_path_factory.mktemp("digits") / "new" / "corpus"
    assert prepare.main([str(digits / "recordings"), str(out)]) == 0
    return out


@pytest.fixture
def links(digits: Path, tmp_path: Path) -> Path:
    """A folder of links to the recordings, to be spoiled."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for path in (digits / "recordings").iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", PARTS)
def test_compositions_are_those_of_the_shared_manifests(
    name: str, digits: Path, few_utterances: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "PARTS", few_utterances)
    composed = [
        {
            "utt_id": one.utt_id,
            "speaker": one.speaker,
            "text": one.text,
            "parts": [
                {"file": f"recordings/{recording}.flac", "gap_s": pause}
                for recording, pause in zip(one.recordings, one.pauses_seconds[:-1], strict=True)
            ],
            "tail_s": one.pauses_seconds[-1],
        }
        for one in prepare.compose(name, 20)
    ]
    assert composed == lines(digits / "manifests" / f"{name}.jsonl")


@pytest.mark.parametrize("condition", CONDITIONS)
def test_samples_are_those_of_the_shared_script(condition: str, corpus: Path, digits: Path, tmp_path: Path) -> None:
    parts = PARTS if condition == "clean" else ["dev", "test", "test_only_lucas"]
    (tmp_path / "recordings").symlink_to(digits / "recordings")  # the script looks for them beside manifests/
    manifest = tmp_path / "manifests" / "few.jsonl"
    manifest.parent.mkdir()
    first = [(digits / "manifests" / f"{part}.jsonl").read_text().splitlines()[:FEW] for part in parts]
    manifest.write_text("".join(line + "\n" for some in first for line in some))
    command = [sys.executable, digits / "build_digits.py", "render", manifest, tmp_path / "out"]
    if condition != "clean":
        kind, snr = condition.split("_")
        command += ["--noise", kind, "--snr", snr, "--seed", "0"]
    subprocess.run(command, check=True, capture_output=True)
    for part in parts:
        name = part if part.startswith("train") else f"{part}_{condition}"
        rows = lines(corpus / f"{name}.jsonl")
        assert len(rows) == FEW
        for row in rows:
            own, rate = soundfile.read(corpus / row["audio_filepath"], dtype="int16")
            expected, expected_rate = soundfile.read(tmp_path / "out" / "wav" / f"{row['utt_id']}.flac", dtype="int16")
            assert rate == expected_rate == 8000
            np.testing.assert_array_equal(own, expected, err_msg=row["utt_id"])


def test_the_noise_is_as_loud_as_its_name_says(corpus: Path) -> None:
    for part in ("dev", "test_only_lucas"):
        clean = lines(corpus / f"{part}_clean.jsonl")
        for noise in NOISES:
            for speech, noisy in zip(clean, lines(corpus / f"{part}_{noise}.jsonl"), strict=True):
                wave, mixed = (soundfile.read(corpus / row["audio_filepath"])[0] for row in (speech, noisy))
                if np.abs(mixed).max() < 0.98:  # not turned down
                    ratio = 10 * np.log10(np.mean(wave**2) / np.mean((mixed - wave) ** 2))
                    pauses = 0.5 * 10 * np.log10(8)  # the SNR is of the speech alone; up to 8 pauses take their share
                    assert -pauses < ratio - int(noise[-1]) < 0.01


def test_every_set_is_a_manifest_that_mpq_reads(corpus: Path) -> None:
    rendered = [
        "train",
        "train_no_lucas",
        *(f"{p}_{c}" for p in ("dev", "test", "test_only_lucas") for c in CONDITIONS),
    ]
    views = ["dev", "dev_no_lucas", *(f"dev_no_lucas_{c}" for c in CONDITIONS)]
    assert {path.name for path in corpus.glob("*.jsonl")} == {f"{name}.jsonl" for name in rendered + views}
    assert {path.name for path in corpus.iterdir() if path.is_dir()} == set(rendered)
    for name in rendered + views:
        rows = lines(corpus / f"{name}.jsonl")
        utterances = read_data(corpus / f"{name}.jsonl")
        checked = check_data(utterances, sample_rate=8000, need_text=True)
        assert checked.faults == ()
        assert [row["duration"] for row in rows] == list(checked.durations)
        assert [row["utt_id"] for row in rows] == [utterance.utt_id for utterance in utterances]
        speakers = {"lucas"} if "only_lucas" in name else set(prepare.SPEAKERS)
        assert {row["speaker"] for row in rows} == speakers - ({"lucas"} if "no_lucas" in name else set())
        if name in rendered:
            assert all(row["audio_filepath"] == f"{name}/wav/{row['utt_id']}.flac" for row in rows)
            assert len(list((corpus / name / "wav").iterdir())) == FEW


def test_the_sets_to_select_by_take_the_noises_in_turn(corpus: Path) -> None:
    whole = lines(corpus / "dev_clean.jsonl")
    for name, expected in [("dev", whole), ("dev_no_lucas", [row for row in whole if row["speaker"] != "lucas"])]:
        rows = lines(corpus / f"{name}.jsonl")
        assert [row["utt_id"] for row in rows] == [row["utt_id"] for row in expected]
        assert [Path(row["audio_filepath"]).parts[0] for row in rows] == [
            f"dev_{NOISES[(k + k // 12) % 4]}" for k in range(len(rows))
        ]
    assert lines(corpus / "dev_no_lucas_white_5.jsonl") == [
        row for row in lines(corpus / "dev_white_5.jsonl") if row["speaker"] != "lucas"
    ]


def test_wav_is_read_as_flac_is(links: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(links.iterdir())[::40]:
        soundfile.write(path.with_suffix(".wav"), *soundfile.read(path, dtype="int16"), subtype="PCM_16")
        path.unlink()
    (links / "README.txt").write_text("not a recording")
    assert len(list(links.glob("*.wav"))) == 75
    own, digest = prepare.read_recordings(links)
    expected, expected_digest = prepare.read_recordings(digits / "recordings")
    assert digest == expected_digest == prepare.FSDD_SHA256
    assert own.keys() == expected.keys()
    assert all(np.array_equal(own[name], expected[name]) for name in own)


def test_the_faults_of_all_recordings_are_told(links: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = np.random.default_rng(0).integers(-999, 999, size=2000, dtype=np.int16)

    def replace(name: str, samples: np.ndarray, rate: int = 8000, subtype: str = "PCM_16") -> None:
        (links / f"{name}.flac").unlink()
        soundfile.write(links / f"{name}.wav", samples, rate, subtype=subtype)

    for name in ("0_george_3", "9_yweweler_49"):
        (links / f"{name}.flac").unlink()
    soundfile.write(links / "1_theo_50.wav", samples, 8000)
    soundfile.write(links / "1_theo_5.wav", samples, 8000)
    replace("2_lucas_0", samples, rate=16000)
    replace("2_lucas_1", np.stack([samples, samples], axis=1))
    replace("2_lucas_2", samples, subtype="FLOAT")
    replace("2_lucas_3", samples[:159])
    (links / "2_lucas_4.flac").unlink()
    (links / "2_lucas_4.flac").write_bytes(b"")
    assert prepare.main([str(links), str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    expected = [
        "Error: {}/1_theo_50.wav: none of the 3000 recordings {{digit}}_{{speaker}}_{{take}}; move it away",
        "{}/0_george_3.wav: missing (and no .flac); get it from FSDD again",
        "{}/1_theo_5: there both as .wav and as .flac; remove one",
        "{}/2_lucas_0.wav: expected 8000 Hz, 1 channel(s), PCM_16, got 16000 Hz, 1 channel(s), PCM_16; get",
        "{}/2_lucas_1.wav: expected 8000 Hz, 1 channel(s), PCM_16, got 8000 Hz, 2 channel(s), PCM_16; get",
        "{}/2_lucas_2.wav: expected 8000 Hz, 1 channel(s), PCM_16, got 8000 Hz, 1 channel(s), FLOAT; get",
        "{}/2_lucas_3.wav: expected at least 160 samples, got 159; get it from FSDD again",
        "{}/2_lucas_4.flac: cannot be read: ",
        "{}/9_yweweler_49.wav: missing (and no .flac); get it from FSDD again",
    ]
    for line, start in zip(said.err.splitlines(), expected, strict=True):
        assert line.startswith(start.format(links))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_recordings_is_one_line(tmp_path: Path) -> None:
    for folder, fault in [(tmp_path, "has no recording like 0_george_0.wav"), (tmp_path / "none", "no such folder")]:
        done = subprocess.run([sys.executable, SCRIPT, folder, tmp_path / "out"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"Error: {folder}: {fault}") and done.stderr.count("\n") == 1


def test_other_samples_are_noted(links: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (links / "0_george_3.flac").unlink()
    soundfile.write(links / "0_george_3.wav", np.zeros(2000, dtype=np.int16), 8000)
    assert prepare.main([str(links), str(tmp_path / "out"), "--sets", "dev_clean"]) == 0
    assert "the samples are not those of FSDD's commit 26eb9aaf" in capsys.readouterr().err


def test_what_is_done_is_not_done_again(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [str(digits / "recordings"), str(out), "--sets", "dev_no_lucas_babble_0"]
    assert prepare.main(command) == 0
    assert {path.name for path in out.glob("*.jsonl")} == {"dev_babble_0.jsonl", "dev_no_lucas_babble_0.jsonl"}
    said = capsys.readouterr().err
    assert "dev_no_lucas_babble_0.jsonl: 10 utterances, 5 speakers" in said and "note" not in said
    before = contents(out)
    assert prepare.main(command) == 0
    assert contents(out) == before
    assert capsys.readouterr().err.count("done before") == 2

    # Another seed is another corpus
    assert prepare.main([*command, "--seed", "21"]) == 2
    assert 'digits.json: "seed": the sets there were made with 20, not 21; choose' in capsys.readouterr().err
    assert contents(out) == before

    # As a run that was killed leaves it
    (out / "dev_babble_0.jsonl").unlink()
    cut = out / "dev_babble_0" / "wav" / "dev_george_00000.flac"
    cut.write_bytes(cut.read_bytes()[:999])
    assert prepare.main(command) == 0
    assert {path: data for path, (_, data) in contents(out).items()} == {
        path: data for path, (_, data) in before.items()
    }

    # Files of someone else
    (out / "digits.json").unlink()
    assert prepare.main(command) == 2
    assert "dev_babble_0.jsonl: is there, but no digits.json beside it" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_one_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert prepare.main([str(digits / "recordings"), str(tmp_path / "file" / "out"), "--sets", "dev"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"Error: {tmp_path}/file/out: cannot be written: ")
