"""Checkpoints: what goes in comes out bit for bit, and whatever is wrong with a file is a sentence with a remedy."""

import functools
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from common import checkpoint
from common.errors import UserError
from common.networks import make_critic
from common.returns import affine_axis
from tests.helpers import contents

HEADER = dict(
    stage="value", env="cube-single-play", observation_dim=3, action_dim=2, horizon=1, width=8, depth=2, head_width=4,
    head_depth=2, critic="mlp", return_axis="std", step=7, replicas=[[1, 0]], policy_sha256="00", args=dict(steps=9),
    data=dict(name="data.npz", source="own", sha256="11"),
)  # fmt: skip
REMEDY = "train it first."


def sign(path: Path) -> None:
    """Makes the SHA-256 at the end that of the rest, as somebody would who wants a bad file to be read."""
    content = path.read_bytes()
    if content[-checkpoint.TRAILER_BYTES :].startswith(checkpoint.TRAILER):
        content = content[: -checkpoint.TRAILER_BYTES]
    path.write_bytes(content + checkpoint.TRAILER + hashlib.sha256(content).hexdigest().encode())


def build(header: dict[str, Any]) -> Any:
    """Critic, optimizer state and scale, as far as the header determines them."""
    critic = make_critic(header, key=jax.random.key(0))
    return (
        critic,
        optax.adam(1e-3).init(critic),
        affine_axis(0.5, 1.0, low=0.0, high=1.0),
        jnp.zeros((), jnp.int32),
    )


