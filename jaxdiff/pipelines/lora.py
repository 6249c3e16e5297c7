"""LoRA on a whole model: adapters beside its weights or merged into them.

Adapters go by part (`denoiser`, or the name of a text encoder), then by the path of the layer; the
factor alpha / rank on their output is part of `up`.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.models.lora import Adapters, Change, Changes, Factors, Path, tree
from jaxdiff.models.quantized import is_quantized
from jaxdiff.models.text_to_image import Params, TextToImage
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.lora import read_lora
from jaxdiff.pretrained.merging import merge_into, split_adapters


def apply_lora(
    pipe: Pipeline, file: epath.PathLike, *, scale: float = 1.0, merge: bool = False
) -> Pipeline:
    """Return a pipeline with the adapters of a LoRA file, in addition to its own.

    Args:
      pipe: of the model that the file is for; unchanged.
      file: of diffusers, PEFT, kohya or LyCORIS, safetensors, or the folder of one file.
      scale: factor on the adapters' effect; for DoRA of PEFT, on the change of the direction.
      merge: add them to the weights, for the speed of the plain model; `remove_lora` then has no
        effect. Needed for other kinds than plain LoRA, such as DoRA, LoHa and LoKr. Kernels in 8
        bits are rounded again; `jaxdiff.load(lora=...)` rounds them once.

    Raises:
      UserError: the file is damaged, of another kind, or for another model, or the scale is not
        finite.
    """
    bundle, adapters = pipe.bundle, read_scaled(file, pipe.spec, scale)
    if merge:
        return pipe.with_bundle(bundle._replace(params=merge_into(bundle.params, adapters)))
    kinds = {x.kind for found in adapters.values() for x in found.values() if isinstance(x, Change)}
    if kinds:
        raise UserError(
            f"{file} has {', '.join(sorted(kinds))}, which is not of low rank: expected merge=True."
        )
    return pipe.with_bundle(attach(bundle, cast(Adapters, adapters)))


def remove_lora(pipe: Pipeline) -> Pipeline:
    """Return a pipeline without the unmerged adapters of `apply_lora`."""
    return pipe.with_bundle(detach(pipe.bundle))


def read_scaled(
    file: epath.PathLike, spec: TextToImage, scale: float
) -> dict[str, dict[Path, Factors | Change]]:
    """Read the adapters of a LoRA file for a model, with a factor on their effect.

    Raises:
      UserError: as `apply_lora` raises.
    """
    if not math.isfinite(scale):
        raise UserError(f"The scale of {file} is {scale}: expected a finite number.")
    return scaled(read_lora(file, spec), scale)


def scaled(adapters: Changes, scale: float) -> dict[str, dict[Path, Factors | Change]]:
    """Multiply the effect of adapters."""
    return {
        part: {path: adapter.scaled(scale) for path, adapter in found.items()}
        for part, found in adapters.items()
    }


def adapters_of(bundle: Bundle) -> dict[str, dict[Path, Factors]]:
    """Return the unmerged adapters of a model."""
    adapters = split_adapters(bundle.params.get("adapters", {}))
    return {part: dict(pairs) for part, pairs in adapters.items()}


def merge(bundle: Bundle, adapters: Changes) -> Bundle:
    """Merge adapters into a model's weights; its unmerged ones stay unmerged."""
    return bundle._replace(params=merge_into(bundle.params, adapters))


def attach(bundle: Bundle, adapters: Adapters) -> Bundle:
    """Add adapters to a model without merging, each part padded with zeros to its largest rank."""
    own, weights = adapters_of(bundle), detach(bundle).params
    trees: dict[str, Any] = {}
    for part in {**own, **adapters}:
        mine, new = own.get(part, {}), adapters.get(part, {})
        both = {path: mine[path].beside(new[path]) for path in mine.keys() & new.keys()}
        pairs = {**mine, **new, **both}
        rank = max(pair.down.shape[-1] for pair in pairs.values())
        dtype = jax.tree.leaves(_part(weights, part), is_leaf=is_quantized)[0].dtype
        trees[part] = tree({path: _padded(pair, rank, dtype) for path, pair in pairs.items()})
    if not trees:
        return bundle
    adapted = {part: trees.pop(part) for part in ("denoiser",) if part in trees}
    if trees:
        adapted["text_encoders"] = trees
    return bundle._replace(params={**weights, "adapters": adapted})


def detach(bundle: Bundle) -> Bundle:
    """Return the model without its unmerged adapters."""
    kept = {name: part for name, part in bundle.params.items() if name != "adapters"}
    return bundle._replace(params=kept)


def _part(params: Params, part: str) -> Mapping[str, Any]:
    return params["denoiser"] if part == "denoiser" else params["text_encoders"][part]


def _padded(pair: Factors, rank: int, dtype: Any) -> Factors:
    down, up = (jnp.asarray(x, dtype) for x in pair)
    more = rank - down.shape[-1]
    at_end = [(0, 0)] * (down.ndim - 1)
    before_end = [*[(0, 0)] * (up.ndim - 2), (0, more), (0, 0)]
    return Factors(jnp.pad(down, [*at_end, (0, more)]), jnp.pad(up, before_end))
