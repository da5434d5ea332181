"""The schema of recipes: TOML files that describe a model, its training and its compression.

Its classes hold the keys, their types, defaults and descriptions: those of training loops in `training`, the others in
`recipe`, the types of values in `types`. `describe` makes the tables of docs/recipes.md and the help of options from
them; `mpq.pipeline.read` reads the files. It may use `quantization`, whose schemes and roundings are values of options.
"""

from mpq.config.recipe import (
    STAGES,
    AllocateConfig,
    CompareConfig,
    DataConfig,
    DecodeConfig,
    FeaturesConfig,
    ModelConfig,
    Recipe,
    SensitivityConfig,
    Stage,
    TokensConfig,
    sections,
)
from mpq.config.training import (
    SYNTHETIC_NOISE,
    AugmentConfig,
    FinetuneAugmentConfig,
    FinetuneConfig,
    LoopConfig,
    SearchConfig,
    TrainConfig,
)

__all__ = [
    "STAGES",
    "SYNTHETIC_NOISE",
    "AllocateConfig",
    "AugmentConfig",
    "CompareConfig",
    "DataConfig",
    "DecodeConfig",
    "FeaturesConfig",
    "FinetuneAugmentConfig",
    "FinetuneConfig",
    "LoopConfig",
    "ModelConfig",
    "Recipe",
    "SearchConfig",
    "SensitivityConfig",
    "Stage",
    "TokensConfig",
    "TrainConfig",
    "sections",
]
