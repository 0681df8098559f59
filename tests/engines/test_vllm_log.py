"""What a vLLM server died of, from logs as it writes them; and lengths as it reads them."""

import pytest

from stages.config import ModelSection, ServerSection
from stages.engines import vllm
from stages.engines.vllm_log import last_error
from stages.models.load_errors import load_config, max_positions

ULIMIT = (
    "(APIServer pid=7) WARNING 11-29 06:41:45 [system_utils.py:249] Found ulimit of 20000 and failed to "
    "automatically increase. This can cause fd limit errors like `OSError: [Errno 24] Too many open files`."
)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (
            [
                "(EngineCore pid=9) ERROR 11-29 06:41:45 [core.py:1] Traceback (most recent call last):",
                "(EngineCore pid=9) ERROR 11-29 06:41:45 [core.py:1] torch.OutOfMemoryError: CUDA is full.",
                "(APIServer pid=7) Traceback (most recent call last):",
                "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.",
                ULIMIT,
            ],
            "torch.OutOfMemoryError: CUDA is full.",
        ),
        ([ULIMIT, "INFO Errors: none"], "no error in its log"),
    ],
)
def test_the_last_error_is_the_cause(tmp_path, lines, error):
    (tmp_path / "log").write_text("\n".join(lines))
    assert last_error(tmp_path / "log") == error


@pytest.mark.parametrize(("given", "length"), [("2K", 2048), ("1.5k", 1500), ("auto", None), (-1, None)])
def test_lengths_as_vllm_reads_them(tiny, given, length):
    server = ServerSection(vllm={"max_model_len": given})
    model = ModelSection(name=str(tiny))
    assert vllm.context_length(model, server) == (length or max_positions(load_config(model)))
