import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from tests.support import contract
from tests.support.contract import array


def fn(p, x):
    y = jnp.tanh(x @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"])
    return y @ p["mlp"]["down"]["kernel"] * p["scale"]


def params():
    return {
        "mlp": {
            "up": {"kernel": array(7, 11, dtype=jnp.float32), "bias": jnp.zeros(11)},
            "down": {"kernel": array(11, 5, dtype=jnp.float32)},
        },
        "scale": jnp.ones(5),
    }


X = np.linspace(-1, 1, 21, dtype=np.float32).reshape(3, 7)


def init(config=None, p=None, key=0, f=fn, x=X, **settings):
    config = config or flora.LoraConfig(**({"rank": 2} | settings))
    return flora.init(jax.random.key(key), config, f, params() if p is None else p, x)


def test_shapes_layouts_and_sharing():
    p = params()
    adapted = init(p=p)
    up = adapted["mlp"]["up"]["kernel"]
    assert (up.a.shape, up.b.shape) == ((7, 2), (2, 11))
    assert up.layout == flora.Layout((), (0,), (1,))
    assert up.base is p["mlp"]["up"]["kernel"]
    assert adapted["scale"] is p["scale"]
    assert up.scale == 8.0


def test_a_is_gaussian_with_pefts_variance_and_b_is_zero():
    p = {"kernel": jnp.zeros((64, 512))}
    w = init(
        f=lambda p, x: x @ p["kernel"], x=np.ones((1, 64), np.float32), p=p, rank=64
    )["kernel"]
    assert not w.b.any()
    assert abs(w.a.std() * math.sqrt(3 * 64) - 1) < 0.03
    assert abs(w.a.mean()) < 4 / math.sqrt(3 * 64 * w.a.size)
    kurtosis = ((w.a / w.a.std()) ** 4).mean()
    assert abs(kurtosis - 3) < 0.3


def test_draws_depend_on_key_and_path_only():
    one, same, other = init(), init(), init(key=1)
    chex.assert_trees_all_equal(one, same)
    few = init(target="up/kernel")
    a = [t["mlp"]["up"]["kernel"].a for t in (one, few, other)]
    assert jnp.array_equal(a[0], a[1])
    assert not jnp.array_equal(a[0], a[2])
    two = {"u": jnp.ones((7, 7)), "v": jnp.ones((7, 7))}
    both = init(p=two, f=lambda p, x: x @ p["u"] @ p["v"], target="*")
    assert not jnp.array_equal(both["u"].a, both["v"].a)


def test_the_key_is_consumed():
    with jax.debug_key_reuse(True):
        key = jax.random.key(0)
        flora.init(key, flora.LoraConfig(rank=2), fn, params(), X)
        with pytest.raises(jax.errors.KeyReuseError):
            flora.init(key, flora.LoraConfig(rank=2), fn, params(), X)


def test_stacked_layers_draw_apart():
    w = init(
        p={"kernel": jnp.ones((3, 7, 5))},
        target="*",
        f=lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["kernel"])[1],
    )["kernel"]
    assert w.layout.stack == (0,)
    assert not jnp.array_equal(w.a[0], w.a[1])


def test_abstract_and_jitted_trees():
    abstract = jax.eval_shape(params)
    planned = flora.init(jax.random.key(0), flora.LoraConfig(rank=2), fn, abstract, X)
    real = init()
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    chex.assert_trees_all_equal_shapes_and_dtypes(planned, real)
    jitted = jax.jit(lambda p: init(p=p))(params())
    chex.assert_trees_all_equal(jitted, real)
    assert isinstance(flora.merge(planned)["scale"], jax.ShapeDtypeStruct)
    out = jax.eval_shape(flora.lora(fn), planned, X)
    assert out.shape == (3, 5)
    base, adapter = flora.split(planned)
    assert jax.tree.structure(flora.join(base, adapter)) == jax.tree.structure(planned)


def test_rank_stabilized_scale():
    w = init(rank=4, alpha=6, rank_stabilized=True)["mlp"]["up"]["kernel"]
    assert w.scale == 3.0


def test_factor_dtype():
    adapted = init(dtype=jnp.bfloat16)
    assert adapted["mlp"]["up"]["kernel"].a.dtype == jnp.bfloat16


STARTS = {
    "gaussian": (flora.initializers.gaussian(), False, True),
    "a_zero": (flora.initializers.a_zero(), True, False),
    "both_random": (flora.initializers.both_random(), True, True),
    "both_zero": (flora.initializers.both_zero(), False, False),
}


@pytest.mark.parametrize("name", STARTS)
def test_gradients_at_step_0_of_each_start(name):
    start, moves_a, moves_b = STARTS[name]
    adapted = init(init=start)
    value, grads = flora.value_and_grad(lambda t: (flora.lora(fn)(t, X) ** 2).sum())(
        adapted
    )
    assert jnp.isfinite(value)
    for w in contract.weights(grads):
        assert w.a.any() == moves_a
        assert w.b.any() == moves_b
    same = jnp.array_equal(flora.lora(fn)(adapted, X), fn(params(), X))
    assert same == (name != "both_random")


