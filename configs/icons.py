"""Text to images of everyday things in three drawing styles, at 128 pixels.

Hardware: two CPU cores.
Cost: planned: 190 minutes, after 4 for the cache of latents.

    pip install -e '.[icons]'
    python train.py configs/icons.py --data.source.download True

Scenes have flat, shaded and cartoon drawings, alone, in groups and in relations; one style of some
things and one pair in eight are held out, and `IconAccuracy` scores these. A token is a square of
32 pixels, as the scenes' grid has: 16 tokens learn four times as many images in the same time as 64
do.

Autoencoder and text encoder are those of `shipped:icons`, from `configs/icons_autoencoder.py`,
`configs/icons_decoder.py` and `configs/icons_clip.py`.

The denoiser of `shipped:icons` saw 2.46 million images in five runs, each from the moving average
of the last: 8,054 steps at a learning rate of 2e-3; 1,000 steps, the last 300 of them with a
decay to 0; 3,800 steps at 1.2e-3, 60 % of them with a decay and a moving average of 0.998; 13,500
steps at 1.2e-3, the last 30 % of them with a decay; and 12,000 such steps with a decay of 40 %. The
last run alone had the loss of this recipe, the others the error of x0. The first three took 97
minutes on two cores of an Intel Xeon, at 150 images/s with a device on each, after 4 minutes for
the cache of latents; the others 92 and 77 beside other work, with products in bfloat16, at 110 to
167 images/s on one core and up to 244 on two (2026-11-30):

    JAX_DEFAULT_MATMUL_PRECISION=bfloat16 LD_PRELOAD=libtcmalloc_minimal.so.4
    XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false
    --xla_cpu_prefer_vector_width=512"

This recipe is one run of as many steps, and has not been trained to its end.
"""

import dataclasses
from pathlib import Path

from jaxdiff.data.sources.cached_latents import LatentOptions
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.icons.emoji_scenes import EmojiScenes
from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.evaluation.icons import IconAccuracy
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.training.ema import Ema
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.tasks.autoencoder import AutoencoderTask
from jaxdiff.training.tasks.clip import ClipTask
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained

PROMPTS = (
    "a cat",
    "a flat drawing of a snowman on blue",
    "a shaded drawing of a crystal ball",
    "a cartoon drawing of a pizza",
    "a cartoon drawing of a rocket on the left",
    "three strawberries on yellow",
    "a flat drawing of a cat to the left of a rocket on blue",
    "a shaded drawing of a teddy bear below an umbrella",
)


def get_config() -> Config:
    """Return `configs/produce.py`, larger, on scenes of icons."""
    folder, replace = Path(__file__).parent, dataclasses.replace
    base = load_recipe(folder / "produce.py")
    clip = load_recipe(folder / "icons_clip.py")
    autoencoder = load_recipe(folder / "icons_autoencoder.py").task
    assert isinstance(base.task, DiffusionTask)
    assert isinstance(clip.task, ClipTask)
    assert isinstance(autoencoder, AutoencoderTask)
    model, text = base.task.model, clip.task.model.text
    return replace(
        base,
        name="icons",
        task=replace(
            base.task,
            model=replace(
                model,
                name="icons",
                denoiser=replace(
                    model.denoiser,
                    patch_size=4,
                    width=224,
                    depth=8,
                    text_width=text.width,
                    pooled_width=text.width,
                ),
                conditioner=ClipConditioner(text=ClipTextEncoder(model=text, hidden_layer=0)),
                autoencoder=replace(autoencoder.model, shift_factor=-0.18, scaling_factor=0.3592),
                image_size=128,
                sampler=replace(
                    model.sampler, grid=TimeGrid(shift=4.0), num_steps=12, guidance_scale=2.0
                ),
            ),
            pretrained=Pretrained(text_encoders="shipped:icons", autoencoder="shipped:icons"),
            objective=Denoising(
                times=LogitNormal(mean=0.7, std=1.3), loss_space="velocity", floor=0.3
            ),
        ),
        data=replace(
            base.data,
            source=EmojiScenes(
                # Two of the three are by one artist: a held-out style of a thing has a relative.
                sets=("fluent-emoji-flat", "fluent-emoji", "noto"),
                length=48_000,
                group_fraction=0.08,
                pair_fraction=0.25,
                trio_fraction=0.02,
                full_fraction=0.6,
            ),
            transforms=Transforms(size=128),
            cache=LatentOptions(views=1, text=True),
        ),
        tokenizer=clip.tokenizer,
        optimizer=replace(base.optimizer, learning_rate=2e-3),
        ema=Ema(decay=0.999),
        train=replace(base.train, steps=38_354, batch_size=64, checkpoint_every=1000),
        evaluators=(SampleGrid(prompts=PROMPTS, every=2000), IconAccuracy(samples=500)),
    )
