"""The language model: embedding, a stack of blocks under a scan, norm, logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from gla_jax.array_types import Array, Ids
from gla_jax.nn.block import Block
from gla_jax.nn.config import NORMS, GLAConfig, ModelConfig
from gla_jax.nn.recurrent import MixerConfig, RecurrentLayer
from gla_jax.nn.sharding import by_rows, dot, embedding, gathered, linear, on_auto_axes, parameter
from gla_jax.nn.softmax_attention import check_room
from gla_jax.step import Stacked


class CausalLM(nnx.Module):
    """A causal language model of blocks whose mixers its config names (arXiv 2312.06635, section 4.4).

        logits = norm(blocks(E[tokens])) W        (W = E^T if config.tie_embeddings)

    The parameters of all blocks are stacked on a leading "layers" axis and the blocks run under a scan, so compile time
    does not grow with depth; a pattern of several mixers makes a stack for each of its places, and the scan runs over
    repeats of the pattern. Logits are float32 whatever `config.dtype` is.

    The cache is a plain pytree, the stacked caches of the blocks (a tuple of them for a pattern); `prefill` then
    `step`s give the logits of one call over the whole sequence. Its size does not depend on how much it has seen.

    Args:
      config: shapes, options and dtypes: a `CausalLMConfig`, or a `GLAConfig`.
      rngs: of the initial parameters.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        weights = {"init_std": config.init_std, **common}
        norm = NORMS[config.norm]
        self.embed = embedding(config.vocab_size, config.hidden_size, **weights)
        self.embed_norm: Any = nnx.data(None)
        if config.embed_norm:
            self.embed_norm = norm(config.hidden_size, eps=config.norm_eps, **common)
        self.lower_bounds: Any = nnx.data(None)
        if any(mixer.layer_input == "lower_bound" for mixer in config.mixers):
            shape, axes = (config.num_layers, config.hidden_size), (None, "embed")
            self.lower_bounds = parameter(nnx.initializers.zeros, shape, axes, param_dtype=param_dtype, rngs=rngs)
        repeats = config.num_layers // len(config.mixers)

        def stacked(mixer: MixerConfig) -> Block:
            @nnx.split_rngs(splits=repeats)
            @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
            def stack(rngs: nnx.Rngs) -> Block:
                return Block(config, mixer, rngs=rngs)

            return stack(rngs)

        stacks = [stacked(mixer) for mixer in config.mixers]
        self.layers: Any = stacks[0] if len(stacks) == 1 else nnx.List(stacks)
        self.norm = norm(config.hidden_size, eps=config.norm_eps, **common)
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, ("embed", "vocab"), **weights)

    def __call__(self, tokens: Int[Array, "b t"], segment_ids: Ids | None = None) -> Float[Array, "b t vocab"]:
        """Logits [b, t, vocab], float32, of the token after each of tokens [b, t].

        Args:
          tokens: [b, t], in 0 <= token < vocab_size (not checked: other values are clamped).
          segment_ids: [b, t]; at any change of id a new document starts that sees nothing of the one before, and
            negative ids are padding, which no other token sees. Padding must not lie inside a document.
        """

        def run(model: CausalLM, tokens: Array, ids: Array | None) -> Array:
            return model.logits(model.hidden(tokens, ids))

        return on_auto_axes(run, self, tokens, segment_ids, out_specs=_like(tokens, None))

    def hidden(self, tokens: Int[Array, "b t"], segment_ids: Ids | None = None) -> Float[Array, "b t d"]:
        """The normalised activations [b, t, d] that `logits` reads: for a loss that never holds all logits at once.

        tokens [b, t] and segment_ids [b, t] are those of a call.
        """

        def run(model: CausalLM, tokens: Array, ids: Array | None) -> Array:
            x, _ = model._scan(lambda x, block, own: (block(x, ids, own), None), model._embed(tokens))
            return model.norm(x)

        return on_auto_axes(run, self, tokens, segment_ids, out_specs=_like(tokens, None))

    def hidden_after(
        self, tokens: Int[Array, "b t"], cache: Any, segment_ids: Ids | None = None
    ) -> tuple[Float[Array, "b t d"], Any]:
        """`hidden` of tokens [b, t] that follow what the cache has seen, and the cache after them.

        The arguments are those of `CausalLM.prefill`; padding may lie at the right, and at the left while the cache is
        empty.
        """
        if segment_ids is None:
            check_room("tokens", self.config.cache_limit, cache, tokens.shape[1])

        def run(model: CausalLM, tokens: Array, cache: Any, ids: Array | None) -> tuple[Array, Any]:
            caches = cache if len(model._stacks()) > 1 else (cache,)
            prefill = lambda x, block, own, cache: block.prefill(x, cache, ids, own)
            x, caches = model._scan(prefill, model._embed(tokens), caches)
            return model.norm(x), model._join(caches)

        out_specs = (_like(tokens, None), _specs(cache))
        return on_auto_axes(run, self, tokens, cache, segment_ids, out_specs=out_specs)

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows vocab"]:
        """Float32 logits [..., vocab] from what `hidden` returns."""

        def run(model: CausalLM, hidden: Array) -> Array:
            weight = model.output_weight(hidden.dtype)
            return by_rows(lambda rows: dot(rows, weight, preferred_element_type=jnp.float32), hidden)

        return on_auto_axes(run, self, hidden, out_specs=_like(hidden))

    def output_weight(self, dtype: Any) -> Float[Array, "d vocab"]:
        """The output layer's weight W [d, vocab] in `dtype`, on one device or Auto mesh axes."""
        weight = _whole(self.embed).embedding[...].T if self.lm_head is None else _whole(self.lm_head).kernel[...]
        return weight.astype(dtype)

    def init_cache(self, batch_size: int) -> Any:
        """The cache before the first token of batch_size sequences: zeros, every leaf [layers, b, ...]."""
        repeats = self.config.num_layers // len(self.config.mixers)

        def of(stack: Block) -> Any:
            graphdef, params = nnx.split(stack)

            def first(params: Any) -> Any:
                return nnx.merge(graphdef, jax.tree.map(lambda p: p[0], params)).init_cache(batch_size)

            shapes = jax.eval_shape(first, params)
            return jax.tree.map(lambda s: jnp.zeros((repeats, *s.shape), s.dtype), shapes)

        return self._join([of(stack) for stack in self._stacks()])

    def prefill(
        self, tokens: Int[Array, "b t"], cache: Any, segment_ids: Ids | None = None
    ) -> tuple[Float[Array, "b vocab"], Any]:
        """Read tokens [b, t] after what the cache has seen, in parallel over time.

        Args:
          tokens: [b, t].
          cache: from `init_cache`, `prefill` or `step`.
          segment_ids: [b, t]; a negative id is padding, anywhere: prompts of different lengths stand in one batch, at
            either side. Other ids as in a call; the cache enters the first segment and is that of the last.

        Returns:
          Logits [b, vocab] after the last token of each row that is not padding, and the cache there. A row of nothing
          but padding keeps its cache; its logits mean nothing.

        Raises:
          ValueError: more tokens than the cache of `SoftmaxAttention` without a window holds, if their number is known.
        """
        if segment_ids is None:
            check_room("tokens", self.config.cache_limit, cache, tokens.shape[1])
        out_specs = (PartitionSpec(_like(tokens)[0], None), _specs(cache))
        return on_auto_axes(CausalLM._prefill, self, tokens, cache, segment_ids, out_specs=out_specs)

    def _prefill(self, tokens: Array, cache: Any, segment_ids: Ids | None) -> tuple[Array, Any]:
        last = jnp.full((tokens.shape[0],), tokens.shape[1] - 1)
        if segment_ids is not None:
            # Padding goes to the right: then every token's neighbours, for the convolutions, are its document's own.
            order = jnp.argsort(segment_ids < 0, axis=1, stable=True)
            tokens, segment_ids = (jnp.take_along_axis(x, order, 1) for x in (tokens, segment_ids))
            last = jnp.maximum(jnp.sum(segment_ids >= 0, 1) - 1, 0)
        x, cache = self.hidden_after(tokens, cache, segment_ids)
        return self.logits(jnp.take_along_axis(x, last[:, None, None], 1)[:, 0]), cache

    def step(self, token: Int[Array, " b"], cache: Any) -> tuple[Float[Array, "b vocab"], Any]:
        """Logits [b, vocab] after one more token [b], and the cache after it, in constant time and memory.

        Raises:
          ValueError: as `prefill`.
        """
        check_room("token", self.config.cache_limit, cache, 1)
        return on_auto_axes(CausalLM._step, self, token, cache, out_specs=(_like(token, None), _specs(cache)))

    def _step(self, token: Array, cache: Any) -> tuple[Array, Any]:
        split = [nnx.split(stack) for stack in self._stacks()]
        caches = cache if len(split) > 1 else (cache,)

        # The cache is carried, not scanned over, so that each layer's part is replaced in place.
        def run(carry: tuple[Array, Any], turn: tuple[Any, Any, Array]) -> tuple[tuple[Array, Any], None]:
            (x, caches), (params, inputs, i), new = carry, turn, []
            for (graphdef, _), own_params, layer_input, cache in zip(split, params, inputs, caches, strict=True):
                block = nnx.merge(graphdef, own_params)
                own = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, i, keepdims=False), cache)
                if isinstance(block.mixer, RecurrentLayer):
                    own["state"] = Stacked(cache["state"], i)
                x, own = block.step(x, own, layer_input)
                put = lambda n, c: (
                    n.states if isinstance(n, Stacked) else jax.lax.dynamic_update_index_in_dim(c, n, i, 0)
                )
                new.append(jax.tree.map(put, own, cache, is_leaf=lambda n: isinstance(n, Stacked)))
            return (x, tuple(new)), None

        turns = tuple(params for _, params in split), self._layer_inputs(), jnp.arange(self._repeats())
        (x, caches), _ = jax.lax.scan(run, (self._embed(token), tuple(caches)), turns)
        return self.logits(self.norm(x)), self._join(caches)

    def _stacks(self) -> list[Block]:
        return [self.layers] if len(self.config.mixers) == 1 else list(self.layers)

    def _repeats(self) -> int:
        return self.config.num_layers // len(self.config.mixers)

    def _join(self, caches: Any) -> Any:
        return caches[0] if len(caches) == 1 else tuple(caches)

    def _layer_inputs(self) -> tuple[Any, ...]:
        """For each place of the pattern what its mixers take as `layer_input`, [repeats, ...], or None."""
        tables: dict[str | None, Any] = {None: None}
        layers = self.config.num_layers
        tables["depth"] = jnp.arange(layers, dtype=jnp.float32) / (layers - 1 + 1e-5)
        if self.lower_bounds is not None:
            shares = jnp.cumsum(jax.nn.softmax(self.lower_bounds[...].astype(jnp.float32), 0), 0)
            tables["lower_bound"] = shares - shares[:1]
        places = enumerate(self.config.mixers)
        return tuple(
            jax.tree.map(lambda x, i=i: x[i :: len(self.config.mixers)], tables[mixer.layer_input])
            for i, mixer in places
        )

    def _embed(self, tokens: Array) -> Array:
        with jax.named_scope("embed"):
            # Rounded after the look-up: the gradients of a token's many places are summed up in float32.
            x = jnp.take(_whole(self.embed).embedding[...], tokens, axis=0, mode="clip").astype(self.config.dtype)
            return x if self.embed_norm is None else self.embed_norm(x)

    def _scan(self, run: Callable, x: Array, *per_layer: Any) -> tuple[Array, Any]:
        """x through run(x, block, layer_input, ...) for each block in turn, under the config's remat policy.

        Each of per_layer has one entry a place of the pattern, and so have the results.
        """
        split = [nnx.split(stack) for stack in self._stacks()]

        def one(place: int) -> Callable:
            def body(x: Array, params: Any, *inputs: Any) -> tuple[Array, Any]:
                return run(x, nnx.merge(split[place][0], gathered(params)), *inputs)

            if self.config.remat == "full":
                return jax.checkpoint(body, prevent_cse=False)
            if self.config.remat == "dots":
                policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
                return jax.checkpoint(body, prevent_cse=False, policy=policy)
            return body

        blocks = [one(place) for place in range(len(split))]

        def turn(x: Array, inputs: tuple) -> tuple[Array, Any]:
            out = []
            for block, *own in zip(blocks, *inputs, strict=True):
                x, result = block(x, *own)
                out.append(result)
            return x, tuple(out)

        params = tuple(params for _, params in split)
        inputs = (params, self._layer_inputs(), *per_layer)
        # Under jit, turns that are written out share one trace and one lowering.
        return jax.lax.scan(jax.jit(turn), x, inputs, unroll=min(self.config.layer_unroll, self._repeats()))


class GLAForCausalLM(CausalLM):
    """`CausalLM` of gated linear attention, from a `GLAConfig`; arguments as in `CausalLM`."""

    def __init__(self, config: GLAConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)


def _whole[M: nnx.Module](module: M) -> M:
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, gathered(state, sum_first=True))


def _like(x: Array, *more: None) -> PartitionSpec:
    """The sharding of x, for an array with more axes at its end; replicated where none is known."""
    return PartitionSpec(*jax.typeof(x).sharding.spec, *more)


def _specs(tree: Any) -> Any:
    return jax.tree.map(_like, tree)
