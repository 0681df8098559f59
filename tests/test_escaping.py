"""One list of bad texts for every target: a text is shown as it is, and does nothing."""

import csv
import io
import shlex
import subprocess

import pytest
import yaml
from markdown_it import MarkdownIt

from stages import escaping

BAD = [
    "plain", "θ 0.9", "a_b_c", "*a* _b_ **c**", "`code` ``x``", "a|b", "||", "# title #", "- item",
    "1. item", "12) item", "> quote", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "![x](http://127.0.0.1/x.png)", "[x](javascript:alert(1))", "<http://127.0.0.1>",
    "[x]: http://127.0.0.1", "&lt;b&gt; &amp;", "~~gone~~", "$x$", "$(id)", "`id`", "$HOME", "a;id",
    "a\nb", "a\r\nb", "a\u2028b\u2029c", "a\x0bb\x0cc\x85d", "a\n\n| x | y |", "a\n## b", "a\n%b",
    "\x1b[31mred\x1b]0;title\x07", "\x9b31m", "a\x00b", "\u202eabc\u202c", "=cmd|'/c calc'!A0",
    "@SUM(1)", "+1+1", "-1+1", " =1+1", "\t=1", '"quoted"', "it's", "\\", "\\n", "%", "{}", "^~", "--",
    "---", "===", "```", "~~~", "a: b", "'", "", "#", "$'x'", "=x",
]  # fmt: skip


def harmless(text: str) -> bool:
    return all(c == "\n" or c == "\t" or c.isprintable() for c in text)


@pytest.mark.parametrize("text", BAD)
def test_markdown(text):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    escaped = escaping.markdown(text)
    for source in (f"## {escaped}", escaped, f"| a {escaped} | b |\n| --- | --- |\n| {escaped} | c |"):
        tokens = parser.parse(source)
        inline = [token for token in tokens if token.type == "inline"]
        kinds = {child.type for token in inline for child in token.children or []}
        assert kinds <= {"text", "text_special"}
        assert not {t.type for t in tokens} & {"html_block", "bullet_list_open", "fence", "blockquote_open"}
        seen = ["".join(child.content for child in token.children or []) for token in inline]
        if source.startswith("|"):
            assert len(inline) == 4 and seen[1] == "b" and seen[3] == "c"
            seen = seen[2:3]
        assert " ".join("".join(seen).split()) == " ".join(escaping.one_line(text).split())


@pytest.mark.parametrize("text", BAD)
def test_csv_is_no_formula_and_terminal_and_comments_obey_nothing(text):
    out = io.StringIO()
    csv.writer(out).writerow([escaping.csv_cell(text), 1])
    ((cell, _),) = csv.reader(io.StringIO(out.getvalue(), newline=""))
    assert cell.lstrip(" ")[:1] not in ("=", "+", "-", "@", "\t", "\r")
    assert cell.removeprefix("'") == text.removeprefix("'") or cell == text
    assert harmless(escaping.terminal(text))
    line = escaping.one_line(text)
    assert harmless(line) and len(line.splitlines()) <= 1
    assert yaml.safe_load(f"a: 1 # {line}\nb: 2") == {"a": 1, "b": 2}


@pytest.mark.parametrize("text", [text for text in BAD if "\x00" not in text])
def test_shell(text):
    quoted = escaping.shell(text)
    assert harmless(quoted) and "\n" not in quoted
    done = subprocess.run(
        ["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert done.stdout.decode() == text
    if quoted[:1] != "$":
        assert shlex.split(quoted) == [text]
