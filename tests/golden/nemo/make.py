"""Makes `tiny.nemo` and `expected.npz`: a FastConformer-CTC archive with random weights, and what it computes.

    python tests/golden/nemo/make.py                            writes both files beside this script
    python tests/golden/nemo/make.py --check A.nemo OUTPUTS.npz  compares `outputs` with those of the framework itself

NeMo was not at hand, so the expected values come from `outputs` below: NumPy in float64, one utterance at a time, the
sums of the formulas written out, and no code of mpq. It was checked against outputs of NeMo 3.0.0 itself (a model of 3
blocks with 76 thousand weights, three utterances of read speech): features, encoder outputs and log-probabilities
differ by 5.1e-5 at most, as float32 and float64 do, and the greedy tokens are the same.

Legend: S samples, T feature frames, F mel bands, T' encoder frames, D width, H heads, C channels, V classes.
"""

import io
import math
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
LABELS = [" ", *"abcde"]
CONFIG = {
    "target": "nemo.collections.asr.models.ctc_models.EncDecCTCModel",
    "sample_rate": 16000,
    "preprocessor": {
        "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
        "sample_rate": 16000,
        "normalize": "per_feature",
        "window_size": 0.025,
        "window_stride": 0.01,
        "window": "hann",
        "features": 16,
        "n_fft": 512,
        "pad_to": 0,
    },
    "encoder": {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_in": 16,
        "feat_out": -1,
        "n_layers": 2,
        "d_model": 8,
        "subsampling": "dw_striding",
        "subsampling_factor": 4,
        "subsampling_conv_channels": 4,
        "ff_expansion_factor": 2,
        "self_attention_model": "rel_pos",
        "n_heads": 2,
        "att_context_size": [-1, -1],
        "xscaling": True,
        "conv_kernel_size": 5,
        "conv_norm_type": "batch_norm",
    },
    "decoder": {
        "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
        "feat_in": 8,
        "num_classes": len(LABELS),
        "vocabulary": LABELS,
    },
}
Array = NDArray[np.float64]
State = dict[str, Array]


def outputs(config: dict[str, Any], state: State, samples: Array) -> tuple[Array, Array, Array, list[int]]:
    """Returns the (T, F) features, (T', D) encoder output, (T', V) log-probabilities and greedy tokens of (S,) samples.

    Only valid frames: what a framework pads with is not among them.
    """
    features = log_mel(config["preprocessor"], samples)
    encoder = config["encoder"]
    x = subsampled(state, features, encoder["subsampling_factor"])
    if encoder["xscaling"]:
        x = x * math.sqrt(encoder["d_model"])
    for index in range(encoder["n_layers"]):
        x = block(sub(state, f"encoder.layers.{index}"), x, encoder["n_heads"])
    weight = state["decoder.decoder_layers.0.weight"][:, :, 0]
    log_probs = log_softmax(x @ weight.T + state["decoder.decoder_layers.0.bias"])
    tokens, previous = [], -1
    for best in log_probs.argmax(axis=1).tolist():
        if best != previous and best != len(weight) - 1:
            tokens.append(best)
        previous = best
    return features, x, log_probs, tokens


