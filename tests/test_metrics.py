"""Task metrics: what each file may be, what each value is, and what is said where one cannot be had."""

import csv
import dataclasses
import gzip
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest, spearmanr

from effc import metrics, report, stats
from effc.backends.base import Port
from effc.calib import data
from effc.errors import CalibrationError, RecipeError, SourceError
from effc.metrics import Samples, compare, entities, parse
from effc.processor import Processor
from kit import save_tokenizer

DATA = Path(os.environ.get("EFFC_DATA", Path(__file__).parents[2] / "shared" / "data"))
TEXT_INPUTS = ("input_ids", "attention_mask")
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


class Stub:
    """An engine that answers with what `answer` makes of its feeds, and remembers them."""

    def __init__(self, answer, inputs=()):
        self.answer, self.inputs, self.fed = answer, inputs, []

    def __call__(self, feeds):
        self.fed.append(feeds)
        return self.answer(feeds)


def source(processor=None, inputs=TEXT_INPUTS, outputs=None):
    return SimpleNamespace(
        processor=processor,
        inputs={"main": dict.fromkeys(inputs)},
        outputs={"main": outputs} if outputs else {},
    )


@pytest.fixture
def tokens(tmp_path):
    """A processor with a tokenizer, by the settings and inputs of a model."""
    place = tmp_path / "model"
    place.mkdir()
    save_tokenizer(place)

    def make(inputs=TEXT_INPUTS, **config):
        return Processor(place, config, inputs)

    return make


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def of(name: str, file: Path) -> metrics.Metric:
    return parse(f"{name}:{file}")


def bag(feeds):
    """Token vectors that are the one-hot of their id: a sentence is its bag of words."""
    return {"last_hidden_state": np.eye(64, dtype=np.float32)[feeds["input_ids"]]}


# Names


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sts", metrics.SpearmanCosine),
        ("accuracy", metrics.Accuracy),
        ("f1", metrics.F1),
        ("entity_f1", metrics.EntityF1),
        ("perplexity", metrics.Perplexity),
        ("recall@1", metrics.Recall),
        ("recall@25", metrics.Recall),
    ],
)
def test_a_metric_is_named_before_its_file(write, name, kind):
    file = write("a:b.csv", "x")
    made = of(name, file)
    assert isinstance(made, kind)
    assert made.file == file
    assert made.name == {"sts": "spearman_cosine"}.get(name, name)


@pytest.mark.parametrize(
    ("word", "error", "match"),
    [
        ("acuracy:a.csv", RecipeError, "did you mean 'accuracy'"),
        ("recall@k:a.csv", RecipeError, "did you mean 'recall@1'"),
        ("recall@0:a.csv", RecipeError, "unknown metric 'recall@0'"),
        ("accuracy:no.csv", CalibrationError, r"accuracy: there is no file no\.csv"),
        ("accuracy", CalibrationError, "none given"),
        ("no_such.py:score:a.csv", SourceError, r"no file no_such\.py"),
    ],
)
def test_a_name_or_file_that_is_not_there_is_refused(word, error, match):
    with pytest.raises(error, match=match):
        parse(word)


# The user's own


OWN = """
import numpy as np
def score(run, processor, file):
    return {"score": run({"x": np.arange(4.0)})["y"] * float(file.read_text()), "other": np.zeros(4)}
def nothing(run, processor, file): return None
def misnamed(run, processor, file): return {"scores": [1.0]}
def uneven(run, processor, file): return {"score": [1.0, 2.0], "other": [1.0]}
def ragged(run, processor, file): return {"score": [[1.0], [1.0, 2.0]]}
def flat(run, processor, file): return {"score": 1.0}
def empty(run, processor, file): return {"score": []}
def unknown(run, processor, file): return {"score": [1.0, float("nan")]}
def words(run, processor, file): return {"score": ["a"]}
def broken(run, processor, file): raise KeyError("gone")
"""


