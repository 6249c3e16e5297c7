"""FLOPs of the products of a compiled program, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.planning.hlo import Program, read_program
from jaxdiff.planning.products import Product, padded_flops


def flops_of(program: Program, side: int = 1) -> float:
    total = 0.0
    for name, times in program.runs().items():
        types = {i.name: i.result for i in program.computations[name]}
        for instruction in program.computations[name]:
            total += times * padded_flops(program, instruction, types, side)
    return total


def compiled(function, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_program(jax.jit(function).lower(*shapes).compile().as_text())


def convolution(result: str, lhs: str, rhs: str, attributes: str) -> Program:
    return read_program(
        f"ENTRY %main (a: f32[1]) -> f32[1] {{\n  %a = {lhs} parameter(0)\n"
        f"  %b = {rhs} parameter(1)\n  ROOT %c = {result} convolution(%a, %b), {attributes}\n}}\n"
    )


def test_a_product_in_a_loop_counts_as_often_as_it_runs():
    def step(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert flops_of(compiled(step, (64, 128), (5, 128, 128))) == 5 * 2 * 64 * 128 * 128


def called(result: str, operands: tuple[str, ...], attributes: str) -> Program:
    names = [f"p{i}" for i in range(len(operands))]
    given = "".join(
        f"  %{name} = {type_} parameter({i})\n"
        for i, (name, type_) in enumerate(zip(names, operands, strict=True))
    )
    call = f"custom-call({', '.join('%' + name for name in names)}), {attributes}"
    return read_program(f"ENTRY %main () -> f32[] {{\n{given}  ROOT %c = {result} {call}\n}}\n")


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_products_of_cublas_count(target):
    numbers = (
        '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],'
        '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]'
    )
    config = f'{{"gemm_backend_config":{{"dot_dimension_numbers":{{{numbers}}}}}}}'
    program = called(
        "(bf16[3,8,16]{2,1,0}, s8[4194304]{0})",
        ("bf16[3,32,8]{2,1,0}", "bf16[3,32,16]{2,1,0}"),
        f'custom_call_target="{target}", backend_config={config}',
    )
    assert flops_of(program) == 2 * 3 * 8 * 16 * 32


@pytest.mark.parametrize(
    ("target", "result", "operands"),
    [
        ("__cudnn$convForward", "2,8,8,6", ("2,8,8,4", "6,1,1,4")),
        ("__cudnn$convBackwardInput", "2,8,8,4", ("2,8,8,6", "6,1,1,4")),
        ("__cudnn$convBackwardFilter", "6,1,1,4", ("2,8,8,4", "2,8,8,6")),
    ],
)
def test_convolutions_of_cudnn_count(target, result, operands):
    program = called(
        f"(f32[{result}]{{3,2,1,0}}, u8[0]{{0}})",
        tuple(f"f32[{shape}]{{3,2,1,0}}" for shape in operands),
        f'window={{size=1x1}}, dim_labels=b01f_o01i->b01f, custom_call_target="{target}"',
    )
    assert flops_of(program) == 2 * 2 * 64 * 4 * 6


@pytest.mark.parametrize(("target", "products"), [("Softmax", 2), ("SoftmaxBackward", 5)])
def test_attention_of_cudnn_counts(target, products):
    program = called(
        "(bf16[2,8,16,64]{3,1,2,0}, u8[0]{0})",
        ("bf16[2,128,16,64]{3,2,1,0}", *2 * ("bf16[2,77,16,64]{3,2,1,0}",)),
        f'custom_call_target="__cudnn$fmha{target}"',
    )
    assert flops_of(program) == products * 2 * 2 * 16 * 128 * 77 * 64


def test_remat_counts_a_second_forward_pass():
    def loss(w, x):
        def body(x, w):
            return jnp.sin(x @ w), None

        return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, w)[0].sum()

    once = 5 * 2 * 64 * 128 * 128
    program = compiled(jax.grad(loss, argnums=(0, 1)), (5, 128, 128), (64, 128))
    assert flops_of(program) == 4 * once  # forward, again, and two products backward


def test_a_convolution_counts_the_pixels_that_its_window_meets():
    def step(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    met = (3 * 8 - 2) ** 2  # rows and columns outside of 8 x 8 pixels are zeros
    got = flops_of(compiled(step, (2, 8, 8, 4), (3, 3, 4, 6)))
    assert got == pytest.approx(2 * 2 * met * 4 * 6, rel=0.02)


def test_batches_that_a_tpu_writes_as_windows_count_once():
    """The product of queries and keys of 8 images and 16 heads, as libtpu prints it."""
    program = convolution(
        "f32[8,16,256,77]{2,3,1,0}",
        "bf16[8,256,16,72]{1,3,2,0}",
        "bf16[8,77,16,72]{1,3,2,0}",
        "window={size=8x16 stride=7x15 lhs_dilate=8x16}, dim_labels=0b1f_0o1i->01bf",
    )
    assert flops_of(program) == 2 * 8 * 16 * 256 * 77 * 72
    # 72 channels fill a tile of 128. Its 77 keys pass by in ten rows of eight.
    assert flops_of(program, 128) == 2 * 8 * 16 * 256 * 80 * 128


def test_a_head_dimension_that_a_tpu_writes_as_a_window_counts_once():
    program = convolution(
        "bf16[4,256,16,64]{1,3,2,0}",
        "bf16[4,256,1024,1]{2,1,0,3}",
        "bf16[16,64,1024,1]{2,1,0,3}",
        "window={size=1x16 pad=0_0x15_15 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
    )
    assert flops_of(program) == 2 * 4 * 256 * 1024 * 1024


def test_the_smaller_padding_of_the_two_operands_counts():
    assert Product(1, 8, 128, 128).padded_flops(128) == 2 * 8 * 128 * 128
    assert Product(1, 128, 8, 128).padded_flops(128) == 2 * 8 * 128 * 128
    assert Product(3, 100, 100, 10).padded_flops(128) == 3 * 2 * 104 * 128 * 128
    assert Product(3, 100, 100, 10).padded_flops(1) == Product(3, 100, 100, 10).flops


@pytest.mark.parametrize("images", [(4,), ()])
@pytest.mark.parametrize(("kernel", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_kernels_of_splash_attention_count_all_pairs(kernel, products, images):
    """Of several images, or of one, whose axis the compiler leaves out."""
    q, k = (",".join(map(str, (*images, 16, n, 128))) for n in (1024, 512))
    program = read_program(
        "ENTRY %main (m: s8[1,2,2]) -> bf16[4] {\n  %m = s8[1,2,2]{2,1,0} parameter(0)\n"
        f"  %q = bf16[{q}] parameter(1)\n  %k = bf16[{k}] parameter(2)\n"
        f"  ROOT %splash_mha_{kernel}_residuals.3 = bf16[{q}] "
        'custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"\n}\n'
    )
    assert flops_of(program) == products * 2 * sum(images or (1,)) * 16 * 1024 * 512 * 128


def test_other_kernels_count_nothing():
    program = read_program(
        "ENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n"
        '  ROOT %k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"\n}\n'
    )
    assert flops_of(program) == 0
