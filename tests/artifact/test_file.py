"""The packed file: its size, its bits, and what is refused."""

import itertools
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_model

from mpq.artifact import file as file_module
from mpq.artifact import parts as parts_module
from mpq.artifact.file import fixed_bytes, read_artifact, write_artifact
from mpq.artifact.weights import WeightFormat, layer_bytes
from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.quantization.quantizers import fake_quantize
from mpq.quantization.spec import QuantSpec
from mpq.speech.text import SentencePieceTokenizer, tokenizer_from_config

MODEL = tiny_model()
REFS = MODEL.weights()


def write(path: Path, bits: dict[str, int], weight_format: WeightFormat) -> int:
    size = fixed_bytes(MODEL, weight_format) + sum(
        layer_bytes(ref.shape, bits[ref.name], weight_format) for ref in REFS
    )
    write_artifact(path, MODEL, bits, weight_format, size)
    assert path.stat().st_size == size
    return size


def storages() -> list[WeightFormat]:
    return [
        WeightFormat(QuantSpec(8, scheme, granularity, "none", scale_dtype=scale_dtype), rest_dtype)
        for scheme, granularity, (scale_dtype, rest_dtype) in itertools.product(
            ("symmetric", "asymmetric", "mulaw"),
            ("tensor", "channel", "group:16", "group:5"),
            (("float16", "float32"), ("float32", "float16")),
        )
    ]


@pytest.mark.parametrize("weight_format", storages(), ids=lambda s: "-".join(map(str, s.to_json().values())))
def test_round_trip_is_bit_exact_and_of_the_predicted_size(tmp_path: Path, weight_format: WeightFormat) -> None:
    """Every width for some layer, floats too; twice, with the widths dealt out differently."""
    sizes = []
    for shift in (0, 3):
        bits = {ref.name: (*range(1, 9), 16, 32)[(index + shift) % 10] for index, ref in enumerate(REFS)}
        sizes.append(write(tmp_path / "m.safetensors", bits, weight_format))
        packed = read_artifact(tmp_path / "m.safetensors")
        assert packed.quantized_bits == bits
        state, original = packed.state_dict(), MODEL.state_dict()
        for ref in REFS:
            width, weight = bits[ref.name], original[ref.name]
            if width == 16:
                expected = weight.half().float()
            elif width == 32:
                expected = weight
            else:
                spec = QuantSpec(width, **{k: v for k, v in weight_format.to_json().items() if k != "rest_dtype"})
                expected = fake_quantize(weight, spec)
            assert torch.equal(state[ref.name], expected), (ref.name, width)
        for name, tensor in original.items():
            if name not in bits and not name.endswith("num_batches_tracked"):
                exact = weight_format.rest_dtype == "float32" or name.startswith("preprocessor")
                assert torch.equal(state[name], tensor if exact else tensor.half().float()), name
    assert sizes[0] != sizes[1]


def test_transcripts_of_a_packed_file_are_those_of_the_fake_quantized_model(tmp_path: Path) -> None:
    weight_format = WeightFormat(QuantSpec(8), "float32")
    write(tmp_path / "m.safetensors", {ref.name: 4 for ref in REFS}, weight_format)
    quantized = tiny_model()
    state = quantized.state_dict()
    for ref in REFS:
        state[ref.name].copy_(fake_quantize(state[ref.name], QuantSpec(4)))
    waves = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([16000, 9000])
    packed = load_model(tmp_path / "m.safetensors")
    with torch.inference_mode():
        ours, theirs = (m.ctc_log_probs(m.encode(*m.features(waves, lengths))[0]) for m in (packed, quantized))
    assert torch.equal(ours, theirs)
    assert packed.transcribe(waves, lengths) == quantized.transcribe(waves, lengths)
    assert packed.transcribe(waves, lengths) != MODEL.transcribe(waves, lengths)