def test_a_users_function_is_a_metric(write):
    code, file = write("my.py", OWN), write("factor.txt", "2")
    metric = parse(f"{code}:score:{file}")
    assert metric.name == "my.py:score"
    metric.check(source())
    model = metric.measure(Stub(lambda feeds: {"y": feeds["x"]}), None)
    engine = metric.measure(Stub(lambda feeds: {"y": feeds["x"] - 1}), None)
    found = compare(metric, model, engine)
    assert (found.reference, found.engine, found.low, found.high) == (3, 1, -2, -2)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        ("nothing", "returned a NoneType"),
        ("misnamed", r"a mapping of \['scores'\], not a mapping with an array `score`"),
        ("uneven", "not one number a sample"),
        ("ragged", "failed: ValueError"),
        ("flat", "not one number a sample"),
        ("empty", "not one number a sample"),
        ("unknown", "scores that are not numbers"),
        ("words", "scores that are not numbers"),
        ("broken", "failed: KeyError"),
    ],
)
def test_what_is_no_score_a_sample_is_refused(write, function, match):
    code, file = write("my_bad.py", OWN), write("factor.txt", "2")
    with pytest.raises(CalibrationError, match=match):
        parse(f"{code}:{function}:{file}").measure(Stub(dict), None)


def test_an_unknown_function_is_answered_with_the_nearest(write):
    code, file = write("mine.py", OWN), write("factor.txt", "2")
    with pytest.raises(RecipeError, match="did you mean 'score'"):
        parse(f"{code}:scor:{file}")


# Sentences


PAIRS = "the cat,the cat,5\nthe cat sat,a dog,1\nthe cat sat,the cat ran,3\na dog,a dog ran under the tree,2\n"


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_sts_ranks_cosines(tokens, write, name):
    content = PAIRS.encode()
    file = write(name, gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    metric, processor = of("sts", file), tokens()
    metric.check(source(processor))
    samples = metric.measure(Stub(bag), processor)
    cosine, gold = samples.columns["cosine"], samples.columns["gold"]
    assert cosine[0] == pytest.approx(1)
    assert metric.value(samples) == pytest.approx(spearmanr(cosine, gold).statistic)


def test_padding_is_left_out_where_the_model_takes_no_mask(tokens):
    texts = ["the cat", "the cat sat on the mat and sang"]
    with_mask = metrics.embed(Stub(bag), tokens(), texts)
    without = Stub(bag)
    np.testing.assert_array_equal(metrics.embed(without, tokens(["input_ids"]), texts), with_mask)
    assert list(without.fed[0]) == ["input_ids"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a,b\n", "line 1 is not sentence1,sentence2,score"),
        ("sentence1,sentence2,score\na,b,1\n", "line 1 is not sentence1,sentence2,score"),
        ("a,b,1\n\nc,d,good\n", "line 3 is not sentence1,sentence2,score"),
        ("a,b,nan\n", "line 1 is not sentence1,sentence2,score"),
        (b"caf\xe9,b,1\n", "line 1 is not UTF-8"),
        ('"a" x,b,1\n', "line 1 is no table row"),
        ("", "holds no samples"),
    ],
)
def test_an_sts_file_at_fault_is_named_before_the_work(tokens, write, content, match):
    with pytest.raises(CalibrationError, match=match):
        of("sts", write("a.csv", content)).check(source(tokens()))


@pytest.mark.parametrize("name", ["sts", "recall@1", "accuracy", "entity_f1", "perplexity"])
@pytest.mark.parametrize(
    "content",
    [b"not zipped", gzip.compress(b"a,b,1\n" * 99)[:-9], gzip.compress(b"\xff")],
    ids=["not zipped", "cut short", "not UTF-8"],
)
def test_a_damaged_file_is_named(tokens, write, name, content):
    file = write("a.csv.gz", content)
    kind = "LlamaForCausalLM" if name == "perplexity" else "BertModel"
    processor = tokens(architectures=[kind], id2label=dict(enumerate(TAGS)))
    with pytest.raises(CalibrationError, match=r"a\.csv\.gz"):
        of(name, file).check(source(processor))


@pytest.mark.parametrize("name", ["sts", "recall@1", "entity_f1"])
def test_a_folder_is_no_file(tokens, tmp_path, name):
    with pytest.raises(CalibrationError, match="is not a plain file"):
        parse(f"{name}:{tmp_path}").check(source(tokens(id2label=dict(enumerate(TAGS)))))


def test_an_engine_without_token_vectors_is_refused(tokens, write):
    metric, processor = of("sts", write("a.csv", PAIRS)), tokens()
    with pytest.raises(CalibrationError, match="pools token vectors, the model gives logits"):
        metric.check(source(processor, outputs=("logits",)))
    with pytest.raises(CalibrationError, match=r"no output .batch, length, hidden. to pool"):
        metric.measure(Stub(lambda f: {"logits": np.zeros((*f["input_ids"].shape, 9))}), processor)


