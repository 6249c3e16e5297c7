"""Errors of the cache of rendered images."""

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from jaxdiff.datasets.rendered import cache_errors
from jaxdiff.errors import UserError

IMAGES = np.zeros((2, 8, 8, 4), np.uint8)


def read_array(path):
    return np.load(path, mmap_mode="r")


def read_tensors(path):
    return safetensors.safe_open(path, "np").__enter__()


@pytest.mark.parametrize("size", [0, 5, 100, 300])
@pytest.mark.parametrize("read", [read_array, read_tensors])
def test_a_damaged_file_is_named(tmp_path, read, size):
    path = tmp_path / "images"
    with path.open("wb") as file:
        file.write(save({"images": IMAGES})) if read is read_tensors else np.save(file, IMAGES)
    with cache_errors(path, "OpenMoji"):
        read(path)
    path.write_bytes(path.read_bytes()[:size])
    with (
        pytest.raises(UserError, match=r"cache .*images is damaged \(.+\): remove it"),
        cache_errors(path, "OpenMoji"),
    ):
        read(path)


def test_an_error_of_rendering_is_no_damage(tmp_path):
    with pytest.raises(ValueError, match="shape"), cache_errors(tmp_path / "a.npy", "OpenMoji"):
        raise ValueError("shape")
