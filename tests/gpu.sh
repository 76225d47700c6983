#!/bin/sh
# The first day with a GPU: at most ten minutes, no network, random weights for the true sizes.
#
#   tests/gpu.sh                    # writes runs/gpu/*.log and *.json; OUT=FOLDER: elsewhere
#   DEVICE=cpu SCALE=5 tests/gpu.sh     # as far as a CPU goes, with five times the time
#
# Each step has a time limit and a log of its own; one that fails is named, and the next one begins.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}; DEVICE=${DEVICE:-cuda}; PYTHON=${PYTHON:-python}; SCALE=${SCALE:-1}
mkdir -p "$OUT"; OUT=$(cd "$OUT" && pwd); RUN=$OUT/run
export OUT DEVICE HF_HUB_OFFLINE=1
[ "$DEVICE" = cpu ] && export CUDA_VISIBLE_DEVICES=""
: > "$OUT/steps.jsonl"

step() {                            # NAME SECONDS COMMAND...
    name=$1; limit=$(($2 * SCALE)); shift 2; began=$(date +%s)
    timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1
    printf '{"step": "%s", "exit": %s, "seconds": %s, "limit": %s}\n' "$name" $? \
        $(($(date +%s) - began)) "$limit" | tee -a "$OUT/steps.jsonl"
}

step versions 30 "$PYTHON" - <<'END'
import json, os, onnxruntime, torch
onnxruntime.preload_dlls()
gpu = torch.cuda.is_available() and torch.cuda.get_device_properties(0)
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": str(gpu or None),
                  "cudnn": torch.backends.cudnn.version(), "onnxruntime": onnxruntime.__version__,
                  "providers": onnxruntime.get_available_providers(), "cores": os.cpu_count()}))
END
step rectify 60 "$PYTHON" rectify.py --device "$DEVICE" --epochs 2 --out "$RUN"
step distill 60 "$PYTHON" distill.py --device "$DEVICE" --epochs 2 --out "$RUN"
step export 60 "$PYTHON" export.py --out "$RUN"
step run 20 "$PYTHON" export.py --run "$RUN/student.onnx" --provider "$DEVICE" \
    --image tests/emoji/figure4.png --mask "$OUT/mask.png"
step probe 140 "$PYTHON" tests/probe.py "$OUT" "$DEVICE"
step bench 110 "$PYTHON" tests/bench.py --out "$OUT"
step bench-export 110 "$PYTHON" tests/bench.py export --out "$RUN"
cp "$RUN"/*.json "$OUT" 2> /dev/null
echo "wrote $OUT/: $(ls "$OUT" | tr '\n' ' ')"
