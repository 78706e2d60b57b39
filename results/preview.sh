#!/usr/bin/env bash
# Everything behind results/preview.md and results/base_policy_*.csv, one command a line.
# The stored rows are of revision 90dd10a, whose temperatures were fractions of the range of the possible returns: check it
# out to get them again.
set -euo pipefail
cd "$(dirname "$0")/.."

# Data (collected if OGBench's host does not answer) and base policies.
velocities="6 7 8 9 10 11"
python evor_bc.py --env cube-single-play --preview
python evor_bc.py --env cube-double-play --preview --horizon 5 --steps 200000 --ignore-observations $velocities
python evor_bc.py --env cube-double-play --preview --horizon 5 --steps 250000 --run-dir runs/cube-double-play-velocities
python -m benchmarks.base_policy --env cube-single-play --out results/base_policy_cube-single-play.csv
python -m benchmarks.base_policy --env cube-double-play --out results/base_policy_cube-double-play.csv
python -m benchmarks.base_policy --env cube-double-play --run-dirs runs/cube-double-play-velocities --out results/base_policy_cube-double-play_velocities.csv

# Reward models: the published target and the default one, each with the base and the softmax backup.
for target in shared-noise paper; do
  python evor_value.py --env cube-single-play --preview --return-temperature 0.1 --action-temperature 0 --tasks 2 1 4 --td-target $target --run-dir runs/preview/single-$target-base --policy-run-dir runs/cube-single-play
  python evor_value.py --env cube-single-play --preview --return-temperature 0.1 --action-temperature 0 --td-target $target --next-action softmax --run-dir runs/preview/single-$target-softmax --policy-run-dir runs/cube-single-play
  for backup in base softmax; do
    python evor_value.py --env cube-double-play --preview --return-temperature 0.1 --action-temperature 0 --horizon 5 --td-target $target --next-action $backup --run-dir runs/preview/double-$target-$backup --policy-run-dir runs/cube-double-play
  done
done

# The default target with four Euler steps, in the bootstrap too.
python evor_value.py --env cube-single-play --preview --return-temperature 0.1 --action-temperature 0 --tasks 2 1 4 --flow-steps 4 --solver euler --run-dir runs/target_steps/single-shared-noise-base-4-steps --policy-run-dir runs/cube-single-play
python evor_value.py --env cube-double-play --preview --return-temperature 0.1 --action-temperature 0 --horizon 5 --flow-steps 4 --solver euler --run-dir runs/target_steps/double-shared-noise-base-4-steps --policy-run-dir runs/cube-double-play

python -m experiments.preview --runs runs/preview/*
python -m experiments.preview --name target_steps --runs runs/target_steps/*
