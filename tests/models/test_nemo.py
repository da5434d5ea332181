"""Models against NeMo's own outputs, and the properties that every model must have."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import LABELS, nemo_config, tiny_model, write_nemo

from mpq.errors import MpqError
from mpq.loading import load_model
from mpq.models.base import AsrModel
from mpq.models.nemo import NemoConformerCtc
from mpq.models.positions import sinusoids
from mpq.speech.audio import pad_batch
from mpq.speech.features import LogMelOptions, slaney_filter_bank
from mpq.speech.text import CharTokenizer


def outputs(model: AsrModel, waveforms: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        features, feature_lengths = model.features(*pad_batch(waveforms))
        encoded, encoded_lengths = model.encode(features, feature_lengths)
        return features, feature_lengths, encoded, encoded_lengths, model.ctc_log_probs(encoded)


def assert_close(got: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert float(np.abs(got.numpy() - expected).max()) <= tolerance


# NeMo's outputs


def test_fastconformer_equals_nemo(shared: Path) -> None:
    folder = shared / "reference/checkpoints/nemo_fastconformer_ctc_char"
    model = load_model(folder / "nemo_fastconformer_ctc_char.nemo")
    meta = json.loads((folder / "meta.json").read_text())
    reference = np.load(folder / "reference.npz")
    waveforms = [torch.from_numpy(reference[f"wav_{i}"]) for i in range(3)]
    for prefix, batch in [("batch", waveforms), *((f"single{i}", [waveforms[i]]) for i in range(3))]:
        features, feature_lengths, encoded, encoded_lengths, log_probs = outputs(model, batch)
        assert feature_lengths.tolist() == reference[f"{prefix}_feats_lengths"].reshape(-1).tolist()
        assert encoded_lengths.tolist() == reference[f"{prefix}_enc_lengths"].reshape(-1).tolist()
        for got, key in ((features, "feats"), (encoded, "enc"), (log_probs, "ctc_logprobs")):
            expected = reference[f"{prefix}_{key}"]
            assert_close(got, expected.reshape(got.shape), 4e-5)
        texts = model.transcribe(*pad_batch(batch))
        for i, text in enumerate(texts):
            greedy = reference[f"batch_greedy_{i}" if prefix == "batch" else f"{prefix}_greedy"]
            assert text == "".join(LABELS[token] for token in greedy.tolist())
    assert model.blank_id == meta["blank_id"]
    # NeMo's own count leaves BatchNorm's running statistics out: 2 for each of 32 channels of 3 blocks
    assert model.parameter_counts() == {
        "total": meta["parameters"]["total"] + 192,
        "encoder_blocks": meta["parameters"]["encoder_blocks"] + 192,
    }


def test_nvidias_model_equals_nemo(shared: Path) -> None:
    folder = shared / "reference/checkpoints/nemo_stt_en_conformer_ctc_small"
    model = load_model(shared / "data/stt_en_conformer_ctc_small.nemo")
    meta = json.loads((folder / "meta.json").read_text())
    reference = np.load(folder / "reference.npz")
    waveforms = []
    for i, utterance in enumerate(meta["utterances"]):
        samples, _ = soundfile.read(shared / "data/read_speech" / utterance["audio"], dtype="float32")
        waveforms.append(torch.from_numpy(samples))
        features, _, encoded, encoded_lengths, log_probs = outputs(model, [waveforms[i]])
        assert_close(features[0].T, reference[f"feat_{i}"], 1e-3)
        assert_close(encoded[0].T, reference[f"enc_{i}"], 1e-3)
        assert_close(log_probs[0], reference[f"logp_{i}"], 1e-3)
        assert int(encoded_lengths) == utterance["enc_len"]
        assert model.transcribe(*pad_batch([waveforms[i]])) == [utterance["greedy_text"]]
    *_, log_probs = outputs(model, waveforms)
    assert_close(log_probs, reference["batch_logp"], 1e-3)
    assert model.transcribe(*pad_batch(waveforms)) == meta["batch_greedy_text"]


def test_filter_bank_equals_the_checkpoints(shared: Path) -> None:
    model = load_model(shared / "data/stt_en_conformer_ctc_small.nemo")
    front = model.preprocessor.featurizer
    assert float((slaney_filter_bank(front.options) - front.fb[0]).abs().max()) < 1e-6 * float(front.fb.max()) * 10


# Properties

VARIANTS = [
    {},
    {"subsampling": "striding", "subsampling_channels": 16},
    {"subsampling_factor": 8},
    {"subsampling_factor": 2},
    {"conv_norm": "layer_norm"},
    {"use_bias": False},
    {"scale_input": False},
    {"attention_mask": "key"},
    {"kernel_size": 31, "layers": 1},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_alone_equals_padded_in_a_batch(options: dict) -> None:
    model = tiny_model(**options)
    generator = torch.Generator().manual_seed(1)
    waveforms = [0.1 * torch.randn(size, generator=generator) for size in (16000, 9000, 400, 5037)]
    *_, lengths, batch = outputs(model, waveforms)
    for i, waveform in enumerate(waveforms):
        *_, length, alone = outputs(model, [waveform])
        assert int(length[0]) == int(lengths[i])
        difference = (alone[0, : int(length[0])] - batch[i, : int(length[0])]).abs().max()
        assert float(difference) <= 2e-5
        assert model.transcribe(*pad_batch([waveform])) == [model.transcribe(*pad_batch(waveforms))[i]]


def test_stages_own_every_weight_once() -> None:
    model = tiny_model()
    segments = (*model.segments, *model.head("ctc").segments)
    for ref in model.weights():
        assert sum(ref.name.startswith(segment.prefixes) for segment in segments) == 1


def test_weights_are_all_matrices_and_kernels() -> None:
    model = tiny_model()
    kinds = {ref.name: ref.kind for ref in model.weights()}
    assert kinds["encoder.pre_encode.conv.0.weight"] == "conv2d"
    assert kinds["encoder.pre_encode.conv.2.weight"] == "conv2d_depthwise"
    assert kinds["encoder.layers.0.conv.pointwise_conv1.weight"] == "conv1d"
    assert kinds["encoder.layers.0.conv.depthwise_conv.weight"] == "conv1d_depthwise"
    assert kinds["encoder.layers.1.self_attn.linear_pos.weight"] == "linear"
    assert kinds["decoder.decoder_layers.0.weight"] == "conv1d"
    matrices = {name for name, tensor in model.named_parameters() if tensor.ndim > 1 and "pos_bias" not in name}
    assert set(kinds) == matrices


def test_weights_of_modules_that_other_models_have() -> None:
    model = tiny_model()
    model.extra = torch.nn.ModuleDict(
        {"attention": torch.nn.MultiheadAttention(8, 2), "table": torch.nn.Embedding(5, 8)}
    )
    kinds = {ref.name: ref.kind for ref in model.weights()}
    assert kinds["extra.attention.in_proj_weight"] == "packed_projection"
    assert kinds["extra.attention.out_proj.weight"] == "linear"
    assert kinds["extra.table.weight"] == "embedding"


def test_a_matrix_that_cannot_be_quantized_is_not_passed_over() -> None:
    model = tiny_model()
    model.extra = torch.nn.Bilinear(2, 3, 4)
    with pytest.raises(AssertionError, match=r"extra\.weight"):
        model.weights()


def test_relative_positions_by_hand() -> None:
    table = sinusoids(torch.arange(2, -3, -1), 4)
    assert table.shape == (5, 4)
    for row, position in zip(table.tolist(), (2, 1, 0, -1, -2), strict=True):
        expected = [np.sin(position), np.cos(position), np.sin(position / 100), np.cos(position / 100)]
        np.testing.assert_allclose(row, expected, atol=1e-6)


@pytest.mark.parametrize("normalize", ["per_feature", "all_features", "none"])
def test_features_by_a_plain_loop(normalize: str) -> None:
    """One frame at a time in float64, from the description of NeMo's preprocessor."""
    options = LogMelOptions(16000, 8, 512, 400, 160, normalize=normalize, pad_to=16)
    model = NemoConformerCtc(tiny_model(features=8).encoder.options, options, tiny_model().tokenizer)
    wave = 0.1 * torch.randn(3000, generator=torch.Generator().manual_seed(2))
    got, lengths = model.features(wave[None], torch.tensor([3000]))
    samples = wave.double().numpy()
    emphasized = np.concatenate([samples[:1], samples[1:] - 0.97 * samples[:-1]])
    padded = np.pad(emphasized, 256)
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399), 56)
    bank = slaney_filter_bank(options).double().numpy()
    frames = []
    for t in range(3000 // 160):
        power = np.abs(np.fft.rfft(padded[t * 160 : t * 160 + 512] * window)) ** 2
        frames.append(np.log(bank @ power + 2.0**-24))
    expected = np.array(frames)
    axis = {"per_feature": 0, "all_features": None, "none": None}[normalize]
    if normalize != "none":
        deviation = expected.std(axis=axis, ddof=1, keepdims=True)
        expected = (expected - expected.mean(axis=axis, keepdims=True)) / (deviation + 1e-5)
    assert lengths.tolist() == [18] and got.shape == (1, 32, 8)
    np.testing.assert_allclose(got[0, :18].numpy(), expected, atol=2e-4)
    assert bool((got[0, 18:] == 0).all())


# Archives

STATE = tiny_model().state_dict()


def test_archive_gives_the_model_back(tiny_archive: Path) -> None:
    model = load_model(tiny_archive)
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, STATE[name]), name


