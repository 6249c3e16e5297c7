"""Stable Diffusion as one safetensors file in the layout of its original training code.

    model.diffusion_model.*            the U-Net
    first_stage_model.*                the autoencoder
    cond_stage_model.*                 the text encoder of 1.x (CLIP) and 2.x (OpenCLIP)
    conditioner.embedders.N.*          those of XL

Such a file holds only weights. Names, shapes and markers identify the model; everything else is as
published. Every tensor is used, known not to change images, or an error that names it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.process import Prediction
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.diffusion.time_grids import TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained import autoencoder_keys, clip_keys, unet_keys
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.hub import download_tokenizer
from jaxdiff.pretrained.key_mapping import listed
from jaxdiff.pretrained.placement import Place, part_place
from jaxdiff.pretrained.presets import (
    CLIP_L,
    OPENCLIP_G,
    OPENCLIP_H,
    REFINER,
    SD1,
    SD2,
    XL,
    XL_SCALING_FACTOR,
)
from jaxdiff.pretrained.safetensors_io import Renamed, TensorFiles, to_device
from jaxdiff.pretrained.scheduler import LEAST_ALPHA_BAR
from jaxdiff.pretrained.single_file_keys import (
    AUTOENCODER,
    IRRELEVANT,
    TEXT,
    UNET,
    New,
    component_of,
    text_rename,
    unet_rename,
    vae_rename,
)
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import DDIM, PLMS, Euler

OPENCLIP_PAD = 0
"""The id of "!", with which OpenCLIP pads."""


class Variant(NamedTuple):
    """One published generation, which the width of the U-Net's text tokens identifies.

    Attributes:
      architecture: the beginning of its name in ModelSpec's metadata.
      network: the U-Net.
      conditioner: the text encoders.
      openclip: the names of those that are OpenCLIP's.
      sampler: default sampler settings.
      autoencoder: its size.
      size: of the images, in pixels.
    """

    architecture: str
    network: UNet2DConditionConfig
    conditioner: ClipConditioner | StableDiffusionXLConditioner
    openclip: tuple[str, ...]
    sampler: Sampler
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    size: int = 512


def _leading(solver: PLMS | Euler | DDIM, **changes: Any) -> Sampler:
    grid = TrainStepGrid(offset=1, **changes)
    return Sampler(solver=solver, grid=grid, init_noise="unit", num_steps=50, guidance_scale=7.5)


def _penultimate(model: ClipTextConfig) -> ClipTextEncoder:
    """Return an encoder of XL: the penultimate hidden state, without the final norm."""
    return ClipTextEncoder(model=model, hidden_layer=-2, final_norm=False)


_XL_SAMPLER = _leading(Euler(), rounded=False)

_XL_AUTOENCODER = AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR)

VARIANTS = [
    Variant(
        "stable-diffusion-xl-v1",
        XL,
        StableDiffusionXLConditioner(text=_penultimate(CLIP_L), text_2=_penultimate(OPENCLIP_G)),
        ("text_2",),
        _XL_SAMPLER,
        _XL_AUTOENCODER,
        size=1024,
    ),
    Variant(
        "stable-diffusion-xl-v1-refiner",
        REFINER,
        StableDiffusionXLConditioner(text_2=_penultimate(OPENCLIP_G)),
        ("text_2",),
        _XL_SAMPLER,
        _XL_AUTOENCODER,
        size=1024,
    ),
    Variant(
        "stable-diffusion-v2",
        SD2,
        ClipConditioner(text=ClipTextEncoder(model=OPENCLIP_H), masked=False),
        ("text",),
        _leading(DDIM(), ends_at="first_step"),
        size=768,
    ),
    Variant(
        "stable-diffusion-v1",
        SD1,
        ClipConditioner(text=ClipTextEncoder(model=CLIP_L), masked=False),
        (),
        _leading(PLMS(), ends_at="first_step"),
    ),
]

_OTHER_KINDS = {
    r"edm_(mean|std)": "the EDM objective of Playground v2.5",
    r"edm_vpred\..*": "the EDM objective of CosXL",
    r"(noise_augmentor|embedder)\..*": "the image embeddings of unCLIP",
    r"depth_model\..*": "the depth estimator of a depth-to-image model",
    r"low_scale_model\..*": "the noise augmentation of an upscaler",
    r"control_model\..*|controlnet_.*": "a ControlNet",
    r".*(motion_modules|temporal|time_stack).*": "the layers of a video model",
    r".*(joint_blocks|double_blocks|transformer_blocks\.0\.attn\.add_q_proj).*": (
        "a transformer such as that of Stable Diffusion 3 or FLUX"
    ),
    r"lora_.*|.*\.lora_.*|.*\.hada_.*|.*\.lokr_.*": "adapters; give them by --lora",
    r"emb_params|clip_[lg]": "a textual inversion; give it by --embedding",
    r".*time_embed.*cond_proj\..*": "the guidance embedding of an LCM",
}
"""Tensors of models and files of other kinds, with what they are."""


class _Contents(NamedTuple):
    """A single file: its model, and the names of its tensors by component, there to here."""

    variant: Variant
    spec: TextToImage
    components: Mapping[str, Mapping[str, str]]


def read_original_spec(file: epath.PathLike) -> TextToImage:
    """Read the specification of a Stable Diffusion checkpoint in one file.

    Raises:
      UserError: the file is damaged, or of a kind that jaxdiff does not know.
    """
    return _identify(TensorFiles([epath.Path(file)])).spec


def read_original(file: epath.PathLike, *, place: Place = to_device) -> Bundle:
    """Read a Stable Diffusion checkpoint in one file, with tensors in their stored type.

    The file has no tokenizer: CLIP's is downloaded from the hub.

    Args:
      file: safetensors.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: the file is damaged or of a kind that jaxdiff does not know, or the tokenizer
        cannot be downloaded.
    """
    file = epath.Path(file)
    tensors = TensorFiles([file])
    variant, spec, components = _identify(tensors)
    network, model = spec.denoiser, variant.autoencoder
    assert isinstance(network, UNet2DConditionConfig)

    def part(component: str, rename: Callable[[str], New]) -> Renamed:
        own = components[component]
        return Renamed(tensors, lambda name: rename(own[name]) if name in own else None)

    def options(name: str, *path: str) -> dict[str, Any]:
        advice = f"expected those of {variant.architecture}; use a whole, unpruned model"
        return {"place": part_place(place, *path), "what": f"{file}, {name}", "advice": advice}

    params: dict[str, Any] = {
        "denoiser": unet_keys.unet_from_torch(
            part(UNET, unet_rename(network)), network, **options("U-Net", "denoiser")
        ),
        "autoencoder": autoencoder_keys.autoencoder_from_torch(
            part(AUTOENCODER, vae_rename(model)), model, **options("autoencoder", "autoencoder")
        ),
    }
    params["text_encoders"] = {
        name: clip_keys.clip_from_torch(
            part(f"{TEXT} {i}", text_rename(encoder.model)),
            encoder.model,
            **options(f"text encoder {i + 1}", "text_encoders", name),
        )
        for i, (name, encoder) in enumerate(variant.conditioner.encoders.items())
    }
    return Bundle(spec, params, _tokenizers(variant))


def read_original_tokenizers(file: epath.PathLike) -> dict[str, Tokenizer]:
    """Return CLIP's tokenizer for each text encoder, padded as the model in `file` expects."""
    return _tokenizers(_identify(TensorFiles([epath.Path(file)])).variant)


