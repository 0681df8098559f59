"""GRPO whose completions come from a vLLM server on another GPU, and whose weights go there by NCCL.

    python benchmarks/server.py MODEL RUNS

Starts the server on the last GPU, as the hint of `rl.rollouts.engine: vllm_server` says, and runs the smoke
config on the first one. With fewer than two GPUs the server is started, and is only asked whether it takes
new weights and gives the log-probabilities that the correction needs.
"""

import os
import subprocess
import sys

import torch
from measure import lorapar

from stages.config import ModelSection, ServerSection
from stages.config.rl import RolloutsSection
from stages.engines import EngineSpec, vllm
from stages.lora.grpo import vllm_rollouts


def main(model: str, runs: str) -> None:
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    section = ServerSection(max_model_len=1024, vllm=vllm_rollouts.TAKES_WEIGHTS)
    served = EngineSpec("vllm", ModelSection(name=model), devices=gpus[-1] or None)
    with vllm.open_engine(served, section, lambda text: print(text, file=sys.stderr)) as client:
        url = client.transport.urls[0].removesuffix("/v1")
        vllm_rollouts._check_server(RolloutsSection(engine="vllm_server", base_url=url), model)
        print("the server takes new weights, and its log-probabilities are of what was sampled from")
        if len(gpus) < 2:
            return
        sets = ["rl.rollouts.engine=vllm_server", f"rl.rollouts.base_url={url}", "rl.max_steps=3"]
        sets += [f"model.name={model}", f"runs_dir={runs}", "data.limit=48"]
        command = lorapar("run", "configs/smoke.yaml", "--to", "rl", settings=sets)
        subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus[0]})


if __name__ == "__main__":
    main(*sys.argv[1:])
