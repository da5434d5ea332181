"""Manifests of LibriSpeech, from the folder that its archives unpack to.

    python recipes/librispeech/prepare.py /path/LibriSpeech data/librispeech [--parts dev-clean test-clean ...]

It reads CORPUS/PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt, lines of "SPEAKER-CHAPTER-NNNN WORDS", and the
FLAC files of these names beside it, and writes OUT/dev_clean.jsonl, dev_other, test_clean, test_other,
train_100, train_360 and train_500 for the parts that are there, and train_960 where all three training parts are.
Nothing is copied: the manifests name the corpus's own files by their absolute paths. The words are in lower case and
otherwise as they stand. A second run writes the same bytes.

All faults of all parts are reported, a line each, before anything is written, and then the exit status is 2.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import soundfile

from mpq.errors import MpqError
from mpq.files import read_text, write_text

MANIFESTS = {  # folder of the corpus -> name of the manifest
    "train-clean-100": "train_100",
    "train-clean-360": "train_360",
    "train-other-500": "train_500",
    "dev-clean": "dev_clean",
    "dev-other": "dev_other",
    "test-clean": "test_clean",
    "test-other": "test_other",
}
TRAIN = ("train-clean-100", "train-clean-360", "train-other-500")


def read_chapter(folder: Path, faults: list[str]) -> list[dict[str, object]]:
    """Returns the manifest's records of one chapter; what is wrong with it goes to `faults`."""
    audio = {path.stem: path for path in sorted(folder.glob("*.flac"))}
    transcripts = sorted(folder.glob("*.trans.txt"))
    if not transcripts:
        faults.append(f"{folder}: has no *.trans.txt; unpack the part again")
        return []
    speaker, records, seen = folder.parent.name, [], set()
    for transcript in transcripts:
        try:
            lines = read_text(transcript).splitlines()
        except MpqError as error:
            faults.append(str(error))
            lines, audio = [], {}  # whose transcripts are missing would only follow from this
        for number, line in enumerate(lines, 1):
            utt_id, _, text = line.strip().partition(" ")
            if not utt_id:
                continue
            source = f"{transcript}:{number}"
            if utt_id in seen:
                faults.append(f"{source}: {utt_id} has a transcript already; remove one")
            elif utt_id not in audio:
                faults.append(f"{source}: there is no {utt_id}.flac; unpack the part again, or remove the line")
            elif not text.split():
                faults.append(f"{source}: {utt_id} has no words; remove the line and the audio")
            else:
                path = audio[utt_id]
                try:
                    info = soundfile.info(path)
                except (OSError, soundfile.SoundFileError) as error:
                    faults.append(f"{path}: cannot be read: {error}; unpack the part again")
                else:
                    records.append(
                        {
                            "audio_filepath": str(path),
                            "text": " ".join(text.lower().split()),
                            "duration": info.frames / info.samplerate,
                            "speaker": speaker,
                            "utt_id": utt_id,
                        }
                    )
            seen.add(utt_id)
    faults += [
        f"{path}: has no transcript in {folder}; add its line, or remove it"
        for utt_id, path in audio.items()
        if utt_id not in seen
    ]
    return records


def prepare(corpus: Path, out: Path, parts: Sequence[str]) -> None:
    """Writes the manifests of the parts that the corpus has.

    Raises:
        MpqError: Anything is wrong with the data (every fault is in the one error), no part is there, or `out` cannot
            be written.
    """
    corpus = corpus.resolve()
    here = [part for part in parts if (corpus / part).is_dir()]
    for part in parts:
        if part not in here:
            print(f"{corpus / part}: not there; {MANIFESTS[part]}.jsonl is not written", file=sys.stderr)
    if not here:
        raise MpqError(f"{corpus}: has none of {', '.join(parts)}; expected the folder LibriSpeech of the archives")
    records, faults = {}, []
    for part in here:
        chapters = sorted(path for path in (corpus / part).glob("*/*") if path.is_dir())
        records[part] = [record for chapter in chapters for record in read_chapter(chapter, faults)]
        print(f"{part}: {len(chapters)} chapters, {len(records[part])} utterances read", file=sys.stderr)
        if not chapters:
            faults.append(f"{corpus / part}: has no SPEAKER/CHAPTER folders; unpack the part again")
    if faults:
        raise MpqError("\n".join(faults))
    manifests = {MANIFESTS[part]: records[part] for part in here}
    if all(part in here for part in TRAIN):
        manifests["train_960"] = [record for part in TRAIN for record in records[part]]
    elif any(part in here for part in TRAIN):
        print("train_960.jsonl is not written: it takes all three training parts", file=sys.stderr)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MpqError(f"{out}: cannot be written: {error.strerror or error}") from error
    for name, rows in manifests.items():
        write_text(out / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        speakers, hours = len({row["speaker"] for row in rows}), sum(row["duration"] for row in rows) / 3600
        print(f"{out / name}.jsonl: {len(rows)} utterances, {speakers} speakers, {hours:.2f} h")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write mpq's manifests of LibriSpeech.")
    parser.add_argument("corpus", metavar="CORPUS", type=Path, help="the unpacked folder LibriSpeech")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the manifests")
    parser.add_argument(
        "--parts", nargs="+", choices=tuple(MANIFESTS), default=tuple(MANIFESTS), metavar="PART", help="default: all"
    )
    options = parser.parse_args(argv)
    try:
        prepare(options.corpus, options.out, options.parts)
    except MpqError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
