"""Sets of images: which files of a folder belong to it."""

import numpy as np

from jaxdiff.evaluation.image_sets import ImageFiles
from jaxdiff.io.images import save_png

SHEETS = ("grid", "grid-64x48", "strip", "preview", "preview.1", "interpolation")


def write(folder, names, level):
    for name in names:
        save_png(folder / f"{name}.png", np.full((8, 8, 3), level, np.uint8))


def test_the_sheets_that_our_sampler_writes_are_no_samples(tmp_path):
    write(tmp_path / "prompts", ("0000-a-pea", "0001-a-pear", "0001-a-pear-again"), 200)
    write(tmp_path / "file", ("named",), 200)
    (tmp_path / "file" / "manifest.jsonl").write_text("")
    for folder in ("prompts", "file"):
        write(tmp_path / folder, SHEETS, 0)
    found = ImageFiles(tmp_path)
    assert len(found) == 4
    assert all(found[i].min() == 200 for i in range(4))


def test_images_of_others_may_have_the_names_of_sheets(tmp_path):
    write(tmp_path, SHEETS, 0)
    assert len(ImageFiles(tmp_path)) == len(SHEETS)