def log_mel(options: dict[str, Any], samples: Array) -> Array:
    """Returns the normalised log-mel features: S // hop frames, each of a window centred on its first sample."""
    rate, n_fft = options["sample_rate"], options["n_fft"]
    window, hop = int(options["window_size"] * rate), int(options["window_stride"] * rate)
    x = np.concatenate((samples[:1], samples[1:] - 0.97 * samples[:-1]))
    hann = np.zeros(n_fft)
    start = (n_fft - window) // 2
    hann[start : start + window] = [0.5 - 0.5 * math.cos(2 * math.pi * n / (window - 1)) for n in range(window)]
    padded = np.pad(x, (n_fft // 2, n_fft))
    frames = np.stack([padded[t * hop : t * hop + n_fft] * hann for t in range(len(samples) // hop)])
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2  # (T, n_fft // 2 + 1)
    features = np.log(power @ mel_bank(rate, n_fft, options["features"]).T + 2.0**-24)
    return (features - features.mean(axis=0)) / (features.std(axis=0, ddof=1) + 1e-5)


def mel_bank(rate: int, n_fft: int, bands: int) -> Array:
    """Returns the (F, n_fft // 2 + 1) triangles of Slaney's Auditory Toolbox, each of area 1 (up to its units).

    The scale is linear, 200/3 Hz a mel, up to 1000 Hz and logarithmic, 27 steps for a factor of 6.4, above.
    """

    def to_hz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    highest = 15 + math.log(rate / 2 / 1000) / (math.log(6.4) / 27)
    edges = [to_hz(highest * i / (bands + 1)) for i in range(bands + 2)]
    bank = np.zeros((bands, n_fft // 2 + 1))
    for band, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        for k in range(n_fft // 2 + 1):
            hz = k * rate / n_fft
            bank[band, k] = max(0.0, min((hz - low) / (middle - low), (high - hz) / (high - middle))) * 2 / (high - low)
    return bank


def subsampled(state: State, features: Array, factor: int) -> Array:
    """Returns (T', D): 3x3 convolutions of stride 2, the later ones depthwise and then pointwise, each with ReLU."""
    convolution = sub(state, "encoder.pre_encode.conv")
    x = np.maximum(strided(features[None], convolution["0.weight"], convolution["0.bias"]), 0)  # (C, T, F)
    for step in range(1, int(math.log2(factor))):
        depthwise, pointwise = f"{3 * step - 1}", f"{3 * step}"
        weight = convolution[f"{depthwise}.weight"]
        x = np.concatenate(
            [
                strided(x[c : c + 1], weight[c : c + 1], convolution[f"{depthwise}.bias"][c : c + 1])
                for c in range(len(x))
            ]
        )
        mixed = np.einsum("oc,ctf->otf", convolution[f"{pointwise}.weight"][:, :, 0, 0], x)
        x = np.maximum(mixed + convolution[f"{pointwise}.bias"][:, None, None], 0)
    rows = np.stack([x[:, t].reshape(-1) for t in range(x.shape[1])])  # (T', C F')
    return linear(sub(state, "encoder.pre_encode.out"), rows)


def strided(x: Array, weight: Array, bias: Array) -> Array:
    """Returns the (O, T', F') convolution of (C, T, F) with (O, C, 3, 3), stride 2, one zero on every side."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    times, bands = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
    out = np.zeros((len(weight), times, bands)) + bias[:, None, None]
    for i in range(3):
        for j in range(3):
            patch = padded[:, i : i + 2 * times - 1 : 2, j : j + 2 * bands - 1 : 2]
            out += np.einsum("oc,ctf->otf", weight[:, :, i, j], patch)
    return out


def block(state: State, x: Array, heads: int) -> Array:
    """Returns the (T', D) output of a Conformer block."""
    for name, step in (
        ("feed_forward1", feed_forward),
        ("self_att", lambda part, y: attention(part, y, heads)),
        ("conv", convolution_module),
        ("feed_forward2", feed_forward),
    ):
        part = sub(state, "self_attn" if name == "self_att" else name)
        x = x + (0.5 if "feed" in name else 1.0) * step(part, layer_norm(sub(state, f"norm_{name}"), x))
    return layer_norm(sub(state, "norm_out"), x)


def feed_forward(state: State, x: Array) -> Array:
    return linear(sub(state, "linear2"), silu(linear(sub(state, "linear1"), x)))


def attention(state: State, x: Array, heads: int) -> Array:
    """Returns (T', D): the score of frame j for frame i is ((q_i + u) k_j + (q_i + v) p_(i-j)) / sqrt(D / H)."""
    frames, width = x.shape
    size = width // heads
    q, k, v = (linear(sub(state, f"linear_{name}"), x) for name in "qkv")
    mixed = np.zeros_like(x)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        u, w = state["pos_bias_u"][head], state["pos_bias_v"][head]
        scores = np.zeros((frames, frames))
        for i in range(frames):
            for j in range(frames):
                p = (state["linear_pos.weight"] @ sinusoid(i - j, width))[own]
                scores[i, j] = ((q[i, own] + u) @ k[j, own] + (q[i, own] + w) @ p) / math.sqrt(size)
        mixed[:, own] = np.exp(log_softmax(scores)) @ v[:, own]
    return linear(sub(state, "linear_out"), mixed)


def sinusoid(position: int, width: int) -> Array:
    """Returns the (D,) encoding of a relative position: sine and cosine in turn."""
    angles = [position / 10000 ** (2 * (i // 2) / width) for i in range(width)]
    return np.array([math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angles)])


def convolution_module(state: State, x: Array) -> Array:
    """Returns (T', D): pointwise, gate, depthwise, batch normalisation, Swish, pointwise."""
    first = x @ state["pointwise_conv1.weight"][:, :, 0].T + state["pointwise_conv1.bias"]
    width = x.shape[1]
    gated = first[:, :width] / (1 + np.exp(-first[:, width:]))
    kernel = state["depthwise_conv.weight"][:, 0]  # (D, K)
    size = kernel.shape[1]
    padded = np.pad(gated, ((size // 2, size // 2), (0, 0)))
    y = np.stack([(padded[t : t + size] * kernel.T).sum(axis=0) for t in range(len(x))]) + state["depthwise_conv.bias"]
    norm = sub(state, "batch_norm")
    y = (y - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5) * norm["weight"] + norm["bias"]
    return silu(y) @ state["pointwise_conv2.weight"][:, :, 0].T + state["pointwise_conv2.bias"]


def linear(state: State, x: Array) -> Array:
    return x @ state["weight"].T + state["bias"]


def layer_norm(state: State, x: Array) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * state["weight"] + state["bias"]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def sub(state: State, prefix: str) -> State:
    """Returns the tensors of a module under their names in it."""
    return {name.removeprefix(f"{prefix}."): one for name, one in state.items() if name.startswith(f"{prefix}.")}


# ---- the files


def random_state(seed: int) -> dict[str, NDArray[np.float32]]:
    """Returns {name: weights} of CONFIG: normal, and so large that the tokens differ from frame to frame."""
    random = np.random.default_rng(seed)
    encoder = CONFIG["encoder"]
    width, channels, kernel = encoder["d_model"], encoder["subsampling_conv_channels"], encoder["conv_kernel_size"]
    hidden, heads = int(width * encoder["ff_expansion_factor"]), encoder["n_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.pre_encode.conv.0": (channels, 1, 3, 3),
        "encoder.pre_encode.conv.2": (channels, 1, 3, 3),
        "encoder.pre_encode.conv.3": (channels, channels, 1, 1),
        "encoder.pre_encode.out": (width, channels * encoder["feat_in"] // 4),
        "decoder.decoder_layers.0": (len(LABELS) + 1, width, 1),
    }
    state: dict[str, NDArray[np.float32]] = {}
    for index in range(encoder["n_layers"]):
        layer = f"encoder.layers.{index}"
        for name in ("feed_forward1", "self_att", "conv", "feed_forward2", "out"):
            shapes[f"{layer}.norm_{name}"] = (width,)
        for name in ("feed_forward1", "feed_forward2"):
            shapes |= {f"{layer}.{name}.linear1": (hidden, width), f"{layer}.{name}.linear2": (width, hidden)}
        for name in ("q", "k", "v", "out"):
            shapes[f"{layer}.self_attn.linear_{name}"] = (width, width)
        shapes |= {
            f"{layer}.conv.pointwise_conv1": (2 * width, width, 1),
            f"{layer}.conv.depthwise_conv": (width, 1, kernel),
            f"{layer}.conv.batch_norm": (width,),
            f"{layer}.conv.pointwise_conv2": (width, width, 1),
        }
        state[f"{layer}.self_attn.linear_pos.weight"] = random.normal(0, 0.4, (width, width)).astype(np.float32)
        for name in ("pos_bias_u", "pos_bias_v"):
            state[f"{layer}.self_attn.{name}"] = random.normal(0, 0.4, (heads, width // heads)).astype(np.float32)
        state[f"{layer}.conv.batch_norm.running_mean"] = random.normal(0, 0.3, width).astype(np.float32)
        state[f"{layer}.conv.batch_norm.running_var"] = random.uniform(0.5, 1.5, width).astype(np.float32)
    for name, shape in shapes.items():
        inputs = math.prod(shape[1:])
        weight = random.uniform(0.5, 1.5, shape) if len(shape) == 1 else random.normal(0, 1.5 / inputs**0.5, shape)
        state[f"{name}.weight"] = weight.astype(np.float32)
        state[f"{name}.bias"] = random.normal(0, 0.3, shape[0]).astype(np.float32)
    return state


def waveform(seed: int, seconds: float) -> NDArray[np.int16]:
    """Returns (S,) samples: a voice-like sum of harmonics that glides and falls silent now and then, and noise."""
    random = np.random.default_rng(seed)
    t = np.arange(int(16000 * seconds)) / 16000
    phase = 2 * math.pi * np.cumsum(120 + 60 * np.sin(2 * math.pi * 1.5 * t)) / 16000
    voice = sum(np.sin(n * phase) / n for n in range(1, 12)) * (np.sin(2 * math.pi * 3 * t) > -0.3)
    return np.round(3000 * voice + 200 * random.normal(size=len(t))).astype(np.int16)


def write() -> None:
    """Writes the archive and the expected values."""
    state = random_state(seed=1)
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(one) for name, one in state.items()}, buffer)
    contents = {"./model_config.yaml": yaml.safe_dump(CONFIG).encode(), "./model_weights.ckpt": buffer.getvalue()}
    with tarfile.open(HERE / "tiny.nemo", "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    exact = {name: one.astype(np.float64) for name, one in state.items()}
    expected: dict[str, NDArray[Any]] = {}
    for index, seconds in enumerate((0.9, 0.53)):
        samples = waveform(index, seconds)
        features, encoded, log_probs, tokens = outputs(CONFIG, exact, samples / 32768)
        expected |= {
            f"samples_{index}": samples,
            f"features_{index}": features.astype(np.float32),
            f"encoded_{index}": encoded.astype(np.float32),
            f"log_probs_{index}": log_probs.astype(np.float32),
            f"tokens_{index}": np.array(tokens),
        }
        print(f"utterance {index}: {len(features)} frames, {len(encoded)} encoder frames, tokens {tokens}")
    np.savez_compressed(HERE / "expected.npz", **expected)


def check(archive: Path, reference: Path) -> None:
    """Compares `outputs` with those of the framework: arrays wav_N, singleN_feats, _enc, _ctc_logprobs, _greedy."""
    with tarfile.open(archive) as file:
        content = {member.name: file.extractfile(member).read() for member in file if member.isfile()}
    config = yaml.safe_load(content["./model_config.yaml"])
    tensors = torch.load(io.BytesIO(content["./model_weights.ckpt"]), weights_only=True)
    state = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    given = np.load(reference)
    for index in range(3):
        *found, tokens = outputs(config, state, given[f"wav_{index}"].astype(np.float64))
        for name, one in zip(("feats", "enc", "ctc_logprobs"), found, strict=True):
            wanted = given[f"single{index}_{name}"][0]
            difference = float(np.abs(one - wanted[: len(one)]).max())
            print(f"utterance {index}: {name}: {difference:.1e}")
            if difference > 1e-4:
                sys.exit(f"{name} differ by {difference:g}, expected 1e-4 at most")
        if tokens != given[f"single{index}_greedy"].tolist():
            sys.exit(f"utterance {index}: other tokens")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        write()
