"""Every difference between JAX versions, and every use of `jax.extend`.

Differences are told apart by features, never by version numbers.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex  # noqa: TID251
import jax.extend.source_info_util as source_info_util  # noqa: TID251
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives  # noqa: TID251

Eqn = Any
Jaxpr = Any
Literal = jex.Literal
Primitive = jex.Primitive

TESTED = "flora is tested with JAX 0.10.2 to 0.12: install one of these."


# For `jax.jit(inline=)`: operations stand in the caller's place from tracing on.  From
# JAX 0.11 on, True means that they do so once they are lowered.
INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True  # pyright: ignore


def _primitive_of(fn: Callable) -> Primitive:
    """The primitive that a public function binds, for those with no public name."""
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    return jax.make_jaxpr(fn)(x).eqns[-1].primitive


def _named(name: str) -> Primitive:
    """A primitive by its public name."""
    if not hasattr(primitives, name):
        raise ImportError(f"JAX {jax.__version__} has no {name}. {TESTED}")
    return getattr(primitives, name)


def _shard_map_primitives() -> tuple[Primitive, Primitive]:
    """`shard_map`, and what marks a value inside it as varying over a mesh axis."""
    mesh = jax.sharding.AbstractMesh((1,), ("i",))
    spec = jax.sharding.PartitionSpec
    fn = jax.shard_map(
        lambda x: lax.pcast(x, "i", to="varying"),
        mesh=mesh,
        in_specs=spec(),
        out_specs=spec("i"),
    )
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    (eqn,) = jax.make_jaxpr(fn)(x).eqns
    inner, _ = open_jaxpr(eqn.params["jaxpr"])
    return eqn.primitive, inner.eqns[0].primitive


def _reshard_primitive() -> Primitive:
    """What `jax.sharding.reshard` binds, which needs a mesh."""
    mesh = jax.sharding.AbstractMesh(
        (1,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,)
    )
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    return _primitive_of(lambda x: jax.sharding.reshard(x, sharding))


def open_jaxpr(jaxpr: Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """`(jaxpr, consts)` of an open or closed jaxpr (one type from JAX 0.12)."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


class P:
    """The primitives that flora has rules for."""

    dot_general = _named("dot_general_p")
    conv_general_dilated = _named("conv_general_dilated_p")
    gather = _named("gather_p")
    transpose = _named("transpose_p")
    reshape = _named("reshape_p")
    broadcast_in_dim = _named("broadcast_in_dim_p")
    squeeze = _named("squeeze_p")
    reduce_sum = _named("reduce_sum_p")
    slice = _named("slice_p")
    dynamic_slice = _named("dynamic_slice_p")
    rev = _named("rev_p")
    concatenate = _named("concatenate_p")
    convert_element_type = _named("convert_element_type_p")
    reduce_precision = _named("reduce_precision_p")
    copy = _named("copy_p")
    device_put = _named("device_put_p")
    sharding_constraint = _named("sharding_constraint_p")
    checkpoint_name = _named("name_p")
    stop_gradient = _named("stop_gradient_p")
    optimization_barrier = _primitive_of(lambda x: lax.optimization_barrier(x))
    split = _primitive_of(lambda x: lax.split(x, (1, 1)))
    stack = _primitive_of(lambda x: jnp.stack([x, x]))
    tile = _primitive_of(lambda x: jnp.tile(x, 2))
    add = _named("add_p")
    add_any = _named("add_jaxvals_p")
    sub = _named("sub_p")
    complex = _named("complex_p")
    pad = _named("pad_p")
    square = _named("square_p")
    integer_pow = _named("integer_pow_p")
    exp = _named("exp_p")
    exp2 = _named("exp2_p")
    logistic = _named("logistic_p")
    eq = _named("eq_p")
    iota = _named("iota_p")
    scatter = _named("scatter_p")
    scatter_add = _named("scatter_add_p")
    mul = _named("mul_p")
    div = _named("div_p")
    neg = _named("neg_p")
    jit = _named("jit_p")
    remat = _named("remat_p")
    scan = _named("scan_p")
    while_ = _named("while_p")
    cond = _named("cond_p")
    custom_jvp_call = _named("custom_jvp_call_p")
    custom_vjp_call = _named("custom_vjp_call_p")
    shard_map, pvary = _shard_map_primitives()
    all_gather = _named("all_gather_p")
    reshard = _reshard_primitive()
    ragged_dot_general = _primitive_of(
        lambda x: lax.ragged_dot(x[None], x[None, :, None], jnp.ones(1, jnp.int32))
    )


