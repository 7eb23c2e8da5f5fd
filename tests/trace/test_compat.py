import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

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
