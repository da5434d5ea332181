"""Archives that are whole, damaged or hostile."""

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
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


@pytest.mark.parametrize("is_gzipped", [False, True])
def test_one_flipped_bit_in_the_weights_is_noticed(is_gzipped: bool, tmp_path: Path) -> None:
    whole = write_nemo(tmp_path / "whole.nemo", nemo_config(), STATE)
    data = bytearray(whole.read_bytes())
    weight = STATE["encoder.layers.0.norm_out.weight"].numpy().tobytes()
    data[data.index(weight) + 1] ^= 1
    whole.write_bytes(gzip.compress(data) if is_gzipped else data)
    with pytest.raises(MpqError, match=r"damaged: .* does not match its checksum; copy the file again"):
        load_model(whole)
    if is_gzipped:
        data = bytearray(gzip.compress(data))
        data[-5] ^= 1
        whole.write_bytes(data)
        with pytest.raises(MpqError, match="CRC check failed"):
            load_model(whole)


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)


def archive(path: Path, config: bytes) -> Path:
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("model_config.yaml")
        info.size = len(config)
        file.addfile(info, io.BytesIO(config))
    return path


@pytest.mark.parametrize(
    "text", [f"{BOMB}target: *a11\n", f"{MERGES}target: *a11\n", "target: &a [*a]\n", "x: &a {y: *a}\ntarget: z\n"]
)
def test_aliases_of_aliases_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(MpqError, match=r"aliases \(&, \*\) stand for far more than its \d+ characters"):
        load_model(archive(tmp_path / "x.nemo", text.encode()))


def test_an_alias_is_read(tmp_path: Path) -> None:
    members = {"x": 1}
    config = nemo_config() | {"train_ds": members, "validation_ds": members}
    assert b"*id001" in yaml.safe_dump(config).encode()
    assert load_model(write_nemo(tmp_path / "x.nemo", config, STATE))


def test_bombs_are_refused(tmp_path: Path) -> None:
    plain = write_nemo(tmp_path / "plain.nemo", nemo_config(), STATE, {"pad.bin": bytes(70 << 20)})
    (tmp_path / "gz.nemo").write_bytes(gzip.compress(plain.read_bytes(), 1))
    with pytest.raises(MpqError, match="unpacks to more than 20 times its size"):
        load_model(tmp_path / "gz.nemo")
    sparse = tarfile.TarInfo("pad.bin")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(1 << 40)}
    sparse.pax_headers["GNU.sparse.map"] = f"{1 << 40},0"
    with tarfile.open(tmp_path / "sparse.nemo", "w", format=tarfile.PAX_FORMAT) as file:
        file.addfile(sparse)
    with pytest.raises(MpqError, match="is sparse, of 1099511627776 bytes"):
        load_model(tmp_path / "sparse.nemo")


def test_weights_in_a_compressed_zip_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1 << 20))
    path = write_nemo(tmp_path / "x.nemo", nemo_config(), STATE, {"./model_weights.ckpt": buffer.getvalue()})
    with pytest.raises(MpqError, match="compressed or overlapping members, which torch does not write"):
        load_model(path)
