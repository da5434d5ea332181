"""The command line: it parses, calls one function of a package below, and prints.

`main` is the entry, `compress` and `train` hold the commands, `options` what several commands share, `messages` what a
command says while it works, `tables` what a person reads of a result, `inspection` what `mpq inspect` shows. It may use
every other package, and only inside the commands, so that `mpq --help` starts without torch.
"""
