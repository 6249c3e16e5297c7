"""Random keys of the rows of a batch, which do not depend on the micro-batch that a row is in."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowKeys:
    """A key for each row of a batch, or of a micro-batch: row i of the batch has fold_in(key, i).

    What is sampled from them is the same in one batch and in micro-batches. Samples from `key`
    itself must have one value, or one for each of the `count` rows of the whole batch, from which
    `rows` selects.

    Attributes:
      key: of the whole batch.
      rows: indices in the whole batch.
      count: rows of the whole batch.
    """

    key: Key[Array, ""]
    rows: Int[Array, " b"]
    count: int = field(metadata={"static": True})

    @classmethod
    def whole(cls, key: Key[Array, ""], count: int) -> "RowKeys":
        """Return the keys of all rows of a batch."""
        return cls(key, jnp.arange(count), count)

    def split(self) -> tuple["RowKeys", "RowKeys"]:
        """Split each key into two independent ones."""
        first, second = jax.random.split(self.key)
        return RowKeys(first, self.rows, self.count), RowKeys(second, self.rows, self.count)

    def by_row(self) -> Key[Array, " b"]:
        """Return the keys."""
        return jax.vmap(jax.random.fold_in, (None, 0))(self.key, self.rows)

    def normal(self, *shape: int) -> Float[Array, "b ..."]:
        """Sample standard normals of this shape for each row, float32."""
        return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(self.by_row())