def test_vectors_that_say_nothing_are_refused(tokens, write):
    metric = of("sts", write("a.csv", PAIRS))
    zeros = Stub(lambda feeds: {"last_hidden_state": np.zeros((*feeds["input_ids"].shape, 4))})
    with pytest.raises(CalibrationError, match="zero or not numbers"):
        metric.measure(zeros, tokens())


def test_recall_counts_the_k_nearest(tokens, write):
    rows = ["the cat,the cat sat", "a dog,a dog ran", "the bird,old house", "old mat,the old bird"]
    file, processor = write("a.csv", "\n".join(rows)), tokens()
    hits = []
    for k in (1, 2, 4):
        metric = of(f"recall@{k}", file)
        metric.check(source(processor))
        samples = metric.measure(Stub(bag), processor)
        hits.append(metric.value(samples))
    assert hits == [0.5, 0.75, 1.0]


def test_an_engine_that_answers_all_alike_recalls_nothing(tokens, write):
    metric = of("recall@1", write("a.csv", "the cat,a dog\n" * 3))
    alike = Stub(lambda feeds: {"last_hidden_state": np.ones((*feeds["input_ids"].shape, 4))})
    assert metric.value(metric.measure(alike, tokens())) == 0


def test_a_row_of_recall_is_a_pair(tokens, write):
    with pytest.raises(CalibrationError, match="line 2 has 3 columns, not text_a,text_b"):
        of("recall@1", write("a.csv", "a,b\nc,d,e\n")).check(source(tokens()))


# Labels


def by_first_word(feeds):
    """Class 1 where the first word is `the` (id 5)."""
    says = (feeds["input_ids"][:, 1] == 5).astype(float)
    return {"logits": np.stack([1 - says, says], axis=1)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "the cat\t1\na dog\t1\n"),
        ("a.tsv", "sentence\tlabel\nthe cat\t1\na dog\t1\n"),
        ("a.tsv", "label\tsentence\n1\tthe cat\n1\ta dog\n"),
        ("a.csv", "the cat,1\na dog,1\n"),
        ("a.csv", "text,label\nthe cat,1\na dog,1\n"),
        ("a.csv", 'label,text\n1,"the cat, sat"\n1,a dog\n'),
    ],
)
def test_a_table_of_labels_may_have_a_header(tokens, write, name, content):
    metric, processor = of("accuracy", write(name, content)), tokens()
    metric.check(source(processor))
    samples = metric.measure(Stub(by_first_word), processor)
    assert samples.columns["correct"].tolist() == [1, 0]
    assert metric.value(samples) == 0.5


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.tsv", "the cat\n", "line 1 has 1 columns, not 2"),
        ("a.tsv", "sentence\tgold\nthe cat\t1\n", "line 1: the label is not a whole number"),
        ("a.csv", "text,gold\nthe cat,1\n", "samples without a label"),
        ("a.txt", "the cat\n", "samples without a label"),
    ],
)
def test_a_file_without_labels_is_refused(tokens, write, name, content, match):
    with pytest.raises(CalibrationError, match=match):
        of("accuracy", write(name, content)).check(source(tokens()))


def test_labels_that_the_model_does_not_know_are_refused(tokens, write):
    metric = of("accuracy", write("a.tsv", "the cat\t1\na dog\t2\n"))
    with pytest.raises(CalibrationError, match="labels from 1 to 2, the model knows 0 to 1"):
        metric.measure(Stub(by_first_word), tokens())


def test_logits_for_every_token_are_no_label(tokens, write):
    metric = of("f1", write("a.tsv", "the cat\t1\n"))
    with pytest.raises(CalibrationError, match=r"needs logits .batch, classes., .* \[1, 4, 64\]"):
        metric.measure(Stub(bag), tokens())


X = Port(name="x", dtype="float32", shape=("batch", 2))


