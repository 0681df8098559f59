"""Starts one stage in several processes, under torch's or accelerate's launcher."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from stages.config import Config, LaunchSection
from stages.config.yaml import read_yaml
from stages.errors import (
    ConfigError,
    LoraparError,
    MissingInputError,
    OutOfMemoryError,
    ServerError,
    first_line,
)
from stages.pipeline.stage import Stage
from stages.pipeline.steps import Step
from stages.runtime import distributed, process_guard, resources

EXPECTED_KEYS = "LORAPAR_EXPECTED_KEYS"
"""Environment variable with the keys that another process must make; its config may have changed by then."""


def settings_of(config: Config, stage: Stage) -> LaunchSection | None:
    """The `launch` of a stage's section; None for a stage that has none."""
    return getattr(getattr(config, stage.name, None), "launch", None)


def section(config: Config, stage: Stage) -> LaunchSection | None:
    """The `launch` of a stage's section, if it asks for several processes and this is not one of them."""
    launch = settings_of(config, stage)
    return launch if launch and launch.is_distributed and not distributed.launched() else None


def check_started(config: Config, stage: Stage) -> None:
    """Raise ConfigError if a launcher started several processes of a stage that is for one.

    Each would train on all rows, and their sum would have the key of what one trains.
    """
    launch = settings_of(config, stage)
    if distributed.world_size() > 1 and not (launch and launch.is_distributed):
        setting = f"{stage.name}.launch.backend"
        raise ConfigError(
            f"{stage.name} was started in {distributed.world_size()} processes, and is for one",
            f"--set {setting}=ddp" if launch else "start it without torchrun",
        )


def check_key(steps: list[Step]) -> None:
    """Raise ConfigError if the process that started this one expects other artifacts than these steps'."""
    expected = os.environ.get(EXPECTED_KEYS)
    if expected and not set(expected.split(",")) & {step.key for step in steps}:
        raise ConfigError(
            f"{steps[0].name} is no longer what was planned: its config or its data have changed since",
            "run the same command again, with the old config or with the new one",
        )


def run(launch: LaunchSection | None, arguments: list[str], keys: Iterable[str] = ()) -> None:
    """Run `lorapar ARGUMENTS` in `launch.processes` processes, or else in one, and wait for them.

    Raises the error of the first process that failed. keys: of the artifacts that they must make.
    """
    with tempfile.TemporaryDirectory(prefix="lorapar-launch-") as folder:
        failure = Path(folder) / "failure.json"
        inherited = dict(os.environ)
        if launch and inherited.pop(resources.THREADS, None):  # so many are for a process alone
            del inherited["OMP_NUM_THREADS"]
        threads = _threads(launch) if launch else {}
        environment = {**threads, **inherited, distributed.FAILURE_ENV: str(failure)}
        if keys := ",".join(keys):
            environment[EXPECTED_KEYS] = keys
        launcher = command(launch) if launch else [sys.executable]
        code = process_guard.run([*launcher, "-m", "lorapar_cli", *arguments], environment)
        if failure.exists():
            exit_code, message, hint = json.loads(failure.read_text(encoding="utf-8"))
            error = LoraparError(message, hint)
            error.exit_code = exit_code
            raise error
        if code == 128 + signal.SIGKILL:
            raise OutOfMemoryError(
                "the launcher was killed, probably for lack of memory", "lower per_device_train_batch_size"
            )
        if code:
            raise ServerError(f"the launcher ended with code {code}", "see its processes' messages above")


def command(launch: LaunchSection) -> list[str]:
    """The launcher's command; ConfigError if it cannot start what the section asks for."""
    if launch.config is not None:
        _check_config(launch.config)
        return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch.config]
    if launch.backend == "zero2":
        raise ConfigError(
            "launch.backend: zero2 divides gradients and optimizer state, of which packed weights have "
            "little: 86 MB for LLaMA-2-7B at rank 8 with 40 % of the elements active",
            "use fsdp2, which divides the base model, or ddp",
        )
    number, gpus = processes(launch)
    if not number:
        raise ConfigError(
            "launch.processes is not set, and there is no GPU to count", "--set STAGE.launch.processes=2"
        )
    if gpus and number > gpus:
        raise ConfigError(f"launch.processes {number}: there are {gpus} GPUs", "lower it")
    return [sys.executable, "-m", "stages.pipeline.torchrun", "--standalone", "--nproc-per-node", str(number)]


def _check_config(path: str) -> None:
    """Raise an error unless accelerate can read its file, which starts several processes."""
    from accelerate.commands.config.config_args import load_config_from_file

    title, hint = f"launch.config {path}", "write it with: accelerate config"
    if not Path(path).is_file():
        raise MissingInputError(f"{title} is not a file", hint)
    settings = read_yaml(Path(path), title)
    if not isinstance(settings, dict):
        raise ConfigError(f"{title} holds no settings", hint)
    try:
        load_config_from_file(path)
    except Exception as error:  # accelerate's launcher would end with a traceback
        raise ConfigError(f"{title}: {first_line(error)}", hint) from None
    distributed.check_accelerate_settings(
        settings.get("distributed_type") in ("FSDP", "DEEPSPEED"),
        str(settings.get("mixed_precision") or "no"),
    )
    if settings.get("distributed_type") in ("NO", "MULTI_CPU", False):  # YAML reads a bare NO as false
        raise ConfigError(
            f"{title} starts a single process (distributed_type)",
            "leave launch.config out, or --set STAGE.launch.backend=ddp",
        )


def processes(launch: LaunchSection) -> tuple[int, int]:
    """The number of processes that will run on this machine, and its number of GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    return launch.processes or gpus, gpus


def gpu_split(launch: LaunchSection) -> tuple[int, float]:
    """The number of GPUs that share the work, and the share of the base's layers that each process holds.

    It cannot be known for a config file of accelerate's. Without GPUs, processes share the cores.
    """
    if launch.backend == "single" or launch.config is not None:
        return 1, 1.0
    number, gpus = processes(launch)
    return number if gpus else 1, 1 / max(1, number) if launch.shards_base else 1.0


def _threads(launch: LaunchSection) -> dict[str, str]:
    """Give each process its share of the usable cores; a config file of accelerate's sets its own."""
    if launch.config is not None:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, resources.usable_cores() // max(1, processes(launch)[0])))}
