"""Speech recognisers of every family behind one interface, `base.AsrModel`.

A model is an encoder, a chain of `segment`s, and its `heads`; `families` is the table of all models. `conformer`,
`attention_decoder`, `positions` and `batch_norm` are the blocks, `hybrid` is mpq's own model with its `checkpoint`,
`nemo` NeMo's, read from its archive (`nemo_archive`, `nemo_config`); `reshaping` changes feed-forward widths. It may
use `speech` and what is below it.
"""