def ready(place: Path, **arrays) -> Path:
    np.savez(place / "a.npz", **arrays)
    return place / "a.npz"


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_a_model_without_a_processor_is_measured_on_ready_arrays(tmp_path, name):
    x = np.array([[1, 0], [0, 1], [2, 1]], np.float64)
    metric = of(name, ready(tmp_path, x=x, label=[0, 1, 0], unused=x))
    metric.check(source(inputs=["x"]))
    run = Stub(lambda feeds: {"y": feeds["x"]}, [X])
    assert metric.value(metric.measure(run, None)) == 1
    assert run.fed[0]["x"].dtype == np.float32 and list(run.fed[0]) == ["x"]


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    x = np.zeros((3, 2))
    metric = of("accuracy", ready(tmp_path, z=x, label=[0, 1, 0]))
    with pytest.raises(CalibrationError, match="no array 'x' that the model takes") as caught:
        metric.check(source(inputs=["x"]))
    assert "it has z" in str(caught.value)
    takes = r"the model takes float32 \[batch, 2\]"
    for wrong, match in ((np.zeros((3, 5)), takes), (x.astype(complex), "holds complex128")):
        metric = of("accuracy", ready(tmp_path, x=wrong, label=[0, 1, 0]))
        with pytest.raises(CalibrationError, match=match):
            metric.measure(Stub(dict, [X]), None)


@pytest.mark.parametrize("name", ["accuracy", "sts", "entity_f1", "perplexity", "recall@1"])
def test_text_is_refused_early_where_nothing_reads_it(write, name):
    metric = of(name, write("a.tsv", "the cat\t1\n"))
    with pytest.raises(CalibrationError, match=f"metric {name.replace('sts', 'spearman_cosine')}"):
        metric.check(source(inputs=["x"]))


def test_text_is_refused_early_by_a_model_of_pictures(tokens, write):
    metric = of("accuracy", write("a.tsv", "the cat\t1\n"))
    with pytest.raises(CalibrationError, match="reads text, the model takes pixel_values"):
        metric.check(source(tokens(), inputs=["pixel_values"]))


def test_pictures_of_several_sizes_are_classified(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, mode, shape in (("0", "L", (9, 7)), ("1", "RGB", (5, 8, 3))):
        (tmp_path / "p" / name).mkdir(parents=True)
        bright = np.full(shape, 255 * int(name), np.uint8)
        image.fromarray(bright).save(tmp_path / "p" / name / f"{mode}.png")
    metric = parse(f"accuracy:{tmp_path / 'p'}")
    processor = Processor(tmp_path, {"image_size": 4}, ["pixel_values"])
    metric.check(source(processor, inputs=["pixel_values"]))

    def bright(feeds):
        mean = feeds["pixel_values"].mean(axis=(1, 2, 3))
        return {"logits": np.stack([-mean, mean], axis=1)}

    assert metric.value(metric.measure(Stub(bright), processor)) == 1


# Entities


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("I-PER I-PER", {("PER", 0, 1)}),
        ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),
        ("B-PER E-PER S-PER", {("PER", 0, 1), ("PER", 2, 2)}),
        ("E-PER E-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("S-PER I-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("B-a-b I-a-b", {("a-b", 0, 1)}),
        ("O O", set()),
    ],
)
def test_entities_are_found_as_seqeval_finds_them(tags, expected):
    assert entities(tags.split()) == expected


def conlleval(tags):
    """Entities by the rules of the CoNLL script, which seqeval's default mode follows, one condition at a time."""
    found, first, before, kind_before = set(), 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        mark, kind = tag[0], tag[2:]
        ends = (
            before in ("E", "S")
            or (before == "B" and mark in ("B", "S", "O"))
            or (before == "I" and mark in ("B", "S", "O"))
            or (before != "O" and kind_before != kind)
        )
        starts = (
            mark in ("B", "S")
            or (before == "E" and mark in ("E", "I"))
            or (before == "S" and mark in ("E", "I"))
            or (before == "O" and mark in ("E", "I"))
            or (mark != "O" and kind_before != kind)
        )
        if ends:
            found.add((kind_before, first, place - 1))
        if starts:
            first = place
        before, kind_before = mark, kind
    return found


def test_entities_of_random_tags_are_those_of_the_conll_script():
    rng = np.random.default_rng(0)
    marks = ["O", *(f"{m}-{t}" for m in "BIES" for t in ("PER", "LOC", "A-B"))]
    for _ in range(500):
        tags = [marks[i] for i in rng.integers(0, len(marks), rng.integers(1, 12))]
        assert entities(tags) == conlleval(tags), tags


