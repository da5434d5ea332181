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
