"""Load a model for sampling, each parameter to the devices that hold it."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import AbstractMesh, Mesh

from jaxdiff.distributed.chips import GIB, Device, find_chip
from jaxdiff.distributed.mesh import REPLICATED, MeshConfig, abstract_mesh
from jaxdiff.distributed.replicas import local_mesh, to_devices
from jaxdiff.distributed.sharding import bytes_per_device, leaf_sharding
from jaxdiff.errors import UserError
from jaxdiff.models.layers import ComputeType, cast
from jaxdiff.models.lora import Change, Factors, adapted_path, with_adapter
from jaxdiff.models.quantized import QuantizedType, quantize_kernel
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.compiled import CompiledFolder
from jaxdiff.pipelines.lora import apply_lora, read_scaled
from jaxdiff.pipelines.pipeline import Pipeline, compute_type
from jaxdiff.pretrained.load import load_bundle, read_spec
from jaxdiff.pretrained.placement import Place, Placement
from jaxdiff.pretrained.safetensors_io import to_device

DEFAULT_MODEL = "shipped:icons"

TEXT = "text_encoders"


def load(
    model: epath.PathLike = DEFAULT_MODEL,
    *,
    base: epath.PathLike | None = None,
    dtype: ComputeType | None = None,
    quantize: QuantizedType | None = None,
    devices: Sequence[Any] | None = None,
    mesh: MeshConfig = REPLICATED,
    offload_text: bool = False,
    types: Sequence[type] = (),
    compiled: epath.PathLike | None = None,
    lora: Sequence[tuple[epath.PathLike, float]] = (),
) -> Pipeline:
    """Load a text-to-image model for sampling.

    Args:
      model: folder of a run, of an exported model or of a pipeline of diffusers; a single file of
        Stable Diffusion; `shipped:NAME`; or the id OWNER/NAME of a model of the Hugging Face hub.
        With `base`, a single file with a transformer of FLUX or Z-Image.
      base: folder of diffusers, or hub id, of the model that such a file was made from: its text
        encoders, tokenizers, autoencoder, scheduler and defaults. The weights of its transformer
        are neither read nor downloaded.
      dtype: to compute in; by default the type of the weights, but float32 on a CPU.
      quantize: store the kernels of linear layers and convolutions in 8 bits; images change.
      devices: to sample on; by default all of this process.
      mesh: how they share a model that is too large for one of them, such as
        `MeshConfig(fsdp=8)`; by default each holds all of it.
      offload_text: keep the text encoders on the host, and on the devices only while they encode
        the prompts of a call.
      types: dataclasses, such as a network of yours, that the specification may name.
      compiled: folder of `jaxdiff compile`, whose programs are used where they fit.
      lora: LoRA files and their scales, merged into the weights; before those are quantised.

    Raises:
      UserError: there is no such model, or it is no text-to-image model, or it does not fit the
        devices, or the folder holds no programs.
    """
    programs = None if compiled is None else CompiledFolder(compiled)
    dtype, place = compute_type(dtype), to_device
    spec = read_spec(model, types, base)
    if isinstance(spec, TextToImage):
        devices_mesh = local_mesh(devices, mesh)
        size = 1 if quantize else 4 if dtype == "float32" else 2
        check_memory(spec, devices_mesh, size, offload_text=offload_text)
        place = _placement(spec, devices_mesh, dtype, offload_text=offload_text)
        if quantize:
            place = _quantized(spec, dtype, quantize, lora)
    bundle = load_bundle(model, base=base, place=place, types=types)
    pipe = Pipeline(
        bundle,
        dtype=dtype,
        quantize=quantize,
        devices=devices,
        mesh=mesh,
        offload_text=offload_text,
        types=types,
    )
    for file, scale in () if quantize else lora:
        pipe = apply_lora(pipe, file, scale=scale, merge=True)
    return pipe.with_programs(programs)


def _placement(
    spec: TextToImage, mesh: Mesh, dtype: ComputeType | None, *, offload_text: bool
) -> Place:
    """Return where `Pipeline` has each parameter, in the type that it computes in."""
    sharding = leaf_sharding(mesh, spec.param_axes())

    def put(path: tuple[Any, ...], value: np.ndarray | jax.Array) -> Any:
        if offload_text and path[0] == TEXT:
            return np.asarray(value if dtype is None else cast(value, dtype))
        # JAX would compile a transposition for every shape that is not in C order.
        value = value if isinstance(value, jax.Array) else np.asarray(value, order="C")
        placed = to_devices(value, sharding(path, value))
        # Wait, for the next parameter is read while this one is in memory in two types.
        return placed if dtype is None else jax.block_until_ready(cast(placed, dtype))

    return Placement(put)


def _quantized(
    spec: TextToImage,
    dtype: ComputeType | None,
    kind: QuantizedType,
    lora: Sequence[tuple[epath.PathLike, float]],
) -> Placement:
    """Return how adapters are merged and kernels quantised, on the host, as each is read.

    One kernel alone is in memory as it was stored, and a device holds the 8 bits alone.
    """
    kernels = spec.kernel_axes()
    adapters: dict[tuple[Any, ...], list[Factors | Change]] = defaultdict(list)
    for file, scale in lora:
        for part, found in read_scaled(file, spec, scale).items():
            root = (part,) if part == "denoiser" else (TEXT, part)
            for path, adapter in found.items():
                adapters[*root, *adapted_path(path, adapter)].append(adapter)

    def put(path: tuple[Any, ...], value: np.ndarray | jax.Array) -> Any:
        value = np.asarray(value if dtype is None else cast(value, dtype))
        for adapter in adapters.get(path, ()):
            value = np.asarray(with_adapter(value, adapter))
        return quantize_kernel(value, kernels[path], kind) if path in kernels else value

    return Placement(put)


def check_memory(
    spec: TextToImage,
    mesh: Mesh,
    item_size: int,
    *,
    offload_text: bool = False,
    limit: float | None = None,
) -> None:
    """Check that the weights fit the memory of the devices.

    Args:
      spec: of the model.
      mesh: of the devices.
      item_size: bytes of a number.
      offload_text: whether text encoders and denoiser are never there together.
      limit: bytes of a device's memory; by default as it states. A CPU has none.

    Raises:
      UserError: they do not; it names a mesh that would do.
    """
    device = mesh.devices.flat[0]
    limit = _memory(device) if limit is None else limit
    if limit is None:
        return
    needed = _bytes_per_device(spec, mesh, item_size, offload_text)
    if needed <= limit:
        return
    count = mesh.size
    fits = [
        fsdp
        for fsdp in range(1, count + 1)
        if count % fsdp == 0
        and _bytes_per_device(spec, _shared_by(fsdp, count), item_size, offload_text) <= limit
    ]
    others = ["quantize int8"] if item_size > 1 else []
    others += [] if offload_text else ["offload_text"]
    advice = f"set mesh.fsdp to {fits[0]}" if fits else f"use more than {count} devices"
    raise UserError(
        f"The weights of {spec.name} take {needed / GIB:.1f} GiB on each device, "
        f"{(needed - limit) / GIB:.1f} GiB more than a {device.device_kind} has: {advice}"
        f"{', or ' if others else ''}{' or '.join(others)}."
    )


def _shared_by(fsdp: int, count: int) -> AbstractMesh:
    """Return the mesh of `count` devices, `fsdp` of which share a model."""
    return abstract_mesh(MeshConfig(data=count // fsdp, fsdp=fsdp))


def _memory(device: Device) -> float | None:
    if device.platform == "cpu":
        return None
    stats = getattr(device, "memory_stats", lambda: None)() or {}
    chip = find_chip(device.device_kind)
    return stats.get("bytes_limit") or (chip.memory if chip else None)


def _bytes_per_device(
    spec: TextToImage, mesh: Mesh | AbstractMesh, item_size: int, offload_text: bool
) -> float:
    """Return the bytes of weights that are on a device at the same time."""
    axes, rest = spec.param_axes(), spec.abstract_params()
    text = {TEXT: rest.pop(TEXT)}
    sizes = [bytes_per_device(part, mesh, axes, item_size) for part in (text, rest)]
    return max(sizes) if offload_text else sum(sizes)
