"""What a sweep over settings of the readout leaves: a row per episode, their summary, and a figure."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import figures
from common.errors import UserError
from common.evaluation import score_text, summarise
from common.files import hold_directory, sha256, write_csv, write_json
from common.provenance import git_revision, hardware, package_versions


def sweep_folder(args: Any) -> Path:
    """The folder `args.out` of the run directory.

    Raises:
        UserError: something else stands there.
    """
    out: Path = args.directory / Path(args.out).expanduser()
    trained = any((out / name).is_file() for name in ("model.eqx", "train_state.eqx"))
    if trained or out.resolve() in {(args.directory / name).resolve() for name in ("", "bc", "value")}:
        raise UserError(f"--out {args.out}: {out} is not for sweeps: name another folder.")
    return out


class Sweep:
    """The folder that a sweep fills.

    Files: `episodes.csv` and `summary.csv`, written anew after each setting, and at the end `config.json` (arguments,
    data, versions, hardware, and the seconds that the episodes took) and `sweep.png`. One process at a time may fill
    it.
    """

    def __init__(self, args: Any, header: dict[str, Any], *, settings: Sequence[str]):
        """Takes the folder of `sweep_folder`.

        Args:
            header: of the agents' checkpoint.
            settings: names of what is swept, columns of the rows.

        Raises:
            UserError: another process is filling it.
        """
        self.args, self.header, self.settings = args, header, settings
        self.rows: list[dict[str, Any]] = []
        self.out = sweep_folder(args)
        self._began, self._lock = time.monotonic(), hold_directory(self.out, "--out")
        (self.out / "config.json").unlink(missing_ok=True)  # of the sweep before

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds and writes the episodes of one setting."""
        data = self.header["data"]
        about = dict(env=self.header["env"], data_source=data["source"], data_sha256=data["sha256"])
        about |= dict(eval_seed=self.args.eval_seed)
        self.rows += [about | row for row in rows]
        self.summary = summarise(self.rows, ("env", "data_source", "action_noise", *self.settings, "task"))
        write_csv(self.out / "episodes.csv", list(self.rows[0]), self.rows)
        write_csv(self.out / "summary.csv", list(self.summary[0]), self.summary)

    def finish(self) -> list[dict[str, Any]]:
        """Writes the rest, prints and draws the summary, and returns it."""
        args, header = self.args, self.header
        # Last: where it stands, all that it describes does.
        config = dict(stage="infer", env=header["env"], args=args, data=header["data"])
        agents = args.directory / "value" / "model.eqx"
        config |= dict(policy_sha256=header["policy_sha256"], critic_sha256=sha256(agents))
        config |= dict(versions=package_versions(), git_revision=git_revision(), hardware=hardware())
        config |= dict(seconds=round(time.monotonic() - self._began, 1))
        write_json(self.out / "config.json", config)
        figures.sweep(self.summary, self.out / "sweep.png", title=f"{header['env']} ({header['data']['source']} data)")
        for row in self.summary:
            print(
                f"task {row['task']}  N_pi {row['num_actions']:<3} N {row['num_returns']:<3} "
                f"tau_R {row['return_temperature']:<5g} tau_Q {row['action_temperature']:<5g} "
                f"lambda {row['noise_scale']:<5g} noise {row['action_noise']:<5g} "
                f"{score_text(row)} of {row['episodes']} episodes"
            )
        for name, file in (("rows", "episodes.csv"), ("summary", "summary.csv"), ("figure", "sweep.png")):
            print(f"{name}: {self.out / file}")
        return self.summary
