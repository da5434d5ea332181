"""The effect of n-bit quantization of each layer on the output, by one of two methods.

"fisher" (`mpq.sensitivity.fisher`) is the second-order score: one backward pass for each utterance serves all layers
and widths.

"kl" is exact (Li et al. 2023, Eq. 7): for every weight tensor and every bit-width, that one tensor is replaced by its
quantized values and the model's output distribution is compared with the unquantized one's: the mean over all valid
frames of KL(original || changed).

A change in segment s of the model leaves everything before s as it was. So the calibration data walk through the model
once, segment by segment; at each segment the hidden state is kept, the segment's own layers are measured by running
only the segments from there on, and then the state moves one segment further. The numbers are those of whole forward
passes, in a third of the time for NVIDIA's 13 M Conformer (tests/bench_sensitivity.py). Memory: one hidden state and
one float64 log-distribution of the calibration data.

Finished points or utterances are kept in a journal beside the result, so a run that was killed resumes; under
`torchrun` they are shared out among the processes.

Legend: N utterances, T feature frames, F features, L layers, W widths.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpq import __version__
from mpq.artifact.file import fixed_bytes
from mpq.artifact.parts import fold_as_stored
from mpq.artifact.sizes import LayerSizes
from mpq.artifact.weights import WeightFormat, layer_bytes, quantize_weight, unreached
from mpq.errors import MpqError
from mpq.files import check_output, digest
from mpq.journal import Journal
from mpq.loading import OpenedModel, model_files, open_float_model
from mpq.models.base import AsrModel
from mpq.progress import progress
from mpq.quantization.quantizers import dequantize
from mpq.runtime import Processes, choose_device, memory_for, processes
from mpq.sensitivity.calibration import (
    BATCH_SECONDS,
    CALIBRATION_SECONDS,
    CalibrationData,
    draw,
    in_batches,
    one_by_one,
)
from mpq.sensitivity.divergence import OutputBatch, SegmentTree, mean_kl, owner
from mpq.sensitivity.fisher import fisher_scores, rounding_errors, typical_scores
from mpq.sensitivity.records import LayerSensitivity, SensitivityTable
from mpq.sensitivity.statistics import input_statistics

Point = tuple[str, float]
"""(layer name, bits)."""
Score = tuple[float, tuple[float, float] | None]
"""Nats per frame, and the ends of the 95 % confidence interval where there is one."""

METHODS = {"fisher": CALIBRATION_SECONDS, "kl": 60.0}
"""The methods, and how many seconds of audio the command line gives each by default."""


def measure_sensitivity(
    checkpoint: Path,
    data: Path,
    bits: Sequence[float],
    out: Path,
    weight_format: WeightFormat,
    *,
    method: str = "fisher",
    output: str | None = "ctc",
    max_seconds: float | None = CALIBRATION_SECONDS,
    seed: int = 0,
    channel: str = "error",
    skip_bad: bool = False,
    is_varied: bool | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> SensitivityTable:
    """Measures every layer at every width and writes the `mpq.sensitivity/1` file `out`.

    Points that `out` or its journal already has for the same model, data, method and quantizer are kept.

    Args:
        checkpoint: The float model.
        data: Manifest or Kaldi directory; transcripts are not used.
        bits: Widths, 1 to 8; rates where the scheme is entropy-coded.
        out: The file to write.
        weight_format: The quantizer, and how weights are stored.
        method: "fisher" or "kl".
        output: As in `measure_kl`; None: that of the head that needs tokens, where there is one, else of the default.
        max_seconds: A random part of the data of at most so many seconds is used; None is all.
        seed: The seed of that choice, and of the signs that "fisher" draws.
        channel, skip_bad: As in `mpq.speech.data.prepare_data`.
        is_varied: Whether the audio is varied (`mpq.sensitivity.calibration.varied`); None: where codes are
            entropy-coded.
        device: As in `mpq.runtime.choose_device`.
        quiet: Show no progress.

    Raises:
        MpqError: Bad input of any kind.
    """
    widths = _checked(bits, method, weight_format)
    check_output(out, *model_files(checkpoint), data)
    opened = open_float_model(checkpoint, choose_device(device), "measure")
    fold_as_stored(opened.model, weight_format)
    output = output or max(opened.model.output_heads, key=lambda head: head.needs_tokens).output
    SegmentTree(opened.model).check(output)
    is_varied = weight_format.spec.record.is_entropy_coded if is_varied is None else is_varied
    drawn = draw(opened.model, data, max_seconds, seed, channel, skip_bad, is_varied)
    task = _Task(opened, drawn, widths, weight_format, output, method, quiet, LayerSizes(weight_format))
    journal = Journal(out.with_name(out.name + ".journal"), task.fingerprint)
    with processes() as workers:
        done, known_bytes = _finished(out, task.fingerprint)
        workers.barrier()
        if workers.rank == 0:
            journal.begin()
        workers.barrier()
        with memory_for(f"{data}: utterances or batches of {BATCH_SECONDS:g} s"):
            grams = task.statistics(workers)
            measure = _measure_fisher if method == "fisher" else _measure_kl
            scores = done | measure(task, grams, done.keys(), journal, workers)
        table = _table(task, grams, scores, known_bytes)
        if workers.rank == 0:
            table.save(out)
            journal.remove()
        workers.barrier()
    return table


def _checked(bits: Sequence[float], method: str, weight_format: WeightFormat) -> tuple[float, ...]:
    """Returns the widths in order; raises MpqError for a bad width or method."""
    # the quantizer refuses other numbers
    widths = tuple(sorted({replace(weight_format.spec, bits=width).bits for width in bits}))
    if method not in METHODS:
        raise MpqError(f"--method: expected {' or '.join(METHODS)}, got {method!r}")
    return widths


def _finished(out: Path, fingerprint: str) -> tuple[dict[Point, Score], dict[Point, int]]:
    """Returns the scores, and the bytes, of the points of the same measurement that a finished file holds."""
    if not out.exists():
        return {}, {}
    try:
        table = SensitivityTable.load(out)
    except MpqError:
        return {}, {}  # whatever it is, it will be replaced, as --out says
    if table.fingerprint != fingerprint:
        return {}, {}
    scores = {
        (layer.name, width): (kl, layer.interval[width] if layer.interval else None)
        for layer in table.layers
        for width, kl in layer.kl.items()
    }
    sizes = {(layer.name, width): size for layer in table.layers for width, size in layer.size_bytes.items()}
    return scores, sizes


@dataclass(frozen=True)
class _Task:
    """A measurement: all that the table depends on.

    Attributes:
        opened: The float model.
        data: The audio.
        widths: The bit-widths, ascending.
        weight_format, output, method: As in `measure_sensitivity`.
        quiet: Show no progress.
        sizes: The bytes of the layers that have been rounded.
    """

    opened: OpenedModel
    data: CalibrationData
    widths: tuple[float, ...]
    weight_format: WeightFormat
    output: str
    method: str
    quiet: bool
    sizes: LayerSizes

    @property
    def model(self) -> AsrModel:
        """The float model."""
        return self.opened.model

    @property
    def fingerprint(self) -> str:
        """A digest of all that a score depends on."""
        seed = self.data.seed if self.method == "fisher" else 0
        audio, how = self.data.sha256, self.weight_format.to_json()
        return digest([__version__, self.opened.sha256, audio, self.output, self.method, seed, how])

    def statistics(self, workers: Processes) -> dict[str, Tensor]:
        """Returns the statistics for the rounding; one process collects them, the others find them in the cache."""
        if workers.rank > 0:
            workers.barrier()
        quiet = self.quiet or workers.rank > 0
        grams = input_statistics(self.model, self.opened.sha256, self.data, self.weight_format, quiet)
        if workers.rank == 0:
            workers.barrier()
        return grams


def _measure_kl(
    task: _Task, grams: Mapping[str, Tensor], done: Set[Point], journal: Journal, workers: Processes
) -> dict[Point, Score]:
    """Returns all points that are not done; the journal has {"name", "bits", "kl"} for each."""
    model = task.model
    known = set(done) | {(entry["name"], entry["bits"]) for entry in journal.read()}
    workers.barrier()  # so that all have read the same
    todo = [(ref.name, width) for ref in model.weights() for width in task.widths if (ref.name, width) not in known]
    todo = todo[workers.rank :: workers.count]
    with progress("sensitivity", len(todo), task.quiet or workers.rank > 0, "points") as advance:

        def keep(name: str, width: float, kl: float) -> None:
            journal.append({"name": name, "bits": width, "kl": kl})
            advance(1)

        if todo:
            batches = in_batches(model, task.data, BATCH_SECONDS)
            measure_kl(model, batches, todo, task.weight_format, task.output, keep, grams, task.sizes)
    workers.barrier()
    return {(entry["name"], entry["bits"]): (entry["kl"], None) for entry in journal.read()}


def _measure_fisher(
    task: _Task, grams: Mapping[str, Tensor], done: Set[Point], journal: Journal, workers: Processes
) -> dict[Point, Score]:
    """Returns the points of all widths of which one is not done.

    The journal has {"utterance", "bits", "frames", "scores"} for each utterance: the scores of all layers (L) at all
    widths (W).
    """
    model, silent = task.model, task.quiet or workers.rank > 0
    features = one_by_one(model, task.data)
    names = [ref.name for ref in model.weights()]
    todo = [width for width in task.widths if any((name, width) not in done for name in names)]

    def finished() -> dict[int, dict[str, Any]]:
        return {entry["utterance"]: entry for entry in journal.read() if entry["bits"] == todo}

    known = finished()
    workers.barrier()  # so that all have read the same
    left = [index for index in range(len(features)) if index not in known][workers.rank :: workers.count]
    if not todo:
        return {}
    if left:
        with progress("rounding", len(names), silent, "layers") as advance:
            errors = rounding_errors(model, task.weight_format, todo, grams, advance, task.sizes)
        with progress("sensitivity", len(left), silent, "utterances") as advance:
            for index in left:
                scores, frames = fisher_scores(model, errors, *features[index], task.data.seed, task.output)
                journal.append({"utterance": index, "bits": todo, "frames": frames, "scores": scores.tolist()})
                advance(1)
    workers.barrier()
    entries = [entry for _, entry in sorted(finished().items())]
    sums = torch.tensor([entry["scores"] for entry in entries], dtype=torch.float64)  # (U, L, W)
    mean, low, high = typical_scores(sums, torch.tensor([entry["frames"] for entry in entries]))
    return {
        (name, width): (
            float(mean[i, k]),
            (float(low[i, k]), float(high[i, k])) if math.isfinite(high[i, k]) else None,
        )
        for i, name in enumerate(names)
        for k, width in enumerate(todo)
    }


def _sizes(task: _Task, grams: Mapping[str, Tensor], known: Mapping[Point, int]) -> dict[Point, int]:
    """Returns the bytes of all points; layers that an earlier run scored and whose bytes are not known are rounded."""
    found = dict(known) | task.sizes.bytes()
    parameters = dict(task.model.named_parameters())
    for ref in task.model.weights():
        if missing := [width for width in task.widths if (ref.name, width) not in found]:
            weight = parameters[ref.name].detach()
            task.sizes.add(ref.name, missing, quantize_weight(ref.name, weight, task.weight_format, missing, grams))
    return found | task.sizes.bytes()


def _table(
    task: _Task, grams: Mapping[str, Tensor], scores: Mapping[Point, Score], known_bytes: Mapping[Point, int]
) -> SensitivityTable:
    """Returns the record of a measurement with the scores of all points."""
    model, widths, weight_format = task.model, task.widths, task.weight_format
    sizes = _sizes(task, grams, known_bytes)
    lengths = (model.feature_lengths(samples) for _, samples in task.data.waveforms)
    frames = sum(int(model.encoded_lengths(one)) for one in lengths)
    layers = []
    for ref in model.weights():
        intervals = {width: interval for width in widths if (interval := scores[ref.name, width][1]) is not None}
        layer = LayerSensitivity(
            name=ref.name,
            kind=ref.kind,
            shape=ref.shape,
            numel=ref.numel,
            size_bytes={width: sizes[ref.name, width] for width in widths},
            kl={width: scores[ref.name, width][0] for width in widths},
            interval=intervals if len(intervals) == len(widths) else None,
            float_bytes=layer_bytes(ref.shape, weight_format.float_bits, weight_format),
        )
        layers.append(layer)
    return SensitivityTable(
        layers=tuple(layers),
        bits=widths,
        fixed_bytes=fixed_bytes(model, weight_format),
        model=task.opened.to_json(),
        data=task.data.to_json() | {"frames": frames},
        output=task.output,
        method=task.method,
        quantizer=weight_format.to_json(),
        fingerprint=task.fingerprint,
        unreached=unreached((ref.name for ref in model.weights()), weight_format, grams),
    )


def measure_kl(
    model: AsrModel,
    data: Sequence[tuple[Tensor, Tensor]],
    points: Sequence[Point],
    weight_format: WeightFormat,
    output: str = "ctc",
    on_point: Callable[[str, float, float], None] = lambda name, bits, kl: None,
    grams: Mapping[str, Tensor] | None = None,
    sizes: LayerSizes | None = None,
) -> dict[Point, float]:
    """Returns the mean KL divergence per frame, in nats, of each point: one layer at one bit-width.

    Args:
        model: The float model; the same when this returns.
        data: Batches of ((N, T, F) features, (N,) valid frames), on the model's device.
        points: The layers and widths to measure.
        weight_format: The quantizer, and how weights are stored.
        output: "ctc": over the CTC posteriors; "encoder": over softmax of the encoder's output, as in the paper;
            "decoder": over the attention decoder's distributions of the tokens (`mpq.sensitivity.divergence`). Weights
            that the output does not depend on are measured over one that does: the CTC head's over "ctc", the decoder's
            over "decoder".
        on_point: Called with each finished point.
        grams: For the rounding "gptq": `mpq.sensitivity.statistics.input_grams`.
        sizes: Counts the bytes of the rounded layers, if given.

    Raises:
        MpqError: An output that the model does not have, a layer that cannot be quantized, or a divergence that is not
            finite; the message names the layer.
    """
    tree = SegmentTree(model)
    tree.check(output)
    owners = {name: owner(name, tree.segments) for name, _ in points}
    over = {name: tree.measured_over(index, output) for name, index in owners.items()}
    parameters = dict(model.named_parameters())
    results: dict[Point, float] = {}
    with torch.inference_mode():
        batches = [OutputBatch(model, features, lengths) for features, lengths in data]
        references = [batch.log_distributions(tree, tuple(dict.fromkeys(over.values()))) for batch in batches]
        for index in range(len(tree.segments)):
            for name in dict.fromkeys(name for name, _ in points if owners[name] == index):
                widths = [bits for other, bits in points if other == name]
                path = [later for later in tree.path(over[name]) if later >= index]
                stored = quantize_weight(name, parameters[name].data, weight_format, widths, grams or {})
                if sizes:
                    sizes.add(name, widths, stored)
                for bits, one in zip(widths, stored, strict=True):
                    weight = dequantize(one, replace(weight_format.spec, bits=bits))
                    with _replaced(parameters[name], weight):
                        changed = (batch.log_distribution(tree, path, over[name]) for batch in batches)
                        kl = mean_kl(zip((own[over[name]] for own in references), changed, strict=True))
                    if not math.isfinite(kl):
                        raise MpqError(f"{name} at {bits} bits: expected a finite divergence, got {kl}")
                    results[name, bits] = kl
                    on_point(name, bits, kl)
            for batch in batches:
                batch.advance(tree, index)
    return results


@contextmanager
def _replaced(parameter: Tensor, weight: Tensor) -> Iterator[None]:
    """Gives a parameter another value for a while."""
    original = parameter.data
    parameter.data = weight
    try:
        yield
    finally:
        parameter.data = original
