"""PyTorch works in one thread: more of them wait for each other while XLA's have work to do."""

import json

import pytest

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    pytest.importorskip("torch").set_num_threads(1)


@pytest.fixture(scope="session")
def small_unet() -> UNet2DConditionConfig:
    """A U-Net of Stable Diffusion's kind, of two levels."""
    return UNet2DConditionConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        transformer_layers=(1, 0),
        heads=(2, 2),
        cross_attention_dim=16,
        norm_num_groups=8,
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tiny tokenizer as vocab.json and merges.txt, which is how the checkpoints have it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = json.loads(
        Tokenizer.train(["a red pea", "a green banana"], vocab_size=540).backend.to_str()
    )["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return folder
