"""An autoencoder of the drawn produce: 64x64 pixels to 16x16 latents of 4 channels and back.

    python train.py configs/produce_autoencoder.py

Sized for about 10 minutes on two CPU cores without an accelerator, and less than 6 GB of memory.
Its figures have not been measured yet. For a diffusion model on its latents, take `z_mean` and
`z_std` from the last line of its metrics and set `shift_factor = z_mean` and
`scaling_factor = 1 / z_std`.
"""

from jaxdiff.config import Config, TokenizerConfig, TrainConfig
from jaxdiff.data.pipeline import DataConfig
from jaxdiff.data.produce import Produce
from jaxdiff.data.transforms import Transforms
from jaxdiff.models.autoencoder import AutoencoderConfig
from jaxdiff.training.autoencoder import AutoencoderTask
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW, CosineLR


def get_config() -> Config:
    """The recipe."""
    return Config(
        name="produce_autoencoder",
        task=AutoencoderTask(
            model=AutoencoderConfig(
                latent_channels=4,
                block_out_channels=(16, 32, 64),
                layers_per_block=1,
                norm_num_groups=8,
            ),
            l2_share=0.5,
        ),
        data=DataConfig(
            source=Produce(),
            transforms=Transforms(size=64, flip=True, caption_dropout=0.0),
        ),
        tokenizer=TokenizerConfig(vocab_size=1024, length=32, records=2000),
        optimizer=AdamW(
            learning_rate=2e-3,
            weight_decay=0.01,
            schedule=CosineLR(warmup_steps=50, final=0.02),
        ),
        ema=Ema(decay=0.99),
        train=TrainConfig(steps=900, batch_size=16, log_every=50, checkpoint_every=300),
    )
