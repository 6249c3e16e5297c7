"""Model FLOPs, counted analytically: matrix products and convolutions only.

  linear layer   2 n d_in d_out                for n tokens
  attention      4 n m d                       n queries, m keys, width d: q k^T and the sum over v
  convolution    2 k^2 c_in c_out h_out w_out  a kernel of k x k, its padding included

A multiplication and its addition count as two. These are model FLOPs (Chowdhery et al. 2022,
appendix B): a causal mask saves nothing, rematerialization adds nothing, and norms, nonlinearities
and embeddings do not count. A backward pass costs two forward passes. XLA's `cost_analysis` cannot
replace them: it counts the body of a scan once.
"""


def linear_flops(tokens: int, inputs: int, outputs: int) -> float:
    """FLOPs of a linear layer."""
    return 2.0 * tokens * inputs * outputs


def attention_flops(queries: int, keys: int, width: int) -> float:
    """FLOPs of attention without its projections; `width` is that of all heads together."""
    return 4.0 * queries * keys * width


def conv_flops(side: int, inputs: int, outputs: int, area: int) -> float:
    """FLOPs of a convolution with a `side` x `side` kernel; `area` is its output's, in pixels."""
    return 2.0 * side**2 * inputs * outputs * area


def residual_block_flops(inputs: int, outputs: int, area: int) -> float:
    """FLOPs of two 3x3 convolutions and, where the width changes, a 1x1 shortcut."""
    shortcut = 0.0 if inputs == outputs else conv_flops(1, inputs, outputs, area)
    return conv_flops(3, inputs, outputs, area) + conv_flops(3, outputs, outputs, area) + shortcut
