"""A small corpus of synthetic English speech, made on the spot, with which the whole chain can be tried offline.

    python recipes/demo/synthesize.py OUT [--train 4800] [--dev 150] [--test 300] [--seed 0]

Nobody speaks here: the sound comes from the formant synthesizer eSpeak NG, the sentences from a grammar of commands and
numbers. It is enough to train a Conformer of about 1 M parameters within minutes and to see how compression changes its
word error rate; it says nothing about error rates on people. What makes it a task at all: speakers of dev and test are
voices that train does not have, no sentence occurs twice in the corpus, rate and pitch vary, and there is background
noise. Some words differ little (thirteen, thirty).

OUT gets {train,dev,test}/wav/*.flac (16 kHz, mono, 16 bit), {train,dev,test}.jsonl (mpq's manifests) and corpus.json
with the arguments. The manifests are written last; a second run with the same arguments finds them and does nothing.

The samples depend on the arguments and the versions of the libraries alone. For that, eSpeak NG needs two seeds and a
trick: its flutter of the pitch goes on from one utterance to the next, through espeak_Terminate even, so each part of
the corpus is spoken by a copy of the library that was never used before.

Licence: eSpeak NG is under the GPL v3. It is no part of mpq: PyPI's espeakng-loader brings it, this script loads it at
run time, and neither it nor the audio that it makes is shipped.

S is a number of samples.
"""

import argparse
import ctypes
import hashlib
import importlib.metadata
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy.signal import firwin, resample_poly

from mpq.errors import MpqError
from mpq.files import read_json, sha256_file, write_json, write_text

try:
    import espeakng_loader
except ImportError:
    espeakng_loader = None

FORMAT = "mpq.demo_corpus/1"
SAMPLE_RATE = 16000  # Hz
PARTS = ("test", "dev", "train")  # in this order, so that test does not depend on the size of train

# A variant is a vocal tract, an accent a pronunciation; a speaker is a pair of them, in eSpeak NG's notation
# ACCENT+VARIANT. The parts share no variant, nor two that differ only in pitch. Left out are whispers, croaks and
# robots, and what a recogniser trained on people got wrong most: accents en-gb-x-gbcwmd and en-us-nyc, 13 variants.
ACCENTS = ("en-us", "en-gb-x-rp", "en-029", "en", "en-gb-scotland", "en-gb-x-gbclan")
VARIANTS = {
    "train": tuple(
        "m1 m2 m3 m4 m5 m7 sandro Mario Mike rob robert victor paul Gene Alex ian benjamin edward "
        "f2 f3 f5 steph Annie aunty".split()
    ),
    "dev": ("Denis", "adam", "grandpa", "Andrea"),
    "test": ("m6", "f1", "Nguyen", "linda", "max", "grandma", "john", "Reed"),
}
ACCENTS_PER_VARIANT = 2

Sentence = str | tuple["Sentence", ...] | list["Sentence"]  # words | one after the other | one of them

ONES: Sentence = "one two three four five six seven eight nine".split()
TEENS: Sentence = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS: Sentence = "twenty thirty forty fifty sixty seventy eighty ninety".split()
DIGIT: Sentence = ["zero", *ONES]
NUMBER: Sentence = [ONES, TEENS, TENS, (TENS, ONES)]
HOUR: Sentence = [ONES, "ten", "eleven", "twelve"]
ROOM: Sentence = "kitchen bedroom bathroom hall garage garden office".split()
OPENING: Sentence = ["door", "window", "gate", "curtain"]
DEVICE: Sentence = ["light", "lamp", "fan", "heater", "radio"]
COLOUR: Sentence = "red green blue white yellow orange purple pink".split()
DAY: Sentence = "monday tuesday wednesday thursday friday saturday sunday".split()
NAME: Sentence = "anna peter maria david susan".split()
TASK: Sentence = [(["call", "text"], NAME), "buy milk", "feed the cat", "water the garden"]
GRAMMAR: Sentence = [
    (["turn", "switch"], ["on", "off"], "the", ROOM, DEVICE, ["", "please"]),
    (["turn", "dim"], "the", ROOM, ["light", "lamp"], "to", NUMBER, "percent"),
    ("set the", ROOM, "heater to", NUMBER, "degrees"),
    ("make the", ROOM, ["light", "lamp"], COLOUR, ["", "please"]),
    (["open", "close", "lock"], "the", ROOM, OPENING, ["", "please"]),
    ("is the", ROOM, OPENING, ["open", "closed"]),
    ("set a timer for", NUMBER, ["seconds", "minutes"]),
    ("wake me at", HOUR, ["o'clock", TENS], ["", ("on", DAY)]),
    ("remind me on", DAY, "to", TASK),
    ("remind me at", HOUR, "o'clock to", TASK),
    ("what's", NUMBER, ["plus", "minus", "times"], NUMBER),
    ("dial", DIGIT, DIGIT, DIGIT, DIGIT, ["", (DIGIT, DIGIT)]),
    (["call", "text"], NAME, "at", HOUR, "o'clock", ["", ("on", DAY)]),
]


