"""Stable Diffusion 1.x, 2.x and XL in diffusers' layout (see `pipeline_folder`).

unet/  vae/  text_encoder/  text_encoder_2/  tokenizer/  tokenizer_2/  scheduler/

XL has both text encoders, its refiner the second alone, and the others the first alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained import autoencoder_folder, clip_keys, unet_keys
from jaxdiff.pretrained.autoencoder_folder import PublishedAutoencoder
from jaxdiff.pretrained.bundle import Bundle, write_json
from jaxdiff.pretrained.config_check import FLAG, Schema, Unused, Used, read_keys
from jaxdiff.pretrained.pipeline_folder import (
    DIFFUSION_MODEL,
    INDEX,
    MODEL,
    PipelineFamily,
    part_key,
    read_part_config,
    write_part,
)
from jaxdiff.pretrained.placement import Place, part_place
from jaxdiff.pretrained.safetensors_io import open_weights
from jaxdiff.pretrained.scheduler import (
    GRIDS,
    SCHEDULERS,
    Scheduling,
    read_scheduling,
    write_scheduling,
)
from jaxdiff.sampling.sampler import Sampler

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)

ENCODERS = {"text": "text_encoder", "text_2": "text_encoder_2"}
"""Folders of text encoders by our names; XL's refiner has only the second."""

_PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "scheduler": None,
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}


_ALONE = {part: part_key(classes) for part, classes in _PARTS.items()}
_COMMON: Schema = {
    "_class_name": Unused("read before all others"),
    "safety_checker": Unused("judges finished images"),
    "requires_safety_checker": Unused("judges finished images"),
    "feature_extractor": Unused("of the safety checker and of IP-Adapters"),
    "image_encoder": Unused("of IP-Adapters"),
}
INDEX_KEYS: dict[bool, Schema] = {
    False: {**_COMMON, **{part: _ALONE[part] for part in _ALONE if not part.endswith("_2")}},
    True: {
        **_COMMON,
        **_ALONE,
        "force_zeros_for_empty_prompt": Used(True, FLAG),
        "requires_aesthetics_score": Unused("the U-Net's width states it"),
        "add_watermarker": Unused("marks finished images"),
    },
}
"""Schemas of `model_index.json`, without and with XL."""

# diffusers corrects the scheduler's config of Stable Diffusion 1 and 2 if it lacks these keys.
_MISSING_IN_SCHEDULER = {"steps_offset": 1, "clip_sample": False}

_STEPS, _GUIDANCE = 50, {False: 7.5, True: 5.0}  # diffusers' defaults, of 1.x and 2.x, and of XL


def _read_spec(root: epath.Path, index_json: Any) -> TextToImage:
    index = _index(root, index_json)
    network = read_part_config(root / "unet" / "config.json")
    denoiser = unet_keys.read_unet_config(network)
    scheduler = read_part_config(root / "scheduler" / "scheduler_config.json")
    if not index.is_xl and isinstance(scheduler, Mapping):
        scheduler = {**_MISSING_IN_SCHEDULER, **scheduler}
    scheduling = read_scheduling(scheduler, index.classes.get("scheduler"))
    autoencoder = autoencoder_folder.read_autoencoder_spec(root / "vae", index.classes.get("vae"))
    _check_networks(denoiser, autoencoder)
    return TextToImage(
        name=root.resolve().name,
        denoiser=dataclasses.replace(denoiser, num_train_steps=scheduling.schedule.num_train_steps),
        conditioner=_conditioner(root, index),
        autoencoder=autoencoder,
        prediction=scheduling.prediction,
        schedule=scheduling.schedule,
        image_size=unet_keys.default_size(network) * autoencoder.downsampling,
        sampler=Sampler(
            solver=scheduling.solver,
            grid=scheduling.grid,
            init_noise=scheduling.init_noise,
            num_steps=_STEPS,
            guidance_scale=_GUIDANCE[index.is_xl],
        ),
    )


