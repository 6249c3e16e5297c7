"""Files of new words: every form, for one text encoder and for two, and what is refused."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.diffusion.losses import Objective
from jaxdiff.errors import UserError
from jaxdiff.models.components import TextTower
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.pipelines.textual_inversion import Word
from jaxdiff.pretrained.embeddings import FILE, read_embedding, write_embedding
from jaxdiff.training.tasks.diffusion import DiffusionTask

SMALL = ClipTextConfig(width=4, depth=1, heads=2)
TASK = DiffusionTask(
    denoiser=DiTConfig(width=32, depth=1, heads=2, text_width=8, pooled_width=8),
    text=TextTower(model=dataclasses.replace(SMALL, width=8), trained=False),
    objective=Objective(),
)
XL = dataclasses.replace(
    TASK,
    denoiser=dataclasses.replace(TASK.denoiser, text_width=12, pooled_width=4),
    text_2=TextTower(model=SMALL, trained=False),
)
ONE, TWO = np.eye(2, 8, dtype=np.float32), np.ones((2, 4), np.float32)


@pytest.mark.parametrize(
    ("tensors", "word", "count"),
    [
        ({"<pea>": ONE}, "<pea>", 2),
        ({"<pea>": ONE[0]}, "<pea>", 1),
        ({"emb_params": ONE[:1]}, "my-pea", 1),
    ],
)
def test_files_for_one_text_encoder(tensors, word, count, tmp_path):
    save_file(tensors, tmp_path / "my-pea.safetensors")
    found = read_embedding(tmp_path / "my-pea.safetensors", TASK)
    assert (found.word, set(found.rows)) == (word, {"text"})
    np.testing.assert_array_equal(found.rows["text"], ONE[:count])


def test_files_for_two_text_encoders(tmp_path):
    save_file({"clip_l": ONE, "clip_g": TWO}, tmp_path / "pea.safetensors")
    found = read_embedding(tmp_path / "pea.safetensors", XL)
    assert found.word == "pea"
    np.testing.assert_array_equal(found.rows["text"], ONE)
    np.testing.assert_array_equal(found.rows["text_2"], TWO)


@pytest.mark.parametrize("task", [TASK, XL], ids=["SD", "XL"])
def test_what_is_written_is_read_again(task, tmp_path):
    rows = dict(zip(task.towers, (ONE, TWO), strict=False))
    write_embedding(tmp_path, Word("<pea>", rows))
    found = read_embedding(tmp_path, task)
    assert found.word == "<pea>"
    for name, vectors in rows.items():
        np.testing.assert_array_equal(found.rows[name], vectors)
    assert set(load_file(tmp_path / FILE)) == ({"<pea>"} if task is TASK else {"clip_l", "clip_g"})


@pytest.mark.parametrize(
    ("tensors", "task", "told"),
    [
        ({"clip_l": ONE, "clip_g": TWO}, TASK, "holds clip_g, clip_l|holds clip_l, clip_g"),
        ({"<pea>": ONE}, XL, "expected clip_l and clip_g"),
        ({"clip_l": ONE, "clip_g": TWO[:1]}, XL, "unlike numbers"),
        ({"<pea>": ONE[None]}, TASK, "one or several vectors"),
        ({}, TASK, "holds nothing"),
    ],
)
def test_other_files_are_told(tensors, task, told, tmp_path):
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(UserError, match=told):
        read_embedding(tmp_path, task)


def test_pickled_files_are_not_opened(tmp_path):
    with pytest.raises(UserError, match="safetensors files alone"):
        read_embedding(tmp_path / "pea.pt", TASK)