def trained() -> Any:
    """The same structure after one update, with values that text would round."""
    critic = make_critic(HEADER, key=jax.random.key(1))
    optimizer = optax.adam(1e-3)
    gradient = jax.tree.map(lambda x: jnp.sin(x) + 1 / 3, critic)
    updates, opt_state = optimizer.update(gradient, optimizer.init(critic))
    scale = affine_axis(-0.1, 1e-30, low=-1 / 3, high=np.float32(1e-30))
    return optax.apply_updates(critic, updates), opt_state, scale, jnp.asarray(7, jnp.int32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint, in a folder that did not exist."""
    file = tmp_path / "run" / "model.eqx"
    checkpoint.save(file, HEADER, trained())
    return file


def load(path: Path, stage: str = "value") -> tuple[dict[str, Any], Any]:
    return checkpoint.load(path, build, stage=stage, remedy=REMEDY)


@pytest.mark.parametrize("kind", ["mlp", "trunk"])
def test_round_trip_is_exact(tmp_path: Path, kind: str):
    header = HEADER | dict(critic=kind)
    critic = make_critic(header, key=jax.random.key(1))
    saved = (
        critic,
        optax.adam(1e-3).init(critic),
        affine_axis(-0.1, 1e-30, low=-1 / 3, high=1e-30),
        jnp.asarray(7, jnp.int32),
    )
    checkpoint.save(tmp_path / "model.eqx", header, saved)
    found, loaded = load(tmp_path / "model.eqx")
    assert found == header
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_of_a_trained_state(path: Path):
    """Saved moments and counts of Adam are not those of `build`: fails if the template's values come back."""
    for a, b in zip(jax.tree.leaves(load(path)[1]), jax.tree.leaves(trained()), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_half_precision_and_empty_arrays_survive(tmp_path: Path):
    saved = np.linspace(-1, 1, 6).astype(np.float16).reshape(2, 3), np.zeros((2, 0), np.float32)
    checkpoint.save(tmp_path / "bank.eqx", {"stage": "bank"}, saved)
    template = jnp.zeros((2, 3), jnp.float16), jnp.zeros((2, 0))
    _, found = checkpoint.load(tmp_path / "bank.eqx", lambda _: template, stage="bank", remedy=REMEDY)
    assert found[0].dtype == np.float16 and found[1].shape == (2, 0)
    np.testing.assert_array_equal(found[0], saved[0])


def test_the_first_line_is_the_header(path: Path):
    assert json.loads(path.read_bytes().split(b"\n", 1)[0]) == HEADER
    assert checkpoint.read_header(path, stage="value", remedy=REMEDY) == HEADER


def test_headers_hold_paths_tuples_and_infinity(tmp_path: Path):
    header = {"stage": "bank", "seeds": (0, 1), "run_dir": Path("runs/x"), "temperature": float("inf")}
    checkpoint.save(tmp_path / "model.eqx", header, ())
    found = checkpoint.read_header(tmp_path / "model.eqx", stage="bank", remedy=REMEDY)
    assert found == {"stage": "bank", "seeds": [0, 1], "run_dir": "runs/x", "temperature": "inf"}


def test_nothing_is_unpickled(path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint from a stranger must not run code: an array of objects is refused, and loading needs no pickle."""
    with open(path, "wb") as file:
        file.write(json.dumps(HEADER).encode() + b"\n")
        np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    sign(path)
    with pytest.raises(UserError, match="damaged or of another version"):
        load(path)

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    checkpoint.save(path, HEADER, trained())
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    load(path)
    assert "pickle" not in vars(checkpoint)


def test_missing_file(tmp_path: Path):
    with pytest.raises(UserError, match=r"no value checkpoint at .*model\.eqx: train it first\.$"):
        load(tmp_path / "model.eqx")
    with pytest.raises(UserError, match="no value checkpoint"):
        load(tmp_path)  # a folder is no file


def test_wrong_stage(path: Path):
    with pytest.raises(UserError, match="of stage 'value', not 'bc': pass the other run directory"):
        load(path, stage="bc")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04garbage\n\xff" * 50, b"{}\n", b'["stage"]\n', b"3\n", b'{"stage"', b'"stage"\n', b"null\n"],
)
def test_garbage(path: Path, content: bytes):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.eqx is not a checkpoint of this project: delete it and train again"):
        load(path)


def test_truncated_at_any_length(path: Path):
    """Fails if a checkpoint that lacks its end loads, or raises anything but a UserError."""
    good = path.read_bytes()
    for length in range(0, len(good), 97):
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match="delete it and train again"):
            load(path)
    path.write_bytes(good[:-1])
    with pytest.raises(UserError, match="damaged"):
        load(path)


def test_truncated_and_signed(path: Path):
    """The same where the SHA-256 does not give it away: the arrays have to say it."""
    good = path.read_bytes()[: -checkpoint.TRAILER_BYTES]
    for length in range(good.index(b"\n"), len(good), 97):
        path.write_bytes(good[:length])
        sign(path)
        with pytest.raises(UserError, match="delete it and train again"):
            load(path)
    path.write_bytes(good + b"more")
    sign(path)
    with pytest.raises(UserError, match="more arrays than its header says"):
        load(path)


def test_every_changed_byte_is_noticed(path: Path):
    good = path.read_bytes()
    for place in range(0, len(good), 53):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(UserError):
            load(path)


@pytest.mark.parametrize("shape", [(10**12,), (10**6, 10**6), (2**62, 4), (0, 10**15)])
def test_no_memory_is_taken_for_what_the_file_does_not_hold(path: Path, shape: tuple):
    """A file that says so in its header and in its array; fails by a MemoryError if it is believed."""
    with open(path, "wb") as file:
        file.write(json.dumps(dict(stage="bank")).encode() + b"\n")
        np.lib.format.write_array_header_1_0(file, dict(descr="<f4", fortran_order=False, shape=shape))
    sign(path)
    with pytest.raises(UserError, match="damaged or of another version"):
        checkpoint.load(path, lambda _: jnp.zeros((3,)), stage="bank", remedy=REMEDY)
    if shape[0]:
        with open(path, "rb") as file, pytest.raises(ValueError, match="is cut"):
            file.readline()
            checkpoint._read_leaf(file, jax.ShapeDtypeStruct(shape, np.float32))


@pytest.mark.parametrize(
    "change",
    [
        dict(depth=10**9), dict(width=0), dict(horizon=-1), dict(width="8"), dict(depth=2.0), dict(action_dim=True),
        dict(observation_dim=None), dict(step="7"), dict(replicas=[[1]]), dict(diverged=None), dict(args=[]),
        dict(replicas=[[[], 0]]), dict(diverged=[[1, {}]]), dict(data={}), dict(data=[]), dict(env=["x"]),
        dict(replicas=[]), dict(replicas=[[99, 0]]), dict(replicas=[[2, 2**70]]), dict(args={}),
        dict(args=dict(steps="x")), dict(args=dict(steps=9, ignore_observations=3)),
    ],
)  # fmt: skip
def test_sizes_that_nobody_means(path: Path, change: dict):
    """Fails if a model of a billion layers is built, or if a number is taken for what it is not."""
    checkpoint.save(path, HEADER | change, trained())
    with pytest.raises(UserError, match=rf"damaged \({next(iter(change))} is .*\): delete it and train again"):
        load(path)


def test_arrays_in_columns_come_back(tmp_path: Path):
    saved = np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3))
    checkpoint.save(tmp_path / "a.eqx", {"stage": "bank"}, saved)
    _, found = checkpoint.load(tmp_path / "a.eqx", lambda _: jnp.zeros((2, 3)), stage="bank", remedy=REMEDY)
    np.testing.assert_array_equal(found, saved)


def test_the_newest_complete_one(path: Path, capsys: pytest.CaptureFixture):
    previous = path.with_name("previous.eqx")
    find = functools.partial(checkpoint.newest, path, previous, stage="value", remedy=REMEDY)
    assert find() == path
    checkpoint.save(path, HEADER | dict(step=8), trained(), previous=previous)
    assert load(previous)[0]["step"] == 7 and find() == path and capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:-1])
    assert find() == previous and "going on from the one before it, step 7" in capsys.readouterr().err
    path.unlink()
    assert find() == previous and "missing or damaged" in capsys.readouterr().err
    previous.write_bytes(b"x")
    with pytest.raises(UserError, match=r"there is no value checkpoint at .*: train it first"):
        find()
    path.write_bytes(previous.read_bytes())
    with pytest.raises(UserError, match="not a checkpoint"):
        find()


@pytest.mark.parametrize("change", [dict(width=16), dict(depth=3), dict(action_dim=4), dict(critic="trunk")])
def test_arrays_that_do_not_fit_the_header(path: Path, change: dict):
    checkpoint.save(path, HEADER | change, trained())
    with pytest.raises(UserError, match=r"model\.eqx is damaged or of another version .*: delete it and train again"):
        load(path)


@pytest.mark.parametrize("field", ["width", "replicas", "policy_sha256", "data"])
def test_a_header_that_lacks_something(path: Path, field: str):
    checkpoint.save(path, {key: value for key, value in HEADER.items() if key != field}, trained())
    with pytest.raises(UserError, match=rf"has no {field}, as those of an older revision"):
        load(path)


def test_wrong_dtype(path: Path):
    checkpoint.save(path, HEADER, jax.tree.map(lambda x: np.asarray(x, np.float16), trained()))
    with pytest.raises(UserError, match="damaged or of another version"):
        load(path)


def test_a_failing_write_leaves_the_previous_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fails if `save` writes to the final name before everything is written."""
    before = path.read_bytes()

    def fail(file, tree):
        file.write(b"half of the arrays")
        raise OSError("disk full")

    monkeypatch.setattr(eqx, "tree_serialise_leaves", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, HEADER | dict(step=8), trained())
    assert path.read_bytes() == before
    assert load(path)[0]["step"] == 7


def test_saving_replaces_and_leaves_nothing_else(path: Path):
    checkpoint.save(path, HEADER | dict(step=8), trained())
    assert contents(path.parent).keys() == {"model.eqx"}
    assert load(path)[0]["step"] == 8


def test_require(path: Path):
    header = {"env": "cube-double-play", "seeds": [0, 1], "run_dir": "runs/x"}
    checkpoint.require(header, path, env="cube-double-play", seeds=(0, 1), run_dir=Path("runs/x"))
    with pytest.raises(
        UserError, match="made with env 'cube-double-play', this run has 'scene-play': pass the same env"
    ):
        checkpoint.require(header, path, env="scene-play")
    with pytest.raises(UserError, match="made with horizon None, this run has 5: pass the same horizon"):
        checkpoint.require(header, path, horizon=5)


TEMPLATE = np.zeros((2, 3), np.float32), np.zeros((), np.int32), np.zeros((4,), np.float16)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "insert", "repeat")), st.integers(0, 2**16), st.binary(min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=6,
)


def mutate(content: bytes, mutations: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, new in mutations:
        place %= len(content) + 1
        before, after = content[:place], content[place:]
        content = {
            "flip": before + new + after[len(new) :],
            "cut": before,
            "insert": before + new + after,
            "repeat": before + before[-len(new) :] + after,
        }[kind]
    return content


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(mutations=MUTATIONS)
def test_no_file_brings_more_than_a_sentence(tmp_path_factory: pytest.TempPathFactory, mutations: list):
    """Whatever stands in a file whose SHA-256 is right: a `UserError`, or arrays of the shapes and types asked for."""
    path = tmp_path_factory.getbasetemp() / "mutated.eqx"
    checkpoint.save(path, {"stage": "bank", "width": 3}, TEMPLATE)
    path.write_bytes(mutate(path.read_bytes()[: -checkpoint.TRAILER_BYTES], mutations))
    sign(path)
    try:
        header, found = checkpoint.load(path, lambda _: TEMPLATE, stage="bank", remedy=REMEDY)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert header["stage"] == "bank" and 1 <= header.get("width", 1) <= 100_000
    for array, like in zip(found, TEMPLATE, strict=True):
        assert array.shape == like.shape and array.dtype == like.dtype
