"""Archives that are whole, damaged or hostile."""

import io
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from tiny_models import nemo_config, tiny_model, write_nemo

from mpq.errors import MpqError
from mpq.loading import load_model

STATE = tiny_model().state_dict()


def test_gzipped_archive_without_buffers(tmp_path: Path, tiny_archive: Path) -> None:
    state = {name: tensor for name, tensor in STATE.items() if not name.startswith("preprocessor")}
    plain = write_nemo(tmp_path / "plain.nemo", nemo_config(), state)
    with tarfile.open(plain) as source, tarfile.open(tmp_path / "old.nemo", "w:gz") as target:
        for member in source:
            target.addfile(member, source.extractfile(member))
    model = load_model(tmp_path / "old.nemo")
    torch.testing.assert_close(model.preprocessor.featurizer.fb, STATE["preprocessor.featurizer.fb"])


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/outside.txt", "a/../../outside.txt"])
def test_member_that_leaves_the_archive(tmp_path: Path, name: str) -> None:
    path = write_nemo(tmp_path / "bad.nemo", nemo_config(), STATE, {name: b"x"})
    with pytest.raises(MpqError, match="leaves the archive"):
        load_model(path)


def test_link_in_the_archive(tmp_path: Path) -> None:
    path = write_nemo(tmp_path / "bad.nemo", nemo_config(), STATE)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("tokenizer.model")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(MpqError, match="is a link"):
        load_model(path)


class Malicious:
    def __reduce__(self):
        return (print, ("code of the checkpoint runs",))


def test_code_in_the_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_nemo(tmp_path / "bad.nemo", nemo_config(), STATE | {"x": Malicious()})
    with pytest.raises(MpqError, match="not a plain dictionary of tensors"):
        load_model(path)
    assert "code" not in capsys.readouterr().out


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
OTHER_FILES = [
    (POINTER, r"a Git LFS pointer, .*`git lfs pull`"),
    (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>", "a web page, not the file itself"),
    (b"", r"empty \(0 bytes\); copy or download it again"),
    (b"PK\x03\x04 a torch.save", r"a file of torch\.save .* save the whole model"),
    (b"GGUF\x03\0\0\0", "a model in another format"),
    (b"7z\xbc\xaf\x27\x1c", "a compressed file; unpack it"),
    (b"\x1f\x8b\x08", "ended before the end-of-stream marker.*; copy or download it again"),
]


@pytest.mark.parametrize(("content", "words"), OTHER_FILES)
@pytest.mark.parametrize("name", ["model.nemo", "model.safetensors"])
def test_what_is_no_archive_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    if name.endswith("nemo") or not content.startswith(b"\x1f"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MpqError, match=f"^{tmp_path / name}: .*{words}") as error:
            load_model(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"state_dict": STATE, "epoch": 1}, r"has them at \['state_dict'\].*torch\.save\(checkpoint\['state_dict'\], "),
        ({"a": 1, "b": {"model": STATE}}, r"has them at \['b'\]\['model'\]"),
        (STATE | {"epoch": 1}, r"got a int at 'epoch'; save the model's state_dict\(\)"),
        ([1, 2], r"got a list; save the model's state_dict\(\)"),
    ],
)
def test_weights_that_are_wrapped_are_found(saved: object, words: str, tmp_path: Path) -> None:
    path = write_nemo(tmp_path / "wrapped.nemo", nemo_config(), saved)
    with pytest.raises(MpqError, match=words):
        load_model(path)


def test_weights_that_are_a_pointer(tmp_path: Path) -> None:
    path = write_nemo(tmp_path / "pointer.nemo", nemo_config(), {}, {"./model_weights.ckpt": POINTER})
    with pytest.raises(MpqError, match=r"model_weights\.ckpt: .*a Git LFS pointer"):
        load_model(path)


def test_damaged_files(tmp_path: Path, tiny_archive: Path) -> None:
    data = tiny_archive.read_bytes()
    for name, content in (
        ("half", data[: len(data) // 2]),
        ("empty", b""),
        ("text", b"hello" * 1000),
        ("pickle", pickle.dumps(1)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MpqError, match=f"^{tmp_path / name}: "):
            load_model(tmp_path / name)
    with pytest.raises(MpqError, match="no such file"):
        load_model(tmp_path / "absent.nemo")
    with pytest.raises(MpqError, match="a folder"):
        load_model(tmp_path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w"):
        pass
    (tmp_path / "hollow.nemo").write_bytes(buffer.getvalue())
    with pytest.raises(MpqError, match=r"model_config\.yaml"):
        load_model(tmp_path / "hollow.nemo")
