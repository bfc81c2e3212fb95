"""A student learns from a teacher through adapters alone, by losses that are what they are said to be."""

import numpy as np
import pytest
import torch
from torch import nn

import effc
from effc import recipe
from effc.errors import RecipeError, TuneError
from effc.ir.splice import attached
from effc.passes.lora import AttachLora
from effc.passes.tune import Tune
from effc.train import akd
from effc.train.akd import Distillation, Lesson, Taught
from effc.train.anchor import Anchor
from effc.train.graph import InGraph
from effc.train.loop import Schedule, fit
from effc.train.wavelet import LOW, TAPS, _levels, details

POSITIONS, WIDTH, CLASSES = 9, 12, 4


def bands(x):
    """Low and high of one level of a sequence [positions], in float64 and by the book."""
    low = np.array(LOW)
    high = np.array([(-1) ** (n + 1) * low[TAPS - 1 - n] for n in range(TAPS)])
    found = []
    for taps in (low, high):
        row = []
        for k in range((len(x) + TAPS - 1) // 2):
            places = [(2 * k + 1 - n, taps[n]) for n in range(TAPS)]
            row.append(sum(tap * x[i] for i, tap in places if 0 <= i < len(x)))
        found.append(np.array(row))
    return found


@pytest.mark.parametrize("length", [1, 4, 7, 12, 33, 48])
def test_details_are_those_of_the_definition_at_every_level(length):
    x = np.random.default_rng(length).normal(size=(2, length, 3))
    found = details(torch.from_numpy(x), 3)
    for batch in range(2):
        for channel in range(3):
            rest = x[batch, :, channel]
            for band in found:
                rest, fine = bands(rest)
                np.testing.assert_allclose(band[batch, :, channel], fine, atol=1e-12)


@pytest.mark.parametrize("length", [5, 16, 49])
def test_a_sequence_has_the_energy_of_its_details_and_of_what_is_left(length):
    x = torch.randn(2, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fine, rest = _levels(x, 3)
    total = sum(band.square().sum() for band in [*fine, rest])
    torch.testing.assert_close(total, x.square().sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("degree", range(6))
def test_a_polynomial_of_degree_five_has_no_detail_inside(degree):
    x = (torch.arange(64, dtype=torch.float64) / 64) ** degree
    inside = details(x[None, :, None], 1)[0][0, 6:31, 0]
    assert inside.abs().max() < 1e-10


def test_features_are_mean_squares_and_magnitudes_of_details():
    draw = torch.Generator().manual_seed(1)
    s, t = (torch.randn(2, 16, 3, dtype=torch.float64, generator=draw) for _ in range(2))
    wanted = ((s - t) ** 2).mean() + sum(
        (a - b).abs().mean() for a, b in zip(details(s, 3), details(t, 3), strict=True)
    )
    torch.testing.assert_close(akd.features(s, t, 3), wanted)
    torch.testing.assert_close(akd.features(s, t, 0), ((s - t) ** 2).mean())
    assert akd.features(s, s, 3) == 0


def test_answers_count_where_the_teacher_is_sure():
    teacher = torch.log(torch.tensor([[0.9, 0.1], [0.45, 0.55], [0.2, 0.8]]))
    student = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 0.5]])
    own = -student.log_softmax(-1)[range(3), [0, 1, 1]]
    torch.testing.assert_close(akd.answers(student, teacher), own.mean())
    torch.testing.assert_close(akd.answers(student, teacher, 0.7), own[[0, 2]].mean())
    assert akd.answers(student, teacher, 0.95) == 0  # nobody is, and no gradient is no nan


class Net(nn.Module):
    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.head = nn.Linear(WIDTH, width), nn.Linear(width, CLASSES)

    def forward(self, x):
        h = self.inner(x).tanh()
        return {"logits": self.head(h), "h": h}


def traced(seed=0):
    inputs = {"x": torch.randn(2, POSITIONS, WIDTH)}
    return effc.trace(Net(8, seed).eval(), inputs, dims={"x": {0: "batch"}})


def student():
    program = traced()
    effc.apply(AttachLora(rank=2, output=True), program)
    graph = program.only()
    return graph, Taught(InGraph(graph, attached(graph)), {"h": (8, 20)})


LARGE = Net(20, 1).eval()


def taught_by(feeds):
    return LARGE(**feeds)


def lesson(step, **how):
    draw = torch.Generator().manual_seed(step)
    return Lesson(feeds={"x": torch.randn(16, POSITIONS, WIDTH, generator=draw)}, **how)


def fitted(how, steps=120, courses=(), taught=None, **lessons):
    graph, made = student() if taught is None else taught
    schedule = Schedule(steps=steps, lr=2e-2, check_every=40)
    value = akd.loss(how, taught_by)
    begun = [term.begin(graph, steps, schedule.rate) for term in courses]
    held = [lesson(999, **lessons)]
    run = fit(made, value, lambda step: lesson(step, **lessons), schedule, held=held, courses=begun)
    return graph, made, run


@pytest.mark.parametrize(
    "how",
    [
        Distillation(),
        Distillation(answers=0, logits=1),
        Distillation(answers=0, features=1),
        Distillation(answers=1, logits=1, features=1, sure=0.3),
    ],
)
def test_every_arm_brings_the_student_nearer_and_trains_adapters_alone(how):
    graph, made, run = fitted(how)
    assert run.points[-1].held < 0.9 * run.points[0].held
    changed = made.student.tensors()
    assert changed and all("lora" in name for name in changed)
    assert not torch.equal(changed["head.lora_B"], graph.tensors()["head.lora_B"]) or how.features


