"""FLUX transformers in one file, in the layout of their original code.

double_blocks.N.img_attn.qkv      queries, keys and values of image tokens, one under another
single_blocks.N.linear1           those of a single block, and the first layer of its MLP
final_layer.adaLN_modulation.1    shift, then scale: the other way round in diffusers
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.flux import FLUX1, FluxConfig
from jaxdiff.pretrained.flux_keys import FLUX2, flux_from_torch, flux_to_torch, is_flux1
from jaxdiff.pretrained.original_layout import (
    Pieces,
    TransformerShapes,
    open_transformer,
    stacked_rows,
    to_diffusers_names,
    to_original_names,
)
from jaxdiff.pretrained.placement import Place
from jaxdiff.pretrained.safetensors_io import Cut, Renamed, to_device, write_tensors

_ORIGINAL = "double_blocks.0.img_attn.qkv.weight"
FLUX_MARKS = _ORIGINAL, "single_transformer_blocks.0.attn.norm_q.weight"
"""Names that the file of a FLUX has, in the original layout and in diffusers'."""
_STREAMS = [
    ("img", "to_{}", "to_out.0", "norm", "ff"),
    ("txt", "add_{}_proj", "to_add_out", "norm_added", "ff_context"),
]
_NORMS = {"query_norm": "q", "key_norm": "k"}


def flux_modules(config: FluxConfig) -> dict[str, Pieces]:
    """Return the modules of the original code, and those of diffusers in each."""
    first, d = is_flux1(config), config.width
    time = "time_text_embed" if first else "time_guidance_embed"
    whole = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    embedders = {"time_in": f"{time}.timestep_embedder"}
    if config.guidance_embedding:
        embedders["guidance_in"] = f"{time}.guidance_embedder"
    if first:
        embedders["vector_in"] = f"{time}.text_embedder"
    else:
        for kind in ("double_stream_modulation_img", "double_stream_modulation_txt"):
            whole[f"{kind}.lin"] = f"{kind}.linear"
        whole["single_stream_modulation.lin"] = "single_stream_modulation.linear"
    for old, new in embedders.items():
        whole |= {f"{old}.in_layer": f"{new}.linear_1", f"{old}.out_layer": f"{new}.linear_2"}
    modules: dict[str, Pieces] = {
        "final_layer.adaLN_modulation.1": (("norm_out.linear", (slice(d, None), slice(0, d))),)
    }
    for n in range(config.double_depth):
        modules |= _double(f"double_blocks.{n}", f"transformer_blocks.{n}", d, first, whole)
    for n in range(config.single_depth):
        modules |= _single(f"single_blocks.{n}", f"single_transformer_blocks.{n}", d, first, whole)
    return modules | {old: ((new, None),) for old, new in whole.items()}


def _double(old: str, new: str, d: int, first: bool, whole: dict[str, str]) -> dict[str, Pieces]:
    """Return the divided modules of a double block, and add the others to `whole`."""
    mlp = ("net.0.proj", "net.2") if first else ("linear_in", "linear_out")
    modules: dict[str, Pieces] = {}
    for kind, projection, out, norm, feed in _STREAMS:
        attention = f"{old}.{kind}_attn"
        names = [f"{new}.attn.{projection.format(x)}" for x in "qkv"]
        modules[f"{attention}.qkv"] = stacked_rows(names, d)
        whole |= {f"{attention}.norm.{x}": f"{new}.attn.{norm}_{y}" for x, y in _NORMS.items()}
        whole[f"{attention}.proj"] = f"{new}.attn.{out}"
        whole |= {f"{old}.{kind}_mlp.{i}": f"{new}.{feed}.{mlp[i // 2]}" for i in (0, 2)}
        if first:
            context = "" if kind == "img" else "_context"
            whole[f"{old}.{kind}_mod.lin"] = f"{new}.norm1{context}.linear"
    return modules


def _single(old: str, new: str, d: int, first: bool, whole: dict[str, str]) -> dict[str, Pieces]:
    """Return the divided modules of a single block, and add the others to `whole`."""
    whole |= {f"{old}.norm.{x}": f"{new}.attn.norm_{y}" for x, y in _NORMS.items()}
    whole[f"{old}.linear2"] = f"{new}.{'proj_out' if first else 'attn.to_out'}"
    if not first:
        whole[f"{old}.linear1"] = f"{new}.attn.to_qkv_mlp_proj"
        return {}
    whole[f"{old}.modulation.lin"] = f"{new}.norm.linear"
    names = [*(f"{new}.attn.to_{x}" for x in "qkv"), f"{new}.proj_mlp"]
    return {f"{old}.linear1": stacked_rows(names, d)}


def fused_flux_modules(config: FluxConfig) -> dict[str, Pieces]:
    """Return diffusers' modules after `fuse_qkv_projections`, and its own modules in each."""
    modules = flux_modules(config)
    return {
        f"transformer_blocks.{n}.attn.{new}": modules[f"double_blocks.{n}.{old}_attn.qkv"]
        for n in range(config.double_depth)
        for old, new in (("img", "to_qkv"), ("txt", "to_added_qkv"))
    }