def _tokenizers(variant: Variant) -> dict[str, Tokenizer]:
    plain = Tokenizer.load(str(download_tokenizer()))
    return {
        name: plain.with_pad(OPENCLIP_PAD) if name in variant.openclip else plain
        for name in variant.conditioner.encoders
    }


def _identify(tensors: TensorFiles) -> _Contents:
    """Return the published model of a file, its specification, and its tensors' components."""
    file = tensors.files[0]
    _refuse_other_kinds(tensors)
    components: dict[str, dict[str, str]] = {}
    for name in tensors:
        component, inner = component_of(name)
        components.setdefault(component, {})[name] = inner
    unet = components.get(UNET, {})
    keys = (tensors.shapes[n] for n in unet if n.endswith(".attn2.to_k.weight"))
    width = next((shape[-1] for shape in keys if shape), None)
    variant = next((v for v in VARIANTS if v.network.cross_attention_dim == width), None)
    if variant is None:
        raise UserError(
            f"{file} is no checkpoint of Stable Diffusion 1.x, 2.x or XL: it holds "
            f"{listed(list(tensors)) or 'nothing'}; give the file of a whole model, whose U-Net is "
            "called model.diffusion_model."
        )
    needed = [UNET, AUTOENCODER, *(f"{TEXT} {i}" for i in range(len(variant.conditioner.encoders)))]
    if missing := [_CALLED[part] for part in needed if part not in components]:
        raise UserError(
            f"{file} has no {', no '.join(missing)}: expected a whole model in one file; use a "
            "variant that includes all parts."
        )
    known = {*needed, IRRELEVANT}
    if unknown := [n for part, names in components.items() if part not in known for n in names]:
        raise UserError(
            f"{file} holds {listed(unknown)}: expected only tensors of "
            f"{variant.architecture}; use another model, or remove them."
        )
    prediction, schedule = objective_of(variant, tensors)
    spec = TextToImage(
        name=file.stem,
        denoiser=dataclasses.replace(variant.network, in_channels=_in_channels(tensors)),
        conditioner=variant.conditioner,
        autoencoder=variant.autoencoder,
        prediction=prediction,
        schedule=schedule,
        image_size=512 if variant.network == SD2 and prediction == "eps" else variant.size,
        sampler=variant.sampler,
    )
    return _Contents(variant, spec, components)