def test_null_is_absent_and_defaults_may_be_written_out(tmp_path: Path) -> None:
    encoder = {"causal_downsampling": None, "att_context_style": None, "conv_norm_type": None, "use_bias": None}
    config = nemo_config(encoder=encoder | {"conv_context_size": [2, 2]}, decoder={"num_classes": None})
    assert load_model(write_nemo(tmp_path / "m.nemo", config, STATE)).encoder.options == tiny_model().encoder.options


def test_labels_of_several_characters_can_be_decoded() -> None:
    tokenizer = CharTokenizer([*LABELS, "<unk>"])
    assert tokenizer.decode([1, len(LABELS), 2]) == "a<unk>b"
    assert tokenizer.missing("ab<c") == ["<"]


def test_a_single_frame_has_features() -> None:
    features, lengths = tiny_model().features(torch.ones(2, 400), torch.tensor([400, 160]))
    assert lengths.tolist() == [2, 1] and bool(features.isfinite().all()) and bool((features[1] == 0).all())


def test_gzipped_archive_without_buffers(tmp_path: Path, tiny_archive: Path) -> None:
    state = {name: tensor for name, tensor in STATE.items() if not name.startswith("preprocessor")}
    plain = write_nemo(tmp_path / "plain.nemo", nemo_config(), state)
    with tarfile.open(plain) as source, tarfile.open(tmp_path / "old.nemo", "w:gz") as target:
        for member in source:
            target.addfile(member, source.extractfile(member))
    model = load_model(tmp_path / "old.nemo")
    torch.testing.assert_close(model.preprocessor.featurizer.fb, STATE["preprocessor.featurizer.fb"])


