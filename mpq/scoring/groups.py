"""A comparison by groups of utterances, such as speakers: where is the compressed system worst?

`mpq evaluate` keeps what the manifest says of each utterance in `keys.json`; any key of it can make the groups. Each
group has a matched pairs test of its own; their p are adjusted (Holm), because among twenty groups one is below 0.05 by
chance. A group of fewer than 30 segments, or whose segments do not vary, is too small to tell, and is not tested.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpq.errors import MpqError
from mpq.faults import JsonObject, checked
from mpq.files import read_json, write_json
from mpq.scoring.records import Group, Groups
from mpq.scoring.significance import FEW_SEGMENTS, mapsswe
from mpq.scoring.verdicts import detectable, holm, non_inferiority
from mpq.speech.manifests import Utterance
from mpq.speech.trn import fold

KEYS_FILE, KEYS_FORMAT = "keys.json", "mpq.keys/1"


class _Keys(JsonObject):
    """The content of `keys.json`."""

    utterances: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Labels:
    """Which group each utterance is in.

    Attributes:
        key: The key of the manifest that says so.
        values: {utterance id, A-Z folded: group}, without the utterances that lack the key.
    """

    key: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Scored:
    """One utterance of a comparison.

    Attributes:
        words: Its reference words.
        errors_a, errors_b: The word errors of both systems.
        segments: (errors of a, errors of b) of its segments.
    """

    words: int
    errors_a: int
    errors_b: int
    segments: list[tuple[int, int]]


def write_keys(path: Path, utterances: Sequence[Utterance]) -> None:
    """Writes {utterance id: {key: value}}: the speaker, and the keys of the manifest that change nothing."""
    keys = {
        item.utt_id: ({"speaker": item.speaker} if item.speaker is not None else {}) | dict(item.others)
        for item in utterances
    }
    write_json(path, {"format": KEYS_FORMAT, "utterances": keys})


def read_labels(folder: Path, key: str) -> Labels:
    """Returns the groups that a key makes of the utterances in a folder of `mpq evaluate`.

    Raises:
        MpqError: The folder lacks the file, or no utterance has the key; the message names the keys that there are.
    """
    path = Path(folder) / KEYS_FILE
    if not path.exists():
        raise MpqError(
            f"{path}: no such file; an older mpq made this folder, so run mpq evaluate again to group by a key"
        )
    utterances = checked(_Keys, read_json(path, KEYS_FORMAT), path).utterances
    values = {fold(utt_id): keys[key] for utt_id, keys in utterances.items() if key in keys}
    if not values:
        known = sorted({name for keys in utterances.values() for name in keys})
        raise MpqError(
            f"{path}: no utterance has the key {key!r} in its manifest; "
            + (f"there are: {', '.join(known)}" if known else "there is none to group by")
        )
    return Labels(key, values)


def compare_groups(labels: Labels, utterances: Mapping[str, Scored], alpha: float) -> Groups:
    """Returns both systems' errors in each group, those first that lose most, and the worst of them.

    Args:
        labels: The groups; utterances without one are a group of their own, whose name is None.
        utterances: The utterances of the comparison, by their id.
        alpha: The level of all tests together.
    """
    members: dict[str | None, list[Scored]] = {}
    for utt_id, scored in utterances.items():
        members.setdefault(labels.values.get(utt_id), []).append(scored)
    pairs = {name: [pair for one in group for pair in one.segments] for name, group in members.items()}
    tests = {name: mapsswe(found, alpha) for name, found in pairs.items()}
    large = [name for name, test in tests.items() if test.p is not None and test.std and test.segments >= FEW_SEGMENTS]
    adjusted = dict(zip(large, holm([tests[name].p or 0.0 for name in large]), strict=True))
    groups = []
    for name, group in members.items():
        words = sum(one.words for one in group)
        errors_a, errors_b = sum(one.errors_a for one in group), sum(one.errors_b for one in group)
        p = adjusted.get(name)
        groups.append(
            Group(
                name=name,
                utterances=len(group),
                words=words,
                wer_a=errors_a / words if words else 0.0,
                wer_b=errors_b / words if words else 0.0,
                segments=tests[name].segments,
                upper=non_inferiority(pairs[name], words).upper,
                detectable=detectable(pairs[name], words, alpha),
                too_small=name not in adjusted,
                p=p,
                worse=p is not None and p < alpha and tests[name].better == "a",
            )
        )
    groups.sort(key=lambda one: (one.wer_a - one.wer_b, one.name is None, one.name))
    worst = next((one.name for one in groups if not one.too_small and one.name is not None), None)
    return Groups(labels.key, worst, tuple(groups))
