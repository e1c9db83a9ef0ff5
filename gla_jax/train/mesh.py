"""The mesh of a run: its axes, what they must divide, and how batches and the training state lie on it."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gla_jax.nn import GatedLinearAttentionConfig, GLAConfig
from gla_jax.train.config import InputError, TrainConfig

AXES = ("data", "fsdp", "tensor", "sequence")
# The axes that the rows of a batch, and the tokens of a row, are sharded over.
ROWS, TIME = ("data", "fsdp"), "sequence"


def make_mesh(config: TrainConfig) -> Mesh:
    """The mesh that config.mesh describes, of the first devices there are; of all of them in a run of many processes.

    Raises:
      InputError: if there are not as many devices, or an axis does not divide what is sharded over it.
    """
    sizes, count = config.mesh, jax.device_count()
    rows, others = config.batch // config.accumulate, sizes.fsdp * sizes.tensor * sizes.sequence
    data = sizes.data
    if data is None:
        fitting = [n for n in range(1, count // others + 1) if rows % (n * sizes.fsdp) == 0]
        data = max(fitting, default=1)
    shape = (data, sizes.fsdp, sizes.tensor, sizes.sequence)
    size = data * others
    text = " x ".join(map(str, shape))
    if size > count or (jax.process_count() > 1 and size != count):
        allowed = "all of them" if jax.process_count() > 1 else "at most as many"
        raise InputError(
            f"argument --mesh: data x fsdp x tensor x sequence = {text} are {size} devices; there are {count}, "
            f"and it must be {allowed}"
        )
    model = config.model
    if sizes.sequence > 1 and {type(mixer) for mixer in model.mixers} != {GatedLinearAttentionConfig}:
        raise InputError(f"argument --mesh.sequence: must be 1 but for gated linear attention, got {sizes.sequence}")
    prefix, heads = "--model." if isinstance(model, GLAConfig) else "--model.mixer.", []
    for mixer in model.mixers:
        queries = getattr(mixer, "num_heads", sizes.tensor)
        heads.append(("tensor", sizes.tensor, f"{prefix}num-heads", queries))
        keys = getattr(mixer, "num_kv_heads", None)
        heads.append(("tensor", sizes.tensor, f"{prefix}num-kv-heads", queries if keys is None else keys))
    for axes, parts, flag, whole in (
        ("data x fsdp", data * sizes.fsdp, "--batch / --accumulate", rows),
        ("sequence", sizes.sequence, "--length", config.length),
        *heads,
        ("tensor", sizes.tensor, "the width of the MLP", model.mlp_width),
        ("tensor", sizes.tensor, "--model.vocab-size", model.vocab_size),
        ("fsdp", sizes.fsdp, "--model.hidden-size", model.hidden_size),
    ):
        if whole % parts:
            raise InputError(f"argument --mesh: {axes} = {parts} must divide {flag} = {whole}")
    taps = max(getattr(mixer, "conv_size", 0) for mixer in model.mixers)
    if sizes.sequence > 1 and config.length // sizes.sequence < taps - 1:
        least = sizes.sequence * (taps - 1)
        raise InputError(f"argument --length: must be at least {least} for the convolutions, got {config.length}")
    kind = AxisType.Auto if sizes.axes == "auto" else AxisType.Explicit
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * len(AXES), devices=jax.devices()[:size])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch [b, t] lies: its rows over data and fsdp, its time over sequence."""
    return NamedSharding(mesh, PartitionSpec(ROWS, TIME))


def like_params(tree: Any, params: Any, shardings: Any, otherwise: NamedSharding) -> Any:
    """The shardings of an optimizer's state: a leaf that is laid out as a parameter lies where the parameter does.

    Args:
      tree: the state; any leaf whose path ends in a parameter's path and that has its shape belongs to it.
      params: the parameters, a dict of arrays or shapes.
      shardings: theirs, in the same tree.
      otherwise: of all other leaves.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    known = {path: (x.shape, s) for (path, x), s in zip(leaves, jax.tree.leaves(shardings), strict=True)}

    def place(path: Any, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = known.get(path[start:], (None, otherwise))
            if shape == leaf.shape:
                return sharding
        return otherwise

    return jax.tree_util.tree_map_with_path(place, tree)
