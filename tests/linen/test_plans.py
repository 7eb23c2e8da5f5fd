"""How weights are used is found once, and kept by value."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flora
import flora.linen
from flora._linen import plans
from tests.support.linen_models import Block, Net, X, close, merged, moved, net

CONFIG = flora.LoraConfig(rank=2)
TRACES = []


class Counted(nn.Module):
    """A list among its fields: it does not hash."""

    widths: list

    @nn.compact
    def __call__(self, x):
        TRACES.append(self.path)
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"d{i}")(x)
        return x


@pytest.fixture
def forgotten(monkeypatch):
    """A process in which no module has run."""

    def forget():
        monkeypatch.setattr(plans, "_KNOWN", plans._Known())
        TRACES.clear()

    forget()
    return forget


def counted():
    return flora.linen.LoRA(model=Counted([8, 3]), config=CONFIG)


class Parent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return counted()(x)


def steps(model, variables):
    """How often the module within is traced in three calls of a step, and retraced."""

    @jax.jit
    def step(variables, x):
        return jax.grad(lambda v: (model.apply(v, x) ** 2).sum())(variables)

    counts = []
    for n in (4, 4, 2):
        TRACES.clear()
        step(variables, X[:n])
        counts.append(len(TRACES))
    assert step._cache_size() == 2
    return counts


@pytest.mark.parametrize(
    "model", [counted(), Parent()], ids=["outermost", "in a parent"]
)
def test_after_init_a_step_traces_the_model_once(forgotten, model):
    variables = model.init(jax.random.key(0), X)
    assert len(TRACES) == 2  # that of init itself, and one to find the plan
    assert steps(model, variables) == [1, 0, 1]


@pytest.mark.parametrize(
    "model", [counted(), Parent()], ids=["outermost", "in a parent"]
)
def test_in_a_fresh_process_the_plan_is_found_at_the_first_trace(forgotten, model):
    variables = model.init(jax.random.key(0), X)
    forgotten()
    assert steps(model, variables) == [2, 0, 1]


def test_in_a_fresh_process_a_call_may_use_some_weights_only(forgotten):
    model = net()
    variables = moved(model, X)
    plain = merged(model, variables)
    forgotten()
    out = model.apply(variables, X, method="encode")
    close(out, Net().apply(plain, X, method="encode"))
    with pytest.raises(flora.LoraError, match=r"tree\(model, \.\.\., x\)"):
        flora.linen.tree(model, variables)
    out = model.apply(variables, out, method="decode")
    close(out, Net().apply(plain, X))
    close(model.apply(variables, X), Net().apply(plain, X))
    close(flora.merge(flora.linen.tree(model, variables)), plain)


def test_a_flag_changes_what_a_call_uses(forgotten):
    class Flag(nn.Module):
        @nn.compact
        def __call__(self, x, head=True):
            x = nn.Dense(8, name="body")(x)
            return nn.Dense(3, name="head")(x) if head else x

    model = flora.linen.LoRA(model=Flag(), config=CONFIG)
    variables = moved(model, X)
    plain = merged(model, variables)
    forgotten()
    for head in (False, True, False):
        out = model.apply(variables, X, head=head)
        close(out, Flag().apply(plain, X, head=head))


def test_modules_of_equal_shapes_have_plans_of_their_own(forgotten):
    class Turned(nn.Module):
        turned: bool

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (8, 8))
            return x @ (kernel.T if self.turned else kernel)

    for turned in (True, False, True):
        model = flora.linen.LoRA(model=Turned(turned), config=CONFIG)
        variables = moved(model, X)
        tree = flora.linen.tree(model, variables)
        assert tree["params"]["kernel"].layout.in_ == (int(turned),)
        close(model.apply(variables, X), Turned(turned).apply(flora.merge(tree), X))


def test_configs_have_plans_of_their_own(forgotten):
    for rank in (1, 2, 3):
        config = flora.LoraConfig(rank=rank, rank_pattern={"head/*": 4})
        model = flora.linen.LoRA(model=Net(), config=config)
        tree = flora.linen.tree(model, moved(model, X))
        assert tree["params"]["first"]["Dense_0"]["kernel"].rank == rank
        assert tree["params"]["head"]["kernel"].rank == 4


def test_no_plan_holds_arrays(forgotten):
    class Around(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x)

    model = flora.linen.LoRA(model=Around(Block(8)), config=CONFIG)
    variables = moved(model, X)
    model.bind(variables)(X)
    kept = [x for found in plans._KNOWN.plans.values() for x in found]
    assert kept
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(kept))
    assert not any(isinstance(x, nn.Module) for x in jax.tree.leaves(kept))


def test_the_oldest_plans_are_forgotten(forgotten, monkeypatch):
    monkeypatch.setattr(plans, "KEPT", 2)
    for width in range(1, 5):
        moved(flora.linen.LoRA(model=nn.Dense(width), config=CONFIG), X)
    assert len(plans._KNOWN.plans) == 2


def test_a_field_that_does_not_compare(forgotten):
    class Table(nn.Module):
        table: jax.Array

        @nn.compact
        def __call__(self, x):
            TRACES.append(self.path)
            return nn.Dense(3)(x * self.table)

    table = jnp.arange(8.0)
    model = flora.linen.LoRA(model=Table(table), config=CONFIG)
    assert steps(model, moved(model, X)) == [1, 0, 1]
    other = flora.linen.LoRA(model=Table(table + 1), config=CONFIG)
    variables = moved(other, X)
    close(
        other.apply(variables, X), Table(table + 1).apply(merged(other, variables), X)
    )