CONLL = """-DOCSTART- -X- -X- O

the\tB-PER
cat\tI-PER
sat\tO

dog NN B-LOC
ran VB O
"""


def says(**tags):
    """A token classifier that gives every word of a dictionary its tag, and O to the rest."""
    from kit import WORDS

    ids = {WORDS.index(word) + 5: TAGS.index(tag) for word, tag in tags.items()}
    table = np.array([ids.get(i, 0) for i in range(64)])
    return Stub(lambda feeds: {"logits": np.eye(len(TAGS))[table[feeds["input_ids"]]]})


def test_entities_count_over_all_sentences(tokens, write):
    metric = of("entity_f1", write("a.conll", CONLL))
    processor = tokens(id2label={str(i): tag for i, tag in enumerate(TAGS)})
    metric.check(source(processor))
    right = metric.measure(says(the="B-PER", cat="I-PER", dog="B-LOC"), processor)
    assert metric.value(right) == 1
    partly = metric.measure(says(the="B-PER", dog="B-LOC", ran="I-LOC"), processor)
    assert {n: c.tolist() for n, c in partly.columns.items()} == {
        "tp": [0, 0], "pred": [1, 1], "gold": [1, 1],
    }  # fmt: skip
    missed = metric.measure(says(the="B-PER", cat="I-PER"), processor)
    assert metric.value(missed) == pytest.approx(2 / 3)
    assert metric.value(metric.measure(says(), processor)) == 0


def test_words_behind_the_models_length_are_outside(tokens, write):
    metric = of("entity_f1", write("a.conll", "the O\ncat O\nsat O\ndog B-LOC\n"))
    processor = tokens(id2label=dict(enumerate(TAGS)), max_position_embeddings=5)
    samples = metric.measure(says(dog="B-LOC"), processor)
    assert [samples.columns[n].tolist() for n in ("pred", "gold")] == [[0], [1]]


@pytest.mark.parametrize(
    ("content", "labels", "match"),
    [
        ("the\n", TAGS, "line 1 is not a token and its tag"),
        ("the O\ncat X-PER\n", TAGS, "line 2 is not a token and its tag"),
        ("the B-ORG\n", TAGS, "line 1: the model predicts no B-ORG"),
        ("the O\n", ["LABEL_0"], "id2label of config.json has 'LABEL_0'"),
        ("the O\n", [], "config.json has no id2label"),
        ("\n\n", TAGS, "holds no samples"),
    ],
)
def test_tags_that_do_not_fit_are_refused_early(tokens, write, content, labels, match):
    metric = of("entity_f1", write("a.conll", content))
    with pytest.raises(CalibrationError, match=match):
        metric.check(source(tokens(id2label=dict(enumerate(labels)))))


# Perplexity


def test_perplexity_of_an_engine_that_knows_nothing_is_its_vocabulary(tokens, write):
    metric = of("perplexity", write("a.txt", "the cat sat on the mat\n" * 9))
    processor = tokens(architectures=["LlamaForCausalLM"], max_position_embeddings=16)
    metric.check(source(processor))
    even = Stub(lambda feeds: {"logits": np.zeros((*feeds["input_ids"].shape, 40))})
    assert metric.value(metric.measure(even, processor)) == pytest.approx(40)


def test_perplexity_is_refused_where_no_next_token_is_predicted(tokens, write):
    metric = of("perplexity", write("a.txt", "the cat sat"))
    with pytest.raises(CalibrationError, match=r"config\.json names a classifier"):
        metric.check(source(tokens(architectures=["BertForSequenceClassification"])))
    with pytest.raises(CalibrationError, match=r"needs an output `logits`.* the engine has last"):
        metric.measure(Stub(bag), tokens(architectures=["LlamaForCausalLM"]))


WIKI = " \n = The cat = \n \n the cat sat \n = = Birds = = \n a bird sang \n = The dog = \n a dog ran \n"


@pytest.mark.parametrize(
    ("text", "firsts"),
    [
        ("the cat sat\n\na dog ran\n", ["the cat sat"]),
        ("the cat sat\n<|endoftext|>\na dog ran\n<|endoftext|>\n", ["the cat sat", "a dog ran"]),
        (WIKI, ["= The cat =", "= The dog ="]),
        ("= The cat =\nsat\n= The dog =\nran\n", ["= The cat =", "= The dog ="]),
        (f"{WIKI}<|endoftext|>{WIKI}", ["= The cat =", "= The cat ="]),
        ("x = y = z\n==== \n = = a = =\n", ["x = y = z"]),
        ("", [""]),
    ],
)
def test_documents_are_told_by_marks_or_by_headings(text, firsts):
    found = metrics.documents(text)
    assert [document.strip().split("\n")[0].strip() for document in found] == firsts
    assert "".join(found) == text.replace(metrics.MARK, "")


