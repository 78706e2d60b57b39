"""Agents on the Hugging Face hub, against a local server that keeps what it is given."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

import evor_infer
from common import checkpoint, publish
from common.errors import UserError
from common.networks import CriticSpec, PolicySpec
from tests.helpers import rewrite
from tests.processes import ROOT

EPISODES = """env,task,seed,step,num_actions,success,length,total
robot,2,0,10,4,0.0,5,-5.0
robot,2,0,20,1,0.0,5,-5.0
robot,2,0,20,4,1.0,5,-5.0
robot,2,0,20,4,0.0,9,-9.0
"""


class Hub(BaseHTTPRequestHandler):
    """The requests that publishing one small agent and loading it make."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    public = True

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            Hub.public = not {"private", True} & {*json.loads(body).values()}
            self.answer(json.dumps(dict(url=f"{here}/me/robot", name="me/robot")).encode())
        elif self.path == "/api/validate-yaml":
            self.answer(b'{"errors": [], "warnings": []}')
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answers = [dict(path=name, uploadMode="regular", shouldIgnore=False, oid=None) for name in names]
            self.answer(json.dumps(dict(files=answers)).encode())
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{here}/me/robot/commit/{'a' * 40}"
            self.answer(json.dumps(dict(commitUrl=url, commitOid="a" * 40, success=True)).encode())
        else:
            self.answer(b"{}", 404)

    def do_GET(self) -> None:
        name = self.path.partition("/me/robot/resolve/")[2].partition("/")[2]
        if name in Hub.files:
            content = Hub.files[name]
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="a" * 40)
        elif self.path.startswith("/api/models/me/robot"):
            self.answer(json.dumps(dict(id="me/robot", sha="a" * 40, siblings=[])).encode())
        else:
            self.answer(b"{}", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process for which the local server is the hub."""
    Hub.files.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_TOKEN="hf_x", HF_HUB_DISABLE_XET="1")
    yield os.environ | settings | dict(HF_HOME=str(tmp_path / "hub"), HF_HUB_DISABLE_TELEMETRY="1")
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with an agent that has learned nothing."""
    spec = evor_infer.AgentSpec(PolicySpec(3, 2, 8, 2), CriticSpec(3, 2, "mlp", 8, 2), horizon=1, knots=5)
    agents = jax.tree.map(lambda x: x[None], evor_infer.init_agent(spec, key=jax.random.key(0)))
    args = dict(steps=20_000, num_actions=4, td_target="shared-noise", critic="mlp", next_action="base", discount=0.99)
    header = dict(stage="value", env="robot", horizon=1, step=1, args=args, seeds=[0], replicas=[[2, 0]])
    data = dict(name="rows.npz", source="minari", converted_from="me/rows-v0", sha256="c" * 64)
    header |= dict(data=data, model=spec, policy_sha256="", method="shared-noise")
    checkpoint.save(tmp_path / "run" / "value" / "model.eqx", header, agents)
    (tmp_path / "run" / "value" / "evaluation.csv").write_text(EPISODES)
    (tmp_path / "run" / "value" / "train_state.eqx").write_text("is not published")
    return tmp_path / "run"


def call(code: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_an_agent_goes_to_the_hub_and_comes_back(run: Path, hub: dict[str, str]):
    command = [sys.executable, "-m", "common.publish", str(run), "--to", "me/robot", "--private"]
    done = subprocess.run(command, cwd=ROOT, env=hub, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "published: load_agent('hf://me/robot')" in done.stdout and not Hub.public
    assert Hub.files.keys() == {"README.md", "value/model.eqx", "value/evaluation.csv"}
    assert Hub.files["value/model.eqx"] == (run / "value" / "model.eqx").read_bytes()
    act = "agent.act(np.ones((1, 3)), key=jax.random.key(0)).tolist()"
    done = call(
        "import jax, numpy as np; from evor_infer import load_agent; agent = load_agent('hf://me/robot', task=2); "
        f"print({act})",
        hub,
    )
    agent = evor_infer.load_agent(run)
    expected = agent.act(np.ones((1, 3)), key=jax.random.key(0)).tolist()
    np.testing.assert_allclose(json.loads(done.stdout), expected, rtol=1e-6, err_msg=done.stderr)
    done = call("from evor_infer import load_agent; load_agent('hf://me/nothing')", hub)
    assert "hf://me/nothing cannot be downloaded" in done.stderr


def test_the_card_says_what_it_is_on_what_data_how_good_and_how_to_load_it(run: Path, hub: dict[str, str]):
    header = checkpoint.read_header(run / "value" / "model.eqx", stage="value", remedy="")
    episodes = publish.last_episodes(run / "value")
    text = publish.card(header, episodes, "me/robot")
    for part in (
        "# EVOR on robot",
        f"Data: rows.npz (converted from minari:me/rows-v0), SHA-256 `{'c' * 64}`",
        "Critic: shared-noise, 20,000 gradient steps, next action `base`, discount 0.99, chunks of 1 actions",
        "| task | best of 4 actions | episodes |",
        "| 2 | success 50% [9%, 91%] | 2 |",
        'load_agent("hf://me/robot")',
    ):
        assert part in text
    assert "It was not evaluated." in publish.card(header, [], "me/robot")


def test_a_name_of_data_that_is_no_text(run: Path, monkeypatch: pytest.MonkeyPatch):
    """As Python reads a file's name where everything is ASCII: the card shows what can be shown."""
    rewrite(run / "value" / "model.eqx", data=dict(name="h\udcc3\udcbchn.npz", source="file", sha256="c" * 64))
    cards = []

    def upload(folder_path: Path, **_: object) -> None:
        cards.append((folder_path / "README.md").read_text(encoding="utf-8"))

    hub = mock.Mock(upload_folder=upload)
    monkeypatch.setattr(publish, "import_hub", lambda: hub)
    publish.main(publish.Args(run, "me/robot"))
    assert "- Data: h??hn.npz (source: file)" in cards[0]


def test_an_agent_loads_where_jax_allows_no_transfer_that_it_was_not_told_of(run: Path):
    with jax.transfer_guard("disallow"):
        agent = evor_infer.load_agent(run)
    assert agent.policy.mlp.output.bias.shape == (2,)


def test_what_cannot_be_published(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        publish.main(publish.Args(run, "me/robot"))
    model = run / "value" / "model.eqx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"model\.eqx is damaged"):
        publish.main(publish.Args(run, "me/robot"))
    with pytest.raises(UserError, match=r"train it with evor_value\.py first"):
        publish.main(publish.Args(run / "elsewhere", "me/robot"))