def test_the_bytes_of_a_mulaw_layer(tmp_path: Path) -> None:
    """Two bits, by hand: rows of 6 with a scale each, codes four to a byte, then the centroids, then the scales."""
    model = tiny_model()
    name = "encoder.pre_encode.conv.0.weight"  # the first weight, (6, 1, 3, 3)
    weight = model.state_dict()[name]
    weight.copy_(torch.tensor([-4.0, -1.34, 1.34, 4.0, 1.3, -1.3, 1.4, -1.4, -4.0]).reshape(3, 3))
    weight[5] = 0
    weight_format = WeightFormat(QuantSpec(8, "mulaw", "channel", "none"))
    bits = {ref.name: 2 for ref in REFS}
    size = fixed_bytes(model, weight_format) + sum(layer_bytes(ref.shape, 2, weight_format) for ref in REFS)
    write_artifact(tmp_path / "m", model, bits, weight_format, size)
    # codes 0 1 2 3 2 1 2 1 0 for each of five rows; zeros are nearest to 0.336 and -0.336, and the upper one is taken
    codes = [*[0, 1, 2, 3, 2, 1, 2, 1, 0] * 5, *[2] * 9, 0, 0]
    packed = [64 * a + 16 * b + 4 * c + d for a, b, c, d in zip(*[iter(codes)] * 4, strict=True)]
    centroids = [0x80, 0x100 - 43, 43, 127]  # mu = 0: a third of 128
    scales = [0x00, 0x44] * 5 + [0, 0]  # 4.0 is 0x4400 in half precision
    stored = load_file(tmp_path / "m")["weights"]
    assert stored[: len(packed) + 16].tolist() == [*packed, *centroids, *scales]
    read = read_artifact(tmp_path / "m").state_dict()[name]
    row = [-4, -4 * 43 / 128, 4 * 43 / 128, 4 * 127 / 128, 1.34375, -1.34375, 1.34375, -1.34375, -4]
    assert read[0].flatten().tolist() == row and bool((read[5] == 0).all())


