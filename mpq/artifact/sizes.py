"""The bytes of layers at each width, counted while they are rounded.

Most schemes have sizes that follow from shapes. The bytes of entropy-coded weights depend on their codes, so these are
coded to be counted, many at once, since the coder takes far less time for them together.
"""

from collections.abc import Mapping, Sequence

from mpq.artifact.file import fixed_bytes
from mpq.artifact.weights import AT_ONCE, WeightFormat, encode_all, layer_bytes
from mpq.models.base import AsrModel
from mpq.quantization.quantizers import Quantized
from mpq.quantization.spec import FLOAT_BITS


class LayerSizes:
    """Collects the bytes of rounded layers.

    Args:
        weight_format: The quantizer, and how weights are stored.
    """

    def __init__(self, weight_format: WeightFormat) -> None:
        self.weight_format = weight_format
        self._known: dict[tuple[str, float], int] = {}
        self._waiting: list[tuple[str, float, Quantized]] = []

    def add(self, name: str, widths: Sequence[float], stored: Sequence[Quantized]) -> None:
        """Takes a weight as it is stored at each of several widths."""
        for width, one in zip(widths, stored, strict=True):
            if self.weight_format.spec.record.is_entropy_coded:
                self._waiting.append((name, width, one))
            else:
                self._known[name, width] = layer_bytes(tuple(one.codes.shape), width, self.weight_format)
        if sum(one.codes.numel() for _, _, one in self._waiting) >= AT_ONCE:
            self._count()

    def bytes(self) -> dict[tuple[str, float], int]:
        """Returns {(name, width): bytes in the file} of all layers so far."""
        self._count()
        return self._known

    def _count(self) -> None:
        encoded = encode_all([one for _, _, one in self._waiting], 0, self.weight_format) if self._waiting else []
        for (name, width, _), data in zip(self._waiting, encoded, strict=True):
            self._known[name, width] = len(data)
        self._waiting.clear()


def file_bytes(
    model: AsrModel, bits: Mapping[str, float], weight_format: WeightFormat, quantized: Mapping[str, Quantized]
) -> int:
    """Returns the size that the packed file of a model takes if none was promised.

    Args:
        model: The model, with its weights as they will be in the file.
        bits: {weight name: width} of every weight.
        weight_format: The quantizer, and how weights are stored.
        quantized: {weight name: codes} of all weights that `bits` quantizes.
    """
    sizes = LayerSizes(weight_format)
    for name, one in quantized.items():
        sizes.add(name, [bits[name]], [one])
    floats = [
        layer_bytes(ref.shape, bits[ref.name], weight_format) for ref in model.weights() if bits[ref.name] in FLOAT_BITS
    ]
    return fixed_bytes(model, weight_format) + sum(floats) + sum(sizes.bytes().values())