@dataclass(frozen=True)
class Arguments:
    """What the corpus is made from.

    Attributes:
        train, dev, test: Number of utterances.
        seed: Seed of texts, rates, pitches and noise.
    """

    train: int = 4800
    dev: int = 150
    test: int = 300
    seed: int = 0


# ---- text ----


def words_of(sentence: Sentence) -> set[str]:
    """Returns every word that a grammar can produce."""
    if isinstance(sentence, str):
        return set(sentence.split())
    return set().union(*map(words_of, sentence))


def draw_sentence(sentence: Sentence, rng: np.random.Generator) -> str:
    """Returns one sentence of a grammar; each alternative is as likely as its neighbours."""
    if isinstance(sentence, str):
        return sentence
    if isinstance(sentence, list):
        return draw_sentence(sentence[rng.integers(len(sentence))], rng)
    return " ".join(filter(None, (draw_sentence(part, rng) for part in sentence)))


def draw_texts(count: int, taken: set[str], rng: np.random.Generator) -> list[str]:
    """Returns `count` different sentences, none of them in `taken`, and adds them to it.

    Raises:
        MpqError: The grammar has too few sentences.
    """
    texts: list[str] = []
    for _ in range(100 * count):
        text = draw_sentence(GRAMMAR, rng)
        if text not in taken:
            taken.add(text)
            texts.append(text)
        if len(texts) == count:
            return texts
    raise MpqError(f"the grammar is too small for {count} more sentences after {len(taken)}; ask for fewer utterances")


# ---- sound ----


def speakers_of(part: str) -> list[str]:
    """Returns the voices of a part of the corpus: each variant with two accents, which go round."""
    variants = [variant for variant in VARIANTS[part] for _ in range(ACCENTS_PER_VARIANT)]
    return [f"{ACCENTS[i % len(ACCENTS)]}+{variant}" for i, variant in enumerate(variants)]


class Espeak:
    """eSpeak NG through its C interface, speak_lib.h; use it within `fresh_espeak`."""

    SYNCHRONOUS, DONT_EXIT, UTF8, EE_OK = 2, 0x8000, 1, 0
    RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4

    def __init__(self, library: Path, data: Path) -> None:
        self.library, self.data = ctypes.CDLL(str(library)), data
        self.library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        ]
        self.blocks: list[np.ndarray] = []
        self.sample_rate = self.library.espeak_Initialize(
            self.SYNCHRONOUS, 0, str(data.parent).encode(), self.DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise MpqError(f"{data}: eSpeak NG cannot read its data; reinstall espeakng-loader")
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._keep)  # ctypes holds no reference of its own
        self.library.espeak_SetSynthCallback(self.callback)
        self.voice = ""

    def _keep(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self.blocks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int, pitch_range: int) -> np.ndarray:
        """Returns the sound of a text.

        Args:
            text: What is said.
            voice: ACCENT+VARIANT.
            rate: Words a minute, 80 to 450.
            pitch: 0 to 100; 50 is the voice's own.
            pitch_range: 0 (monotone) to 100; 50 is the voice's own.

        Returns:
            Samples in [-1, 1) at `sample_rate`, shape (S,).
        """
        if voice != self.voice:
            variant = voice.partition("+")[2]  # an unknown one would be passed over silently
            known = (self.data / "voices" / "!v" / variant).is_file()
            if not known or self.library.espeak_SetVoiceByName(voice.encode()) != self.EE_OK:
                raise MpqError(f"this eSpeak NG has no voice {voice}; known to work: espeakng-loader 0.2.4")
            self.voice = voice
        # At the full volume of 100 some voices are cut off at the largest sample.
        for parameter, value in ((self.RATE, rate), (self.VOLUME, 60), (self.PITCH, pitch), (self.RANGE, pitch_range)):
            self.library.espeak_SetParameter(parameter, value, 0)
        self.blocks.clear()
        data = text.encode()
        if self.library.espeak_Synth(data, len(data) + 1, 0, 0, 0, self.UTF8, None, None) != self.EE_OK:
            raise MpqError(f"eSpeak NG cannot speak {text!r} as {voice}")
        return np.concatenate(self.blocks).astype(np.float64) / 2**15


