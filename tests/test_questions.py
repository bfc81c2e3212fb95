"""Tasks as questions: training and tests share none, and every answer is a token of its own."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PLACE = Path(__file__).resolve().parent.parent / "examples" / "mor1e"


@pytest.fixture
def questions(monkeypatch):
    monkeypatch.syspath_prepend(str(PLACE))
    spec = importlib.util.spec_from_file_location("questions", PLACE / "questions.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "questions", module)
    spec.loader.exec_module(module)
    return module


def test_generated_tasks_are_right_and_the_same_every_time(questions):
    tasks = {task.name: task for task in questions.load(None)}
    assert set(tasks) == {"larger number", "key lookup", "counting", "alphabet"}
    for name, task in tasks.items():
        assert not {t for t, _ in task.train} & {t for t, _ in task.test}
        assert {k for _, k in task.train} == set(range(task.classes))
        assert task == next(t for t in questions.load(None) if t.name == name)
    for text, label in tasks["larger number"].test:
        a, b = (int(n) for n in text.replace(",", " ").replace("?", " ").split() if n.isdigit())
        assert label == (b > a)
    for text, label in tasks["counting"].test:
        head, row = text.removeprefix("How often is ").rstrip("?").split(" in: ")
        assert row.split().count(head) == label + 1
    for text, label in tasks["key lookup"].test:
        asked = text.rpartition("Where is the ")[2].rstrip("?")
        box = text.partition(f"the {asked} is in the ")[2].split()[0].rstrip(",.")
        assert questions.BOXES[int(label)] == box


def test_an_opinion_is_put_beside_the_utterance_that_it_stands_in(questions, tmp_path):
    dialogue = {
        "sentences": ["the phone is fine", "its screen is awful"],
        "triplets": [
            [1, 2, -1, -1, 3, 4, "pos", "phone", "", "fine"], [1, 2, 5, 6, 7, 8, "neg", "phone", "screen", "awful"],
            [1, 2, 5, 6, -1, -1, -1, "phone", "screen", ""],
        ],
    }  # fmt: skip
    file = tmp_path / "d.json"
    file.write_text(json.dumps([dialogue]), encoding="utf-8")
    assert questions._opinions(file) == (
        ("opinion of phone: the phone is fine", 2.0),
        ("opinion of phone screen: its screen is awful", 0.0),
    )


class Letters:
    """A tokenizer of one token a character."""

    def token_ids(self, texts):
        return [[ord(c) for c in text] for text in texts]


def test_words_that_begin_alike_are_answered_by_letters(questions):
    told = questions.tokens(Letters(), ("bad", "good"))
    assert told == [ord("b"), ord("g")]  # behind a blank both are the same
    assert questions.tokens(Letters(), ("sad", "scared", "joy")) == [ord(c) for c in "ABC"]
