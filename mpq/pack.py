"""From a float checkpoint and bit-widths to the packed file, checked against its budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq.artifact import HEADER_SLACK, Storage, check_names, fixed_bytes, layer_bytes, write_artifact
from mpq.errors import MpqError
from mpq.files import check_output, sha256_file
from mpq.models import load_model
from mpq.records import Allocation
from mpq.runtime import choose_device


@dataclass(frozen=True)
class PackResult:
    """What was written.

    Attributes:
        path: The file.
        size_bytes: Its size.
        predicted_bytes: What the allocation said; None without one.
        target_bytes: The budget; None without an allocation.
        nominal_bytes: What papers count: every parameter at its width, without scales, tokenizer and header.
        float_bytes: Every parameter in float32, for the ratio.
        average_bits: Code bits per weight.
    """

    path: Path
    size_bytes: int
    predicted_bytes: int | None
    target_bytes: int | None
    nominal_bytes: int
    float_bytes: int
    average_bits: float

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the float32 parameters."""
        return self.float_bytes / self.size_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "mpq.pack/1",
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "predicted_bytes": self.predicted_bytes,
            "target_bytes": self.target_bytes,
            "nominal_bytes": self.nominal_bytes,
            "float_bytes": self.float_bytes,
            "ratio": self.ratio,
            "average_bits": self.average_bits,
        }


def pack(
    checkpoint: Path,
    out: Path,
    allocation: Allocation | None = None,
    bits: int | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> PackResult:
    """Writes the packed file `out`; nothing is left under that name if it would be above the budget.

    Args:
        checkpoint: The float model.
        out: The file to write.
        allocation: The bit-width of every layer and the quantizer it was made for.
        bits: One width for all layers instead, 1 to 8; with neither, the weights stay in `rest_dtype`.
        options: Quantizer options ("scheme", ...) that were asked for; they may not contradict the allocation's.
        device: As in `mpq.runtime.choose_device`.

    Raises:
        MpqError: Bad input of any kind, an allocation for another model, or a file above its budget.
    """
    check_output(out, checkpoint)
    options = dict(options or {})
    if allocation is not None:
        for key, value in options.items():
            if key in allocation.quantizer and allocation.quantizer[key] != value:
                raise MpqError(
                    f"--{key.replace('_', '-')} {value}: the allocation was made for {allocation.quantizer[key]}; "
                    "leave the option out, or measure and allocate again with it"
                )
        options = allocation.quantizer | options
    storage = Storage.from_json(options)
    model = load_model(checkpoint, choose_device(device))
    if model.quantized_bits:
        raise MpqError(f"{checkpoint}: already packed; pack the float checkpoint that it was made from")
    if (
        allocation is not None
        and "sha256" in allocation.model
        and allocation.model["sha256"] != sha256_file(checkpoint)
    ):
        raise MpqError(f"{checkpoint}: the allocation was made for another checkpoint, {allocation.model.get('path')}")
    refs = model.weights()
    widths = dict(allocation.bits) if allocation else {ref.name: bits or storage.float_bits for ref in refs}
    check_names(refs, widths)
    size = fixed_bytes(model, storage) + sum(layer_bytes(ref.shape, widths[ref.name], storage) for ref in refs)
    if allocation and abs(size - allocation.predicted_bytes) <= HEADER_SLACK:
        size = allocation.predicted_bytes  # as promised, also where another version of the compressor made the promise
    if allocation and size > allocation.target_bytes:
        raise MpqError(
            f"{out}: the file would have {size} bytes, above the allocation's target of {allocation.target_bytes} (it "
            f"predicted {allocation.predicted_bytes}); its sizes are of another model or quantizer: run mpq "
            "sensitivity and mpq allocate for this one"
        )
    write_artifact(out, model, widths, storage, size)
    parameters = model.parameter_counts()["total"]
    weights = sum(ref.numel for ref in refs)
    code_bits = sum(widths[ref.name] * ref.numel for ref in refs)
    return PackResult(
        path=out,
        size_bytes=size,
        predicted_bytes=allocation.predicted_bytes if allocation else None,
        target_bytes=allocation.target_bytes if allocation else None,
        nominal_bytes=-(-(code_bits + storage.float_bits * (parameters - weights)) // 8),
        float_bytes=4 * parameters,
        average_bits=code_bits / weights,
    )
