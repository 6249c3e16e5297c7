"""An unconditional model of diffusers, trained as its example `train_unconditional.py` does.

The example's settings: a U-Net that predicts eps, DDPM with 1000 steps, AdamW with 1e-4, warm-up
and cosine, clipped gradients, and an EMA with warm-up. Two differences favour it here: images are
decoded in advance, and the cosine ends exactly when the time does.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from jaxtyping import UInt8
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Photos = UInt8[np.ndarray, "n h w 3"]

BATCH = 16
LEARNING_RATE, WARMUP_STEPS = 1e-4, 500
SAMPLED = 64  # images at a time
STATE = "training.pt"


def _example(widths: tuple[int, ...]) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    }


NETWORKS: dict[str, dict[str, Any]] = {
    "example": _example((128, 128, 256, 256, 512, 512)),
    "small": _example((32, 32, 64, 64, 128, 128)),
    "ddpm-cifar10": {
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D") + ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2 + ("AttnUpBlock2D", "UpBlock2D"),
    },
}
"""The example's network, 114 million parameters; the same with a quarter of its widths, 7 million,
which sees ten times as many images in an hour; and that of google/ddpm-cifar10-32, 36 million,
which is the slowest."""


def build(network: str, size: int) -> UNet2DModel:
    """Build one of the `NETWORKS` for square images."""
    return UNet2DModel(
        sample_size=size, in_channels=3, out_channels=3, layers_per_block=2, **NETWORKS[network]
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a training by the clock.

    Attributes:
      network: one of the `NETWORKS`.
      minutes: of training; saving is not counted.
      every: minutes between snapshots of the EMA; the last step has one.
      seed: of initialisation, order and noise.
    """

    network: str
    minutes: float
    every: float
    seed: int = 0


class Trainer:
    """The state of a training, which `save` writes and a later process resumes."""

    def __init__(self, training: Training, folder: Path, photos: Photos):
        torch.manual_seed(training.seed)
        self.training, self.folder, self.photos = training, folder, photos
        self.model = build(training.network, photos.shape[1])
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.ema = EMAModel(
            self.model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4
        )
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        self.taken, self.minutes = 0, 0.0
        if (folder / STATE).exists():
            state = torch.load(folder / STATE, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.taken, self.minutes = state["taken"], state["minutes"]

    def step(self) -> float:
        """Take one step, and return its loss."""
        torch.manual_seed(self.training.seed + self.taken)
        images = self._images()
        noise, times = torch.randn(images.shape), torch.randint(0, 1000, (len(images),))
        predicted = self.model(self.scheduler.add_noise(images, noise, times), times).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * self._factor()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        self.taken += 1
        return loss.item()

    def _factor(self) -> float:
        """Return the factor on the learning rate: warm-up by steps, and a cosine by the clock."""
        progress = min(self.minutes / self.training.minutes, 1.0)
        warmup = min(1.0, (self.taken + 1) / WARMUP_STEPS)
        return warmup * (1 + math.cos(math.pi * progress)) / 2

    def _images(self) -> torch.Tensor:
        """Return the step's batch of shuffled epochs, half of it mirrored."""
        batches = len(self.photos) // BATCH
        epoch, place = divmod(self.taken, batches)
        order = np.random.default_rng((self.training.seed, epoch)).permutation(len(self.photos))
        rows = np.sort(order[place * BATCH : (place + 1) * BATCH])
        images = torch.from_numpy(self.photos[rows]).permute(0, 3, 1, 2) / 127.5 - 1
        mirrored = torch.rand(len(images)) < 0.5
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)

    def save(self) -> None:
        """Write a snapshot of the EMA, then the state."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [name for name, _ in self.model.named_parameters()]
        average = dict(zip(names, self.ema.shadow_params, strict=True))
        about = {"step": str(self.taken), "minutes": str(self.minutes)}
        with _whole(self.folder / f"{self.taken:06d}.safetensors") as path:
            save_file({k: v.contiguous() for k, v in average.items()}, path, metadata=about)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "taken": self.taken,
            "minutes": self.minutes,
        }
        with _whole(self.folder / STATE) as path:
            torch.save(state, path)


@contextlib.contextmanager
def _whole(path: Path):
    """Yield a temporary name, and rename the file at the end."""
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    partial.replace(path)


def train(
    training: Training, folder: Path, photos: Photos, log: Callable[[str], None] = print
) -> None:
    """Train, from the last snapshot in a folder if it has one, and save snapshots there."""
    run = Trainer(training, folder, photos)
    earlier, started, due = run.minutes, time.perf_counter(), run.minutes + training.every
    while run.minutes < training.minutes:
        loss = run.step()
        run.minutes = earlier + (time.perf_counter() - started) / 60
        if run.minutes >= min(due, training.minutes):
            log(f"diffusers: step {run.taken}, {run.minutes:.1f} minutes, loss {loss:.4f}")
            run.save()
            due += training.every
            earlier, started = run.minutes, time.perf_counter()  # saving is not counted


def snapshots(folder: Path) -> dict[int, float]:
    """Return the minutes of training of each snapshot, by its step."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        found[int(about["step"])] = float(about["minutes"])
    return found


def sampler(
    folder: Path, network: str, step: int, *, size: int, num_steps: int
) -> Callable[[range], Photos]:
    """Return a function from seeds to images of a snapshot, by the pipeline for DDIM."""
    model = build(network, size)
    model.load_state_dict(load_file(folder / f"{step:06d}.safetensors"))
    scheduler = DDIMScheduler.from_config(DDPMScheduler(num_train_timesteps=1000).config)
    pipeline = DDIMPipeline(model.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def sample(seeds: range) -> Photos:
        made = []
        for start in range(0, len(seeds), SAMPLED):
            part = seeds[start : start + SAMPLED]
            generators = [torch.Generator().manual_seed(seed) for seed in part]
            images = pipeline(
                batch_size=len(part),
                generator=generators,
                num_inference_steps=num_steps,
                output_type="np",
            ).images
            made.append((images * 255).round().astype(np.uint8))
        return np.concatenate(made)

    return sample


def settings(network: str, num_steps: int) -> str:
    """Return the settings in one line, for reports."""
    about = {"batch": BATCH, "learning_rate": LEARNING_RATE, "ddim_steps": num_steps}
    return json.dumps({"network": network, **NETWORKS[network], **about})
