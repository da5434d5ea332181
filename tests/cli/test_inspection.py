"""`mpq inspect`: the parameters of recipes against the paper's tables and a formula; checkpoint folders; refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from tiny_training import write_recipe, write_speech

from mpq.cli.main import main
from mpq.models.checkpoint import write_checkpoint
from mpq.pipeline.read import load_recipe
from mpq.speech.text import CharTokenizer
from mpq.training.building import build_model


def inspected(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def counts(path: Path) -> dict[str, Any]:
    done = inspected(path, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def paper(path: Path, **model: Any) -> Path:
    """Writes a recipe of the paper's set-up: 8 kHz, 80 bands and pitch, 2000 pieces, unpadded subsampling."""
    lines = ["[features]", "sample_rate = 8000", "pitch = true", "[tokens]", 'type = "bpe"', "vocabulary_size = 2000"]
    lines += ["[model]", *(f"{key} = {value}" for key, value in ({"subsampling_padding": 0} | model).items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def block(first: tuple[int, int], second: tuple[int, int], d: int = 256, kernel: int = 31) -> int:
    """Returns the parameters of one block, written down from the paper's section 2; (width, rank) of both modules."""
    norms = 5 * 2 * d
    attention = 4 * (d * d + d) + d * d + 2 * d  # query, key, value, output; positions without bias; u and v
    convolution = (2 * d * d + 2 * d) + (kernel * d + d) + (2 * d + 2 * d) + (d * d + d)  # BatchNorm: scale, shift, two
    total = norms + attention + convolution  # running statistics
    for width, rank in (first, second):
        matrices = 2 * rank * (d + width) if rank else 2 * d * width
        total += matrices + width + d
    return total


def widths(*indices: int) -> list[int]:
    return [1024 + 128 * index for index in indices]


def padded(indices: list[int], total: int) -> list[int]:
    """Returns indices of 12 blocks that begin with these and sum to `total`."""
    missing = 12 - len(indices)
    share, rest = divmod(total - sum(indices), missing)
    return [*indices, *([share] * (missing - 1)), share + rest]


@pytest.mark.parametrize(
    ("encoder", "everything", "model"),
    [
        (19.07, 31.98, {"ffn_width": 1024}),
        (31.68, 44.59, {"ffn_width": 2048}),
        (31.68, 44.59, {}),
        (56.90, 69.81, {"ffn_width": 4096}),
        (69.50, 82.41, {"ffn_width": 5120}),
        (107.33, 120.24, {"ffn_width": 8192}),
        (47.88, 60.79, {"ffn_width": 5120, "ffn_rank": 160}),
        # Table 1, searched widths. Of Sys. 10 and 11 one list is readable; the other one's sum follows from its size.
        (
            42.19, 55.10,
            {"ffn_width": widths(10, 14, 14, 19, 2, 23, 12, 17, 13, 10, 21, 24),
             "ffn2_width": widths(*padded([3, 10, 15, 8, 13, 17, 1], 173))},
        ),
        (
            21.63, 34.54,
            {"ffn_width": widths(*padded([0, 0, 0, 1, 0, 0], 7)),
             "ffn2_width": widths(0, 1, 2, 2, 13, 1, 0, 0, 5, 0, 0, 8)},
        ),
        (21.90, 34.81, {"ffn_width": widths(*padded([0] * 6 + [22], 22)), "ffn2_width": widths(*([0] * 11), 21)}),
    ],
)  # fmt: skip
def test_parameters_are_the_papers(tmp_path: Path, encoder: float, everything: float, model: dict[str, Any]) -> None:
    found = counts(paper(tmp_path / "paper.toml", **model))
    blocks = found["parameters"]["encoder_blocks"]
    assert f"{blocks / 1e6:.2f}" == f"{encoder:.2f}"
    assert found["parameters"]["total"] / 1e6 == pytest.approx(everything, abs=0.02)
    first, second = model.get("ffn_width", 2048), model.get("ffn2_width", model.get("ffn_width", 2048))
    shapes = [
        [(width, model.get("ffn_rank", 0)) for width in (value if isinstance(value, list) else [value] * 12)]
        for value in (first, second)
    ]
    assert blocks == sum(map(block, *shapes))
    assert (found["format"], found["family"], found["file_bytes"]) == ("mpq.inspection/1", "mpq", None)
    assert found["architecture"] == "conformer-ctc-attention"


def test_a_width_and_a_rank_for_every_block(tmp_path: Path) -> None:
    options = {"layers": 3, "width": 32, "heads": 4, "kernel_size": 7, "decoder_layers": 0}
    first, second = [(40, 0), (50, 8), (60, 3)], [(70, 5), (80, 0), (90, 11)]
    options |= {"ffn_width": [40, 50, 60], "ffn_rank": [0, 8, 3], "ffn2_width": [70, 80, 90], "ffn2_rank": [5, 0, 11]}
    path = paper(tmp_path / "lists.toml", **options)
    path.write_text(path.read_text() + "[train]\nctc_weight = 1\n")
    found = counts(path)
    assert found["architecture"] == "conformer-ctc"
    assert found["parameters"]["encoder_blocks"] == sum(
        block(one, two, 32, 7) for one, two in zip(first, second, strict=True)
    )
    kernels = (9 * 32 + 32) + (9 * 32 * 32 + 32)  # two 3 x 3 convolutions
    rest = kernels + (32 * 20 * 32 + 32) + (32 * 2001 + 2001)  # 83 bands, unpadded: 41, 20; 2000 pieces and the blank
    assert found["parameters"]["total"] == found["parameters"]["encoder_blocks"] + rest
    shapes = {layer["name"]: layer["shape"] for layer in found["layers"]}
    assert [32, 8] in shapes.values() and [8, 50] in shapes.values() and [32, 60] not in shapes.values()
    assert all(layer["bits"] is None and layer["bytes"] == 4 * layer["numel"] for layer in found["layers"])


@pytest.mark.parametrize(("kind", "size"), [("characters", 6), ("words", 10)])
def test_the_vocabulary_is_counted_in_the_transcripts(tmp_path: Path, kind: str, size: int) -> None:
    write_speech(tmp_path, ("abc", "cab", "bad", "deed", "ace", "ebb"))
    write_speech(tmp_path, ("dad", "bed cab", "a dab", "ebb"), "more.jsonl")
    path = write_recipe(tmp_path / "r.toml", tokens__type=kind, data__train=["train.jsonl", "more.jsonl"])
    (head,) = [layer for layer in counts(path)["layers"] if layer["name"] == "ctc.weight"]
    assert head["shape"] == [size + 1, 16]  # a to e and the space, or ten words; and the blank
    done = inspected(path)
    assert done.exit_code == 0 and "no file yet" in done.stdout and "ctc.weight" in done.stdout
    (tmp_path / "more.jsonl").unlink()
    done = inspected(path)
    assert done.exit_code == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert f"{path}: the vocabulary ([tokens] type = '{kind}') is that of the training transcripts" in done.stderr
    assert "more.jsonl: no such file" in done.stderr


def test_no_training_data_is_one_line(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.toml", data__train=None)
    done = inspected(path)
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert "[data] train" in done.stderr and "vocabulary" in done.stderr


def test_a_recipe_that_names_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('checkpoint = "x.nemo"\n')
    done = inspected(tmp_path / "r.toml")
    assert done.exit_code == 2 and f"inspect {tmp_path.resolve()}/x.nemo" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nwidth = 252\ndecoder_heads = 5\n", "[model] decoder_heads: expected a divisor of width, 252; got 5"),
        ("[features]\nn_mels = 3\n[model]\nsubsampling_padding = 0\n", "[features] n_mels: "),
        ("[features]\nwindow_ms = 4.0\n", "of 80 bands lie between the frequencies of a window of 64 samples"),
        ("[features]\nn_mels = 4\nwindow_ms = 0.01\n", "[features] n_mels: "),
    ],
)
def test_a_model_that_cannot_be_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text + '[tokens]\ntype = "bpe"\nvocabulary_size = 9\n')
    done = inspected(path)
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.output
    assert words in done.stderr


def test_a_checkpoint_folder(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r.toml"), stages=[], need_files=False)
    with torch.random.fork_rng():
        model = build_model(recipe, CharTokenizer(list(" abcde")))
    done = inspected(tmp_path)
    assert done.exit_code == 2 and "a folder without model.safetensors" in done.stderr
    write_checkpoint(tmp_path / "model.safetensors", model)
    found = counts(tmp_path)
    assert found == counts(tmp_path / "model.safetensors")
    assert found["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    tensors = load_file(tmp_path / "model.safetensors")
    sizes = {name: tensor.numel() for name, tensor in tensors.items() if name != "tokenizer"}
    own = sum(size for name, size in sizes.items() if "featurizer" not in name)
    assert found["parameters"]["total"] == own
    assert all(sizes[layer["name"]] == layer["numel"] for layer in found["layers"])
    write_speech(tmp_path)
    described = counts(tmp_path / "r.toml")
    assert described["parameters"] == found["parameters"] and described["layers"] == found["layers"]