def without(name: str) -> dict:
    return {key: tensor for key, tensor in STATE.items() if key != name}


WEIGHT = "encoder.layers.1.self_attn.linear_q.weight"


@pytest.mark.parametrize(
    "config, state, words",
    [
        (nemo_config(), without(WEIGHT), f"tensor {WEIGHT} is missing"),
        (nemo_config(), STATE | {"encoder.more": torch.zeros(2)}, r"tensor encoder\.more .*has no place"),
        (nemo_config(), STATE | {WEIGHT: torch.zeros(16, 15)}, rf"{WEIGHT}: expected shape \(16, 16\), got \(16, 15\)"),
        (nemo_config(), STATE | {WEIGHT: torch.full((16, 16), torch.nan)}, f"{WEIGHT} has values that are not finite"),
        (nemo_config(target="nemo.collections.asr.models.rnnt_models.EncDecRNNTModel"), STATE, "RNN-T.*supported: CTC"),
        (nemo_config(target="a.EncDecHybridRNNTCTCModel"), STATE, "RNN-T.*supported: CTC"),
        (nemo_config(target="a.EncDecSpeakerLabelModel"), STATE, "unknown architecture.*supported"),
        (nemo_config(encoder={"_target_": "a.SqueezeformerEncoder"}), STATE, "unknown architecture"),
        (nemo_config(encoder={"self_attention_model": "rel_pos_local_attn"}), STATE, "encoder.self_attention_model"),
        (nemo_config(encoder={"subsampling": "vggnet"}), STATE, "encoder.subsampling"),
        (nemo_config(encoder={"att_context_size": [64, 0]}), STATE, "encoder.att_context_size"),
        (nemo_config(encoder={"conv_kernel_size": 4}), STATE, "kernel_size: expected an odd number"),
        (nemo_config(encoder={"subsampling_factor": 3}), STATE, "power of two"),
        (nemo_config(encoder={"n_heads": 3}), STATE, "multiple of heads"),
        (nemo_config(encoder={"n_layers": "two"}), STATE, "encoder.n_layers: expected a whole number"),
        (nemo_config(encoder={"feat_in": 80}), STATE, "feat_in is 80"),
        (nemo_config(encoder=None), STATE, "encoder"),
        (nemo_config(preprocessor={"normalize": "fixed_mean"}), STATE, "preprocessor.normalize"),
        (nemo_config(preprocessor={"frame_splicing": 3}), STATE, "preprocessor.frame_splicing"),
        (nemo_config(decoder={"num_classes": 5}), STATE, "num_classes is 5"),
        (nemo_config(encoder={"n_layers": 2.5}), STATE, "encoder.n_layers: expected a whole number"),
        (nemo_config(encoder={"n_heads": 0}), STATE, "encoder.n_heads: expected a whole number, 1 or more, got 0"),
        (nemo_config(encoder={"d_model": float("nan")}), STATE, "encoder.d_model"),
        (nemo_config(encoder={"d_model": 10**8}), STATE, "memory|overflow|invalid|expected shape"),
        (nemo_config(encoder={"conv_kernel_size": -5}), STATE, "encoder.conv_kernel_size"),
        (nemo_config(encoder={"subsampling_conv_channels": 0}), STATE, "encoder.subsampling_conv_channels"),
        (nemo_config(encoder={"ff_expansion_factor": -1}), STATE, "encoder.ff_expansion_factor"),
        (nemo_config(encoder={"use_bias": "false"}), STATE, "encoder.use_bias: expected true or false, got 'false'"),
        (nemo_config(preprocessor={"n_fft": "abc"}), STATE, "preprocessor.n_fft"),
        (nemo_config(preprocessor={"n_fft": 100}), STATE, "preprocessor.n_fft: expected a whole number, 400 or more"),
        (nemo_config(preprocessor={"window_stride": 0}), STATE, "preprocessor.n_window_stride"),
        (nemo_config(preprocessor={"lowfreq": 900, "highfreq": 800}), STATE, "lowfreq < highfreq"),
        (nemo_config(decoder=[1]), STATE, "decoder: expected a mapping"),
        (nemo_config(), STATE | {WEIGHT: STATE[WEIGHT].to(torch.complex64)}, f"{WEIGHT}: expected plain real numbers"),
        (nemo_config(), STATE | {WEIGHT: STATE[WEIGHT] > 0}, f"{WEIGHT}: expected torch.float32, got torch.bool"),
        (
            nemo_config() | {"tokenizer": {"type": "wpe"}},
            STATE,
            "bpe",
        ),
        (
            nemo_config() | {"tokenizer": {"type": "bpe", "model_path": "nemo:../../etc/passwd"}},
            STATE,
            "leaves the archive",
        ),
        (nemo_config() | {"tokenizer": {"type": "bpe", "model_path": "/etc/passwd"}}, STATE, "leaves the archive"),
        (
            nemo_config() | {"tokenizer": {"type": "bpe", "model_path": "nemo:x.model"}},
            STATE,
            "'x.model': no such member",
        ),
    ],
)
def test_archives_that_cannot_be_read_are_refused_by_name(tmp_path: Path, config, state, words) -> None:
    path = write_nemo(tmp_path / "bad.nemo", config, state)
    with pytest.raises(MpqError, match=words) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


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


