"""The mathematics of diffusion: x_t = alpha(t) x0 + sigma(t) eps, t in [0, 1]; 0 is data, 1 noise.

It imports jax alone: no network, no file, no training state.
"""
