"""A trained agent on the Hugging Face hub: its checkpoint, its configuration, its episodes and a card.

    python -m common.publish runs/cube-double-play --to USER/NAME

`load_agent("hf://USER/NAME")` loads it, and `hf://USER/NAME@REVISION` one revision of it.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from common import checkpoint
from common.args import Paths
from common.cli import run_cli
from common.errors import UserError
from common.evaluation import METHOD, read_episodes, score_text, summarise

HUB = "hf://"
FILES = ("model.eqx", "config.json", "evaluation.csv", "calibration.csv")


@dataclasses.dataclass(frozen=True)
class Args(Paths):
    """Publish a trained agent on the Hugging Face hub."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run directory of stage 2."""
    to: str
    """USER/NAME on the hub; it is made if it does not stand there."""
    private: bool = False
    """Make it so that nobody else sees it."""


def import_hub() -> Any:
    """
    Raises:
        UserError: the package is not installed, or cannot be imported.
    """
    try:
        import huggingface_hub
    except Exception as error:  # what a broken installation raises
        raise UserError(f"the hub needs the package huggingface_hub ({error}): pip install huggingface_hub.") from None
    return huggingface_hub


def from_hub(name: str) -> Path:
    """The run directory of the agent `hf://USER/NAME[@REVISION]`, downloaded into the hub's cache.

    Raises:
        UserError: it is not there, or cannot be downloaded.
    """
    repository, _, revision = name.removeprefix(HUB).partition("@")
    hub = import_hub()
    try:
        path = hub.hf_hub_download(repository, "value/model.eqx", revision=revision or None)
    except Exception as error:  # of the network, the name or the login
        raise UserError(f"{name} cannot be downloaded ({error}): check its name and your login.") from None
    return Path(path).parent.parent


def card(header: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]], repository: str) -> str:
    """The README of a published agent, in Markdown: what it is, its data, how well it does, how to load it."""
    args, data = header["args"], header["data"]
    # An older revision has no lambda.
    best = [row for row in episodes if all(row.get(name, 1.0) == args.get(name, 1.0) for name in METHOD)]
    scores = [f"| {row['task'] or ''} | {score_text(row)} | {row['episodes']} |" for row in summarise(best, ("task",))]
    table = ["| task | best of {} actions | episodes |".format(args["num_actions"]), "|---|---|---|", *scores]
    method = header.get("method", args.get("td_target"))
    source = f"source: {data['source']}"
    if "converted_from" in data:
        source = f"converted from {'minari:' if data['source'] == 'minari' else ''}{data['converted_from']}"
    tasks, seeds = (sorted({pair[i] for pair in header["replicas"]}) for i in (0, 1))
    return "\n".join(
        [
            "---",
            "tags: [reinforcement-learning, offline-rl, flow-matching, jax]",
            "---",
            f"# EVOR on {header['env']}",
            "",
            "A flow-matching policy and a critic of the law of the reward-to-go, of EVOR (arXiv 2510.08218).",
            "",
            f"- Data: {data['name']} ({source}), SHA-256 `{data['sha256']}`.",
            f"- Critic: {method}, {args['steps']:,} gradient steps, next action `{args['next_action']}`, "
            f"discount {args['discount']}, chunks of {header['horizon']} actions.",
            f"- Tasks {tasks}, seeds {seeds}; revision {header.get('git_revision') or 'unknown'} of the code.",
            "",
            *(table if scores else ["It was not evaluated."]),
            "",
            "```python",
            "import jax",
            "from evor_infer import load_agent",
            "",
            f'agent = load_agent("{HUB}{repository}")',
            "actions = agent.act(observations, key=jax.random.key(0))",
            "```",
            "",
        ]
    )


def last_episodes(folder: Path) -> list[dict[str, Any]]:
    """Of the last evaluation of a training."""
    path = folder / "evaluation.csv"
    rows = read_episodes(path) if path.is_file() else []
    return [row for row in rows if row["step"] == max(row["step"] for row in rows)]


def main(args: Args) -> str:
    """Uploads; returns and prints the address.

    Raises:
        UserError: the run has no complete agent, or the hub refuses.
    """
    folder = args.run / "value"
    header = checkpoint.read_header(folder / "model.eqx", stage="value", remedy="train it with evor_value.py first.")
    if not checkpoint.complete(folder / "model.eqx"):
        raise checkpoint.unusable(folder / "model.eqx", "its SHA-256")
    episodes = last_episodes(folder)
    hub = import_hub()
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        (copy / "value").mkdir()
        text = card(header, episodes, args.to)
        (copy / "README.md").write_text(text, encoding="utf-8", errors="replace")  # names of files may be no text
        for name in FILES:
            if (folder / name).is_file():
                shutil.copy(folder / name, copy / "value" / name)
        try:
            hub.create_repo(args.to, private=args.private, exist_ok=True)
            hub.upload_folder(repo_id=args.to, folder_path=copy, commit_message=f"EVOR on {header['env']}")
        except Exception as error:  # of the network, the name or the login
            raise UserError(f"{args.to} cannot be published ({error}): `hf auth login`, and check the name.") from None
    print(f"published: load_agent({HUB + args.to!r})")
    return HUB + args.to


if __name__ == "__main__":
    run_cli(main, Args)