def uneven(feeds):
    """Logits that favour the even: sure of some tokens, and not of others."""
    logits = np.zeros((*feeds["input_ids"].shape, 40))
    logits[..., ::2] = 1
    return {"logits": logits}


def test_losses_are_summed_by_document_wherever_windows_end(tokens, write):
    stories = ["the cat sat on the mat", "a dog ran under the tree and sang", "old bird"] * 3
    metric = of("perplexity", write("a.txt", "\n<|endoftext|>\n".join(stories)))
    processor = tokens(architectures=["LlamaForCausalLM"], max_position_embeddings=5)
    found = metric.measure(Stub(uneven), processor)
    assert found.unit == "document" and len(found) == 9
    windows, ids = 0, []
    for window, owners in metric.windows(processor):
        windows += 1
        ids += list(zip(window[1:], owners[1:], strict=True))
    for number in range(9):
        mine = [token for token, owner in ids if owner == number]
        losses = [math.log(20 * math.e + 20) - (token % 2 == 0) for token in mine]
        assert found.columns["loss"][number] == pytest.approx(sum(losses))
        assert found.columns["tokens"][number] == len(mine)
    assert len(ids) == sum(len(story.split()) for story in stories) - windows  # no start token
    whole = metric.value(found)
    assert whole == pytest.approx(math.exp(found.columns["loss"].sum() / len(ids)))


def test_of_one_document_windows_are_drawn_and_it_is_said(tokens, write):
    metric = of("perplexity", write("a.txt", "the cat sat on the mat\n" * 9))
    processor = tokens(architectures=["LlamaForCausalLM"], max_position_embeddings=16)
    found = metric.measure(Stub(uneven), processor)
    assert (found.unit, len(found)) == ("window", 4)
    result = dataclasses.asdict(compare(metric, found, found))
    assert result["are_few"] and result["verdict"] == "not distinguishable"
    assert "n = 50 tokens in 4 windows of one document" in report.metric_line(result)


def test_of_one_window_there_is_no_interval(tokens, write):
    metric = of("perplexity", write("a.txt", "the cat sat on the mat"))
    found = metric.measure(Stub(uneven), tokens(architectures=["LlamaForCausalLM"]))
    line = report.metric_line(dataclasses.asdict(compare(metric, found, found)))
    assert ", without an interval (95 %, n = 5 tokens in 1 window of one document)" in line


def test_an_interval_over_documents_knows_that_their_tokens_hang_together(tmp_path):
    """Every document has a difference of its own: many tokens of few documents are few samples."""
    rng = np.random.default_rng(0)
    of_each = rng.normal(0, 0.1, 8)
    tokens = np.full(8, 1000.0)
    model = Samples({"loss": 2 * tokens, "tokens": tokens}, "document")
    engine = Samples({"loss": (2 + of_each) * tokens, "tokens": tokens}, "document")
    found = compare(metrics.Perplexity(file=tmp_path), model, engine)
    as_if_free = compare(
        metrics.Perplexity(file=tmp_path),
        *(
            Samples({name: np.repeat(column / 100, 100) for name, column in each.columns.items()})
            for each in (model, engine)
        ),
    )
    assert found.high - found.low > 5 * (as_if_free.high - as_if_free.low)
    assert (found.n, found.drawn, found.unit) == (8000, 8, "document")


# Intervals


def slow_macro_f1(predicted, gold, classes):
    scores = []
    for label in classes:
        total = (predicted == label).sum() + (gold == label).sum()
        hits = ((predicted == label) & (gold == label)).sum()
        scores.append(2 * hits / total if total else 0.0)
    return float(np.mean(scores))