def test_an_initializer_of_ones_own():
    def ones(key, a, b, dtype):
        return jnp.ones(a, dtype), jnp.zeros(b, dtype)

    assert init(init=ones)["mlp"]["up"]["kernel"].a.all()


def only(**leaves):
    return leaves


def dot(p, x):
    return x @ p["kernel"]


W = np.ones((7, 5), np.float32)

BAD_CALLS = {
    "target='*/weight' selects none of the 4 leaves. Closest: ":
        lambda: init(target="*/weight"),
    "Flax names linear weights 'kernel'.": lambda: init(target="*/weight"),
    "target='kernal' selects none of the 4 leaves. Closest: 'mlp/":
        lambda: init(target="kernal"),
    "'scale' has shape (5,); LoRA needs at least 2 axes, and 'scale' selects none that "
    "has. Take it out of target=, or write train='/scale' to train it whole":
        lambda: init(target=["scale", "kernel"]),
    "train=['/mlp/up/bias', '/scale'] to train them whole": lambda: init(
        target=lambda path, leaf: leaf.ndim == 1),
    "target has 'kernal', which selects none of the 4 leaves. Closest: 'mlp/":
        lambda: init(target=["up/kernel", "kernal"]),
    "train has 'nothing', which selects none of the 4": lambda: init(
        train=["scale", "nothing"]),
    "exclude has 'bias', which selects none of the 2 leaves": lambda: init(
        exclude=["bias", "up/*"]),
    "form_pattern='bias' selects none": lambda: init(form_pattern={"bias": "direct"}),
    "2 problems": lambda: init(target=["kernal", "kernel"], train="nothing"),
    "alpha_pattern: all that 'up/*' selects is taken by earlier entries, 'kernel'":
        lambda: init(alpha_pattern={"kernel": 3, "up/*": 2}),
    "layouts: all that 'kernel' selects is taken by earlier entries, 'up/*', 'down/*'":
        lambda: init(layouts=dict.fromkeys(
            ("up/*", "down/*", "kernel"), flora.Layout())),
    "exclude='kernel' takes out all of the 2 leaves": lambda: init(exclude="kernel"),
    "exclude='nothing' selects none": lambda: init(exclude="nothing"),
    "train='nothing' selects none": lambda: init(train="nothing"),
    "rank_pattern='bias' selects none": lambda: init(rank_pattern={"bias": 3}),
    "'mlp/up/kernel' is named in both target and train": lambda: init(train="up/*"),
    "'other' is targeted, but the function never uses it": lambda: init(
        p=only(kernel=W, other=W), f=dot, target="*"),
    "'tanh' at test_init.py": lambda: init(
        p=only(kernel=W), f=lambda p, x: jnp.tanh(p["kernel"])),
    "'mlp/up/kernel' is adapted already. Adapt the tree that flora.merge or "
    "flora.split":
        lambda: init(p=init()),
    "The tree is empty": lambda: init(p={}),
    "'kernel' has shape (7, 0), no elements. Select others in target=.":
        lambda: init(p=only(kernel=W[:, :0]), f=dot),
    "'kernel' has shape (7, 0), no elements. Write exclude='/kernel'.":
        lambda: init(p=only(kernel=W[:, :0], other=W), f=dot, target="*"),
    "'kernel' is int8[7, 5]; LoRA needs a floating weight":
        lambda: init(p=only(kernel=W.astype(np.int8)), f=dot),
    "'kernel' is bool[7, 5]; LoRA needs": lambda: init(p=only(kernel=W > 0), f=dot),
    "'step' is int32[] and cannot train": lambda: init(
        p=only(kernel=W, step=np.int32(1)), f=dot, train="step"),
    "'idle' is targeted, but the function never uses it": lambda: init(
        p=only(kernel=W, idle=np.ones((2, 3, 4), np.float32)), target="*",
        f=lambda p, x: jax.lax.scan(
            lambda c, w: (c, None), x, p["idle"])[0] @ p["kernel"]),
    "The function returns 'kernel' changed, and": lambda: init(
        p=only(kernel=W), f=lambda p, x: (x @ p["kernel"], p["kernel"].T)),
    "'kernel' has no one layout: 'add' at test_init.py": lambda: init(
        p=only(kernel=W), f=lambda p, x: x + p["kernel"].sum()),
    "key is a uint32[3] array; expected a PRNG key. Write jax.random.key(0)":
        lambda: flora.init(np.zeros(3, np.uint32), flora.LoraConfig(), fn, params(), X),
    "key is a int; expected a PRNG": lambda: flora.init(
        0, flora.LoraConfig(), fn, params(), X),
    "key has shape (2,); expected one key": lambda: flora.init(
        jax.random.split(jax.random.key(0)), flora.LoraConfig(), fn, params(), X),
    "config is a dict; expected flora.LoraConfig": lambda: flora.init(
        jax.random.key(0), {"rank": 2}, fn, params(), X),
    "fn is a dict; expected the function to run": lambda: flora.init(
        jax.random.key(0), flora.LoraConfig(), params(), X, fn),
    "'kernel' has no one layout: 'dot_general' at test_init.py": lambda: init(
        p=only(kernel=np.ones((5, 5, 5), np.float32)), x=np.ones((5, 5), np.float32),
        f=lambda p, x: jnp.tensordot(x[0], p["kernel"], 1)
        + jnp.tensordot(x, p["kernel"], 2)),
    "contracts one part of axis 0 and keeps another": lambda: init(
        p=only(kernel=np.ones((8, 5), np.float32)), x=np.ones((3, 4), np.float32),
        f=lambda p, x: jnp.einsum("bi,ijk->bjk", x, p["kernel"].reshape(4, 2, 5))),
    "there is no out axis": lambda: init(
        p=only(kernel=W),
        f=lambda p, x: jnp.tensordot(p["kernel"], p["kernel"] * 2, 2)),
    "layouts: 'kernel' has 2 axes and was given in=0 out=1,2. Name each of 0 to 1":
        lambda: init(p=only(kernel=W), f=dot,
                     layouts={"kernel": flora.Layout((), (0,), (1, 2))}),
    "lora() got a dict; expected the function to run": lambda: flora.lora({}),
    "fallback='no'. Write": lambda: flora.lora(fn, fallback="no"),
    "merge: none of the tree's 4 leaves is adapted": lambda: flora.merge(params()),
    "split: none of the tree's": lambda: flora.split(params()),
    "split: 'mlp/down/kernel' is an adapter without its base": lambda: flora.split(
        flora.split(init())[1]),
    "'mlp/down/kernel' is an adapter without its base. Write flora.join":
        lambda: flora.lora(fn)(flora.split(init())[1], X),
    "mask: none of the tree's": lambda: flora.mask(params()),
    "optimizer: tx is a float": lambda: flora.optimizer(1e-3, init()),
    "coverage: fn is a dict": lambda: flora.coverage({}, fn),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls(message):
    with pytest.raises(flora.LoraError, match=re.escape(message)):
        BAD_CALLS[message]()


def test_type_errors_are_type_errors():
    with pytest.raises(TypeError):
        flora.init(0, flora.LoraConfig(), fn, params(), X)


def test_a_given_layout_settles_a_conflict(x64):
    p, x = {"w": array(5, 7, 5)}, array(5, 7)

    def fn(p, x):
        return jnp.einsum("i,ijk->jk", x[:, 0], p["w"]), jnp.einsum(
            "ij,ijk->k", x, p["w"]
        )

    layout = {"w": flora.Layout((), (0,), (1, 2))}
    contract.check(fn, p, x, layouts=layout, dtype=jnp.float64)


def test_leaves_of_one_dimension_are_passed_over_among_others():
    p = {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)}
    adapted = init(p=p, f=lambda p, x: x @ p["kernel"] + p["bias"], target="*")
    assert contract.is_weight(adapted["kernel"])
    assert adapted["bias"] is p["bias"]


