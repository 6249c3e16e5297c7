"""Floating-point operations of the models, counted on paper, and what devices can do at most.

Only matrix products and convolutions count, a multiplication with its addition as two:

  linear layer   2 n d_in d_out                for n tokens
  attention      4 n m d                       n queries, m keys, width d: q k^T and the sum over v
  convolution    2 k^2 c_in c_out h_out w_out  a kernel of k x k, its padding included

These are model FLOPs (Chowdhery et al. 2022, appendix B): what the mathematics needs, whatever the
program does. A causal mask saves nothing, rematerialization adds nothing, and what is linear in the
activations (norms, nonlinearities, embeddings) is left out. XLA's `cost_analysis` cannot stand in
for them: it counts the body of a scan once, however many blocks run through it.

All figures are for one image or one prompt; multiply by the batch.
"""

import functools
import time

import jax
import jax.numpy as jnp

from jaxdiff.distributed.chips import Device, find_chip
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.denoisers.unet_small import UNetConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig, ClipVisionConfig


def three_passes(forward: float) -> float:
    """Of a training step: three times the forward pass.

    The backward pass has two products for each of the forward pass, one for the gradient of the
    activations and one for that of the weights. A frozen model costs its forward pass alone.
    """
    return 3 * forward


def _linear(tokens: int, inputs: int, outputs: int) -> float:
    return 2.0 * tokens * inputs * outputs


def _attention(queries: int, keys: int, width: int) -> float:
    return 4.0 * queries * keys * width


def _conv(side: int, inputs: int, outputs: int, area: int) -> float:
    """`area` is that of the output, in pixels."""
    return 2.0 * side**2 * inputs * outputs * area


def dit_flops(config: DiTConfig, *, height: int, width: int, text_length: int) -> float:
    """Of one evaluation of a DiT.

    Args:
      config: of the DiT.
      height: of the image or the latents, in pixels of that.
      width: likewise.
      text_length: tokens of the prompt, padding included.
    """
    d, hidden = config.width, config.hidden
    patch = config.patch_size**2 * config.channels
    n = height // config.patch_size * (width // config.patch_size)
    joint = config.text == "joint"
    length = n + text_length if joint else n

    block = _linear(1, d, 6 * d)  # modulation
    block += _linear(length, d, 4 * d) + _attention(length, length, d)
    block += _linear(length, d, 3 * hidden)  # SwiGLU
    if not joint:  # q and out on the image, k and v on the text
        block += _linear(n, d, 2 * d) + _linear(text_length, config.text_width, 2 * d)
        block += _attention(n, text_length, d)

    if config.bottleneck is None:
        ends = _linear(n, patch, d)
    else:
        ends = _linear(n, patch, config.bottleneck) + _linear(n, config.bottleneck, d)
    ends += _linear(1, d, 2 * d) + _linear(
        1, config.pooled_width + config.text_width, d
    )  # time, text
    ends += _linear(1, d, 2 * d) + _linear(n, d, patch)  # final modulation and layer
    if joint:
        ends += _linear(text_length, config.text_width, d)
    return config.depth * block + ends


