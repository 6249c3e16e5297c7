"""Folders of diffusers' pipelines: `model_index.json` names the class, and so the family."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.data.pretrained_tokenizer import PretrainedTokenizer
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained import flux, stable_diffusion, z_image
from jaxdiff.pretrained.autoencoder_folder import published_autoencoder, read_autoencoder_params
from jaxdiff.pretrained.bundle import Bundle, model_name, write_json
from jaxdiff.pretrained.merging import merge_additions
from jaxdiff.pretrained.pipeline_folder import (
    ENCODERS,
    INDEX,
    PipelineFamily,
    read_part_config,
)
from jaxdiff.pretrained.placement import Place, part_place
from jaxdiff.pretrained.safetensors_io import open_weights, to_device, write_tensors
from jaxdiff.pretrained.text_encoder_folder import (
    MODEL,
    published_text_encoder,
    read_text_encoder,
)
from jaxdiff.pretrained.transformer_file import open_transformer_file

DIFFUSION_MODEL = "diffusion_pytorch_model"

FAMILIES = {
    "Stable Diffusion": stable_diffusion.FAMILY,
    "FLUX": flux.FAMILY,
    "Z-Image": z_image.FAMILY,
}

_REFUSED = {"Flux2Pipeline": "whose text encoder, Mistral, jaxdiff does not have"}


def is_diffusers_folder(folder: epath.PathLike) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (epath.Path(folder) / INDEX).exists()


def read_diffusers_spec(
    folder: epath.PathLike, transformer: epath.Path | None = None
) -> TextToImage:
    """Read the specification of a model.

    Args:
      folder: with `model_index.json`.
      transformer: a file with the network's weights, which names the model instead of the folder.

    Raises:
      UserError: a config is missing, or has unsupported values.
    """
    root, index, family = _open(folder)
    return _read_spec(root, index, family, transformer)


def read_diffusers(
    folder: epath.PathLike, transformer: epath.Path | None = None, *, place: Place = to_device
) -> Bundle:
    """Read a model, with tensors in their stored type.

    Args:
      folder: with `model_index.json`.
      transformer: a file with the network's weights, instead of those in the folder.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: a part is missing or damaged, or of an unsupported kind.
    """
    root, index, family = _open(folder)
    spec = _read_spec(root, index, family, transformer)
    tokenizers = _read_tokenizers(root, spec)
    assert spec.autoencoder is not None  # of all families
    options: dict[str, Any] = {"place": part_place(place, "denoiser")}
    if transformer is None:
        tensors = open_weights(root / family.network, DIFFUSION_MODEL)
    else:
        tensors = open_transformer_file(transformer, spec.denoiser, folder)
        options |= {
            "what": str(transformer),
            "advice": f"expected a transformer of the size of that in {folder}; name the base that "
            "it was made from",
        }
    params = {"denoiser": family.from_torch(tensors, spec.denoiser, **options)}
    params["text_encoders"] = {
        name: read_text_encoder(
            root / ENCODERS[name], encoder, place=part_place(place, "text_encoders", name)
        )
        for name, encoder in spec.conditioner.encoders.items()
    }
    params["autoencoder"] = read_autoencoder_params(
        root / "vae", spec.autoencoder, place=part_place(place, "autoencoder")
    )
    return Bundle(spec, params, tokenizers)


def _read_spec(
    root: epath.Path,
    index: Mapping[str, Any],
    family: PipelineFamily,
    transformer: epath.Path | None,
) -> TextToImage:
    spec = family.read_spec(root, index)
    return spec if transformer is None else dataclasses.replace(spec, name=transformer.stem)


def read_diffusers_tokenizers(folder: epath.PathLike) -> Mapping[str, TextTokenizer]:
    """Read the tokenizers of all text encoders.

    Raises:
      UserError: one is missing or damaged, or does not fit its text encoder.
    """
    root, index, family = _open(folder)
    return _read_tokenizers(root, family.read_spec(root, index))


def _read_tokenizers(root: epath.Path, spec: TextToImage) -> dict[str, TextTokenizer]:
    tokenizers = {}
    for name, encoder in spec.conditioner.encoders.items():
        path = _tokenizer_folder(root, name)
        if not path.exists():
            raise UserError(
                f"{root} has no {path.name}: expected one for its {ENCODERS[name]}; copy the whole "
                "folder of the model."
            )
        tokenizers[name] = encoder.load_tokenizer(str(path))
        pooled = not isinstance(spec.conditioner, ClipConditioner)
        _check_tokenizer(encoder, tokenizers[name], ENCODERS[name], pooled=pooled)
    return tokenizers


def _check_tokenizer(encoder: Any, tokenizer: Any, part: str, *, pooled: bool) -> None:
    """Check the ids of a tokenizer, and its end, whose features are the pooled ones of CLIP."""
    most, config = encoder.model.vocab_size, f"{part}/config.json"
    if tokenizer.vocab_size > most:
        raise UserError(
            f"{config}: vocab_size is {most}: expected at least {tokenizer.vocab_size}, the ids of "
            "its tokenizer; copy the whole folder of the model."
        )
    if pooled and isinstance(encoder, ClipTextEncoder):
        end = encoder.model.end_id
        if end not in (None, tokenizer.end_id):
            raise UserError(
                f"{config}: eos_token_id is {end}: expected {tokenizer.end_id}, with which its "
                "tokenizer ends texts; use another model."
            )


def _tokenizer_folder(root: epath.Path, name: str) -> epath.Path:
    return root / ENCODERS[name].replace("text_encoder", "tokenizer")


def write_diffusers(
    folder: epath.PathLike, bundle: Bundle, *, original: epath.PathLike | None = None
) -> None:
    """Write a folder that diffusers loads; the index comes last and marks it as complete.

    Tensors keep their type. Adapters and added tokens are merged into the weights.

    Args:
      folder: to write.
      bundle: the model.
      original: a folder of diffusers that its text encoders come from. Layers of a language model
        that the denoiser does not read are copied from it.

    Raises:
      UserError: diffusers has no such model.
    """
    root, family = epath.Path(folder), _family_of(bundle)
    spec, params, tokenizers = merge_additions(bundle)
    written = family.write_spec(spec)
    vae_config, vae_tensors = published_autoencoder(spec.autoencoder, params["autoencoder"])
    (root / INDEX).unlink(missing_ok=True)
    index = written.index | {
        family.network: ["diffusers", written.network["_class_name"]],
        "vae": ["diffusers", vae_config["_class_name"]],
        "scheduler": ["diffusers", written.scheduler["_class_name"]],
    }
    tensors = family.to_torch(params["denoiser"], spec.denoiser)
    _write_part(root / family.network, DIFFUSION_MODEL, written.network, tensors)
    _write_part(root / "vae", DIFFUSION_MODEL, vae_config, vae_tensors)
    write_json(root / "scheduler" / "scheduler_config.json", written.scheduler)
    for name, encoder in spec.conditioner.encoders.items():
        part, tokenizer = ENCODERS[name], _tokenizer_folder(root, name)
        source = None if original is None else epath.Path(original) / part
        published = published_text_encoder(encoder, params["text_encoders"][name], source)
        _write_part(root / part, MODEL, *published)
        index[part] = ["transformers", *published.config["architectures"]]
        index[tokenizer.name] = ["transformers", _write_tokenizer(tokenizer, tokenizers[name])]
    write_json(root / INDEX, index)


def _write_tokenizer(folder: epath.Path, tokenizer: TextTokenizer) -> str:
    """Write a tokenizer, and return its class in transformers."""
    assert isinstance(tokenizer, Tokenizer | PretrainedTokenizer)  # those of the text encoders
    tokenizer.export(str(folder))
    return read_part_config(folder / "tokenizer_config.json")["tokenizer_class"]


def _family_of(bundle: Bundle) -> PipelineFamily:
    spec = bundle.spec
    if isinstance(spec, TextToImage) and set(bundle.tokenizers) == set(spec.conditioner.encoders):
        for family in FAMILIES.values():
            if family.holds(spec):
                return family
    raise UserError(
        f"{model_name(spec)} is no model of diffusers: expected the networks, text encoders with "
        f"tokenizers and autoencoder of {' or '.join(FAMILIES)}; export it in another format."
    )


def _write_part(
    folder: epath.Path, stem: str, config: dict[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    write_tensors(folder / f"{stem}.safetensors", tensors)
    write_json(folder / "config.json", config)


def _open(folder: epath.PathLike) -> tuple[epath.Path, dict[str, Any], PipelineFamily]:
    """Return the folder, its index and its family."""
    root = epath.Path(folder)
    index = read_part_config(root / INDEX)
    kind = index.get("_class_name")
    for family in FAMILIES.values():
        if isinstance(kind, str) and kind in family.pipelines:
            return root, index, family
    known = [name for family in FAMILIES.values() for name in family.pipelines]
    why = _REFUSED.get(str(kind), "which jaxdiff does not support")
    raise UserError(
        f"{root / INDEX} names {kind}, {why}: expected {', '.join(known)}; use another model."
    )
