"""Logical axis names of parameters, and how they map onto the axes of a mesh.

Every parameter carries a tuple of names, one an axis, in its Flax metadata (`out_sharding`):

    embed      the model width d                     layers     the stack that the scan runs over
    heads      query heads x their width (flat)      kv_heads   key/value heads x their width (flat)
    mlp        the hidden width of the MLP           vocab      the vocabulary
    None       never worth sharding (norm scales, convolution taps, the rank of the gate)

A dictionary of rules says which mesh axis each name goes to; `DEFAULT_RULES` is fully sharded data parallelism over
"fsdp" and tensor parallelism over "tensor". Mesh axes that a mesh does not have are left out, so one dictionary serves
every mesh, and Flax's own `nnx.get_named_sharding` under `nnx.logical_axis_rules(rules)` reads the same metadata.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gla_jax.checks import state_dtype

# Rows from which on products with the same input are made one.
MANY_ROWS = 4096
# Mesh axes along which no layer's outs lie when they are used; fsdp's parts are `gathered` first.
WHOLE_OUTS = ("data", "fsdp", "sequence")

type Axes = tuple[str | None, ...]
type Rules = Mapping[str, str | tuple[str, ...] | None]

DEFAULT_RULES: Rules = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
}
"""Which mesh axis each logical name of a parameter's axes goes to: fully sharded data parallelism over "fsdp", tensor
parallelism over "tensor". Mesh axes that a mesh does not have are left out."""


def _annotated(init: Callable, axes: Axes) -> Callable:
    # eager_sharding=False: a module can be built with no mesh at hand; create_sharded places the parameters.
    # linen_meta_type: through flax.nnx.bridge, a Linen user sees Linen's own box with the same names.
    return nnx.with_partitioning(
        init, axes, eager_sharding=False, sharding_rules=None, linen_meta_type=linen.LogicallyPartitioned
    )


def parameter(init: Callable, shape: tuple[int, ...], axes: Axes, *, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Param:
    """A parameter of `shape` drawn from `init(key, shape, dtype)`, annotated with the logical `axes`."""
    return nnx.Param(_annotated(init, axes)(rngs.params(), shape, param_dtype))


class _Linear(nnx.Linear):
    """nnx.Linear `by_rows`, whose product is rounded after its bias has been added, not before as well."""

    def __call__(self, inputs: jax.Array, **kwargs: Any) -> jax.Array:
        if self.bias is None:
            return by_rows(lambda rows: super(_Linear, self).__call__(rows, **kwargs), inputs)
        kernel, bias = self.kernel[...], self.bias[...]
        dtype = self.dtype or jnp.result_type(inputs, kernel, bias)
        return by_rows(lambda rows: _affine(rows.astype(dtype), kernel.astype(dtype), bias), inputs)


def _add_bias(product: jax.Array, bias: jax.Array, dtype: Any) -> jax.Array:
    wide = state_dtype(dtype)
    return (product.astype(wide) + bias.astype(wide)).astype(dtype)


def _product_and_bias(x: jax.Array, w: jax.Array, bias: jax.Array) -> jax.Array:
    return _add_bias(dot(x, w, preferred_element_type=state_dtype(x.dtype)), bias, x.dtype)


# A rule of its own, since JAX would multiply the float32 cotangent of the unrounded product with w and x as they are.
_affine = jax.custom_jvp(_product_and_bias)


@_affine.defjvp
def _affine_tangent(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, w, _), (dx, dw, dbias) = primals, tangents
    return _product_and_bias(*primals), _add_bias(dot(dx, w) + dot(x, dw), dbias, x.dtype)


def by_rows(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """f(x) for x [..., in] as rows [n, in]: for a weight's gradient XLA's CPU backend would transpose [b, t, in].

    On a mesh of many devices x stays as it is: b and t may both be sharded, and rows would have to be gathered. What
    reads x first in every layer, so that an empty one is refused here.
    """
    if 0 in x.shape:
        raise ValueError(f"x must have no empty axis, got shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return f(x)
    return f(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def dot(x: jax.Array, w: jax.Array, dimension_numbers: Any = None, **options: Any) -> jax.Array:
    """x [..., in] times w [in, out] by `jax.lax.dot_general`; on a GPU, of a single row, in one pass over w."""
    last = (((x.ndim - 1,), (0,)), ((), ()))
    if x.shape[:-1] == (1,) and dimension_numbers in (None, last) and jax.default_backend() == "gpu":
        return _one_row(x[0], w).astype(options.get("preferred_element_type") or x.dtype)[None]
    return jax.lax.dot_general(x, w, dimension_numbers or last, **options)


def _one_row(x: jax.Array, w: jax.Array) -> jax.Array:
    # Of a product with a single row XLA makes three passes over w; a sum it fuses with what w is sliced out of, and one
    # of about 256 rows of w at a time keeps the whole GPU busy. Without the barrier it would make the two sums one.
    parts = next(n for n in (32, 16, 8, 4, 2, 1) if n == 1 or (len(w) % n == 0 and len(w) >= 256 * n))
    x, w = (y.astype(jnp.float32).reshape(parts, -1, *y.shape[1:]) for y in (x, w))
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(x[..., None] * w, 1)), 0)


def side_by_side(layers: Sequence[nnx.Linear], x: jax.Array) -> list[jax.Array]:
    """layer(x) of each of the layers, for x [..., in]; of many rows as one product of [in, all outs].

    That product reads x once, and so do those of the gradients, which also sum up in float32 what is x's. For few
    rows, as in decoding, the time is that of reading weights, and these would be copied. Nor is it one where a mesh
    axis may cut the outs, any but `WHOLE_OUTS`: each device would have some of the layers; nor with a bias, which is
    added before the product is rounded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_types, mesh.axis_sizes, strict=True)
    cuts = any(size > 1 and not (kind == AxisType.Auto and name in WHOLE_OUTS) for name, kind, size in sizes)
    biased = any(layer.bias is not None for layer in layers)
    if x.size < MANY_ROWS * x.shape[-1] or cuts or biased:
        return [layer(x) for layer in layers]
    kernels = [layer.kernel[...] for layer in layers]
    dtype = layers[0].dtype or jax.numpy.result_type(x, *kernels)
    kernel = jax.numpy.concatenate([kernel.astype(dtype) for kernel in kernels], 1)
    y = by_rows(lambda rows: rows.astype(dtype) @ kernel, x)
    ends = itertools.accumulate(kernel.shape[1] for kernel in kernels)
    return jax.numpy.split(y, list(ends)[:-1], -1)