# Where a weight meets activations, and what comes out is one no more.
PRODUCTS = {P.dot_general, P.conv_general_dilated, P.ragged_dot_general, P.gather}

# What the rules understand, and with a star what they read.  A parameter that is not
# listed could change what the operation means, so the rule is not applied.
_PARAMS = {
    P.dot_general: "*dimension_numbers out_sharding *precision preferred_element_type",
    P.conv_general_dilated: (
        "*batch_group_count *dimension_numbers *feature_group_count *lhs_dilation "
        "*out_sharding *padding *precision preferred_element_type *rhs_dilation "
        "*window_strides"
    ),
    P.gather: (
        "*dimension_numbers fill_value indices_are_sorted *mode *slice_sizes "
        "unique_indices"
    ),
    P.ragged_dot_general: (
        "*group_offset out_sharding *precision preferred_element_type "
        "*ragged_dot_dimension_numbers"
    ),
    P.transpose: "*permutation",
    P.reshape: "*dimensions *new_sizes sharding",
    P.broadcast_in_dim: "*broadcast_dimensions *shape sharding",
    P.squeeze: "*dimensions",
    P.reduce_sum: "*axes out_sharding",
    P.slice: "*limit_indices *start_indices *strides",
    P.dynamic_slice: "*slice_sizes",
    P.split: "*axis *sizes",
    P.rev: "*dimensions",
    P.concatenate: "*dimension",
    P.stack: "*axis",
    P.tile: "*reps",
    P.add: "",
    P.add_any: "",
    P.sub: "",
    P.complex: "",
    P.pad: "*padding_config",
    P.square: "",
    P.integer_pow: "*y",
    P.mul: "out_dtype",
    P.div: "",
    P.neg: "",
    P.convert_element_type: "*new_dtype sharding weak_type",
    P.reduce_precision: "exponent_bits mantissa_bits",
    P.copy: "",
    P.device_put: "copy_semantics devices srcs",
    P.sharding_constraint: "context_mesh layout sharding unconstrained_dims",
    P.checkpoint_name: "name",
    P.pvary: "axes",
    P.reshard: "concrete_mesh *dst_sharding",
    P.all_gather: (
        "*all_gather_dimension *axis_index_groups *axis_name *axis_size *tiled"
    ),
    P.stop_gradient: "",
    P.optimization_barrier: "",
    P.jit: (
        "compiler_options_kvs ctx_mesh donated_invars in_layouts *in_shardings *inline "
        "*jaxpr *keep_unused *name out_layouts *out_shardings"
    ),
    P.remat: "differentiated *jaxpr *policy *prevent_cse",
    P.scan: (
        "_split_transpose ft_in ft_out *jaxpr length linear num_carry num_consts "
        "reverse unroll"
    ),
    P.while_: "*body_jaxpr *body_nconsts *cond_jaxpr *cond_nconsts",
    P.cond: "*branches branches_platforms",
    P.custom_jvp_call: "*call_jaxpr jvp_jaxpr_fun num_consts symbolic_zeros",
    P.custom_vjp_call: (
        "bwd *call_jaxpr fwd_jaxpr_thunk num_consts out_trees symbolic_zeros"
    ),
    P.shard_map: "*check_vma *in_specs *jaxpr *mesh *newly_manual_axes *out_specs",
}
_KNOWN = {p: frozenset(text.replace("*", "").split()) for p, text in _PARAMS.items()}
_READ = {
    p: frozenset(name[1:] for name in text.split() if name.startswith("*"))
    for p, text in _PARAMS.items()
}


