import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
from tests.support import contract
from tests.support.contract import array, properties

CASES = {
    "plain": {},
    "strided": {"window_strides": (2, 1), "padding": "VALID"},
    "padded by hand": {"padding": ((2, 0), (1, 3))},
    "dilated kernel": {"rhs_dilation": (2, 2)},
    "dilated input": {"lhs_dilation": (2, 1), "padding": ((1, 2), (1, 1))},
    "NCHW OIHW": {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    "mixed": {"dimension_numbers": ("NCHW", "HWIO", "NHWC")},
    "odd": {"dimension_numbers": ("HNWC", "OHIW", "CWNH")},
    "groups": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4},
    "batch groups": {"batch_group_count": 2},
}


def conv(spec, options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    options.setdefault("dimension_numbers", ("NHWC", "HWIO", "NHWC"))

    def fn(p, x):
        return lax.conv_general_dilated(x, p["kernel"], **options)

    return fn


def shaped(order, sizes):
    return tuple(sizes[axis] for axis in order)


@pytest.mark.parametrize("name", CASES)
def test_contract_of_convolutions(x64, name):
    options = CASES[name]
    x_spec, w_spec, _ = options.get("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    groups = options.get("feature_group_count", 1)
    x = array(*shaped(x_spec, {"N": 2, "H": 5, "W": 6, "C": 4}), seed=1)
    sizes = {"H": 3, "W": 2, "I": 4 // groups, "O": 8}
    params = {"kernel": array(*shaped(w_spec, sizes), seed=2)}
    fn = conv(w_spec, options)
    settings = {"dtype": jnp.float64, "rank": 3}
    adapted = contract.check(fn, params, x, **settings)
    assert adapted["kernel"].layout.out == (w_spec.index("O"),)


@pytest.mark.parametrize("spatial", ["W", "HWD"])
def test_convolutions_in_one_and_three_dimensions(x64, spatial):
    order = f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
    n = len(spatial)
    fn = conv(None, {"dimension_numbers": order, "window_strides": (1,) * n})
    params = {"kernel": array(*range(2, 2 + n), 3, 7)}
    contract.check(fn, params, array(2, *(4,) * n, 3), dtype=jnp.float64)


@properties(
    25,
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    lhs=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    rhs=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    groups=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    order=st.permutations("HWIO"),
)
def test_any_convolution(strides, lhs, rhs, pads, groups, order):
    order = "".join(order)
    options = {
        "window_strides": strides, "lhs_dilation": lhs, "rhs_dilation": rhs,
        "padding": (pads[:2], pads[2:]), "feature_group_count": groups[0],
        "batch_group_count": groups[1], "dimension_numbers": ("NHWC", order, "NHWC"),
    }  # fmt: skip
    with jax.enable_x64(True):
        sizes = {"H": 2, "W": 3, "I": 4 // groups[0], "O": 6}
        params = {"kernel": array(*shaped(order, sizes), seed=1)}
        x = array(2, 5, 6, 4, seed=2)
        fn = conv(order, options)
        adapted = contract.adapt(fn, params, x, dtype=jnp.float64)
        contract.close_to_merged(fn, contract.randomized(adapted), x)


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_under_vmap_are_a_stack(x64, groups):
    def one(kernel, x):
        return conv(None, {"feature_group_count": groups})({"kernel": kernel}, x)

    def fn(p, x):
        return jax.vmap(one)(p["kernel"], x)

    params = {"kernel": array(3, 2, 2, 4 // groups, 6)}
    x = array(3, 2, 5, 6, 4)
    adapted = contract.check(fn, params, x, dtype=jnp.float64)
    assert adapted["kernel"].layout == flora.Layout((0,), (1, 2, 3), (4,))


def test_kernels_under_vmap_over_one_image(x64):
    def fn(p, x):
        return jax.vmap(lambda k: conv(None, {})({"kernel": k}, x))(p["kernel"])

    params, x = {"kernel": array(3, 2, 2, 4, 6)}, array(2, 5, 6, 4)
    settings = {"dtype": jnp.float64}
    adapted = contract.check(fn, params, x, **settings)
    assert adapted["kernel"].layout == flora.Layout((), (1, 2, 3), (0, 4))
    stacked = {"kernel": flora.Layout((0,), (1, 2, 3), (4,))}
    contract.check(fn, params, x, layouts=stacked, **settings)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_dtypes(dtype):
    params = {"kernel": array(3, 2, 4, 7, dtype=dtype)}
    contract.check(conv("HWIO", {}), params, array(2, 5, 6, 4, dtype=dtype))


def test_transposed_convolution_flips_the_kernel(x64):
    def fn(p, x):
        return lax.conv_transpose(
            x,
            p["kernel"],
            (2, 2),
            "SAME",
            transpose_kernel=True,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    params = {"kernel": array(3, 2, 7, 4)}
    contract.check(fn, params, array(2, 5, 6, 4), dtype=jnp.float64)


def test_a_weight_as_the_image_is_refused():
    def fn(p, x):
        return lax.conv_general_dilated(p["w"], x, (1, 1), "SAME")

    with pytest.raises(flora.LoraError, match="input of a convolution"):
        contract.adapt(fn, {"w": jnp.ones((1, 3, 5, 5))}, jnp.ones((4, 3, 2, 2)))


@pytest.mark.parametrize("name", ["plain", "strided", "dilated kernel", "groups",
                                  "depthwise", "odd"])  # fmt: skip
def test_gradient_of_the_input_inside(x64, name):
    options = CASES[name]
    x_spec, w_spec, _ = options.get("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    f = conv(w_spec, options)

    def fn(p, x):  # a score: the gradient of an energy
        return jax.grad(lambda x: jnp.sin(f(p, x)).sum())(x)

    groups = options.get("feature_group_count", 1)
    sizes = {"H": 3, "W": 2, "I": 4 // groups, "O": 8}
    params = {"kernel": array(*shaped(w_spec, sizes), seed=2)}
    x = array(*shaped(x_spec, {"N": 2, "H": 5, "W": 6, "C": 4}), seed=1)
    contract.check(fn, params, x, dtype=jnp.float64, rank=1)
