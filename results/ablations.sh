#!/usr/bin/env bash
# Everything behind results/next_actions*, results/critics*, results/return_law_*; after results/preview.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

# Number of banked next actions (K = 4 is runs/preview/double-shared-noise-base, double-4 and double-trunk in the stored
# rows), and the paper's MLP for a critic.
for K in 1 2 8; do
  python evor_value.py --env cube-double-play --preview --return-temperature 0.1 --action-temperature 0 --horizon 5 --num-next-actions $K --run-dir runs/next_actions/double-$K --policy-run-dir runs/cube-double-play
done
python evor_value.py --env cube-double-play --preview --return-temperature 0.1 --action-temperature 0 --horizon 5 --critic mlp --run-dir runs/critics/double-mlp --policy-run-dir runs/cube-double-play
python evor_value.py --env cube-single-play --preview --return-temperature 0.1 --action-temperature 0 --tasks 2 --critic mlp --run-dir runs/critics/single-mlp --policy-run-dir runs/cube-single-play
python -m results.preview --name next_actions --runs runs/next_actions/double-1 runs/next_actions/double-2 runs/preview/double-shared-noise-base runs/next_actions/double-8
python -m results.preview --name critics --runs runs/critics/double-mlp runs/preview/double-shared-noise-base runs/critics/single-mlp runs/preview/single-shared-noise-base

# The same on problems with known laws: width and depth of the trunk critic's head, K, and all targets with the trunk.
for width in 16 32 64 128 256; do
  python -m benchmarks.return_law --methods shared-noise --critic trunk --head-width $width --probes "five-state chain" "stochastic reward, two steps" --out results/return_law_heads.csv --append
done
for depth in 1 2 4; do
  python -m benchmarks.return_law --methods shared-noise --critic trunk --head-depth $depth --probes "five-state chain" "stochastic reward, two steps" --out results/return_law_heads.csv --append
done
for K in 1 2 4 8 16; do
  python -m benchmarks.return_law --methods shared-noise --num-next-actions $K --probes "action-dependent reward, stochastic policy" --out results/return_law_next_actions.csv --append
  python -m benchmarks.return_law --methods shared-noise --num-next-actions $K --probes "action-dependent reward, stochastic policy" --copies 40000 --out results/return_law_next_actions.csv --append
done
python -m benchmarks.return_law --methods paper independent-noise shared-noise velocity --critic trunk --out results/return_law_trunk.csv

# Flows and baselines: over training, and over the size of the network (C51 with many atoms is slow: one size).
probes=("five-state chain" "stochastic reward, two steps" "action-dependent reward, stochastic policy")
out="--append --every 500 --out results/return_law_training.csv"
python -m benchmarks.return_law --probes "${probes[@]}" $out
python -m benchmarks.return_law --probes "${probes[@]}" $out --methods qr --huber 0.001
python -m benchmarks.return_law --probes "${probes[@]}" $out --methods shared-noise --critic trunk
python -m benchmarks.return_law --probes "${probes[@]}" $out --methods c51 --atoms 201
out="--append --out results/return_law_capacity.csv"
python -m benchmarks.return_law --probes "${probes[@]:0:2}" $out --width 16 --methods c51 --atoms 401
for size in "--width 16" "--width 64" "--width 128" "--width 256" "--width 128 --depth 2"; do
  python -m benchmarks.return_law --probes "${probes[@]:0:2}" $out $size --methods shared-noise qr --huber 0.001
done
for width in 16 64 128 256; do
  python -m benchmarks.return_law --probes "${probes[@]:0:2}" $out --width $width --methods shared-noise --critic trunk
done

# Collected data against data of OGBench's own script (data_gen_scripts/ of its repository), in reference/.
python -m benchmarks.same_data --env cube-double-play --reference reference/cube-double-play-v0.npz --collected ~/.ogbench/data/collected/cube-double-play-v0-ep1000-seed0.npz
python -m benchmarks.same_data --env pointmaze-large-navigate --reference reference/pointmaze-large-navigate-v0.npz --collected ~/.ogbench/data/collected/pointmaze-large-navigate-v0-ep1000-seed0.npz
