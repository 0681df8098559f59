"""What `lorapar serve` refuses, and what it gives its server."""

import json
import socket

import pytest
import torch
from safetensors.torch import load_file

from stages import serve
from stages.config import LoraSection, ModelSection
from stages.errors import ServerError
from stages.lora.adapter import adapter
from stages.models.base import load_adapted, load_base


@pytest.mark.parametrize("init", ["normal", "pissa"])
def test_the_adapter_of_zeros_is_the_base(tiny, tmp_path, init):
    model = ModelSection(name=str(tiny), dtype="float32")
    base = load_base(model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    trained, zeros = tmp_path / "trained", tmp_path / "zeros"
    peft_model = adapter.initial(base, LoraSection(r=4, init=init), 0)
    with torch.no_grad():
        for weight in peft_model.parameters():
            weight.add_(0.1 if weight.requires_grad else 0.0)
    adapter.save(peft_model, trained, model)
    zeros.mkdir()
    serve._write_zeros(trained, zeros)
    with torch.no_grad():
        assert not torch.equal(load_adapted(model, trained)(input_ids=ids).logits, expected)
        assert torch.equal(load_adapted(model, zeros)(input_ids=ids).logits, expected)
    names = [load_file(folder / "adapter_model.safetensors").keys() for folder in (zeros, trained)]
    assert names[0] == names[1]


def test_a_taken_port_is_said_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"--port {port}: .*in use"), serve.listener("127.0.0.1", port):
            pass


@pytest.mark.parametrize(
    ("options", "has_vllm", "message"),
    [
        ([], False, "lorapar serve needs vLLM, which is not installed"),
        (["--host", "0.0.0.0"], True, "--host 0.0.0.0 would let anyone ask"),
        ([], True, "classify:train is missing"),
    ],
)
def test_the_command_says_what_is_lacking(smoke, lorapar, tmp_path, monkeypatch, options, has_vllm, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if has_vllm else None)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(smoke().model_dump(mode="json")))
    done = lorapar("serve", path, *options)
    assert done.code in (66, 78) and message in done.err and "hint:" in done.err
