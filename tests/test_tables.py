"""Tables at a terminal, and in files and pipes."""

from lorapar_cli import terminal

WHY = "sft.learning_rate was 0.01, now 0.003, sft.num_train_epochs was 1.0, now 2.0, sft.batch_size was 8"


def test_columns_stand_below_their_heads_and_nothing_is_cut_or_obeyed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = [["eval:sft@demo", "stale", "7", WHY], ["漢字", "current", "12", "\x1b[31m"]]
    terminal.table(["step", "state", "n", "why"], rows, to_left=("state", "why"))
    assert capsys.readouterr().out.splitlines() == [
        "step           state     n  why",
        f"eval:sft@demo  stale     7  {WHY}",
        "漢字           current  12  \\x1b[31m",
    ]
