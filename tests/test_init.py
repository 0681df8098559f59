"""`lorapar init`: rows and a model in, a config that fits them out, and no guess without its reason."""

import re
import shutil
from pathlib import Path

import pytest
import trl
import yaml
from transformers import GPT2Config, GPTNeoXConfig, GPTNeoXForCausalLM

from stages.config import DataSection, ModelSection
from stages.config.loading import read_with_extends
from stages.init import config_writer, data_profile, examples, own_rows
from stages.init.data_profile import survey
from stages.pipeline.resolve import load, resolved
from stages.pipeline.steps import plan_steps
from stages.records import write_jsonl
from stages.sweep import file


@pytest.fixture
def written(tiny, tmp_path, lorapar, monkeypatch):
    """Writes rows, runs the command on them, and returns the config as YAML and what was said."""

    def write(rows: list[dict], *more: str, model: Path = tiny) -> tuple[dict, str]:
        monkeypatch.chdir(tmp_path)
        file = tmp_path / "my rows.v1.jsonl"
        write_jsonl(file, rows)
        Path("c.yaml").unlink(missing_ok=True)
        done = lorapar("init", file, "--model", model, "--out", "c.yaml", "--no-hold-out", *more)
        assert done.code == 0, done.err
        steps = plan_steps(resolved(load(Path("c.yaml"), ["eval.targets=[base]"])))
        assert {"classify:train", "score", "partition:sft", "partition:rl", "sft", "rl"} <= steps.keys()
        text = Path("c.yaml").read_text(encoding="utf-8")
        for line in text.splitlines():
            reason = line.partition(" # ")[2]
            assert reason or not re.match(r" +\w+: ", line) or WITHOUT_REASON.search(line), line
        questions = done.out.partition("what the rows do not say:\n  ")[2].splitlines()
        assert text.endswith("\n# Undecided:\n" + "".join(f"# - {line.strip()}\n" for line in questions))
        return yaml.safe_load(text), done.out + text

    return write


def rows(number: int, **more: object) -> list[dict]:
    return [{"question": f"{i} + 1?", "answer": f"It is\n#### {i + 1}", **more} for i in range(number)]


WITHOUT_REASON = re.compile("name|path|duplicates: first")


def test_numbers_and_lengths(tiny, written):
    found, said = written(rows(300))
    assert found["run"] == "my-rows" and found["modes"]["auto"]["system"].endswith("after ####.")
    assert found["rl"]["rewards"] == {"correctness": 1.0} and "answers: number 300" in said
    assert "which rows measure success" in said and "benchmarks" not in found["eval"]
    assert "empty" not in found["data"] and "prompts_per_step" not in found["rl"]
    seen = survey(ModelSection(name=str(tiny)), DataSection(path=found["data"]["path"]), [])
    assert seen.row.longest <= found["data"]["max_length"] < seen.row.longest + config_writer.STEP
    assert seen.prompt.longest <= found["rl"]["max_prompt_length"] < seen.prompt.longest + config_writer.STEP
    assert seen.response.longest < found["rl"]["max_completion_length"]
    far = rows(300, system="You are a lawyer.")
    far[7]["answer"] = "long " * 3000 + "\n#### 8"
    found, said = written(far)
    assert found["data"]["max_length"] < 200 and found["data"]["too_long"] == "drop"
    assert "99 % have at most" in said and "each row has a field system" not in said
    found, said = written(far[:40])
    assert found["server"]["max_model_len"] >= found["data"]["max_length"] > 4096


def test_empty_and_repeated_rows_are_left_out_and_rewards_follow_the_answers(written):
    found, said = written([*rows(40), *rows(2), {"question": "", "answer": "x"}])
    assert (found["data"]["empty"], found["data"]["duplicates"]) == ("drop", "first")
    assert "40 rows: question and answer; left out: 1 empty, 2 repeated" in said
    assert found["rl"]["prompts_per_step"] == 4
    assert "mostly a text" in written(rows(40, gold="Paris"))[1]
    found, said = written(rows(40, test="def check(f): pass", entry_point="f"))
    assert found["rl"]["rewards"] == {"code_tests": 1.0} and "they run in the sandbox" in said


