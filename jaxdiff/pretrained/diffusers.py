"""Stable Diffusion checkpoints as diffusers keeps them: a folder with `model_index.json`.

    model_index.json                      the kind of pipeline, and which parts there are
    unet/  vae/                           config.json, diffusion_pytorch_model.safetensors
    text_encoder/  text_encoder_2/        config.json, model.safetensors
    tokenizer/  tokenizer_2/              vocab.json, merges.txt, tokenizer_config.json
    scheduler/                            scheduler_config.json

Reading one gives the recipe that it could have come from, and its weights.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.losses import Objective
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.components import Latents, TextTower
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.pretrained import autoencoder, autoencoder_tiny, clip, unet
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.key_mapping import from_torch_names
from jaxdiff.pretrained.safetensors_io import open_weights, to_device
from jaxdiff.pretrained.scheduler import (
    GRIDS,
    SOLVERS,
    Scheduling,
    read_scheduling,
    write_scheduling,
)
from jaxdiff.sampling.sampler import SamplingConfig
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import DiffusionTask

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


def is_diffusers_folder(folder: epath.PathLike) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (epath.Path(folder) / INDEX).exists()


def read_diffusers(
    folder: epath.PathLike, *, place: Callable[[np.ndarray], Any] = to_device
) -> Bundle:
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
    assert isinstance(task.denoiser, UNet2DConditionConfig)
    assert task.latents is not None
    tensors = open_weights(root / "unet", DIFFUSION_MODEL)
    # Of the whole task, as who draws or trains needs that too: a U-Net is traced but once.
    abstract = abstract_params(bind_init(DiffusionTask.build, task))["denoiser"]
    params = {"denoiser": from_torch_names(tensors, unet.UNET_NAMES, abstract, place=place)}
    frozen = {"autoencoder": read_autoencoder(root / "vae", place=place)[1]}
    for (name, tower), part in zip(task.towers.items(), _text_parts(index), strict=True):
        tensors = open_weights(root / part, MODEL)
        frozen[name] = clip.from_torch_names(tensors, tower.model, place=place)
    config = Config(
        name=root.resolve().name,
        task=task,
        data=DataConfig(source=ImageFolder(path="images"), transforms=Transforms(size=size)),
        sampling=sampling,
    )
    return Bundle(config, params, frozen, read_tokenizer(root))


def read_autoencoder(
    folder: epath.PathLike, *, place: Callable[[np.ndarray], Any] = to_device
) -> tuple[AutoencoderConfig | TinyAutoencoderConfig, dict[str, Any]]:
    """An autoencoder by itself, or as a part of a checkpoint: its config and parameters.

    Args:
      folder: with `config.json` and `diffusion_pytorch_model.safetensors`.
      place: where a parameter goes once it has our layout.

    Raises:
      UserError: a file is missing or damaged, or is of a kind that jaxdiff does not have.
    """
    root = epath.Path(folder)
    model = _autoencoder_config(root)
    tensors = open_weights(root, DIFFUSION_MODEL)
    return model, _format(model).from_torch_names(tensors, model, place=place)


def _autoencoder_config(folder: epath.Path) -> AutoencoderConfig | TinyAutoencoderConfig:
    config, what = _json(folder / "config.json"), f"{folder.name}/config.json"
    tiny = config.get("_class_name") == autoencoder_tiny.KIND
    return (autoencoder_tiny if tiny else autoencoder).read_config(config, what)


def _format(model: AutoencoderConfig | TinyAutoencoderConfig) -> Any:
    return autoencoder_tiny if isinstance(model, TinyAutoencoderConfig) else autoencoder


def read_tokenizer(folder: epath.PathLike) -> Tokenizer:
    """The first tokenizer of a diffusers folder; XL's refiner has the second one alone."""
    names = ("tokenizer", "tokenizer_2")
    parts = [epath.Path(folder) / name for name in names if (epath.Path(folder) / name).exists()]
    if not parts:
        raise UserError(f"{folder} has no tokenizer; copy the whole folder of the model.")
    return Tokenizer.load(str(parts[0]))


