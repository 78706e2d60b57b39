"""Where a run's numbers go beside `metrics.csv`: Weights & Biases, TensorBoard or Trackio, imported when asked for."""

import importlib
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from common.files import plain, read_json, write_json

Tracker = Literal["wandb", "tensorboard", "trackio"]
REMEDIES = {
    "wandb": "`wandb login`, or set WANDB_MODE=offline",
    "tensorboard": "see that the run directory can be written to",
    "trackio": "see that its folder can be written to (TRACKIO_DIR)",
}


class TensorBoard:
    """Event files in a folder, with the `log` of the others."""

    def __init__(self, folder: Path):
        self.writer = import_tracker("tensorboard").Writer(str(folder))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


def import_tracker(name: Tracker) -> Any:
    """The package, or the module of it that writes.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module("tensorboard.summary" if name == "tensorboard" else name)
    except Exception as error:  # what a broken installation raises
        raise UserError(f"--track {name} needs the package ({error}): pip install {name}.") from None


def start_tracking(
    tracker: Tracker, name: str, config: Mapping[str, Any], *, directory: Path, anew: bool = False
) -> Any:
    """Something with `log(values, step=)`, of the project `evor`.

    `tracking.json` in the run's `directory` keeps an id: a run that goes on here is one run there, too.

    Args:
        name, config: of the run, as they are shown.
        anew: whether it is a new run, whatever stands in `directory`.

    Raises:
        UserError: it does not start, without a key for instance.
    """
    package = import_tracker(tracker)
    kept = (None if anew else read_json(directory / "tracking.json")) or {"id": secrets.token_hex(8)}
    try:
        if tracker == "wandb":
            settings = dict(id=kept["id"], resume="allow", reinit="finish_previous")
            run = package.init(project="evor", name=name, config=plain(config), **settings)
        elif tracker == "trackio":
            run = package.init(project="evor", name=f"{name}-{kept['id']}", config=plain(config), resume="allow")
        else:
            if anew:
                shutil.rmtree(directory / "tensorboard", ignore_errors=True)
            run = TensorBoard(directory / "tensorboard")
    except Exception as error:  # of the network, the key or the service
        raise UserError(f"--track {tracker} does not start ({error}): {REMEDIES[tracker]}.") from None
    write_json(directory / "tracking.json", kept)  # after what may fail
    return run
