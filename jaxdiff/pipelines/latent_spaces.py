"""Whether two models have the same latents, so that one can continue or guide the other."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from jaxdiff.models.quantized import is_quantized
from jaxdiff.models.text_to_image import TextToImage, from_uint8
from jaxdiff.pretrained.bundle import Bundle

_MAX_DISTANCE = 0.25  # relative, of latents of one image; of unrelated latents it is about 1
_SIDE = 16  # latents of that image along each side


def have_same_latents(other: Bundle, own: Bundle) -> bool:
    """Whether two text-to-image models have the same latents.

    Their autoencoders may differ in precision, and in whatever leaves the latents of an image as
    they are: another decoder, or weights that were fine-tuned for float16.
    """
    theirs, ours = (bundle.spec.autoencoder for bundle in (other, own))
    if theirs is None or ours is None:
        return theirs is ours
    if (theirs.latent_channels, theirs.downsampling) != (ours.latent_channels, ours.downsampling):
        return False
    image = _image(_SIDE * ours.downsampling)
    x, y = (_encode(bundle, image) for bundle in (other, own))
    largest = max(np.linalg.norm(x), np.linalg.norm(y))
    return bool(np.linalg.norm(x - y) <= _MAX_DISTANCE * largest)


def _image(side: int) -> UInt8[np.ndarray, "1 side side 3"]:
    """Return an image with gradients, edges and texture."""
    y, x = np.mgrid[:side, :side] / side
    image = np.stack([x, y, (x - 0.5) ** 2 + (y - 0.5) ** 2], axis=-1)
    image[side // 4 : side // 2, side // 4 : side // 2] = (0.9, 0.2, 0.1)
    texture = np.random.default_rng(0).normal(0, 0.1, (side, side // 2, 3))
    image[:, side // 2 :] += texture
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)[None]


def _encode(bundle: Bundle, image: UInt8[np.ndarray, "1 h w 3"]) -> Float[np.ndarray, "1 i j c"]:
    """Encode an image in float32: some autoencoders overflow in float16."""
    spec: TextToImage = bundle.spec
    params = jax.tree.map(
        lambda x: jnp.asarray(x.astype(jnp.float32)),
        {"autoencoder": bundle.params["autoencoder"]},
        is_leaf=is_quantized,
    )
    return np.asarray(jax.jit(spec.encode)(params, from_uint8(jnp.asarray(image))))
