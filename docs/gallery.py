"""Generate the gallery of the README, docs/samples.png, with the shipped weights of icons.

python docs/gallery.py
"""

from pathlib import Path

import numpy as np

import jaxdiff
from jaxdiff.datasets.emoji_names import with_article
from jaxdiff.io.images import save_png
from jaxdiff.pipelines import edit

COLUMNS = 8
THINGS = (
    ("flat", ("cat", "strawberry", "rocket", "guitar", "cactus", "penguin", "umbrella", "pizza")),
    (
        "shaded",
        ("dog", "pineapple", "sailboat", "trophy", "mushroom", "owl", "balloon", "doughnut"),
    ),
    ("cartoon", ("fox", "cherries", "bus", "key", "sunflower", "octopus", "crown", "hamburger")),
)
# The colours of the things differ from those of their backgrounds.
PAIRS = (
    "a cat to the left of a rocket on blue",
    "a flat drawing of a whale above a strawberry on yellow",
    "a shaded drawing of a dog to the right of a cupcake on green",
    "a cartoon drawing of a fish below a sailboat on yellow",
    "two strawberries on pink",
    "three stars on black",
    "a small owl at the top on purple",
    "a large tomato on green",
)
ENDS = (("a snowman", "a crystal ball"), ("a shaded drawing of a cat", "a shaded drawing of a fox"))


def main():
    """Generate and write the picture."""
    pipe = jaxdiff.load()
    rows = []
    for style, things in THINGS:
        prompts = [f"a {style} drawing of {with_article(thing)}" for thing in things]
        rows.append(np.hstack(pipe(prompts, seeds=range(COLUMNS))))
    rows.append(np.hstack(pipe(PAIRS, seeds=range(COLUMNS))))
    rows += [np.hstack(edit.interpolate(pipe, ends, COLUMNS, seeds=(3, 3))) for ends in ENDS]
    save_png(Path(__file__).with_name("samples.png"), np.vstack(rows))


if __name__ == "__main__":
    main()
