"""Both loaders that are timed read the same weights."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import diffusers

from benchmarks import load_against_torch
from jaxdiff.pretrained import unet_keys

pytestmark = pytest.mark.parity


def test_both_loaders_read_the_same_weights(small_unet, tmp_path, monkeypatch):
    monkeypatch.setattr(load_against_torch, "SD1", small_unet)
    config = {
        k: v for k, v in unet_keys.write_unet_config(small_unet).items() if k != "_class_name"
    }
    diffusers.UNet2DConditionModel(**config).save_pretrained(tmp_path)
    numbers = []
    for load, weights in load_against_torch.LOADERS.values():
        flat = [
            np.asarray(weight.detach() if torch.is_tensor(weight) else weight).ravel()
            for weight in weights(load(str(tmp_path)))
        ]
        numbers.append(np.sort(np.concatenate(flat)))
    np.testing.assert_array_equal(*numbers)
    for name in load_against_torch.LOADERS:
        found = load_against_torch.time_loading(name, str(tmp_path), warm_memory=True)
        assert 0 < found.returned <= found.read
