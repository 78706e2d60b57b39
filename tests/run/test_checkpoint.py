"""Checkpoints: what goes in comes out bit for bit, and whatever is wrong with a file is a sentence with a remedy."""

import dataclasses
import functools
import json
import pickle
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from common import checkpoint
from common.args import size
from common.errors import UserError
from common.networks import CriticSpec, PolicySpec, make_critic
from common.returns import affine_axis
from evor_infer import AgentSpec
from tests.helpers import contents, sign

SPEC = CriticSpec(observation=3, action=2, kind="mlp", width=8, depth=2, head_width=4, head_depth=2)
HEADER = dict(
    stage="value", env="cube-single-play", horizon=1, step=7, seeds=[0], replicas=[[1, 0]], policy_sha256="00",
    args=dict(steps=9), data=dict(name="data.npz", source="own", sha256="11"), model=dataclasses.asdict(SPEC),
)  # fmt: skip
REMEDY = "train it first."


def with_model(**changes: Any) -> dict[str, Any]:
    """The header of another model."""
    return HEADER | dict(model=HEADER["model"] | changes)


def build(header: dict[str, Any]) -> Any:
    """Critic, optimizer state and scale, as far as the header determines them."""
    critic = make_critic(checkpoint.read_spec(CriticSpec, header["model"]), key=jax.random.key(0))
    return (
        critic,
        optax.adam(1e-3).init(critic),
        affine_axis(0.5, 1.0, low=0.0, high=1.0),
        jnp.zeros((), jnp.int32),
    )


def trained() -> Any:
    """The same structure after one update, with values that text would round."""
    critic = make_critic(SPEC, key=jax.random.key(1))
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
    header = HEADER | dict(model=dataclasses.replace(SPEC, kind=kind))
    critic = make_critic(header["model"], key=jax.random.key(1))
    saved = (
        critic,
        optax.adam(1e-3).init(critic),
        affine_axis(-0.1, 1e-30, low=-1 / 3, high=1e-30),
        jnp.asarray(7, jnp.int32),
    )
    checkpoint.save(tmp_path / "model.eqx", header, saved)
    read, loaded = load(tmp_path / "model.eqx")
    assert read == header | dict(model=dataclasses.asdict(header["model"]))
    assert read["model"]["kind"] == loaded[0].spec.kind == kind
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
    with pytest.raises(UserError, match="is whole, and not of this revision"):
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
    with pytest.raises(UserError, match=r"model\.eqx is (not a checkpoint of this project: move it away|damaged)"):
        load(path)


def test_truncated_at_any_length(path: Path):
    """Fails if a checkpoint that lacks its end loads, or raises anything but a UserError."""
    good = path.read_bytes()
    for length in range(0, len(good), 97):
        path.write_bytes(good[:length])
        with pytest.raises(
            UserError, match="is damaged, .*: move it away and train again" if length else "move it away"
        ):
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
        with pytest.raises(UserError, match="is whole, and not of this revision"):
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
    with pytest.raises(UserError, match="is whole, and not of this revision"):
        checkpoint.load(path, lambda _: jnp.zeros((3,)), stage="bank", remedy=REMEDY)
    if shape[0]:
        with open(path, "rb") as file, pytest.raises(ValueError, match="is cut"):
            file.readline()
            checkpoint._read_leaf(file, jax.ShapeDtypeStruct(shape, np.float32))


@pytest.mark.parametrize(
    "change",
    [
        dict(horizon=-1), dict(horizon=10**9), dict(horizon=1.0), dict(horizon=True), dict(model=[]), dict(model=None),
        dict(seeds=[]), dict(seeds=[-1]), dict(seeds=3), dict(seeds=[True]),
        dict(step="7"), dict(replicas=[[1]]), dict(diverged=None), dict(args=[]),
        dict(replicas=[[[], 0]]), dict(diverged=[[1, {}]]), dict(data={}), dict(data=[]), dict(env=["x"]),
        dict(replicas=[]), dict(replicas=[[99, 0]]), dict(replicas=[[2, 2**70]]), dict(args={}),
        dict(args=dict(steps="x")), dict(args=dict(steps=9, ignore_observations=3)),
    ],
)  # fmt: skip
def test_what_nobody_means(path: Path, change: dict):
    """Fails if a number is taken for what it is not."""
    checkpoint.save(path, HEADER | change, trained())
    with pytest.raises(UserError, match=rf"is whole, and not .*\({next(iter(change))} is .*\)"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        dict(depth=10**9), dict(width=0), dict(width="8"), dict(depth=2.0), dict(action=True), dict(observation=None),
        dict(head_width=-1), dict(outputs=10**18), dict(outputs=[1]), dict(kind="x"), dict(kind=[]), dict(kind=None),
        dict(more=1), {"key": 1}, {"": 1}, dict(width={}), dict(width=dict(observation=1)),
    ],
)  # fmt: skip
def test_sizes_that_nobody_means(path: Path, change: dict):
    """Fails if a model of a billion layers is built, or if a field that it does not have is passed on."""
    checkpoint.save(path, with_model(**change), trained())
    with pytest.raises(UserError, match=r"is whole, and not .* \(model is .*\)"):
        load(path)


@pytest.mark.parametrize("field", ["observation", "action", "kind", "width", "depth"])
def test_a_size_that_is_missing(path: Path, field: str):
    spec = {name: value for name, value in HEADER["model"].items() if name != field}
    checkpoint.save(path, HEADER | dict(model=spec), trained())
    with pytest.raises(UserError, match=r"is whole, and not .* \(model is .*\)"):
        load(path)


@dataclasses.dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"]
    width: Annotated[int, size(10)] = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    first: Inner
    second: Inner
    depth: Annotated[int, size(10)] = 1


