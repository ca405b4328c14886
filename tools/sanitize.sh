#!/bin/sh
# tools/sanitize.sh DIR: compute-sanitizer over the CUDA kernels at small sizes, on a GPU: memcheck, then racecheck. Every
# case is checked against naive kernels, too. DIR: where bench_linear, bench_embedding and bench_moe are. All runs at
# once; what each printed is shown where it failed. Exit code 1 where one found anything.
set -u
dir=$1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for tool in memcheck racecheck; do
  for run in "linear --path cluster --path mma --path wide --path general" "linear --dtype fp16 --path mma" \
    "linear --chain --baseline beside" "embedding --path mma --path wide --path general" \
    "moe --base none --seams beside --path mma --path general" "moe --base none --seams fused --path mma --path general"; do
    # shellcheck disable=SC2086  # words of $run are arguments
    set -- $run
    name=$tool-$(echo "$run" | tr -c 'a-z0-9\n' _)
    bench=bench_$1
    shift
    (
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$dir/$bench" --check "$@" >"$out/$name" 2>&1
      code=$?
      echo "$code" >"$out/$name.code"
      echo "$tool $bench --check $*: exit code $code, $(grep -cE '  [0-9.]+e[-+][0-9]+$' "$out/$name") cases right"
    ) &
  done
  wait
done
failed=0
for code in "$out"/*.code; do
  [ "$(cat "$code")" = 0 ] && continue
  failed=1
  echo "== ${code%.code}" && tail -40 "${code%.code}"
done
exit $failed
