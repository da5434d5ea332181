"""`python -m mpq`, and `torchrun ... -m mpq`: the command line."""

from mpq.cli.main import main

main()
