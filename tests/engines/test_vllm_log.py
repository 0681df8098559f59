"""What a vLLM server died of, from logs as it writes them."""

import pytest

from stages.engines.vllm_log import last_error

ULIMIT = (
    "(APIServer pid=7) WARNING 11-29 06:41:45 [system_utils.py:249] Found ulimit of 20000 and failed to "
    "automatically increase. This can cause fd limit errors like `OSError: [Errno 24] Too many open files`."
)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (
            [
                "usage: api_server.py [-h]",
                "api_server.py: error: argument --dtype: invalid choice: 'x'",
                ULIMIT,
            ],
            "api_server.py: error: argument --dtype: invalid choice: 'x'",
        ),
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
        (
            [
                "pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "  Value error, no such model",
            ],
            "pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, no such model",
        ),
        (
            ["vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."],
            "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
        ),
        ([ULIMIT, "INFO Errors: none"], "no error in its log"),
    ],
    ids=["arguments", "cause of the engine", "validation", "nothing but the front's", "none"],
)
def test_the_last_error_is_the_cause(tmp_path, lines, error):
    (tmp_path / "log").write_text("\n".join(lines))
    assert last_error(tmp_path / "log") == error
