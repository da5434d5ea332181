"""Gram matrices against plain loops over the layers' inputs; what the cache keeps."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor, nn

from mpq.artifact.weights import WeightFormat
from mpq.models.base import AsrModel
from mpq.models.heads import CtcHead
from mpq.models.segment import Segment
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.calibration import draw, further, one_by_one
from mpq.sensitivity.statistics import cache_folder, input_grams, input_statistics

GPTQ = WeightFormat(QuantSpec(8, rounding="gptq"))


NEAREST = WeightFormat(QuantSpec(8))


def utterances(model: AsrModel, *frames: int) -> list[tuple[Tensor, Tensor]]:
    """Returns features of noise without a frame of padding, which `features` would add."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for count in frames:
        features, lengths = model.features(
            0.1 * torch.randn(1, 160 * count, generator=generator), torch.tensor([160 * count])
        )
        found.append((features[:, :count], lengths))
    return found


def noise_manifest(folder: Path, *seconds: float) -> Path:
    folder.mkdir()
    random = np.random.default_rng(2)
    for index, length in enumerate(seconds):
        soundfile.write(folder / f"u{index}.wav", 0.1 * random.normal(size=round(16000 * length)), 16000)
    lines = [json.dumps({"audio_filepath": f"u{index}.wav"}) for index in range(len(seconds))]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def observed_inputs(model, features: Tensor, lengths: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns {weight name: input} of one forward pass, and the outputs without bias of what is called as a module."""
    inputs, outputs, hooks = {}, {}, []

    def keep(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[f"{name}.weight"] = args[0]
            channels_last = output if isinstance(module, nn.Linear) else output.movedim(1, -1)
            outputs[f"{name}.weight"] = channels_last - (0 if module.bias is None else module.bias)

        return hook

    def keep_output(name: str, function):
        return lambda module, args, output: inputs.update({name: function(output)})

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            hooks.append(module.register_forward_hook(keep(name)))
    for index, block in enumerate(model.encoder.layers):  # its kernel-1 convolutions are never called as modules
        name = f"encoder.layers.{index}.conv"
        own = keep_output(f"{name}.pointwise_conv1.weight", lambda x: x.transpose(1, 2))
        hooks.append(block.norm_conv.register_forward_hook(own))
        hooks.append(block.conv.batch_norm.register_forward_hook(keep_output(f"{name}.pointwise_conv2.weight", F.silu)))
    encoded, _ = model.encode(features, lengths)
    inputs["decoder.decoder_layers.0.weight"] = encoded.transpose(1, 2)
    for hook in hooks:
        hook.remove()
    return inputs, outputs


def gram_by_loops(x: Tensor, shape: tuple[int, ...], stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
    """Returns (B, K, K): every position of every output, its patch cut out of the padded input by hand."""
    if len(shape) == 2:
        rows = x.reshape(-1, shape[1]).double().numpy()
        return torch.from_numpy(sum(np.outer(row, row) for row in rows))[None]
    x = F.pad(x, [padding, padding] * (len(shape) - 2)).double().numpy()
    groups = x.shape[1] // shape[1]
    grams = np.zeros((groups, math.prod(shape[1:]), math.prod(shape[1:])))
    spans = [dilation * (size - 1) + 1 for size in shape[2:]]
    counts = [(size - span) // stride + 1 for size, span in zip(x.shape[2:], spans, strict=True)]
    for item in x:
        for position in np.ndindex(*counts):
            window = tuple(slice(p * stride, p * stride + s, dilation) for p, s in zip(position, spans, strict=True))
            for group in range(groups):
                patch = item[(slice(group * shape[1], (group + 1) * shape[1]), *window)].flatten()
                grams[group] += np.outer(patch, patch)
    return torch.from_numpy(grams)


@pytest.mark.parametrize("subsampling", ["dw_striding", "striding"])
def test_equal_to_loops_over_every_layers_inputs(subsampling: str) -> None:
    model = tiny_model(subsampling=subsampling)
    data = utterances(model, 25, 18)
    grams = input_grams(model, data)
    modules = dict(model.named_modules())
    assert set(grams) == {ref.name for ref in model.weights()}
    with torch.no_grad():
        observed = [observed_inputs(model, *pair) for pair in data]
    for ref in model.weights():
        module = modules[ref.name.removesuffix(".weight")]
        options = (module.stride[0], module.padding[0]) if ref.kind.startswith("conv") else ()
        expected = sum(gram_by_loops(inputs[ref.name], ref.shape, *options) for inputs, _ in observed)
        gram, blocks = grams[ref.name], ref.shape[0] if ref.kind.endswith("depthwise") else 1
        columns = ref.numel // ref.shape[0]
        assert gram.shape == (blocks, columns, columns) and gram.dtype == torch.float32
        assert not gram.requires_grad
        torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.amax()))
        if ref.name in observed[0][1]:  # the energy of the outputs is tr(W G W')
            weight = module.weight.detach().double().reshape(blocks, -1, columns)
            energy = sum(float(outputs[ref.name].double().square().sum()) for _, outputs in observed)
            assert float(torch.einsum("brj,bjk,brk->", weight, gram.double(), weight)) == pytest.approx(energy, 1e-4)


def test_utterances_add_up() -> None:
    model = tiny_model()
    data = utterances(model, 40, 61, 22)
    shares: list[float] = []
    whole = input_grams(model, data, shares.append)
    assert shares == [1, 1, 1]
    parts = [input_grams(model, [pair]) for pair in data]
    for name, gram in whole.items():
        torch.testing.assert_close(gram, parts[0][name] + parts[1][name] + parts[2][name])


class OtherModel(AsrModel):
    """What NeMo's models do not have: an embedding, groups, dilation, a convolution with keywords, a weight unused."""

    segments, output_heads, mel = (), (), None

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.table = nn.Embedding(5, 6)
            self.grouped = nn.Conv1d(6, 4, 3, stride=2, padding=2, dilation=2, groups=2)
            self.plain = nn.Conv1d(4, 3, 2)
            self.unused = nn.Linear(3, 3)
        self.segments = (Segment(("table.", "grouped."), lambda x, _: self.first(x)),)
        self.output_heads = (CtcHead("plain.", self.last, 0),)

    def first(self, tokens: Tensor) -> Tensor:
        return self.grouped(self.table(tokens).transpose(1, 2))

    def last(self, x: Tensor) -> Tensor:
        return F.conv1d(x, weight=self.plain.weight, padding=1, bias=None).transpose(1, 2)

    def features(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def context(self, feature_lengths: Tensor, frames: int) -> None:
        return None

    def feature_lengths(self, waveform_lengths: Tensor) -> Tensor:
        raise NotImplementedError

    def encoded_lengths(self, feature_lengths: Tensor) -> Tensor:
        return feature_lengths

    def to_config(self) -> tuple[dict, bytes]:
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict, blob: bytes) -> "OtherModel":
        raise NotImplementedError


def test_embeddings_groups_dilation_keywords_and_a_weight_that_nothing_reads() -> None:
    model = OtherModel()
    tokens = torch.tensor([[0, 3, 3, 1, 4, 2, 0, 1, 1]])
    with torch.no_grad():
        table = model.table(tokens).transpose(1, 2)
        grouped = model.grouped(table)
    grams = input_grams(model, [(tokens, torch.tensor([9]))])
    assert set(grams) == {"table.weight", "grouped.weight", "plain.weight"}
    assert torch.equal(grams["table.weight"], torch.eye(6)[None])
    expected = gram_by_loops(table, (4, 3, 3), stride=2, padding=2, dilation=2)
    assert expected.shape == (2, 9, 9)
    torch.testing.assert_close(grams["grouped.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    expected = gram_by_loops(grouped, (3, 4, 2), padding=1)
    torch.testing.assert_close(grams["plain.weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_no_padding_is_seen(tmp_path: Path) -> None:
    model = tiny_model()
    data = one_by_one(model, draw(model, noise_manifest(tmp_path / "data", 0.4, 0.83), None))
    for features, lengths in data:
        assert model.encode(features, lengths)[0].shape[1] == int(model.encoded_lengths(lengths))
    expected = input_grams(model, [(features[:, : int(lengths)], lengths) for features, lengths in data])
    for name, gram in input_grams(model, data).items():
        torch.testing.assert_close(gram, expected[name], rtol=1e-4, atol=1e-5 * float(gram.amax()))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(gram, other[name]) for name, gram in one.items())


def test_statistics_are_collected_once(cache: Path, tiny_manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    data = draw(model, tiny_manifest, 1.0)
    assert input_statistics(model, "abc", data, NEAREST) == {} and not cache.exists()
    fresh = input_statistics(model, "abc", data, GPTQ)
    assert same(fresh, input_grams(model, one_by_one(model, data)))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    planted = {name: gram + 1 for name, gram in fresh.items()}
    save_file(planted, path)
    assert same(input_statistics(model, "abc", data, GPTQ), planted)
    name = next(iter(planted))
    for broken in (whole[:-100], whole[:5], b""):  # cut off, and nothing at all
        path.write_bytes(broken)
        assert same(input_statistics(model, "abc", data, GPTQ), fresh) and path.read_bytes() == whole
    for change in ({"other": torch.eye(3)[None]}, {name: planted[name][:, 1:]}, {name: planted[name][0]}):
        save_file({key: value.contiguous() for key, value in (planted | change).items()}, path)
        assert same(input_statistics(model, "abc", data, GPTQ), fresh) and same(load_file(path), fresh)
    others = further(model, data, 1.0)
    input_statistics(model, "abd", data, GPTQ)
    input_statistics(model, "abc", others, GPTQ)
    assert len(list(cache.iterdir())) == 3
    assert same(input_statistics(model, "abc", data, GPTQ), fresh)
    assert not caplog.records


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, tiny_manifest: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    data = draw(model, tiny_manifest, 0.5)
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("MPQ_CACHE", str(folder))
        assert same(input_statistics(model, "abc", data, GPTQ), input_grams(model, one_by_one(model, data)))
        (record,) = caplog.records
        assert record.levelname == "WARNING" and record.name == "mpq.sensitivity.statistics"
        message = record.getMessage()
        assert message.startswith("the statistics were not cached: ") and str(tmp_path) in message
        caplog.clear()


def test_the_oldest_of_too_many_go(cache: Path, tiny_manifest: Path) -> None:
    model = tiny_model()
    data = draw(model, tiny_manifest, 0.5)
    paths = {}
    for index in range(3):
        input_statistics(model, str(index), data, GPTQ)
        (path,) = set(cache.iterdir()) - set(paths.values())
        os.utime(path, (index + 1, index + 1))
        paths[str(index)] = path
    (cache / "notes.txt").write_text("somebody's own")
    size = paths["0"].stat().st_size
    input_statistics(model, "0", data, GPTQ)  # used again: now "1" is the oldest
    input_statistics(model, "3", data, GPTQ, cache_bytes=3.5 * size)
    left = set(cache.glob("grams-*"))
    assert len(left) == 3 and paths["1"] not in left and {paths["0"], paths["2"]} < left
    input_statistics(model, "4", data, GPTQ, cache_bytes=0)
    (newest,) = cache.glob("grams-*")
    assert newest not in left and (cache / "notes.txt").exists()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MPQ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "mpq"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mpq"
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
