"""Stable Diffusion checkpoints as diffusers keeps them: a folder with `model_index.json`.

model_index.json                      the kind of pipeline, and which parts there are
unet/  vae/                           config.json, diffusion_pytorch_model.safetensors
text_encoder/  text_encoder_2/        config.json, model.safetensors
tokenizer/  tokenizer_2/              vocab.json, merges.txt, tokenizer_config.json
scheduler/                            scheduler_config.json
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxdiff.config import Config
from jaxdiff.data.folder import ImageFolder
from jaxdiff.data.pipeline import DataConfig
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.losses import Objective
from jaxdiff.errors import UserError
from jaxdiff.pretrained import autoencoder, clip, unet
from jaxdiff.pretrained.scheduler import read_scheduling
from jaxdiff.pretrained.tensor_files import open_weights
from jaxdiff.sampling.settings import SamplingConfig
from jaxdiff.training.diffusion import DiffusionTask, Latents, TextTower

INDEX = "model_index.json"
MODEL, DIFFUSION_MODEL = "model", "diffusion_pytorch_model"

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)

_STEPS, _GUIDANCE = 50, {False: 7.5, True: 5.0}  # diffusers' defaults, of 1.x and 2.x, and of XL


class Checkpoint(NamedTuple):
    """A diffusers folder in our terms: the recipe that it could have come from, and its weights."""

    config: Config
    params: dict[str, Any]  # denoiser
    frozen: dict[str, Any]  # autoencoder, text, text_2
    tokenizer: Tokenizer


def is_diffusers_folder(folder: epath.PathLike) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (epath.Path(folder) / INDEX).exists()


def read_diffusers(
    folder: epath.PathLike, *, place: Callable[[np.ndarray], Any] = jnp.asarray
) -> Checkpoint:
    """A Stable Diffusion checkpoint, each tensor in the type that it is stored in.

    Args:
      folder: with `model_index.json`.
      place: where a parameter goes once it has our layout, such as onto its devices.

    Raises:
      UserError: a part is missing or damaged, or is of a kind that jaxdiff does not have.
    """
    root = epath.Path(folder)
    index = _json(root / INDEX)
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(
            f"{root / INDEX} is of a {kind}, which jaxdiff does not have: expected "
            f"{', '.join(PIPELINES)}."
        )
    task, sampling, size = _recipe(root, index)
    pad = "tokenizer" if _has(index, "tokenizer") else "tokenizer_2"
    tokenizer = Tokenizer.load(str(root / pad))
    network = _json(root / "unet" / "config.json")
    assert task.latents is not None
    params = {
        "denoiser": unet.from_torch_names(
            open_weights(root / "unet", DIFFUSION_MODEL), unet.read_config(network), place=place
        )
    }
    frozen = {
        "autoencoder": autoencoder.from_torch_names(
            open_weights(root / "vae", DIFFUSION_MODEL), task.latents.model, place=place
        )
    }
    for (name, tower), part in zip(task.towers.items(), _text_parts(index), strict=True):
        tensors = open_weights(root / part, MODEL)
        frozen[name] = clip.from_torch_names(tensors, tower.model, place=place)
    config = Config(
        name=root.resolve().name,
        task=task,
        data=DataConfig(source=ImageFolder(path="images"), transforms=Transforms(size=size)),
        sampling=sampling,
    )
    return Checkpoint(config, params, frozen, tokenizer)


def _recipe(
    root: epath.Path, index: Mapping[str, Any]
) -> tuple[DiffusionTask, SamplingConfig, int]:
    """The task, how it is sampled, and the side of its images."""
    network = _json(root / "unet" / "config.json")
    scheduling = read_scheduling(_json(root / "scheduler" / "scheduler_config.json"))
    model = autoencoder.read_config(_json(root / "vae" / "config.json"))
    parts = _text_parts(index)
    is_xl = "text_encoder_2" in parts
    towers = [
        TextTower(
            model=clip.read_text_config(
                _json(root / part / "config.json"), projected=part == "text_encoder_2"
            ),
            pretrained=str(root),
            trained=False,
            layer=-2 if is_xl else None,
            final_norm=not is_xl,
            pad_id=_pad_id(root, part) if len(parts) > 1 else None,
        )
        for part in parts
    ]
    task = DiffusionTask(
        denoiser=unet.read_config(network),
        pretrained=str(root),
        text=towers[0],
        text_2=towers[1] if len(towers) > 1 else None,
        zero_empty_prompt=is_xl and bool(index.get("force_zeros_for_empty_prompt", True)),
        latents=Latents(model=model, pretrained=str(root)),
        objective=Objective(prediction=scheduling.prediction, schedule=scheduling.schedule),
    )
    sampling = SamplingConfig(
        solver=scheduling.solver,
        grid=scheduling.grid,
        unit_noise=scheduling.unit_noise,
        num_steps=_STEPS,
        guidance_scale=_GUIDANCE[is_xl],
    )
    side = network.get("sample_size") or 64
    return task, sampling, int(side) * model.downsampling


def _text_parts(index: Mapping[str, Any]) -> list[str]:
    """The folders of the text encoders that there are; XL's refiner has the second one alone."""
    return [part for part in ("text_encoder", "text_encoder_2") if _has(index, part)]


def _has(index: Mapping[str, Any], part: str) -> bool:
    return (index.get(part) or [None])[0] is not None


def _pad_id(root: epath.Path, part: str) -> int:
    return Tokenizer.load(str(root / part.replace("text_encoder", "tokenizer"))).pad_id


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; copy the whole folder of the model.") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"{path} is not valid JSON ({error}); copy it anew.") from error
