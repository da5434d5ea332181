"""Audio and text: the input and the output of a recogniser.

`audio` reads files, `features` and `pitch` make a model's features, `augment` disturbs training audio, `manifests` and
`data` say which utterances there are and whether they can be used, `text` has the vocabularies, `trn` the transcript
files; `ctc_search` and `joint_search` find transcripts, with the options of `decoding`. It may use `config` and the
modules at the top of `mpq`.
"""
