"""Dialogues: files and what is wrong with them, tags and back, scores by hand, the model and its engine."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from graphs import engine

import effc
from effc.errors import CalibrationError
from effc.zoo import dialogue_files as files
from effc.zoo import dialogue_layout as layout
from effc.zoo import dialogue_scores as scores
from effc.zoo import dialogue_tags as tags
from effc.zoo.dialogue import DialogueModel, Turn, loss, signed, views
from effc.zoo.dialogue_files import Quad, Span
from effc.zoo.dialogue_task import Settings

# Places of tokens:   0 1 2 3        4 5 6           7 8             9 10
TEXTS = ["phone a b camera", "it is good", "camera bad", "battery fine"]
PHONE, CAMERA, GOOD, CAMERA_2, BAD = Span(0, 1), Span(3, 4), Span(6, 7), Span(7, 8), Span(8, 9)
BATTERY, FINE = Span(9, 10), Span(10, 11)


def example(**changes):
    """Two threads under the first utterance: 1 and 2, and 3. One quadruple crosses one answer, one crosses two."""
    return {
        "doc_id": "7", "sentences": TEXTS, "replies": [-1, 0, 1, 0], "speakers": [4, 9, 4, 5],
        "triplets": [
            [0, 1, 3, 4, 6, 7, "pos", "phone", "camera", "good"],
            [0, 1, 7, 8, 8, 9, "neu", "phone", "camera", "bad"],
            [-1, -1, 9, 10, 10, 11, "neg", "", "battery", "fine"],
        ],
        "targets": [[0, 1, "phone"]],
        "aspects": [[3, 4, "camera"], [7, 8, "camera"], [9, 10, "battery"]],
        "opinions": [[6, 7, "good", "pos"], [8, 9, "bad", "neu"], [10, 11, "fine", "neg"]],
        **changes,
    }  # fmt: skip


def write(place, value, name="dialogues.json"):
    file = place / name
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return file


@pytest.fixture
def dialogue(tmp_path):
    (found,) = files.read(write(tmp_path, [example()]))
    return found


class Pieces:
    """A tokenizer that makes as many pieces of a word as it has letters, up to `most`."""

    cls_token_id, sep_token_id, pad_token_id = 1, 2, 0

    def __init__(self, most=1):
        self.most = most

    def __call__(self, text, **options):
        return {"input_ids": [[3 + ord(c) % 7 for c in word[: self.most]] for word in text]}


def test_a_file_is_read_with_its_tree_and_its_truth(dialogue):
    assert dialogue.threads == (0, 1, 1, 2)
    assert dialogue.depths == (0, 1, 2, 1)
    assert dialogue.starts == (0, 4, 7, 9, 11)
    assert dialogue.truth.quads == {
        Quad(PHONE, CAMERA, GOOD, "pos"),
        Quad(PHONE, CAMERA_2, BAD, "other"),  # a polarity of the files that counts as another
    }
    assert dialogue.truth.aspect_opinion == {(CAMERA, GOOD), (CAMERA_2, BAD), (BATTERY, FINE)}
    assert dialogue.distance([BAD, FINE, FINE]) == 3  # 2 up to the first utterance, 1 down


def test_without_truth_a_dialogue_can_still_be_run(tmp_path):
    bare = {k: v for k, v in example().items() if k in ("sentences", "replies", "speakers")}
    file = write(tmp_path, [bare])
    assert files.read(file, labelled=False)[0].truth is None
    with pytest.raises(CalibrationError, match="no `triplets`"):
        files.read(file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replies": [-1, 0, 0, 1]}, r"reply tree is broken: replies\[3\] is 1"),
        ({"replies": [0, 0, 1, 0]}, r"replies\[0\] is 0"),
        ({"replies": [-1, 0]}, "2 entries for 4 utterances"),
        ({"speakers": ["A", "B", "C", "D"]}, "`speakers` is no list of int"),
        ({"speakers": [True, 0, 0, 0]}, "`speakers` is no list of int"),
        ({"sentences": []}, "no utterances"),
        ({"sentences": ["a", "  ", "c", "d"]}, r"sentences\[1\] is empty"),
        ({"triplets": [[0, 1, 3, 4, 6, 7, "posi"]]}, r"triplets\[0\]: unknown polarity 'posi'.*'pos'"),
        ({"triplets": [[0, 99, 3, 4, 6, 7, "pos"]]}, "outside of the dialogue, which has 11 tokens"),
        ({"triplets": [[3, 5, 3, 4, 6, 7, "pos"]]}, "over the end of an utterance"),
        ({"triplets": [[1, 0, 3, 4, 6, 7, "pos"]]}, "outside"),
        ({"triplets": [[0, 1]]}, "2 entries"),
        ({"opinions": [[-1, -1, ""]]}, r"opinions\[0\] has no place"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, changes, words):
    file = tmp_path / "d.json"
    file.write_text(f"[\n{json.dumps(example())},\n{json.dumps(example(**changes))}]")
    with pytest.raises(
        CalibrationError, match=rf"d.json line 3, dialogue 1 \(7\): .*{words}"
    ) as caught:
        files.read(file)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"[]", "holds no dialogues"),
        (b"[\n1]", "line 2, dialogue 0: it is a int"),
        (b'[{"a": 1}\n{"b": 2}]', "line 1, dialogue 0"),
        (b"[\n\n{,}]", "line 3 is no JSON"),
        ('[\n"né"]'.encode("latin-1"), "line 2 is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, words):
    file = tmp_path / "d.json"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=words):
        files.read(file)


@pytest.mark.parametrize("end", ["", " 3", ","])
def test_a_list_that_is_cut_short_or_goes_on_is_refused(tmp_path, end):
    file = tmp_path / "d.json"
    file.write_text(f"[{json.dumps(example())}{end}" + ("]3" if end == "," else ""))
    with pytest.raises(CalibrationError, match="no JSON"):
        files.read(file)


@pytest.mark.parametrize("most", [1, 3])
def test_tags_of_the_truth_give_it_back(dialogue, most):
    laid = layout.lay(dialogue, Pieces(most))
    assert tags.decode(tags.encode(laid, split=True), laid) == dialogue.truth


def test_one_table_of_relations_loses_what_is_one_piece_each(dialogue):
    laid = layout.lay(dialogue, Pieces(1))
    assert not tags.decode(tags.encode(laid, split=False), laid).quads
    apart = layout.lay(dialogue, Pieces(3))
    assert tags.decode(tags.encode(apart, split=False), apart).quads == dialogue.truth.quads


@pytest.mark.parametrize(
    ("head", "tail", "said"), [(2, 2, "neg"), (0, 2, "neg"), (3, 0, "other"), (0, 0, "pos"), (2, 3, "pos")]
)  # fmt: skip
def test_heads_and_tails_agree_on_a_polarity_or_the_first_is_taken(dialogue, head, tail, said):
    laid = layout.lay(dialogue, Pieces(3))
    made = tags.encode(laid, split=True)
    first, last = zip(laid.ends(PHONE), laid.ends(GOOD), strict=True)
    made.polarity[first], made.polarity[last] = head, tail
    assert Quad(PHONE, CAMERA, GOOD, said) in tags.decode(made, laid).quads


def test_a_chain_is_read_along_its_arrows_and_needs_all_three(dialogue):
    laid = layout.lay(dialogue, Pieces(1))
    made = tags.encode(laid, split=True)
    made.entity[laid.ends(CAMERA)] = tags.OPINION  # kinds are not asked about
    assert Quad(PHONE, CAMERA, GOOD, "pos") in tags.decode(made, laid).quads
    phone, good = laid.ends(PHONE)[0], laid.ends(GOOD)[0]
    made.relation[phone, good, 1] = 0
    assert Quad(PHONE, CAMERA, GOOD, "pos") not in tags.decode(made, laid).quads


def test_a_model_that_marks_everything_is_decoded_in_no_time(dialogue):
    laid = layout.lay(dialogue, Pieces(3))
    n = laid.length
    full = tags.Tags(
        entity=np.ones((n, n), int), relation=np.ones((n, n, 2), int), polarity=np.ones((n, n), int)
    )
    assert len(tags.decode(full, laid).targets) <= tags.MOST_MENTIONS


def test_scores_of_a_case_worked_by_hand(dialogue):
    """There are two quads, both between utterances. Said are three: one right, one of another polarity, one wrong."""
    said = files.Truth(
        targets=frozenset({PHONE, CAMERA}), aspects=frozenset({CAMERA}),
        target_aspect=frozenset({(PHONE, CAMERA)}),
        quads=frozenset({
            Quad(PHONE, CAMERA, GOOD, "pos"), Quad(PHONE, CAMERA_2, BAD, "neg"), Quad(CAMERA_2, CAMERA_2, BAD, "pos"),
        }),
    )  # fmt: skip
    found = scores.counts(dialogue, said)
    assert found["quads"] == (1, 3, 2)
    assert found["identified"] == (2, 3, 2)
    assert found["intra"] == (0, 1, 0)
    assert found["inter"] == (1, 2, 2)
    assert found["inter_1"] == (1, 1, 1)
    assert found["inter_2"] == (0, 1, 1)
    assert found["targets"] == (1, 2, 1)
    assert found["aspects"] == (1, 1, 3)
    assert found["target_aspect"] == (1, 1, 2)
    made = scores.scores(scores.table([found, scores.counts(dialogue, dialogue.truth)]))
    assert made["quads"]["precision"] == pytest.approx(3 / 5)
    assert made["quads"]["recall"] == pytest.approx(3 / 4)
    assert made["quads"]["f1"] == pytest.approx(2 * 3 / (5 + 4))
    assert made["identified"]["f1"] == pytest.approx(2 * 4 / (5 + 4))


def test_an_utterance_that_is_too_long_is_named(dialogue):
    with pytest.raises(CalibrationError, match="dialogue 7: utterance 0 has 10 pieces") as caught:
        layout.lay(dialogue, Pieces(3), longest=9)
    assert caught.value.hint


def test_reading_laying_decoding_and_scoring_need_no_torch():
    code = (
        "import sys; import effc.zoo.dialogue_tags, effc.zoo.dialogue_scores; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def masks(laid, *, released=False):
    made = {k: torch.from_numpy(v) for k, v in layout.inputs([laid], released=released).items()}
    names = ("utterance", "parent", "speaker", "group")
    return [m[0].numpy() for m in views(*(made[n] for n in names), released=released)]


def test_views_see_answers_threads_and_speakers(dialogue):
    """Held against loops over utterances, as the paper says it."""
    laid = layout.lay(dialogue, Pieces(3))
    of, n = laid.utterances, laid.length
    for found, sees in zip(masks(laid), (answers, threads, speakers), strict=True):
        for i in range(n):
            for j in range(n):
                real = laid.tokens[i] >= 0 and laid.tokens[j] >= 0
                assert found[i, j] == (i == j or (real and sees(dialogue, of[i], of[j])))


def answers(dialogue, a, b):
    return a == b or dialogue.replies[a] == b or dialogue.replies[b] == a


def threads(dialogue, a, b):
    return 0 in (a, b) or dialogue.threads[a] == dialogue.threads[b]


def speakers(dialogue, a, b):
    return dialogue.speakers[a] == dialogue.speakers[b]


def test_released_masks_have_their_three_faults(dialogue):
    laid = layout.lay(dialogue, Pieces(3))
    reply, thread, speaker = masks(laid, released=True)
    first = {u: int(np.argmax(laid.utterances == u)) + 1 for u in range(4)}
    inner = {u: place + 1 for u, place in first.items()}
    assert not masks(laid)[0][inner[3], inner[1]] and not masks(laid)[0][inner[2], inner[3]]
    assert reply[inner[2], inner[1]] and reply[inner[3], inner[0]]
    assert not thread[first[1], inner[2]] and thread[inner[1], inner[2]]
    assert not speaker[0].any()  # a mark: nothing is let through, so that all is seen alike


def released_dialogue(tmp_path):
    changes = {"replies": [-1, 0, 0, 2]}
    (found,) = files.read(write(tmp_path, [example(**changes)]))
    return found


def test_released_answers_are_read_from_depths(tmp_path):
    """Utterance 3 answers 2, which begins the second thread; its depth makes it answer 1."""
    laid = layout.lay(released_dialogue(tmp_path), Pieces(3))
    inner = {u: int(np.argmax(laid.utterances == u)) + 2 for u in range(4)}
    assert masks(laid)[0][inner[3], inner[2]]
    wrong = masks(laid, released=True)[0]
    assert wrong[inner[3], inner[1]] and not wrong[inner[3], inner[2]]


def test_turned_products_are_those_of_blocks_of_threads(dialogue):
    """The loop over blocks that the paper has: signs by threads, one rotation matrix a place, in float64."""
    torch.manual_seed(0)
    laid = layout.lay(dialogue, Pieces(2))
    made = {k: torch.from_numpy(v) for k, v in layout.inputs([laid]).items()}
    n, size = laid.length, 6
    query, key = torch.randn(n, size), torch.randn(n, size)
    position, thread = made["token_position"][0], made["thread"][0]
    turn = Turn.of(made["token_position"], size, 100.0)

    def dot(a, b):
        return torch.einsum("bmcd,bncd->bmnc", a, b)

    q, k = query[None, :, None], key[None, :, None]
    before, after = signed(made["thread"])
    found = torch.where(before, dot(turn.reversed()(q), turn(k)), dot(turn(q), turn(k)))
    found = torch.where(after, dot(turn(q), turn.reversed()(k)), found)[0, :, :, 0]
    for i in range(n):
        for j in range(n):
            between = thread[i] > 0 and thread[j] > 0
            a = -1 if between and thread[i] < thread[j] else 1
            b = -1 if between and thread[i] > thread[j] else 1
            wanted = rotation(a * int(position[i]), size) @ query[i].double()
            wanted = wanted @ (rotation(b * int(position[j]), size) @ key[j].double())
            assert float(found[i, j]) == pytest.approx(float(wanted), abs=1e-4)


def rotation(position, size, base=100.0):
    made = torch.zeros(size, size, dtype=torch.float64)
    for i in range(0, size, 2):
        angle = torch.tensor(position * base ** (-i / size), dtype=torch.float64)
        made[i, i] = made[i + 1, i + 1] = angle.cos()
        made[i, i + 1], made[i + 1, i] = -angle.sin(), angle.sin()
    return made


def test_positions_count_on_from_the_first_utterance_in_every_thread(dialogue):
    laid = layout.lay(dialogue, Pieces(1))  # utterances of 6, 5, 4 and 4 pieces with their marks
    made = layout.inputs([laid])
    assert made["token_position"][0].tolist() == [*range(6), *range(6, 15), *range(6, 10)]
    assert made["utterance_position"][0].tolist() == [0] * 6 + [1] * 5 + [2] * 4 + [1] * 4


def tiny(dropout=0.1, **settings):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    encoder = BertModel(config, add_pooling_layer=False)
    return DialogueModel(encoder, Settings(inner=8, **settings), dropout).eval()


def tensors(arrays):
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


@pytest.mark.parametrize("options", [{}, {"views": False}, {"rotary": False}, {"split": False}])
def test_a_batch_gives_what_its_dialogues_give_alone(dialogue, tmp_path, options):
    model = tiny(**options)
    both = [layout.lay(d, Pieces(2)) for d in (dialogue, released_dialogue(tmp_path))]
    both[0] = layout.lay(dialogue, Pieces(1))
    with torch.no_grad():
        together = model(**tensors(layout.inputs(both)))
        for row, each in enumerate(both):
            alone = model(**tensors(layout.inputs([each])))
            n = each.length
            for name, value in alone.items():
                torch.testing.assert_close(
                    together[name][row, :n, :n], value[0], atol=1e-4, rtol=1e-4
                )


def test_the_loss_is_the_weighted_mean_over_cells_that_count(dialogue):
    laid = layout.lay(dialogue, Pieces(2))
    wanted = tags.targets([laid], split=True)
    assert (wanted["entity"] == tags.NOT_COUNTED).sum() > 0
    outputs = {name: torch.zeros(*wanted[name].shape[:3], 4) for name in wanted}
    found = loss(outputs, tensors(wanted), WEIGHTS)
    assert float(found) == pytest.approx(
        2 * np.log(4) + np.log(2)
    )  # of 4, 2 and 4 classes, all alike


def test_a_model_learns_a_dialogue_by_heart(dialogue):
    model, laid = tiny(dropout=0.0), layout.lay(dialogue, Pieces(2))
    feeds = tensors(layout.inputs([laid]))
    wanted = tensors(tags.targets([laid], split=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss(model(**feeds), wanted, WEIGHTS).backward()
        optimizer.step()
    with torch.no_grad():
        outputs = {name: value.numpy() for name, value in model(**feeds).items()}
    assert tags.decode(tags.of_logits(outputs, 0, laid), laid) == dialogue.truth


WEIGHTS = Settings().weights
DIMS = {
    "input_ids": {0: "utterances", 1: "pieces"},
    "attention_mask": {0: "utterances", 1: "pieces"},
    **{name: {0: "batch", 1: "sequence"} for name in layout.PLACES},
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize("released", [False, True])
def test_an_engine_of_any_batch_length_and_count_decodes_the_same(
    dialogue, tmp_path, target, released
):
    model = tiny(released_masks=released)
    first = layout.lay(dialogue, Pieces(2))
    second = layout.lay(released_dialogue(tmp_path), Pieces(3))
    (short,) = files.read(
        write(tmp_path, [{"sentences": ["a b", "c"], "replies": [-1, 0], "speakers": [0, 1]}]),
        labelled=False,
    )
    batches = [[first, second], [second], [layout.lay(short, Pieces(1))]]
    example = tensors(layout.inputs(batches[0], released=released))
    program = effc.trace(model, example, dims=DIMS)
    with engine(program, tmp_path / "engine", target) as run:
        for laid in batches:
            feeds = layout.inputs(laid, released=released)
            with torch.no_grad():
                wanted = {k: v.numpy() for k, v in model(**tensors(feeds)).items()}
            found = run(feeds)
            for row, each in enumerate(laid):
                made = [tags.of_logits(outputs, row, each) for outputs in (wanted, found)]
                assert tags.decode(made[0], each) == tags.decode(made[1], each)
            if not released:
                for name, value in wanted.items():
                    np.testing.assert_allclose(found[name], value, atol=1e-3)
