"""What is timed beside diffusers reads the same weights, once, on both sides."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import diffusers

from jaxdiff.benchmark import load_against_torch
from jaxdiff.models.unet2d_condition import UNet2DConditionConfig
from jaxdiff.pretrained import unet

pytestmark = pytest.mark.parity

UNET = UNet2DConditionConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    transformer_layers=(1, 0),
    heads=(2, 2),
    cross_attention_dim=16,
    norm_num_groups=8,
)


def test_both_sides_read_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(load_against_torch, "SD1", UNET)
    config = {k: v for k, v in unet.write_config(UNET).items() if k != "_class_name"}
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
        found = load_against_torch.read(name, str(tmp_path), warm_memory=True)
        assert 0 < found.returned <= found.read
