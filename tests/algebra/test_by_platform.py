"""The form of a product whose platform is known only once it is lowered."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

import flora
from flora._algebra import choice
from flora._algebra.choice import _MIN_TOKENS, _MIN_WIDTH
from tests.support.contract import (
    adapt,
    array,
    check,
    close,
    close_to_merged,
    randomized,
    scalar,
)

BARRIER = "optimization_barrier"
SHAPES = {"gate": (6, 10), "up": (6, 10), "down": (10, 6)}


def mlp(params, x):
    gate, up = x @ params["gate"], x @ params["up"]
    return x + (jax.nn.silu(gate) * up) @ params["down"]


def layers(params, x):
    layer = jax.checkpoint(lambda x, w: (mlp(w, x), None), prevent_cse=False)
    return jax.lax.scan(layer, x, params)[0]


def loops(params, x):
    return jax.lax.scan(lambda x, w: (mlp(w, x), None), x, params)[0]


def trace_for(monkeypatch, kind):
    """As in a process with one device of this kind; a GPU has fences of its own."""
    target = choice.Target(kind, 1, certain=False)
    monkeypatch.setattr("flora._trace.rules.dot.target", lambda: target)


@pytest.fixture
def small(monkeypatch):
    """Sizes for which a form is chosen, small."""
    monkeypatch.setattr(choice, "_MIN_TOKENS", 1)
    monkeypatch.setattr(choice, "_MIN_WIDTH", 1)


def case(model, dtype=jnp.float64, **config):
    stack = () if model is mlp else (2,)
    params = {k: array(*stack, *s, dtype=dtype) for k, s in SHAPES.items()}
    x = array(7, 6, seed=2, dtype=dtype)
    return params, x, adapt(model, params, x, dtype=dtype, **config)


def step_of(model, form=None):
    run = flora.lora(model, form=form)

    def step(adapter, base, x):
        def loss(adapter, x):
            return scalar(run(flora.join(base, adapter), x))

        return jax.value_and_grad(loss, (0, 1))(adapter, x)

    return step


@pytest.mark.parametrize("model", [mlp, layers, loops])
def test_the_open_form_computes_the_product(x64, small, model):
    _, x, adapted = case(model)
    close_to_merged(model, randomized(adapted), x, start=adapted)


@pytest.mark.parametrize("spec", ["bi,io->bo", "bi,oi->bo"])
def test_the_open_form_keeps_the_contract(x64, small, spec):
    params = {"w": array(*((5, 4) if spec == "bi,io->bo" else (4, 5)), seed=1)}
    x = array(3, 5)
    check(lambda p, x: jnp.einsum(spec, x, p["w"]), params, x, dtype=jnp.float64)


DERIVATIVES = {
    "reverse": lambda f, a: jax.grad(f)(a),
    "jvp": lambda f, a: jax.jvp(f, (a,), (a,)),
    "linearize": lambda f, a: jax.linearize(f, a)[1](a),
    "forward over reverse": lambda f, a: jax.jvp(jax.grad(f), (a,), (a,)),
    "reverse over forward": lambda f, a: jax.grad(lambda b: jax.jvp(f, (b,), (a,))[1])(
        a
    ),
    "forward twice": lambda f, a: jax.jvp(
        lambda b: jax.jvp(f, (b,), (a,))[1], (a,), (a,)
    ),
    "hessian": lambda f, a: jax.hessian(lambda t: f(jax.tree.map(lambda x: t * x, a)))(
        1.0
    ),
}


@pytest.mark.parametrize(
    ("kind", "model"), [("cpu", mlp), ("cpu", layers), ("NVIDIA H100", layers)]
)
@pytest.mark.parametrize("name", DERIVATIVES)
def test_forward_mode_works(x64, small, monkeypatch, kind, model, name):
    trace_for(monkeypatch, kind)
    _, x, adapted = case(model)
    base, adapter = flora.split(randomized(adapted))

    def derivative(form):
        run = flora.lora(model, form=form)
        loss = jax.jit(lambda a: scalar(run(flora.join(base, a), x)))
        return DERIVATIVES[name](loss, adapter)

    close(derivative("auto"), derivative("direct"))


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100"])
@pytest.mark.parametrize("name", ["reverse", "jvp", "reverse over forward"])
def test_dropout_has_one_mask_in_all_forms(x64, small, monkeypatch, kind, name):
    trace_for(monkeypatch, kind)
    _, x, adapted = case(layers, dropout=0.4)
    base, adapter = flora.split(randomized(adapted))

    def derivative(form):
        run = flora.lora(layers, form=form)

        def loss(a):
            tree = flora.with_dropout(flora.join(base, a), jax.random.key(0))
            return scalar(run(tree, x))

        return DERIVATIVES[name](jax.jit(loss), adapter)

    close(derivative("auto"), derivative("direct"), 1e-12)


def lowered_text(model, platforms, form=None):
    _, x, adapted = case(model, jnp.float32)
    base, adapter = flora.split(adapted)
    traced = jax.jit(step_of(model, form)).trace(adapter, base, x)
    return traced.lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize("model", [mlp, layers])
def test_fences_are_for_tpus(small, model):
    assert BARRIER in lowered_text(model, ("tpu",))
    for platform in ("cpu", "cuda"):
        assert BARRIER not in lowered_text(model, (platform,))
    assert BARRIER not in lowered_text(model, ("tpu",), "direct")


@pytest.mark.parametrize("model", [mlp, layers])
def test_one_gpu_has_fences_of_its_own(small, monkeypatch, model):
    trace_for(monkeypatch, "NVIDIA H100")
    fences = lowered_text(model, ("cuda",)).count(BARRIER)
    assert fences == lowered_text(model, ("rocm",)).count(BARRIER)
    # Each y, in remat once more, and the sums of dx for gate and up, and for down.
    assert fences == (3 + 2 if model is mlp else 3 + 2 + 2)
    assert BARRIER not in lowered_text(model, ("cpu",))


def test_an_exported_program_has_the_form_of_each_platform(small):
    _, x, adapted = case(layers, jnp.float32)
    base, adapter = flora.split(randomized(adapted))
    step = jax.jit(step_of(layers))
    inputs = adapter, base, x
    both = export.export(step, platforms=["cpu", "tpu"])(*inputs)
    assert BARRIER in both.mlir_module()
    again = export.deserialize(both.serialize())
    close(again.call(*inputs), step(*inputs), 1e-6)


def test_small_products_are_what_they_were():
    _, x, adapted = case(mlp, jnp.float32)

    def traced(form):
        return str(jax.make_jaxpr(flora.lora(mlp, form=form))(adapted, x))

    assert traced("auto") == traced("direct")


@pytest.mark.parametrize("variant", ["unrolled", "scan", "remat"])
def test_on_a_cpu_the_step_costs_what_the_direct_one_does(variant):
    model = {"unrolled": mlp, "scan": loops, "remat": layers}[variant]
    stack = () if model is mlp else (2,)
    width = _MIN_WIDTH
    shapes = {name: (*stack, width, width) for name in SHAPES}

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    params = {name: shape(*s) for name, s in shapes.items()}
    x = shape(_MIN_TOKENS, width)
    adapted = flora.init(
        jax.random.key(0), flora.LoraConfig(rank=16, target="*"), model, params, x
    )
    base, adapter = flora.split(adapted)

    @functools.cache
    def cost(form):
        step = jax.jit(step_of(model, form)).lower(adapter, base, x).compile()
        memory = step.memory_analysis().temp_size_in_bytes
        return step.cost_analysis()["flops"], memory

    for auto, direct in zip(cost("auto"), cost("direct"), strict=True):
        assert auto <= 1.005 * direct, (cost("auto"), cost("direct"))
