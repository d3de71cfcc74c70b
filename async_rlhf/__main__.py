"""`python -m async_rlhf`: the command line, also where no console script is installed."""

from async_rlhf.cli import main

main()
