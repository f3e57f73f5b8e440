#!/usr/bin/env bash
# Runs a command, and runs it again if another host was lost (exit code 75) or the process was killed:
#
#     bash examples/restart.sh python run_train.py --ckpt_dir=runs/two ...
#
# It ends when the command has finished, after Ctrl-C (130) or SIGTERM (143), after an error that
# another start does not solve (all other exit codes), and after 100 starts.
for ((start = 1; ; start++)); do
  "$@"
  code=$?
  if ((code != 75 && (code <= 128 || code == 130 || code == 143) || start == 100)); then
    exit "$code"
  fi
  echo "restart.sh: exit code $code; start $((start + 1)) of at most 100" >&2
done
