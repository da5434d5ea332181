"""LibriSpeech and Switchboard in tiny: folders of the same shape, noise for speech, the lines as published."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import soundfile

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_prepare", RECIPES / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


librispeech, swbd = script("librispeech"), script("swbd")


def noise(seconds: float, rate: int, channels: int, seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))


TRANSCRIPTS = {
    "2001A": (
        "sw2001A-ms98-a-0001 0.000000 0.300000 [silence]\n"
        "sw2001A-ms98-a-0002 0.300000 1.200000 hi um yeah i'd like to [laughter-talk] about IBM\n"
        "sw2001A-ms98-a-0003 1.200000 1.900000 [noise] [laughter]\n"
    ),
    "2001B": "sw2001B-ms98-a-0001 0.100000 0.900000 uh-huh\n",
    "2005A": "sw2005A-ms98-a-0001 0.250000 1.000000 th[at]- them_1 [it'n/isn't] so <b_aside> bad <e_aside>\n",
    "2005B": "sw2005B-ms98-a-0001 1.000000 1.500000 uh-huh\nsw2005B-ms98-a-0002 1.500000 1.900000 uh-huh\n",
}


DICTIONARY = (
    "# Dictionary\n\nIBM ay b iy eh m\nIBM's ay b iy eh m z\nCDs s iy d iy z\n"
    "US y uw eh s\nus ah s\nok ow k ey\nok ow\n"
)


STM = (
    ';; CATEGORY "0" "" ""\n'
    "en_4156 A en_4156_A 0.10 0.62 <O,en,F,en-F>  (%HESITATION) OH YEAH (I-) I'M\n"
    "en_4156 A en_4156_A 0.62 0.90 <O,en,F,en-F> IGNORE_TIME_SEGMENT_IN_SCORING\n"
    "en_4156 B en_4156_B1 0.90 1.40 <O,en,M,en-M> (%HESITATION)\n"
    "en_4156 B en_4156_B1 1.40 1.90 <O,en,M,en-M> NO <B_ASIDE> P H D <E_ASIDE>\n"
    "sw_4390 B sw_4390_B 0.00 1.95 <O,sw,M,sw-M> { YOU ALL / Y'ALL } RIGHT\n"
)


def write_sph(path: Path, seconds: float = 2.0, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds, 8000, 2, seed), 8000, format="NIST", subtype="ULAW")


def run(out: Path, corpora: dict[str, Path], *more: str) -> int:
    options = [part for name, path in corpora.items() for part in (name, str(path))]
    return swbd.main([str(out), *options, "--dev-utterances", "1", *more])