def unlike_known(eqn: Eqn) -> str:
    """What of an equation's parameters its rule does not understand; '' if nothing."""
    given = eqn.params.keys()
    if unknown := given - _KNOWN[eqn.primitive]:
        return f"the parameters {sorted(unknown)}"
    if missing := _READ[eqn.primitive] - given:
        return f"no parameter {min(missing)!r}"
    return ""


def eval_eqns(eqns: Sequence[Eqn], outvars: Sequence[Any], env: dict) -> list[Any]:
    """Evaluates equations as JAX would, from the values that `env` holds.

    The equations travel to `jax.core.eval_jaxpr` inside a small jaxpr of their own,
    so that nothing is re-bound by hand and parameters, name stacks and source lines
    survive.
    """
    defined: set[Any] = set()
    invars: dict[Any, None] = {}
    for eqn in eqns:
        for v in eqn.invars:
            if not isinstance(v, Literal) and v not in defined:
                invars[v] = None
        defined.update(eqn.outvars)
    if not eqns:
        return []
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    names = jex.DebugInfo("flora", "flora", ("",) * len(invars), ("",) * len(outvars))
    jaxpr = jex.Jaxpr((), list(invars), list(outvars), list(eqns), effects, names)
    return jax.core.eval_jaxpr(jaxpr, (), *(env[v] for v in invars))


