"""t-SNE embeddings, computed by scikit-learn (van der Maaten & Hinton 2008)."""

from importlib.util import find_spec

import numpy as np
from jaxtyping import Float

from jaxdiff.errors import UserError

PERPLEXITY = 30.0
SEED = 0


def check_tsne() -> None:
    """Raise `UserError` if scikit-learn is not installed."""
    if any(find_spec(package) is None for package in ("sklearn", "threadpoolctl")):
        raise UserError(
            "t-SNE needs the package scikit-learn, which is not installed: run "
            "pip install -e '.[explore]' in a clone of jaxdiff."
        )


def tsne(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Embed at least 4 points in two dimensions; the same input gives the same bits.

    The embedding starts from the principal components (Kobak & Berens 2019) and approximates
    distant interactions with a Barnes-Hut tree (van der Maaten 2014). Fewer than 91 points get a
    perplexity of (n - 1) / 3. Points that are all equal get equal coordinates.

    Raises:
      UserError: scikit-learn is not installed.
    """
    check_tsne()
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if not np.ptp(vectors, axis=0).any():  # scikit-learn divides by their standard deviation
        return np.zeros((len(vectors), 2), np.float32)
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", random_state=SEED)
    with threadpool_limits(1):  # sums in one order on any number of cores
        embedding = model.fit_transform(vectors)
    return embedding - embedding.mean(0)
