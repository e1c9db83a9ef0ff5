"""Prompts that have been read: their state has a constant size, so it is cheap to keep, copy and save."""

import functools
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from gla_jax import files
from gla_jax.array_types import Array
from gla_jax.nn.softmax_attention import check_room


class PromptState(NamedTuple):
    """What a model keeps of a batch of prompts, to go on from any number of times.

    logits: [b, vocab] of the token after each.
    cache: the model's cache there, every leaf [layers, b, ...].
    """

    logits: Float[Array, "b vocab"]
    cache: Any


def read_prompt(
    model: nnx.Module,
    prompt: Any,
    *,
    state: PromptState | None = None,
    prompt_lengths: Any = None,
    prefill_chunk: int = 2048,
) -> PromptState:
    """Read prompts [b, t], after what `state` has read if it is given; arguments and errors as in `generate`."""
    prompt, lengths = checked_prompt(model, prompt, prompt_lengths, prefill_chunk)
    if state is not None:
        check_state("state", model, state, prompt.shape[0])
    limit, cache = cast(Any, model).config.cache_limit, None if state is None else state.cache
    check_room("prompt", limit, cache, longest(prompt, lengths))
    graphdef, params = nnx.split(model)
    return _read(graphdef, params, prompt, lengths, cache, prefill_chunk)


def save_state(path: Path | str, state: PromptState) -> None:
    """Write a state to one safetensors file, `path`; `load_state` reads it for a model of the same config."""
    files.write(Path(path), {name: np.asarray(x) for name, x in _named(state).items()})


def load_state(path: Path | str, model: nnx.Module) -> PromptState:
    """The state in the file `path` that `save_state` wrote, for a model of the same config.

    Raises:
      CheckpointError: the file is no safetensors file, or not of a model like this one.
    """
    there = files.open_checkpoint(Path(path))
    batch = there["logits"].shape[0] if "logits" in there and len(there["logits"].shape) == 2 else 1
    abstract = _abstract(model, batch)
    named = _named(abstract)
    for name in sorted(named.keys() | there.keys()):
        ours, theirs = (f"{x[name].dtype} {list(x[name].shape)}" if name in x else "absent" for x in (named, there))
        if ours != theirs:
            raise files.CheckpointError(f"{path}: {name} is {theirs} there, and {ours} in this model")
    leaves = [jnp.asarray(there[name].read()) for name in named]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def checked_prompt(model: Any, prompt: Any, lengths: Any, prefill_chunk: Any) -> tuple[Array, Array | None]:
    """The prompt [b, t] as int32 and its lengths, or a ValueError that names what is wrong."""
    given, prompt = prompt, _as_array("prompt", prompt, "[b, t]")
    if prompt.ndim != 2 or 0 in prompt.shape or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(f"prompt: must be integers [b, t], b and t >= 1, got {prompt.dtype} {list(prompt.shape)}")
    check_count("prefill_chunk", prefill_chunk)
    if lengths is not None:
        lengths, (b, t) = _as_array("prompt_lengths", lengths, "[b]"), prompt.shape
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"prompt_lengths: must be integers, got {lengths.dtype}")
        if lengths.shape != (b,):
            raise ValueError(f"prompt_lengths: must have shape [b] = [{b}], got {list(lengths.shape)}")
        if not isinstance(lengths, jax.core.Tracer) and (lengths.min() < 1 or lengths.max() > t):
            raise ValueError(f"prompt_lengths: must be from 1 to t = {t}, got {lengths.tolist()}")
    # Not what JAX has made of it: without 64 bits it cuts integers off.
    if not any(isinstance(x, jax.core.Tracer) for x in (given, lengths)) and prompt.is_fully_addressable:
        padding = 0 if lengths is None else prompt.shape[1] - np.asarray(lengths)[:, None]
        check_tokens(
            "prompt", model, np.asarray(given)[np.broadcast_to(np.arange(prompt.shape[1]) >= padding, prompt.shape)]
        )
    return prompt.astype(jnp.int32), lengths


def check_tokens(name: str, model: Any, tokens: np.ndarray) -> None:
    """A ValueError unless all are tokens of the model."""
    size = model.config.vocab_size
    if tokens.min() < 0 or tokens.max() >= size:
        raise ValueError(f"{name}: tokens must be from 0 to {size - 1}, got {tokens.min()} to {tokens.max()}")


def _as_array(name: str, x: Any, letters: str) -> Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):  # text, or rows of different lengths
        raise ValueError(f"{name}: must be an array of integers {letters}, got {x!r:.60}") from None


def longest(prompt: Array, lengths: Array | None) -> int:
    """Tokens of the longest prompt; 1 if that is traced."""
    if lengths is None:
        return prompt.shape[1]
    return 1 if isinstance(lengths, jax.core.Tracer) else int(lengths.max())


def check_state(name: str, model: Any, state: Any, batch: int | None = None) -> None:
    """A ValueError unless the state is of a model like this one, and of so many rows."""
    if not isinstance(state, PromptState):
        raise ValueError(f"{name}: must be a PromptState, got {type(state).__name__}")
    rows = state.logits.shape[0] if batch is None else batch
    logits: Any = jax.ShapeDtypeStruct((rows, model.config.vocab_size), jnp.float32)
    ours, theirs = map(_named, (PromptState(logits, jax.eval_shape(lambda: model.init_cache(rows))), state))
    for key in sorted(ours.keys() | theirs.keys()):
        want, got = (list(x[key].shape) if key in x else "absent" for x in (ours, theirs))
        if want != got:
            raise ValueError(f"{name}: must be a state of this model, whose {key} is {want}, got {got}")


def check_count(name: str, value: Any) -> None:
    """A ValueError unless it is an integer of at least 1."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name}: must be at least 1, got {value!r}")


def is_integer(x: Any) -> bool:
    """Whether it is a whole number of Python's or numpy's."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def prefill_in_pieces(model: Any, prompt: Array, lengths: Array | None, cache: Any, piece: int) -> tuple[Array, Any]:
    """Logits [b, vocab] after the prompts and the cache there, reading at most `piece` tokens at a time."""
    b, t = prompt.shape
    cache = model.init_cache(b) if cache is None else cache
    pieces = -(-t // piece)
    if pieces == 1 and lengths is None:
        return model.prefill(prompt, cache)
    if pieces > 1:
        prompt = jnp.pad(prompt, ((0, 0), (pieces * piece - t, 0)))
    width = prompt.shape[1]
    ids = jnp.where(jnp.arange(width) < width - (t if lengths is None else lengths[:, None]), -1, 0)
    ids = jnp.broadcast_to(ids, prompt.shape)
    if pieces == 1:
        return model.prefill(prompt, cache, ids)

    def read(carry: tuple[Array, Any], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Any], None]:
        return model.prefill(inputs[0], carry[1], inputs[1]), None

    def by_piece(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(b, pieces, piece), 1, 0)

    xs = (by_piece(prompt), by_piece(ids))
    logits = jax.eval_shape(model.step, prompt[:, 0], cache)[0]
    return jax.lax.scan(read, (jnp.zeros(logits.shape, logits.dtype), cache), xs)[0]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _read(graphdef, params, prompt, lengths, cache, piece):
    return PromptState(*prefill_in_pieces(nnx.merge(graphdef, params), prompt, lengths, cache, piece))


def _abstract(model: Any, batch: int) -> PromptState:
    def start() -> PromptState:
        cache = model.init_cache(batch)
        return PromptState(*model.step(jnp.zeros((batch,), jnp.int32), cache))

    return jax.eval_shape(start)


def _named(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
