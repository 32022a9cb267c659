#!/bin/sh
# Several vLLM engines on one machine, each a node of a cluster: they share host memory over Redis.
#
#   scripts/multi-nodes/start_multi_node_serving.sh [NODES] [FIRST_PORT]    start, and wait for them
#   scripts/multi-nodes/start_multi_node_serving.sh stop                    stop all of them
#
# Node i serves HTTP at FIRST_PORT + i, and FlexKV's metrics at FIRST_PORT + 1000 + i. All files are
# in RUN_DIR: node-<i>.json (the configuration), node-<i>.log, redis.log. If a node fails or the
# start is interrupted, everything is stopped.
#
#   MODEL=…                 a model; default: a tiny random one, made here, for a machine without GPU
#   TP=1                    GPUs of each node; node i gets TP of them from i × TP on
#   NODES=2  PORT=30001     if there are no arguments
#   REDIS_HOST= REDIS_PORT= REDIS_PASSWORD=   default: a redis-server is started here, with a password
#   LOCAL_IP=127.0.0.1      address at which the nodes reach each other
#   CPU_CACHE_GB= SSD_CACHE_GB= SSD_DIR=      the tiers; with an SSD, enable_p2p_ssd is set, too
#   MOONCAKE_CONFIG_PATH=   passed on as mooncake_config_path; no Redis of its own is needed for it
#   RUN_DIR=./flexkv-multi-node   READY_S=600   STOP_S=30 (then what still runs is killed)
#   VLLM_ARGS=              more arguments of `vllm serve`
set -eu

nodes=${NODES:-2} port=${PORT:-30001} tp=${TP:-1} ready_s=${READY_S:-600} stop_s=${STOP_S:-30}
run=${RUN_DIR:-flexkv-multi-node}
case ${1:-} in
stop) verb=stop ;;
-h | --help) sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0"; exit ;;
*) verb=start nodes=${1:-$nodes} port=${2:-$port} ;;
esac

started() { # PID: when it was started, in clock ticks since the boot; another process differs
	sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20
}

note() { # PID NAME: remember a process, so that `stop` finds it
	echo "$1 $(started "$1")" > "$run/$2.pid"
}

is_alive() { # PID: it lives, and is no zombie
	grep -q '^State:[[:space:]]*[^ZX]' "/proc/$1/status" 2>/dev/null
}

lives() { # PID SINCE: it, or what it left of its session, runs
	[ ! -e "/proc/$1" ] || [ "$(started "$1")" = "$2" ] || return 1 # another one has its number
	cat /proc/[0-9]*/stat 2>/dev/null | sed 's/.*) //' |
		awk -v session="$1" '$4 == session && $1 !~ /[ZX]/ { found = 1 } END { exit !found }'
}

stop_these() { # FILE...: stop processes by their notes, all at once
	for file; do
		[ -e "$file" ] || continue
		read -r pid since < "$file"
		! lives "$pid" "$since" || kill -TERM "$pid" 2>/dev/null || kill -TERM "-$pid" || true
	done
	for file; do
		[ -e "$file" ] || continue
		read -r pid since < "$file"
		left=$((2 * stop_s))
		while [ "$left" -gt 0 ] && lives "$pid" "$since"; do
			sleep 0.5
			left=$((left - 1))
		done
		# It led a session of its own: what did not end in time is killed.
		! lives "$pid" "$since" || kill -KILL "-$pid" 2>/dev/null || true
		rm -f "$file"
		echo "stopped $(basename "$file" .pid)"
	done
}

stop_all() {
	stop_these "$run"/node-*.pid
	stop_these "$run/redis.pid"
}

fail() {
	echo "$1" >&2
	exit 1
}

if [ "$verb" = stop ]; then
	[ -d "$run" ] || fail "nothing to stop: there is no $run"
	stop_all
	exit
fi

for program in curl setsid vllm flexkv python; do
	command -v "$program" >/dev/null || fail "$program is not on the PATH: activate vLLM's environment"
done
case $nodes$port$tp in *[!0-9]* | '') fail "NODES, PORT and TP must be numbers" ;; esac
[ "$nodes" -ge 1 ] && [ "$tp" -ge 1 ] || fail "NODES and TP must be at least 1"
[ $((port + 1000 + nodes)) -le 65536 ] ||
	fail "PORT=$port is too high: node $((nodes - 1)) would have its metrics at $((port + 999 + nodes))"