def write_diffusers(folder: epath.PathLike, bundle: Bundle) -> None:
    """Writes a folder that diffusers opens, its index last: a folder with an index is whole.

    Each tensor is written in the type that it has here.

    Raises:
      UserError: the model is none of diffusers'.
    """
    root, (config, params, frozen, tokenizer) = epath.Path(folder), bundle
    task = config.task
    if (
        not isinstance(task, DiffusionTask)
        or not isinstance(task.denoiser, UNet2DConditionConfig)
        or task.latents is None
        or tokenizer is None
    ):
        raise UserError(
            f"{config.name} is no Stable Diffusion model, of which diffusers knows alone: expected "
            "a UNet2DConditionConfig as task.denoiser, and task.latents."
        )
    network, scheduler = task.denoiser, write_scheduling(_scheduling(task, config.sampling))
    network_config = unet.write_config(network)
    network_config["sample_size"] = config.data.transforms.size // task.downsampling
    model = task.latents.model
    model_config = _format(model).write_config(model)
    (root / INDEX).unlink(missing_ok=True)
    parts = {**frozen, **params}
    tensors = unet.to_torch_names(parts["denoiser"])
    _write_part(root / "unet", DIFFUSION_MODEL, network_config, tensors)
    tensors = _format(model).to_torch_names(parts["autoencoder"])
    _write_part(root / "vae", DIFFUSION_MODEL, model_config, tensors)
    _write_json(root / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        "_class_name": _pipeline_kind(network, encoders=len(task.towers)),
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", model_config["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    is_xl = network.added_width is not None
    if is_xl:
        index["force_zeros_for_empty_prompt"] = task.zero_empty_prompt
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    for (name, tower), folder in zip(task.towers.items(), text_folders(task), strict=True):
        text_config = clip.write_text_config(tower.model)
        tensors = clip.to_torch_names(parts[name], tower.model)
        _write_part(root / folder, MODEL, text_config, tensors)
        index[folder] = ["transformers", *text_config["architectures"]]
        folder = folder.replace("text_encoder", "tokenizer")
        tokenizer.export(str(root / folder), pad_id=tower.pad_id)
        index[folder] = ["transformers", "CLIPTokenizer"]
    _write_json(root / INDEX, index)


def text_folders(task: DiffusionTask) -> list[str]:
    """Where a diffusers folder has the text encoders; XL's refiner its one in the second place."""
    is_xl = isinstance(task.denoiser, UNet2DConditionConfig) and task.denoiser.added_width
    both = ["text_encoder", "text_encoder_2"]
    return both[1:] if is_xl and task.text_2 is None else both[: len(task.towers)]


def _scheduling(task: DiffusionTask, sampling: SamplingConfig) -> Scheduling:
    schedule, grid, solver = task.objective.schedule, sampling.grid, sampling.solver
    if (
        not isinstance(schedule, ScaledLinear)
        or not isinstance(grid, GRIDS)
        or not isinstance(solver, tuple(SOLVERS.values()))
    ):
        raise UserError(
            f"A {type(schedule).__name__} schedule with a {type(grid).__name__} and "
            f"{type(solver).__name__} is none of diffusers' schedulers: expected ScaledLinear, one "
            f"of {', '.join(kind.__name__ for kind in GRIDS)}, and one of "
            f"{', '.join(kind.__name__ for kind in SOLVERS.values())}."
        )
    return Scheduling(schedule, task.objective.prediction, solver, grid, sampling.unit_noise)


def _pipeline_kind(network: UNet2DConditionConfig, *, encoders: int) -> str:
    inpaints = "Inpaint" if network.in_channels != network.out_channels else ""
    if network.added_width is None:
        return f"StableDiffusion{inpaints}Pipeline"
    return f"StableDiffusionXL{inpaints if encoders == 2 else 'Img2Img'}Pipeline"


def _write_part(
    folder: epath.Path, stem: str, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    # Without this word transformers refuses the file.
    write_whole(folder / f"{stem}.safetensors", save(tensors, metadata={"format": "pt"}))
    _write_json(folder / "config.json", config)


def _write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def _recipe(
    root: epath.Path, index: Mapping[str, Any]
) -> tuple[DiffusionTask, SamplingConfig, int]:
    """The task, how it is sampled, and the side of its images."""
    network = _json(root / "unet" / "config.json")
    scheduling = read_scheduling(_json(root / "scheduler" / "scheduler_config.json"))
    model = _autoencoder_config(root / "vae")
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