_CALLED = {
    UNET: "U-Net (model.diffusion_model.)",
    AUTOENCODER: "autoencoder (first_stage_model.)",
    f"{TEXT} 0": "text encoder (cond_stage_model. or conditioner.embedders.0.)",
    f"{TEXT} 1": "second text encoder (conditioner.embedders.1.)",
}


def _refuse_other_kinds(tensors: TensorFiles) -> None:
    """Raise `UserError` for tensors that mark another kind of model."""
    for pattern, kind in _OTHER_KINDS.items():
        if marks := [name for name in tensors if re.fullmatch(pattern, name)]:
            raise UserError(
                f"{tensors.files[0]} holds {listed(marks)}, {kind}: expected a model of Stable "
                "Diffusion 1.x, 2.x or XL; use another model."
            )


def _find(tensors: TensorFiles, *ends: str) -> str | None:
    """Return the name of the U-Net's tensor that has one of these names."""
    parts = {name: component_of(name) for name in tensors if name.endswith(ends)}
    return next((name for name, part in parts.items() if part in {(UNET, e) for e in ends}), None)


_ROLES = {
    8: "instruct-pix2pix models",
    5: "depth-to-image models",
    7: "upscalers",
}


def _in_channels(tensors: TensorFiles) -> int:
    """Return the channels of the U-Net's input.

    Raises:
      UserError: neither latents alone nor an inpainting model's.
    """
    name = _find(tensors, "input_blocks.0.0.weight", "conv_in.weight")
    shape = tensors.shapes[name] if name else ()
    channels = shape[1] if len(shape) == 4 else 0
    if channels not in (4, 9):
        kind = f", as {_ROLES[channels]} have" if channels in _ROLES else ""
        raise UserError(
            f"{tensors.files[0]}: the U-Net's first convolution is of shape {shape}, with "
            f"{channels} input channels{kind}: expected 4, or 9 for inpainting; use another model."
        )
    return channels


_STATED = ("modelspec.prediction_type", "modelspec.predict_key")
_PREDICTIONS: dict[str, Prediction] = {
    "v": "v",
    "v_prediction": "v",
    "epsilon": "eps",
    "eps": "eps",
}
_ARCHITECTURE_ENDS: dict[str, Prediction] = {"v": "v", "512": "eps"}


