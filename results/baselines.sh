#!/usr/bin/env bash
# Everything behind results/baselines*, one command a line; after results/preview.sh, whose base policy it uses.
# The stored rows are of revision 90dd10a, whose temperatures were fractions of the range of the possible returns: check it
# out to get them again.
set -euo pipefail
cd "$(dirname "$0")/.."

# The base policy of horizon 1, as the one of horizon 5.
python evor_bc.py --env cube-double-play --preview --steps 200000 --ignore-observations 6 7 8 9 10 11 --run-dir runs/cube-double-play-h1

# EVOR and its critic without the flow: two seeds of the reward model on one base policy, one bank.
common="--env cube-double-play --preview --return-temperature 0.1 --action-temperature 0 --horizon 5 --steps 30000 --seeds 2 --policy-run-dir runs/cube-double-play --policy-seed 0"
for backup in base softmax; do
  for target in paper shared-noise; do
    python evor_value.py $common --td-target $target --next-action $backup --run-dir runs/baselines/$target-$backup
  done
  for critic in scalar c51 qr; do
    python -m baselines.critics $common --critic $critic --next-action $backup --run-dir runs/baselines/$critic-$backup
  done
done

# QC's value learning on the same base policies.
python -m baselines.qc --env cube-double-play --preview --return-temperature 0.1 --action-temperature 0 --horizon 5 --steps 30000 --policy-run-dir runs/cube-double-play --run-dir runs/baselines/qc-h5-n32
python -m baselines.qc --env cube-double-play --preview --return-temperature 0.1 --action-temperature 0 --horizon 1 --steps 30000 --policy-run-dir runs/cube-double-play-h1 --num-next-actions 4 --run-dir runs/baselines/qc-h1-n4

# The same models ranked by the mean of their returns; the summaries, each with its run, are results/baselines_readout.csv.
for critic in shared-noise qr c51; do
  python evor_infer.py --env cube-double-play --run-dir runs/baselines/$critic-base --num-actions 16 --num-returns 8 --return-temperature 0.1 inf --action-temperature 0 --out readout
done

python -m benchmarks.speed --groups baselines --rounds 2 --steps 5 --out runs/speed-baselines
# The second seeds were trained apart (--first-seed 1 in a run directory NAME-1, which draws what seed 1 of --seeds 2
# draws) and QC with horizon 1 on another machine; all were added with --append.
python -m experiments.baselines --runs runs/baselines/*/ --speed runs/speed-baselines/speed.csv

# Between the one-step and the greedy backup, one seed: the data's action, a softmax of 4 at a temperature of 4 units of
# return (0.02 of their range), the best of 4. The stored rows have a base policy trained anew, by the command in
# results/preview.sh on another machine.
common="--env cube-double-play --preview --return-temperature 0.1 --action-temperature 0 --horizon 5 --steps 30000 --policy-run-dir runs/cube-double-play --policy-seed 0"
for settings in "base" "dataset --next-action dataset" "softmax --next-action softmax"; do
  read -r name flags <<< "$settings"
  python evor_value.py $common $flags --run-dir runs/backups/shared-noise-$name
  python -m baselines.critics $common --critic scalar $flags --run-dir runs/backups/scalar-$name
done
python -m baselines.critics $common --critic scalar --next-action softmax --backup-temperature 0.02 --run-dir runs/backups/scalar-softmax-warm
python -m baselines.critics $common --critic c51 --first-seed 1 --run-dir runs/backups/c51-base
python -m experiments.baselines --name backups --runs runs/backups/*/ --speed runs/speed-baselines/speed.csv
