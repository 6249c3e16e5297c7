"""Generate images from prompts: `python sample.py "a cat" [--out DIR] ...`."""

import sys

from jaxdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