def test_a_draw_is_valued_as_if_it_were_a_file(tmp_path):
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 11, 300) / 2
    pairs = Samples({"cosine": (gold + rng.normal(size=300)).round(1), "gold": gold})
    labels = Samples({"predicted": rng.integers(0, 6, 300), "gold": 2 * rng.integers(0, 4, 300)})
    classes = [0, 1, 2, 3, 4, 5, 6]
    for _ in range(20):
        index = rng.integers(0, 300, 300)
        assert metrics.SpearmanCosine(file=tmp_path).value(pairs, index) == pytest.approx(
            spearmanr(pairs.columns["cosine"][index], gold[index]).statistic, abs=1e-12
        )
        assert metrics.F1(file=tmp_path).value(labels, index) == pytest.approx(
            slow_macro_f1(*(labels.columns[n][index] for n in ("predicted", "gold")), classes)
        )


def shares(tmp_path, model, engine):
    columns = [Samples({"correct": np.asarray(column, float)}) for column in (model, engine)]
    return compare(metrics.Accuracy(file=tmp_path), *columns)


def test_the_interval_is_a_paired_bootstrap(tmp_path):
    rng = np.random.default_rng(2)
    gold = rng.normal(size=200)
    metric = metrics.SpearmanCosine(file=tmp_path)
    both = [Samples({"cosine": gold + rng.normal(size=200), "gold": gold}) for _ in range(2)]
    found = compare(metric, *both)
    draws = np.random.default_rng(0)
    gaps = []
    for _ in range(2000):
        index = draws.integers(0, 200, 200)
        gaps.append(metric.value(both[1], index) - metric.value(both[0], index))
    wanted = stats.percentiles(np.array(gaps), 200)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert (found.n, found.level) == (200, 0.95)


def test_right_and_wrong_have_the_interval_of_paired_shares(tmp_path):
    rng = np.random.default_rng(2)
    model = rng.integers(0, 2, 200).astype(float)
    engine = np.where(rng.random(200) < 0.1, 1 - model, model)
    found = shares(tmp_path, model, engine)
    wanted = stats.paired_shares(model > 0, engine > 0)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def labelled(n, changed):
    """A classifier of n samples, and one that takes the first `changed` for another class."""
    gold = np.arange(n) % 4
    other = gold.copy()
    other[:changed] += 1
    return [Samples({"predicted": predicted, "gold": gold}) for predicted in (gold, other)]


@pytest.mark.parametrize(("n", "changed"), [(5, 0), (100, 0), (10_000, 3)])
def test_labels_that_hardly_differ_may_differ_in_others(tmp_path, n, changed):
    found = compare(metrics.F1(file=tmp_path), *labelled(n, changed))
    most = stats.wilson(changed, n).high
    assert found.high >= most >= 3 / (n + 4)
    assert found.drop_high >= most
    assert found.are_few == (n < 6)


def test_labels_that_often_differ_have_the_interval_of_the_bootstrap(tmp_path):
    found = compare(metrics.F1(file=tmp_path), *labelled(400, 100))
    assert found.high < 0 < found.drop_low


def test_right_and_wrong_have_an_interval_each_and_an_exact_test(tmp_path):
    model, engine = [1] * 80 + [0] * 20, [1] * 70 + [0] * 25 + [1] * 5
    found = shares(tmp_path, model, engine)
    assert found.mcnemar == {
        "only_reference": 10,
        "only_engine": 5,
        "p": pytest.approx(binomtest(5, 15).pvalue),
    }
    for side, hits in (("reference", 80), ("engine", 75)):
        wanted = binomtest(hits, 100).proportion_ci(0.95, method="wilson")
        assert found.wilson[side] == pytest.approx([wanted.low, wanted.high])


def test_scores_that_are_not_right_or_wrong_have_neither(write):
    code, file = write("my.py", OWN), write("factor.txt", "1")
    metric = parse(f"{code}:score:{file}")
    right, scores = Samples({"score": np.array([1.0, 0.0])}), Samples({"score": np.array([1, 0.5])})
    assert compare(metric, right, right).mcnemar["p"] == 1
    assert (compare(metric, right, scores).wilson, compare(metric, right, scores).mcnemar) == (
        None,
        None,
    )


@pytest.mark.parametrize(
    ("lost", "won", "word"),
    [
        (0, 0, "not distinguishable"),
        (30, 5, "worse"),
        (5, 30, "better"),
        (18, 17, "not distinguishable"),
        (5, 0, "not distinguishable"),  # a bootstrap leaves out 0, McNemar's p is 0.06
        (6, 0, "worse"),
    ],
)
def test_a_verdict_is_on_the_samples_that_differ(tmp_path, lost, won, word):
    model = [1] * (100 + lost) + [0] * (100 + won)
    engine = [1] * 100 + [0] * (lost + 100) + [1] * won
    assert shares(tmp_path, model, engine).verdict == word


