"""A model on a test set: hypotheses, word errors and speed, in a folder that `compare` reads.

The folder holds `ref.trn`, `hyp.trn`, `keys.json` (what the manifest says of each utterance) and `metrics.json`; the
last is written last, so a folder with it is complete.
Finished batches are kept in a journal, so a run that was killed resumes.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.files import digest, make_folder, write_json, write_text
from mpq.identity import data_identity
from mpq.journal import Journal
from mpq.loading import open_model
from mpq.models.base import AsrModel
from mpq.progress import progress
from mpq.runtime import choose_device, memory_for
from mpq.scoring.groups import KEYS_FILE, write_keys
from mpq.scoring.metrics import Metrics, measure
from mpq.speech.data import CheckedData, batches, prepare_data, read_batch
from mpq.speech.decoding import GREEDY, DecodeOptions
from mpq.speech.manifests import Utterance
from mpq.speech.trn import escape_markup, format_trn, write_trn


@dataclass(frozen=True)
class Evaluation:
    """The content of `metrics.json`.

    Attributes:
        metrics: The word errors.
        compute_seconds: Time spent on features, model and search; reading audio is not counted.
        skipped: Utterances left out because they are faulty.
        escaped: Outputs with characters that mean something to SCTK, written as U+FFFD in hyp.trn.
        model: {"path", "sha256", "architecture"}.
        data: {"path"}.
        device: The device that it ran on.
        decode: The search for the transcripts.
    """

    metrics: Metrics
    compute_seconds: float
    skipped: int
    escaped: int
    model: dict[str, Any]
    data: dict[str, Any]
    device: str
    decode: DecodeOptions = GREEDY

    @property
    def real_time_factor(self) -> float:
        """Compute time divided by audio time; below 1 is faster than real time."""
        return self.compute_seconds / self.metrics.audio_seconds

    def to_json(self) -> dict[str, Any]:
        return self.metrics.to_json() | {
            "rtf": self.real_time_factor,
            "compute_seconds": self.compute_seconds,
            "skipped": self.skipped,
            "escaped": self.escaped,
            "model": self.model,
            "data": self.data,
            "device": self.device,
            "decode": asdict(self.decode),
        }


def evaluate(
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    decode: DecodeOptions = GREEDY,
    max_batch_seconds: float = 60.0,
    channel: str = "error",
    skip_bad: bool = False,
    device: str = "auto",
    quiet: bool = False,
) -> Evaluation:
    """Transcribes a test set and writes the folder `out`.

    Args:
        checkpoint: A float checkpoint or a packed file.
        data: Manifest or Kaldi directory with transcripts.
        out: The folder to create or to replace the results in.
        decode: The search for the transcripts.
        max_batch_seconds: Padded audio in one batch.
        channel, skip_bad: As in `mpq.speech.data.prepare_data`.
        device: As in `mpq.runtime.choose_device`.
        quiet: Show no progress.

    Raises:
        MpqError: Bad input of any kind.
    """
    where = choose_device(device)
    opened = open_model(checkpoint, where)
    model, record = opened.model, opened.to_json()
    try:
        model.searching(decode.method)
    except MpqError as error:
        raise MpqError(f"{opened.path}: {error}") from None
    checked = prepare_data(data, model, channel=channel, skip_bad=skip_bad, need_text=True)
    utt_ids = [item.utt_id for item in checked.utterances]
    references = [item.text or "" for item in checked.utterances]
    ref = format_trn(data, utt_ids, references)
    planned = batches(checked.utterances, checked.durations, max_batch_seconds)
    make_folder(out)
    journal = Journal(out / "hyp.journal", _fingerprint(record["sha256"], checked, channel, max_batch_seconds, decode))
    hypotheses, seconds = _transcribe(model, planned, journal, decode, channel, quiet)
    duration = dict(zip(utt_ids, checked.durations, strict=True))
    texts = [hypotheses[name] for name in utt_ids]
    metrics = measure(utt_ids, references, texts, [duration[name] for name in utt_ids])
    escaped = sum(escape_markup(text).count("\ufffd") > text.count("\ufffd") for text in texts)
    result = Evaluation(metrics, seconds, checked.skipped, escaped, record, {"path": str(data)}, str(where), decode)
    (out / "metrics.json").unlink(missing_ok=True)
    write_text(out / "ref.trn", ref)
    write_trn(out / "hyp.trn", utt_ids, list(map(escape_markup, texts)))
    write_keys(out / KEYS_FILE, checked.utterances)
    write_json(out / "metrics.json", result.to_json())
    journal.remove()
    return result


def _transcribe(
    model: AsrModel, planned: list[list[Utterance]], journal: Journal, decode: DecodeOptions, channel: str, quiet: bool
) -> tuple[dict[str, str], float]:
    """Returns {utt_id: text} and the seconds of computing, those of an earlier run in the journal included."""
    where = next(model.parameters()).device
    entries = journal.read()
    journal.begin()
    hypotheses: dict[str, str] = {utt_id: text for entry in entries for utt_id, text in entry["hyp"].items()}
    seconds = math.fsum(entry["seconds"] for entry in entries)
    todo = [batch for batch in planned if batch[0].utt_id not in hypotheses]
    with progress("evaluate", sum(len(batch) for batch in todo), quiet, "utterances") as advance:
        for batch in todo:
            waveforms, lengths = read_batch(batch, model.sample_rate, channel)
            start = time.perf_counter()
            with memory_for(
                f"{batch[0].source}: a batch of {len(batch)} x {waveforms.shape[1] / model.sample_rate:.0f} s"
            ):
                texts = model.transcribe(waveforms.to(where), lengths.to(where), decode)
            took = time.perf_counter() - start
            found = dict(zip((item.utt_id for item in batch), texts, strict=True))
            journal.append({"hyp": found, "seconds": took})
            hypotheses |= found
            seconds += took
            advance(len(batch))
    return hypotheses, seconds


def _fingerprint(
    model_sha256: str, checked: CheckedData, channel: str, max_batch_seconds: float, decode: DecodeOptions
) -> str:
    """Returns a digest of all that the hypotheses depend on."""
    data = data_identity(checked.utterances)
    return digest([model_sha256, channel, max_batch_seconds, data, asdict(decode)])
