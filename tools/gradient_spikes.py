"""Shows where the gradient of a new 340m model spikes: at tokens whose head has next to no output.

    python tools/gradient_spikes.py float32 bfloat16        # through "xla", two minutes a dtype on two CPU cores

The first 32 tokens of 8 rows of the shipped corpus, 6 batches. For each the gradient's norm, the same without what goes
back through rows' first tokens, and the token with the largest gradient in the residual stream: that gradient by layer,
and the least RMS of its heads' outputs there. A first token's output is (q k) v, whose norm is divided out after it.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gla_jax.nn import CausalLM, GLAConfig
from gla_jax.train import load_corpus
from gla_jax.train.data import Source, training_batches

ROWS, TIME, BATCHES = 8, 32, 6
HEADS = 4  # the preset's


def spikes(dtype: str) -> None:
    """Prints a few lines for each batch."""
    config = GLAConfig.gla_340m().replace(dtype=dtype, implementation="xla")
    graphdef, params = nnx.split(CausalLM(config, rngs=nnx.Rngs(0)))

    def loss(params, shift, inputs, targets, cut):
        model = nnx.merge(graphdef, params)

        def run(x, block, own, shift):
            x = x + shift
            x = jnp.where(cut & (jnp.arange(TIME) == 0)[:, None], jax.lax.stop_gradient(x), x)
            z = block.mixer_norm(x[:, :1])
            project = (block.mixer.q_proj, block.mixer.k_proj, block.mixer.v_proj)
            q, k, v = (layer(z).astype(jnp.float32).reshape(ROWS, HEADS, -1) for layer in project)
            score = jnp.sum(q * k, -1) * q.shape[-1] ** -0.5
            rms = jnp.abs(score) * jnp.sqrt(jnp.mean(v**2, -1))
            return block(x, None, own), jax.lax.stop_gradient(jnp.min(rms, -1))

        x, (least,) = model._scan(run, model._embed(inputs), (shift,))
        nats = optax.softmax_cross_entropy_with_integer_labels(model.logits(model.norm(x)), targets)
        return jnp.mean(nats), least

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    batches = training_batches([Source(load_corpus().train)], batch=ROWS, length=2048, seed=0)
    shift = jnp.zeros((config.num_layers, ROWS, TIME, config.hidden_size), dtype)
    for i in range(BATCHES):
        batch = next(batches)
        inputs, targets = (jnp.asarray(x)[:, :TIME].astype(jnp.int32) for x in (batch.inputs, batch.targets))
        (of_params, of_stream), least = gradient(params, shift, inputs, targets, False)
        (without, _), _ = gradient(params, shift, inputs, targets, True)
        size = np.linalg.norm(np.asarray(of_stream, np.float32), axis=-1)  # [layers, rows, time]
        row, token = np.unravel_index(size.argmax(), size.shape)[1:]
        norms = [float(optax.tree.norm(jax.tree.map(jnp.float32, x))) for x in (of_params, without)]
        print(f"{dtype} batch {i}: norm {norms[0]:.0f}, without first tokens {norms[1]:.0f}; row {row}, token {token}")
        print("  gradient by layer, last first:", " ".join(f"{x:.2g}" for x in size[::-1, row, token]))
        if token == 0:
            print("  least RMS of a head's output: ", " ".join(f"{x:.2g}" for x in least[::-1, row]))


if __name__ == "__main__":
    for name in sys.argv[1:] or ["float32"]:
        spikes(name)
