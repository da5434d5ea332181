"""How a model in training does on held-out data."""

import torch

from mpq.data import batches, read_batch
from mpq.decoding import ctc_greedy
from mpq.losses import JointLoss, Targets
from mpq.metrics import split_words
from mpq.runtime import Processes
from mpq.significance import align, count_errors
from mpq.training_data import TrainingSet

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
        channel: As in `mpq.audio.read_audio`.
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
        pairs = zip((item.text for item in batch), map(model.tokenizer.decode, found), strict=True)
        letters = "".join(align(split_words(text or ""), split_words(hypothesis)) for text, hypothesis in pairs)
        counted = [float(ctc.sum()), float(attention.sum()), sum(map(len, tokens)), count_errors(letters)]
        sums += torch.tensor([*counted, len(letters) - letters.count("I")], dtype=torch.float64)
    workers.add_up(sums)
    ctc_sum, attention_sum, tokens_sum, errors, words = sums.tolist()
    count = max(1.0, tokens_sum)
    total = ctc_weight * ctc_sum / count + (1 - ctc_weight) * attention_sum / (tokens_sum + len(data.utterances))
    return total, errors / max(1.0, words)
