"""The default recipe on latents that were cached ahead, so that nothing is drawn or encoded twice.

    jaxdiff prepare configs/produce_cached.py data/produce_latents --latents.views 1
    python train.py configs/produce_cached.py

For two CPU cores without an accelerator. The first command takes 100 seconds of processor time for
its 30,000 scenes and 70 MB; the second then 6.1 ms of it an image, where encoding online takes
9.1 (AMD EPYC, Zen 4, 2026-11-23). How good it gets has not been measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.config import Config, load_recipe
from jaxdiff.data.cached_latents import CachedLatents
from jaxdiff.data.produce import Produce


def get_config() -> Config:
    """`configs/produce.py` on 30,000 drawn scenes, which it sees several times."""
    base = load_recipe(Path(__file__).with_name("produce.py"))
    assert isinstance(base.data.source, Produce)
    drawn = dataclasses.replace(base.data.source, length=30_000)
    source = CachedLatents(path="data/produce_latents", of=drawn)
    return dataclasses.replace(
        base, name="produce_cached", data=dataclasses.replace(base.data, source=source)
    )