@pytest.mark.slow
def test_an_engine_as_good_as_the_model_is_seldom_called_worse(tmp_path):
    rng = np.random.default_rng(0)
    metric = metrics.SpearmanCosine(file=tmp_path)
    words = []
    for seed in range(60):
        gold = rng.normal(size=80)
        both = [gold + rng.normal(size=80) for _ in range(2)]
        columns = [Samples({"cosine": cosine, "gold": gold}) for cosine in both]
        words.append(compare(metric, *columns, seed=seed).verdict)
    assert words.count("not distinguishable") >= 54  # 57 of 60 are meant


def test_few_samples_say_nothing(tmp_path):
    """Five of five that agree are had by chance once in sixteen times."""
    metric = metrics.F1(file=tmp_path)
    for n, word in ((5, "not distinguishable"), (6, "worse")):
        gold = np.zeros(n, int)
        both = [Samples({"predicted": gold + off, "gold": gold}) for off in (0, 1)]
        assert compare(metric, *both).verdict == word


@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_a_drop_is_what_an_engine_loses(tmp_path, factor):
    """Perplexity loses in parts of the reference and is better where it is less."""
    rng = np.random.default_rng(0)
    tokens = np.full(50, 32.0)
    loss = rng.normal(2, 0.1, 50) * tokens
    both = [Samples({"loss": x, "tokens": tokens}) for x in (loss, loss + math.log(factor) * 32)]
    found = compare(metrics.Perplexity(file=tmp_path), *both)
    assert found.drop == pytest.approx(factor - 1)
    assert found.drop_low == pytest.approx(factor - 1) == found.drop_high
    assert found.verdict == ("worse" if factor > 1 else "better")
    assert (found.relative, found.n) == (True, 1600)


def test_a_drop_of_a_metric_that_should_be_high_is_the_difference_turned_round(tmp_path):
    rng = np.random.default_rng(1)
    model = rng.random(300) < 0.8
    found = shares(tmp_path, model, model & (rng.random(300) < 0.95))
    assert found.drop == pytest.approx(found.reference - found.engine)
    assert (found.drop_low, found.drop_high) == pytest.approx((-found.high, -found.low))
    assert not found.relative


@pytest.mark.parametrize(
    ("kind", "n", "columns"),
    [
        (metrics.SpearmanCosine, 1379, ("cosine", "gold")),
        (metrics.F1, 10_000, ("predicted", "gold")),
    ],
)
@pytest.mark.slow
def test_an_interval_takes_seconds(tmp_path, kind, n, columns):
    rng = np.random.default_rng(0)
    both = [Samples({c: rng.integers(0, 10, n) for c in columns}) for _ in range(2)]
    start = time.process_time()
    compare(kind(file=tmp_path), *both)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("model", "engine", "match"),
    [
        ([1.0, 0.0], [1.0], "2 samples of the model and 1 of the engine"),
        ([1.0, math.nan], [1.0, 0.0], "over 2 samples is nan of the model, 0.5 of the engine"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(tmp_path, model, engine, match):
    samples = [Samples({"correct": np.array(column)}) for column in (model, engine)]
    with pytest.raises(CalibrationError, match=match):
        compare(metrics.Accuracy(file=tmp_path), *samples)


# Real files


def real(*names: str) -> Path:
    path = DATA.joinpath(*names)
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


def test_real_sts_files_are_read_whole():
    rows = of("sts", real("stsb", "stsb-en-test.csv")).rows()
    with real("stsb", "stsb-en-test.csv").open(encoding="utf-8", newline="") as stream:
        assert rows == [(a, b, float(score)) for a, b, score in csv.reader(stream)]
    assert len(rows) == 1379


def test_real_labels_are_read_whole():
    texts = list(data.read(real("sst2", "test.tsv"), labelled=True))
    assert len(texts) == 1821 and {r.label for r in texts} == {0, 1}
    first = next(data.read(real("fashion-mnist"), labelled=True))
    assert first.pixels.shape == (28, 28) and first.label == 9
