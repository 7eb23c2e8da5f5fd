import jax.numpy as jnp

import flora
from tests.support.registry import MODELS


def test_the_source_line_is_the_user_s_not_flax_s():
    model = MODELS["mlp"]()
    report = flora.coverage(model.fn, model.params, *model.args)
    for row in report.rows:
        assert row.uses[0].source.startswith("registry.py:")
        assert row.uses[0].source.endswith("(__call__)")


def test_the_source_line_is_the_caller_s_where_jax_reuses_a_trace():
    def lookups(p, ids):
        first = jnp.take(p["first"], ids, axis=0)
        return first + jnp.take(p["second"], ids, axis=0)

    params = {"first": jnp.ones((9, 5)), "second": jnp.ones((9, 5))}
    report = flora.coverage(lookups, params, jnp.arange(3))
    start = lookups.__code__.co_firstlineno
    for i, name in enumerate(params, 1):
        sources = {use.source for use in report[name].uses}
        assert sources == {f"test_source.py:{start + i} (lookups)"}