def test_rows_without_answers_are_not_passed_over(written):
    plain = [{"instruction": f"Say {i}.", "output": f"Well, {i}"} for i in range(3)]
    found, said = written(plain)
    assert found["sft"]["data"] == "all" and found["eval"] == {"targets": ["base", "sft"]}
    assert "rl" not in found and "prompt" not in found and "system2_share" not in found["sft"]
    assert "no row has a verifiable answer" in said and "so no row is held out" in said
    found, said = written([*plain, {"instruction": "1 + 1?", "output": "#### 2"}])
    assert "3 of 4 rows have no verifiable answer" in said
    assert found["rl"]["rewards"] == {"text_overlap": 1.0}


def test_a_small_model_gets_the_rates_of_the_demo_and_a_cold_start(written, monkeypatch):
    found, said = written(rows(40))
    assert found["sft"] == {"learning_rate": 2e-3} and found["rl"]["learning_rate"] == 1.5e-4
    assert found["eval"]["targets"] == ["base", "sft:auto", "rl:fast", "rl:slow", "rl:auto"]
    assert "of 40, 40 show working" in said and "how RL finds" not in said
    few = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    found, said = written([*few, *rows(5)])
    assert "modes" not in found and "fewer than 8 rows show how their answer is worked out" in said
    assert (found["sft"]["learning_rate"], found["sft"]["system2_share"]) == (2e-3, 0.3)
    monkeypatch.setattr(data_profile, "parameters", lambda _: 7_000_000_000)
    found, said = written([*few, *rows(5)])
    assert "sft" not in found and "learning_rate" not in found["rl"]
    assert "how RL finds" in said


def test_rows_of_answers_alone(written, lorapar):
    """They say nothing about the length of completions, and those without a response are for RL alone."""
    found, said = written([{"question": f"{i} + 1?", "answer": i + 1} for i in range(40)])
    assert found["rl"]["max_completion_length"] == 320 and "no working, so 256 is a guess" in said
    found, said = written([{"question": f"{i} + 1?", "gold": i + 1} for i in range(60)])
    assert (found["partition"], found["rl"]["start_from"]) == ({"strategy": "all"}, "init")
    assert "RL alone trains" in said and "a cold start" not in said
    planned = lorapar("plan", "c.yaml").out
    steps = {line.split()[0] for line in planned.splitlines() if " missing " in line}
    assert steps == {"classify:train", "score", "partition:rl", "rl"}  # no SFT, so no mask of it


def test_labels_of_the_rows_are_taken(written):
    found, said = written(rows(290, system=1) + rows(302, system=2)[290:])
    assert found["classify"] == {"strategy": "known"} and "who votes" not in said
    assert found["rl"]["prompts_per_step"] == 2 and "for 4 steps on 12 System 2 rows" in said
    assert "no row is labelled System 2" in written(rows(8, system=1))[1]
    assert "no row is labelled System 1" in written(rows(8, system="System 2"))[1]  # words, too


def test_test_rows_get_the_benchmark_that_reads_them_and_a_name_of_its_own(written, tmp_path):
    question = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "anatomy"}
    files = {
        "train.jsonl": {"prompt": "Which?", "answer": "B"},
        "2024.jsonl": rows(1)[0],
        "on.jsonl": question,
        "a/on.jsonl": {"prompt": "Which?", "answer": "B"},
        "odd.jsonl": {"prompt": "Capital?", "completion": "It is\n#### town"},  # words, as in the demo
    }
    (tmp_path / "a").mkdir()
    for name, row in files.items():
        write_jsonl(tmp_path / name, [row])
    write_jsonl(tmp_path / "odd.jsonl", [files["odd.jsonl"]] * 2 + [{"prompt": "", "completion": "x"}])
    found, said = written(rows(300), *(part for name in files for part in ("--test", str(tmp_path / name))))
    made = found["eval"]["benchmarks"]
    assert {name: part["kind"] for name, part in made.items()} == {
        "jsonl": "jsonl", "2024": "gsm8k", "on": "mmlu", "jsonl-1": "jsonl", "odd": "demo",
    }  # fmt: skip
    assert made["on"]["shots"] == 0 and "max_new_tokens" not in made["on"]
    assert made["2024"]["max_new_tokens"] == found["rl"]["max_completion_length"]
    assert (made["odd"]["empty"], made["odd"]["duplicates"]) == ("drop", "first")
    assert "which rows measure success" not in said
    assert "2024.jsonl measures: 1 of its 1 questions are trained on" in said