# A small archive of our own making


GOLDEN = Path(__file__).resolve().parents[1] / "golden/nemo"


def test_our_own_archive_gives_what_an_independent_program_computed() -> None:
    """`tests/golden/nemo/make.py` made it; needs no files but those of the repository."""
    model, expected = load_model(GOLDEN / "tiny.nemo"), np.load(GOLDEN / "expected.npz")
    waveforms = [torch.from_numpy(expected[f"samples_{index}"]).float() / 32768 for index in range(2)]
    features, feature_lengths, encoded, encoded_lengths, log_probs = outputs(model, waveforms)
    for index in range(2):
        frames, count = int(feature_lengths[index]), int(encoded_lengths[index])
        assert_close(features[index, :frames], expected[f"features_{index}"], 1e-4)
        assert_close(encoded[index, :count], expected[f"encoded_{index}"], 1e-4)
        assert_close(log_probs[index, :count], expected[f"log_probs_{index}"], 1e-4)
    assert model.greedy(encoded, encoded_lengths) == [expected[f"tokens_{index}"].tolist() for index in range(2)]
    assert min(len(set(expected[f"tokens_{index}"].tolist())) for index in range(2)) >= 3  # a golden of silence is none


def test_the_independent_program_computes_what_nemo_does(shared: Path) -> None:
    folder = shared / "reference/checkpoints/nemo_fastconformer_ctc_char"
    command = [sys.executable, GOLDEN / "make.py", "--check", folder / "nemo_fastconformer_ctc_char.nemo"]
    done = subprocess.run([*command, folder / "reference.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
