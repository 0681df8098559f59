"""Tables at a terminal, and in files and pipes: whole in both."""

import io

import pytest

from lorapar_cli.tables import show, table

WHY = (
    "sft.learning_rate was 0.01, now 0.003, sft.num_train_epochs was 1.0, now 2.0, "
    "sft.batch_size was 8, now [16]"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def drawn():
    found = table("step", "state", "why", text="why")
    found.add_row("eval:sft@demo", "stale", WHY)
    return found


def test_a_file_gets_whole_lines(drawn, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    show(drawn)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(maxsplit=2) == ["eval:sft@demo", "stale", WHY]
    assert lines[0] == lines[0].rstrip()


@pytest.mark.parametrize("columns", [200, 80, 50, 20])
def test_a_terminal_folds_the_text_alone(drawn, monkeypatch, columns):
    for name, value in {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    show(drawn)
    first, *rest = terminal.getvalue().splitlines()[1:]
    assert first.startswith("eval:sft@demo  stale  sft.learning_rate was")
    assert max(map(len, [first, *rest])) <= max(columns, 50)
    assert " ".join(" ".join([first, *rest]).split()[2:]) == WHY