def unet_flops(config: UNetConfig, *, height: int, width: int, text_length: int) -> float:
    """Of one evaluation of a U-Net.

    Args:
      config: of the U-Net.
      height: of the image or the latents, in pixels of that.
      width: likewise.
      text_length: tokens of the prompt, padding included.
    """
    widths, levels, cond = config.widths, len(config.widths), 4 * config.widths[0]
    areas = [height * width // config.patch_size**2 // 4**i for i in range(levels)]
    patch = config.patch_size**2 * config.channels

    def block(inputs: int, level: int) -> float:
        modulation = _linear(1, cond, 2 * widths[level])
        return _residual_block(inputs, widths[level], areas[level]) + modulation

    def attention(level: int) -> float:
        if not config.attention[level]:
            return 0.0
        area, d = areas[level], widths[level]
        projections = _linear(area, d, 4 * d) + _linear(text_length, d, 2 * d)
        words = _linear(text_length, config.text_width, d)
        return projections + words + _attention(area, area + text_length, d)

    total = 2 * _linear(1, cond, cond) + _linear(1, config.pooled_width + config.text_width, cond)
    total += 2 * _linear(areas[0], patch, widths[0]) + _linear(areas[0], widths[0], widths[0])
    skips = [widths[0]]
    for i, d in enumerate(widths):
        inputs = [widths[max(i - 1, 0)]] + [d] * (config.blocks - 1)
        total += sum(block(n, i) for n in inputs) + attention(i)
        skips += [d] * config.blocks
        if i + 1 < levels:
            total += _conv(3, d, d, areas[i + 1])
    total += block(widths[-1], levels - 1) + attention(levels - 1)
    for i in reversed(range(levels)):
        before = widths[min(i + 1, levels - 1)]
        for j in range(config.blocks + (i == 0)):
            total += block((widths[i] if j else before) + skips.pop(), i)
        total += attention(i) + (_conv(3, widths[i], widths[i], areas[i - 1]) if i else 0.0)
    return total


def unet2d_condition_flops(
    config: UNet2DConditionConfig, *, height: int, width: int, text_length: int
) -> float:
    """Of one evaluation of Stable Diffusion's U-Net.

    Args:
      config: of the U-Net.
      height: of the latents, which halves at each level without a rest.
      width: likewise.
      text_length: tokens of the prompt, padding included.
    """
    widths, time = config.block_out_channels, config.time_width
    last = len(widths) - 1
    areas = [height * width // 4**i for i in range(len(widths))]

    def block(inputs: int, level: int) -> float:
        return _residual_block(inputs, widths[level], areas[level]) + _linear(
            1, time, widths[level]
        )

    def transformer(level: int, depth: int) -> float:
        if depth == 0:
            return 0.0
        area, d = areas[level], widths[level]
        attention = _linear(area, d, 4 * d) + _attention(area, area, d)
        cross = _linear(area, d, 2 * d) + _linear(text_length, config.cross_attention_dim, 2 * d)
        cross += _attention(area, text_length, d)
        mlp = _linear(area, d, 8 * d) + _linear(area, 4 * d, d)
        return _linear(area, d, 2 * d) + depth * (attention + cross + mlp)

    total = _linear(1, widths[0], time) + _linear(1, time, time)
    if config.added_width is not None:
        total += _linear(1, config.added_width, time) + _linear(1, time, time)
    total += _conv(3, config.in_channels, widths[0], areas[0])
    total += _conv(3, widths[0], config.out_channels, areas[0])
    skips, before = [widths[0]], widths[0]
    for i, d in enumerate(widths):
        for _ in range(config.layers_per_block):
            total += block(before, i) + transformer(i, config.transformer_layers[i])
            skips.append(before := d)
        if i < last:
            total += _conv(3, d, d, areas[i + 1])
            skips.append(d)
    total += 2 * block(before, last) + transformer(last, config.middle_transformer_layers)
    for i, d in reversed(list(enumerate(widths))):
        for _ in range(config.layers_per_block + 1):
            total += block(before + skips.pop(), i) + transformer(i, config.transformer_layers[i])
            before = d
        total += _conv(3, d, d, areas[i - 1]) if i else 0.0
    return total


def _clip_tower(config: ClipTextConfig | ClipVisionConfig, tokens: int) -> float:
    """Blocks, and the projection of the one pooled token."""
    d, hidden = config.width, round(config.width * config.mlp_ratio)
    block = _linear(tokens, d, 4 * d) + _attention(tokens, tokens, d)
    block += _linear(tokens, d, 2 * hidden)
    return config.depth * block + _linear(1, d, config.projection_dim or 0)


def clip_text_flops(config: ClipTextConfig) -> float:
    """Of encoding one prompt of `config.length` tokens, padding included."""
    return _clip_tower(config, config.length)


def clip_vision_flops(config: ClipVisionConfig) -> float:
    """Of encoding one image of `config.image_size`."""
    patches = (config.image_size // config.patch_size) ** 2
    embedding = _conv(config.patch_size, 3, config.width, patches)
    return embedding + _clip_tower(config, patches + 1)


def _residual_block(inputs: int, outputs: int, area: int) -> float:
    shortcut = 0.0 if inputs == outputs else _conv(1, inputs, outputs, area)
    return _conv(3, inputs, outputs, area) + _conv(3, outputs, outputs, area) + shortcut


def _middle(config: AutoencoderConfig, area: int) -> float:
    width = config.block_out_channels[-1]
    total = 2 * _residual_block(width, width, area)
    if config.mid_block_add_attention:
        total += _linear(area, width, 4 * width) + _attention(area, area, width)
    return total


def encode_flops(config: AutoencoderConfig, *, height: int, width: int) -> float:
    """Of encoding one image of this size, in pixels, to the moments of z."""
    widths, moments = config.block_out_channels, 2 * config.latent_channels
    area = height * width // config.patch_size**2
    total = _conv(3, config.patch_channels, widths[0], area)
    for i, outputs in enumerate(widths):
        total += _residual_block(widths[max(i - 1, 0)], outputs, area)
        total += (config.layers_per_block - 1) * _residual_block(outputs, outputs, area)
        if i + 1 < len(widths):
            area //= 4
            total += _conv(3, outputs, outputs, area)
    total += _middle(config, area) + _conv(3, widths[-1], moments, area)
    return total + (_conv(1, moments, moments, area) if config.use_quant_conv else 0.0)


def tiny_encode_flops(config: TinyAutoencoderConfig, *, height: int, width: int) -> float:
    """Of encoding one image of this size, in pixels, by a tiny autoencoder."""
    channels, area, total = config.width, height * width, 0.0
    for i, count in enumerate(config.encoder_blocks):
        area = area // 4 if i else area
        total += _conv(3, channels if i else config.image_channels, channels, area)
        total += 3 * count * _conv(3, channels, channels, area)
    return total + _conv(3, channels, config.latent_channels, area)


def decode_flops(config: AutoencoderConfig, *, height: int, width: int) -> float:
    """Of decoding z to one image of this size, in pixels."""
    widths, z = config.block_out_channels[::-1], config.latent_channels
    area = height * width // config.downsampling**2
    total = _conv(1, z, z, area) if config.use_post_quant_conv else 0.0
    total += _conv(3, z, widths[0], area) + _middle(config, area)
    for i, outputs in enumerate(widths):
        total += _residual_block(widths[max(i - 1, 0)], outputs, area)
        total += config.layers_per_block * _residual_block(outputs, outputs, area)
        if i + 1 < len(widths):
            area *= 4
            total += _conv(3, outputs, outputs, area)
    return total + _conv(3, widths[-1], config.patch_channels, area)


def peak_flops(device: Device) -> float | None:
    """The most FLOP/s that one device can do, to divide by for model FLOP utilisation.

    For accelerators the data sheet's dense bf16 figure; None for one that is not in the table
    (`jaxdiff.distributed.chips`). A CPU has no such figure: for it the best of three float32
    products of 2048 x 2048 matrices is measured at the first call in a process (about a second),
    and shared out among its devices. What else runs on the machine at that time lowers it.
    """
    if device.platform == "cpu":
        return _measured_cpu_flops() / jax.local_device_count("cpu")
    chip = find_chip(device.device_kind)
    return chip.flops if chip else None


@functools.cache
def _measured_cpu_flops() -> float:
    size = 2048
    product = jax.jit(jnp.dot)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = jnp.ones((size, size), jnp.float32)
        product(x, x).block_until_ready()  # compiles

        def seconds() -> float:
            start = time.perf_counter()
            product(x, x).block_until_ready()
            return time.perf_counter() - start

        return _linear(size, size, size) / min(seconds() for _ in range(3))
