"""Comparisons with PyTorch and diffusers on the same machine; not part of the package.

Run them from the root of a clone, with the extra `parity`.
"""

try:
    import diffusers  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f"The benchmarks need PyTorch and diffusers ({error}); "
        "run: pip install torch==2.13.0 && pip install -e '.[parity]'"
    ) from None
