"""One kernel that reads dy once, beside the two products that it stands for."""

import functools

import _tpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import thin_kernel
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flora
from flora._algebra import kernels
from flora._algebra.axes import RANK, Named
from flora._algebra.kernels import Sizes, blocks_of, by_kernel
from tests.support.contract import adapt, array, close, equations, randomized, scalar

SMALL = {"_WIDEST": 128, "_BLOCK": 2**14}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128 x 128, so that small arrays have several."""
    for name, value in SMALL.items():
        monkeypatch.setattr(kernels, name, value)


def operands(stack=(), tokens=(40,), out=(30,), rank=3, dtype=jnp.float32, dy=None):
    """`(z, dy, q)`; dy has its stack first, then tokens, then outputs."""
    s, t, o = (
        tuple(f"{kind}{i}" for i in range(len(sizes)))
        for kind, sizes in (("s", stack), ("t", tokens), ("o", out))
    )
    return (
        Named(array(*stack, *tokens, rank, dtype=dtype), (*s, *t, RANK)),
        Named(array(*stack, *tokens, *out, seed=1, dtype=dy or dtype), (*s, *t, *o)),
        Named(array(*stack, rank, *out, seed=2, dtype=dtype), (*s, RANK, *o)),
    )


def in_order(z, dy, q, **options):
    g, dq = by_kernel(z, dy, q, **options)
    return g.ordered(z.names), dq.ordered(q.names)


def in_numpy(z, dy, q):
    """The two products in float64."""
    s, t, o = ([n for n in dy.names if n.startswith(kind)] for kind in ("s", "t", "o"))
    letters = dict(zip([*s, *t, *o, RANK], "abcdefghijk", strict=False))

    def spelled(names):
        return "".join(letters[n] for n in names)

    def wide(u):
        return np.asarray(u.array, np.float64)

    def times(u, v, out):
        spec = f"{spelled(u.names)},{spelled(v.names)}->{spelled(out)}"
        return np.einsum(spec, wide(u), wide(v))

    return times(dy, q, z.names), times(z, dy, q.names)


def agree(got, expected, tolerance=1e-5):
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        atol = tolerance * np.abs(y).max()
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=atol)


CASES = {
    "one block": {},
    "blocks that fit": {"tokens": (256,), "out": (384,)},
    "blocks that do not": {"tokens": (300,), "out": (333,), "rank": 5},
    "several axes": {"tokens": (3, 50), "out": (5, 60)},
    "stacks": {"stack": (2, 3), "tokens": (130,), "out": (140,)},
    "few tokens": {"tokens": (5,), "out": (140,)},
    "one of all": {"tokens": (1,), "out": (1,), "rank": 1},
    "rank 1": {"tokens": (140,), "out": (260,), "rank": 1},
    "rank 256": {"tokens": (140,), "out": (260,), "rank": 256},
    "turned": {"tokens": (1000,), "out": (20,)},
    "turned, in groups": {"stack": (2,), "tokens": (2, 3, 333), "out": (5, 60)},
}


@pytest.mark.parametrize("case", CASES)
def test_it_gives_what_the_two_products_give(small_blocks, case):
    z, dy, q = operands(**CASES[case])
    agree(in_order(z, dy, q), in_numpy(z, dy, q))


@pytest.mark.parametrize("dy", [jnp.bfloat16, jnp.float32])
def test_bfloat16_is_summed_in_float32(small_blocks, dy):
    z, dy, q = operands(tokens=(300,), out=(333,), rank=16, dtype=jnp.bfloat16, dy=dy)
    g, dq = in_order(z, dy, q)
    assert (g.dtype, dq.dtype) == (jnp.bfloat16, jnp.float32)
    expected = in_numpy(z, dy.astype(jnp.bfloat16), q)
    agree((g,), expected[:1], 1e-2)
    agree((dq,), expected[1:], 1e-5)


def test_axes_in_any_order():
    z, dy, q = operands(stack=(2,), tokens=(3, 4), out=(5, 6))
    turned = Named(
        jnp.transpose(dy.array, (3, 1, 0, 4, 2)), ("o0", "t0", "s0", "o1", "t1")
    )
    agree(in_order(z, turned, q), in_numpy(z, dy, q))


MAPPED = [(0, 0, 0), (0, 0, None), (None, 0, 0), (0, None, None), (None, 0, None)]


@pytest.mark.parametrize("mapped", MAPPED)
def test_under_vmap(small_blocks, mapped):
    z, dy, q = operands(tokens=(140,), out=(150,))
    names = [u.names for u in (z, dy, q)]
    many = [
        jnp.stack([u.array, 2 * u.array, -u.array]) if at == 0 else u.array
        for u, at in zip((z, dy, q), mapped, strict=True)
    ]

    def run(*arrays):
        return in_order(*map(Named, arrays, names))

    got = jax.jit(jax.vmap(run, mapped))(*many)
    for i in range(3):
        one = [x if at is None else x[i] for x, at in zip(many, mapped, strict=True)]
        agree([x[i] for x in got], in_numpy(*map(Named, one, names)))
    twice = jax.vmap(jax.vmap(run))(*(u.array[None, None] for u in (z, dy, q)))
    agree([x[0, 0] for x in twice], in_numpy(z, dy, q))


def test_its_derivative_is_that_of_the_products(x64):
    z, dy, q = operands(dtype=jnp.float64)
    names = [u.names for u in (z, dy, q)]
    at = [u.array for u in (z, dy, q)]
    moves = [jnp.cos(x) for x in at]

    def run(*arrays):
        return in_order(*map(Named, arrays, names))

    def products(z, dy, q):
        return dy @ q.T, z.T @ dy

    close(jax.jvp(run, at, moves), jax.jvp(products, at, moves))
    slopes = [
        jax.grad(lambda *a, f=f: scalar(f(*a)), (0, 1, 2))(*at) for f in (run, products)
    ]
    close(*slopes)


def test_what_the_kernel_is_not_made_for():
    z, dy, q = operands()
    assert by_kernel(z, dy, q) is not None
    high, highest = jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST
    assert by_kernel(z, dy, q, precision=(highest, highest)) is not None
    for other in (
        (high, high),
        (highest, high),
        jax.lax.DotAlgorithmPreset.F32_F32_F32,
    ):
        assert by_kernel(z, dy, q, precision=other) is None
    nothing = Named(dy.array[:0], dy.names)
    assert by_kernel(Named(z.array[:0], z.names), nothing, q) is None
    one = Named(z.array[0], (RANK,)), Named(dy.array[0], ("o0",)), q
    assert by_kernel(*one) is None  # no axis of tokens


MESH = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("out_axes", [(), ("tp",), ("fsdp", "tp")])
@pytest.mark.parametrize("spec", [P(), P("fsdp", None, "tp"), P(("fsdp", "tp"))])
def test_on_a_mesh(spec, out_axes):
    z, dy, q = operands(tokens=(8, 16), out=(8, 16))
    names = [u.names for u in (z, dy, q)]
    with jax.set_mesh(MESH):
        place = jax.NamedSharding(MESH, spec)
        arrays = z.array, jax.device_put(dy.array, place), q.array
        run = jax.jit(lambda *a: in_order(*map(Named, a, names), out_axes=out_axes))
        text = run.lower(*arrays).as_text()
        agree(run(*arrays), in_numpy(z, dy, q))
    assert "manual_computation" in text


def test_what_a_mesh_does_not_divide_is_left_to_xla():
    with jax.set_mesh(MESH):
        assert by_kernel(*operands(tokens=(12,))) is None
        assert (
            by_kernel(*operands(tokens=(12,), out=(8,)), out_axes=("tp",)) is not None
        )
        assert by_kernel(*operands(tokens=(12,), out=(9,)), out_axes=("tp",)) is None


def mlp(params, x):
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def test_a_step_on_a_mesh(x64):
    params = {"up": array(6, 16), "down": array(16, 8, seed=1)}
    x = array(4, 3, 6, seed=2)
    adapted = randomized(adapt(mlp, params, x, dtype=x.dtype))
    base, adapter = flora.split(adapted)

    def gradient(form, adapter, x):
        def loss(adapter, x):
            return scalar(flora.lora(mlp, form=form)(flora.join(base, adapter), x))

        return jax.grad(loss, (0, 1))(adapter, x)

    expected = gradient("direct", adapter, x)
    place = jax.NamedSharding(MESH, P("fsdp"))
    with jax.set_mesh(MESH):
        step = jax.jit(functools.partial(gradient, "kernel:tp"))
        close(step(adapter, jax.device_put(x, place)), expected)
        found = equations(jax.make_jaxpr(step)(adapter, x))
        calls = [e.primitive.name for e in found].count("shard_map")
        assert calls == 2  # one for each weight
        with pytest.raises(
            flora.LoraError, match=r"'kernel:ep'.*\['ep'\].*'fsdp', 'tp'"
        ):
            gradient("kernel:ep", adapter, x)


@pytest.mark.parametrize("rank", [1, 16, 64, 256])
def test_dy_comes_in_once(rank):
    sizes = Sizes(1, 1, 8192, 14336, rank)
    blocks = blocks_of(sizes, 2)
    z, dy, q, g, dq = thin_kernel.moved(sizes, blocks, (1,) * 5)
    assert dy == 8192 * 14336
    assert q == dq == 14336 * rank  # no block of dQ goes out before it is summed up
    assert z == g == 8192 * rank * -(-14336 // blocks.out)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", [1, 16, 256, 1024])
@pytest.mark.parametrize("tokens", [8, 1000, 8192])
@pytest.mark.parametrize("out", [1, 129, 1024, 11008, 128256])
def test_blocks_fit_into_vector_memory(tokens, out, rank, itemsize):
    sizes = Sizes(1, 1, tokens, out, rank)
    blocks = blocks_of(sizes, itemsize)
    for block, size in zip(blocks, (tokens, out), strict=True):
        assert block == size or block % kernels.LANES == 0
        assert 0 < block <= size
    held = blocks.tokens * blocks.out * itemsize
    held += rank * (blocks.tokens + blocks.out) * 8
    assert 2 * held <= kernels._VMEM
    assert out <= kernels.LANES or -(-out // blocks.out) > 1  # for two cores


def test_blocks_divide_where_they_can():
    assert blocks_of(Sizes(1, 1, 8192, 14336, 16), 2) == (256, 3584)
    assert blocks_of(Sizes(1, 1, 8192, 11264, 16), 2) == (256, 3840 - 1024)
    assert blocks_of(Sizes(1, 1, 8192, 11008, 16), 2) == (256, 4096)  # 86 x 128
    assert blocks_of(Sizes(1, 1, 300, 4096, 16), 2) == (300, 2048)


COMPILED = {
    "as trained": ((2, 4096), (14336,), 16, jnp.bfloat16, jnp.bfloat16),
    "turned": ((2, 4096), (32, 128), 16, jnp.bfloat16, jnp.bfloat16),
    "odd": ((12345,), (333,), 17, jnp.bfloat16, jnp.bfloat16),
    "odd, turned": ((3, 1001), (77,), 3, jnp.float32, jnp.float32),
    "rank 1": ((1000,), (5000,), 1, jnp.bfloat16, jnp.float32),
    "rank 256": ((8192,), (14336,), 256, jnp.bfloat16, jnp.float32),
    "a head": ((8192,), (128256,), 64, jnp.bfloat16, jnp.bfloat16),
}


WHOLE = (P(), P(), P())


def compiled(mesh, case, specs=WHOLE, **options):
    """The text of the program for a mesh of chips that are not there."""
    tokens, out, rank, dtype, wide = case
    z, dy, q = operands(tokens=(1,) * len(tokens), out=(1,) * len(out), rank=1)
    shapes = (*tokens, rank), (*tokens, *out), (rank, *out)
    arrays = [
        jax.ShapeDtypeStruct(shape, kind, sharding=jax.NamedSharding(mesh, spec))
        for shape, kind, spec in zip(shapes, (dtype, wide, dtype), specs, strict=True)
    ]
    names = [u.names for u in (z, dy, q)]
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *a: in_order(*map(Named, a, names), **options))
        return run.lower(*arrays).compile().as_text()


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("chip", _tpu.CHIPS)
@pytest.mark.parametrize("case", COMPILED)
def test_it_compiles_for_tpus(chip, case):
    mesh = jax.sharding.Mesh([_tpu.device(chip)], "device")
    text = compiled(mesh, COMPILED[case])
    assert text.count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.tpu_compiler
def test_on_a_mesh_of_tpus_only_what_is_thin_moves():
    mesh = _tpu.mesh("v5e:2x2", fsdp=2, tp=2)
    case = ((8, 1024), (4096,), 16, jnp.bfloat16, jnp.bfloat16)
    specs = P("fsdp"), P("fsdp", None, "tp"), P(None, "tp")
    text = compiled(mesh, case, specs, out_axes=("tp",))
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    # g of a device's tokens in bfloat16, dQ of its outputs in float32
    assert sum(_tpu.collectives(text).values()) <= 16 * (4096 * 2 + 2048 * 4)
