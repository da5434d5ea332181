"""The script of recipes/librispeech_small that makes the table of sizes, on a tiny model and a few tones."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_scripts import script

from mpq.loading import load_model
from mpq.quantization.spec import RATES


def test_the_table_of_sizes(
    tiny_archive: Path, tiny_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = tmp_path / "heard.jsonl"
    lines = [json.loads(line) | {"text": "a b"} for line in tiny_manifest.read_text().splitlines()]
    for line in lines:
        line["audio_filepath"] = str(tiny_manifest.parent / line["audio_filepath"])
    heard.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run, module = tmp_path / "run", script("librispeech_small", "sizes", monkeypatch)
    monkeypatch.setattr(module, "UNIFORM", (3,))
    arguments = [str(one) for one in (tiny_archive, tiny_manifest, run)]
    arguments += ["--on", f"heard={heard}", "--draws", "2", "--seconds", "3", "--megabytes", "0.0001,0.0165"]
    done = CliRunner().invoke(module.main, [*arguments, "--schemes", "entropy,uniform"], catch_exceptions=False)
    first, _, head, _, too_small, entropy, uniform = done.stdout.splitlines()
    assert first.startswith("heard: 12 words, float32 ")
    assert "less than the smallest possible" in too_small
    for row in (entropy, uniform):
        assert row.count("|") == head.count("|")
    cells = [cell.strip() for cell in entropy.strip("|").split("|")]
    assert cells[:3] == ["entropy", "0.0165 MB", "2"] and float(cells[3]) <= 16_500 and "±" in cells[5]
    sizes = [(run / f"entropy-0.0165-draw{draw}.safetensors").stat().st_size for draw in (0, 1)]
    assert float(cells[3]) == round(sum(sizes) / 2)
    table = json.loads((run / "entropy-draw1.json").read_text())
    assert table["bits"] == list(RATES) and table["data"]["seed"] == 1
    assert set(load_model(run / "uniform-3-draw0.safetensors").quantized_bits.values()) == {3}
    again = CliRunner().invoke(module.main, [*arguments, "--schemes", "entropy,uniform"], catch_exceptions=False)
    assert again.stdout == done.stdout  # nothing is done twice
