"""The refiner: a model that takes over the noisy latents of another one."""

import dataclasses
import functools

from jaxdiff.errors import UserError
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.latent_spaces import have_same_latents
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.bundle import Bundle, model_name
from jaxdiff.pretrained.load import load_bundle


@functools.lru_cache(maxsize=2)
def load_refiner(pipe: Pipeline, model: str) -> Pipeline:
    """Load a model that continues from the noisy latents of `pipe`, whose autoencoder decodes.

    Raises:
      UserError: there is no such model, or it has other latents, or another schedule of the noise.
    """
    bundle = load_bundle(model, types=pipe.types)
    _check(bundle, pipe.bundle, model)
    params = dict(bundle.params)
    if pipe.spec.autoencoder is not None:
        params["autoencoder"] = pipe.params["autoencoder"]
    spec = dataclasses.replace(bundle.spec, autoencoder=pipe.spec.autoencoder)
    return pipe.with_bundle(bundle._replace(spec=spec, params=params))


def _check(refiner: Bundle, own: Bundle, model: str) -> None:
    name = model_name(own.spec)
    if not isinstance(refiner.spec, TextToImage):
        raise UserError(
            f"--refiner-model {model} is of type {type(refiner.spec).__name__}: expected a "
            f"text-to-image model; give the refiner of {name}."
        )
    differs = {
        "another schedule of the noise": refiner.spec.schedule != own.spec.schedule,
        "other latents": not have_same_latents(refiner, own),
    }
    for what, is_other in differs.items():
        if is_other:
            raise UserError(
                f"--refiner-model {model} has {what} than {name}: expected a model that continues "
                f"from its noisy latents; give the refiner of {name}."
            )
