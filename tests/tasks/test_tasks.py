import json
import subprocess
import sys
import time
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from treepo.errors import ConfigError, TaskError
from treepo.tasks import Problem, Teacher
from treepo.tasks.dataset import DatasetTask
from treepo.tasks.math import boxed, equivalent
from treepo.tasks.program import CHARACTERS, ProgramTask
from treepo.tasks.scoring import Score, Scorer, ScoringSettings

# Boxed answers


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{4}.", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{1} or rather \boxed{2", "1"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}", None),
        (r"\boxed{a \\}", r"a \\"),
        (r"x \\\boxed{3}", "3"),
        (r"\\boxed{3}", "3"),
        (r"\boxed {3}", "3"),
        (r"} \boxed{3} {", "3"),
        (r"\boxed{}", ""),
        (r"\boxed 3}", None),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_the_last_complete_box_is_found(text, content):
    assert boxed(text) == content


nested = st.recursive(
    st.text("ab1 ", max_size=3) | st.sampled_from([r"\{", r"\}", r"\frac"]),
    lambda inner: st.lists(inner, max_size=3).map("".join) | inner.map(lambda text: "{" + text + "}"),
    max_leaves=8,
)


@given(nested, st.text("ab{1", max_size=5), st.text("ab}1", max_size=5))
def test_a_box_holds_its_balanced_content_whatever_stands_around(content, before, after):
    assert boxed(before + r"\boxed{" + content + "}" + after) == content


@given(st.lists(st.sampled_from([r"\boxed{", "{", "}", "x", "\\"]), max_size=14).map("".join))
def test_more_text_never_takes_an_answer_away(text):
    found = [boxed(text[:n]) is not None for n in range(len(text) + 1)]
    assert found == sorted(found)


def test_boxed_takes_linear_time_on_boxes_that_never_close():
    started = time.process_time()
    assert boxed(r"\boxed{" * 50_000 + "3}") == "3"
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("answer", "given", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        ("1/2", r"\frac{1}{2}", True),
        ("1,000", "1000", True),
        ("(x+1)^2", "x^2+2x+1", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (" 7 ", "7", True),
        ("5", "x=5", True),
        ("3", "4", False),
        ("(1,2)", "(2,1)", False),
        ("3", "", False),
        ("3", "}{", False),
    ],
)
def test_answers_are_compared_as_mathematics(answer, given, same, caplog):
    assert equivalent(answer, given) is same
    assert not caplog.records


# Programs

CAREFUL = ProgramTask(slip_plus=0, slip_minus=0, slip_times=0)
TOKENIZER = ProgramTask().tokenizer()


def test_a_program_is_run_modulo_ten():
    for problem in ProgramTask().problems("test")[:50]:
        value = {}
        exec(problem.prompt.removesuffix("?").replace(",", ""), {}, value)  # noqa: S102  # it is a program
        assert problem.answer == str(value["x"] % 10)


@given(st.integers(0, 2**31), st.integers(0, 10**6))
def test_a_teacher_without_slips_is_always_right_and_keeps_the_stride(seed, index):
    problem, response = CAREFUL.lesson(seed, index)
    assert CAREFUL.reward(problem, response) == 1.0
    assert CAREFUL.final_answer(response) == problem.answer
    start, steps = problem.prompt[:4], problem.prompt[4:-1]
    assert start[:2] + start[3:] == "x=;" and problem.prompt[-1] == "?"
    value = start[2]
    for i in range(0, 30, 6):
        step, written = steps[i : i + 6], response[i : i + 6]
        assert (step[0], step[2], step[4:]) == ("x", "=", ";,")
        assert (written[0], written[1], written[2]) == (value, step[1], step[3])
        assert (written[3], written[5]) == ("=", ";")
        value = written[4]
    assert response[30:] == f"\\boxed{{{value}}}"


def test_slips_are_as_frequent_as_set_and_as_described():
    task = ProgramTask(slip_plus=1, slip_minus=1, slip_times=1, careful_lessons=0)
    for index in range(50):
        response = task.lesson(0, index)[1]
        for a, operator, b, _, c in (response[i : i + 5] for i in range(0, 30, 6)):
            wrong = {"+": int(a) + int(b) + 1, "-": int(b) - int(a), "*": int(a) + int(b)}[operator]
            assert int(c) == wrong % 10
    slipping = ProgramTask(slip_plus=0.3, slip_minus=0, slip_times=0, careful_lessons=0)
    sums = [s for i in range(600) for s in slipping.lesson(1, i)[1].split(";") if "+" in s]
    share = sum((int(s[0]) + int(s[2])) % 10 != int(s[4]) for s in sums) / len(sums)
    assert abs(share - 0.3) < 0.06


