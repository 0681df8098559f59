"""What a person sees of errors that nothing has foreseen, and of models that cannot be read."""

import errno
import json
import os
import re
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import make_step
from safetensors import SafetensorError

from lorapar_cli.errors import to_user_error
from lorapar_cli.process import end_on_signal
from stages.config import ModelSection, PromptSection
from stages.errors import ConfigError, LoraparError, MissingInputError
from stages.models.base import load_adapted, load_base
from stages.models.load_errors import load_errors
from stages.models.tokenizer import load_tokenizer
from stages.prompts.renderer import Renderer
from stages.runtime import libraries


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(errno.ENOSPC, "x", "runs/a"), 73, "cannot write runs/a: no space left on device"),
        (PermissionError(errno.EACCES, "x", "a"), 73, "cannot open a: permission denied"),
        (SafetensorError("I/O error: … (os error 28)"), 73, "cannot write: no space left"),
        (RuntimeError("[enforce fail] No space left on device"), 73, "cannot write: no space left"),
        (FileNotFoundError(errno.ENOENT, "x", "a"), 66, "no file a"),
        (OSError(errno.EIO, "x", "a"), 73, "cannot use a: input/output error"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 74, "the machine ran out of memory"),
        (RecursionError("maximum"), 78, "something is nested too deeply"),
    ],
)  # fmt: skip
def test_errors_of_the_system_have_a_sentence_and_a_code(error, code, told):
    found = to_user_error(error)
    assert found.exit_code == code and str(found).startswith(told)


def test_an_unforeseen_error_is_called_a_defect_and_leaves_its_trace(lorapar, monkeypatch):
    monkeypatch.setattr("lorapar_cli.options.load", Mock(side_effect=ValueError("odd")))
    done = lorapar("status", "configs/smoke.yaml")
    assert done.code == 70 and done.err.startswith("error: this is a defect of lorapar: ValueError: odd")
    assert "Traceback" not in done.err
    trace = Path(re.search(r"hint: please report it with (\S+\.txt)", done.err)[1])
    assert "Traceback" in trace.read_text(encoding="utf-8")
    trace.unlink()


def test_an_error_after_a_swallowed_signal_ends_as_the_signal_does(lorapar, monkeypatch):
    def load(*_):
        try:
            end_on_signal(signal.SIGTERM, None)
        finally:
            raise ValueError("odd")

    monkeypatch.setattr("lorapar_cli.options.load", load)
    done = lorapar("status", "configs/smoke.yaml")
    assert (done.code, done.err.partition(";")[0]) == (128 + signal.SIGTERM, "stopped")


@pytest.mark.parametrize(
    ("does", "error", "told"),
    [
        ("sys.exit(0)", ConfigError, "tried to end lorapar, with 0"),
        ("raise type('Odd', (BaseException,), {})('here')", RuntimeError, "Odd here"),
    ],
)
def test_a_rewards_file_does_not_end_the_program(begun, tmp_path, does, error, told):
    """It would end with code 0 and have made nothing."""
    file = tmp_path / "rewards.py"
    file.write_text(f"import sys\ndef mine(completions, **_):\n    {does}\n")
    config = begun("rl.start_from=init", f"rl.rewards_file={file}", "rl.rewards={mine: 1}", "rl.max_steps=1")
    with pytest.raises(error, match=told):
        make_step(config, "rl")


def section(folder: Path) -> ModelSection:
    return ModelSection(name=str(folder), dtype="float32")


PANICS = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
"""In a tokenizer it makes its library raise an exception that is no Exception."""


@pytest.mark.parametrize(
    ("name", "text", "load", "told"),
    [
        ("config.json", "{", load_base, "cannot load model COPY"),
        ("config.json", '{"model_type": "unheard_of"}', load_base, "cannot load model COPY"),
        ("tokenizer.json", "[]", load_tokenizer, "cannot load the tokenizer of COPY"),
        ("tokenizer.json", '{"model": {}}', load_tokenizer, "cannot load the tokenizer of COPY"),
        ("tokenizer.json", PANICS, load_tokenizer, "cannot load the tokenizer of COPY"),
        ("tokenizer_config.json", {"eos_token": None, "pad_token": None}, load_tokenizer, "has no EOS token"),
        ("adapter/adapter_config.json", '{"peft_type": ""}', load_adapted, "COPY/adapter: KeyError"),
    ],
)  # fmt: skip
def test_a_damaged_model_is_named(model_copy, name, text, load, told):
    """text: of the file; or changes of what is in it."""
    if isinstance(text, dict):
        text = json.dumps(json.loads((model_copy / name).read_text()) | text)
    (model_copy / "adapter").mkdir()
    (model_copy / name).write_text(text)
    with pytest.raises(LoraparError, match=told.replace("COPY", str(model_copy))):
        load(section(model_copy), *([model_copy / "adapter"] if load is load_adapted else []))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
        ("{% for", "unexpected .end of template"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ],
)
def test_a_template_is_a_program_that_may_fail(model_copy, template, told):
    (model_copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"the chat template refuses a chat of user: .*({told})"):
        Renderer(load_tokenizer(section(model_copy)), PromptSection())


def test_what_the_machine_lacks_is_no_fault_of_the_model_nor_a_missing_package_of_the_hub(tiny):
    for error in (MemoryError(), RuntimeError("can't allocate memory"), OSError(28, "full")):
        with pytest.raises(type(error)), load_errors("model", section(tiny)):
            raise error
    with pytest.raises(MissingInputError, match="needs x") as caught, load_errors("x", section(tiny)):
        raise ImportError("needs x")
    assert caught.value.hint is None
    for name, told in (
        ("./here", "no model folder ./here"),
        ("lonely", "cannot load the tokenizer of lonely"),
    ):
        with pytest.raises(MissingInputError, match=told) as caught:
            load_tokenizer(ModelSection(name=name))
        assert caught.value.hint


def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(libraries, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    lookup = Mock()
    monkeypatch.setattr(libraries.socket, "getaddrinfo", lookup)
    libraries.offline_without_network.__wrapped__()
    assert lookup.call_args.args[0] == "huggingface.co" and not constants.HF_HUB_OFFLINE
    lookup.side_effect = OSError("no host")
    libraries.offline_without_network.__wrapped__()
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
