"""The shipped recipes run from a corpus folder to the verdict: on tiny folders of the same shape, with tiny models."""

import json
from pathlib import Path

import soundfile
from click.testing import CliRunner
from tiny_corpora import RECIPES, librispeech, noise, run

from mpq.cli.main import main

TINY = (
    "tokens.vocabulary_size=32", "model.layers=2", "model.width=16", "model.heads=2", "model.ffn_width=24",
    "model.kernel_size=5", "model.decoder_layers=1", "model.decoder_heads=2", "model.decoder_ffn_width=24",
    "train.epochs=2", "train.batch_frames=1500", "train.workers=0", "decode.beam_size=3", "sensitivity.bits=[4,8]",
    "allocate.average_bits=6",
)  # fmt: skip


def stages(recipe: Path, out: Path, *settings: str) -> dict[str, dict]:
    arguments = [part for setting in (*TINY, *settings) for part in ("--set", setting)]
    done = CliRunner().invoke(main, ["run", str(recipe), "--out", str(out), "--quiet", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}


def test_librispeech(tmp_path: Path) -> None:
    for part, chapter in {
        "dev-clean": "1272-1", "dev-other": "116-1", "test-clean": "61-1", "test-other": "367-1",
        "train-clean-100": "103-1", "train-clean-360": "14-1", "train-other-500": "20-1",
    }.items():  # fmt: skip
        folder = tmp_path / "LibriSpeech" / part / chapter.replace("-", "/")
        folder.mkdir(parents=True)
        lines = ""
        for i in range(3):
            soundfile.write(folder / f"{chapter}-{i:04}.flac", noise(2.5 + i / 8, 16000, 1, i), 16000)
            lines += f"{chapter}-{i:04} MISTER QUILTER'S SAYING {['ONE', 'TWO', 'THREE'][i]}\n"
        (folder / f"{chapter}.trans.txt").write_text(lines)
    assert librispeech.main([str(tmp_path / "LibriSpeech"), str(tmp_path / "data")]) == 0
    done = stages(RECIPES / "librispeech/librispeech.toml", tmp_path / "run", f"data.root={tmp_path / 'data'}")
    assert list(done) == ["train", "evaluate", "sensitivity", "allocate", "pack", "compare"]
    assert set(done["compare"]["tests"]) == {"test_clean", "test_other"}
    assert done["compare"]["tests"]["test_other"]["words"] == 12


def test_switchboard(corpora: dict[str, Path], tmp_path: Path) -> None:
    assert run(tmp_path / "data", corpora) == 0
    settings = (f"data.root={tmp_path / 'data'}", 'tokens={type="words"}', "sensitivity.seconds=2")
    done = stages(RECIPES / "swbd/swbd.toml", tmp_path / "run", *settings)
    assert set(done["compare"]["tests"]) == {"hub5e_00_swbd", "hub5e_00_callhm"}
    assert done["train"]["parameters"]["total"] > 10_000