WITHOUT_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}<|im_end|>"
SWITCHES = {
    "qwen3_8": ("enable_thinking", False, True),
    "gptoss": ("reasoning_effort", "low", "high"),
    "deepseek_r1_distill": None,
    "budget": ("thinking_budget", 512, -1),  # as Seed-OSS
    "effort": ("reasoning_effort", "no_think", "high"),  # as Hy3
    "thinks": None,  # as Kimi-K2-Thinking
}


TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ '<think></think>' if m.role == 'assistant' else '' }}"
    "{{ m.content }}<|im_end|>{% endfor %}{{ 'assistant: ' if add_generation_prompt else '' }}"
)
OWN = {"thinks": TURNS, "budget": "{{ thinking_budget if thinking_budget is defined else -1 }}" + TURNS}
OWN["effort"] = "{{ reasoning_effort | default('no_think') }}" + TURNS


@pytest.mark.parametrize(("template", "switch"), SWITCHES.items())
def test_the_switch_of_a_template_makes_the_modes(written, model_copy, tmp_path, template, switch):
    """Completions are long enough for a thought, also where the template has no switch and always thinks."""
    chat_template = model_copy / "chat_template.jinja"
    if template in OWN:
        chat_template.write_text(OWN[template], encoding="utf-8")
    else:
        shutil.copy(Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja", chat_template)
    write_jsonl(tmp_path / "test.jsonl", rows(2))
    found, said = written(rows(40), "--test", str(tmp_path / "test.jsonl"), model=model_copy)
    if switch:
        name, off, on = switch
        given = {mode: section["chat_template_kwargs"] for mode, section in found["modes"].items()}
        assert given == {"fast": {name: off}, "slow": {name: on}, "auto": {name: on}}
        assert found["prompt"]["system"] == "Write the final answer after ####."
    assert (found["rl"]["max_thinking_length"], found["rl"]["max_completion_length"]) == (1024, 1280)
    (benchmark,) = found["eval"]["benchmarks"].values()
    assert (benchmark["max_thinking_tokens"], benchmark["max_new_tokens"]) == (1024, 256)
    assert "how the model thinks: no row has a thought" in said
    chat_template.write_text(f"{{% for m in messages %}}{WITHOUT_SYSTEM}{{% endfor %}}", encoding="utf-8")
    found, said = written(rows(40), model=model_copy)
    assert "prompt" not in found and "its chat template takes no system message" in said


def test_a_model_without_template_and_with_other_modules(written, model_copy, tokenizer):
    (model_copy / "chat_template.jinja").unlink()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 64}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), num_hidden_layers=1, num_attention_heads=2, **sizes)
    GPTNeoXForCausalLM(config).save_pretrained(model_copy)
    found, said = written(rows(40), model=model_copy)
    assert (found["prompt"]["template"], found["lora"]["target_modules"]) == ("plain", "all-linear")
    assert "dense, dense_4h_to_h, dense_h_to_4h, query_key_value: the model has no down_proj" in said
    assert found["data"]["max_length"] == 64 and "the model reads 64" in said
    assert found["rl"]["max_prompt_length"] + found["rl"]["max_completion_length"] <= 64


def test_a_full_disk_leaves_no_half(lorapar, tiny, tmp_path, monkeypatch, full_disk):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("rows.jsonl"), rows(10))

    def write_rows(file: Path, _: list) -> None:
        file.write_text("{" if "test" in file.name else "", encoding="utf-8")

    monkeypatch.setattr(own_rows, "write_jsonl", write_rows)
    for arguments in (["rows.jsonl", "--model", tiny], ["--example", "paper/table1/qwq"]):
        done = lorapar("init", *arguments)
        assert done.code == 73 and "no space left" in done.err
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rows.jsonl"]