def test_the_file_is_a_function_of_its_content(tmp_path: Path) -> None:
    bits = {ref.name: 3 for ref in REFS}
    for name in ("a", "b"):
        write(tmp_path / name, bits, WeightFormat(QuantSpec(8)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_it_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    size = write(tmp_path / "m.safetensors", {ref.name: 3 for ref in REFS}, WeightFormat(QuantSpec(8)))
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "mpq.artifact/1"
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) < size  # noqa: SIM118 (no mapping)
    header = int.from_bytes((tmp_path / "m.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


def test_values_that_half_precision_would_lose_stay_exact(tmp_path: Path) -> None:
    model = tiny_model()
    state = model.state_dict()
    name = "encoder.layers.0.conv.batch_norm.running_var"
    state[name][0] = 1e-7  # float16 has 1.19e-7 next to it
    state["encoder.layers.0.norm_out.weight"][0] = 1e6  # float16 ends at 65504
    weight_format = WeightFormat(QuantSpec(8))
    bits = {ref.name: 8 for ref in REFS}
    size = fixed_bytes(model, weight_format) + sum(layer_bytes(ref.shape, 8, weight_format) for ref in REFS)
    write_artifact(tmp_path / "m", model, bits, weight_format, size)
    packed = read_artifact(tmp_path / "m").state_dict()
    for key in (name, "encoder.layers.0.norm_out.weight"):
        assert torch.equal(packed[key], state[key])
    assert not torch.equal(packed["encoder.layers.1.norm_out.weight"], state["encoder.layers.1.norm_out.weight"])


def test_names_must_be_the_models(tmp_path: Path) -> None:
    bits = {ref.name: 4 for ref in REFS}
    for wrong, words in (
        (dict(list(bits.items())[1:]), "no bit-width for encoder.pre_encode.conv.0.weight"),
        (bits | {"other.weight": 4}, "model lacks: other.weight"),
    ):
        with pytest.raises(MpqError, match=words):
            write_artifact(tmp_path / "m", MODEL, wrong, WeightFormat(QuantSpec(8)), 10**6)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MpqError, match="does not fit"):
        write_artifact(tmp_path / "m", MODEL, {ref.name: 4 for ref in REFS}, WeightFormat(QuantSpec(8)), 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_cannot_be_quantized_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.encoder.layers[1].feed_forward1.linear2.weight[0, 0] = torch.nan
    bits = {ref.name: 4 for ref in REFS}
    with pytest.raises(MpqError, match=r"^encoder\.layers\.1\.feed_forward1\.linear2\.weight: .*finite"):
        write_artifact(tmp_path / "m", model, bits, WeightFormat(QuantSpec(8)), 10**6)


# Damage


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "m.safetensors"
    write(path, {ref.name: 4 for ref in REFS}, WeightFormat(QuantSpec(8)))
    return path


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path: Path, artifact: Path) -> None:
    """A flip is refused, or (in the version that wrote the file, or in white space) changes nothing."""
    data = bytearray(artifact.read_bytes())
    original = load_model(artifact).state_dict()
    header = int.from_bytes(data[:8], "little") + 8
    random = np.random.default_rng(0)
    positions = [*range(0, header, 3), *random.integers(header, len(data), 150).tolist()]
    refused = 0
    for position in positions:
        data[position] ^= 1 << int(random.integers(8))
        (tmp_path / "m").write_bytes(data)
        try:
            state = load_model(tmp_path / "m").state_dict()
        except MpqError as error:
            assert str(error).startswith(str(tmp_path / "m"))
            refused += 1
        else:
            assert position < header
            assert all(torch.equal(state[name], original[name]) for name in original)
        data = bytearray(artifact.read_bytes())
    assert refused > 0.7 * len(positions)


def test_cut_off(tmp_path: Path, artifact: Path) -> None:
    data = artifact.read_bytes()
    for size in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "m").write_bytes(data[:size])
        with pytest.raises(MpqError, match=str(tmp_path / "m")):
            load_model(tmp_path / "m")


def test_changed_content_with_a_good_header(tmp_path: Path, artifact: Path) -> None:
    tensors = load_file(artifact)
    with safe_open(artifact, framework="numpy") as file:
        metadata = file.metadata()
    tensors["weights"][0] ^= 1
    save_file(tensors, tmp_path / "m", metadata)
    with pytest.raises(MpqError, match="checksum"):
        load_model(tmp_path / "m")
    del tensors["bits"]
    save_file(tensors, tmp_path / "m", metadata)
    with pytest.raises(MpqError, match="expected the tensors"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("part", ["manifest", "exact"])
def test_a_compressed_bomb_is_refused(part: str, tmp_path: Path, artifact: Path) -> None:
    parts = {name: tensor.tobytes() for name, tensor in load_file(artifact).items()}
    parts[part] = lzma.compress(b" " * (parts_module._LARGEST_MANIFEST + 1), preset=0)
    (tmp_path / "bomb").write_bytes(file_module._file(parts, WeightFormat(QuantSpec(8)), 0))
    with pytest.raises(MpqError, match="a compressed part that is cut off, or larger than the"):
        load_model(tmp_path / "bomb")


def test_newer_version(tmp_path: Path, artifact: Path) -> None:
    (tmp_path / "m").write_bytes(artifact.read_bytes().replace(b"mpq.artifact/1", b"mpq.artifact/3"))
    with pytest.raises(MpqError, match=r"mpq\.artifact/3 is newer.*update"):
        load_model(tmp_path / "m")


def test_safetensors_of_something_else(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "m")
    with pytest.raises(MpqError, match="not written by `mpq pack`"):
        load_model(tmp_path / "m")


def test_sentencepiece_tokenizer_survives(shared: Path) -> None:
    model = load_model(shared / "data/stt_en_conformer_ctc_small.nemo")
    again = tokenizer_from_config(*model.tokenizer.to_config())
    assert isinstance(again, SentencePieceTokenizer) and again.pieces == model.tokenizer.pieces
    assert again.encode("halfway around the track") == model.tokenizer.encode("halfway around the track")
