"""Every mesh gives the loss curve of one device; what its devices send each other; what it refuses."""

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest

from gla_jax.nn import sharding
from gla_jax.train import InputError, load_corpus
from gla_jax.train.config import MeshConfig
from gla_jax.train.data import Batch
from gla_jax.train.mesh import make_mesh
from gla_jax.train.step import make_program

from .small import MODEL, small

STEPS = 20
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(shape) == 8]
TELLING = {((2, 2, 2, 1), "explicit"), ((1, 2, 2, 2), "auto"), ((1, 1, 1, 8), "explicit"), ((1, 8, 1, 1), "auto")}
WIDE = MODEL.replace(hidden_size=64, num_heads=8, mlp_size=64)


@pytest.fixture(autouse=True)
def few_rows_are_many(monkeypatch):
    """Layers with the same input are one product where the mesh allows it, as with the rows of a real batch."""
    monkeypatch.setattr(sharding, "MANY_ROWS", 64)


def config_of(shape, axes="auto", **changes):
    mesh = MeshConfig(*shape, axes=axes)
    return small("r", model=changes.pop("model", WIDE), steps=STEPS, batch=8, length=64, mesh=mesh, **changes)


@functools.cache
def batches(length=64):
    tokens = load_corpus().train[: STEPS * 8 * (length + 1)].reshape(STEPS, 8, -1)
    ids = np.random.default_rng(1).integers(0, 3, (STEPS, 8, length)).repeat(9, axis=2)[..., :length]
    return [Batch(t[:, :-1], t[:, 1:], i, (i > 0).astype(np.float32)) for t, i in zip(tokens, ids, strict=True)]


def curve(config):
    program = make_program(config, make_mesh(config))
    state, losses = program.initialize(), []
    for batch in batches():
        state, metrics = program.train(state, program.place(batch))
        losses.append(metrics["loss"])
    assert not int(metrics["rejected"])
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    assert described == program.abstract
    return np.array(losses, np.float64)


@functools.cache
def one_device(**changes):
    return curve(config_of((1, 1, 1, 1), **changes))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        pytest.param(*case, id=f"{case[0]} {case[1]}", marks=() if case in TELLING else pytest.mark.exhaustive)
        for case in itertools.product(SHAPES, ("auto", "explicit"))
    ],
)
def test_the_loss_curve_is_that_of_one_device(shape, axes):
    curves = curve(config_of(shape, axes)), one_device()
    print(f"{shape} {axes}: {np.max(np.abs(curves[0] - curves[1])):.1e}")
    np.testing.assert_allclose(*curves, rtol=0, atol=1e-5)
    assert curves[1][-1] < curves[1][0] - 0.5


COLLECTIVE = r"= (.*?) (all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)(?:-start)?\("


def sent(config, kinds):
    """The HLO types of the step's collectives of these kinds."""
    mesh = make_mesh(config)
    program = make_program(config, mesh)
    batch = program.place(batches(config.length)[0])
    with jax.set_mesh(mesh):
        step = program.train.__wrapped__.lower(program.abstract, batch)
        text = step.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
    return sorted((kind, shape) for shape, kind in re.findall(COLLECTIVE, text) if kind in kinds)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 2, 1, 2)], ids=str)
def test_activations_are_not_gathered(shape):
    """Parameters are gathered, states and halos sent: nothing of a size that grows with the tokens of a row."""
    moves = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    short, long = (sent(dataclasses.replace(config_of(shape, optimizer="adamw"), length=n), moves) for n in (64, 128))
    assert short == long
    assert any(kind == "all-gather" for kind, _ in short)


def test_tensor_parallelism_sums_activations_and_gathers_none():
    found = sent(config_of((1, 1, 8, 1), optimizer="adamw"), ("all-gather", "all-to-all"))
    assert not [shape for _, shape in found if "[8,64," in shape], found


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((2, 2, 2, 2), {}, r"data x fsdp x tensor x sequence = 2 x 2 x 2 x 2 are 16 devices; there are 8, and it must"),
        ((3, 2, 1, 1), {}, r"data x fsdp = 6 must divide --batch / --accumulate = 8"),
        ((1, 8, 1, 1), {"accumulate": 2}, r"data x fsdp = 8 must divide --batch / --accumulate = 4"),
        ((1, 1, 1, 3), {}, r"sequence = 3 must divide --length = 64"),
        ((1, 1, 3, 1), {}, r"tensor = 3 must divide --model.num-heads = 8"),
        ((1, 1, 4, 1), {"model": WIDE.replace(num_kv_heads=2)}, r"tensor = 4 must divide --model.num-kv-heads = 2"),
        ((1, 1, 4, 1), {"model": WIDE.replace(mlp_size=66)}, r"tensor = 4 must divide the width of the MLP = 66"),
        ((1, 1, 4, 1), {"model": WIDE.replace(vocab_size=258)}, r"tensor = 4 must divide --model.vocab-size = 258"),
        (
            (1, 8, 1, 1),
            {"model": WIDE.replace(hidden_size=68, num_heads=2)},
            r"fsdp = 8 must divide --model.hidden-size",
        ),
    ],
)
def test_what_does_not_divide_is_named(shape, changes, message):
    with pytest.raises(InputError, match=f"^argument --mesh: {message}"):
        make_mesh(config_of(shape, **changes))


def test_short_pieces_and_no_devices_are_refused():
    config = dataclasses.replace(config_of((1, 1, 1, 8)), length=16)
    with pytest.raises(InputError, match=r"^argument --length: must be at least 24 for the convolutions, got 16$"):
        make_mesh(config)
    with pytest.raises(InputError, match=r"^argument --mesh.fsdp: must be at least 1, got 0$"):
        MeshConfig(fsdp=0)
    with pytest.raises(InputError, match=r"^argument --loss-parts: must be None or a divisor of .* = 8, got 3$"):
        config_of((1, 1, 1, 8), loss_parts=3)
    with pytest.raises(InputError, match=r"^argument --pieces: must be 1 with --mesh.sequence above 1, got 2$"):
        config_of((1, 1, 1, 8), pieces=2)


def test_data_takes_the_devices_that_are_left():
    assert make_mesh(config_of((None, 1, 1, 2))).shape["data"] == 4
    assert make_mesh(dataclasses.replace(config_of((None, 1, 1, 1)), batch=6)).shape["data"] == 6
    assert make_mesh(dataclasses.replace(config_of((None, 2, 1, 1)), batch=6)).size == 6


def test_accumulating_and_logits_in_parts_are_the_same_step():
    config = config_of((2, 2, 1, 2), accumulate=2, loss_parts=4)
    np.testing.assert_allclose(curve(config), one_device(), rtol=0, atol=1e-5)
