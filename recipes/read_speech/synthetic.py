"""The training prompts of the read speech once more, spoken by many synthetic voices: audio for distillation.

    python recipes/read_speech/synthetic.py READ_SPEECH/train.jsonl OUT [--count 400] [--seed 0]

Fine-tuning by distillation needs no transcripts, so any speech will do, and one speaker is few. The voices are those of
the demo (recipes/demo/synthesize.py, which says what they are and under which licence); OUT gets wav/*.flac and
synthetic.jsonl, whose lines have no text.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import soundfile

from mpq.files import write_text
from mpq.speech.manifests import read_data

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from synthesize import SAMPLE_RATE, fresh_espeak, speakers_of, utterance


def main() -> None:
    parser = argparse.ArgumentParser(description="Speak training prompts with synthetic voices.")
    parser.add_argument("manifest", type=Path, help="whose texts are spoken")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--count", type=int, default=400, help="utterances (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    texts = sorted({item.text for item in read_data(options.manifest) if item.text})
    random = np.random.default_rng(options.seed)
    speakers = speakers_of("train")
    (options.out / "wav").mkdir(parents=True, exist_ok=True)
    lines = []
    with fresh_espeak() as espeak:
        for index in range(options.count):
            text, speaker = texts[random.integers(len(texts))], speakers[random.integers(len(speakers))]
            samples = utterance(espeak, text, speaker, random)
            name = f"wav/synthetic{index:05}.flac"
            soundfile.write(options.out / name, samples, SAMPLE_RATE)
            lines.append(json.dumps({"audio_filepath": name, "duration": round(len(samples) / SAMPLE_RATE, 3)}) + "\n")
    write_text(options.out / "synthetic.jsonl", "".join(lines))


if __name__ == "__main__":
    main()
