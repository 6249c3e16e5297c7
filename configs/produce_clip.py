"""A small CLIP of the drawn produce and their captions, on 64x64 pixels.

    python train.py configs/produce_clip.py

Sized for about 10 minutes on two CPU cores without an accelerator, and less than 6 GB of memory.
Its figures have not been measured yet; by chance a caption is found among 64 in 1 of 64 cases.
Captions leave much out, so that several in a batch may fit one image: no model finds all of them.
"""

from jaxdiff.config import Config, TokenizerConfig, TrainConfig
from jaxdiff.data.pipeline import DataConfig
from jaxdiff.data.produce import Produce
from jaxdiff.data.transforms import Transforms
from jaxdiff.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from jaxdiff.training.clip import ClipTask
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW, CosineLR


def get_config() -> Config:
    """The recipe."""
    tower = {"width": 128, "depth": 4, "heads": 4, "activation": "gelu", "projection_dim": 128}
    return Config(
        name="produce_clip",
        task=ClipTask(
            model=ClipConfig(
                text=ClipTextConfig(vocab_size=1024, length=32, **tower),
                vision=ClipVisionConfig(image_size=64, patch_size=8, **tower),
            ),
        ),
        data=DataConfig(
            source=Produce(),
            # Captions tell left from right, and an image without a caption teaches nothing.
            transforms=Transforms(size=64, flip=False, caption_dropout=0.0),
        ),
        tokenizer=TokenizerConfig(vocab_size=1024, length=32, records=2000),
        optimizer=AdamW(
            learning_rate=1e-3,
            b2=0.98,
            weight_decay=0.1,
            schedule=CosineLR(warmup_steps=100, final=0.02),
        ),
        ema=Ema(decay=0.99),
        train=TrainConfig(steps=800, batch_size=64, log_every=50, checkpoint_every=400),
    )
