"""The joint loss of a model's heads (Watanabe et al. 2017; Li et al. 2023, Eq. 1).

Legend: N utterances, T feature frames, F features, T' encoder frames, D encoder width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mpq.models.base import AsrModel
from mpq.models.heads import Targets


class JointLoss(nn.Module):
    """A model and the losses of its heads for a batch, as one module for DistributedDataParallel to wrap.

    Args:
        model: The model.
        label_smoothing: The label smoothing of the attention loss.
    """

    def __init__(self, model: AsrModel, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, features: Tensor, lengths: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Returns {head: (N,) losses}, nats summed over the tokens of each utterance.

        Args:
            features: (N, T, F).
            lengths: (N,) valid frames.
            targets: The transcripts of the batch.
        """
        return self.of_encoded(*self.model.encode(features, lengths), targets)

    def of_encoded(self, encoded: Tensor, encoded_lengths: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Returns the losses that `forward` returns, from the (N, T', D) encoder output and its (N,) valid frames."""
        losses = {}
        for head in self.model.output_heads:
            context = head.context(encoded_lengths, encoded.shape[1], targets)
            scores = head.scores(head.logits(encoded, context.inputs))
            losses[head.name] = head.loss(scores, encoded_lengths, targets, self.label_smoothing)
        return losses


def shares(heads: Sequence[str], ctc_weight: float) -> dict[str, float]:
    """Returns {head: its share of the joint loss}: ctc_weight for CTC, the rest for the other; all for a single head.

    Args:
        heads: The names of the heads, in the model's order.
        ctc_weight: The share of the CTC loss.
    """
    if len(heads) == 1:
        return {heads[0]: 1.0}
    return {head: ctc_weight if head == "ctc" else 1 - ctc_weight for head in heads}


def joint(values: Mapping[str, Any], heads: Sequence[str], ctc_weight: float) -> Any:
    """Returns the joint loss of {head: loss}, tensors or numbers; the other arguments as in `shares`."""
    return sum(share * values[head] for head, share in shares(heads, ctc_weight).items())
