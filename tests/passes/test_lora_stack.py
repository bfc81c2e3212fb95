"""Several adapters in one engine: every row has its own, as if it had been run alone with that one merged."""

import numpy as np
import pytest
import torch
from gated import X, run, stirred, traced
from graphs import distance, engine, normal, ops, quantize
from torch import nn

import effc
from effc.errors import CalibrationError, PreconditionError
from effc.ir.check import problems
from effc.passes.lora import AttachLora, MergeLora
from effc.passes.lora_stack import StackLora
from effc.passes.rank1 import AttachRank1


def adapters(place, count=3):
    """Adapters of several ranks in PEFT's form, one of them for one layer alone, and programs with each merged."""
    merged, names = [traced()], []
    for number in range(count):
        program = traced()
        select = effc.Select(module="up" if number == 1 else "*")
        form = "rslora" if number == 2 else "lora"
        pass_ = AttachLora(rank=2 + number, alpha=3, seed=number, select=select, form=form)
        effc.apply(pass_, program)
        program = stirred(program, by=0.2 + 0.1 * number)
        names.append(str(place / f"adapter{number}"))
        effc.save_adapter(program, names[-1])
        effc.apply(MergeLora(), program)
        merged.append(program)
    return tuple(names), merged


def mixed(program, x, which):
    return program.run({"x": x, "adapter": torch.tensor(which)})["output"]


def test_every_row_has_its_own_adapter_as_if_it_ran_alone(tmp_path):
    names, merged = adapters(tmp_path)
    program = traced()
    record = effc.apply(StackLora(adapters=names), program)
    assert record.sites == 2 and problems(program.only()) == []
    assert program.only().inputs == ("x", "adapter")
    assert record.options["adapters"] == ["adapter0", "adapter1", "adapter2"]
    which = [2, 0, 3, 1, 2]
    x = normal(5, 4, 12)
    found = mixed(program, x, which)
    for row, k in enumerate(which):
        wanted = run(merged[k], x[row : row + 1])[0]
        torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-5)
        alone = mixed(program, x[row : row + 1], [k])[0]
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-6)
    assert len({round(float(found[i].sum()), 3) for i in range(5)}) == 5


def test_another_rows_choice_changes_nothing(tmp_path):
    names, _ = adapters(tmp_path)
    program = traced()
    effc.apply(StackLora(adapters=names), program)
    a, b = mixed(program, X, [1, 2, 3, 1]), mixed(program, X, [1, 2, 0, 1])
    assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]]) and not torch.equal(a[2], b[2])


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_engines_choose_the_same(target, tmp_path):
    names, _ = adapters(tmp_path)
    program = traced()
    effc.apply(StackLora(adapters=names), program)
    with engine(program, tmp_path / "out", target) as ran:
        for rows, length, which in ((1, 1, [2]), (4, 7, [3, 0, 1, 1])):
            x = normal(rows, length, 12)
            found = ran({"x": x.numpy(), "adapter": np.array(which)})["output"]
            np.testing.assert_allclose(found, mixed(program, x, which).numpy(), atol=1e-5)


def test_the_base_is_quantised_and_adapters_stay_in_float(tmp_path):
    names, _ = adapters(tmp_path)
    program = traced()
    effc.apply(StackLora(adapters=names), program)
    for attach in (StackLora(adapters=names), AttachLora(rank=2), AttachRank1(sizes=(2, 3))):
        made = traced()
        effc.apply(attach, made)
        record = quantize(made, activation_bits=16)
        assert record.sites == 2 and ops(made).count("dequantize") == 2
        floats = [n for n, t in made.only().tensors().items() if "lora" in n or "stack" in n]
        assert all(made.only().tensors()[n].is_floating_point() for n in floats)
    made = program.clone()
    quantize(made, activation_bits=16)
    base = traced()
    quantize(base, activation_bits=16)
    assert torch.equal(mixed(made, X, [0, 0, 0, 0]), run(base))
    gap = distance(mixed(program, X, [1, 2, 3, 0]), mixed(made, X, [1, 2, 3, 0]))
    assert 0 < gap < 0.02


def test_what_cannot_be_stacked_is_refused(tmp_path):
    names, _ = adapters(tmp_path)
    with pytest.raises(PreconditionError, match="puts nothing anywhere"):
        effc.apply(StackLora(), traced())
    program = traced()
    effc.apply(StackLora(adapters=names), program)
    with pytest.raises(PreconditionError, match="has an input 'adapter' already"):
        effc.apply(StackLora(adapters=names), program)
    dora = traced()
    effc.apply(AttachLora(rank=2, form="dora"), dora)
    effc.save_adapter(stirred(dora), tmp_path / "dora")
    with pytest.raises(PreconditionError, match="DoRA's form"):
        effc.apply(StackLora(adapters=(str(tmp_path / "dora"),)), traced())

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 12)

        def forward(self, x):
            return self.fc(x)

    with pytest.raises(PreconditionError, match="adapter of another base"):
        effc.apply(StackLora(adapters=names), traced(Other()))


def test_a_replay_wants_the_same_adapters(tmp_path):
    names, _ = adapters(tmp_path)
    record = effc.apply(StackLora(adapters=names[:2]), traced())
    with pytest.raises(CalibrationError, match="another adapter"):
        effc.apply(StackLora(adapters=names[1:]), traced(), recorded=record.decisions)
