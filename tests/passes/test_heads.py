"""An output that training alone needed goes, with what only it was made of."""

import pytest
import torch
from graphs import normal

import effc
from effc.backends.eager import ModuleEngine, ports
from effc.calib.data import Batch
from effc.errors import PreconditionError, VerifyError
from effc.passes.heads import DropHead


class TwoHeads(torch.nn.Module):
    """Two outputs over one body; the second has a layer of its own that the first one reads too."""

    def __init__(self):
        super().__init__()
        self.body, self.both, self.a, self.b = (torch.nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        h = self.body(x).relu()
        p = self.both(h)
        return {"a": self.a(h + p), "b": self.b(p)}


@pytest.fixture
def traced():
    torch.manual_seed(0)
    module = TwoHeads()
    return module, effc.trace(module, {"x": normal(2, 4)})


def test_the_head_goes_and_what_both_outputs_need_stays(traced):
    _, program = traced
    before = program.clone()
    record = effc.apply(
        DropHead(outputs=("b",)), program, [Batch(inputs={"x": normal(3, 4).numpy()})]
    )
    graph = program.only()
    assert (record.sites, graph.outputs) == (1, ("a",))
    assert {name.partition(".")[0] for name in graph.tensors()} == {"body", "both", "a"}
    feeds = {"x": normal(5, 4)}
    assert torch.equal(graph.run(feeds)["a"], before.only().run(feeds)["a"])
    assert before.only().outputs == ("a", "b")


@pytest.mark.parametrize(
    ("outputs", "words"),
    [((), "no output is named"), (("c",), "no output 'c'"), (("a", "b"), "would be left")],
)
def test_what_cannot_go_is_named(traced, outputs, words):
    with pytest.raises(PreconditionError, match=words) as caught:
        effc.apply(DropHead(outputs=outputs), traced[1])
    assert caught.value.hint


def test_an_engine_is_held_to_the_outputs_that_it_has(traced):
    module, program = traced
    smaller = program.clone()
    effc.apply(DropHead(outputs=("b",)), smaller)
    outputs = ports(smaller.only())[1]
    with ModuleEngine(module, program.only(), outputs) as reference:
        assert set(reference({"x": normal(2, 4).numpy()})) == {"a"}
    with pytest.raises(VerifyError, match="no output 'a'"):
        ModuleEngine(module, program.only(), ())
