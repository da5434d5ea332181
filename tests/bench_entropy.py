"""The entropy coder on all weights of a model at 12 rates: bytes against the ideal, and seconds.

    python tests/bench_entropy.py [MODEL.nemo]

Weights are rounded to the nearest multiple of steps that differ from column to column as those of GPTQ do (a standard
deviation of 2.2 quarter octaves; drawn at random, since there is no audio here). Without a model they are Laplacian,
with rows and columns that differ in size. `float` is the length of the codes under the generalised Gaussians whose
tables were chosen, in floats and without escapes; `order 0` the entropy of codes that are taken to be alike. The
library `constriction`, which may be missing, has a coder for each weight and the same tables; it codes the symbols
alone, as does `rans`. Seconds are those of the process.
"""

import sys
import time
from collections.abc import Sequence

import numpy as np
from scipy import special

from mpq.coding import entropy, rans
from mpq.coding.code_fit import Fit, fit
from mpq.coding.code_tables import PRECISION, SCALES, SHAPES, code_tables
from mpq.coding.entropy import Coded
from mpq.coding.vectors import describe

RATES = [1.2 + 0.36 * i for i in range(12)]


def matrices(model: str | None) -> list[np.ndarray]:
    """Returns the weights of a model, or some that are drawn, as matrices."""
    if model:
        from mpq.loading import load_model

        loaded = load_model(model)
        parameters = dict(loaded.named_parameters())
        return [parameters[ref.name].detach().numpy().reshape(ref.shape[0], -1) for ref in loaded.weights()]
    random = np.random.default_rng(0)
    shapes = [(176, 176)] * 100 + [(704, 176)] * 40 + [(176, 704)] * 40 + [(176, 31)] * 16
    return [
        random.laplace(0, 2 ** (random.normal(0, 0.3, shape[0])[:, None] + random.normal(0, 0.3, shape[1])))
        for shape in shapes
    ]


def rounded(weights: Sequence[np.ndarray], rate: float) -> list[Coded]:
    """Returns the codes of all weights at about `rate` bits a weight."""
    found = []
    for i, weight in enumerate(weights):
        columns = np.rint(np.random.default_rng(i).normal(0, 2.2, weight.shape[1])).astype(np.int16)
        scaled = weight / 2 ** (columns / 4)
        step = 2 ** (np.log2((scaled**2).mean(1).clip(1e-20)).mean() / 2 + 2.05 - rate)
        codes = np.rint(scaled / step).astype(np.int32)
        found.append(Coded(codes, np.zeros(len(weight), dtype=np.int16), columns))
    return found


def float_bits(weight: Coded, chosen: Fit) -> float:
    """Returns the length of the codes by the generalised Gaussians themselves."""
    shape = SHAPES[chosen.shape]
    std = 2 ** (np.clip(chosen.rows[:, None] + chosen.columns, 0, SCALES - 1) / 4 - 4)
    width = std * np.exp((special.gammaln(1 / shape) - special.gammaln(3 / shape)) / 2)
    magnitude = np.abs(weight.codes)
    above = special.gammaincc(1 / shape, ((magnitude + 0.5) / width) ** shape)
    below = special.gammaincc(1 / shape, (np.maximum(magnitude - 0.5, 0) / width) ** shape)
    return float(-np.log2(np.maximum(np.where(magnitude, (below - above) / 2, 1 - above), 1e-30)).sum())


def order_0(codes: np.ndarray) -> float:
    """Returns the entropy of codes that are taken to be alike, times their number."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / codes.size)).sum())


def side_bits(weight: Coded, chosen: Fit) -> float:
    """Returns the length of the vectors."""
    rows, columns = weight.row_exponents.astype(np.int64), weight.column_exponents.astype(np.int64)
    pairs = (rows, 0 * rows), (columns, 0 * columns), (chosen.rows, rows), (chosen.columns, columns)
    return sum(describe(*pair)[1] for pair in pairs) / 1024


def by_constriction(symbols: Sequence[np.ndarray], contexts: Sequence[np.ndarray]) -> str:
    """Returns the bytes and seconds of the library: an ANS coder a weight, the symbols of a table together."""
    try:
        import constriction
    except ImportError:
        return "constriction is not installed"
    tables, ans, category = code_tables(), constriction.stream.stack.AnsCoder, constriction.stream.model.Categorical
    ends = np.append(tables.first, len(tables.frequency))
    begin, size, decoding = time.process_time(), 0, 0.0
    models = {
        t: category(tables.frequency[ends[t] : ends[t + 1]] / 2**PRECISION, perfect=False)
        for t in np.unique(np.concatenate(contexts)).tolist()
    }
    for symbol, context in zip(symbols, contexts, strict=True):
        coder, used = ans(), np.unique(context).tolist()
        for t in reversed(used):
            coder.encode_reverse((symbol[context == t] - tables.first[t]).astype(np.int32), models[t])
        words = coder.get_compressed()
        size += words.nbytes
        start = time.process_time()
        coder, found = ans(words), np.empty_like(symbol)
        for t in used:
            at = context == t
            found[at] = coder.decode(models[t], int(at.sum())) + tables.first[t]
        decoding += time.process_time() - start
        assert (found == symbol).all()
    return f"constriction {size} bytes, {time.process_time() - begin - decoding:.2f} s, {decoding:.2f} s"


def main() -> None:
    weights, seconds = matrices(sys.argv[1] if len(sys.argv) > 1 else None), [0.0, 0.0]
    count = sum(weight.size for weight in weights)
    print(f"{count} weights in {len(weights)} matrices; bits a weight:\n rate   coded   side   float+side  order 0")
    for rate in RATES:
        coded = rounded(weights, rate)
        start = time.process_time()
        payloads = entropy.encode(coded)
        middle = time.process_time()
        entropy.decode(payloads, [one.codes.shape for one in coded])
        seconds = [seconds[0] + middle - start, seconds[1] + time.process_time() - middle]
        fits = [fit(one.codes, one.row_exponents, one.column_exponents) for one in coded]
        side = sum(map(side_bits, coded, fits)) / count
        ideal = sum(map(float_bits, coded, fits)) / count + side
        bits = 8 * sum(map(len, payloads)) / count
        alike = sum(order_0(one.codes) for one in coded) / count
        print(f"{rate:5.2f} {bits:7.4f} {side:6.4f} {ideal:7.4f} ({100 * (bits / ideal - 1):+.3f} %) {alike:7.4f}")
    print(f"12 rates: {seconds[0]:.1f} s to choose and encode, {seconds[1]:.1f} s to decode")
    coded = rounded(weights, 2.64)
    contexts = [fit(one.codes, one.row_exponents, one.column_exponents).tables() for one in coded]
    symbols = [code_tables().symbols(one.codes.reshape(-1), t) for one, t in zip(coded, contexts, strict=True)]
    tails = [np.zeros(rans.lanes(one.size), dtype=np.uint16) for one in symbols]
    start = time.process_time()
    streams = rans.encode(symbols, tails, code_tables())
    middle = time.process_time()
    rans.decode(streams, contexts, code_tables())
    end = time.process_time()
    print(f"symbols at 2.64: rans {sum(map(len, streams))} bytes, {middle - start:.2f} s, {end - middle:.2f} s")
    print(by_constriction(symbols, contexts))


if __name__ == "__main__":
    main()
