import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

import flora
from flora._algebra import choice
from flora._algebra.choice import (
    Form,
    Sizes,
    Target,
    cheapest,
    is_large,
    is_tpu,
    may_differ,
    named_form,
    target,
    with_kernel,
)
from flora._trace import interpret as _interpreter
from flora._trace.rules import dot
from tests.support.contract import adapt, array, close_to_merged, randomized


def test_device_and_sizes_decide():
    wide, narrow = Sizes(8192, 4096, 14336, 16), Sizes(8192, 14336, 4096, 16)
    on_chip, on_chip_narrow = Sizes(4096, 2048, 5632, 16), Sizes(4096, 5632, 2048, 16)
    kinds = "TPU v5 lite", "TPU v5", "TPU v6 lite"
    v5e, v5p, v6e = map(Target, kinds)
    apart = {"together": False}
    assert cheapest(wide, v6e) == Form("thin_first", "thin_last", **apart)
    assert cheapest(narrow, v6e) == Form("thin_last", "thin_first", **apart)
    assert cheapest(wide, v5p) == Form("direct", "direct", **apart)
    assert cheapest(on_chip, v6e) == Form("concat", "direct")
    assert cheapest(on_chip, v5p) == Form("concat", "concat")
    assert cheapest(on_chip_narrow, v5p) == Form("concat", "thin_first")
    assert cheapest(wide, v5e) == Form("concat", "thin_last")
    assert cheapest(narrow, v5e) == Form("concat", "thin_last")
    for chip in (v5e, v5p, v6e):
        assert cheapest(Sizes(4096, 2048, 32000, 16), chip) == Form("concat", "direct")
    block = Sizes(1024, 4096, 128256, 16)  # fewer tokens than inputs
    assert cheapest(block, v5e) == Form("concat", "direct")
    for chip in (v5p, v6e):
        assert cheapest(block, chip) == Form("thin_last", "direct")
    assert cheapest(Sizes(4096, 2048, 16384, 16), v5e) == Form("concat", "concat")
    for kind in ("cpu", "NVIDIA H100"):
        assert cheapest(wide, Target(kind)) is None
    for few in (
        Sizes(1, 4096, 14336, 16),
        Sizes(8192, 64, 4096, 16),
        Sizes(8192, 4096, 4096, 256),
    ):
        assert cheapest(few, v6e) is None
    stored = functools.partial(dataclasses.replace, stored=True)  # is not joined
    for chip in (v5e, v5p):
        assert cheapest(stored(on_chip), chip) == Form("thin_first", "thin_last")
    assert cheapest(stored(on_chip), v6e) == Form("direct", "direct")
    assert cheapest(stored(narrow), v5e) == Form("thin_last", "thin_first")
    for chip in (v5p, v6e):
        assert cheapest(stored(wide), chip) == Form("thin_last", "thin_last")
        assert cheapest(stored(narrow), chip) == Form("thin_last", "direct")
    for kind in kinds:  # nor is what may be sharded
        assert cheapest(on_chip, Target(kind, 4)) == Form("direct", "direct")


def test_slices_of_a_stack_are_told_from_whole_weights():
    wide, narrow = Sizes(8192, 4096, 14336, 16), Sizes(8192, 14336, 4096, 16)
    v5e, v5p, v6e = map(Target, ("TPU v5 lite", "TPU v5", "TPU v6 lite"))

    def sliced(sizes, chip):
        return cheapest(dataclasses.replace(sizes, sliced=True), chip)

    last = Form("thin_last", "thin_last", in_heads=True)
    read = dataclasses.replace(last, written=False)
    apart = dataclasses.replace(last, together=False)
    for sizes in (narrow, dataclasses.replace(narrow, stored=True)):
        assert sliced(sizes, v5e) == sliced(sizes, v5p) == last
        # XLA's own order, where a product or its dx widens.
        assert sliced(sizes, v6e) == dataclasses.replace(last, backward="direct")
    assert sliced(wide, v5e) == apart
    for what in ("stored", "scaled"):  # its product is scaled, and adds z Q with that
        other = dataclasses.replace(wide, **{what: True})
        assert sliced(other, v5e) == dataclasses.replace(apart, forward="thin_first")
        assert sliced(other, v5p) == sliced(wide, v5p)
        assert sliced(other, v6e) == sliced(wide, v6e)
    assert sliced(wide, v5p) == dataclasses.replace(apart, written=False)
    assert sliced(wide, v6e) == dataclasses.replace(apart, forward="direct")
    square, few = Sizes(8192, 4096, 4096, 16), Sizes(8192, 4096, 1024, 16)
    for chip in (v5e, v5p, v6e):
        assert sliced(square, chip) == dataclasses.replace(read, backward="thin_first")
        assert sliced(few, chip) == read
    for kind in ("TPU v5", "cpu"):  # what may be sharded or lowered for another
        several = Target(kind, 4, certain=kind == "TPU v5")
        assert sliced(wide, several) == cheapest(wide, several)