def objective_of(variant: Variant, tensors: TensorFiles) -> tuple[Prediction, ScaledLinear]:
    """Return prediction and schedule as the file states them, else as published.

    A file states them in its metadata (Stability AI's ModelSpec 1.0.1), as later models of XL's
    shape do by empty tensors named `v_pred` and `ztsnr`, or by a stored table of the schedule.

    Raises:
      UserError: it states what jaxdiff does not know or have, or that contradicts its tensors.
    """
    _refuse_other_kinds(tensors)
    file, metadata = tensors.files[0], tensors.metadata
    architecture = metadata.get("modelspec.architecture", variant.architecture)
    starts = [v.architecture for v in VARIANTS if architecture.startswith(v.architecture)]
    if max(starts, key=len, default="") != variant.architecture or "edit" in architecture:
        raise UserError(
            f"{file}: modelspec.architecture is {architecture!r}: expected one that begins with "
            f"{variant.architecture}, whose tensors these are; correct the metadata, or use "
            "another model."
        )
    prediction = _ARCHITECTURE_ENDS.get(architecture.rpartition("-")[2])
    for key in _STATED:
        if (stated := metadata.get(key)) is None:
            continue
        if stated.lower() not in _PREDICTIONS:
            raise UserError(
                f"{file}: {key} is {stated!r}: expected {' or '.join(_PREDICTIONS)}; use another "
                "model."
            )
        prediction = _PREDICTIONS[stated.lower()]
    if "v_pred" in tensors:
        prediction = "v"
    prediction = prediction or _published(variant, tensors)
    schedule = _schedule(variant, tensors)
    if schedule.zero_terminal_snr and prediction == "eps":
        raise UserError(
            f"{file} has zero terminal SNR (ztsnr) but predicts eps, which does not determine "
            "images there: expected v_pred too; use another model."
        )
    return prediction, schedule


# Of zero terminal SNR, as diffusers' Euler scheduler has it.
_PLAIN = ScaledLinear()
_ZERO_SNR = ScaledLinear(zero_terminal_snr=True, terminal_alpha_bar=LEAST_ALPHA_BAR)

_ALPHA_BARS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "betas": lambda betas: np.cumprod(1 - betas),
    "alphas_cumprod": lambda alpha_bars: alpha_bars,
    "denoiser.sigmas": lambda sigmas: 1 / (1 + np.sort(sigmas) ** 2),
}
"""Tables of the schedule that files of the original training code store, as alpha_bar."""


def _schedule(variant: Variant, tensors: TensorFiles) -> ScaledLinear:
    """Return the published schedule, or with zero terminal SNR if the file states that.

    Raises:
      UserError: the file stores a table of another schedule.
    """
    schedule = _ZERO_SNR if "ztsnr" in tensors else _PLAIN
    for name in tensors:
        read = _ALPHA_BARS.get(component_of(name)[1])
        table = np.zeros(0) if read is None else tensors[name].astype(np.float64).ravel()
        if read is None or not table.any():  # zeros are no schedule
            continue
        found = read(table)
        same = [known for known in (_PLAIN, _ZERO_SNR) if _is_schedule(found, known)]
        if not same:
            raise UserError(
                f"{tensors.files[0]}: {name} is a noise schedule of its own: expected that of "
                f"{variant.architecture}; use another model."
            )
        if same == [_ZERO_SNR]:
            schedule = _ZERO_SNR
    return schedule


def _is_schedule(alpha_bars: np.ndarray, schedule: ScaledLinear) -> bool:
    """Whether a table of half precision or more is of this schedule."""
    count = schedule.num_train_steps
    expected = np.square(schedule.alpha(jnp.arange(1.0, count + 1) / count))
    return alpha_bars.shape == (count,) and np.allclose(alpha_bars, expected, rtol=0.02, atol=1e-4)


_LEAST_SPREAD_OF_V = 0.09


def _published(variant: Variant, tensors: TensorFiles) -> Prediction:
    """Return the prediction type of the published model.

    All predict eps, but the 2.x for 768 pixels predicts v. It differs from the others of 2.x in
    the spread of one bias (the test of ComfyUI's model detection).
    """
    if variant.network != SD2 or _in_channels(tensors) != 4:
        return "eps"
    block = "1.transformer_blocks.0.norm1.bias"
    name = _find(tensors, f"output_blocks.11.{block}", f"up_blocks.3.attentions.2{block[1:]}")
    spread = np.std(tensors[name].astype(np.float32)) if name else 0.0
    return "eps" if 0 < spread <= _LEAST_SPREAD_OF_V else "v"
