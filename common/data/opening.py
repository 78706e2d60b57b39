"""What is in a file, without reading its arrays, and why it cannot be read."""

import contextlib
import errno
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError

HDF5 = (".hdf5", ".h5", ".hdf", ".he5")
REMEDIES = {
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EAGAIN: "wait until the process that writes it has closed it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free some memory, or split it into several files",
}


def unreadable(what: str, error: Exception, remedy: str) -> UserError:
    """A sentence with the cause, which ends with `remedy` where that is what the file contains."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if number not in (None, errno.EINVAL):  # the latter comes from a place that is none, as damaged files name them
        remedy = REMEDIES.get(number, "see that it is still there and that its disk works")
    return UserError(f"{what} cannot be read ({str(error) or repr(error)}): {remedy}.")


def read_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array in NumPy's format."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def unused(path: Path, used: Collection[str]) -> list[str]:
    """What to print of the arrays with a row for each of `observations` that are not among `used`."""
    shapes = {}
    with contextlib.suppress(Exception):  # damage is reported where the arrays are read
        if path.suffix.lower() in HDF5:
            import h5py

            with h5py.File(path) as file:
                shapes = {key: getattr(item, "shape", ()) for key, item in file.items()}
        else:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    with archive.open(name) as array:
                        shapes[name.removesuffix(".npy")] = read_header(array)[0]
    rows = shapes.get("observations", ())[:1]
    names = sorted(key for key, shape in shapes.items() if key not in used and rows and shape[:1] == rows)
    return [f"  not used: {', '.join(names)} of {path.name} (docs/data.md says what is read)"] if names else []