def test_slices_of_narrow_layers_are_as_they_are_elsewhere():
    v5e, v5p, v6e = map(Target, ("TPU v5 lite", "TPU v5", "TPU v6 lite"))
    for in_, out in ((2048, 5632), (5632, 2048), (2048, 2048), (2048, 1024)):
        whole = Sizes(4096, in_, out, 16)
        sliced = dataclasses.replace(whole, sliced=True)
        assert cheapest(sliced, v6e) == Form("direct", "direct")
        assert cheapest(sliced, v5p) == Form("concat", "direct")
        assert cheapest(sliced, v5e) == cheapest(whole, v5e)
    heads = Sizes(8192, 4096, 1024, 16, sliced=True)  # of keys, of a wide layer
    assert cheapest(heads, v6e).in_heads


def test_limits_in_a_loop():
    chip = Target("TPU v5")
    loop = Sizes(8192, 4096, 7 * 4096, 256, sliced=True)
    assert cheapest(loop, chip).in_heads
    assert cheapest(dataclasses.replace(loop, rank=257), chip) is None
    assert cheapest(dataclasses.replace(loop, sliced=False, rank=65), chip) is None
    assert cheapest(dataclasses.replace(loop, sliced=False, rank=64), chip) is not None
    head = dataclasses.replace(loop, out=7 * 4096 + 1, rank=16)  # as outside of one
    assert cheapest(head, chip) == cheapest(
        dataclasses.replace(head, sliced=False), chip
    )
    assert not cheapest(head, chip).in_heads


CHOSEN = {
    cheapest(Sizes(4096, in_, out, 16, sliced, stored), Target(kind, devices))
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite")
    for in_, out in itertools.product((2048, 4096, 14336), (2048, 4096, 14336, 32000))
    for sliced, devices in itertools.product((False, True), (1, 4))
    for stored in (False, True)
}


@pytest.mark.parametrize("form", sorted(CHOSEN, key=str), ids=str)
def test_every_choice_computes_the_product(x64, form, monkeypatch):
    for module in (dot, _interpreter):
        monkeypatch.setattr(module, "may_differ", lambda name: True)
        monkeypatch.setattr(module, "is_large", lambda *shapes: True)
    monkeypatch.setattr(dot, "cheapest", lambda *_: form)

    def layers(params, x):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x, w):
            gate, up = x @ w["gate"], x @ w["up"]
            return x + (jax.nn.silu(gate) * up) @ w["down"], None

        return jax.lax.scan(layer, x, params)[0]

    shapes = {"gate": (2, 6, 10), "up": (2, 6, 10), "down": (2, 10, 6)}
    params = {name: array(*shape) for name, shape in shapes.items()}
    x = array(7, 6, seed=2)
    adapted = adapt(layers, params, x, dtype=x.dtype)
    close_to_merged(layers, randomized(adapted), x, start=adapted)


def test_what_is_not_written_has_no_fence(monkeypatch):
    monkeypatch.setattr(dot, "is_large", lambda *shapes: True)
    w, x = {"kernel": jnp.ones((4, 4))}, jnp.ones((2, 4))
    adapted = adapt(lambda w, x: jnp.tanh(x) @ w["kernel"], w, x)

    def fences(form):
        monkeypatch.setattr(dot, "cheapest", lambda *_: form)
        step = flora.lora(lambda w, x: jnp.tanh(x) @ w["kernel"], form="auto")
        with monkeypatch.context() as patch:
            patch.setattr(_interpreter, "may_differ", lambda name: True)
            patch.setattr(dot, "may_differ", lambda name: True)
            text = str(jax.make_jaxpr(step)(adapted, x))
        return text.count("optimization_barrier")

    form = Form("direct", "direct")
    assert fences(form) == 1 + fences(dataclasses.replace(form, written=False)) == 1


@pytest.mark.parametrize("scanned", [False, True])
def test_a_loop_says_that_it_takes_slices(scanned, monkeypatch):
    w = {"kernel": jnp.ones((3, 4, 4))}
    seen = []
    monkeypatch.setattr(dot, "is_large", lambda *shapes: True)
    monkeypatch.setattr(dot, "cheapest", lambda sizes, _: seen.append(sizes.sliced))

    def over_layers(w, x):
        if scanned:
            return jax.lax.scan(lambda x, k: (x @ k, None), x, w["kernel"])[0]
        for i in range(3):
            x = x @ w["kernel"][i]
        return x

    x = jnp.ones((2, 4))
    adapted = flora.init(jax.random.key(0), flora.LoraConfig(rank=2), over_layers, w, x)
    flora.lora(over_layers)(adapted, x)
    assert set(seen) == {scanned}


