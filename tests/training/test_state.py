"""The fingerprint differs for states that differ in any bit that a run must reproduce."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.training.state import TrainState, fingerprint, no_skips


def make_state() -> TrainState:
    params = {"kernel": jnp.arange(6.0).reshape(2, 3), "scale": jnp.ones((3,), jnp.bfloat16)}
    return TrainState(
        step=jnp.asarray(5, jnp.int32),
        key=jax.random.key(1),
        params=params,
        ema=jax.tree.map(lambda x: x / 2, params),
        opt_state={"mu": jnp.ones((2, 3)), "count": jnp.asarray(5, jnp.int32)},
        task_state={"level": jnp.asarray(1, jnp.int32)},
        nonfinite=no_skips(),
    )


def flip_bit(x: jax.Array, bit: int) -> jax.Array:
    data = bytearray(np.asarray(x).tobytes())
    data[bit // 8] ^= 1 << bit % 8
    return jnp.asarray(np.frombuffer(bytes(data), x.dtype).reshape(x.shape))


@pytest.mark.parametrize("field", ["step", "params", "ema", "opt_state"])
def test_any_bit_of_any_array_changes_it(field):
    state = make_state()
    seen = {fingerprint(state)}
    leaves, structure = jax.tree.flatten(getattr(state, field))
    changes = 0
    for i, leaf in enumerate(leaves):
        for bit in (0, leaf.nbytes * 8 - 1):  # also the sign of a zero
            changed = [*leaves[:i], flip_bit(leaf, bit), *leaves[i + 1 :]]
            seen.add(fingerprint(state.replace(**{field: jax.tree.unflatten(structure, changed)})))
            changes += 1
    assert len(seen) == changes + 1


def test_type_shape_and_place_change_it():
    state = make_state()
    zeros = jnp.zeros((2, 3), jnp.float32)
    variants = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.reshape(3, 2)},
        {"a": zeros.astype(jnp.int32)},
    ]
    assert len({fingerprint(state.replace(params=params)) for params in variants}) == 4


def test_random_keys_and_counts_do_not_change_it():
    state = make_state()
    other = state.replace(
        key=jax.random.key(2),
        task_state={},
        nonfinite={"in_a_row": jnp.asarray(1, jnp.int32), "total": jnp.asarray(3, jnp.int32)},
    )
    assert fingerprint(other) == fingerprint(state)


def test_order_of_keys_and_kind_of_array_do_not_change_it():
    state = make_state()
    reordered = {name: np.asarray(state.params[name]) for name in reversed(list(state.params))}
    assert list(reordered) != list(state.params)
    assert fingerprint(state.replace(params=reordered)) == fingerprint(state)
