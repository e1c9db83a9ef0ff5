"""Calls that the op and its step must refuse, and what each refusal says; run as a script, without jaxtyping's checks.

It prints a JSON object: the type and the message of what each call raised, and whether good calls of numpy arrays work.
"""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gla_jax import gated_linear_attention, gated_linear_attention_step, which_implementation


class Refusal(NamedTuple):
    """The arguments that replace good ones, and what the message must hold: names, what was given, what is allowed."""

    given: dict[str, Any]
    says: tuple[str, ...]


def f32(*shape):
    return np.zeros(shape, np.float32)


def ints(*values):
    return np.asarray(values, np.int32)


def traced(x):
    """The dtype and shape alone."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


# b, t, h, hk, k, v = 2, 6, 4, 2, 3, 5
GOOD = {"q": f32(2, 6, 4, 3), "k": f32(2, 6, 2, 3), "v": f32(2, 6, 2, 5), "g": f32(2, 6, 2, 3)}
ROW = {name: x[:1] for name, x in GOOD.items()}
HALF = {name: jnp.asarray(x, jnp.bfloat16) for name, x in GOOD.items()}
STATE = "[b, hk, k, v] = (2, 2, 3, 5)"

OP = {
    "q of rank 3": Refusal({"q": f32(2, 6, 12)}, ("q", "(2, 6, 12)", "[b, t, h, k]")),
    "k of rank 3": Refusal({"k": f32(2, 6, 6)}, ("k", "(2, 6, 6)", "[b, t, hk, k]")),
    "v of rank 5": Refusal({"v": f32(2, 6, 2, 5, 1)}, ("v", "(2, 6, 2, 5, 1)", "[b, t, hk, v]")),
    "q a list": Refusal({"q": [1.0]}, ("q", "list", "[b, t, h, k]")),
    "v None": Refusal({"v": None}, ("v", "NoneType", "[b, t, hk, v]")),
    "q of integers": Refusal({"q": np.zeros((2, 6, 4, 3), np.int32)}, ("q", "int32", "float32", "bfloat16", "float16")),
    "k of float8": Refusal({"k": jnp.zeros((2, 6, 2, 3), jnp.float8_e4m3fn)}, ("k", "float8_e4m3fn", "bfloat16")),
    "no tokens": Refusal({"q": f32(2, 0, 4, 3)}, ("q", "(2, 0, 4, 3)", "no empty axis")),
    "two dtypes": Refusal({"k": HALF["k"]}, ("q, k and v", "float32", "bfloat16", "share a dtype")),
    "two batch sizes": Refusal({"k": f32(3, 6, 2, 3)}, ("q, k and v", "2, 3 and 2", "one batch size")),
    "two lengths": Refusal({"v": f32(2, 7, 2, 5)}, ("q, k and v", "6, 6 and 7", "one length t")),
    "heads of k and v": Refusal({"v": f32(2, 6, 1, 5)}, ("k and v", "2 and 1", "same heads")),
    "heads of q": Refusal({"q": f32(2, 6, 3, 3)}, ("q", "3 and 2", "a multiple")),
    "more heads of k": Refusal({"q": f32(2, 6, 1, 3)}, ("q", "1 and 2", "a multiple")),
    "key dimensions": Refusal({"q": f32(2, 6, 4, 7)}, ("q and k", "7 and 3", "same key dimension")),
    "g with a last axis of 1": Refusal({"g": f32(2, 6, 2, 1)}, ("g", "(2, 6, 2, 1)", "g[..., 0]")),
    "g of rank 2": Refusal({"g": f32(2, 6)}, ("g", "(2, 6)", "[hk] = (2,)", "[b, t, hk] = (2, 6, 2)")),
    "g of rank 0": Refusal({"g": np.float32(-1)}, ("g", "()", "[hk] = (2,)")),
    "g for the heads of q": Refusal({"g": f32(2, 6, 4, 3)}, ("g", "(2, 6, 4, 3)", "[b, t, hk, k] = (2, 6, 2, 3)")),
    "g a number a query head": Refusal({"g": f32(4)}, ("g", "(4,)", "[hk] = (2,)")),
    "g a number": Refusal({"g": -0.5}, ("g", "float", "None", "[hk]")),
    "g of float16": Refusal({"g": np.zeros((2, 6, 2), np.float16)}, ("g", "float16", "float32")),
    "g of bfloat16 for float32": Refusal({"g": HALF["g"]}, ("g", "bfloat16", "float32")),
    "a positive gate": Refusal({"g": f32(2, 6, 2) + 0.25}, ("g", "0.25", "at most 0")),
    "one positive gate": Refusal({"g": jnp.asarray(GOOD["g"]).at[1, 5, 1, 2].set(3.0)}, ("g", "3", "at most 0")),
    "a gate of +inf": Refusal({"g": np.full((2,), np.inf, np.float32)}, ("g", "inf", "at most 0")),
    "bonus for the heads of q": Refusal({"bonus": f32(4, 3)}, ("bonus", "(4, 3)", "[hk, k] = (2, 3)")),
    "bonus a number": Refusal({"bonus": 0.5}, ("bonus", "float", "[hk, k] = (2, 3)")),
    "bonus of float16": Refusal({"bonus": np.zeros((2, 3), np.float16)}, ("bonus", "float16", "float32")),
    "scale an array": Refusal({"scale": np.ones(2)}, ("scale", "ndarray", "number or None")),
    "scale a word": Refusal({"scale": "1"}, ("scale", "str", "number or None")),
    "scale a truth value": Refusal({"scale": True}, ("scale", "bool", "number or None")),
    "segment_ids of floats": Refusal({"segment_ids": f32(2, 6)}, ("segment_ids", "float32", "integer")),
    "segment_ids a list": Refusal({"segment_ids": [[0] * 6] * 2}, ("segment_ids", "list", "integer array")),
    "segment_ids too short": Refusal({"segment_ids": ints([0] * 5, [0] * 5)}, ("segment_ids", "(2, 5)", "(2, 6)")),
    "segment_ids of rank 1": Refusal({"segment_ids": ints(*range(6))}, ("segment_ids", "(6,)", "[b, t] = (2, 6)")),
    "both": Refusal(
        {**ROW, "segment_ids": ints([0] * 6), "cu_seqlens": ints(0, 6)}, ("segment_ids and cu_seqlens", "one of them")
    ),
    "cu_seqlens of floats": Refusal({**ROW, "cu_seqlens": f32(3)}, ("cu_seqlens", "float32", "integer")),
    "cu_seqlens of rank 2": Refusal({**ROW, "cu_seqlens": ints([0, 6])}, ("cu_seqlens", "(1, 2)", "[n + 1]")),
    "cu_seqlens of one": Refusal({**ROW, "cu_seqlens": ints(0)}, ("cu_seqlens", "(1,)", "n >= 1")),
    "cu_seqlens of two rows": Refusal({"cu_seqlens": ints(0, 6)}, ("cu_seqlens", "b = 2", "b = 1")),
    "cu_seqlens that decrease": Refusal(
        {**ROW, "cu_seqlens": ints(0, 4, 3, 6)}, ("cu_seqlens", "[0, 4, 3, 6]", "non-decreasing")
    ),
    "cu_seqlens from 1": Refusal({**ROW, "cu_seqlens": ints(1, 6)}, ("cu_seqlens", "[1, 6]", "from 0")),
    "cu_seqlens past the end": Refusal({**ROW, "cu_seqlens": ints(0, 7)}, ("cu_seqlens", "[0, 7]", "at most t = 6")),
    "long cu_seqlens": Refusal(
        {**ROW, "cu_seqlens": ints(*range(0, 200, 2))}, ("cu_seqlens", "[0, 2, 4, 6, ..., 194, 196, 198]", "t = 6")
    ),
    "initial_state of v, k": Refusal({"initial_state": f32(2, 2, 5, 3)}, ("initial_state", "(2, 2, 5, 3)", STATE)),
    "initial_state for the heads of q": Refusal(
        {"initial_state": f32(2, 4, 3, 5)}, ("initial_state", "(2, 4, 3, 5)", STATE)
    ),
    "initial_state a number": Refusal({"initial_state": 0.0}, ("initial_state", "float", STATE)),
    "initial_state in bfloat16": Refusal(
        {"initial_state": jnp.zeros((2, 2, 3, 5), jnp.bfloat16)}, ("initial_state", "bfloat16", "float32")
    ),
    "initial_state of too few sequences": Refusal(
        {**ROW, "cu_seqlens": ints(0, 2, 6), "initial_state": f32(1, 2, 3, 5)},
        ("initial_state", "(1, 2, 3, 5)", "[n, hk, k, v] = (2, 2, 3, 5)"),
    ),
    "implementation": Refusal({"implementation": "triton"}, ("implementation", "'triton'", "'xla'", "'reference'")),
    "implementation of lists": Refusal({"implementation": [["xla"]]}, ("implementation", "[['xla']]", "'reference'")),
    "implementation in turn": Refusal(
        {"implementation": ("cuda", "xla")}, ("implementation", "'cuda'", "'xla'", "'reference'")
    ),
}

# b, h, hk, k, v = 2, 4, 2, 3, 5
STEP_GOOD = {"q": f32(2, 4, 3), "k": f32(2, 2, 3), "v": f32(2, 2, 5), "g": f32(2, 2, 3), "state": f32(2, 2, 3, 5)}
STEP = {
    "q of rank 4": Refusal({"q": f32(2, 1, 4, 3)}, ("q", "(2, 1, 4, 3)", "[b, h, k]")),
    "v of rank 2": Refusal({"v": f32(2, 10)}, ("v", "(2, 10)", "[b, hk, v]")),
    "k a list": Refusal({"k": []}, ("k", "list", "[b, hk, k]")),
    "q of integers": Refusal({"q": np.zeros((2, 4, 3), np.int32)}, ("q", "int32", "float32")),
    "two dtypes": Refusal({"v": jnp.zeros((2, 2, 5), jnp.bfloat16)}, ("q, k and v", "bfloat16", "share a dtype")),
    "two batch sizes": Refusal({"v": f32(3, 2, 5)}, ("q, k and v", "2, 2 and 3", "one batch size")),
    "heads of k and v": Refusal({"v": f32(2, 4, 5)}, ("k and v", "2 and 4", "same heads")),
    "heads of q": Refusal({"q": f32(2, 3, 3)}, ("q", "3 and 2", "a multiple")),
    "key dimensions": Refusal({"q": f32(2, 4, 5)}, ("q and k", "5 and 3", "same key dimension")),
    "g with a last axis of 1": Refusal({"g": f32(2, 2, 1)}, ("g", "(2, 2, 1)", "g[..., 0]")),
    "g of a sequence": Refusal({"g": f32(2, 1, 2, 3)}, ("g", "(2, 1, 2, 3)", "[b, hk] = (2, 2)", "[b, hk, k]")),
    "a positive gate": Refusal({"g": f32(2) + 1}, ("g", "1", "at most 0")),
    "g of float16": Refusal({"g": np.zeros(2, np.float16)}, ("g", "float16", "float32")),
    "no state": Refusal({"state": None}, ("state", "None", "[b, hk, k, v]")),
    "bonus of v": Refusal({"bonus": f32(2, 5)}, ("bonus", "(2, 5)", "[hk, k] = (2, 3)")),
    "state of v, k": Refusal({"state": f32(2, 2, 5, 3)}, ("state", "(2, 2, 5, 3)", STATE)),
    "state in float16": Refusal({"state": np.zeros((2, 2, 3, 5), np.float16)}, ("state", "float16", "float32")),
    "scale an array": Refusal({"scale": np.ones(2)}, ("scale", "ndarray", "number or None")),
}

WIDE = {name: np.zeros(x.shape, np.float64) for name, x in GOOD.items()}


def refusal(call, arguments) -> list[str]:
    try:
        call(**arguments)
    except Exception as error:  # which one is raised is what the tests compare
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def unsupported() -> list[str]:
    with jax.enable_x64(True):
        return refusal(gated_linear_attention, {**WIDE, "implementation": "xla"})


def numpy_arguments_work() -> bool:
    rng = np.random.default_rng(0)
    given = {name: -np.abs(rng.standard_normal(x.shape, np.float32)) for name, x in ROW.items()}
    states = {"initial_state": rng.standard_normal((2, 2, 3, 5), np.float32), "cu_seqlens": ints(0, 2, 5)}
    ids = {"segment_ids": ints([0, 0, 1, 1, -1, 2])}
    same = []
    for more in ({}, states, ids):
        call: dict[str, Any] = {**given, **more, "output_final_state": True}
        got = gated_linear_attention(**call)
        want = gated_linear_attention(**jax.tree.map(lambda x: jnp.asarray(x) if hasattr(x, "shape") else x, call))
        same += [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True)]
    token: dict[str, Any] = {name: -np.abs(rng.standard_normal(x.shape, np.float32)) for name, x in STEP_GOOD.items()}

    got, want = (gated_linear_attention_step(**x) for x in (token, jax.tree.map(jnp.asarray, token)))
    same += [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True)]
    return all(same)


def main():
    answers: dict[str, Any] = {
        f"op: {name}": refusal(gated_linear_attention, {**GOOD, **row.given}) for name, row in OP.items()
    }
    answers |= {
        f"which: {name}": refusal(which_implementation, {**jax.tree.map(traced, GOOD), **row.given})
        for name, row in OP.items()
        if "implementation" not in row.given
    }
    answers |= {
        f"step: {name}": refusal(gated_linear_attention_step, {**STEP_GOOD, **row.given}) for name, row in STEP.items()
    }
    answers["unsupported"] = unsupported()
    answers["numpy"] = numpy_arguments_work()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