def _check_networks(network: UNet2DConditionConfig, autoencoder: PublishedAutoencoder) -> None:
    """Check what diffusers' pipelines expect of both, and that they fit together."""
    latents = autoencoder.latent_channels
    if network.out_channels != latents or network.extra_channels not in (0, latents + 1):
        raise UserError(
            f"{unet_keys.WHAT}: in_channels is {network.in_channels} and out_channels "
            f"{network.out_channels}: expected the {latents} latent_channels of the autoencoder, "
            f"or {2 * latents + 1} in_channels for inpainting; use another model."
        )
    if isinstance(autoencoder, AutoencoderConfig) and autoencoder.shift_factor:
        raise UserError(
            f"vae/config.json: shift_factor is {autoencoder.shift_factor}, which diffusers' Stable "
            "Diffusion ignores: expected null or 0; use another autoencoder."
        )


def _read(root: epath.Path, index: Any, place: Place) -> Bundle:
    spec, tokenizers = _read_spec(root, index), _read_tokenizers(root, index)
    _check_ends(spec, tokenizers)
    assert isinstance(spec.denoiser, UNet2DConditionConfig)
    tensors = open_weights(root / "unet", DIFFUSION_MODEL)
    params = {
        "denoiser": unet_keys.unet_from_torch(
            tensors, spec.denoiser, place=part_place(place, "denoiser")
        )
    }
    params["text_encoders"] = {
        name: clip_keys.clip_from_torch(
            open_weights(root / ENCODERS[name], MODEL),
            encoder.model,
            place=part_place(place, "text_encoders", name),
        )
        for name, encoder in _clip_encoders(spec).items()
    }
    _, params["autoencoder"] = autoencoder_folder.read_autoencoder_folder(
        root / "vae", _index(root, index).classes.get("vae"), place=part_place(place, "autoencoder")
    )
    return Bundle(spec, params, tokenizers)


def _check_ends(spec: TextToImage, tokenizers: Mapping[str, Tokenizer]) -> None:
    """Check that texts end with the token whose features XL reads."""
    for name in {"text_2"} & set(tokenizers):
        wanted, end = tokenizers[name].end_id, _clip_encoders(spec)[name].model.end_id
        if end not in (None, wanted):
            raise UserError(
                f"{ENCODERS[name]}/config.json: eos_token_id is {end}: expected {wanted}, with "
                "which its tokenizer ends texts; use another model."
            )


def _read_tokenizers(root: epath.Path, index: Any) -> dict[str, Tokenizer]:
    classes = _index(root, index).classes
    tokenizers = {}
    for name, encoder in ENCODERS.items():
        if encoder in classes:
            path = root / encoder.replace("text_encoder", "tokenizer")
            if not path.exists():
                raise UserError(
                    f"{root} has no {path.name}: expected one for its {encoder}; copy the whole "
                    "folder of the model."
                )
            tokenizers[name] = Tokenizer.load(str(path))
    return tokenizers


class Index(NamedTuple):
    """The content of `model_index.json`.

    Attributes:
      is_xl: whether the pipeline is XL's.
      zero_absent: XL's `force_zeros_for_empty_prompt`.
      classes: the class of each part that the pipeline has.
    """

    is_xl: bool
    zero_absent: bool
    classes: dict[str, str]


def _index(root: epath.Path, index: Any) -> Index:
    what, kind = str(root / INDEX), index["_class_name"]
    is_xl = "XL" in kind
    values = read_keys(what, index, INDEX_KEYS[is_xl])
    classes = {part: values[part] for part in _PARTS if values.get(part) is not None}
    wanted = "text_encoder_2" if is_xl else "text_encoder"
    if wanted not in classes:
        raise UserError(
            f"{what} names no {wanted}: expected one for a {kind}; copy the whole folder of the "
            "model."
        )
    return Index(is_xl, values.get("force_zeros_for_empty_prompt", False), classes)


def _conditioner(root: epath.Path, index: Index) -> ClipConditioner | StableDiffusionXLConditioner:
    encoders = {
        name: ClipTextEncoder(
            model=clip_keys.read_text_config(
                read_part_config(root / part / "config.json"),
                projected=name == "text_2",
                what=f"{part}/config.json",
            ),
            hidden_layer=-2 if index.is_xl else None,
            final_norm=not index.is_xl,
        )
        for name, part in ENCODERS.items()
        if part in index.classes
    }
    if not index.is_xl:
        return ClipConditioner(text=encoders["text"], masked=False)
    return StableDiffusionXLConditioner(**encoders, zero_absent=index.zero_absent)


