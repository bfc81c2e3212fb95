"""Scores stand beside the model's own outputs, which stay what they were to the bit, in every engine."""

import numpy as np
import pytest
import torch
from torch import nn

import effc
from effc import recipe
from effc.backends import BACKENDS
from effc.calib.data import Batch
from effc.errors import CalibrationError, PreconditionError
from effc.passes.quantize import Quantize
from effc.passes.uncertain import OUTPUTS, UncertainTokens

TOKENS, WIDTH, CLASSES = 6, 16, 5


class Net(nn.Module):
    """A picture in patches, a block, a bridge, and an answer for every token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Linear(8, WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.bridge = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        h = self.patch(x)
        h = h + self.block(h)
        return {"answer": self.head(self.bridge(h))}


def traced(length=TOKENS, free=False):
    dims = {"x": {0: "batch", **({1: "length"} if free else {})}}
    return effc.trace(Net().eval(), {"x": torch.randn(2, length, 8)}, dims=dims)


def batches(count=4, scale=1.0):
    draw = np.random.default_rng(0)
    return [
        Batch(inputs={"x": scale * draw.normal(size=(8, TOKENS, 8)).astype("f4")})
        for _ in range(count)
    ]


X = torch.from_numpy(np.random.default_rng(1).normal(size=(3, TOKENS, 8)).astype("f4"))
WAYS = {
    "maha": {},
    "energy": {},
    "mcdrop": {"inside": "patch"},
    "entropy": {"logits": "answer"},
    "random": {},
}


def scored(score, program=None, **how):
    program = traced() if program is None else program
    pass_ = UncertainTokens(at="bridge", score=score, ratio=0.3, **{**WAYS[score], **how})
    record = effc.apply(pass_, program, batches())
    return program, record


@pytest.mark.parametrize("score", WAYS)
def test_the_answer_is_the_same_and_the_kept_tokens_are_those_of_the_highest_scores(score):
    before = traced().run({"x": X})["answer"]
    program, record = scored(score)
    assert record.sites == 1 and record.drift.max_abs == 0
    found = program.run({"x": X})
    assert torch.equal(found["answer"], before)
    points, index, tokens, sample = (found[name] for name in OUTPUTS)
    assert points.shape == (3, TOKENS) and sample.shape == (3,)
    assert index.shape == (3, 2) and tokens.shape == (3, 2, WIDTH)
    assert torch.equal(points.sort(1, descending=True).values[:, :2], points.gather(1, index))
    value = Net().eval()
    h = value.patch(X)
    x = value.bridge(h + value.block(h))
    torch.testing.assert_close(tokens, torch.stack([x[i, index[i]] for i in range(3)]))


def test_scores_are_what_they_are_said_to_be():
    net = Net().eval()
    h = net.patch(X)
    x = net.bridge(h + net.block(h)).detach().double()
    logits = net.head(x.float()).detach().double()
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    found = {score: scored(score)[0].run({"x": X}) for score in WAYS}
    points = {score: each["uts_token_score"].double() for score, each in found.items()}
    torch.testing.assert_close(points["energy"], (x**2).mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(points["entropy"], entropy, rtol=1e-4, atol=1e-5)
    doubt = -p.max(-1).values.log().mean(1)
    torch.testing.assert_close(found["entropy"]["uts_sample_score"].double(), doubt, rtol=1e-4, atol=1e-5)  # fmt: skip
    seen = torch.cat([torch.from_numpy(b.inputs["x"]) for b in batches()])
    h = net.patch(seen)
    rows = net.bridge(h + net.block(h)).detach().double().reshape(-1, WIDTH)
    far = ((x - rows.mean(0)) ** 2 / rows.var(0, unbiased=False)).mean(-1)
    torch.testing.assert_close(points["maha"], far, rtol=1e-3, atol=1e-4)
    assert (points["mcdrop"] > 0).all()
    assert ((points["random"] >= 0) & (points["random"] < 1)).all()


def test_masks_inside_are_dropout_of_what_the_module_gives():
    """The variance over many masks is that of many runs with dropout there."""
    program, _ = scored("mcdrop", draws=256, dropout=0.2)
    found = program.run({"x": X})["uts_token_score"]
    net = Net().eval()
    torch.manual_seed(1)
    draws = []
    for _ in range(2000):
        h = net.patch(X)
        h = h * (torch.rand(WIDTH) >= 0.2) / 0.8
        draws.append(net.bridge(h + net.block(h)))
    wanted = torch.stack(draws).var(0, unbiased=False).mean(-1)
    torch.testing.assert_close(found, wanted.detach(), rtol=0.25, atol=0)


def test_the_lowest_may_be_kept_instead():
    found = scored("energy", keep="low")[0].run({"x": X})
    points = found["uts_token_score"]
    assert torch.equal(points.sort(1).values[:, :2], points.gather(1, found["uts_index"]))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize("score", WAYS)
def test_an_engine_answers_the_same_to_the_bit_with_and_without(tmp_path, score, target, bits):
    answers = []
    for with_scores in (False, True):
        program = traced()
        if bits:
            effc.apply(Quantize(bits=bits), program, batches())
        if with_scores:
            scored(score, program)
        backend = BACKENDS[target]()
        lowered = backend.lower(program.only(), tmp_path / str(with_scores))
        with backend.open(lowered) as engine:
            answers.append(engine({"x": X.numpy()}))
    if (target, bits) == (
        "openvino",
        8,
    ):  # it fuses otherwise around a value that is read once more
        np.testing.assert_allclose(answers[0]["answer"], answers[1]["answer"], atol=0.05)
    else:
        assert np.array_equal(answers[0]["answer"], answers[1]["answer"])
    own = program.run({"x": X})
    assert set(OUTPUTS) <= set(answers[1])
    assert answers[1]["uts_index"].shape == own["uts_index"].shape
    if bits is None and score != "random":  # a last bit more or less is another fraction
        np.testing.assert_allclose(
            answers[1]["uts_token_score"], own["uts_token_score"], rtol=2e-3, atol=1e-4
        )


def test_statistics_are_replayed_without_data():
    program, record = scored("maha")
    again = traced()
    pass_ = UncertainTokens(at="bridge", ratio=0.3)
    effc.apply(pass_, again, recorded=record.decisions, probes={"main": [{"x": X}]})
    one, two = (p.run({"x": X})["uts_token_score"] for p in (program, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("how", "hint"),
    [
        ({"at": ""}, "at:"),
        ({"at": "bridges"}, "effc inspect"),
        ({"ratio": 0.0}, "ratio"),
        ({"score": "mcdrop"}, "inside"),
        ({"score": "mcdrop", "inside": "head"}, "in front"),
        ({"score": "entropy"}, "logits"),
        ({"score": "entropy", "logits": "answers"}, "one of answer"),
        ({"draws": 1}, "draws"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_what_to_do(how, hint):
    with pytest.raises(PreconditionError) as refused:
        effc.apply(UncertainTokens(**{"at": "bridge", "score": "energy", **how}), traced(), batches())  # fmt: skip
    assert hint in refused.value.hint


def test_a_free_number_of_tokens_and_a_second_time_are_refused():
    with pytest.raises(PreconditionError, match="not \\[batch, tokens, channels\\]"):
        scored("energy", traced(free=True))
    program, _ = scored("energy")
    with pytest.raises(PreconditionError, match="already"):
        scored("energy", program)


def test_without_data_there_are_no_statistics():
    with pytest.raises(CalibrationError):
        effc.apply(UncertainTokens(at="bridge"), traced())


FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bridge = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16, elementwise_affine=False))
            self.head = nn.Linear(16, 5)
        def forward(self, x):
            return {"answer": self.head(self.bridge(x))}
    return Net().eval(), {"x": torch.randn(2, 48, 8)}
"""


@pytest.mark.parametrize("score", ["energy", "random"])
def test_a_compile_is_not_refused_for_the_order_of_scores_that_are_nearly_equal(tmp_path, score):
    (tmp_path / "net.py").write_text(FACTORY)
    asked = recipe.build({
        "source": {"python": f"{tmp_path / 'net.py'}:net"}, "bench": False, "gate": False,
        "passes": [
            {"pass": "quantize", "activation_bits": 16},
            {"pass": "uncertain-tokens", "at": "bridge", "score": score},
        ],
    })  # fmt: skip
    effc.compile(asked, tmp_path / "out")
    with effc.Engine.open(tmp_path / "out") as engine:
        assert set(OUTPUTS) < set(engine({"x": np.ones((1, 48, 8), "f4")}))
