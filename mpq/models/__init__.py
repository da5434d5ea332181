"""Speech recognisers of every family behind one interface, `base.AsrModel`.

`conformer`, `attention_decoder`, `positions` and `batch_norm` are the blocks, `hybrid` is mpq's own model with its
`checkpoint`, `nemo` reads NeMo's; `reshaping` changes feed-forward widths. It may use the packages from `quantization`
down.
"""
