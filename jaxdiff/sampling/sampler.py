"""How a model is sampled unless a caller says otherwise."""

from dataclasses import dataclass, field

from jaxdiff.diffusion.time_grids import AnyGrid, TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.cfg import DynamicThreshold, Guidance, StaticThreshold
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
from jaxdiff.sampling.solvers_ode import DDIM, PLMS, DPMSolverPP2M, Euler, Heun
from jaxdiff.sampling.solvers_sde import DDPM, LCM, DPMSolverPP2MSDE, DPMSolverPPSDE, EulerAncestral
from jaxdiff.sampling.unipc import UniPC

SOLVERS = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "euler": Euler,
    "euler-a": EulerAncestral,
    "heun": Heun,
    "dpm++2m": DPMSolverPP2M,
    "dpm++2m-sde": DPMSolverPP2MSDE,
    "dpm++sde": DPMSolverPPSDE,
    "unipc": UniPC,
    "plms": PLMS,
    "lcm": LCM,
}
"""The solvers, under the names that a command line or a prompt file takes."""

AnySolver = (
    DDIM
    | DDPM
    | Euler
    | EulerAncestral
    | Heun
    | DPMSolverPP2M
    | DPMSolverPP2MSDE
    | DPMSolverPPSDE
    | UniPC
    | PLMS
    | LCM
)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """A recipe's way of sampling.

    Attributes:
      solver: of the sampling ODE.
      grid: the times that it visits.
      unit_noise: start from noise of variance 1, as diffusers does with Stable Diffusion, rather
        than from the schedule's at the first time, which is a little less.
      num_steps: of the solver.
      guidance_scale: of classifier-free guidance; 1 is the conditional model, unguided.
      threshold: keeps estimates of x0 in range; for pixels, not for latents.
      interval, rescale, apg, zero_star: of `Guidance`.
      seamless: whether images go on at their other side, down and across.
      prompts: of the grids and the strip that a training run draws, one seed each from 0.
    """

    solver: AnySolver = field(default_factory=DPMSolverPP2M)
    grid: AnyGrid = field(default_factory=TimeGrid)
    unit_noise: bool = False
    num_steps: int = 20
    guidance_scale: float = 3.0
    threshold: StaticThreshold | DynamicThreshold | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    apg: APG | None = None
    zero_star: CFGZeroStar | None = None
    seamless: tuple[bool, bool] = (False, False)
    prompts: tuple[str, ...] = ()

    def __post_init__(self):
        check_num_steps(self.num_steps)

    @property
    def guidance(self) -> Guidance:
        """How classifier-free guidance acts."""
        return Guidance(
            interval=self.interval,
            rescale=self.rescale,
            apg=self.apg,
            zero_star=self.zero_star,
        )


def check_num_steps(num_steps: int) -> None:
    """Raises `UserError` for a number of steps that no solver can take."""
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}: a sampler takes at least 1 step.")