@contextmanager
def fresh_espeak() -> Iterator[Espeak]:
    """Yields an eSpeak NG in the state that it has when a process starts."""
    with tempfile.TemporaryDirectory(prefix="mpq-espeak-") as folder:
        source = Path(espeakng_loader.get_library_path())
        library, data = Path(folder) / source.name, Path(folder) / "espeak-ng-data"
        shutil.copy(source, library)  # another file is to the loader another library, with variables of its own
        data.symlink_to(espeakng_loader.get_data_path())  # under a short name: eSpeak NG refuses 160 characters
        espeak = Espeak(library, data)
        espeak.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # espeak_Initialize took the time of day
        ctypes.CDLL(None).srand(1)  # Klatt's voices use C's rand() instead
        try:
            yield espeak
        finally:
            espeak.library.espeak_Terminate()


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Returns samples at SAMPLE_RATE, (S,) -> (S * SAMPLE_RATE / rate,)."""
    divisor = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // divisor, rate // divisor
    return resample_poly(samples, up, down, window=low_pass(up, down))


@lru_cache
def low_pass(up: int, down: int) -> np.ndarray:
    """Returns the filter that resample_poly would otherwise design anew at each call."""
    widest = max(up, down)
    return firwin(20 * widest + 1, 1 / widest, window=("kaiser", 5.0))


def noise(count: int, is_pink: bool, rng: np.random.Generator) -> np.ndarray:
    """Returns noise of RMS 1, shape (S,); the power of pink noise falls with 1 / frequency."""
    samples = rng.standard_normal(count)
    if is_pink:
        spectrum = np.fft.rfft(samples)
        spectrum[0] = 0
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
        samples = np.fft.irfft(spectrum, count)
    return samples / rms(samples)


def rms(samples: np.ndarray) -> float:
    """Returns the root mean square."""
    return float(np.sqrt(np.mean(samples**2)))


def utterance(espeak: Espeak, text: str, speaker: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a text as it would be recorded: 16 kHz, a margin on both sides, noise, a level near -23 dBFS; shape (S,).

    The signal-to-noise ratio is 15 to 30 dB, of the speech without its margins.
    """
    speech = espeak.speak(
        text,
        speaker,
        rate=int(rng.integers(120, 221)),
        pitch=int(rng.integers(35, 66)),
        pitch_range=int(rng.integers(30, 81)),
    )
    speech = resample(speech, espeak.sample_rate)
    before, after = (int(SAMPLE_RATE * rng.uniform(0.02, 0.2)) for _ in range(2))
    snr, is_pink, level = rng.uniform(15, 30), bool(rng.integers(2)), rng.uniform(-26, -20)
    samples = np.pad(speech / rms(speech), (before, after))
    samples += 10 ** (-snr / 20) * noise(len(samples), is_pink, rng)
    samples *= 10 ** (level / 20) / rms(samples)
    return samples * min(1.0, 0.95 / float(np.abs(samples).max()))  # a voice with high peaks gets a lower level


# ---- files ----


