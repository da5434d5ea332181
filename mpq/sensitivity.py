"""How much the output suffers from n-bit quantization of one layer, measured exactly (Li et al. 2023, Eq. 7).

For every weight tensor and every bit-width, that one tensor is replaced by its quantized values and the model's
output distribution is compared with the unquantized one's: the mean over all valid frames of KL(original || changed).

A change in stage s of the model leaves everything before s as it was. So the calibration data walk through the model
once, stage by stage; at each stage the hidden state is kept, the stage's own layers are measured by running only the
stages from there on, and then the state moves one stage further. The numbers are those of whole forward passes, in
a third of the time for NVIDIA's 13 M Conformer (tests/bench_sensitivity.py). Memory: one hidden state and
one float64 log-distribution of the calibration data.

Finished points are kept in a journal beside the result, so a run that was killed resumes; under `torchrun` the points
are shared out among the processes.

Legend: N utterances, T feature frames, F features, T' encoder frames, M valid encoder frames, V classes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mpq.artifact import Storage, fixed_bytes, layer_bytes
from mpq.data import batches, calibration_subset, prepare_data, read_batch
from mpq.errors import MpqError
from mpq.files import check_output, sha256_file
from mpq.journal import Journal
from mpq.models import load_model
from mpq.models.base import AsrModel, Stage
from mpq.quantizers import QuantSpec, fake_quantize
from mpq.records import LayerSensitivity, SensitivityTable
from mpq.runtime import choose_device, memory_for, processes, progress

Point = tuple[str, int]
"""(layer name, bits)."""

OUTPUTS = ("ctc", "encoder")

_BATCH_SECONDS = 40.0


def measure_sensitivity(
    checkpoint: Path,
    data: Path,
    bits: Sequence[int],
    out: Path,
    storage: Storage,
    *,
    output: str = "ctc",
    max_seconds: float | None = 60.0,
    seed: int = 0,
    channel: str = "error",
    skip_bad: bool = False,
    device: str = "auto",
    quiet: bool = False,
) -> SensitivityTable:
    """Measures every layer at every width and writes the `mpq.sensitivity/1` file `out`.

    Points that `out` or its journal already has from the same model, data and quantizer are not measured again.

    Args:
        checkpoint: The float model.
        data: Manifest or Kaldi directory; transcripts are not used.
        bits: Widths, 1 to 8.
        out: The file to write.
        storage: The quantizer.
        output: As in `measure_kl`.
        max_seconds: A random part of the data of at most so many seconds is used; None is all.
        seed: Of that choice.
        channel, skip_bad: As in `mpq.data.prepare_data`.
        device: As in `mpq.runtime.choose_device`.
        quiet: Show no progress.

    Raises:
        MpqError: Bad input of any kind.
    """
    widths = tuple(sorted(set(bits)))
    for width in widths:
        QuantSpec(width)  # refuses what is not a width
    if output not in OUTPUTS:
        raise MpqError(f"--output: expected {' or '.join(OUTPUTS)}, got {output!r}")
    check_output(out, checkpoint, data)
    where = choose_device(device)
    model = load_model(checkpoint, where)
    if model.quantized_bits:
        raise MpqError(f"{checkpoint}: already packed; measure the float checkpoint that it was made from")
    checked = prepare_data(data, model, channel=channel, skip_bad=skip_bad)
    chosen = calibration_subset(checked.utterances, checked.durations, max_seconds, seed)
    waveforms = [read_batch(batch, model.sample_rate, channel) for batch in batches(*chosen, _BATCH_SECONDS)]
    model_record = {"path": str(checkpoint), "sha256": sha256_file(checkpoint), "architecture": model.architecture}
    fingerprint = _fingerprint(model_record["sha256"], waveforms, output, storage)
    with torch.inference_mode():
        features = [model.features(*(tensor.to(where) for tensor in batch)) for batch in waveforms]
    refs = model.weights()
    points = [(ref.name, width) for ref in refs for width in widths]
    journal = Journal(out.with_name(out.name + ".journal"), fingerprint)
    with processes() as workers:
        done = _finished(out, journal)
        workers.barrier()
        if workers.rank == 0:
            journal.begin()
        workers.barrier()
        todo = [point for point in points if point not in done][workers.rank :: workers.count]
        with progress("sensitivity", len(todo), quiet or workers.rank > 0, "points") as advance:

            def keep(name: str, width: int, kl: float) -> None:
                journal.append({"name": name, "bits": width, "kl": kl})
                advance(1)

            if todo:
                with memory_for(f"{data}: batches of {_BATCH_SECONDS:g} s"):
                    measure_kl(model, features, todo, storage, output, keep)
        workers.barrier()
        done |= _finished(out, journal)
        table = SensitivityTable(
            layers=tuple(
                LayerSensitivity(
                    name=ref.name,
                    kind=ref.kind,
                    shape=ref.shape,
                    numel=ref.numel,
                    size_bytes={width: layer_bytes(ref.shape, width, storage) for width in widths},
                    kl={width: done[ref.name, width] for width in widths},
                    float_bytes=layer_bytes(ref.shape, storage.float_bits, storage),
                )
                for ref in refs
            ),
            bits=widths,
            fixed_bytes=fixed_bytes(model, storage),
            model=model_record,
            data={
                "path": str(data),
                "utterances": len(chosen[0]),
                "frames": sum(int(model.encoded_lengths(lengths).sum()) for _, lengths in features),
                "seconds": round(math.fsum(chosen[1]), 3),
                "seed": seed,
                "skipped": checked.skipped,
            },
            output=output,
            quantizer=storage.to_json(),
            fingerprint=fingerprint,
        )
        if workers.rank == 0:
            table.save(out)
            journal.remove()
        workers.barrier()
    return table


def _fingerprint(model_sha256: str, waveforms: Iterable[tuple[Tensor, Tensor]], output: str, storage: Storage) -> str:
    digest = hashlib.sha256(json.dumps([model_sha256, output, "kl", storage.to_json()], sort_keys=True).encode())
    for batch, lengths in waveforms:
        digest.update(lengths.numpy().tobytes())
        digest.update(batch.numpy().tobytes())
    return digest.hexdigest()


def _finished(out: Path, journal: Journal) -> dict[Point, float]:
    """Returns the points of the same measurement that a finished file and the journal hold."""
    done: dict[Point, float] = {}
    if out.exists():
        try:
            table = SensitivityTable.load(out)
        except MpqError:
            table = None  # whatever it is, it will be replaced, as --out says
        if table and table.fingerprint == journal.fingerprint:
            done = {(layer.name, width): kl for layer in table.layers for width, kl in layer.kl.items()}
    return done | {(entry["name"], entry["bits"]): entry["kl"] for entry in journal.read()}


def measure_kl(
    model: AsrModel,
    data: Sequence[tuple[Tensor, Tensor]],
    points: Sequence[Point],
    storage: Storage,
    output: str = "ctc",
    on_point: Callable[[str, int, float], None] = lambda name, bits, kl: None,
) -> dict[Point, float]:
    """Returns the mean KL divergence per frame, in nats, of each point: one layer at one bit-width.

    Args:
        model: The float model; the same when this returns.
        data: Batches of ((N, T, F) features, (N,) valid frames), on the model's device.
        points: What to measure.
        storage: The quantizer.
        output: "ctc": over the CTC posteriors; "encoder": over softmax of the encoder's output, as in the paper. The
            CTC head's own weights, which the encoder's output does not depend on, are measured over the CTC
            posteriors in both cases.
        on_point: Called with each finished point.

    Raises:
        MpqError: An unknown output, a layer that cannot be quantized, or a divergence that is not finite; the message
            names the layer.
    """
    if output not in OUTPUTS:
        raise MpqError(f"output: expected {' or '.join(OUTPUTS)}, got {output!r}")
    stages = (*model.stages, model.head)
    owners = {name: _owner(name, stages) for name, _ in points}
    parameters = dict(model.named_parameters())
    results: dict[Point, float] = {}
    with torch.inference_mode():
        batches = [_Batch(model, features, lengths) for features, lengths in data]
        ends = {
            index: len(stages) - 1 if output == "encoder" and index < len(stages) - 1 else len(stages)
            for index in owners.values()
        }
        references = {end: [batch.log_distribution(stages[:end]) for batch in batches] for end in set(ends.values())}
        for index, stage in enumerate(stages):
            for name, bits in [point for point in points if owners[point[0]] == index]:
                with _quantized(parameters[name], name, bits, storage):
                    changed = (batch.log_distribution(stages[index : ends[index]]) for batch in batches)
                    kl = mean_kl(zip(references[ends[index]], changed, strict=True))
                if not math.isfinite(kl):
                    raise MpqError(f"{name} at {bits} bits: expected a finite divergence, got {kl}")
                results[name, bits] = kl
                on_point(name, bits, kl)
            for batch in batches:
                batch.advance(stage)
    return results


def mean_kl(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Returns the mean over all rows of all pairs of KL(first || second), nats (Li et al. 2023, Eq. 7).

    Args:
        pairs: Of (M, V) float64 log-probabilities.
    """
    total, frames = 0.0, 0
    for reference, changed in pairs:
        total += float((reference.exp() * (reference - changed)).sum())
        frames += len(reference)
    return total / frames


