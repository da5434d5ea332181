"""The types of values that keys of a recipe have, and what all sections of a recipe have in common."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Whole = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
PerBlock = Whole | list[Whole]
Ranks = Count | list[Count]
Candidates = list[Whole] | list[list[Whole]]
Output = Literal["ctc", "encoder", "decoder"]
"""The distributions whose divergence is measured: those of a head (`mpq.models.heads`), or softmax of the encoder."""
ScoreMethod = Literal["fisher", "kl"]
"""The methods of measuring sensitivities (`mpq.sensitivity.measure`)."""
DecodeMethod = Literal["greedy", "prefix", "joint"]
"""The searches for transcripts (`mpq.speech.decoding`)."""


class Section(BaseModel):
    """A section of a recipe: unknown keys and wrong types are refused, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
