"""`jaxdiff evaluate`: score a trained model."""

import dataclasses
from typing import Annotated

import tyro

from jaxdiff.cli.parsing import parse
from jaxdiff.distributed.distributed_init import Hosts, joined
from jaxdiff.evaluation.evaluate import evaluate_folder
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Score a trained model; print the scores and save them in its folder."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run or of an exported model, or `shipped:NAME`."""
    samples: int = 500
    """Prompts of each kind."""
    batch_size: int | None = None
    """Images generated at a time; chosen for the device by default."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale; 1 is unguided; the model's own by default."""
    best_of: int = 1
    """Images generated for each prompt; the one that CLIP ranks closest to it is scored."""
    clip_scale: float = 0.0
    """Strength of CLIP guidance; 0 is without."""
    clip_model: str = ClipGuidance.model
    """CLIP for --best-of and --clip-scale: a folder (a run, exported, or of transformers),
    `shipped:NAME` or OWNER/NAME."""
    hosts: Hosts = dataclasses.field(default_factory=Hosts)


def evaluate_command(arguments: list[str]) -> None:
    """Run `jaxdiff evaluate RUN [--samples N] ...`."""
    options = parse(EvaluateOptions, arguments, prog="jaxdiff evaluate")
    how = {name: value for name, value in vars(options).items() if name not in ("run", "hosts")}
    with joined(options.hosts):
        evaluate_folder(options.run, **how)
