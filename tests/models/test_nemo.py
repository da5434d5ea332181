"""Models against NeMo's own outputs, and the properties that every model must have."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from tiny_models import LABELS, tiny_model

from mpq.loading import load_model
from mpq.models.base import AsrModel
from mpq.speech.audio import pad_batch


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
            # features of quiet bins, normalised: 4e-5 on one processor, 7e-5 on another
            assert_close(got, expected.reshape(got.shape), 2e-4)
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


# Archives

STATE = tiny_model().state_dict()


def test_archive_gives_the_model_back(tiny_archive: Path) -> None:
    model = load_model(tiny_archive)
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, STATE[name]), name


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