def test_the_target_is_the_mesh_that_is_set_or_all_devices():
    kind = jax.devices()[0].device_kind
    assert target() == Target(kind, jax.device_count(), certain=False)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("x",))):
        assert not target().certain
    for count in (1, 2):
        mesh = jax.make_mesh((count,), ("x",), devices=jax.devices()[:count])
        with jax.set_mesh(mesh):
            assert target() == Target(kind, count)
            assert jax.jit(lambda: target().devices)() == count


def test_what_a_name_means_in_both_passes():
    assert named_form("direct") is None
    for name in ("thin_first", "concat", "merged"):
        assert named_form(name) == Form(name, name, together=True)


def test_the_kernel_goes_with_any_form():
    widens = cheapest(Sizes(8192, 4096, 14336, 16), Target("TPU v6 lite"))
    found = with_kernel(widens, ("tp",))
    assert found == dataclasses.replace(widens, kernel=("tp",))
    assert with_kernel(None, ()) == Form("direct", "direct", kernel=())
    assert may_differ("kernel")
    assert may_differ("kernel:tp")


def test_where_a_form_may_differ_from_the_direct_one(monkeypatch):
    assert not may_differ("direct")
    assert may_differ("concat")
    assert may_differ("auto")  # a TPU may be what the program is lowered for
    with jax.set_mesh(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])):
        assert not may_differ("auto")  # on a CPU
    monkeypatch.setattr(choice, "target", lambda: Target("TPU v5 lite"))
    assert may_differ("auto")
    assert not may_differ("direct")
    assert [is_tpu(kind) for kind in ("TPU v6 lite", "cpu", "NVIDIA TPU")] == [
        True, False, False,
    ]  # fmt: skip


def test_an_open_platform_gets_the_form_of_several_tpus():
    sizes, here = Sizes(8192, 4096, 14336, 16), Target("cpu", certain=False)
    open_ = cheapest(sizes, here)
    assert open_ == Form("direct", "direct", by_platform=True)
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        several = cheapest(sizes, Target(kind, 4))
        assert dataclasses.replace(open_, by_platform=False) == several
    assert cheapest(dataclasses.replace(sizes, tokens=1), here) is None
    v6e = Target("TPU v6 lite")  # on a TPU the form is that TPU's
    assert cheapest(sizes, dataclasses.replace(v6e, certain=False)) == cheapest(
        sizes, v6e
    )


def test_one_gpu_writes_the_base_first():
    sizes, here = Sizes(8192, 4096, 14336, 16), Target("NVIDIA H100", certain=False)
    assert cheapest(sizes, here) == Form("thin_last", "thin_last", by_platform=True)
    for other in (Target("cpu", certain=False), dataclasses.replace(here, devices=2)):
        assert cheapest(sizes, other) == Form("direct", "direct", by_platform=True)
    assert cheapest(sizes, dataclasses.replace(here, certain=True)) is None


def test_what_is_large():
    assert is_large((1024, 1024), (1024, 1024))
    assert is_large((2, 512, 1024), (1024, 8, 128))
    assert not is_large((1023, 1024), (1024, 1024))
    assert not is_large((4096, 4096), (1023, 1024))


def test_thresholds_are_where_the_docstring_says():
    v6e, v5e = Target("TPU v6 lite"), Target("TPU v5 lite")
    assert cheapest(Sizes(1024, 1024, 1024, 64), v6e) is not None
    for few in ((1023, 1024, 1024, 64), (1024, 1023, 1024, 64), (1024, 1024, 1024, 65)):
        assert cheapest(Sizes(*few), v6e) is None
    fits = Sizes(4096, 4096, 8192, 16)  # 64 MiB of bfloat16 and no byte more
    assert cheapest(fits, v6e) == Form("concat", "direct")
    wider = dataclasses.replace(fits, out=8193)
    assert cheapest(wider, v6e) == Form("thin_first", "thin_last", together=False)
    # A head gives more than seven outputs for each input.
    assert cheapest(Sizes(4096, 4096, 7 * 4096, 16), v5e) == Form("concat", "thin_last")
    assert cheapest(Sizes(4096, 4096, 7 * 4096 + 1, 16), v5e) == Form(
        "concat", "direct"
    )