def on_auto_axes(call: Callable[..., Any], module: nnx.Module, *arrays: Any, out_specs: Any) -> Any:
    """call(module, *arrays), for which the partitioner places what is computed even on Explicit mesh axes.

    `out_specs` says how results lie on the Explicit axes that there are; without any it is not read.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return call(module, *arrays)
    graphdef, state = nnx.split(module)

    def run(state: Any, *arrays: Any) -> Any:
        return call(nnx.merge(graphdef, state), *arrays)

    return jax.sharding.auto_axes(run, out_sharding=out_specs)(state, *arrays)


def linear(
    features_in: int,
    features_out: int,
    axes: Axes,
    *,
    bias: bool = False,
    init_std: float,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A Flax linear layer with kernel [in, out] from N(0, init_std^2), bias 0, and annotated `axes`."""
    return _Linear(
        features_in,
        features_out,
        use_bias=bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=_annotated(nnx.initializers.normal(init_std), axes),
        bias_init=_annotated(nnx.initializers.zeros, axes[1:]),
        dot_general=dot,
        rngs=rngs,
    )


def embedding(
    entries: int, features: int, *, init_std: float, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
) -> nnx.Embed:
    """A Flax embedding [entries, features] from N(0, init_std^2), annotated ("vocab", "embed")."""
    init = _annotated(nnx.initializers.normal(init_std), ("vocab", "embed"))
    return nnx.Embed(entries, features, dtype=dtype, param_dtype=param_dtype, embedding_init=init, rngs=rngs)


