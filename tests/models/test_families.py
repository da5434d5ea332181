"""A family and a head that no module of mpq knows: one line of the table, and everything else works with them."""

import json
import shutil
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LABELS, tiny_model
from torch import Tensor, nn

from mpq.artifact.file import fixed_bytes, write_artifact
from mpq.artifact.weights import WeightFormat, layer_bytes
from mpq.errors import MpqError
from mpq.loading import load_model, model_files, model_sha256, open_float_model
from mpq.models import families
from mpq.models.base import AsrModel
from mpq.models.checkpoint import MODEL_FILE, write_checkpoint
from mpq.models.families import Family, ForeignFiles, family_class, read_foreign
from mpq.models.heads import CtcHead, Head, HeadContext, Targets
from mpq.models.segment import Segment
from mpq.quantization.spec import QuantSpec
from mpq.sensitivity.divergence import JointDivergence, SegmentTree, output_divergence
from mpq.sensitivity.fisher import fisher_scores, rounding_errors
from mpq.sensitivity.measure import measure_kl
from mpq.sensitivity.statistics import input_grams
from mpq.speech.decoding import GREEDY, DecodeOptions
from mpq.speech.features import LogMel, LogMelOptions
from mpq.speech.text import CharTokenizer
from mpq.training.distillation import Distillation
from mpq.training.losses import JointLoss

NEAREST = WeightFormat(QuantSpec(8, rounding="nearest"))


class LatticeHead(Head):
    """(N, T', U + 1, V) logits, as a transducer has: for each frame and each number of tokens so far.

    Its loss, which no recogniser has, and its search, which is that of the embedding of <sos> alone and emits at most
    one token a frame, keep the test short.
    """

    name, output, needs_tokens, searches = "lattice", "lattice", True, ("greedy",)

    def __init__(self, model: "ToyModel") -> None:
        self.model = model

    @property
    def segments(self) -> tuple[Segment, ...]:
        model = self.model
        return (
            Segment(("embed.",), lambda encoded, prefixes: encoded[:, :, None] + model.embed(prefixes)[:, None]),
            Segment(("joint.",), lambda x, _: model.joint(x.tanh())),
        )

    def context(self, encoded_lengths: Tensor, frames: int, targets: Targets) -> HeadContext:
        prefixes = nn.functional.pad(targets.tokens, (1, 0), value=self.model.blank_id)
        spoken = torch.arange(prefixes.shape[1]) <= targets.lengths[:, None]
        valid = torch.arange(frames) < encoded_lengths[:, None]
        rows = valid[:, :, None] & spoken[:, None] if targets.path is None else targets.path
        return HeadContext(rows, prefixes)

    def log_probs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(dim=-1)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.float().log_softmax(dim=-1)

    def loss(self, scores: Tensor, encoded_lengths: Tensor, targets: Targets, label_smoothing: float) -> Tensor:
        rows = self.context(encoded_lengths, scores.shape[1], targets).rows
        return -(scores[..., self.model.blank_id] * rows).flatten(1).sum(dim=1)

    def loss_tokens(self, tokens: int, utterances: int) -> int:
        return tokens + utterances

    def search(self, encoded: Tensor, encoded_lengths: Tensor, options: DecodeOptions = GREEDY) -> list[list[int]]:
        return [[t for t in row if t != self.model.blank_id] for row in self._steps(encoded, encoded_lengths)]

    def recognised(self, encoded: Tensor, encoded_lengths: Tensor) -> Targets:
        found = Targets.of(self.search(encoded, encoded_lengths), least=0)
        path = torch.zeros(len(encoded), encoded.shape[1], found.tokens.shape[1] + 1, dtype=torch.bool)
        for points, steps in zip(path, self._steps(encoded, encoded_lengths), strict=True):
            spoken = 0
            for frame, token in enumerate(steps):
                points[frame, spoken] = True
                if token != self.model.blank_id:
                    spoken += 1
                    points[frame, spoken] = True  # the blank after the token leads to the next frame
        return Targets(found.tokens, found.lengths, path)

    def _steps(self, encoded: Tensor, encoded_lengths: Tensor) -> list[list[int]]:
        """Returns what each valid frame of each utterance emits."""
        empty = Targets.of([[] for _ in encoded], least=0)
        logits = self.logits(encoded, self.context(encoded_lengths, encoded.shape[1], empty).inputs)
        best = logits[:, :, 0].argmax(dim=-1).tolist()
        return [row[:count] for row, count in zip(best, encoded_lengths.tolist(), strict=True)]