def agreement(made):
    feeds = lesson(12345).feeds
    with torch.no_grad():
        mine, theirs = (who(feeds)["logits"].argmax(-1) for who in (made, taught_by))
    return float((mine == theirs).float().mean())


def test_what_is_learned_is_the_teachers_answer_and_not_a_shuffled_one():
    _, right, _ = fitted(Distillation(answers=1, logits=1))
    _, made = student()

    def other(feeds):
        return {n: v.roll(1, -1) for n, v in taught_by(feeds).items()}

    schedule = Schedule(steps=120, lr=2e-2)
    fit(made, akd.loss(Distillation(answers=1, logits=1), other), lesson, schedule)
    assert agreement(right) > max(agreement(student()[1]), agreement(made)) + 0.2


def test_positions_that_were_not_sent_count_as_nothing():
    real = torch.arange(POSITIONS)[None] < 3
    value = akd.loss(Distillation(answers=0, features=1), taught_by)
    _, made = student()
    one = lesson(0, real=real.expand(16, -1))
    feeds = {"x": one.feeds["x"].clone()}
    feeds["x"][:, 3:] += 5
    other = Lesson(feeds=feeds, real=one.real)
    torch.testing.assert_close(value(made, one), value(made, other))
    assert value(made, one) != value(made, lesson(0))


def test_an_anchor_adds_the_distance_from_where_training_began():
    graph, made = student()
    course = Anchor(weight=0.5).begin(graph, 10, lambda step: 1.0)
    assert course.losses(0, made.live())["l2-sp"] == 0
    with torch.no_grad():
        for weight in made.student.weights:
            weight += 0.1
    count = sum(weight.numel() for weight in made.student.weights)
    found = course.losses(0, made.live())["l2-sp"]
    torch.testing.assert_close(found, torch.tensor(0.25 * 0.01 * count))
    assert course.told(0, made.live())["distance"] == pytest.approx((0.01 * count) ** 0.5, rel=1e-4)


def test_an_anchor_keeps_a_training_near():
    def moved(courses):
        graph, made, _ = fitted(Distillation(logits=1), courses=courses)
        start = graph.tensors()
        return sum(float((t - start[n]).square().sum()) for n, t in made.student.tensors().items())

    assert moved((Anchor(weight=1.0),)) < 0.5 * moved(())


def test_replay_keeps_what_the_student_knew():
    _, before = student()
    feeds = {"x": torch.randn(64, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(77))}
    labels = before(feeds)["logits"].argmax(-1)

    def kept(replay):
        _, made, _ = fitted(Distillation(replay=replay), replay=feeds, labels=labels)
        return float((made(feeds)["logits"].argmax(-1) == labels).float().mean())

    assert kept(2.0) > kept(0.0) + 0.1


@pytest.mark.parametrize(
    ("how", "given", "word"),
    [
        ({"answers": 0}, {}, "nothing to learn by"),
        ({"sure": 1.0}, {}, "nothing to learn by"),
        ({"features": -1.0}, {}, "nothing to learn by"),
        ({"temperature": 0.0}, {}, "nothing to learn by"),
        ({"replay": 1.0}, {}, "nothing to replay"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_what_to_do(how, given, word):
    with pytest.raises(TuneError, match=word) as refused:
        akd.loss(Distillation(**how), taught_by)(student()[1], lesson(0, **given))
    assert refused.value.hint


def test_logits_of_another_vocabulary_and_features_of_nobody_are_refused():
    _, made = student()

    def other(feeds):
        return {"logits": torch.zeros(16, POSITIONS, CLASSES + 1)}

    with pytest.raises(TuneError, match="4 classes and the teacher 5"):
        akd.loss(Distillation(answers=0, logits=1), other)(made, lesson(0))
    bare = Taught(made.student, {})
    with pytest.raises(TuneError, match="no feature"):
        akd.loss(Distillation(features=1), taught_by)(bare, lesson(0))


def test_a_recipe_names_the_anchor_by_word_or_with_its_weight():
    def terms(value):
        made = recipe.build({"source": {"python": "a:b"}, "passes": [{"pass": "tune", "terms": value}]})  # fmt: skip
        return made.passes[0].terms

    assert terms(["l2-sp"]) == (Anchor(),)
    assert terms([{"term": "l2-sp", "weight": 0.1}]) == (Anchor(weight=0.1),)
    with pytest.raises(RecipeError, match="weight"):
        terms([{"term": "l2-sp", "weight": 0}])


def test_tune_stays_near_where_it_is_anchored():
    from effc.tuning import trainer

    batches = [{"x": lesson(step).feeds["x"].numpy()} for step in range(4)]

    def moved(terms):
        program = traced(0)
        start = program.only().tensors()
        teacher = traced(5)
        effc.apply(Tune(steps=40, lr=1e-2, terms=terms), program, train=trainer(teacher, batches))
        return sum(float((t - start[n]).square().sum()) for n, t in program.only().tensors().items())  # fmt: skip

    assert 0 < moved((Anchor(weight=1.0),)) < 0.7 * moved(())