mkdir -p -m 700 "$run"
run=$(cd "$run" && pwd)
for file in "$run"/*.pid; do
	[ ! -e "$file" ] || fail "something runs already, or was not stopped: $0 stop"
done
trap 'status=$?; trap - EXIT INT TERM; [ "$status" -eq 0 ] || stop_all; exit "$status"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Redis
host=${REDIS_HOST:-127.0.0.1} redis_port=${REDIS_PORT:-6379} password=${REDIS_PASSWORD:-}
if [ -z "${REDIS_HOST:-}" ]; then
	server=$(command -v redis-server || command -v valkey-server) ||
		fail "redis-server is not installed: install it, or give REDIS_HOST"
	redis_port=${REDIS_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
	[ -n "$password" ] || password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
	umask 077
	cat > "$run/redis.conf" <<-CONF
		port $redis_port
		bind 127.0.0.1${LOCAL_IP:+ $LOCAL_IP}
		requirepass "$password"
		dir "$run"
		save ""
		appendonly no
	CONF
	setsid "$server" "$run/redis.conf" > "$run/redis.log" 2>&1 &
	redis=$!
	note "$redis" redis
	left=100
	until python -c "import socket; socket.create_connection(('127.0.0.1', $redis_port), 1)" 2>/dev/null; do
		left=$((left - 1))
		if [ "$left" -eq 0 ] || ! is_alive "$redis"; then
			tail -n 5 "$run/redis.log" >&2
			fail "Redis does not start; its log is $run/redis.log"
		fi
		sleep 0.1
	done
	echo "Redis listens at 127.0.0.1:$redis_port"
fi

# The model
model=${MODEL:-}
if [ -z "$model" ]; then
	model=$run/tiny-model
	[ -e "$model/config.json" ] || python -m flexkv.testing.tiny_model "$model"
	set -- --dtype float32 --enforce-eager --block-size 32 --max-model-len 4096 \
		--kv-cache-memory-bytes 67108864
	tiny=1
else
	set --
	tiny=
fi
gpus=$(nvidia-smi -L 2>/dev/null | grep -c . || true)
[ "$gpus" -eq 0 ] || [ "$gpus" -ge $((nodes * tp)) ] ||
	fail "$nodes nodes of $tp GPUs need $((nodes * tp)), and there are $gpus"

# The nodes
i=0
while [ "$i" -lt "$nodes" ]; do
	mkdir -p -m 700 "$run/node-$i"
	HOST=$host REDIS=$redis_port PASSWORD=$password TINY=$tiny FOLDER=$run/node-$i \
		METRICS=$((port + 1000 + i)) python - > "$run/node-$i.json" <<-'PY'
		import json, os

		get = os.environ.get
		cache = {
		    "enable_p2p_cpu": True,
		    "redis_host": get("HOST"),
		    "redis_port": int(get("REDIS")),
		    "redis_password": get("PASSWORD"),
		    "local_ip": get("LOCAL_IP") or "127.0.0.1",
		}
		if get("TINY"):  # computing it is faster than loading it
		    cache |= {"load_if_faster": False}
		if get("CPU_CACHE_GB"):
		    cache |= {"cpu_cache_gb": float(get("CPU_CACHE_GB"))}
		elif get("TINY"):
		    cache |= {"num_cpu_blocks": 512}
		if float(get("SSD_CACHE_GB") or 0):
		    folder = os.path.join(get("SSD_DIR") or get("FOLDER"), os.path.basename(get("FOLDER")))
		    os.makedirs(folder, 0o700, exist_ok=True)
		    cache |= {"ssd_cache_gb": float(get("SSD_CACHE_GB")), "ssd_cache_dir": folder}
		    cache |= {"enable_p2p_ssd": True}
		else:
		    cache |= {"enable_ssd": False}
		if get("MOONCAKE_CONFIG_PATH"):
		    cache |= {"mooncake_config_path": get("MOONCAKE_CONFIG_PATH")}
		settings = {
		    "server_recv_port": f"ipc://{get('FOLDER')}/socket",
		    "enable_metrics": True,
		    "py_metrics_port": int(get("METRICS")),
		    "cache_config": cache,
		}
		print(json.dumps(settings, indent=2))
	PY
	devices=
	[ "$gpus" -eq 0 ] || devices=$(seq -s, $((i * tp)) $((i * tp + tp - 1)))
	(
		[ -z "$devices" ] || export CUDA_VISIBLE_DEVICES="$devices"
		export FLEXKV_CONFIG_PATH="$run/node-$i.json"
		# shellcheck disable=SC2086 -- the arguments are words
		exec setsid vllm serve "$model" --served-model-name model --port "$((port + i))" \
			--tensor-parallel-size "$tp" --enable-prompt-tokens-details "$@" ${VLLM_ARGS:-} \
			--kv-transfer-config '{
				"kv_connector": "FlexKVConnector",
				"kv_connector_module_path": "flexkv.integration.vllm.connector",
				"kv_role": "kv_both", "kv_load_failure_policy": "recompute" }'
	) > "$run/node-$i.log" 2>&1 &
	note "$!" "node-$i"
	i=$((i + 1))
done
echo "$nodes engines start, which may take minutes; their logs are $run/node-*.log"

wait_until() { # WHAT I COMMAND...: wait until a command succeeds, as long as node I lives
	what=$1 node=$2
	shift 2
	read -r pid _ < "$run/node-$node.pid"
	until "$@" >/dev/null 2>&1; do
		if ! is_alive "$pid" || [ "$(date +%s)" -ge "$until_s" ]; then
			grep -m 5 'Error: ' "$run/node-$node.log" >&2 || tail -n 20 "$run/node-$node.log" >&2
			fail "node $node $what; its log is $run/node-$node.log"
		fi
		sleep 1
	done
}

sees_all() { # I: node I knows all others
	FLEXKV_CONFIG_PATH="$run/node-$1.json" flexkv cluster status --json |
		python -c "import json, sys; sys.exit(len(json.load(sys.stdin)['state']['nodes']) < $nodes - 1)"
}

until_s=$(($(date +%s) + ready_s))
i=0
while [ "$i" -lt "$nodes" ]; do
	wait_until "does not get ready" "$i" curl -sf "localhost:$((port + i))/health"
	i=$((i + 1))
done
i=0
while [ "$i" -lt "$nodes" ]; do
	wait_until "does not know the other nodes" "$i" sees_all "$i"
	echo "node $i: http://localhost:$((port + i)), metrics http://localhost:$((port + 1000 + i))/metrics"
	i=$((i + 1))
done
FLEXKV_CONFIG_PATH="$run/node-0.json" flexkv cluster status || true
echo "stop all of them: $0 stop"
