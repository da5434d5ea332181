"""Losses and word errors of a model in training on held-out data."""

from collections.abc import Sequence

import torch

from mpq.models.base import AsrModel
from mpq.models.heads import Targets
from mpq.runtime import Processes
from mpq.scoring.significance import align, count_errors
from mpq.sensitivity.divergence import OutputBatch, SegmentTree, bounded_kl
from mpq.speech.data import batches, read_batch
from mpq.speech.manifests import Utterance
from mpq.speech.trn import split_words
from mpq.training.data import TrainingSet
from mpq.training.losses import JointLoss, shares

BATCH_SECONDS = 120.0
"""Padded audio in a batch."""


@torch.no_grad()
def held_out_errors(
    loss: JointLoss, data: TrainingSet, ctc_weight: float, channel: str, workers: Processes
) -> tuple[float, float]:
    """Returns the joint loss, nats a token, and the WER of greedy search, a fraction; the model is left in eval mode.

    Args:
        loss: The model and its loss.
        data: The utterances; the processes share them.
        ctc_weight: The share of CTC in the joint loss.
        channel: The channel to read, such as "error" or "mix" (`mpq.speech.audio.read_audio`).
        workers: The processes.
    """
    model = loss.model.eval()
    device = next(model.parameters()).device
    index = {item.utt_id: i for i, item in enumerate(data.utterances)}
    heads = model.output_heads
    sums = torch.zeros(len(heads) + 3, dtype=torch.float64)  # loss of each head, tokens, word errors, words
    utterances = data.utterances[workers.rank :: workers.count]
    durations = data.durations[workers.rank :: workers.count]
    for batch in batches(utterances, durations, BATCH_SECONDS):
        waveforms, lengths = (one.to(device) for one in read_batch(batch, model.sample_rate, channel))
        features, frames = model.features(waveforms, lengths)
        tokens = [data.tokens[index[item.utt_id]] for item in batch]
        encoded, valid = model.encode(features, frames)
        losses = loss.of_encoded(encoded, valid, Targets.of(tokens).to(device))
        found = model.greedy(encoded, valid)
        figures = [*(float(one.sum()) for one in losses.values()), sum(map(len, tokens))]
        sums += torch.tensor([*figures, *_word_errors(model, batch, found)], dtype=torch.float64)
    workers.add_up(sums)
    *loss_sums, tokens_sum, errors, words = sums.tolist()
    parts = [
        share * total / head.loss_tokens(int(tokens_sum), len(data.utterances))
        for head, share, total in zip(heads, shares(model.heads, ctc_weight).values(), loss_sums, strict=True)
    ]
    return sum(parts), errors / max(1.0, words)


@torch.no_grad()
def changed_errors(
    model: AsrModel, changed: AsrModel, data: TrainingSet, channel: str, workers: Processes
) -> tuple[float, float | None]:
    """Returns the divergence of a changed model's output from the model's (as `output_divergence`), and its WER.

    The WER is that of greedy search over the utterances with a transcript, a fraction; None without any.

    Args:
        model: The trained model, in eval mode.
        changed: The changed model, in eval mode.
        data: The utterances; the processes share them.
        channel: The channel to read, such as "error" or "mix" (`mpq.speech.audio.read_audio`).
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
        outputs = trees[0].recognition
        wanted, given = (batch.logits(tree, (*outputs, "encoder")) for tree in trees)
        for output in outputs:
            reference, other = (batch.log_softmax(x[output], output) for x in (wanted, given))
            sums[0] += float(bounded_kl(reference, other).sum())
            sums[1] += len(reference)
        found = changed.greedy(given["encoder"], batch.counts["encoder"])
        sums[2:] += torch.tensor(_word_errors(model, items, found), dtype=torch.float64)
    workers.add_up(sums)
    divergence, rows, errors, words = sums.tolist()
    return divergence / rows, errors / words if words else None


def _word_errors(model: AsrModel, items: Sequence[Utterance], found: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Returns word errors and words of the utterances that have a transcript.

    Args:
        model: The model, for its tokenizer.
        items: The utterances.
        found: The tokens that were recognised in each of them.
    """
    letters = "".join(
        align(split_words(item.text), split_words(model.tokenizer.decode(tokens)))
        for item, tokens in zip(items, found, strict=True)
        if item.text is not None
    )
    return count_errors(letters), len(letters) - letters.count("I")