STATIC = {"act": jnp.tanh, "name": "net", "eps": 0.5, "n": 3, "flag": True}


def with_static(p, x):
    """Of a tree that holds what modules of Equinox hold."""
    assert p["flag"] is True
    return p["act"](x @ p["kernel"]) * p["eps"] ** p["n"] + p["bias"]


@pytest.mark.parametrize("pattern", ["*", lambda path, leaf: leaf.ndim == 2])
def test_functions_strings_and_numbers_are_in_no_pattern(pattern):
    p = STATIC | {"kernel": array(7, 5, dtype=jnp.float32), "bias": jnp.ones(5)}
    adapted = init(p=p, f=with_static, target=pattern)
    is_weight = {name for name, x in adapted.items() if contract.is_weight(x)}
    assert is_weight == {"kernel"}
    whole = init(p=p, f=with_static, target=(), train=pattern)
    trained = {name for name, x in whole.items() if isinstance(x, flora.Trained)}
    assert trained == ({"kernel", "bias"} if pattern == "*" else {"kernel"})
    for tree in (adapted, whole):
        assert all(tree[name] is x for name, x in STATIC.items())
        want = with_static(p, X)
        chex.assert_trees_all_equal(flora.lora(with_static)(tree, X), want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "act"}, "target: 'act' selects 'act', a .*; expected arrays"),
        ({"target": ["kernel", "name"]}, "target: 'name' selects 'name', a str;"),
        ({"target": (), "train": "eps"}, "train: 'eps' selects 'eps', a float; exp"),
    ],
)
def test_entries_for_functions_strings_and_numbers_alone(settings, message):
    p = STATIC | {"kernel": array(7, 5, dtype=jnp.float32), "bias": jnp.ones(5)}
    with pytest.raises(flora.LoraError, match=message):
        init(p=p, f=with_static, **settings)


def test_abstract_leaves_evaluate_nothing(caplog):
    key = jax.random.key(0)

    def fn(params, x):
        return x @ params["kernel"]

    params = {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    with jax.log_compiles():
        adapted = flora.init(key, flora.LoraConfig(rank=2), fn, params, x)
    assert "ompiling" not in caplog.text
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(adapted))
