"""Recipes of tiny models of FLUX.1, FLUX.2 and Z-Image, on images of two shapes."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from jaxdiff.data.buckets import Buckets
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.cached_latents import LatentOptions
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.models.lora import LoraConfig, LoraPattern
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.key_mapping import flatten_params
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.recipe import Config, TokenizerConfig, TrainConfig
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained, Trainable

SIZE, BATCH = 32, 8
CAPTIONS = ("a red pea", "two green bananas", "the quick brown fox", "a small red pea, ripe")
ATTENTION = ("q", "k", "v", "out")
MLP = ("inner", "outer", "gate", "up", "down")


def lora(spec: TextToImage) -> LoraConfig:
    """Adapters of all projections of attention and MLPs, those of MLPs of another rank."""
    params = flatten_params(spec.abstract_params()["denoiser"])
    names = {name for path in params for name in path}
    mlp = tuple(name for name in MLP if name in names)
    patterns = (LoraPattern(targets=mlp, rank=3, alpha=6.0),)
    return LoraConfig(rank=2, alpha=4.0, targets=(*ATTENTION, *mlp), patterns=patterns)


def write_photos(folder: Path) -> Path:
    """Write images of two shapes, with captions."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(2 * BATCH):
        size = ((32, 32), (24, 40))[i % 2]
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i // 2 % len(CAPTIONS)])
    return folder


def recipe(spec: TextToImage, model: Path, photos: Path, *, whole: bool, steps: int) -> Config:
    """Train the denoiser of a model's folder, or its adapters, on cached latents and text."""
    source = str(model)
    return Config(
        name="tiny",
        task=DiffusionTask(
            model=dataclasses.replace(spec, image_size=SIZE),
            pretrained=Pretrained(denoiser=source, text_encoders=source, autoencoder=source),
            trainable=Trainable(lora=None if whole else lora(spec)),
            objective=Denoising(times=LogitNormal()),
        ),
        data=DataConfig(
            source=ImageFolder(path=str(photos)),
            transforms=Transforms(size=SIZE, buckets=Buckets(step=8)),
            cache=LatentOptions(views=1, text=True, dtype="float32", batch_size=2),
        ),
        tokenizer=TokenizerConfig(vocab_size=600, length=16),
        optimizer=AdamW(learning_rate=1e-2),
        train=TrainConfig(steps=steps, batch_size=BATCH, checkpoint_every=2, log_every=1),
    )
