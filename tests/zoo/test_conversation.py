"""Conversations: files as they are published, the recurrence against loops, the score by hand, and pages."""

import math

import numpy as np
import pytest
import torch

from effc.errors import CalibrationError
from effc.zoo import conversation_files as files
from effc.zoo import conversation_scores as scores
from effc.zoo import conversation_view as view
from effc.zoo.conversation import ConversationModel, Recurrence, loss, views
from effc.zoo.conversation_layout import inputs
from effc.zoo.conversation_task import Settings
from kit import TableEncoder

MELD = files.EMOTIONS["meld"]
HEAD = "Sr No.,Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID\n"


def written(place, text, name="f.csv"):
    file = place / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_rows_of_a_dialogue_stand_together_and_its_number_may_come_again(tmp_path):
    rows = '1,"You, what?",Joey,surprise,0,0\n2,Fine.,Ross,Neutral,0,1\n3,Hi,Joey,joy,1,0\n4,No,Ross,anger,0,0\n'
    found = files.read(written(tmp_path, HEAD + rows), MELD)
    assert [[u.text for u in c.utterances] for c in found] == [
        ["You, what?", "Fine."],
        ["Hi"],
        ["No"],
    ]
    assert [u.emotion for u in found[0].utterances] == [1, 0]
    assert found[0].utterances[0].speakers == ("Joey",)


def test_emorynlp_names_speakers_in_a_list_and_scenes_by_three_columns(tmp_path):
    text = (
        "Utterance,Speaker,Emotion,Scene_ID,Utterance_ID,Season,Episode\n"
        "Hey!,\"['Monica Geller']\",Joyful,1,1,1,2\nBoth.,\"['Ross Geller', 'Rachel Green']\",Mad,1,2,1,2\n"
        "Hm,[],Sad,1,1,1,3\n"
    )
    first, second = files.read(written(tmp_path, text), files.EMOTIONS["emorynlp"])
    assert first.utterances[1].speakers == ("Ross Geller", "Rachel Green")
    assert (first.name, second.name) == ("1-2-1", "1-3-1") and second.utterances[0].speakers == ()


def test_the_episodes_of_emorynlp_are_read_from_json(tmp_path):
    text = """{"episodes": [{"scenes": [{"scene_id": "s1", "utterances": [
      {"utterance_id": "u1", "speakers": ["Rachel Green"], "transcript": "Coffee.", "emotion": "Neutral"},
      {"utterance_id": "u2", "speakers": [], "transcript": "Thank you.", "emotion": "Glad"}]}]}]}"""
    file = written(tmp_path, text, "f.json")
    assert [u.text for u in files.read(file)[0].utterances] == ["Coffee.", "Thank you."]
    with pytest.raises(CalibrationError, match=r"line 3: unknown emotion 'Glad'"):
        files.read(file, files.EMOTIONS["emorynlp"])


