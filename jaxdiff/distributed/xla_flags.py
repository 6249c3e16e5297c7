"""Settings of XLA that a recipe is compiled with, by kind of device."""

from dataclasses import dataclass

from jaxdiff.errors import UserError

# While one layer is computed the weights of the next are gathered, and the gradients of the last
# one summed.
OVERLAP_TPU = (
    "xla_tpu_enable_latency_hiding_scheduler=true",
    "xla_enable_async_all_gather=true",
    "xla_tpu_enable_async_collective_fusion=true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "xla_tpu_overlap_compute_collective_tc=true",
)
OVERLAP_GPU = ("xla_gpu_enable_latency_hiding_scheduler=true",)


@dataclass(frozen=True, kw_only=True)
class CompilerConfig:
    """Flags of XLA for the training step, each `name=value`; the defaults overlap collectives.

    Attributes:
      tpu: on TPUs.
      gpu: on GPUs.

    Raises:
      UserError: for a flag of another form.
    """

    tpu: tuple[str, ...] = OVERLAP_TPU
    gpu: tuple[str, ...] = OVERLAP_GPU

    def __post_init__(self):
        for flag in (*self.tpu, *self.gpu):
            name, _, value = flag.partition("=")
            if not name.startswith("xla_") or not value:
                raise UserError(
                    f"compiler: {flag!r} is no flag of XLA: expected xla_NAME=VALUE, no dashes."
                )

    def flags(self, platform: str) -> tuple[str, ...]:
        """Those for a platform as JAX calls it; none on a CPU."""
        return {"tpu": self.tpu, "gpu": self.gpu, "cuda": self.gpu}.get(platform, ())

    def options(self, platform: str) -> dict[str, str]:
        """The same, as `jax.jit` takes its `compiler_options`."""
        pairs = (flag.partition("=") for flag in self.flags(platform))
        return {name: value for name, _, value in pairs}