def eval_eqn(eqn: Eqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on other values, inside its already entered scope."""
    env = {
        v: x
        for v, x in zip(eqn.invars, values, strict=True)
        if not isinstance(v, Literal)
    }
    return eval_eqns([unnamed(eqn)], eqn.outvars, env)


def unnamed(eqn: Eqn) -> Eqn:
    """The equation without names of its own, to be named by what is around it."""
    bare = eqn.source_info.replace(name_stack=source_info_util.new_name_stack())
    return eqn.replace(source_info=bare)


@contextlib.contextmanager
def eqn_scope(eqn: Eqn, depth: int | None = None) -> Iterator[None]:
    """Gives what runs inside the equation's name stack, source line and mesh.

    Of the name stack only the outer `depth` names, if that is given.
    """
    own = eqn.source_info.name_stack[:depth]
    stack = source_info_util.current_name_stack() + own
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        yield


def _shared_names(eqns: Sequence[Eqn]) -> int:
    """How many names the equations' name stacks have in common, from the outside."""
    stacks = [eqn.source_info.name_stack.stack for eqn in eqns]
    n = min(map(len, stacks))
    return next((i for i in range(n) if len({s[i] for s in stacks}) > 1), n)


def common_scope(eqns: Sequence[Eqn]) -> contextlib.AbstractContextManager:
    """Gives what runs inside the names that all the equations have in common."""
    return eqn_scope(eqns[0], _shared_names(eqns))


def relative_scopes(eqns: Sequence[Eqn]) -> list[str]:
    """The equations' names within those that they have in common."""
    n = _shared_names(eqns)
    return [str(eqn.source_info.name_stack[n:]) for eqn in eqns]


def variables(atoms: Iterable[Any]) -> Iterator[Any]:
    """Those that are not literals."""
    return (v for v in atoms if not isinstance(v, Literal))


@dataclasses.dataclass(frozen=True)
class ScanParts:
    """What a scan equation does, whatever its parameters are called."""

    jaxpr: Jaxpr
    num_consts: int
    num_carry: int
    options: dict[str, Any]


_SCAN_OPTIONS = tuple(
    name
    for name in ("length", "reverse", "unroll", "_split_transpose")
    if name in inspect.signature(lax.scan).parameters
)


def scan_parts(eqn: Eqn) -> ScanParts:
    """Reads a scan equation (`num_consts`/`num_carry` became `ft_in` in JAX 0.11)."""
    params = eqn.params
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:
        consts, carry, _ = (len(list(part)) for part in params["ft_in"].unpack())
    options = {k: params[k] for k in _SCAN_OPTIONS if k in params}
    return ScanParts(params["jaxpr"], consts, carry, options)


@dataclasses.dataclass(frozen=True)
class Inner:
    """A function inside an equation: its inputs are the equation's from `first` on.

    A loop's function returns what it carries first, and takes it after its constants.
    """

    jaxpr: Jaxpr
    first: int = 0
    num_consts: int = 0
    num_carry: int = 0


def inner_functions(eqn: Eqn) -> list[Inner]:
    """The functions that an equation calls; none for most."""
    p = eqn.params
    if eqn.primitive is P.scan:
        parts = scan_parts(eqn)
        return [Inner(parts.jaxpr, 0, parts.num_consts, parts.num_carry)]
    if eqn.primitive is P.while_:
        carry = len(eqn.outvars)
        return [Inner(p["body_jaxpr"], p["cond_nconsts"], p["body_nconsts"], carry)]
    if eqn.primitive is P.cond:
        return [Inner(branch, 1) for branch in p["branches"]]
    if eqn.primitive in (P.custom_jvp_call, P.custom_vjp_call):
        return [Inner(p["call_jaxpr"])]
    if eqn.primitive in (P.jit, P.remat, P.shard_map):
        return [Inner(p["jaxpr"])]
    return []


def has_experts(eqn: Eqn) -> bool:
    """Whether an equation, or one inside of it, is a product with experts."""
    if eqn.primitive is P.ragged_dot_general:
        return True
    inner = (open_jaxpr(function.jaxpr)[0] for function in inner_functions(eqn))
    return any(has_experts(e) for jaxpr in inner for e in jaxpr.eqns)


def handed_on(jaxpr: Jaxpr) -> list[int | None]:
    """For each output of a jaxpr the input that it is, or `None`."""
    jaxpr, _ = open_jaxpr(jaxpr)
    same = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        inner = inner_functions(eqn)
        if len(inner) != 1 or eqn.primitive is P.shard_map:
            continue
        (function,) = inner
        through = handed_on(function.jaxpr)
        if eqn.primitive in (P.scan, P.while_):  # what every step hands on in its place
            at, n = function.num_consts, function.num_carry
            through = [
                i if i is not None and (i - at == k or min(i - at, k) >= n) else None
                for k, i in enumerate(through)
            ]
        for v, i in zip(eqn.outvars, through, strict=True):
            source = None if i is None else eqn.invars[function.first + i]
            if (
                source is not None
                and not isinstance(source, Literal)
                and source in same
            ):
                same[v] = same[source]
    return [None if isinstance(v, Literal) else same.get(v) for v in jaxpr.outvars]


def may_return(jaxpr: Jaxpr, marked: Sequence[bool]) -> bool:
    """Whether an output may be a view of a marked input: no product between."""
    jaxpr, _ = open_jaxpr(jaxpr)
    seen = {v for v, m in zip(jaxpr.invars, marked, strict=True) if m}
    for eqn in jaxpr.eqns:
        touched = any(not isinstance(v, Literal) and v in seen for v in eqn.invars)
        if touched and eqn.primitive not in PRODUCTS:
            seen.update(eqn.outvars)
    return any(not isinstance(v, Literal) and v in seen for v in jaxpr.outvars)


def jit_like(eqn: Eqn, fn: Callable) -> Callable:
    """`fn` jitted with the name and options of a jit equation.

    The caller adds shardings, since only it knows which arguments stayed plain.
    """
    fn.__name__ = fn.__qualname__ = eqn.params["name"]
    options = {"inline": eqn.params["inline"]} if eqn.params["inline"] else {}
    compiler = dict(eqn.params.get("compiler_options_kvs", ()))
    return jax.jit(
        fn,
        keep_unused=eqn.params["keep_unused"],
        compiler_options=compiler or None,
        **options,
    )
