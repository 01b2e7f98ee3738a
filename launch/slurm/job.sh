# What the job scripts beside this file share. They run in the folder that has launch/.
#
# Read from the environment:
#   GPUS_PER_NODE (8), HARDWARE (cuda), PORT (29500): ranks of a node, preset, port of the first node
#   PREFLIGHT=0: train without checking the machines first (tools.preflight: up to a minute)
#   CONTAINER=IMAGE: run in it, with pyxis; CONTAINER_MOUNTS=/data:/data,...: beside this folder
#   FT=1: ft_launcher of NVIDIA's nvidia-resiliency-ext in place of torchrun; FT_OPTIONS: its --ft-...
set -uo pipefail

STOPPED=130 # exit code of a job that a signal stopped before its end
export CUDA_DEVICE_MAX_CONNECTIONS=1 # megatron's overlap of communication needs it
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270 # seconds to save in, after the signal
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# on_all_nodes NAME RESTARTS SCRIPT ARGUMENT...: one launcher a node, one rank a GPU.
on_all_nodes() {
  local name=$1 restarts=$2 inside=() launcher=(python launch/torchrun.py)
  shift 2
  if [ -n "${CONTAINER:-}" ]; then
    inside=(--container-image="$CONTAINER" --container-workdir="$PWD"
      --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
  fi
  # shellcheck disable=SC2206  # several options in one variable
  if [ "${FT:-0}" = 1 ]; then launcher+=(--ft ${FT_OPTIONS:-}); fi
  srun --kill-on-bad-exit=1 "${inside[@]}" "${launcher[@]}" \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --max-restarts "$restarts" \
    --rdzv-id "$SLURM_JOB_ID-$name" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HOST:${PORT:-29500}" \
    "$@"
}

# train OVERRIDE...: checks the machines, then trains; after a failure the ranks are started again,
# three times. Ends with 0 (done), $STOPPED, or another code (failed).
train() {
  local job=("hardware=${HARDWARE:-cuda}" "$@")
  if [ "${PREFLIGHT:-1}" = 1 ]; then
    on_all_nodes preflight 0 -m tools.preflight "${job[@]}" || return
  fi
  on_all_nodes train 3 launch/train.py "${job[@]}"
}