def _clip_encoders(spec: TextToImage) -> dict[str, ClipTextEncoder]:
    """Return the text encoders, which are CLIP's in all supported checkpoints."""
    encoders = spec.conditioner.encoders
    return {name: e for name, e in encoders.items() if isinstance(e, ClipTextEncoder)}


def _write(root: epath.Path, bundle: Bundle) -> None:
    spec, params, tokenizers = bundle
    network, autoencoder, conditioner = spec.denoiser, spec.autoencoder, spec.conditioner
    _check_networks(network, autoencoder)
    scheduler = write_scheduling(_scheduling(spec))
    network_config = unet_keys.write_unet_config(network)
    network_config["sample_size"] = spec.image_size // spec.downsampling
    vae_config, vae_tensors = autoencoder_folder.published_autoencoder(
        autoencoder, params["autoencoder"]
    )
    (root / INDEX).unlink(missing_ok=True)
    tensors = unet_keys.unet_to_torch(params["denoiser"])
    write_part(root / "unet", DIFFUSION_MODEL, network_config, tensors)
    write_part(root / "vae", DIFFUSION_MODEL, vae_config, vae_tensors)
    write_json(root / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        "_class_name": _pipeline_kind(network, encoders=len(conditioner.encoders)),
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae_config["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    if isinstance(conditioner, StableDiffusionXLConditioner):
        index["force_zeros_for_empty_prompt"] = conditioner.zero_absent
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    for name, encoder in _clip_encoders(spec).items():
        part = ENCODERS[name]
        text_config = clip_keys.write_text_config(encoder.model)
        tensors = clip_keys.clip_to_torch(params["text_encoders"][name], encoder.model)
        write_part(root / part, MODEL, text_config, tensors)
        index[part] = ["transformers", *text_config["architectures"]]
        part = part.replace("text_encoder", "tokenizer")
        tokenizer = tokenizers[name]
        assert isinstance(tokenizer, Tokenizer)  # CLIP's encoders have no others
        tokenizer.export(str(root / part))
        index[part] = ["transformers", "CLIPTokenizer"]
    write_json(root / INDEX, index)


def _holds(bundle: Bundle) -> bool:
    """Whether a model has Stable Diffusion's networks."""
    spec = bundle.spec
    return (
        isinstance(spec, TextToImage)
        and isinstance(spec.denoiser, UNet2DConditionConfig)
        and isinstance(spec.conditioner, ClipConditioner | StableDiffusionXLConditioner)
        and isinstance(spec.autoencoder, AutoencoderConfig | TinyAutoencoderConfig)
        and set(bundle.tokenizers) == set(spec.conditioner.encoders)
    )


def _scheduling(spec: TextToImage) -> Scheduling:
    sampler, schedule = spec.sampler.resolve(), spec.schedule
    solver, grid = sampler.solver, sampler.grid
    if (
        not isinstance(schedule, ScaledLinear)
        or not isinstance(grid, GRIDS)
        or not isinstance(solver, tuple(SCHEDULERS.values()))
    ):
        raise UserError(
            f"diffusers has no scheduler with {type(schedule).__name__}, {type(grid).__name__} and "
            f"{type(solver).__name__}: expected ScaledLinear, one of "
            f"{', '.join(kind.__name__ for kind in GRIDS)}, and one of "
            f"{', '.join(kind.__name__ for kind in SCHEDULERS.values())}; change the model's "
            "sampler."
        )
    return Scheduling(schedule, spec.prediction, solver, grid, sampler.init_noise)


def _pipeline_kind(network: UNet2DConditionConfig, *, encoders: int) -> str:
    inpaints = "Inpaint" if network.extra_channels else ""
    if network.added_width is None:
        return f"StableDiffusion{inpaints}Pipeline"
    return f"StableDiffusionXL{inpaints if encoders == 2 else 'Img2Img'}Pipeline"


FAMILY = PipelineFamily(PIPELINES, _read_spec, _read, _read_tokenizers, _holds, _write)