def test_specs_come_back_as_they_were():
    """Plain numbers in the file are frozen dataclasses again, one in another."""
    spec = Outer(Inner("a"), Inner("b", width=10), depth=2)
    assert checkpoint.read_spec(Outer, checkpoint.plain(spec)) == spec
    assert checkpoint.read_spec(Outer, dict(first=dict(kind="a"), second=dict(kind="b"))) == Outer(
        Inner("a"), Inner("b")
    )


@pytest.mark.parametrize(
    "content",
    [
        None, [], 3, "x", {}, dict(first=dict(kind="a")), dict(first=dict(kind="a"), second=dict(kind="c")),
        dict(first=dict(kind="a"), second=dict(kind="b", width=11)), dict(first=dict(kind="a"), second=None),
        dict(first=dict(kind="a"), second=dict(kind="b", width=2.0)), dict(first=dict(kind="a"), second=[["kind"]]),
        dict(first=dict(kind="a"), second=dict(kind="b", width=True)), dict(first=dict(kind="a"), second="kind"),
        dict(first=dict(kind="a"), second=dict(kind="b"), depth=None), dict(first=dict(kind="a"), second={}),
        dict(first=dict(kind="a"), second=dict(kind="b"), depth=0), dict(first=3, second=3),
        dict(first=dict(kind="a"), second=dict(kind="b", more=1)), dict(first=dict(kind=["a"]), second=dict(kind="b")),
    ],
)  # fmt: skip
def test_specs_that_nobody_means(content: Any):
    """Also without the checks of types that are active in tests only: these classes have none."""
    with pytest.raises(ValueError, match=r"^model is "):
        checkpoint.read_spec(Outer, content)


def test_parts_of_an_agent_that_do_not_fit_each_other():
    """Fails if such an agent is loaded, to stumble at its first action."""
    spec = AgentSpec(PolicySpec(3, 4, 8, 2), CriticSpec(3, 4, "mlp", 8, 2), horizon=2, knots=5)
    good = checkpoint.plain(spec)
    assert checkpoint.read_spec(AgentSpec, good) == spec
    for part, change in (
        ("policy", dict(observation=4)), ("critic", dict(observation=4)), ("critic", dict(action=2)),
        ("policy", dict(action=2)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^model is "):
            checkpoint.read_spec(AgentSpec, good | {part: good[part] | change})
    with pytest.raises(ValueError, match=r"^model is "):
        checkpoint.read_spec(AgentSpec, good | dict(horizon=3))


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


@pytest.mark.parametrize("change", [dict(width=16), dict(depth=3), dict(action=4), dict(kind="trunk")])
def test_arrays_that_do_not_fit_the_header(path: Path, change: dict):
    checkpoint.save(path, with_model(**change), trained())
    with pytest.raises(UserError, match=r"model\.eqx is whole, and not of this revision"):
        load(path)


@pytest.mark.parametrize("field", ["model", "horizon", "seeds", "replicas", "policy_sha256", "data"])
def test_a_header_that_lacks_something(path: Path, field: str):
    checkpoint.save(path, {key: value for key, value in HEADER.items() if key != field}, trained())
    with pytest.raises(UserError, match=rf"has no {field}, as those of an older revision"):
        load(path)


def test_with_64_bits_a_file_of_32_is_whole(path: Path):
    """Its leaves keep the types of the file; fails if `jax_enable_x64` makes a checkpoint unreadable."""
    expected = load(path)[1]
    with jax.enable_x64(True):
        found = load(path)[1]
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_what_cannot_be_read_is_not_called_damaged(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without permission, without memory on the host or the device, where JAX allows no transfer that it was not told
    of: each in its own words, and nothing is to be deleted."""
    for error in (
        PermissionError(13, "Permission denied", str(path)),
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ):

        def fails(*_: Any, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_read_leaf", fails)
            with pytest.raises(UserError, match=rf"cannot be read \({re.escape(str(error) or 'not enough')}") as caught:
                load(path)
        assert "delete" not in str(caught.value) and "damaged" not in str(caught.value)
    with jax.transfer_guard("disallow"):
        load(path)
    path.chmod(0)
    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr("builtins.open", lambda *_: fails(error=PermissionError(13, "Permission denied", str(path))))
        with pytest.raises(UserError, match="cannot be read"):
            load(path)
        with pytest.raises(PermissionError):
            checkpoint.newest(path, path, stage="value", remedy=REMEDY)


def test_wrong_dtype(path: Path):
    checkpoint.save(path, HEADER, jax.tree.map(lambda x: np.asarray(x, np.float16), trained()))
    with pytest.raises(UserError, match="is whole, and not of this revision"):
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


@pytest.mark.slow
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(mutations=MUTATIONS)
def test_no_file_brings_more_than_a_sentence(tmp_path_factory: pytest.TempPathFactory, mutations: list):
    """Whatever stands in a file whose SHA-256 is right: a `UserError`, or arrays of the shapes and types asked for."""
    path = tmp_path_factory.getbasetemp() / "mutated.eqx"
    checkpoint.save(path, {"stage": "bank", "horizon": 3}, TEMPLATE)
    path.write_bytes(mutate(path.read_bytes()[: -checkpoint.TRAILER_BYTES], mutations))
    sign(path)
    try:
        header, found = checkpoint.load(path, lambda _: TEMPLATE, stage="bank", remedy=REMEDY)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert header["stage"] == "bank" and 1 <= header.get("horizon", 1) <= 1_000
    for array, like in zip(found, TEMPLATE, strict=True):
        assert array.shape == like.shape and array.dtype == like.dtype
