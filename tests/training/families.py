"""Recipes of tiny models of FLUX.1, FLUX.2 and Z-Image, on images of two shapes."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jaxdiff.data.buckets import Buckets
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.cached_latents import LatentOptions
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.models.lora import LoraConfig, LoraPattern
from jaxdiff.models.text_encoders.qwen3 import Qwen3TextEncoder
from jaxdiff.models.text_encoders.t5 import T5TextEncoder
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.bundle import Bundle, write_bundle
from jaxdiff.pretrained.key_mapping import flatten_params
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.recipe import Config, TokenizerConfig, TrainConfig
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained, Trainable
from tests.data.language_tokenizers import write_qwen_tokenizer, write_t5_tokenizer
from tests.pretrained.families import SPECS

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


def short(spec: TextToImage) -> TextToImage:
    """Let the text encoder read 32 tokens at most."""
    replace, conditioner = dataclasses.replace, spec.conditioner
    name = "text_2" if hasattr(conditioner, "text_2") else "text"
    encoder = replace(getattr(conditioner, name), max_length=32)
    return replace(spec, conditioner=replace(conditioner, **{name: encoder}))


def write_models(root: Path, names: Iterable[str]) -> None:
    """Write folders of short models with random weights, by their names in `SPECS`."""
    folders = {
        Qwen3TextEncoder: write_qwen_tokenizer(root / "qwen"),
        T5TextEncoder: write_t5_tokenizer(root / "t5"),
    }
    clip = Tokenizer.train(["a red pea", "a green banana"] * 9, vocab_size=540)

    def tokenizer(encoder):
        folder = folders.get(type(encoder))
        return clip if folder is None else encoder.load_tokenizer(str(folder))

    rng = np.random.default_rng(0)
    for name in names:
        spec = short(SPECS[name])
        params = jax.tree.map(
            lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), spec.abstract_params()
        )
        norm = params["autoencoder"].get("bn")
        if norm is not None:
            norm["running_var"] = 0.5 + np.abs(norm["running_var"])
        tokenizers = {n: tokenizer(e) for n, e in spec.conditioner.encoders.items()}
        write_bundle(root / name, Bundle(spec, params, tokenizers), "float32")


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
