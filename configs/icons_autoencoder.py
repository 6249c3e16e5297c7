"""An autoencoder of drawings of everyday things: 128x128 pixels to 16x16 latents of 8 channels.

Hardware: two CPU cores.
Cost: 19 minutes.

    pip install -e '.[icons]'
    python train.py configs/icons_autoencoder.py --data.source.download True

It starts from the autoencoder of `shipped:produce`, whose first and last convolutions work on
patches of 4 pixels. 20,000 images raise the PSNR from 17.7 to 31.0 dB, at 18 images/s on two cores
of an Intel Xeon, each as one device, with tcmalloc (2026-11-30); 41,600 images of scenes of more
things raised it to 31.5 dB (2026-11-29). Large drawings are crisp, and small ones lose details of a
pixel. The encoder ships in `shipped:icons`, with the decoder of `configs/icons_decoder.py`; the run
was planned with 2,600 steps, which were lowered before the learning rate's decay. For a diffusion
model on the latents of another run, set `shift_factor` and `scaling_factor` as `AutoencoderTask`
explains.
"""

import dataclasses
from pathlib import Path

from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.icons.emoji_scenes import EmojiScenes
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.tasks.autoencoder import AutoencoderTask


def get_config() -> Config:
    """Return `configs/produce_autoencoder.py` on scenes of 128 pixels, from its trained weights."""
    base, replace = (
        load_recipe(Path(__file__).with_name("produce_autoencoder.py")),
        dataclasses.replace,
    )
    assert isinstance(base.task, AutoencoderTask)
    transforms = Transforms(size=128, flip=True, caption_dropout=0.0)
    return replace(
        base,
        name="icons_autoencoder",
        task=replace(base.task, pretrained="shipped:produce"),
        data=replace(base.data, source=EmojiScenes(length=10_000_000), transforms=transforms),
        optimizer=replace(base.optimizer, learning_rate=2e-3),
        train=replace(base.train, steps=1250, batch_size=16, checkpoint_every=250),
    )
