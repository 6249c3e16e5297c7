"""Encode prompts apart from sampling, so that a device need not hold all of a model at once."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.distributed.mesh import num_replicas
from jaxdiff.distributed.multihost import to_host
from jaxdiff.distributed.replicas import per_replica, shard
from jaxdiff.models.conditioning import Conditioning, TextInputs
from jaxdiff.models.text_to_image import TextToImage, merge_params
from jaxdiff.pipelines.program import NUM_PROGRAMS, SampleInputs

PARTS = ("text_encoders", "adapters", "added_tokens")
"""Parameters that encoding reads."""

_FIELDS = ("text", "negative", "mix_text", "composed_text")  # of SampleInputs


def encode_prompts(
    spec: TextToImage, params: PyTree, mesh: Mesh, inputs: SampleInputs, size: int
) -> SampleInputs:
    """Return inputs with the conditioning of their prompts, on the host.

    Args:
      spec: of the model.
      params: of the model; its text encoders are on the devices only during this call.
      mesh: of the devices.
      inputs: with tokenized prompts; equal ones are encoded once.
      size: prompts that a replica encodes at a time.
    """
    axes = spec.param_axes()
    encoders = shard({"text_encoders": params["text_encoders"]}, mesh, axes)
    others = {name: params[name] for name in PARTS[1:] if name in params}
    params = merge_params(encoders, others)
    encode = functools.partial(_compiled_encoder(spec, mesh), params)
    size *= num_replicas(mesh)
    texts = {name: getattr(inputs, name) for name in _FIELDS}
    return inputs._replace(
        **{name: _encode(encode, text, size) for name, text in texts.items() if text is not None}
    )


def _encode(encode: Any, text: TextInputs, size: int) -> Conditioning:
    """Encode prompts [b, ...], or composed ones [b, k, ...], in batches of `size`."""
    lead = text.absent.shape
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[len(lead) :]), text)
    leaves = jax.tree.leaves(flat)
    rows = [b"".join(leaf[i].tobytes() for leaf in leaves) for i in range(len(flat.absent))]
    order = {row: k for k, row in enumerate(dict.fromkeys(rows))}
    first = [rows.index(row) for row in order]
    padded = np.resize(first, (-(-len(first) // size), size))
    made = [to_host(encode(_rows(flat, index))) for index in padded]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *made)
    found = _rows(joined, np.array([order[row] for row in rows]))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def _rows(tree: PyTree, index: np.ndarray) -> PyTree:
    return jax.tree.map(lambda x: x[index], tree)


@functools.lru_cache(maxsize=NUM_PROGRAMS)
def _compiled_encoder(spec: TextToImage, mesh: Mesh) -> Any:
    return per_replica(spec.encode_text, mesh)
