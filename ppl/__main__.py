"""`python -m ponder`: the command line."""

from ponder.cli.entry import main

if __name__ == "__main__":
    main()
