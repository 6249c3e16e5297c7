"""Kinds of adapters as arithmetic: W + D in PyTorch's layout, by independent formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.pretrained.lora_kinds import Adapter, to_theirs
from jaxdiff.pretrained.lora_layers import Layer
from jaxdiff.pretrained.lora_scale import read_peft_config

OUT, IN, RANK = 12, 6, 2
SHAPES = {"linear": (), "1x1": (1, 1), "3x3": (3, 3)}


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def number(value):
    return np.array(value, np.float32)


def layer(window, **shapes):
    return Layer("unet.x", "denoiser", ("x",), {"kernel": (*window, IN, OUT), **shapes}, None, None)


def delta(tensors, window=(), weight=None, scale=1.0, config=None, name="kernel", **shapes):
    """The change of a parameter in PyTorch's layout."""
    effect = Adapter("style", layer(window, **shapes), "x", tensors, config).read()
    if name == "kernel" and effect.pair is not None:
        return scale * to_theirs(np.asarray(effect.pair.product))
    shape = {"kernel": (OUT, IN, *window), "bias": (OUT,)}[name]
    weight = np.zeros(shape, np.float32) if weight is None else weight
    return effect.changes[name](weight, scale) - weight


def lora(window=(), rank=RANK):
    ones = (1,) * len(window)
    return {"down": normal(rank, IN, *window), "up": normal(OUT, rank, *ones)}


def product(pair):
    return np.einsum("or,ri...->oi...", pair["up"].reshape(OUT, -1), pair["down"])


@pytest.mark.parametrize("window", SHAPES.values(), ids=SHAPES)
def test_lora_is_b_a(window):
    pair = lora(window)
    np.testing.assert_allclose(delta(pair, window), product(pair), rtol=1e-5, atol=1e-6)


def test_a_linear_layer_may_be_a_convolution_and_vice_versa():
    linear, conv = lora(), lora((1, 1))
    np.testing.assert_allclose(delta(conv), product(conv)[..., 0, 0], rtol=1e-5)
    np.testing.assert_allclose(delta(linear, (1, 1))[..., 0, 0], product(linear), rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, jnp.bfloat16, np.float16])
def test_alpha_is_one_number_of_any_shape(shape, dtype):
    pair = lora()
    found = delta(pair | {"alpha": np.full(shape, 6, dtype)})
    np.testing.assert_allclose(found, 3 * product(pair), rtol=1e-5)
    np.testing.assert_array_equal(delta(pair | {"alpha": np.zeros(shape, dtype)}), 0 * found)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16, jnp.float8_e4m3fn])
def test_numbers_of_all_types_are_read(dtype):
    pair = {role: value.astype(dtype) for role, value in lora().items()}
    whole = {role: value.astype(np.float32) for role, value in pair.items()}
    np.testing.assert_allclose(delta(pair), product(whole), rtol=1e-5)


