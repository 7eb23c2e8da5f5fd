"""Several adapters of PEFT's on one base: mixed batches and combinations, as PEFT's.

Needs the extra peft-test; float64 throughout.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.multi
import flora.peft
from tests.support import torch_models as models

pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("x64")]

ONE = {"r": 3, "lora_alpha": 7, "target_modules": ["up", "down"]}
TWO = {"r": 2, "lora_alpha": 3, "target_modules": ["up", "gate"], "use_rslora": True}


def two_adapters(tmp_path, first, second):
    """A PEFT model with both, and both as flora's adapters of one base."""
    import peft
    import torch

    model, fn, x = models.build("mlp")
    adapted = models.adapt(model, first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.add_adapter("two", peft.LoraConfig(**second))
    torch.manual_seed(7)
    for name, p in adapted.named_parameters():
        if ".two." in name:
            p.data += 0.3 * torch.randn_like(p)
    models.saved(adapted, tmp_path)
    params = models.params_of("mlp", model)
    folders = (tmp_path, tmp_path / "two")
    made = [flora.split(flora.peft.load(f, params))[1] for f in folders]
    return adapted.eval(), params, made, fn, x


def test_a_mixed_batch_of_other_targets_and_ranks(tmp_path):
    import torch

    adapted, params, made, fn, x = two_adapters(tmp_path, ONE, TWO)
    names = ["two", "__base__", "default", "two"]
    rows = np.concatenate([np.asarray(x)] * 4)[:4]
    with torch.no_grad():
        want = adapted(torch.as_tensor(rows), adapter_names=names).numpy()
    ids = [{"default": 0, "two": 1, "__base__": None}[name] for name in names]
    for method in ("gather", "masked"):
        run = flora.multi.lora(fn, method=method)
        y = run(params, flora.multi.stack(made), ids, jnp.asarray(rows))
        np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weights", [[0.7, 0.4], [0.7, -0.4], [-1.0, -0.5]])
@pytest.mark.parametrize(
    ("peft_type", "options", "ours"),
    [
        ("cat", {}, {"method": "cat"}),
        ("svd", {"svd_rank": 6}, {"method": "svd", "rank": 6}),
        ("linear", {}, {"method": "peft_linear"}),
        ("magnitude_prune_svd", {"density": 0.4, "svd_rank": 6},
         {"method": "magnitude_prune", "density": 0.4, "rank": 6}),
        ("ties_svd", {"density": 0.4, "svd_rank": 6},
         {"method": "ties", "density": 0.4, "rank": 6}),
        ("ties_svd", {"density": 0.6, "svd_rank": 6,
                      "majority_sign_method": "frequency"},
         {"method": "ties", "density": 0.6, "rank": 6, "sign": "frequency"}),
    ],
    ids=["cat", "svd", "linear", "magnitude_prune", "ties", "ties by count"],
)  # fmt: skip
def test_combinations(tmp_path, peft_type, options, ours, weights):
    first = ONE | {"target_modules": ["up", "gate"]}
    adapted, params, made, *_ = two_adapters(tmp_path, first, TWO | {"r": 3})
    adapted.add_weighted_adapter(
        ["default", "two"], weights, "both", combination_type=peft_type, **options
    )
    both = flora.join(params, flora.multi.combine(made, weights, **ours).adapter)
    merged = flora.merge(both)
    checked = 0
    for name, module in adapted.named_modules():
        if not hasattr(module, "lora_A") or "both" not in module.lora_A:
            continue
        wanted = module.get_delta_weight("both").detach().numpy().T
        *path, last = name.removeprefix("base_model.model.").split(".")
        w = merged, params
        for word in [*path, last, "kernel"]:
            w = tuple(tree[word] for tree in w)
        scale = np.abs(wanted).max()  # PEFT has weights in float32
        np.testing.assert_allclose(w[0] - w[1], wanted, atol=1e-6 * scale, rtol=0)
        checked += 1
    assert checked == len([x for x in jax.tree.leaves(
        made[0], is_leaf=lambda n: isinstance(n, flora.LoraWeight))])  # fmt: skip