class ToyModel(AsrModel):
    """A linear encoder of log-mel features, a lattice head and a CTC head."""

    family, architecture, sample_rate, min_samples = "toy", "toy-lattice", 16000, 400

    def __init__(self, labels: list[str]) -> None:
        super().__init__()
        self.featurizer = LogMel(LogMelOptions(16000, 8, 512, 400, 160))
        self.tokenizer, self.blank_id = CharTokenizer(labels), len(labels)
        self.encoder = nn.Linear(8, 6)
        self.embed = nn.Embedding(len(labels) + 1, 6)
        self.joint = nn.Linear(6, len(labels) + 1)
        self.ctc = nn.Linear(6, len(labels) + 1)
        self.eval()

    @property
    def mel(self) -> LogMelOptions:
        return self.featurizer.options

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (Segment(("encoder.",), lambda x, _: self.encoder(x)),)

    @property
    def output_heads(self) -> tuple[Head, ...]:
        return LatticeHead(self), CtcHead("ctc.", self.ctc, self.blank_id)

    def features(self, waveforms: Tensor, waveform_lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.featurizer(waveforms, waveform_lengths)

    def feature_lengths(self, waveform_lengths: Tensor) -> Tensor:
        return self.featurizer.lengths(waveform_lengths)

    def context(self, feature_lengths: Tensor, frames: int) -> None:
        return None

    def encoded_lengths(self, feature_lengths: Tensor) -> Tensor:
        return feature_lengths

    def to_config(self) -> tuple[dict[str, Any], bytes]:
        return {"family": "toy", "labels": list(self.tokenizer.pieces)}, b""

    @classmethod
    def from_config(cls, config: dict[str, Any], blob: bytes) -> Self:
        return cls(config["labels"])


def toy(seed: int = 0) -> ToyModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ToyModel([" ", "a", "b", "c"])
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model


def write_toy(folder: Path, model: ToyModel) -> Path:
    """Writes the toy framework's own folder: two files, one of them of a name that mpq's checkpoints have too."""
    folder.mkdir()
    (folder / "labels.json").write_text(json.dumps(model.tokenizer.pieces))
    save_file(model.state_dict(), folder / MODEL_FILE)
    return folder


def toy_files(path: Path) -> tuple[Path, ...]:
    files = path / "labels.json", path / MODEL_FILE
    return files if all(file.is_file() for file in files) else ()


def read_toy(path: Path) -> ToyModel:
    labels, weights = toy_files(path)
    model = ToyModel(json.loads(labels.read_text()))
    model.load_state_dict(load_file(weights))
    return model


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a new family has to touch: one line of the table."""
    files = ForeignFiles("a toy (a folder with labels.json)", toy_files, read_toy)
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, Family(ToyModel, files)])


def three(model: AsrModel) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([4000, 2500, 3200])
    features, frames = model.features(0.1 * torch.randn(3, 4000, generator=random), lengths)
    return [(features[i : i + 1, : int(count)], count[None]) for i, count in enumerate(frames)]


def test_a_new_family_is_loaded_packed_and_read_back(known: None, tmp_path: Path) -> None:
    model = toy()
    state = model.state_dict()
    folder = write_toy(tmp_path / "toy", model)
    opened = open_float_model(folder, "cpu", "measure")
    loaded = opened.model
    assert isinstance(loaded, ToyModel) and opened.path == folder
    assert model_files(folder) == (folder / "labels.json", folder / MODEL_FILE)
    write_checkpoint(tmp_path / "model.safetensors", loaded)
    again = load_model(tmp_path)
    assert isinstance(again, ToyModel) and again.tokenizer.pieces == model.tokenizer.pieces
    assert all(torch.equal(one, state[name]) for name, one in again.state_dict().items())
    bits = dict.fromkeys((ref.name for ref in model.weights()), 8)
    layers = sum(layer_bytes(ref.shape, 8, NEAREST) for ref in model.weights())
    write_artifact(tmp_path / "packed", again, bits, NEAREST, fixed_bytes(again, NEAREST) + layers)
    packed = load_model(tmp_path / "packed")
    assert isinstance(packed, ToyModel) and packed.quantized_bits == bits and len(bits) == 4
    for name in bits:
        torch.testing.assert_close(packed.state_dict()[name], state[name], rtol=0, atol=0.03)


def test_the_fingerprint_of_a_folder_is_that_of_all_files_of_the_model(known: None, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", toy())
    before = model_sha256(folder)
    (folder / "README").write_text("not read")
    assert model_sha256(folder) == before == model_sha256(shutil.copytree(folder, tmp_path / "copy"))
    (folder / "labels.json").write_text(json.dumps([" ", "a", "b", "d"]))
    assert model_sha256(folder) != before


def test_a_family_that_is_not_in_the_table_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        MpqError, match=r"labels\.json: not a format that mpq reads; expected a NeMo archive \(\.nemo\)"
    ):
        load_model(write_toy(tmp_path / "toy", toy()) / "labels.json")
    write_checkpoint(tmp_path / "model.safetensors", toy())
    with pytest.raises(MpqError, match="family: expected mpq or nemo, got 'toy'"):
        load_model(tmp_path)
    assert family_class("nemo") is type(tiny_model())


def test_a_tar_archive_of_any_name_is_nemos(tiny_archive: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(tiny_archive.read_bytes())
    assert read_foreign(tmp_path / "weights").tokenizer.pieces == tuple(LABELS)


def test_a_new_head_takes_part_in_every_measurement() -> None:
    model, data = toy(), three(toy())
    tree = SegmentTree(model)
    assert model.heads == ("lattice", "ctc") and tree.recognition == ("lattice", "ctc")
    assert [tree.sources[index] for index in tree.path("lattice", "ctc")] == [0, 1, 2, 1]
    grams = input_grams(model, data)
    assert set(grams) == {"encoder.weight", "embed.weight", "joint.weight", "ctc.weight"}
    changed = toy()
    with torch.no_grad():
        changed.joint.weight.mul_(0.9)
    joint = JointDivergence(model, data)
    expected = 0.0
    rows = 0
    for features, lengths in data:  # written out: each frame with each prefix that its search passed, and CTC
        with torch.no_grad():
            encoded, _ = model.encode(features, lengths)
            (tokens,) = model.greedy(encoded, lengths)
            prefixes = torch.tensor([model.blank_id, *tokens])
            hidden = (encoded[0, :, None] + model.embed(prefixes)[None]).tanh()
            one, other = (each.joint(hidden).double().log_softmax(dim=-1) for each in (model, changed))
            steps = model.joint(hidden[:, 0]).argmax(dim=-1).tolist()
        assert tokens
        spoken = 0
        for frame, token in enumerate(steps):
            for prefix in (spoken,) if token == model.blank_id else (spoken, spoken + 1):
                expected += min(1.0, float((one.exp() * (one - other))[frame, prefix].sum()))
                rows += 1
            spoken += token != model.blank_id
        rows += int(lengths)
    found = joint.measure({"joint.weight": changed.joint.weight.data})
    assert float(found.sum()) == pytest.approx(expected, rel=1e-5) and joint.frames == rows
    assert output_divergence(model, changed, data) == pytest.approx(expected / rows, rel=1e-5)
    points = [(ref.name, 4) for ref in model.weights()]
    for output in ("lattice", "ctc", "encoder"):
        measured = measure_kl(model, data, points, NEAREST, output)
        assert all(kl > 0 for kl in measured.values())
        scores, count = fisher_scores(model, rounding_errors(model, NEAREST, (4,), {}), *data[0], output=output)
        assert scores.shape == (4, 1) and bool((scores > 0).all())
        (tokens,) = model.greedy(*model.encode(*data[0]))
        assert count == int(data[0][1]) + (len(tokens) if output == "lattice" else 0)
    with torch.no_grad():  # the CTC head after the other's: its state is the encoder output, not the last one computed
        rounded = model.ctc.weight + rounding_errors(model, NEAREST, (4,), {})["ctc.weight"][0].view(5, 6)
        pairs = []
        for features, lengths in data:
            encoded, _ = model.encode(features, lengths)
            logits = nn.functional.linear(encoded[0], rounded, model.ctc.bias)
            pairs.append([x.double().log_softmax(dim=-1) for x in (model.ctc(encoded[0]), logits)])
    kl = sum(float((one.exp() * (one - other)).sum()) for one, other in pairs) / sum(len(one) for one, _ in pairs)
    assert measured["ctc.weight", 4] == pytest.approx(kl, rel=1e-4)


def test_a_new_head_is_trained_and_searched() -> None:
    model, teacher = toy(), toy(1)
    features, lengths = three(model)[0]
    targets = Targets.of([[1, 2]])
    losses = JointLoss(model, 0.0)(features, lengths, targets)
    assert set(losses) == {"lattice", "ctc"}
    found = Distillation(model, None, teacher, 1.0, 0.0, False, True)(
        features, features, lengths, targets, torch.tensor([True])
    )
    assert int(found.rows["lattice"]) == 3 * int(lengths) and bool((found.kl["lattice"] > 0).all())
    torch.testing.assert_close(found.transcripts, losses)
    waveforms = 0.1 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(1))
    whole, count = model.encode(*model.features(waveforms, torch.tensor([4000])))
    for head in (None, "lattice", "ctc"):
        (text,) = model.transcribe(waveforms, torch.tensor([4000]), head=head)
        assert text == model.tokenizer.decode(model.greedy(whole, count, head)[0])
    assert model.searching("prefix").name == "ctc" and model.searching("greedy").name == "lattice"
    with pytest.raises(MpqError, match=r"joint search needs .* it has lattice \(greedy\), ctc \(greedy or prefix\)"):
        model.transcribe(waveforms, torch.tensor([4000]), DecodeOptions("joint"))
    with pytest.raises(MpqError, match="head: expected lattice or ctc, which this model has, got 'attention'"):
        model.transcribe(waveforms, torch.tensor([4000]), head="attention")
