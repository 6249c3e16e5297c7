"""All solvers, and their names on the command line and in prompt files."""

from jaxdiff.sampling.solver import Solver
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
"""The solvers by name."""

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
    | Solver
)
"""The solvers of this package, or any that follows the protocol."""