def param_shardings(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """The sharding of every variable of a model or state on `mesh`, by its logical axis names.

    Args:
      tree: an `nnx.Module` or `nnx.State`, concrete or abstract (`nnx.eval_shape`).
      mesh: the device mesh; a rule that names an axis it lacks does nothing.
      rules: logical axis name -> mesh axis, tuple of mesh axes, or None for replicated.

    Returns:
      The state's tree with a `NamedSharding` in place of every array.

    Raises:
      ValueError: if a parameter has a name without a rule, or an axis that its mesh axes do not divide.
    """
    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree

    def place(path: Any, variable: nnx.Variable) -> nnx.Variable:
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = variable.get_value().shape
        names = variable.get_metadata().get("out_sharding") or (None,) * len(shape)
        spec = []
        for size, name in zip(shape, names, strict=True):
            if name is not None and name not in rules:
                raise ValueError(f"rules: no entry for the logical axis {name!r} of {where}; have {sorted(rules)}")
            rule = rules[name] if name is not None else None
            wanted = (rule,) if isinstance(rule, str) else rule or ()
            present = tuple(axis for axis in wanted if axis in mesh.shape)
            parts = 1
            for axis in present:
                parts *= mesh.shape[axis]
            if size % parts:
                raise ValueError(f"mesh: axis {name!r} of {where} has {size} entries, not a multiple of {parts}")
            spec.append(present[0] if len(present) == 1 else present or None)
        return variable.replace(NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def gathered(state: Any, rules: Rules = DEFAULT_RULES, *, sum_first: bool = False) -> Any:
    """Parameters about to be used, whole along "fsdp" axes of the mesh in use; their gradients go back in parts.

    Without this the partitioner is free to gather activations in place of parameters.

    Args:
      state: the state of a module, or of one layer taken from a stack.
      rules: as in `param_shardings`.
      sum_first: whether gradients are summed over the devices before they are cut. A product's are cut as they are
        summed (a reduce-scatter, half of what is sent); a scatter's cotangents would be moved to where its parts are,
        and a loop's sums cut at each turn.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("fsdp", 1) == 1 or AxisType.Explicit in mesh.axis_types:
        return state

    def place(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        names = (variable.get_metadata().get("out_sharding") or ())[-value.ndim :]
        parts = [rules[name] if name is not None else None for name in names]
        present = [part if part in mesh.shape else None for part in parts]
        whole = [None if part == "fsdp" else part for part in present]
        if whole == present:
            return variable
        return variable.replace(_gather(value, PartitionSpec(*whole), PartitionSpec(*present), sum_first))

    return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, whole: PartitionSpec, parts: PartitionSpec, sum_first: bool) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, whole)


def _gather_forward(
    x: jax.Array, whole: PartitionSpec, parts: PartitionSpec, sum_first: bool
) -> tuple[jax.Array, None]:
    return _gather(x, whole, parts, sum_first), None


def _gather_backward(
    whole: PartitionSpec, parts: PartitionSpec, sum_first: bool, _: None, ct: jax.Array
) -> tuple[jax.Array]:
    ct = jax.lax.with_sharding_constraint(ct, whole) if sum_first else ct
    return (jax.lax.with_sharding_constraint(ct, parts),)


_gather.defvjp(_gather_forward, _gather_backward)


def create_sharded[M: nnx.Module](make: Callable[[], M], mesh: Mesh, rules: Rules = DEFAULT_RULES) -> M:
    """Build `make()` with every parameter born on its own devices of the mesh, as the rules say, never whole on one.

    `create_sharded(lambda: GLAForCausalLM(config, rngs=nnx.Rngs(0)), mesh)`
    """
    # Not nnx.eval_shape, which reads the logical names as mesh axes if a mesh is set.
    graphdef, abstract = jax.eval_shape(lambda: nnx.split(make()))
    shardings = param_shardings(abstract, mesh, rules)
    state = jax.jit(lambda: nnx.state(make()), out_shardings=shardings)()
    return nnx.merge(graphdef, state)
