#!/usr/bin/env bash
# Everything behind results/preview.md, one command a line.
set -euo pipefail
cd "$(dirname "$0")/.."

# Data (collected if OGBench's host does not answer) and base policies.
python evor_bc.py --env cube-single-play --preview
python evor_bc.py --env cube-double-play --preview --horizon 5 --steps 250000
python -m benchmarks.base_policy --env cube-single-play --out results/base_policy_cube-single-play.csv
python -m benchmarks.base_policy --env cube-double-play --out results/base_policy_cube-double-play.csv
python -m benchmarks.base_policy --env cube-double-play --flow-steps 100 --out results/base_policy_cube-double-play_100-euler-steps.csv
python evor_bc.py --env cube-double-play --preview --horizon 5 --run-dir runs/cube-double-play-100k
python -m benchmarks.base_policy --env cube-double-play --run-dir runs/cube-double-play-100k --out results/base_policy_cube-double-play_100k.csv

# Reward models: the published target and the default one, each with the base and the softmax backup.
python evor_value.py --env cube-single-play --preview --tasks 2 1 4 --td-target paper --next-action base --run-dir runs/preview/single-paper-base --policy-run-dir runs/cube-single-play
python evor_value.py --env cube-single-play --preview --tasks 2 1 4 --td-target shared-noise --next-action base --run-dir runs/preview/single-shared-base --policy-run-dir runs/cube-single-play
python evor_value.py --env cube-single-play --preview --tasks 2 --td-target paper --next-action softmax --run-dir runs/preview/single-paper-softmax --policy-run-dir runs/cube-single-play
python evor_value.py --env cube-single-play --preview --tasks 2 --td-target shared-noise --next-action softmax --run-dir runs/preview/single-shared-softmax --policy-run-dir runs/cube-single-play
python evor_value.py --env cube-double-play --preview --horizon 5 --td-target shared-noise --next-action base --run-dir runs/preview/double-shared-base --policy-run-dir runs/cube-double-play

# Not in the table yet: they wait for a base policy that holds the cubes of cube-double.
# python evor_value.py --env cube-double-play --preview --horizon 5 --td-target paper --next-action base --run-dir runs/preview/double-paper-base --policy-run-dir runs/cube-double-play
# python evor_value.py --env cube-double-play --preview --horizon 5 --td-target paper --next-action softmax --run-dir runs/preview/double-paper-softmax --policy-run-dir runs/cube-double-play
# python evor_value.py --env cube-double-play --preview --horizon 5 --td-target shared-noise --next-action softmax --run-dir runs/preview/double-shared-softmax --policy-run-dir runs/cube-double-play

python -m results.preview --runs runs/preview/*
