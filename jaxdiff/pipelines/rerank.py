"""Sample several images per prompt and select the one with the highest CLIP score."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, UInt8, UInt32

from jaxdiff.config.checked import check_value
from jaxdiff.config.fields import Count
from jaxdiff.pipelines.auxiliary_models import clip_scores
from jaxdiff.pipelines.inputs import Integer, Mix, Prompt, one_each, prompt_list, seed_array
from jaxdiff.pipelines.pipeline import Pipeline

DEFAULT_CLIP = "shipped:produce_clip"


class Ranked(NamedTuple):
    """The best image of each prompt.

    Attributes:
      images: one per prompt.
      seeds: that reproduce them.
      scores: cosine similarities of all candidates, k per prompt.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    seeds: UInt32[np.ndarray, " n"]
    scores: Float32[np.ndarray, "n k"]


class Ranking(NamedTuple):
    """The indices of the best candidates, and the scores of all."""

    best: Int[np.ndarray, " n"]
    scores: Float32[np.ndarray, "n k"]


def rank(
    images: UInt8[np.ndarray, "m h w 3"],
    prompts: Sequence[Prompt],
    n: int,
    clip: str = DEFAULT_CLIP,
) -> Ranking:
    """Score groups of n consecutive candidates.

    Args:
      images: the candidates.
      prompts: one per candidate.
      n: candidates per group.
      clip: the model, as `ClipGuidance.model`.

    Raises:
      UserError: the model is no CLIP.
    """
    texts = [prompt.a if isinstance(prompt, Mix) else prompt for prompt in prompts]
    scores = clip_scores(clip, images, texts).reshape(-1, n)
    return Ranking(np.arange(0, len(images), n) + scores.argmax(1), scores)


def best_of_n(
    pipe: Pipeline,
    prompts: Prompt | Sequence[Prompt],
    n: int = 4,
    *,
    clip: str = DEFAULT_CLIP,
    seeds: Integer | Iterable[Integer] | None = None,
    **arguments: Any,
) -> Ranked:
    """Sample n images per prompt and return the best of each.

    Args:
      pipe: to sample with.
      prompts: one, or a list.
      n: images per prompt.
      clip: the model that scores them, as `ClipGuidance.model`.
      seeds: of the first image of each prompt, one for all or one each; the others count up. By
        default all are different.
      arguments: of `pipe`, one for all; not `output`.

    Raises:
      UserError: n is less than 1, or as `pipe` raises.
    """
    n = check_value("n", n, Count)
    prompts = prompt_list(prompts)
    count = len(prompts)
    first = one_each("seeds", range(0, count * n, n) if seeds is None else seeds, count)
    tried = seed_array([seed + i for seed in first for i in range(n)])
    repeated = [prompt for prompt in prompts for _ in range(n)]
    images = pipe(repeated, seeds=tried.tolist(), **arguments)
    best, scores = rank(images, repeated, n, clip)
    return Ranked(images[best], tried[best], scores)