def make_part(out: Path, part: str, count: int, seed: int, taken: set[str]) -> str:
    """Writes the audio of a part of the corpus; returns its manifest, JSON lines."""
    speakers, lines = speakers_of(part), []
    folder = out / part / "wav"
    folder.mkdir(parents=True)
    texts = draw_texts(count, taken, np.random.default_rng([seed, PARTS.index(part)]))
    with fresh_espeak() as espeak:
        for i, text in enumerate(texts):
            speaker = speakers[i * len(speakers) // count]  # one after the other: to change the voice takes time
            samples = utterance(espeak, text, speaker, np.random.default_rng([seed, PARTS.index(part), i]))
            utt_id = f"{part}-{i:05d}"
            soundfile.write(folder / f"{utt_id}.flac", samples, SAMPLE_RATE, subtype="PCM_16")
            line = {
                "audio_filepath": f"{part}/wav/{utt_id}.flac",
                "text": text,
                "duration": len(samples) / SAMPLE_RATE,
                "speaker": speaker,
                "utt_id": utt_id,
            }
            lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def is_complete(out: Path, stamp: dict[str, Any]) -> bool:
    """Returns whether `out` holds the corpus of this stamp, every file of it.

    Raises:
        MpqError: There is something else that this script would overwrite.
    """
    if not (out / "corpus.json").exists():
        for path in (out / name for part in PARTS for name in (part, f"{part}.jsonl")):
            if path.exists():
                raise MpqError(f"{path}: is in the way, and not made by this script; choose another OUT")
        return False
    found = read_json(out / "corpus.json", FORMAT)
    manifests = found.pop("manifests", None)
    if found != stamp or manifests is None:
        return False
    for part in PARTS:
        path = out / f"{part}.jsonl"
        if not path.is_file() or sha256_file(path) != manifests.get(path.name):
            return False
        files = (json.loads(line)["audio_filepath"] for line in path.read_text().splitlines())
        if not all((out / file).is_file() for file in files):
            return False
    return True


def make_corpus(out: Path, arguments: Arguments) -> bool:
    """Makes the corpus in the folder `out`, unless it is there; returns whether there was anything to do.

    Raises:
        MpqError: espeakng-loader is missing, or `out` cannot be written or holds something else.
    """
    if espeakng_loader is None:
        raise MpqError("espeakng-loader (the speech synthesizer eSpeak NG) is not installed: pip install 'mpq[demo]'")
    stamp = {
        "format": FORMAT,
        "arguments": asdict(arguments),
        "espeakng_loader": importlib.metadata.version("espeakng-loader"),
        "script_sha256": sha256_file(Path(__file__)),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        if is_complete(out, stamp):
            return False
        write_json(out / "corpus.json", stamp)  # what follows is ours, and not yet complete
        for part in PARTS:
            (out / f"{part}.jsonl").unlink(missing_ok=True)
            if (out / part / "wav").exists():
                shutil.rmtree(out / part / "wav")
        taken: set[str] = set()
        manifests = {
            f"{part}.jsonl": make_part(out, part, getattr(arguments, part), arguments.seed, taken) for part in PARTS
        }
        for name, text in manifests.items():
            write_text(out / name, text)
        sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in manifests.items()}
        write_json(out / "corpus.json", stamp | {"manifests": sums})
    except OSError as error:
        raise MpqError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from error
    except soundfile.SoundFileError as error:
        raise MpqError(f"{out}: cannot be written: {error}") from error
    return True


def at_least(smallest: int) -> Callable[[str], int]:
    """Returns a reader of whole numbers for argparse."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {smallest}, got {text!r}")
        return int(text)

    return number


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make a small corpus of synthetic English speech with eSpeak NG.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the audio and its manifests")
    for part in ("train", "dev", "test"):
        default = getattr(Arguments, part)
        parser.add_argument(f"--{part}", type=at_least(1), default=default, help=f"utterances (default: {default})")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of all draws (default: 0)")
    options = vars(parser.parse_args(argv))
    out, start = options.pop("out"), time.monotonic()
    try:
        if not make_corpus(out, Arguments(**options)):
            print(f"{out}: complete; nothing to do")
            return 0
        for part in ("train", "dev", "test"):
            rows = [json.loads(line) for line in (out / f"{part}.jsonl").read_text().splitlines()]
            speakers, hours = len({row["speaker"] for row in rows}), sum(row["duration"] for row in rows) / 3600
            print(f"{out / part}.jsonl: {len(rows)} utterances, {speakers} voices, {hours:.2f} h")
        print(f"{time.monotonic() - start:.0f} s")
    except MpqError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
