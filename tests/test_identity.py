"""The same file, data and options are known again wherever they are; others are not."""

import hashlib
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, create_model
from tiny_training import write_speech

from mpq import identity
from mpq.config import AugmentConfig, Recipe, TrainConfig
from mpq.errors import MpqError
from mpq.files import sha256_file
from mpq.identity import Inputs, data_identity, file_sha256, options_of
from mpq.speech.manifests import read_data


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that is not there yet, and a process that remembers nothing."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_remembered", {})
    identity._complain.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A list that gets each file that is read for its digest."""
    paths: list[Path] = []

    def noted(path: Path) -> str:
        paths.append(path)
        return sha256_file(path)

    monkeypatch.setattr(identity, "sha256_file", noted)
    return paths


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled as soon as they are written."""
    monkeypatch.setattr(identity, "UNSETTLED_SECONDS", -1.0)


# ---- files


def test_a_file_is_read_once_in_a_process_and_once_in_several(
    tmp_path: Path, cache: Path, read: list[Path], settled: None
) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"weights")
    expected = hashlib.sha256(b"weights").hexdigest()
    assert [file_sha256(path) for _ in range(3)] == [expected] * 3 and read == [path]
    code = (
        "import sys\nfrom pathlib import Path\nfrom mpq import identity\nidentity.sha256_file = None\n"
        "print(identity.file_sha256(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("has_old_time", [True, False])
@pytest.mark.parametrize("is_new_file", [True, False])
def test_a_change_of_the_same_size_is_seen(
    has_old_time: bool, is_new_file: bool, tmp_path: Path, cache: Path, settled: None
) -> None:
    path = tmp_path / "audio.wav"
    path.write_bytes(b"one")
    before, stat = file_sha256(path), path.stat()
    if is_new_file:
        (tmp_path / "other").write_bytes(b"two")
        (tmp_path / "other").rename(path)
    else:
        path.write_bytes(b"two")
    if has_old_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest() != before


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, cache: Path, read: list[Path]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    file_sha256(path)
    file_sha256(path)
    assert len(read) == 2 and not cache.exists()


def test_a_time_in_the_future_is_no_reason_to_read_again(tmp_path: Path, cache: Path, read: list[Path]) -> None:
    """Corpora come with the times that another machine gave them."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    os.utime(path, (2**32, 2**32))
    time.sleep(identity.UNSETTLED_SECONDS + 0.05)
    assert file_sha256(path) == file_sha256(path) == hashlib.sha256(b"x").hexdigest() and read == [path]


def test_a_database_without_its_table_is_another_process_that_begins(
    tmp_path: Path, cache: Path, read: list[Path], settled: None, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    cache.mkdir()
    (cache / "files.sqlite").touch()
    file_sha256(tmp_path / "file")
    identity._remembered.clear()
    file_sha256(tmp_path / "file")
    assert read == [tmp_path / "file"] and not caplog.messages


def test_a_database_that_cannot_be_written_to_is_read(
    tmp_path: Path, cache: Path, read: list[Path], settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root may write to any file, the database is opened read-only here."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    file_sha256(path)
    identity._remembered.clear()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(f"file:{path}?mode=ro", uri=True))
    assert file_sha256(path) == hashlib.sha256(b"x").hexdigest() and read == [path]
    (tmp_path / "other").write_bytes(b"y")
    assert file_sha256(tmp_path / "other") == hashlib.sha256(b"y").hexdigest()


def test_a_file_that_vanishes_has_no_digest(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    whole, read = sha256_file(path), sha256_file

    def vanishing(path: Path) -> str:
        path.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(identity, "sha256_file", vanishing)
    with pytest.raises(MpqError, match="file: no such file"):
        file_sha256(path)
    path.write_bytes(b"x")
    monkeypatch.setattr(identity, "sha256_file", read)
    assert file_sha256(path) == whole


def test_a_cache_that_cannot_be_used_is_told_once_and_not_used(
    tmp_path: Path, cache: Path, settled: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "other").write_bytes(b"y")
    cache.write_bytes(b"a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        digests = [file_sha256(tmp_path / name) for name in ("file", "other")]
    assert digests == [hashlib.sha256(one).hexdigest() for one in (b"x", b"y")]
    (message,) = caplog.messages
    assert message.startswith(f"{cache}/files.sqlite: digests of files are not kept there: ")
    cache.unlink()
    cache.mkdir()
    (cache / "files.sqlite").write_bytes(b"no database" * 100)
    identity._remembered.clear()
    assert file_sha256(tmp_path / "file") == digests[0] and "not a database" in caplog.messages[-1]
    monkeypatch.setenv("MPQ_CACHE", str(cache / ("x" * 300)))
    identity._remembered.clear()
    assert file_sha256(tmp_path / "file") == digests[0] and "File name too long" in caplog.messages[-1]


def test_several_processes_may_write_to_the_cache_at_once(tmp_path: Path, cache: Path) -> None:
    for index in range(40):
        (tmp_path / f"{index}").write_bytes(bytes([index]))
    code = (
        "import sys\nfrom pathlib import Path\nfrom mpq import identity\nidentity.UNSETTLED_SECONDS = -1.0\n"
        "for index in range(40):\n    identity.file_sha256(Path(sys.argv[1]) / str(index))\nassert not "
        "identity._complain.cache_info().misses"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [one.wait() for one in running] == [0, 0, 0]
    with sqlite3.connect(cache / "files.sqlite") as store:
        found = dict(store.execute("SELECT path, sha256 FROM files"))
    store.close()
    assert found == {
        os.fsencode(tmp_path / f"{index}"): hashlib.sha256(bytes([index])).hexdigest() for index in range(40)
    }


# ---- data


def test_data_are_what_the_manifest_says_and_the_audio(tmp_path: Path) -> None:
    manifest = write_speech(tmp_path / "here", ("abc", "bad"))
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]

    def found(*changed: dict[str, Any]) -> str:
        manifest.write_text("".join(json.dumps(line) + "\n" for line in changed))
        return data_identity(read_data(manifest))

    first = found(*lines)
    assert first == found(*({"ignored": 1} | line for line in lines))
    moved = Path(shutil.move(tmp_path / "here", tmp_path / "there")) / manifest.name
    assert data_identity(read_data(moved)) == first
    chosen = [replace(item, channel=str(index)) for index, item in enumerate(read_data(moved))]
    assert data_identity(chosen) not in (first, data_identity(reversed(chosen)))
    shutil.copytree(tmp_path / "there", tmp_path / "here", copy_function=shutil.copyfile)
    assert data_identity(read_data(manifest)) == first
    others = [
        found(*lines[::-1]),
        found(lines[0]),
        *(found(lines[0] | change, lines[1]) for change in (
            {"text": "abd"}, {"duration": 0.3}, {"offset": 0.1}, {"speaker": "s"}, {"utt_id": "u"},
        )),
    ]  # fmt: skip
    path = manifest.parent / "train-1.wav"
    audio = bytearray(path.read_bytes())
    audio[-2] ^= 1
    path.write_bytes(audio)
    others.append(found(*lines))
    path.unlink()
    others.append(found(*lines))
    assert len({first, *others}) == len(others) + 1


# ---- options


def test_a_changed_default_is_a_change_and_a_new_option_at_its_default_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Inputs.of(seed=0, train=options_of(TrainConfig())).to_json()
    same = Inputs.of(seed=0, train=options_of(TrainConfig(workers=7, save_minutes=1.0, tensorboard=True)))
    assert same.change(record) is None and same.fingerprint == record["fingerprint"]
    assert Inputs.of(seed=1, train=record["inputs"]["train"]).change(record) == "seed: 0 there, 1 now"
    newer = create_model(
        "TrainConfig", __base__=TrainConfig, epochs=(int, Field(60)), momentum=(list[float], Field([0.5, 0.1]))
    )
    monkeypatch.setitem(Recipe.model_fields, "train", type(Recipe.model_fields["train"])(annotation=newer))
    now = Inputs.of(seed=0, train=options_of(newer()))
    assert now.change(record) == "train.epochs: 50 there, 60 now"
    assert Inputs.of(seed=0, train=options_of(newer(epochs=50))).change(record) is None
    found = Inputs.of(seed=0, train=options_of(newer(epochs=50, momentum=[0.5]))).change(record)
    assert found == "train.momentum: none there, [0.5] now"


def test_a_change_is_told_in_words() -> None:
    one, other = "0" * 64, "1" * 64
    before = Inputs.of(model=one, data={"train": one, "dev": None}, keep={"decoder.*": 4})
    record = before.to_json()
    for now, words in (
        (Inputs.of(**before.values | {"model": other}), "model: other contents"),
        (Inputs.of(**before.values | {"data": {"train": one, "dev": other}}), "data.dev: none there, 111111111111 now"),
        (Inputs.of(**before.values | {"keep": {}}), "keep.decoder.*: 4 there, none now"),
        (Inputs.of(**before.values | {"more": 1}), "more: none there, 1 now"),
        (Inputs.of(model=one, data=before.values["data"]), 'keep: {"decoder.*": 4} there, none now'),
    ):
        assert now.change(record) == words
    for old in ({}, {"fingerprint": before.fingerprint}, {"inputs": 3}, "a digest", None):
        assert before.change(old) == "an older version of mpq wrote it, which did not put its inputs on record"


def test_noise_is_its_recordings(tmp_path: Path) -> None:
    write_speech(tmp_path / "noise", ("abc", "bad"))

    def found(*names: str) -> Any:
        return options_of(AugmentConfig(noise=["white", *names]))["noise"]

    first = found(str(tmp_path / "noise"))
    (tmp_path / "noise").rename(tmp_path / "moved")
    assert found(str(tmp_path / "moved")) == first and first[0] == "white"
    (tmp_path / "moved/train-1.wav").unlink()
    assert found(str(tmp_path / "moved")) != first
    assert found("gone") == ["white", "gone"]
