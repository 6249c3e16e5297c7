"""The loss of diffusers' training scripts, at the times and of the noise that ours samples."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxdiff.diffusion.objectives import Denoising, LossInputs
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.diffusion.time_sampling import LogitNormal


def assert_training_loss(ours, theirs, latents, cond):
    """Our loss is mean((prediction - (noise - latents))^2) of each image.

    Args:
      ours: our network, called with x_t, t and conditioning.
      theirs: diffusers' network, called alike; returns a tensor [b, h, w, c].
      latents: [b, h, w, c].
      cond: their conditioning.
    """
    seen = []

    def model(x_t, t, cond, next_t=None):
        seen.append((np.asarray(x_t), np.asarray(t)))
        return ours(x_t, t, cond)

    outputs = Denoising(times=LogitNormal()).loss(
        LossInputs(
            model=model,
            prediction="velocity",
            schedule=RectifiedFlow(),
            x0=jnp.asarray(latents),
            cond=cond,
            keys=RowKeys.whole(jax.random.key(0), len(latents)),
        )
    )
    ((x_t, t),) = seen
    sigma = t[:, None, None, None]
    noise = (x_t - (1 - sigma) * latents) / sigma
    assert abs(noise.std() - 1) < 0.1
    with torch.no_grad():
        predicted = theirs(x_t, t, cond).numpy()
    expected = ((predicted - (noise - latents)) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(outputs.loss, expected, rtol=1e-5)
