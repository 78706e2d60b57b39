"""Settings that remove whole classes of mistakes; they hold for every test."""

import os

os.environ.setdefault("MUJOCO_GL", "disable")
os.environ["EVOR_DATA_HOSTS"] = ""  # no test downloads anything from the real hosts
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # (B,) against (B, 1) is an error, in worker processes too

from jaxtyping import install_import_hook

# Checks every shape annotation of the project while tests run.
install_import_hook(["common", "evor_bc", "evor_value", "evor_infer", "benchmarks", "baselines"], "beartype.beartype")