def test_the_teacher_is_careful_at_first():
    task = ProgramTask(slip_plus=1, slip_minus=1, slip_times=1, careful_lessons=100)
    assert all(task.reward(*task.lesson(0, index)) == 1.0 for index in range(100))
    assert sum(task.reward(*task.lesson(0, index)) for index in range(100, 200)) < 30


def test_lessons_are_a_function_of_seed_and_index_and_never_of_test_problems():
    task = ProgramTask(operations=2, train_problems=1000, test_problems=440)
    assert task.lesson(3, 5) == task.lesson(3, 5) != task.lesson(4, 5)
    held_out = {problem.prompt for problem in task.problems("test")}
    assert not any(task.lesson(0, i)[0].prompt in held_out for i in range(500))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 2), st.integers(0, 4), st.integers(5, 9))
def test_splits_are_disjoint_and_together_all_programs_if_so_asked(seed, operations, low, high):
    fields = {"operations": operations, "operand_min": low, "operand_max": high}
    size = ProgramTask(operations=12).model_copy(update=fields).programs
    task = ProgramTask(seed=seed, train_problems=size - size // 3, test_problems=size // 3, **fields)
    problems = [*task.problems("train"), *task.problems("test")]
    assert len({p.prompt for p in problems}) == len({p.id for p in problems}) == task.programs


def test_problems_are_a_sequence():
    problems = ProgramTask().problems("train")
    assert len(problems) == 100_000
    assert problems[-1] == problems[99_999]
    assert problems[3:5] == [problems[3], problems[4]]
    assert list(islice(iter(ProgramTask(test_problems=2).problems("test")), 5))[-1].id == "test-1"
    with pytest.raises(IndexError):
        problems[100_000]


def test_program_settings_that_cannot_be_met_are_refused():
    with pytest.raises(ValidationError, match="only 120 such programs exist, but test_problems"):
        ProgramTask(operations=1)
    with pytest.raises(ValidationError, match="operand_min 5 is above operand_max 2"):
        ProgramTask(operand_min=5, operand_max=2)


@given(st.text(CHARACTERS, max_size=60))
def test_the_character_tokenizer_round_trips(text):
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([*ids, TOKENIZER.eos_token_id], skip_special_tokens=True) == text


def test_the_character_tokenizer_survives_saving_and_refuses_other_text(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    problem, response = ProgramTask().lesson(0, 0)
    assert again.encode(problem.prompt) == ProgramTask().encode(TOKENIZER, problem)
    assert again.decode(again.encode(response)) == response
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (1, 0, 2 + len(CHARACTERS))
    with pytest.raises(Exception, match="UNK"):
        TOKENIZER.encode("a")


def test_a_program_task_is_a_teacher_and_a_data_set_is_none():
    assert isinstance(ProgramTask(), Teacher)
    assert not isinstance(DatasetTask(path="x.jsonl"), Teacher)


def test_tasks_load_neither_torch_nor_transformers_nor_sympy():
    code = (
        "import sys, treepo.tasks.program, treepo.tasks.dataset, treepo.tasks.scoring; "
        "print({'torch', 'transformers', 'datasets', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Data sets

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(40)]


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_jsonl_json_and_parquet_give_the_same_problems(tmp_path):
    write(tmp_path / "d.jsonl", *ROWS)
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    seen = []
    for suffix in ("jsonl", "json", "parquet"):
        task = DatasetTask(path=str(tmp_path / f"d.{suffix}"), test_fraction=0.1)
        seen.append([[(p.prompt, p.answer) for p in task.problems(split)] for split in ("train", "test")])
    assert seen[0] == seen[1] == seen[2]
    train, test = seen[0]
    assert (len(train), len(test)) == (36, 4)
    assert sorted(train + test) == sorted((row["question"], row["answer"]) for row in ROWS)


def test_ids_are_file_and_line_and_blank_lines_count(tmp_path):
    path = write(tmp_path / "d.jsonl", "\n", ROWS[0], "  \n", ROWS[1])
    assert DatasetTask(path=path, test_path=path).problems("train") == (
        Problem("d.jsonl:2", "What is 0 + 0?", "0"),
        Problem("d.jsonl:4", "What is 1 + 1?", "2"),
    )


def test_equal_questions_are_held_out_together_in_whatever_order(tmp_path):
    rows = ROWS[:10] * 3
    task = DatasetTask(path=write(tmp_path / "a.jsonl", *rows), test_fraction=0.3)
    other = DatasetTask(path=write(tmp_path / "b.jsonl", *rows[::-1]), test_fraction=0.3)
    train, test = ({p.prompt for p in task.problems(split)} for split in ("train", "test"))
    assert not train & test
    assert test == {p.prompt for p in other.problems("test")}
    assert len(task.problems("train")) + len(task.problems("test")) == 30


def test_a_data_set_gives_other_columns_marks_numbers_and_a_limit(tmp_path):
    rows = [{"q": f" {n} ", "a": f"long #### thought\n#### {n}"} for n in range(9)]
    path = write(tmp_path / "gsm.jsonl", *rows)
    task = DatasetTask(path=path, test_path=path, prompt_column="q", answer_column="a", answer_after="####", limit=3)
    assert [(p.prompt, p.answer) for p in task.problems("train")] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert len(task.problems("test")) == 3
    numbers = write(tmp_path / "n.jsonl", {"question": "a", "answer": 3}, {"question": "b", "answer": 2.5})
    assert [p.answer for p in DatasetTask(path=numbers, test_path=numbers).problems("train")] == ["3", "2.5"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([ROWS[0], "\n", '{"question": "a" "answer": 1}\n'], "d.jsonl:3: not JSON: .* at column 18"),
        ([ROWS[0], '["a", "b"]\n'], "d.jsonl:2: expected an object with columns, found a list"),
        ([{"question": "a", "answer": None}], "d.jsonl:1: 'answer' is empty"),
        ([ROWS[0], {"question": " ", "answer": "1"}], "d.jsonl:2: 'question' is empty"),
        (
            [{"question": "a", "answr": "1"}],
            "d.jsonl:1: no column 'answer'; found: question, answr; did you mean 'answr'",
        ),
        ([{"question": "a", "answer": ["1"]}], "d.jsonl:1: 'answer' holds a list; expected a text or a number"),
        ([], "d.jsonl: no rows"),
        (["\n"], "d.jsonl: no rows"),
        ([ROWS[0]], "d.jsonl: too few different prompts to hold some out for evaluation"),
    ],
)
def test_bad_rows_are_reported_with_file_and_line(tmp_path, lines, message):
    task = DatasetTask(path=write(tmp_path / "d.jsonl", *lines))
    with pytest.raises(TaskError, match=message) as caught:
        task.problems("train")
    assert "\n" not in str(caught.value)


def test_other_bad_files_are_reported(tmp_path):
    def refuse(message, **fields):
        with pytest.raises(TaskError, match=message) as caught:
            DatasetTask(**fields).problems("train")
        assert "\n" not in str(caught.value)

    refuse("no such file: .*/none.jsonl", path=str(tmp_path / "none.jsonl"))
    good = write(tmp_path / "good.jsonl", *ROWS)
    refuse("no such file: .*/none.jsonl", path=good, test_path=str(tmp_path / "none.jsonl"))
    refuse("r.jsonl:1: nothing follows '####'", path=write(tmp_path / "r.jsonl", ROWS[0]), answer_after="####")
    refuse("unknown format '.csv'; allowed: .jsonl, .json, .parquet", path=write(tmp_path / "d.csv", "a,b\n"))
    refuse("d.json: expected a list of objects, found a dict", path=write(tmp_path / "d.json", ROWS[0]))
    refuse("e.json: not JSON: .* at line 2 column 1", path=write(tmp_path / "e.json", "[\n"))
    refuse(
        "f.json: row 2: 'answer' is empty",
        path=write(tmp_path / "f.json", json.dumps([ROWS[0], {"question": "a", "answer": ""}])),
    )
    refuse("p.parquet: cannot be read as Parquet", path=write(tmp_path / "p.parquet", "no"))
    parquet.write_table(pa.Table.from_pylist([{"question": "a", "solution": "1"}]), tmp_path / "q.parquet")
    refuse("q.parquet: no column 'answer'; found: question, solution", path=str(tmp_path / "q.parquet"))
    parquet.write_table(pa.Table.from_pylist([ROWS[0], {"question": "a", "answer": None}]), tmp_path / "s.parquet")
    refuse("s.parquet: row 2: 'answer' is empty", path=str(tmp_path / "s.parquet"))
    (tmp_path / "l.jsonl").write_bytes(b'{"question": "\xff"}')
    refuse("l.jsonl:1: not UTF-8", path=str(tmp_path / "l.jsonl"))


def test_a_data_set_that_the_hub_does_not_give_is_reported(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"cannot load data set 'nobody/nothing' \(split 'train'\)") as caught:
        DatasetTask(path="nobody/nothing").problems("train")
    assert "\n" not in str(caught.value)


def test_a_folder_loads_as_a_hub_data_set_does(tmp_path_factory, monkeypatch):
    import datasets

    tmp_path = tmp_path_factory.mktemp("data")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    write(tmp_path / "train.jsonl", *ROWS)
    write(tmp_path / "test.jsonl", *ROWS[:3])
    task = DatasetTask(path=str(tmp_path), test_split="test")
    assert [p.id for p in task.problems("test")] == ["test:1", "test:2", "test:3"]
    assert len(task.problems("train")) == 40
    with pytest.raises(TaskError, match="no column 'anser'; found: question, answer; did you mean 'answer'"):
        DatasetTask(path=str(tmp_path), answer_column="anser").problems("train")


def test_no_test_problems_is_an_error_where_they_are_asked_for(tmp_path):
    task = DatasetTask(path=write(tmp_path / "d.jsonl", *ROWS), test_fraction=0)
    assert len(task.problems("train")) == 40
    with pytest.raises(TaskError, match="set test_path, test_split or a positive test_fraction"):
        task.problems("test")


def test_bad_dataset_settings_are_refused():
    for fields in ({"chat": "yes"}, {"reward": "nodots"}, {"test_fraction": 1.0}, {"pth": "x"}, {"limit": 0}):
        with pytest.raises(ValidationError):
            DatasetTask(**{"path": "d.jsonl", **fields})


@pytest.fixture
def chatty():
    """A byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def test_the_chat_template_is_applied_where_there_is_one(chatty):
    problem = Problem("1", "Why?", "42")

    def prompt(**fields):
        return chatty.decode(DatasetTask(path="d.jsonl", **fields).encode(chatty, problem))

    asked = "Why?\nPut the final answer in \\boxed{}."
    assert prompt() == prompt(chat="always") == f"[user]{asked}[assistant]"
    assert prompt(system="Be brief.", instruction="") == "[system]Be brief.[user]Why?[assistant]"
    assert prompt(chat="never") == asked
    assert prompt(chat="never", system="Be brief.") == f"Be brief.\n\n{asked}"
    chatty.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ConfigError, match="chat template does not accept the prompt: no system role"):
        prompt()
    chatty.chat_template = None
    assert prompt() == asked
    with pytest.raises(ConfigError, match="always, but the tokenizer has no chat template"):
        prompt(chat="always")


def test_boxed_answers_earn_one_or_nothing():
    task = DatasetTask(path="d.jsonl")
    problem = Problem("1", "?", r"\frac{1}{2}")
    assert task.reward(problem, r"So \boxed{3}, no: \boxed{0.5}") == 1.0
    assert task.reward(problem, r"So \boxed{0.5}, no: \boxed{3}") == 0.0
    assert task.reward(problem, "So 0.5") == 0.0
    assert task.final_answer(r"\boxed{0.5}") == "0.5"


COLUMNS = """
def reward(prompt, response, answer, level, tests):
    return level + len(tests)
"""


def test_a_reward_function_gets_more_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graded.py").write_text(COLUMNS)
    row = {"question": "a", "answer": "1", "level": 3, "tests": [["in", "out"], ["in", "out"]], "unused": {"x": None}}
    task = DatasetTask(
        path=write(tmp_path / "d.jsonl", row), test_fraction=0, columns=["level", "tests"], reward="graded:reward"
    )
    (problem,) = task.problems("train")
    assert problem.columns == {"level": 3, "tests": row["tests"]}
    with Scorer(task, ScoringSettings(workers=1, timeout_s=60)) as scorer:  # in a process of its own
        assert scorer.score([(problem, "?")]) == [Score(5.0)]


def test_columns_that_cannot_be_handed_on_are_refused(tmp_path):
    path = write(tmp_path / "d.jsonl", {"question": "a", "answer": "1"})
    with pytest.raises(TaskError, match=r"d\.jsonl:1: no column 'level'; found: question, answer"):
        DatasetTask(path=path, columns=["level"], reward="graded:reward").problems("train")
    table = pa.Table.from_pylist([{"question": "a", "answer": "1", "level": b"x"}])
    parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(TaskError, match=r"d\.parquet: row 1: 'level' cannot be sent to a reward function: .*bytes"):
        DatasetTask(path=str(tmp_path / "d.parquet"), columns=["level"], reward="graded:reward").problems("train")
    with pytest.raises(ValidationError, match="'answer' is already an argument of every reward function"):
        DatasetTask(path=path, columns=["answer"], reward="graded:reward")
    with pytest.raises(ValidationError, match="columns are arguments of your reward function"):
        DatasetTask(path=path, columns=["level"])
