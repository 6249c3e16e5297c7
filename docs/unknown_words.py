"""Print the known words nearest to unknown ones: those of a warning, and in a CLIP's text space.

python docs/unknown_words.py shipped:produce_clip strawbery appel cat
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.data.nearest_words import nearest_words, with_nearest
from jaxdiff.datasets.emoji_names import with_article
from jaxdiff.distributed.replicas import local_mesh
from jaxdiff.models.layers import bind_init, bind_params
from jaxdiff.models.text_encoders.clip import Clip, unit_vectors
from jaxdiff.pipelines.auxiliary_models import load_clip


def main(model: str, words: list[str]) -> None:
    """Print a line for each word; the embeddings are of "a WORD", less their mean."""
    clip = load_clip(model, local_mesh())
    tokenizer = clip.tokenizer
    known = sorted(tokenizer.words)
    unknown = [word for word in words if word not in tokenizer.words]
    views = jnp.zeros((1, clip.config.vision.image_size, clip.config.vision.image_size, 3))
    network = bind_params(bind_init(Clip, clip.config), clip.params)
    embed = jax.jit(lambda ids: network(views, ids).text)
    of = np.asarray(embed(tokenizer([with_article(word) for word in [*known, *unknown]])))
    centred = np.asarray(unit_vectors(jnp.asarray(of - of[: len(known)].mean(0))))
    cosines = centred[len(known) :] @ centred[: len(known)].T
    for word, cosine in zip(unknown, cosines, strict=True):
        nearest = nearest_words(word, tokenizer.words, tokenizer.related or {})
        by_clip = [f"{known[i]} {cosine[i]:.2f}" for i in np.argsort(-cosine)[:3]]
        print(f"{with_nearest({word: nearest})}; by CLIP: {', '.join(by_clip)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