def test_the_tucker_form_of_locon():
    window = SHAPES["3x3"]
    mid = normal(3, RANK, *window)
    there = {"down": normal(RANK, IN, 1, 1), "mid": mid, "up": normal(OUT, 3, 1, 1)}
    expected = np.zeros((OUT, IN, 3, 3), np.float32)
    for i in range(3):
        for j in range(3):
            expected[..., i, j] = there["up"][..., 0, 0] @ mid[..., i, j] @ there["down"][..., 0, 0]
    np.testing.assert_allclose(delta(there, window), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", SHAPES.values(), ids=SHAPES)
def test_loha_is_a_product_of_two_products(window):
    width = IN * int(np.prod(window))
    w = {
        "hada_w1_a": normal(OUT, RANK),
        "hada_w1_b": normal(RANK, width),
        "hada_w2_a": -normal(OUT, RANK),
        "hada_w2_b": normal(RANK, width) + 1,
        "alpha": number(4),
    }
    expected = 2 * (w["hada_w1_a"] @ w["hada_w1_b"]) * (w["hada_w2_a"] @ w["hada_w2_b"])
    np.testing.assert_allclose(
        delta(w, window).reshape(OUT, -1), expected.reshape(OUT, -1), rtol=1e-4, atol=1e-5
    )


def test_loha_in_the_tucker_form():
    w, window = {}, SHAPES["3x3"]
    for i in (1, 2):
        w |= {f"hada_t{i}": normal(RANK, RANK, 3, 3) + i, f"hada_w{i}_a": normal(RANK, OUT)}
        w[f"hada_w{i}_b"] = normal(RANK, IN) - i
    sides = []
    for i in (1, 2):
        side = np.zeros((OUT, IN, 3, 3))
        for p in range(RANK):
            for q in range(RANK):
                outer = np.outer(w[f"hada_w{i}_a"][p], w[f"hada_w{i}_b"][q])
                side += outer[..., None, None] * w[f"hada_t{i}"][p, q]
        sides.append(side)
    np.testing.assert_allclose(delta(w, window), sides[0] * sides[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("whole", ["both", "first", "second", "neither"])
def test_lokr_is_a_kronecker_product(window, whole):
    size = int(np.prod(window))
    first, second = normal(3, 2), normal(4, 3, *window)
    w, scale = {"alpha": number(6)}, 6 / RANK
    if whole in ("both", "first"):
        w["lokr_w1"] = first
    else:
        w |= {"lokr_w1_a": normal(3, RANK), "lokr_w1_b": normal(RANK, 2)}
        first = w["lokr_w1_a"] @ w["lokr_w1_b"]
    if whole in ("both", "second"):
        w["lokr_w2"] = second
    else:
        w |= {"lokr_w2_a": normal(4, RANK), "lokr_w2_b": normal(RANK, 3 * size)}
        second = (w["lokr_w2_a"] @ w["lokr_w2_b"]).reshape(4, 3, *window)
    scale = 1 if whole == "both" else scale
    found = delta(w, window).reshape(OUT, IN, size)
    for i in range(size):
        expected = scale * np.kron(first, second.reshape(4, 3, size)[..., i])
        np.testing.assert_allclose(found[..., i], expected, rtol=1e-4, atol=1e-5)


def test_lokr_in_the_tucker_form():
    core, a, b = normal(RANK, RANK, 3, 3), normal(RANK, 4), normal(RANK, 3)
    w = {"lokr_w1": normal(3, 2), "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
    found = delta(w, SHAPES["3x3"])
    for i in range(3):
        for j in range(3):
            expected = np.kron(w["lokr_w1"], a.T @ core[..., i, j] @ b)
            np.testing.assert_allclose(found[..., i, j], expected, rtol=1e-4, atol=1e-5)


def test_differences_and_biases_are_added():
    there = {"diff": normal(OUT, IN), "diff_b": normal(OUT)}
    np.testing.assert_allclose(delta(there, scale=0.5, bias=(OUT,)), there["diff"] / 2)
    found = delta(there, scale=0.5, name="bias", bias=(OUT,))
    np.testing.assert_allclose(found, there["diff_b"] / 2)
    norm = Layer("unet.x", "denoiser", ("x",), {"scale": (OUT,), "bias": (OUT,)}, None, None)
    effect = Adapter("style", norm, "x", {"diff": normal(OUT)}, None).read()
    np.testing.assert_allclose(effect.changes["scale"](np.ones(OUT), 2.0), 1 + 2 * normal(OUT))


def test_the_bias_of_peft_has_its_scale():
    config = read_peft_config("config", {"r": RANK, "lora_alpha": 3 * RANK, "lora_bias": True})
    there = lora() | {"up_bias": normal(OUT)}
    found = delta(there, name="bias", config=config, bias=(OUT,))
    np.testing.assert_allclose(found, 3 * there["up_bias"], rtol=1e-6)


@pytest.mark.parametrize("window", [(), (3, 3)], ids=["linear", "3x3"])
@pytest.mark.parametrize("kind", ["PEFT", "outputs", "inputs"])
def test_dora_sets_the_norms(window, kind):
    ones = (1,) * len(window)
    size = IN if kind == "inputs" else OUT
    magnitude = np.abs(normal(size)) + 1
    shapes = {
        "PEFT": (1, OUT, *ones) if window else (OUT,),
        "outputs": (OUT, 1, *ones),
        "inputs": (1, IN, *ones),
    }
    role = "magnitude" if kind == "PEFT" else "dora_scale"
    there = lora(window) | {role: magnitude.reshape(shapes[kind]), "alpha": number(RANK)}
    weight = normal(OUT, IN, *window)
    new = weight + delta(there, window, weight)
    axes = tuple(x for x in range(new.ndim) if x != (kind == "inputs"))
    np.testing.assert_allclose(np.sqrt(np.square(new).sum(axes)), magnitude, rtol=1e-4)
    direction = weight + product(lora(window))
    cosine = (new * direction).sum(axes) / np.sqrt((direction**2).sum(axes)) / magnitude
    np.testing.assert_allclose(cosine, 1, rtol=1e-4)


def test_the_scale_of_dora_is_that_of_its_library():
    weight, magnitude = normal(OUT, IN), np.ones(OUT, np.float32)
    there = lora()
    half = weight + delta(there | {"magnitude": magnitude}, weight=weight, scale=0.5)
    direction = weight + product(there) / 2
    expected = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(half, expected, rtol=1e-4, atol=1e-6)
    lycoris = there | {"dora_scale": magnitude[:, None]}
    full = delta(lycoris, weight=weight)
    np.testing.assert_allclose(delta(lycoris, weight=weight, scale=0.5), full / 2, atol=1e-6)


def without(role):
    return {name: value for name, value in lora().items() if name != role}


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (without("up"), r"half a pair for x \(no up\)"),
        (without("down"), r"half a pair for x \(no down\)"),
        ({"alpha": number(1)}, "alpha without its adapter"),
        (lora(rank=0), "expected a rank of at least 1"),
        (lora() | {"down": normal(RANK, IN + 1)}, r"down .* is \(2, 7\), expected \(2, 6\)"),
        (lora() | {"down": normal(IN, RANK)}, "load the model that it was trained on"),
        (lora() | {"up": normal(OUT, RANK + 1)}, r"up .* is \(12, 3\), expected \(12, 2\)"),
        (lora() | {"up": normal(OUT, RANK) * np.nan}, "a NaN or an infinity in up"),
        (lora() | {"down": np.full((RANK, IN), 1e300)}, "a NaN or an infinity in down"),
        (lora() | {"alpha": number(np.inf)}, "a NaN or an infinity in alpha"),
        (lora() | {"alpha": np.ones(2, np.float32)}, r"alpha of shape \(2,\): expected one number"),
        (lora() | {"alpha": number(3e38)}, "too large a number"),
        (lora() | {"up": np.ones((OUT, RANK), np.int8)}, "has up in int8"),
        (lora() | {"lokr_w1": normal(3, 2)}, "has both LoRA and LoKr"),
        (lora() | {"diff": normal(OUT, IN)}, "has both LoRA and diff"),
        (lora() | {"diff_b": normal(OUT)}, "has diff_b: expected no bias"),
        ({"dora_scale": normal(OUT, 1)}, "a magnitude alone"),
        ({"hada_w1_a": normal(OUT, RANK)}, "half a pair"),
        (lora() | {"dora_scale": number(1)}, r"dora_scale .* is \(\), expected \(12, 1\)"),
        ({"lokr_w1": normal(5, 2), "lokr_w2": normal(4, 3)}, "divisors of its size"),
        ({"lokr_w1": normal(3, 2), "lokr_w2": normal(4, 4)}, r"is \(4, 4\), expected \(4, 3\)"),
        ({"diff": normal(OUT, IN), "alpha": number(1)}, "alpha without its adapter"),
    ],
)
def test_what_does_not_fit_is_refused(there, message):
    with pytest.raises(UserError, match=message):
        Adapter("style", layer(()), "x", there, None).read()


@pytest.mark.parametrize(
    ("config", "there", "message"),
    [
        ({"use_dora": True}, {}, "has no magnitude, other than config states"),
        ({}, {"magnitude": np.ones(OUT, np.float32)}, "has a magnitude, other than"),
        ({"lora_bias": True}, {}, "has no up_bias"),
        ({"lora_alpha": 2}, {"alpha": number(3)}, "has a scale of 1.5: expected 1 by config"),
    ],
)
def test_a_config_must_agree_with_the_tensors(config, there, message):
    config = read_peft_config("config", {"r": RANK, **config})
    with pytest.raises(UserError, match=message):
        Adapter("style", layer(()), "x", lora() | there, config).read()


def test_a_config_of_lora_is_not_one_of_lokr():
    config = read_peft_config("config", {})
    there = {"lokr_w1": normal(3, 2), "lokr_w2": normal(4, 3)}
    with pytest.raises(UserError, match="has no LoRA, which config states"):
        Adapter("style", layer(()), "x", there, config).read()
