"""How a model in training does on held-out data."""

from collections.abc import Sequence

import torch
from torch import nn

from mpq.models.base import AsrModel
from mpq.runtime import Processes
from mpq.scoring.significance import align, count_errors
from mpq.sensitivity.divergence import OutputBatch, SegmentTree, bounded_kl
from mpq.speech.data import batches, read_batch
from mpq.speech.decoding import ctc_greedy
from mpq.speech.manifests import Utterance
from mpq.speech.trn import split_words
from mpq.training.data import TrainingSet
from mpq.training.losses import JointLoss, Targets

BATCH_SECONDS = 120.0
"""Padded audio in a batch."""


@torch.no_grad()
def held_out_errors(
    loss: JointLoss, data: TrainingSet, ctc_weight: float, channel: str, workers: Processes
) -> tuple[float, float]:
    """Returns the joint loss, nats a token, and the WER of greedy CTC, a fraction; the model is left in eval mode.

    Args:
        loss: The model and its loss.
        data: The utterances; the processes share them.
        ctc_weight: Of the joint loss.
        channel: As in `mpq.speech.audio.read_audio`.
        workers: The processes.
    """
    model = loss.model.eval()
    device = next(model.parameters()).device
    index = {item.utt_id: i for i, item in enumerate(data.utterances)}
    sums = torch.zeros(5, dtype=torch.float64)  # ctc, attention, tokens, word errors, words
    utterances = data.utterances[workers.rank :: workers.count]
    durations = data.durations[workers.rank :: workers.count]
    for batch in batches(utterances, durations, BATCH_SECONDS):
        waveforms, lengths = (one.to(device) for one in read_batch(batch, model.sample_rate, channel))
        features, frames = model.features(waveforms, lengths)
        tokens = [data.tokens[index[item.utt_id]] for item in batch]
        encoded, valid = model.encode(features, frames)
        ctc, attention = loss.of_encoded(encoded, valid, Targets.of(tokens).to(device))
        found = ctc_greedy(model.ctc_log_probs(encoded), valid, model.blank_id)
        losses = [float(ctc.sum()), float(attention.sum()), sum(map(len, tokens))]
        sums += torch.tensor([*losses, *_word_errors(model, batch, found)], dtype=torch.float64)
    workers.add_up(sums)
    ctc_sum, attention_sum, tokens_sum, errors, words = sums.tolist()
    count = max(1.0, tokens_sum)
    total = ctc_weight * ctc_sum / count + (1 - ctc_weight) * attention_sum / (tokens_sum + len(data.utterances))
    return total, errors / max(1.0, words)


@torch.no_grad()
def changed_errors(
    model: AsrModel, changed: AsrModel, data: TrainingSet, channel: str, workers: Processes
) -> tuple[float, float | None]:
    """Returns how far a changed model's output is from the model's (as `output_divergence`), and its WER.

    The WER is that of greedy CTC over the utterances with a transcript, a fraction; None without any.

    Args:
        model: As trained, in eval mode.
        changed: In eval mode.
        data: The utterances; the processes share them.
        channel: As in `mpq.speech.audio.read_audio`.
        workers: The processes.
    """
    device = next(model.parameters()).device
    trees = SegmentTree(model), SegmentTree(changed)
    sums = torch.zeros(4, dtype=torch.float64)  # divergence, rows, word errors, words
    utterances, durations = (
        data.utterances[workers.rank :: workers.count],
        data.durations[workers.rank :: workers.count],
    )
    for items in batches(utterances, durations, BATCH_SECONDS):
        waveforms, lengths = (one.to(device) for one in read_batch(items, model.sample_rate, channel))
        batch = OutputBatch(model, *model.features(waveforms, lengths))
        wanted, given = (batch.log_distributions(tree, trees[0].recognition) for tree in trees)
        for output, reference in wanted.items():
            sums[0] += float(bounded_kl(reference, given[output]).sum())
            sums[1] += len(reference)
        frames = batch.rows["ctc"]
        padded = nn.utils.rnn.pad_sequence(given["ctc"].split(frames.tolist()), batch_first=True)  # (N, T', V)
        found = ctc_greedy(padded, frames, model.blank_id)
        sums[2:] += torch.tensor(_word_errors(model, items, found), dtype=torch.float64)
    workers.add_up(sums)
    divergence, rows, errors, words = sums.tolist()
    return divergence / rows, errors / words if words else None


def _word_errors(model: AsrModel, items: Sequence[Utterance], found: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Returns word errors and words of the utterances that have a transcript.

    Args:
        model: Has the tokenizer.
        items: The utterances.
        found: The tokens that were recognised in each.
    """
    letters = "".join(
        align(split_words(item.text), split_words(model.tokenizer.decode(tokens)))
        for item, tokens in zip(items, found, strict=True)
        if item.text is not None
    )
    return count_errors(letters), len(letters) - letters.count("I")
