#!/usr/bin/env bash
# Everything behind results/next_actions* and results/critics*; after results/preview.sh.
# The stored rows are of revision 90dd10a, whose temperatures were fractions of the range of the possible returns: check it
# out to get them again.
set -euo pipefail
cd "$(dirname "$0")/.."

# Number of banked next actions (K = 4 is runs/preview/double-shared-noise-base, double-4 and double-trunk in the stored
# rows), and the paper's MLP for a critic.
for K in 1 2 8; do
  python evor_value.py --env cube-double-play --preview --return-temperature 0.1 --action-temperature 0 --horizon 5 --num-next-actions $K --run-dir runs/next_actions/double-$K --policy-run-dir runs/cube-double-play
done
python evor_value.py --env cube-double-play --preview --return-temperature 0.1 --action-temperature 0 --horizon 5 --critic mlp --run-dir runs/critics/double-mlp --policy-run-dir runs/cube-double-play
python evor_value.py --env cube-single-play --preview --return-temperature 0.1 --action-temperature 0 --tasks 2 --critic mlp --run-dir runs/critics/single-mlp --policy-run-dir runs/cube-single-play
python -m experiments.preview --name next_actions --runs runs/next_actions/double-1 runs/next_actions/double-2 runs/preview/double-shared-noise-base runs/next_actions/double-8
python -m experiments.preview --name critics --runs runs/critics/double-mlp runs/preview/double-shared-noise-base runs/critics/single-mlp runs/preview/single-shared-noise-base

# Collected data against data of OGBench's own script (data_gen_scripts/ of its repository), in reference/.
python -m benchmarks.same_data --env cube-double-play --reference reference/cube-double-play-v0.npz --collected ~/.ogbench/data/collected/cube-double-play-v0-ep1000-seed0.npz
python -m benchmarks.same_data --env pointmaze-large-navigate --reference reference/pointmaze-large-navigate-v0.npz --collected ~/.ogbench/data/collected/pointmaze-large-navigate-v0-ep1000-seed0.npz
