#!/bin/sh
# vLLM over HTTP with FlexKV: curl sends one prompt three times.
#
#   examples/vllm_online.sh                                    a tiny random model, on the CPU
#   examples/vllm_online.sh MODEL FOLDER [arguments of `vllm serve`]
#
# FOLDER (by default ./flexkv-vllm) gets FlexKV's SSD tier, its socket and the log. The second time,
# vLLM's own cache has the prompt. That cache is emptied before the third, so the tokens that are
# not computed then come from FlexKV.
set -eu

model=${1:-} folder=${2:-flexkv-vllm}
shift $(($# < 2 ? $# : 2))
port=${PORT:-8000}
mkdir -p -m 700 "$folder"
folder=$(cd "$folder" && pwd)
if [ -z "$model" ]; then
	model=$folder/tiny-model
	python -m flexkv.testing.tiny_model "$model"
	set -- --dtype float32 --enforce-eager --block-size 32 --max-model-len 1024 \
		--kv-cache-memory-bytes 16777216
fi

# VLLM_SERVER_DEV_MODE: without it vLLM has no request that empties its cache.
VLLM_SERVER_DEV_MODE=1 vllm serve "$model" --served-model-name model --port "$port" \
	--enable-prompt-tokens-details "$@" --kv-transfer-config '{
		"kv_connector": "FlexKVConnector",
		"kv_connector_module_path": "flexkv.integration.vllm.connector",
		"kv_role": "kv_both",
		"kv_load_failure_policy": "recompute",
		"kv_connector_extra_config": {
			"num_cpu_blocks": 256, "num_ssd_blocks": 256, "ssd_cache_dir": "'"$folder"'",
			"server_recv_port": "ipc://'"$folder"'/socket", "load_if_faster": false
		}
	}' >"$folder/vllm.log" 2>&1 &
engine=$!
trap 'kill $engine 2>/dev/null; wait $engine || true' EXIT

echo "vLLM starts, which may take a minute or more; its log is $folder/vllm.log"
until curl -sf "localhost:$port/health"; do
	kill -0 $engine || { tail -n 20 "$folder/vllm.log"; exit 1; }
	sleep 1
done

ask() {
	prompt=$(seq -s ' ' -f 'w%g' 10 400)
	curl -sS --fail-with-body "localhost:$port/v1/completions" -H 'Content-Type: application/json' \
		-d '{"model": "model", "max_tokens": 4, "temperature": 0, "prompt": "'"$prompt"'"}' |
		grep -oE '"(prompt_tokens|cached_tokens)": ?[0-9]+' | tr '\n' ' '
	echo
}

echo "first:           $(ask)"
echo "again:           $(ask)"
until curl -sS -X POST "localhost:$port/reset_prefix_cache" | grep -q true; do sleep 0.1; done
echo "after a reset:   $(ask)   <- from FlexKV"
curl -sS "localhost:$port/metrics" | grep -E '^flexkv_connector_loaded_blocks_total' || true