def original_flux_rename(config: FluxConfig) -> Callable[[str], str | Mapping[str, Cut | None]]:
    """Return what `Renamed` takes to read the original code's tensors under diffusers' names."""
    return to_diffusers_names(flux_modules(config))


def flux_to_original(
    tensors: Mapping[str, np.ndarray], config: FluxConfig
) -> dict[str, np.ndarray]:
    """Return tensors of diffusers under the original code's names, the inverse of renaming."""
    original = to_original_names(tensors, flux_modules(config))
    return {re.sub(r"_norm\.weight$", "_norm.scale", name): x for name, x in original.items()}


def flux_config_of(found: TransformerShapes) -> FluxConfig:
    """Return the config of a published FLUX from the shapes of its tensors.

    Raises:
      UserError: tensors are missing that determine it.
    """
    double, single = "transformer_blocks", "single_transformer_blocks"
    if _ORIGINAL in found.shapes:
        double, single = "double_blocks", "single_blocks"
    shared = ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear")
    like = FLUX2 if any(f"{name}.weight" in found.shapes for name in shared) else FLUX1
    norms = f"{double}.0.img_attn.norm.query_norm.scale", f"{double}.0.attn.norm_q.weight"
    (head,) = found.shape(1, *norms)
    width, patch = found.shape(2, "img_in.weight", "x_embedder.weight")
    outputs, _ = found.shape(2, "final_layer.linear.weight", "proj_out.weight")
    if width % head or patch % like.patch_size**2 or outputs != patch:
        raise UserError(
            f"{found.file} has {patch} input and {outputs} output channels, and heads of {head} of "
            f"{width}: expected equal numbers of channels and whole heads, as of models that read "
            "nothing but noisy latents; use another model."
        )
    time = "time_text_embed" if like is FLUX1 else "time_guidance_embed"
    changes: dict[str, Any] = {}
    if like is FLUX1:
        text = f"{time}.text_embedder.linear_1.weight"
        _, changes["pooled_width"] = found.shape(2, "vector_in.in_layer.weight", text)
    else:
        inner = f"{double}.0.ff.linear_out.weight"
        changes["mlp_ratio"] = found.shape(2, f"{double}.0.img_mlp.2.weight", inner)[1] / width
        embedder = f"{time}.timestep_embedder.linear_1.weight"
        _, changes["time_width"] = found.shape(2, "time_in.in_layer.weight", embedder)
        changes["rope_axes"] = (head // 4,) * 4
    return dataclasses.replace(
        like,
        channels=patch // like.patch_size**2,
        heads=width // head,
        head_width=head,
        double_depth=found.depth(double),
        single_depth=found.depth(single),
        text_width=found.shape(2, "txt_in.weight", "context_embedder.weight")[1],
        guidance_embedding=any(
            re.search(r"guidance_(in|embedder)\.", name) for name in found.shapes
        ),
        **changes,
    )


def open_flux_file(
    file: epath.PathLike, config: FluxConfig | None = None
) -> tuple[FluxConfig, Renamed]:
    """Open the tensors of a published FLUX transformer in one file, under diffusers' names.

    Args:
      file: safetensors.
      config: of the network; None finds it by the shapes of the tensors.

    Raises:
      UserError: the file is damaged, or holds another network.
    """
    tensors = open_transformer(file, "FLUX", FLUX_MARKS)
    config = config or flux_config_of(TransformerShapes(file, "FLUX", tensors.shapes))
    if _ORIGINAL in tensors:
        tensors = Renamed(tensors, original_flux_rename(config))
    return config, tensors


def read_flux_file(
    file: epath.PathLike, *, place: Place = to_device
) -> tuple[FluxConfig, dict[str, Any]]:
    """Read a published FLUX transformer from one file, with tensors in their stored type.

    Args:
      file: safetensors.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: the file is damaged, or holds another network.
    """
    config, tensors = open_flux_file(file)
    options = {"what": str(file), "advice": "use a whole, unpruned FLUX transformer"}
    return config, flux_from_torch(tensors, config, place=place, **options)


def write_flux_file(
    file: epath.PathLike, params: Mapping[str, Any], config: FluxConfig, prefix: str = ""
) -> None:
    """Write a FLUX transformer in the original layout, which ComfyUI and diffusers read.

    Args:
      file: safetensors.
      params: of the network, a nested dict; tensors keep their type.
      config: of the network.
      prefix: before all names, such as ComfyUI's `model.diffusion_model.`.

    Raises:
      UserError: the network has the structure of no published FLUX.
    """
    tensors = flux_to_original(flux_to_torch(params, config), config)
    write_tensors(file, {prefix + name: value for name, value in tensors.items()})
