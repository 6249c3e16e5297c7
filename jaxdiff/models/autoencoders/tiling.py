"""Sliced and tiled encoding and decoding, which bound the memory of large images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.sampling.sampler import VaeMode

OVERLAP = 0.25  # fraction of a tile's side that blends into the next one; as in diffusers

Network = Callable[[Float[Array, "b h w c"]], Float[Array, "b h2 w2 c2"]]


def tile_sides(sample_size: int, downsampling: int) -> tuple[int, int]:
    """Return the sides of a tile in latents and in pixels, of at most `sample_size` pixels.

    A tile has whole latents, at least one.
    """
    latents = max(1, sample_size // downsampling)
    return latents, latents * downsampling


def apply_vae_mode(
    network: Network, x: Float[Array, "b h w c"], vae_mode: VaeMode, tile: int, tile_out: int
) -> Float[Array, "b h2 w2 c2"]:
    """Apply `network` to the batch, image by image, or tile by tile."""
    if vae_mode == "full":
        return network(x)
    if vae_mode == "slicing" or max(x.shape[1:3]) <= tile:
        return one_by_one(network, x)
    return tile_by_tile(network, x, tile, tile_out)


def one_by_one(network: Network, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    """Apply `network` to one image at a time."""
    return jax.lax.map(lambda image: network(image[None])[0], x)


def tile_by_tile(
    network: Network, x: Float[Array, "b h w c"], tile: int, tile_out: int
) -> Float[Array, "b h2 w2 c2"]:
    """Apply `network` to one tile at a time, and blend each linearly into its neighbours.

    A tile has no context beyond its edges, so colours may differ a little between tiles.

    Args:
      network: scales the sides of its input by tile_out / tile; this or its inverse is an integer.
      x: images or latents.
      tile: side of a tile.
      tile_out: side of the network's output for a tile.
    """
    height, width = x.shape[1:3]
    # Tiles begin at whole latents, so that what is kept of each ends where the next one begins.
    latents = min(tile, tile_out)
    step = max(1, int(latents * (1 - OVERLAP)))
    stride, keep = step * tile // latents, step * tile_out // latents
    blend = tile_out - keep
    tops, lefts = range(0, height, stride), range(0, width, stride)
    pieces = {(i, j): x[:, i : i + tile, j : j + tile] for i in tops for j in lefts}
    done = _by_shape(network, pieces)
    rows = []
    for i in tops:
        row = []
        for j in lefts:
            if i:
                done[i, j] = _blend(done[i - stride, j], done[i, j], blend, axis=1)
            if j:
                done[i, j] = _blend(done[i, j - stride], done[i, j], blend, axis=2)
            row.append(done[i, j][:, :keep, :keep])
        rows.append(jnp.concatenate(row, axis=2))
    return jnp.concatenate(rows, axis=1)


def _by_shape(network: Network, pieces: dict[tuple[int, int], Array]) -> dict:
    """Apply the network to all tiles, grouped by shape: tiles at the edges are smaller."""
    done = {}
    for shape in dict.fromkeys(piece.shape for piece in pieces.values()):
        places = [place for place, piece in pieces.items() if piece.shape == shape]
        stack = jnp.concatenate([pieces[place] for place in places])
        results = jnp.split(one_by_one(network, stack), len(places))
        done |= dict(zip(places, results, strict=True))
    return done


def _blend(before: Array, tile: Array, extent: int, axis: int) -> Array:
    """Blend the last `extent` rows or columns of `before` into the first ones of `tile`."""
    extent = min(extent, before.shape[axis], tile.shape[axis])
    ramp = jnp.arange(extent) / extent
    ramp = ramp[:, None, None] if axis == 1 else ramp[:, None]
    size = before.shape[axis]
    end = jax.lax.slice_in_dim(before, size - extent, size, axis=axis)
    start = jax.lax.slice_in_dim(tile, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(tile, extent, tile.shape[axis], axis=axis)
    return jnp.concatenate([end * (1 - ramp) + start * ramp, rest], axis=axis)
