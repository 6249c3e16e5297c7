"""The mathematics of diffusion: x_t = alpha(t) x0 + sigma(t) eps, t in [0, 1]; 0 is data, 1 noise.

Depends on jax only: no networks, files or training state.
"""