def test_it_overwrites_nothing_and_leaves_nothing(lorapar, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.yaml").write_text("mine", encoding="utf-8")
    files = {"rows": rows(1)[0], "odd": {"a": 1}, "long": {"question": "a b " * 10**6, "answer": "3"}}
    files["tests"] = {"prompt": "Write f.", "test": "assert f()"}
    for name, row in files.items():
        write_jsonl(Path(f"{name}.jsonl"), [row])
    shutil.copytree(tiny, "gpt2")  # which has Conv1D
    GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=500).save_pretrained("gpt2")
    for arguments, code, told in (
        ("rows.jsonl", 73, "rows.yaml exists already"),
        ("rows.jsonl --out c.yaml --test odd.jsonl", 65, "\n  jsonl: bad row"),
        ("long.jsonl", 65, "jsonl:1: a text of 4,000,001 characters, more than 1,000,000"),
        ("tests.jsonl", 65, "no row of tests.jsonl has a response to imitate, or an answer"),
        ("rows.jsonl --out c.yaml --model gpt2", 78, "GPT2LMHeadModel has no linear modules except its head"),
        ("none.jsonl", 66, "no data file"),
    ):
        done = lorapar("init", "--model", tiny, *arguments.split())
        assert done.code == code and told in done.err
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["rows.yaml"]
    assert Path("rows.yaml").read_text(encoding="utf-8") == "mine"


def test_labels_of_ones_own_go_into_the_config(tiny, tmp_path, lorapar, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", rows(8))
    labels = [f'"{row["question"]}",{1 + i % 2}' for i, row in enumerate(rows(8))]
    (tmp_path / "labels.csv").write_text("\n".join(["question,system", *labels]), encoding="utf-8")
    arguments = ["init", "rows.jsonl", "--model", tiny, "--out", "c.yaml", "--labels"]
    assert lorapar(*arguments, "gone.csv").err == "error: --labels gone.csv: no such file\n"
    done = lorapar(*arguments, "labels.csv")
    assert done.code == 0 and "who votes" not in done.out
    section = yaml.safe_load((tmp_path / "c.yaml").read_text(encoding="utf-8"))["classify"]
    assert section == {"strategy": "known", "labels_file": "labels.csv"}
    assert lorapar("classify", "c.yaml").code == 0


@pytest.mark.parametrize("name", examples.names())
def test_every_example_is_copied_with_what_it_refers_to(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, *others = examples.write(name, None)
    assert path == Path(f"{name}.yaml")
    if name.startswith("tables/"):
        table = file.read(path)
        assert all(Path(row["base"]) in others for row in table.rows.values() if "base" in row)
    for copy in (path, *others):
        text = copy.read_text(encoding="utf-8")
        assert "configs/" not in text and "$schema" not in text
        if "tables" not in copy.parts:
            assert load(copy).model.name
            assert read_with_extends(copy) == read_with_extends(examples.FOLDER / copy)


def test_an_example_may_have_another_name_and_overwrites_nothing(lorapar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = lorapar("init", "--example", "demo", "--out", "mine.yaml").err
    assert said.endswith("wrote mine.yaml; next: lorapar plan mine.yaml\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert "; next: lorapar sweep --dry-run tables/order" in lorapar("init", "--example", "tables/order").err
    assert lorapar("init", "--example", "paper/table1/qwq").code == 0
    assert lorapar("init", "--example", "paper/table1/vote3").code == 0  # its base is there, unchanged
    Path("paper/gsm8k-llama2-7b.yaml").write_text("seed: 1\n", encoding="utf-8")
    for arguments, code, told in (
        ("--example paper/table1/vote5", 73, "paper/gsm8k-llama2-7b.yaml exists already"),
        ("--example tables/theta --out theta.yaml", 73, "tables/theta refers to other files"),
        ("--example dmo", 78, "no example 'dmo'\n  hint: their names: lorapar list examples"),
        ("rows.jsonl", 78, "--example"),
        ("--model m", 78, "--example"),
        ("--example demo --test t.jsonl", 78, "--example"),
    ):
        done = lorapar("init", *arguments.split())
        assert done.code == code and told in done.err
    assert not Path("paper/table1/vote5.yaml").exists() and not Path("theta.yaml").exists()
    assert "  smoke  " in lorapar("list", "examples").out