def test_emotions_may_be_missing_where_nothing_is_scored(tmp_path):
    file = written(tmp_path, "Utterance,Speaker,Dialogue_ID\nHi,Joey,0\n")
    (found,) = files.read(file, MELD, labelled=False)
    assert not found.is_known()
    with pytest.raises(CalibrationError, match="line 2: it has no emotion"):
        files.read(file, MELD)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1 has no column 'Utterance'"),
        (HEAD, "holds no utterances"),
        ("Utterance,Speaker\nHi,Joey\n", "line 1 has no column 'Dialogue_ID'"),
        (HEAD + "1,Hi,Joey,happy,0,0\n", "line 2: unknown emotion 'happy'"),
        (HEAD + "1,Hi,Joey,joy,0,0\n2, ,Joey,joy,0,1\n", "line 3 has an empty utterance"),
        (HEAD + "1,Hi,Joey\n", "line 2 has not as many fields"),
        (HEAD + '1,"Hi,Joey,joy,0,0\n', "is no CSV"),
        (HEAD + "1,Hi,[Joey,joy,0,0\n", "no list of speakers"),
        ((HEAD + "1,H\xe9,Joey,joy,0,0\n").encode("latin-1"), "line 2 is not UTF-8"),
        ('{"episodes": [', "line 1 is no JSON"),
        ('{"episodes": [{"scenes": 3}]}', "no list of `scenes`"),
        ('{"episodes": [{"scenes": [{"utterances": [{}]}]}]}', "no `transcript`"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_its_line(tmp_path, text, words):
    with pytest.raises(CalibrationError, match=words) as caught:
        files.read(written(tmp_path, text), MELD)
    assert "f.csv" in str(caught.value) and caught.value.hint


def conversation(*texts):
    said = [files.Utterance(text=t, speakers=("Joey",)) for t in texts]
    return files.Conversation(name="", utterances=tuple(said))


def test_conversations_that_share_two_longer_utterances_are_left_out():
    judged = conversation("You know that is not true!", "Okay.", "I went to the store today.")
    near = conversation("i went to the store today", "you know, that is not true")
    once = conversation("I went to the store today.", "I went to the store today.", "Okay.")
    short = conversation("Okay.", "Yeah.", "Okay.")
    assert files.apart([near, once, short], [judged]) == [once, short]


def test_the_recurrence_is_that_of_loops_and_padding_is_not_seen():
    torch.manual_seed(0)
    layer = Recurrence(5, 16).double()
    v = torch.randn(2, 6, 5, dtype=torch.float64)
    present = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        found = layer(v, views(present))
        value, gate = layer.value(v).tanh(), layer.gate(v).sigmoid()
    for b, length in ((0, 6), (1, 4)):
        for part, order in ((0, range(length)), (1, reversed(range(length)))):
            h = [0.0] * 16
            for t in order:
                for c in range(16):
                    z = float(gate[b, t, part * 2 + c // 8])
                    h[c] = (1 - z) * h[c] + z * float(value[b, t, part * 16 + c])
                    assert math.isclose(h[c], float(found[b, t, part * 16 + c]), abs_tol=1e-12)
    layer = Recurrence(5, 16)
    layer.gate.weight.data *= 1e3  # gates that are all shut or open
    made = layer(v.float().requires_grad_(), views(present)).square().sum()
    made.backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


def tensors(feeds):
    return {name: torch.from_numpy(value) for name, value in feeds.items()}


@pytest.mark.parametrize("speakers", [("Joey",), ()])
def test_a_conversation_in_a_padded_batch_is_told_as_by_itself(speakers):
    torch.manual_seed(0)
    model = ConversationModel(TableEncoder(), Settings(size=16, speakers=speakers), 7).eval()
    long, short = [[2, 5, 3], [2, 7, 8, 9, 3], [2, 4, 3]], [[2, 11, 3], [2, 12, 13, 3]]
    with torch.no_grad():
        both = model(**tensors(inputs([long, short])))
        for b, rows in enumerate((long, short)):
            for name, value in model(**tensors(inputs([rows]))).items():
                assert torch.allclose(value[0], both[name][b, : len(rows)], atol=1e-6)
        turned = model(**tensors(inputs([long[::-1]])))["emotion"]
    assert set(both) == ({"emotion", "speaker"} if speakers else {"emotion"})
    assert not torch.allclose(
        turned[0].flip(0), both["emotion"][0], atol=1e-3
    )  # it knows the order


def test_the_loss_is_over_utterances_that_count():
    """Against loops: each part by itself, and nothing where nothing counts."""
    torch.manual_seed(0)
    outputs = {"emotion": torch.randn(2, 3, 4), "speaker": torch.randn(2, 3, 3)}
    off = torch.full((2, 3), -100)
    wanted = {"emotion": torch.tensor([[0, 3, -100], [1, -100, -100]]), "speaker": off}
    weights = {"emotion": 1.0, "speaker": 0.5}
    rows = outputs["emotion"].double().log_softmax(-1)
    expected = -(rows[0, 0, 0] + rows[0, 1, 3] + rows[1, 0, 1]) / 3
    assert float(loss(outputs, wanted, weights)) == pytest.approx(float(expected), rel=1e-5)
    wanted = {"emotion": off, "speaker": torch.tensor([[2, -100, -100], [-100] * 3])}
    expected = -0.5 * outputs["speaker"].double().log_softmax(-1)[0, 0, 2]
    assert float(loss(outputs, wanted, weights)) == pytest.approx(float(expected), rel=1e-5)


def test_weighted_f1_by_hand():
    """Six of class 0, three of 1, one of 2; four, two and none of them right, and one said of another in each."""
    wanted, said = [[0] * 6 + [1]], [[0] * 4 + [1, 2] + [1]]
    more_wanted, more_said = [[1, 1, 2]], [[1, 0, 0]]
    counted = scores.table(wanted + more_wanted, said + more_said, 3).sum(0)
    f1 = [2 * 4 / (6 + 6), 2 * 2 / (3 + 3), 0.0]
    assert scores.value(counted) == pytest.approx(0.6 * f1[0] + 0.3 * f1[1])
    assert scores.value(counted, "macro") == pytest.approx(sum(f1) / 3)
    assert scores.value(counted, "accuracy") == 0.6
    told = scores.scores(counted, ("a", "b", "c"))["classes"]
    assert (
        told["a"]["there"] == 6
        and told["c"]["f1"] == 0
        and told["b"]["recall"] == pytest.approx(2 / 3)
    )
    assert scores.value(np.zeros((3, 3))) == 0
    assert scores.value(np.diag([3, 0, 2])) == scores.value(np.diag([3, 0, 2]), "macro") == 1


def test_words_of_strangers_run_nowhere():
    hostile = files.Utterance(text="<script>x</script>\x1b[31m", speakers=('"><b>',), emotion=0)
    said = view.answer(files.Conversation(name="<i>", utterances=(hostile,)), (5,), MELD)
    assert (
        said["utterances"][0]["emotion"] == "anger" and said["utterances"][0]["there"] == "neutral"
    )
    page = view.page([said])
    assert "<script" not in page and "<b>" not in page and "<i>" not in page and "\x1b" not in page
    assert "http" not in page and "neutral in the file" in page
    assert "\x1b" not in "".join(view.lines(said, in_colour=False))
    assert "\x1b[31manger" in view.lines(said, in_colour=True)[1]
    every = {word for words in files.EMOTIONS.values() for word in words}
    assert set(view.HUES) == set(view.COLOURS) == every
