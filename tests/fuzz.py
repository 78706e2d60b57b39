"""Coverage-guided fuzzing of everything that reads a file which may come from a stranger.

    pip install atheris
    python -m tests.fuzz checkpoint -max_total_time=600
    python -m tests.fuzz policy -max_total_time=600
    python -m tests.fuzz npz -max_total_time=600

A file is either refused with a `UserError` or read, and an agent that is read acts; any other exception, more memory
than RSS_LIMIT, and more than TIMEOUT seconds are findings, which libFuzzer writes to the working directory. What
follows the target goes to it.
Half of the files are mutated as bytes, half by their meaning, since hardly any changed byte gets past a checksum:
fields of headers, shapes and types of arrays, with the checksums made anew.
"""

import contextlib
import dataclasses
import hashlib
import io
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["common", "evor_infer", "zipfile", "numpy.lib", "json"]):
    import json
    import zipfile

    import numpy as np

    import evor_infer
    from common import checkpoint
    from common.data import files
    from common.errors import UserError

import jax

import evor_bc
import evor_value
from tests.helpers import tiny_dataset

RSS_LIMIT, TIMEOUT = 4_000, 60  # MB, seconds
SMALL = dict(env="robot", steps=2, steps_per_call=2, width=4, depth=2, batch_size=2)
VALUES = (
    0, 1, 2, 3, -1, 10**6, 10**18, 2**63, 1.5, float("inf"), float("nan"), None, True, "", "x", "../..", "mlp", "trunk",
    "scalar", "c51", "bc", "value", [], [0], [[0, 0]], [[0, 0], [0, 0]], [["", 0]], [[]], {}, {"name": 1},
)  # fmt: skip
TYPES = ("<f4", "<f8", "|b1", "|O", "<i8", "<f2", "<U3", "|S9", "<M8[s]", "<c16", "|V4", [("x", "<f4")], "<f4, <i2")
SHAPES = ((0,), (), (1,), (3,), (120,), (120, 3), (120, 0), (-1,), (2**40,), (2**31, 2**31), (120, 3, 1), (True, 2))


def mutate_header(header: dict, rng: random.Random) -> dict:
    """Removes, changes or adds a field, here or in a field that is an object itself."""
    header = dict(header)
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice([*header, "model", "diverged", "policy_seed", "outputs", rng.choice(("x", "policies"))])
        if isinstance(header.get(key), dict) and rng.random() < 0.6:
            header[key] = mutate_header(header[key], rng)
        elif rng.random() < 0.2:
            header.pop(key, None)
        else:
            header[key] = rng.choice(VALUES)
    return header


def npy(rng: random.Random, content: bytes) -> bytes:
    """An array file with a header of any type and shape before `content`."""
    buffer = io.BytesIO()
    described = dict(descr=rng.choice(TYPES), fortran_order=rng.random() < 0.3, shape=rng.choice(SHAPES))
    with contextlib.suppress(Exception):
        (np.lib.format.write_array_header_2_0 if rng.random() < 0.2 else np.lib.format.write_array_header_1_0)(
            buffer, described
        )
    return buffer.getvalue() + content


def sign(content: bytes) -> bytes:
    return content + checkpoint.TRAILER + hashlib.sha256(content).hexdigest().encode()


def mutate_checkpoint(content: bytes, size: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.1:
        return atheris.Mutate(content, size)  # its SHA-256 is wrong then
    line, _, arrays = content[: -checkpoint.TRAILER_BYTES].partition(b"\n")
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        if rng.random() < 0.6:
            line = json.dumps(mutate_header(json.loads(line), rng)).encode()
        elif rng.random() < 0.5:
            line = atheris.Mutate(line, len(line) + 64)
    if arrays and rng.random() < 0.4:
        start = max(0, arrays.find(b"\x93NUMPY", rng.randrange(len(arrays))))
        old = arrays[start:]
        new = (npy(rng, old[128:]), old[rng.randrange(200) :], atheris.Mutate(old, size))
        arrays = arrays[:start] + rng.choice(new)
    return sign(line + b"\n" + arrays)


def mutate_npz(content: bytes, size: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return atheris.Mutate(content, size)
    members = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for info in archive.infolist():
                members[info.filename] = archive.read(info)
    except Exception:
        return atheris.Mutate(content, size)
    for _ in range(rng.randrange(1, 3)):
        name = rng.choice([*members, "observations.npy", "rewards.npy", "qpos.npy", "x", "../evil.npy"])
        old = members.get(name, b"")
        members[name] = rng.choice(
            (npy(rng, old[128:]), npy(rng, b""), atheris.Mutate(old or b"x", size), old[: rng.randrange(len(old) + 1)])
        )
        if rng.random() < 0.1:
            del members[name]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return buffer.getvalue()


def main() -> None:
    """See the top of the file."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    dataset, run = tiny_dataset(directory / "data.npz"), directory / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        evor_bc.main(evor_bc.Args(**SMALL, dataset=dataset, run_dir=run))
        evor_value.main(evor_value.Args(**SMALL, dataset=dataset, run_dir=run, num_next_actions=1))
    target = sys.argv.pop(1)
    path = {"checkpoint": run / "value" / "model.eqx", "policy": run / "bc" / "model.eqx", "npz": dataset}[target]
    corpus = directory / "corpus"
    corpus.mkdir()
    (corpus / "good").write_bytes(path.read_bytes())
    key = jax.random.key(0)
    counts = dataclasses.make_dataclass("Counts", [("read", int, 0), ("refused", int, 0)])()

    def once(content: bytes) -> None:
        path.write_bytes(content)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                if target == "npz":
                    files.load_trajectories(path, env="robot", tasks=(0,))
                elif target == "policy":
                    evor_bc.load(path)
                else:
                    agent = evor_infer.load_agent(run)
                    agent.act(np.zeros((1, agent.policy.spec.observation), np.float32), num_actions=2, key=key)
            counts.read += 1
        except UserError as error:
            assert str(error).strip()
            counts.refused += 1
        if (counts.read + counts.refused) % 1_000 == 0:
            print(counts, flush=True)

    once(path.read_bytes())  # compiles what takes longer than a file may
    limits = [f"-rss_limit_mb={RSS_LIMIT}", f"-timeout={TIMEOUT}", "-max_len=100000", str(corpus)]
    mutator = mutate_npz if target == "npz" else mutate_checkpoint
    atheris.Setup([sys.argv[0], *sys.argv[1:], *limits], once, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