class _Batch:
    """A batch of calibration data on its way through the model."""

    def __init__(self, model: AsrModel, features: Tensor, lengths: Tensor) -> None:
        self.hidden = features
        self.context = model.context(lengths, features.shape[1])
        self.lengths = model.encoded_lengths(lengths)

    def advance(self, stage: Stage) -> None:
        self.hidden = stage.run(self.hidden, self.context)

    def log_distribution(self, stages: Sequence[Stage]) -> Tensor:
        """Returns what these stages make of the hidden state: (M, V) float64 log-softmax of the valid frames."""
        x = self.hidden
        for stage in stages:
            x = stage.run(x, self.context)
        valid = torch.arange(x.shape[1], device=x.device) < self.lengths[:, None]  # (N, T')
        return x[valid].double().log_softmax(dim=-1)


def _owner(name: str, stages: Sequence[Stage]) -> int:
    """Returns the index of the stage that uses a weight."""
    found = [index for index, stage in enumerate(stages) if name.startswith(stage.prefixes)]
    assert len(found) == 1, f"{name}: the model's stages do not own each weight once"
    return found[0]


@contextmanager
def _quantized(parameter: Tensor, name: str, bits: int, storage: Storage) -> Iterator[None]:
    """Gives a weight its quantized values for the time of the block."""
    original = parameter.data
    try:
        parameter.data = fake_quantize(original, replace(storage.spec, bits=bits))
        yield
    except MpqError as error:
        raise MpqError(f"{name}: {error}") from None
    finally:
        parameter.data = original
