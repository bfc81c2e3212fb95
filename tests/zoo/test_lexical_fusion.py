"""Lexical fusions: files and what is wrong with them, sememes, tags and links and back, scores by hand, the models."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from effc.errors import CalibrationError, SourceError
from effc.zoo import fusion_baseline as baseline
from effc.zoo import fusion_files as files
from effc.zoo import fusion_layout as layout
from effc.zoo import fusion_scores as scores
from effc.zoo import fusion_tags as tags
from effc.zoo import fusion_view as view
from effc.zoo import sememes
from effc.zoo.fusion_files import Span, Truth
from effc.zoo.fusion_task import Settings
from effc.zoo.lexical_fusion import (
    MASKED,
    SLOPE,
    Attention,
    LexicalFusionModel,
    joined,
    loss,
    with_neighbours,
)
from kit import TableEncoder

# Places:  0 1 2 3 4 5 6 7 8 9 10
TEXT = "先预付，预先又支付预付"
FUSION, FIRST, SECOND, AGAIN = Span(1, 3), Span(4, 6), Span(7, 9), Span(9, 11)
SAMPLE = {
    "id": "lf1", "text": TEXT, "fusion": [1, 3, "预付"], "separations": [[4, 6, "预先"], [7, 9, "支付"]],
    "char_links": [[1, 0], [2, 1]], "extra": {"fusion": [[9, 11]], "A": [], "B": []},
}  # fmt: skip
RIGHT = Truth(
    fusions=frozenset({FUSION, AGAIN}), separations=frozenset({FIRST, SECOND}),
    pairs=frozenset({(FUSION, FIRST), (FUSION, SECOND)}),
    characters=frozenset({(1, FIRST), (2, SECOND)}), again={AGAIN: FUSION},
)  # fmt: skip
TABLE = sememes.Sememes(
    names=("付", "先", "钱"), words={"预先": (2,), "支付": (1, 3), "预付": (1, 2), "又": (3,)}
)


class Characters:
    """A tokenizer of characters; 又 is one that it makes two pieces of, 支 one that it knows by another form."""

    cls_token_id, sep_token_id, pad_token_id, unk_token_id = 1, 2, 0, 3

    def convert_tokens_to_ids(self, tokens):
        return [3 if c in "又支" else 4 + TEXT.index(c) for c in tokens]

    def __call__(self, text, **options):
        return {"input_ids": [[8, 9] if c == "又" else [9] for c in text]}


def written(place, *rows, name="f.jsonl"):
    file = place / name
    made = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows)
    file.write_text("\n".join(made), encoding="utf-8")
    return file


@pytest.fixture
def laid(tmp_path):
    (found,) = files.read(written(tmp_path, SAMPLE))
    return layout.lay(found, Characters(), TABLE)


def test_a_line_is_read_with_its_further_places(tmp_path):
    (found,) = files.read(written(tmp_path, SAMPLE, ""))
    assert found.truth == RIGHT and (found.name, found.line) == ("lf1", 1)
    assert found.truth.tuples == {(FUSION, frozenset({FIRST, SECOND}))}


def test_a_further_place_over_one_that_is_taken_does_not_count(tmp_path):
    row = {**SAMPLE, "extra": {"fusion": [[9, 11], [1, 3]], "A": [], "B": []}}
    assert files.read(written(tmp_path, row))[0].truth.again == {AGAIN: FUSION}


def test_there_may_be_no_fusion_and_nobody_may_know(tmp_path):
    none, unknown = {"text": "甲乙", "fusion": None}, {"text": "甲乙"}
    file = written(tmp_path, none, unknown)
    known, bare = files.read(file, labelled=False)
    assert known.truth == Truth() and bare.truth is None
    with pytest.raises(CalibrationError, match="line 2: it has no `fusion`"):
        files.read(file)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is nested too deep"),
        ("[1]", "it is a list"),
        ({"text": " "}, "has no `text`"),
        ({**SAMPLE, "fusion": [1, 3, "支付"]}, "says '支付', and '预付' stands at"),
        ({**SAMPLE, "fusion": [1, 30, "预付"]}, "outside of the text, which has 11"),
        ({**SAMPLE, "fusion": [1, "3", "预付"]}, "no two offsets"),
        ({**SAMPLE, "fusion": "预付"}, r"fusion is not \[start, end, word\]"),
        ({**SAMPLE, "fusion": None}, "separation words of no fusion word"),
        ({**SAMPLE, "separations": []}, "no list of two words"),
        ({**SAMPLE, "char_links": None}, "no list of `char_links`"),
        ({**SAMPLE, "char_links": [[1, 0], [2, 2]]}, r"char_links\[1\]: unknown label 2"),
        ({**SAMPLE, "char_links": [[1, 0], [4, 1]]}, "4 is no place in the fusion word"),
        ({**SAMPLE, "char_links": [[1, 0]]}, "not one entry for each"),
        ({**SAMPLE, "char_links": [[1, 0], [1, 0], [2, 1]]}, "not one entry for each"),
        ({**SAMPLE, "extra": {"C": []}}, "unknown label 'C'"),
        ({**SAMPLE, "extra": {"A": [3]}}, "extra.A is no list of places"),
        ({**SAMPLE, "extra": {"A": [[0, 2]]}}, r"extra.A\[0\]: another word stands"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, row, words):
    with pytest.raises(CalibrationError, match=rf"f.jsonl line 2.*{words}") as caught:
        files.read(written(tmp_path, SAMPLE, row))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no paragraphs"), (b" \n\n", "no paragraphs"), ("{}\né".encode("latin-1"), "line 2 is not UTF-8"),
     (TEXT.encode("gb18030"), "line 1 is not UTF-8")],
)  # fmt: skip
def test_a_file_that_is_none_is_named(tmp_path, content, words):
    file = tmp_path / "f.jsonl"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=words) as caught:
        files.read(file)
    assert "f.jsonl" in str(caught.value) and caught.value.hint


def test_a_dictionary_is_read_and_carried_as_it_is(tmp_path):
    text = "预先\n先 \n支付\n付 钱 付 \n很长很长的\n先 \n预付\n先 付 "
    found = sememes.of_dictionary(written(tmp_path, text))
    assert found.names == ("付", "先", "钱")  # by how many words have them, then by themselves
    assert found.words == {"预先": (2,), "支付": (1, 3), "预付": (2, 1)}
    assert sememes.of_text(written(tmp_path, found.text())) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("预先\n先\n支付\n ", "line 4: '支付' has no sememes"),
        ("预先\n先\n支付", "line 4: '支付' has no sememes"),
        ("预 先\n先", "line 1: '预 先' is no word"),
        ("很长很长的\n先", "no word of up to 4"),
    ],
)
def test_a_broken_dictionary_is_named_with_its_line(tmp_path, text, words):
    with pytest.raises(SourceError, match=words) as caught:
        sememes.of_dictionary(written(tmp_path, text))
    assert "f.jsonl" in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("row", ["预先\t4", "预先\t0", "预先\tx", "预先"])
def test_a_damaged_table_of_sememes_is_named_with_its_line(tmp_path, row):
    with pytest.raises(SourceError, match="line 2: '预先' has no sememes of those"):
        sememes.of_text(written(tmp_path, f"付 先 钱\n{row}\n"))


def test_sememes_without_a_vector_are_drawn_as_long_as_the_others(tmp_path):
    file = written(tmp_path, "先 0.5 -0.5", "没有 1 1", "付 0.25 0.5", "")
    found, there = sememes.vectors(file, ("付", "先", "钱"), 2)
    assert there == 2 and found.shape == (4, 2) and not found[0].any()
    assert found[1].tolist() == [0.25, 0.5] and found[2].tolist() == [0.5, -0.5]
    assert found[3].any()
    with pytest.raises(SourceError, match="line 1: '先' has no vector of 3 numbers") as caught:
        sememes.vectors(file, ("先",), 3)
    assert caught.value.hint


def test_words_of_two_characters_and_more_are_matched_and_single_ones_where_none_is():
    numbers, incidence = TABLE.match(TEXT)
    assert numbers == (1, 2, 3)
    covered = {1: {1, 2, 7, 8, 9, 10}, 2: {1, 2, 4, 5, 9, 10}, 3: {7, 8}}
    for column, number in enumerate(numbers):
        assert set(np.flatnonzero(incidence[:, column])) == covered[number]
    numbers, incidence = TABLE.match(TEXT, singles=True)
    assert set(np.flatnonzero(incidence[:, numbers.index(3)])) == {6, 7, 8}


def test_more_sememes_than_a_paragraph_may_have_lose_those_of_the_fewest_characters():
    words = {f"{chr(0x4E00 + i)}字": (1 + i,) for i in range(200)}
    many = sememes.Sememes(names=tuple(map(str, range(201))), words=words | {"字字": (201,)})
    numbers, incidence = many.match("".join(sorted(words)) + "字字")
    assert len(numbers) == incidence.shape[1] == sememes.MOST and numbers[0] == 201


def test_shuffled_sememes_are_those_of_other_words():
    words = {f"{chr(0x4E00 + i)}字": (1 + i,) for i in range(200)}
    table = sememes.Sememes(names=tuple(map(str, range(200))), words=words)
    other = table.shuffled(3)
    assert sorted(other.words.values()) == sorted(words.values()) and set(other.words) == set(words)
    assert sum(other.words[w] == words[w] for w in words) < 10
    assert other == table.shuffled(3) != table.shuffled(4)


def test_every_character_is_one_piece(laid):
    assert laid.ids == (
        1,
        4,
        5,
        6,
        7,
        5,
        4,
        3,
        9,
        6,
        5,
        6,
        2,
    )  # 又 is unknown, and 支 what the tokenizer makes of it
    assert laid.length == len(TEXT) + 2


def test_a_paragraph_that_is_too_long_is_named(laid):
    with pytest.raises(CalibrationError, match="paragraph lf1 has 13 characters") as caught:
        layout.lay(laid.paragraph, Characters(), TABLE, longest=12)
    assert caught.value.hint


def test_tags_and_links_of_the_truth_give_it_back(laid):
    made, links = tags.encode(laid)
    assert made.tolist() == [0, 0, 1, 2, 0, 3, 4, 0, 3, 4, 1, 2, 0]
    assert sorted(map(tuple, np.argwhere(links))) == [(2, 5), (3, 8), (10, 5), (11, 8)]
    said = tags.decode(made[1:-1].tolist(), np.where(links, 3.0, -3.0)[1:-1, 1:-1])
    assert said.fusions == RIGHT.fusions and said.separations == RIGHT.separations
    assert said.pairs == RIGHT.pairs | {(AGAIN, FIRST), (AGAIN, SECOND)}
    assert scores.verdict(RIGHT, said) == "right"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([1, 2, 0, 3, 4], {(0, 2): 1, (3, 5): 3}),
        ([2, 2, 4, 4, 0], {(0, 2): 1, (2, 4): 3}),  # further characters behind none of their kind
        ([1, 1, 4, 3, 4], {(0, 1): 1, (1, 2): 1, (2, 3): 3, (3, 5): 3}),
        ([0, 0], {}),
    ],
)
def test_tags_are_words(given, found):
    assert {tuple(span): kind for span, kind in tags.spans(given).items()} == found


def test_a_character_goes_to_the_likeliest_word_above_the_threshold():
    given = [1, 2, 3, 4, 3, 4]
    links = np.full((6, 6), -9.0)
    links[0, 2], links[0, 4], links[1, 4], links[1, 3] = 0.3, 0.2, -0.1, 5.0  # 3 begins no word
    said = tags.decode(given, links)
    assert said.characters == {(0, Span(2, 4))} and said.pairs == {(Span(0, 2), Span(2, 4))}
    assert not said.tuples and not tags.decode(given, links, 0.6).pairs
    assert tags.decode(given, links, 0.4).tuples == {
        (Span(0, 2), frozenset({Span(2, 4), Span(4, 6)}))
    }


def test_what_a_loss_takes_does_not_count_marks_and_padding(laid, tmp_path):
    (short,) = files.read(written(tmp_path, {"text": "甲乙", "fusion": None}))
    bare = layout.Laid(paragraph=short, ids=(1, 3, 3, 2), incidence=np.zeros((2, 0), bool))
    both = tags.targets([laid, bare])
    assert both["tags"][1].tolist() == [-100, 0, 0] + [-100] * 10
    assert (both["links"][1] == 0).sum() == 4 and both["links"][0, 2, 5] == 1
    assert (both["links"][0] == -100).sum() == 13 * 13 - 11 * 11


def test_scores_of_a_case_worked_by_hand():
    """The fusion word is said at its second place, and joined to a right word and to one with a wrong end."""
    wrong = Span(7, 10)
    said = Truth(
        fusions=frozenset({AGAIN}), separations=frozenset({FIRST, wrong}),
        pairs=frozenset({(AGAIN, FIRST), (AGAIN, wrong)}),
        characters=frozenset({(9, FIRST), (10, wrong)}),
    )  # fmt: skip
    found = scores.counts(RIGHT, said)
    assert found["pairs"] == (1, 2, 2) and found["tuples"] == (0, 1, 1)
    assert found["mentions"] == (2, 3, 4)
    assert found["fusions"] == (1, 1, 2) and found["separations"] == (1, 2, 2)
    assert found["characters"] == (1, 2, 2) and found["alarms"] == (0, 0, 0)
    empty = scores.counts(Truth(), said)
    assert empty["alarms"] == (1, 1, 1) and empty["pairs"] == (0, 2, 0)
    quiet = scores.counts(Truth(), Truth(separations=frozenset({FIRST})))
    whole = scores.scores(scores.table([found, empty, quiet, scores.counts(RIGHT, RIGHT)]))
    assert whole["pairs"]["precision"] == pytest.approx(3 / 6)
    assert whole["pairs"]["recall"] == pytest.approx(3 / 4)
    assert whole["pairs"]["f1"] == pytest.approx(2 * 3 / (6 + 4))
    assert whole["alarms"] == {"without": 2, "said": 1, "share": 0.5, "whole": 1, "share_whole": 0.5}  # fmt: skip
    errors = {n: c for n, c in whole["errors"].items() if c}
    assert errors == {"separation border": 1, "false alarm": 1, "quiet": 1, "right": 1}


def test_a_link_at_two_places_of_a_word_counts_once():
    said = Truth(
        fusions=RIGHT.fusions, separations=RIGHT.separations,
        pairs=RIGHT.pairs | {(AGAIN, FIRST), (AGAIN, SECOND)},
        characters=RIGHT.characters | {(9, FIRST), (10, SECOND)},
    )  # fmt: skip
    found = scores.counts(RIGHT, said)
    assert found["pairs"] == found["characters"] == (2, 2, 2) and found["tuples"] == (1, 1, 1)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "right"),
        ({"fusions": {FIRST}}, "fusion missed"),
        ({"fusions": {Span(1, 2)}}, "fusion border"),
        ({"separations": {FIRST}}, "separation missed"),
        ({"separations": {FIRST, Span(7, 8)}}, "separation border"),
        ({"pairs": {(FUSION, FIRST)}}, "link missed"),
        ({"pairs": {*RIGHT.pairs, (FUSION, Span(0, 1))}}, "link too many"),
        ({"separations": {FIRST, SECOND, Span(0, 1)}}, "mention too many"),
    ],
)
def test_every_paragraph_is_in_the_table_of_errors_once(changes, word):
    fields = {n: getattr(RIGHT, n) for n in ("fusions", "separations", "pairs", "characters")}
    said = Truth(**fields | {n: frozenset(v) for n, v in changes.items()})
    assert scores.verdict(RIGHT, said) == word and word in scores.ERRORS
    assert sum(scores.counts(RIGHT, said)["errors"]) == 1


def test_reading_decoding_scoring_and_viewing_need_no_torch():
    code = (
        "import sys; import effc.zoo.fusion_task, effc.zoo.fusion_scores, effc.zoo.fusion_view; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_attention_runs_along_edges_as_loops_say():
    torch.manual_seed(0)
    layer = Attention(6, 2, 3, joined=True).double()
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    edges = torch.eye(4, dtype=torch.bool)
    edges[0, 1] = edges[0, 3] = edges[2, 3] = True
    bias = torch.where(edges, 0.0, MASKED)[None, None]
    with torch.no_grad():
        found = layer(x, bias)[0]
        assert torch.allclose(layer(x, bias, 3)[0], found[:3], atol=1e-12)
        mean = Attention(6, 2, 3, joined=False).double()
        mean.load_state_dict(layer.state_dict())
        averaged = mean(x, bias)[0]
        z = layer.value(x)[0].reshape(4, 2, 3)
        left, right = layer.left.clone(), layer.right.clone()
    sums = []
    for i, k in itertools.product(range(4), range(2)):
        near = [j for j in range(4) if edges[i, j]]
        raw = [float(z[i, k] @ left[k, 0] + z[j, k] @ right[k, 0]) for j in near]
        shares = [math.exp(s if s > 0 else SLOPE * s) for s in raw]
        total = sum(a * z[j, k] for a, j in zip(shares, near, strict=True)) / sum(shares)
        sums.append(total)
        expected = torch.nn.functional.elu(total)
        assert torch.allclose(found[i, 3 * k : 3 * k + 3], expected, atol=1e-12)
    for i in range(4):
        expected = torch.nn.functional.elu((sums[2 * i] + sums[2 * i + 1]) / 2)
        assert torch.allclose(averaged[i], expected, atol=1e-12)
    assert math.exp(MASKED) == 0


def test_edges_join_characters_with_their_sememes_and_sememes_with_themselves():
    incidence = torch.tensor([[[True, False], [False, False], [True, True]]])
    characters = torch.tensor([[[True, False, True], [False, True, False], [True, False, True]]])
    edges = joined(characters, incidence)[0]
    expected = torch.eye(5, dtype=torch.bool)
    for a, b in ((0, 2), (0, 3), (2, 3), (2, 4)):
        expected[a, b] = expected[b, a] = True
    assert torch.equal(edges, expected)


def test_a_place_knows_the_ones_beside_it():
    found = with_neighbours(torch.tensor([[[1.0], [2.0], [3.0]]]))
    assert found[0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 0]]


def test_the_same_character_elsewhere_is_seen_and_scores_links(laid):
    """支 and 付 of the first separation word are there: what is said of a place hangs on a far one of its character."""
    made, feeds = model(), tensors(layout.inputs([laid]))
    feeds["incidence"][:] = False
    with torch.no_grad():
        before = made(**feeds)
        other = {**feeds, "input_ids": feeds["input_ids"].clone()}
        other["input_ids"][0, 11] = 12  # the last 付
        after = made(**other)
        moved = (before["tag_logits"] - after["tag_logits"]).abs().sum(-1)[0] > 1e-6
        made.links.first += 2.0
        scored = made(**feeds)["link_logits"] - before["link_logits"]
    assert moved[3] and moved[9] and not moved[6]  # 付 at two places, and 先
    apart = model(same=False)
    with torch.no_grad():
        other = (apart(**feeds)["tag_logits"] - apart(**other)["tag_logits"]).abs().sum(-1)[0]
    assert (other > 1e-6).nonzero().flatten().tolist() == [
        10,
        11,
        12,
    ]  # the place and those beside it
    assert scored[0, 2, 5] == pytest.approx(2.0, abs=1e-5)  # 预 of the fusion word and of 预先
    assert scored[0, 2, 8] == pytest.approx(0.0, abs=1e-5)


def tensors(feeds):
    return {name: torch.from_numpy(value) for name, value in feeds.items()}


def model(**settings):
    torch.manual_seed(0)
    made = Settings(heads=2, size=4, inner=6, sememe_size=5, **settings)
    return LexicalFusionModel(TableEncoder(), made, torch.randn(4, 5)).eval()


def test_a_paragraph_in_a_padded_batch_is_told_as_by_itself(laid, tmp_path):
    (other,) = files.read(written(tmp_path, {"text": TEXT[4:6], "fusion": None}))
    bare = sememes.Sememes(words={})
    rows = [laid, layout.lay(other, Characters(), TABLE), layout.lay(other, Characters(), bare)]
    made = model()
    with torch.no_grad():
        together = made(**tensors(layout.inputs(rows)))
        for b, row in enumerate(rows):
            alone, n = made(**tensors(layout.inputs([row]))), row.length
            assert torch.allclose(together["tag_logits"][b, :n], alone["tag_logits"][0], atol=1e-5)
            assert torch.allclose(
                together["link_logits"][b, :n, :n], alone["link_logits"][0], atol=1e-5
            )
    assert not torch.allclose(together["tag_logits"][1, :4], together["tag_logits"][2, :4])


def test_a_paragraph_without_sememes_has_inputs_all_the_same(laid):
    feeds = layout.inputs([layout.lay(laid.paragraph, Characters(), sememes.Sememes(words={}))])
    assert feeds["sememe_ids"].tolist() == [[0]] and feeds["incidence"].shape == (1, 13, 1)
    assert not feeds["incidence"].any()


def test_the_loss_is_that_of_loops():
    torch.manual_seed(0)
    outputs = {"tag_logits": torch.randn(2, 3, 5), "link_logits": torch.randn(2, 3, 3)}
    wanted = {"tags": torch.tensor([[1, 4, -100], [0, 2, 3]]), "links": torch.zeros(2, 3, 3).long()}
    wanted["links"][0, 0, 1] = wanted["links"][1, 2, 0] = 1
    wanted["links"][0, 2] = wanted["links"][0, :, 2] = -100
    settings = Settings(link_weight=0.5, positive_weight=7.0)
    rows = outputs["tag_logits"].double().log_softmax(-1)
    tag = -sum(rows[b, i, t] for b, i, t in ((0, 0, 1), (0, 1, 4), (1, 0, 0), (1, 1, 2), (1, 2, 3))) / 5  # fmt: skip
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for b, i, j in itertools.product(range(2), range(3), range(3)):
        mark = int(wanted["links"][b, i, j])
        if mark < 0:
            continue
        p = 1 / (1 + math.exp(-float(outputs["link_logits"][b, i, j])))
        of = (b, i) in ((0, 0), (1, 2))
        weight = 7.0 if mark else 1.0
        sums[of][0] -= weight * math.log(p if mark else 1 - p)
        sums[of][1] += weight
    expected = float(tag) + 0.5 * sum(a / n for a, n in sums.values())
    assert float(loss(outputs, wanted, settings)) == pytest.approx(expected, rel=1e-5)
    nothing = {"tags": torch.zeros(2, 3).long(), "links": torch.full((2, 3, 3), -100)}
    assert math.isfinite(float(loss(outputs, nothing, settings)))


def test_the_best_path_and_the_likelihood_are_those_of_all_sequences():
    torch.manual_seed(0)
    tagger = baseline.Tagger(torch.randn(9, 4), size=3).eval()
    with torch.no_grad():
        for p in (tagger.moves, tagger.first, tagger.last):
            p.normal_()
    emissions = torch.randn(2, 6, 5)
    wanted = torch.tensor([[-100, 1, 2, 0, 3, -100], [-100, 4, 0, -100, -100, -100]])

    ends = [p.detach() for p in (tagger.moves, tagger.first, tagger.last)]

    def total(b, path):
        value = ends[1][path[0]] + ends[2][path[-1]]
        value = value + sum(emissions[b, 1 + i, t] for i, t in enumerate(path))
        return float(value + sum(ends[0][s, t] for s, t in itertools.pairwise(path)))

    off = 0.0
    for b, path in ((0, (1, 2, 0, 3)), (1, (4, 0))):
        every = {p: total(b, p) for p in itertools.product(range(5), repeat=len(path))}
        off += math.log(sum(map(math.exp, every.values()))) - every[path]
        best = tags.best_path(
            emissions[b, 1 : 1 + len(path)].numpy(),
            *(p.numpy() for p in ends),
        )
        assert tuple(best) == max(every, key=every.get)
    assert float(tagger.loss(emissions, wanted)) == pytest.approx(off / 6, rel=1e-5)


def test_emissions_of_a_padded_paragraph_are_its_own():
    torch.manual_seed(0)
    tagger = baseline.Tagger(torch.randn(9, 4), size=3).eval()
    ids, mask = torch.tensor([[1, 5, 6, 7, 2], [1, 4, 2, 0, 0]]), torch.ones(2, 5).long()
    mask[1, 3:] = 0
    with torch.no_grad():
        both = tagger(ids, mask)
        assert torch.allclose(both[1, :3], tagger(ids[1:, :3], mask[1:, :3])[0], atol=1e-6)


def test_the_rule_joins_by_characters_then_by_exclusion():
    found = baseline.by_rule("撤军，撤出部队", {Span(0, 2): 1, Span(3, 5): 3, Span(5, 7): 3})
    assert found.characters == {(0, Span(3, 5)), (1, Span(5, 7))}
    assert found.tuples == {(Span(0, 2), frozenset({Span(3, 5), Span(5, 7)}))}
    assert not baseline.by_rule("撤军", {Span(0, 2): 1}).pairs


def test_a_second_step_asks_about_words_that_were_found(laid):
    torch.manual_seed(0)
    scorer = baseline.PairScorer(TableEncoder()).eval()
    ends, wanted = baseline.questions([laid], np.random.default_rng(0))
    assert ends[0, :2].tolist() == [[5, 6], [8, 9]]
    assert wanted[0, 2, :2].tolist() == [1, 0] and wanted[0, 3, :2].tolist() == [0, 1]
    assert (wanted[0, [0, 1, 4, 5]] == -100).all()
    assert (wanted[0, 2, 2:] == 0).all()
    feeds = tensors(layout.inputs([laid]))
    feeds = {name: feeds[name] for name in ("input_ids", "attention_mask")}
    optimizer = torch.optim.Adam(scorer.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        baseline.pair_loss(scorer(**feeds, ends=ends), wanted).backward()
        optimizer.step()
    said = scorer.said(feeds, RIGHT.alone)
    assert said.characters >= RIGHT.characters and said.fusions == RIGHT.fusions
    assert scorer.said(feeds, Truth(fusions=RIGHT.fusions)).pairs == frozenset()


def test_words_of_strangers_run_nowhere():
    paragraph = files.Paragraph(name='"><b>', text="<script>\x1b[31m预付")
    said = Truth(
        fusions=frozenset({Span(13, 15)}), separations=frozenset({Span(0, 8)}),
        pairs=frozenset({(Span(13, 15), Span(0, 8))}), characters=frozenset({(13, Span(0, 8))}),
    )  # fmt: skip
    answer = view.answer(paragraph, said)
    assert answer["fusions"][0]["separations"][0]["characters"] == [13]
    page = view.page([answer])
    assert "<script" not in page and "<b>" not in page and "\x1b" not in page and "http" not in page
    assert page.count('href="#f0-1"') == 2 and 'id="m0-1-0"' in page and 'id="m0-1-1"' in page
    assert "\x1b" not in "".join(view.lines(answer, in_colour=False))
    assert "\x1b[35m预付" in view.lines(answer, in_colour=True)[1]
    assert view.lines(view.answer(paragraph, Truth()), in_colour=False)[-1] == "    no fusion"
