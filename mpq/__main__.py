"""`python -m mpq`, and `torchrun ... -m mpq`: the command line."""

from mpq.cli.start import main

if __name__ == "__main__":
    main()
