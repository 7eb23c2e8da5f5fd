import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
from flora._algebra.axes import from_weight
from flora._trace import compat
from flora._trace.compat import P
from flora._trace.interpret import Context, interpret
from flora._trace.rules import RULES, RULES_FOR_SQUARES
from tests.support import contract
from tests.support.contract import array


def fn(p, x):
    return x @ p["w"]


def adapted():
    params, x = {"w": array(7, 5, dtype=jnp.float32)}, array(3, 7, dtype=jnp.float32)
    return contract.randomized(contract.adapt(fn, params, x)), x


def test_every_rule_lists_the_parameters_that_it_understands():
    assert compat._PARAMS.keys() == RULES.keys()


def renamed(jaxpr, old, new):
    """The jaxpr of another JAX, in which a parameter has another name."""
    eqns = []
    for eqn in jaxpr.eqns:
        params = {new if k == old else k: v for k, v in eqn.params.items()}
        eqns.append(eqn.replace(params=params))
    return jaxpr.replace(eqns=eqns)


@pytest.mark.parametrize(
    ("new", "what"),
    [
        ("dims", r"the parameters \['dims'\]"),
        ("precision", "no parameter 'dimension_numbers'"),
    ],
)
def test_a_renamed_parameter_fails_with_one_message(new, what):
    tree, x = adapted()
    jaxpr, _ = compat.open_jaxpr(jax.make_jaxpr(lambda w, x: x @ w)(tree["w"].base, x))
    changed = renamed(jaxpr, "dimension_numbers", new)
    weight = from_weight(tree["w"], "w")
    message = (
        rf"'dot_general' at test_compat.py:.* reads 'w'.* it has {what}.*install one"
    )
    with pytest.raises(flora.LoraError, match=message):
        interpret(Context(RULES, RULES_FOR_SQUARES), changed, [weight, x])


def test_a_renamed_primitive_fails_at_import(monkeypatch):
    monkeypatch.delattr(compat.primitives, "gather_p")
    with pytest.raises(ImportError, match=r"has no gather_p\. flora is tested with"):
        compat._named("gather_p")


def test_a_primitive_that_splits_in_two_is_refused_by_name():
    tree, x = adapted()
    rules = {p: rule for p, rule in RULES.items() if p is not P.dot_general}
    jaxpr = jax.make_jaxpr(lambda w, x: x @ w)(tree["w"].base, x)
    weight = from_weight(tree["w"], "w")
    with pytest.raises(flora.LoraError, match=r"'dot_general' .*no rule for this prim"):
        interpret(Context(rules, {}), jaxpr, [weight, x])


def test_importing_flora_starts_no_backend():
    # JAX refuses to set up processes once a backend runs.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = f"import jax; jax.distributed.initialize('localhost:{port}', 1, 0)"

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )

    refused = run(f"import jax; jax.devices(); {start}")
    assert "must be called before any JAX" in refused.stderr
    done = run(f"import flora; {start}; print('up'); jax.distributed.shutdown()")
    assert "up" in done.stdout, done.stderr


def eqns(fn, *args):
    return jax.make_jaxpr(fn)(*args).eqns


LOOPS = {
    "scan": (
        lambda w, x: lax.scan(
            lambda c, s: ((c[0] @ w, c[1] + 1), s * c[1]), (x, 2.0), x),
        (0, 1, 2)),
    "while": (
        lambda w, x: lax.while_loop(
            lambda c: c[0].sum() < w[0, 0], lambda c: (c[0] @ w, c[1] + 1), (x, 2.0)),
        (1, 1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_what_a_loop_takes_and_hands_on(name):
    fn, wanted = LOOPS[name]
    (eqn,) = (e for e in eqns(fn, jnp.ones((3, 3)), jnp.ones((3, 3)))
              if e.primitive in (P.scan, P.while_))  # fmt: skip
    (inner,) = compat.inner_functions(eqn)
    assert (inner.first, inner.num_consts, inner.num_carry) == wanted
    jaxpr, _ = compat.open_jaxpr(inner.jaxpr)
    assert len(jaxpr.invars) == len(eqn.invars) - inner.first


def test_functions_inside_equations():
    def one(fn):
        (eqn,) = eqns(fn, jnp.ones(3))
        return compat.inner_functions(eqn)

    own = jax.custom_jvp(jnp.sin)
    own.defjvp(lambda p, t: (own(*p), t[0]))
    for fn in (jax.jit(jnp.sin), jax.checkpoint(jnp.sin), own):
        (inner,) = one(fn)
        assert [e.primitive.name for e in compat.open_jaxpr(inner.jaxpr)[0].eqns] == [
            "sin"
        ]
    assert one(jnp.sin) == []
    *_, eqn = eqns(lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), jnp.ones(3))
    assert [inner.first for inner in compat.inner_functions(eqn)] == [1, 1]


def test_which_input_an_output_is():
    def fn(w, x, n):
        a = jax.jit(lambda x, w: (x * 2, w))(x, w)
        b = lax.scan(lambda c, _: ((c[0], c[1] + 1, c[0]), None), (w, x, w), None, 2)[0]
        c = lax.fori_loop(0, 3, lambda i, c: (c[1], c[0]), (w, w))
        step = jax.checkpoint(lambda c, row: (c + 1, (c, row[0], row[1] + 1, w)))
        d = lax.scan(step, n, (w, x))[1]  # a step's rows come back as they went in
        return w, a[0], a[1], *b, c[0], 3.0, n, *d

    jaxpr = jax.make_jaxpr(fn)(jnp.ones(3), jnp.ones(3), 1)
    w = 0
    expected = [w, None, w, w, None, None, None, None, 2, None, w, None, None]
    assert compat.handed_on(jaxpr) == expected


def test_whether_a_weight_may_come_out():
    w, x = jnp.ones((3, 3)), jnp.ones((2, 3))
    for fn, may in (
        (lambda w, x: w.T, True), (lambda w, x: x @ w, False), (lambda w, x: x, False),
        (lambda w, x: (x @ w, jnp.sin(w)[0]), True),
        (lambda w, x: w[jnp.arange(2)], False),
    ):  # fmt: skip
        assert compat.may_return(jax.make_jaxpr(fn)(w, x), [True, False]) is may


def test_equations_are_evaluated_in_one_go_with_what_they_need():
    jaxpr = jax.make_jaxpr(lambda x, y: (jnp.sin(x) * 2.0, x + y))(
        jnp.ones(3), jnp.ones(3)
    )
    inner, _ = compat.open_jaxpr(jaxpr)
    x, y = inner.invars
    got = compat.eval_eqns(
        inner.eqns, inner.outvars, {x: jnp.ones(3), y: jnp.arange(3.0)}
    )
    assert jnp.array_equal(got[0], 2 * jnp.sin(jnp.ones(3)))
    assert jnp.array_equal(got[1], 1 + jnp.arange(3.0))
    # Only what is asked for is computed, and nothing more than the inputs is looked up.
    (only,) = compat.eval_eqns(inner.eqns[:1], inner.eqns[0].outvars, {x: jnp.zeros(3)})
    assert not only.any()
    assert compat.eval_eqns([], [], {}) == []
