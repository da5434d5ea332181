"""The corpora themselves cannot be here: tiny folders of the same shape, noise for speech, the lines as published."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_corpora import DICTIONARY, RECIPES, librispeech, noise, run, swbd, write_sph

from mpq.speech.audio import read_audio
from mpq.speech.data import check_data
from mpq.speech.manifests import Utterance, read_data


def loaded(path: Path, sample_rate: int) -> dict[str, Utterance]:
    """The utterances of a manifest, which must be without faults for mpq too."""
    utterances = read_data(path)
    checked = check_data(utterances, sample_rate=sample_rate, need_text=True)
    assert checked.faults == ()
    return {utterance.utt_id: utterance for utterance in utterances}


# LibriSpeech


@pytest.fixture
def libri(tmp_path: Path) -> Path:
    corpus = tmp_path / "LibriSpeech"
    parts = {"dev-clean": "1272-128104", "train-clean-100": "103-1240", "train-clean-360": "14-208"}
    for part, chapter in {**parts, "train-other-500": "20-205"}.items():
        folder = corpus / part / chapter.replace("-", "/")
        folder.mkdir(parents=True)
        lines = ""
        for i in range(3):
            utt_id = f"{chapter}-{i:04d}"
            soundfile.write(folder / f"{utt_id}.flac", noise(0.2 + i / 8, 16000, 1, i), 16000)
            lines += f"{utt_id} MISTER QUILTER'S SAYING NUMBER {['ONE', 'TWO', 'THREE'][i]}\n"
        (folder / f"{chapter}.trans.txt").write_text(lines)
    return corpus


def test_librispeech_becomes_manifests(libri: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    assert librispeech.main([str(libri), str(out)]) == 0
    names = {"dev_clean", "train_100", "train_360", "train_500", "train_960"}
    assert {path.name for path in out.iterdir()} == {f"{name}.jsonl" for name in names}
    said = capsys.readouterr()
    assert f"{out}/dev_clean.jsonl: 3 utterances, 1 speakers" in said.out
    assert "test-other: not there; test_other.jsonl is not written" in said.err
    dev = loaded(out / "dev_clean.jsonl", 16000)
    assert list(dev) == [f"1272-128104-000{i}" for i in range(3)]
    second = dev["1272-128104-0001"]
    assert (second.text, second.speaker, second.offset) == ("mister quilter's saying number two", "1272", None)
    assert second.duration == 0.325 and second.audio_path.is_absolute()
    together = loaded(out / "train_960.jsonl", 16000)
    assert list(together) == [utt_id for n in (100, 360, 500) for utt_id in loaded(out / f"train_{n}.jsonl", 16000)]
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert librispeech.main([str(libri), str(out)]) == 0
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_some_parts_of_librispeech(libri: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    assert librispeech.main([str(libri), str(out), "--parts", "train-clean-100", "test-clean"]) == 0
    assert [path.name for path in out.iterdir()] == ["train_100.jsonl"]
    assert "train_960.jsonl is not written" in capsys.readouterr().err
    assert librispeech.main([str(libri), str(out), "--parts", "test-clean"]) == 2
    assert "has none of test-clean; expected the folder LibriSpeech" in capsys.readouterr().err


def test_all_faults_of_librispeech_are_told(libri: Path, tmp_path: Path) -> None:
    folder, other = libri / "dev-clean/1272/128104", libri / "train-clean-100/103/1240"
    (folder / "1272-128104-0000.flac").unlink()
    (folder / "1272-128104-0001.flac").write_bytes(b"no audio")
    soundfile.write(folder / "1272-128104-0009.flac", noise(0.1, 16000, 1, 0), 16000)
    with open(folder / "1272-128104.trans.txt", "a") as file:
        file.write("1272-128104-0002 AGAIN\n")
    (other / "103-1240.trans.txt").unlink()
    (libri / "train-clean-360/14/208/14-208.trans.txt").write_bytes(b"14-208-0000 \xff\n")
    out = tmp_path / "data"
    command = [sys.executable, str(RECIPES / "librispeech/prepare.py"), str(libri), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not out.exists()
    faults = [line for line in done.stderr.partition("Error: ")[2].splitlines() if line]
    expected = [
        "103/1240: has no *.trans.txt",
        "14-208.trans.txt: expected UTF-8",
        "trans.txt:1: there is no 1272-128104-0000.flac",
        "1272-128104-0001.flac: cannot be read",
        "trans.txt:4: 1272-128104-0002 has a transcript already",
        "1272-128104-0009.flac: has no transcript",
    ]
    assert len(faults) == len(expected)
    for fault, part in zip(faults, expected, strict=True):
        assert part in fault


# Switchboard


def test_switchboard_becomes_manifests(
    corpora: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert run(out, corpora) == 0
    said = capsys.readouterr()
    assert "5 utterances; 2 without words are left out" in said.err
    assert "3 utterances; 1 that are not scored and 1 without words are left out" in said.err
    dev = loaded(out / "dev.jsonl", 8000)  # the whole first conversation
    assert {utt_id: utterance.text for utt_id, utterance in dev.items()} == {
        "sw02001-A_000030-000120": "hi um yeah i'd like to talk about i b m",
        "sw02001-B_000010-000090": "uh-huh",
    }
    train = loaded(out / "train.jsonl", 8000)
    assert [utterance.text for utterance in train.values()] == ["th- them it'n so bad", "uh-huh", "uh-huh"]
    assert {u.speaker for u in train.values()} == {"sw02005-A", "sw02005-B"}
    assert not {u.speaker for u in train.values()} & {u.speaker for u in dev.values()}
    callhm = loaded(out / "hub5e_00_callhm.jsonl", 8000)
    assert [u.text for u in callhm.values()] == ["oh yeah i- i'm", "no p h d"]
    (test,) = loaded(out / "hub5e_00_swbd.jsonl", 8000).values()
    assert (test.text, test.utt_id, test.speaker) == ("you all right", "sw_4390-B_000000-000195", "sw_4390-B")
    assert (test.offset, test.duration) == (0.0, 1.95)

    times = {path: path.stat().st_mtime_ns for path in (out / "wav").iterdir()}
    manifests = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    assert run(out, corpora) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "wav").iterdir()} == times
    assert {path: path.read_bytes() for path in out.glob("*.jsonl")} == manifests


def test_each_side_is_its_own_channel(corpora: dict[str, Path], tmp_path: Path) -> None:
    assert run(tmp_path / "data", corpora) == 0
    both, _ = soundfile.read(corpora["--swbd"] / "swb1_d2/data/sw2005.sph", dtype="float32")
    left, right = (read_audio(tmp_path / f"data/wav/sw02005-{side}.flac", 8000).numpy() for side in "AB")
    assert np.array_equal(left, both[:, 0]) and np.array_equal(right, both[:, 1]) and not np.array_equal(left, right)
    utterance = loaded(tmp_path / "data/train.jsonl", 8000)["sw02005-A_000025-000100"]
    segment = read_audio(utterance.audio_path, 8000, "error", utterance.offset, utterance.duration).numpy()
    assert np.array_equal(segment, both[2000:8000, 0])


def test_a_run_that_was_cut_off_goes_on(corpora: dict[str, Path], tmp_path: Path) -> None:
    assert run(tmp_path / "data", corpora) == 0
    side = tmp_path / "data/wav/sw02001-A.flac"
    whole = side.read_bytes()
    side.unlink()
    soundfile.write(tmp_path / "data/wav/sw02005-B.flac", np.zeros(100), 8000)
    assert run(tmp_path / "data", corpora) == 0
    assert side.read_bytes() == whole
    assert soundfile.info(tmp_path / "data/wav/sw02005-B.flac").frames == 16000


def test_one_pair_of_folders_is_enough(corpora: dict[str, Path], tmp_path: Path) -> None:
    train = {name: corpora[name] for name in ("--swbd", "--ms98")}
    assert run(tmp_path / "a", train, "--max-same-text", "1") == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"wav", "train.jsonl", "dev.jsonl"}
    assert len(read_data(tmp_path / "a/train.jsonl")) == 2  # one "uh-huh"
    assert run(tmp_path / "b", {name: corpora[name] for name in ("--hub5-audio", "--hub5-text")}) == 0
    assert {path.name for path in (tmp_path / "b/wav").iterdir()} == {
        f"{recording}-{side}.flac" for recording in ("en_4156", "sw_4390") for side in "AB"
    }


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("[silence]", ""),
        ("[LAUGHTER]", ""),
        ("[vocalized-noise]", ""),
        ("<e_aside>", ""),
        ("[laughter-story]", "story"),
        ("[laughter-th[at]-]", "th-"),
        ("[laughter-IBM]", "i b m"),
        ("th[at]-", "th-"),
        ("ab[solute]-", "ab-"),
        ("-[an]y", "-y"),
        ("ammu[n]it-", "ammu-it-"),
        ("[it'n/isn't]", "it'n"),
        ("[lem[guini]-/linguini]", "lem-"),
        ("{yuppiedom}", "yuppiedom"),
        ("them_1", "them"),
        ("Texas", "texas"),
        ("uh-huh", "uh-huh"),
        ("AT&T", "a t and t"),
        ("Barnes&Noble", "barnes and noble"),
        ("&", "and"),
        ("IBM's", "i b m's"),
        ("CDs", "c ds"),
        ("US", "u s"),
        ("us", "us"),
        ("ok", "ok"),
        ("a._b._c.", "a b c"),
        ("-", ""),
    ],
)
def test_words_of_ms98(token: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "dict").write_text(DICTIONARY)
    acronyms = swbd.read_acronyms(tmp_path / "dict")
    assert acronyms == {"IBM": "i b m", "IBM's": "i b m's", "CDs": "c ds", "US": "u s"}
    assert swbd.ms98_words(f"so {token} so", acronyms) == f"so {expected} so".replace("  ", " ")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("OH (%HESITATION) YEAH", "oh yeah"),
        ("(I-) I DO ((", "i- i do"),
        ("<B_ASIDE> COME HERE <E_ASIDE>", "come here"),
        ("{ GOING TO / GONNA } GO", "going to go"),
        ("{ @ / UH } GO", "go"),
        ("(%UH)", ""),
    ],
)
def test_words_of_the_hub5_reference(line: str, expected: str) -> None:
    assert swbd.stm_words(line) == expected


def test_all_faults_of_switchboard_are_told(corpora: dict[str, Path], tmp_path: Path) -> None:
    sph = corpora["--swbd"] / "swb1_d1/data/sw02001.sph"
    header = sph.read_bytes().replace(b"sample_coding -s4 ulaw", b"sample_coding -s27 ulaw,embedded-shorten-v2.00")
    sph.write_bytes(header[:1024])
    write_sph(corpora["--swbd"] / "again/sw02005.sph")
    soundfile.write(corpora["--hub5-audio"] / "hub5e_00/english/sw_4390.sph", np.zeros(8000), 8000, format="NIST")
    (corpora["--hub5-audio"] / "hub5e_00/english/en_4156.sph").unlink()
    with open(corpora["--ms98"] / "20/2005/sw2005B-ms98-a-trans.text", "a") as file:
        file.write("sw2005B-ms98-a-0003 1.9 1.5 backwards\nsw2005B-ms98-a-0004 oh\n")
        file.write("sw2005B-ms98-a-0005 1.500000 1.900000 twice\n")
    command = [sys.executable, str(RECIPES / "swbd/prepare.py"), str(tmp_path / "data")]
    command += [part for name, path in corpora.items() for part in (name, str(path))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "data").exists()
    faults = done.stderr.partition("Error: ")[2].splitlines()
    expected = [
        "sw2005.sph: ",
        "trans.text:3: expected swNNNNA-ms98-a-NNNN START END WORDS",
        "trans.text:4: expected swNNNNA-ms98-a-NNNN START END WORDS",
        "stm:2: en_4156 has no audio",
        "trans.text:5: sw02005-B_000150-000190 is already at",
        "sw02001.sph: its samples are compressed (ulaw,embedded-shorten-v2.00), which libsndfile does not read; "
        "expand it with the LDC's sph2pipe",
        "sw_4390.sph: expected 2 channels at 8000 Hz, got 1 at 8000 Hz",
    ]
    assert len(faults) == len(expected)
    for fault, part in zip(faults, expected, strict=True):
        assert part in fault


def test_a_conversation_without_audio_may_be_left_out(
    corpora: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sph(corpora["--swbd"] / "sw02010.sph")  # and one without a transcript
    sources = corpora["--ms98"] / "20/2009"
    sources.mkdir()
    (sources / "sw2009A-ms98-a-trans.text").write_text("sw2009A-ms98-a-0001 0.0 1.0 oh\n")
    assert run(tmp_path / "data", corpora) == 2
    assert "sw02009 has no audio" in capsys.readouterr().err
    assert run(tmp_path / "data", corpora, "--skip-missing") == 0
    said = capsys.readouterr().err
    assert "1 conversations without audio are left out" in said
    assert "1 conversations without a transcript are left out" in said
    assert not (tmp_path / "data/wav/sw02010-A.flac").exists()


def test_a_cut_conversation_is_a_fault(
    corpora: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sph = corpora["--swbd"] / "swb1_d1/data/sw02001.sph"
    sph.write_bytes(sph.read_bytes()[:20000])
    assert run(tmp_path / "data", corpora) == 2
    assert "sw02001.sph: cut short" in capsys.readouterr().err
    assert not list((tmp_path / "data").glob("*.jsonl"))


def test_utterances_after_the_end_are_left_out_of_train_and_a_fault_of_test(
    corpora: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sph(corpora["--swbd"] / "swb1_d2/data/sw2005.sph", 1.2, seed=2)
    assert run(tmp_path / "data", corpora) == 0
    assert "2 utterances that end after their audio are left out" in capsys.readouterr().err
    assert len(loaded(tmp_path / "data/train.jsonl", 8000)) == 1
    write_sph(corpora["--hub5-audio"] / "hub5e_00/english/en_4156.sph", 1.5)
    assert run(tmp_path / "data", corpora) == 2
    assert "stm:5: ends after its audio, 1.50 s" in capsys.readouterr().err


def test_wrong_folders_and_options_of_switchboard(
    corpora: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for options, fault in (
        ({}, "give --swbd with --ms98"),
        ({"--swbd": corpora["--swbd"]}, "--swbd goes with --ms98"),
        ({**corpora, "--swbd": empty}, "has no SPH files"),
        ({**corpora, "--ms98": empty}, "has no sw*-ms98-a-trans.text"),
        ({**corpora, "--hub5-text": empty}, "has no hub5e00.english.000405.stm"),
    ):
        assert run(tmp_path / "data", options) == 2
        said = capsys.readouterr().err
        assert said.startswith("Error: ") or "\nError: " in said
        assert fault in said
    assert run(tmp_path / "data", corpora, "--dev-utterances", "9") == 2
    assert "no conversation is left for train" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "data", corpora, "--max-same-text", "0")
    assert ended.value.code == 2
