"""Denoisers that remember the steps before: what guidance with momentum is made of.

Solvers see (x_t, t) -> x0. The sampling loop carries the memory from step to step, and of the
evaluations of one step all know the memory from before it, and the first leaves the next.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxdiff.diffusion.process import Images
from jaxdiff.sampling.solvers_ode import Denoise, Memory, Scalar


@dataclass(frozen=True, kw_only=True)
class Remembering:
    """A denoiser with a memory.

    Attributes:
      init: what there is to remember before the first step.
      estimate: (x_t, t, memory) -> (x0, memory).
    """

    init: Callable[[Images], Memory]
    estimate: Callable[[Images, Scalar, Memory], tuple[Images, Memory]]


AnyDenoise = Denoise | Remembering


def remembering(denoise: AnyDenoise) -> Remembering:
    """The denoiser itself, or one that has nothing to remember."""
    if isinstance(denoise, Remembering):
        return denoise
    return Remembering(init=lambda x: (), estimate=lambda x, t, memory: (denoise(x, t), memory))


def then(denoise: AnyDenoise, change: Callable[[Images, Scalar], Images]) -> AnyDenoise:
    """A denoiser whose estimates x0 are changed, (x0, t) -> x0."""
    if not isinstance(denoise, Remembering):
        return lambda x, t: change(denoise(x, t), t)

    def estimate(x: Images, t: Scalar, memory: Memory) -> tuple[Images, Memory]:
        x0, memory = denoise.estimate(x, t, memory)
        return change(x0, t), memory

    return Remembering(init=denoise.init, estimate=estimate)


class OneStep:
    """A denoiser as a solver sees it in one step.

    `memory` is that of before the step until the solver's first evaluation, which solvers make
    outside of any branch, and then what that leaves.
    """

    def __init__(self, denoise: Remembering, memory: Memory):
        self.memory = memory
        self._denoise, self._before, self._is_first = denoise, memory, True

    def __call__(self, x: Images, t: Scalar) -> Images:
        """The estimate of x0."""
        x0, memory = self._denoise.estimate(x, t, self._before)
        if self._is_first:
            self.memory, self._is_first = memory, False
        return x0
