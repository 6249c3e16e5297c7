"""Draws prompts: `python sample.py "a small green pea" ["another prompt" ...] [--out DIR] ...`."""

import sys

from jaxdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
