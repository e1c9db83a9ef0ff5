"""What the op and its step refuse: one line that names the argument, what was given and what is allowed."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gla_jax import gated_linear_attention

from .bad_calls import OP, STEP


@functools.cache
def answers() -> dict:
    """What bad_calls.py prints: jaxtyping's own checks, on in this process, would come before the library's."""
    script = Path(__file__).with_name("bad_calls.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr}


ROWS = {
    **{f"op: {name}": row for name, row in OP.items()},
    **{f"which: {name}": row for name, row in OP.items() if "implementation" not in row.given},
    **{f"step: {name}": row for name, row in STEP.items()},
}


@pytest.mark.parametrize("name", ROWS)
def test_refusals(name):
    kind, message = answers()[name]
    assert kind == "ValueError", message
    assert "\n" not in message
    assert len(message) < 300
    argument, *rest = ROWS[name].says
    assert message.startswith(argument), message
    for words in rest:
        assert words in message, message


def test_an_implementation_that_does_not_support_the_call_says_why():
    kind, message = answers()["unsupported"]
    assert kind == "ValueError"
    assert message.startswith("implementation")
    assert "'xla': it computes in float32" in message
    assert "\n" not in message


def test_numpy_arguments_work():
    assert answers()["numpy"] is True


def test_values_are_checked_only_where_they_are_known():
    q = jnp.ones((1, 4, 1, 2))
    positive = jax.jit(lambda g: gated_linear_attention(q, q, q, g, implementation="reference")[0])(jnp.ones(1))
    assert jnp.isfinite(positive).all()
    cu = jax.jit(lambda cu: gated_linear_attention(q, q, q, cu_seqlens=cu, implementation="reference")[0])
    assert cu(jnp.array([0, 2, 4])).shape == q.shape
