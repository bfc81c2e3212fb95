"""Layers that are alike are traced once, and the graph is the one that tracing every layer gives."""

import pytest
import torch
from graphs import Call, normal
from torch import nn

import effc
from effc.ir import repeat
from effc.ir.edit import refresh
from effc.ir.select import module_path

pytestmark = pytest.mark.slow

WIDTH, DEPTH = 8, 5


class Layer(nn.Module):
    """A residual perceptron that counts how often its code was run."""

    runs = 0

    def __init__(self, width=WIDTH, **attributes):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for name, value in attributes.items():
            setattr(self, name, value)

    def body(self, x):
        Layer.runs += 1
        return x + self.outer(torch.tanh(self.inner(x)))

    def forward(self, x, *rest, **named):
        return self.body(x)


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def stack(kind=Layer, depth=DEPTH, **attributes):
    torch.manual_seed(0)
    return Stack([kind(**{k: v(i) for k, v in attributes.items()}) for i in range(depth)]).eval()


def calls(program):
    """Operator and place of everything that computes a tensor."""
    return [
        (str(n.target), module_path(n), tuple(n.meta["val"].shape[1:]))
        for n in program.only().nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
    ]


def both(module, x, monkeypatch, **options):
    """Traced once a kind, and every layer traced; with how many layers were copied."""
    copied = []
    expand = repeat.expand

    def count(exported, repeats):
        expand(exported, repeats)
        copied.append(sum(like != call for call, like in enumerate(repeats.like)))

    with monkeypatch.context() as patch:
        patch.setattr(repeat, "expand", count)
        quick = effc.trace(module, x, **options)
    with monkeypatch.context() as patch:
        patch.setattr(repeat, "FEWEST", 1000)
        full = effc.trace(module, x, **options)
    return quick, full, sum(copied)


def assert_same(module, x, monkeypatch, copied, **options):
    quick, full, number = both(module, x, monkeypatch, **options)
    assert number == copied
    assert calls(quick) == calls(full)
    refresh(quick.only())
    other = {k: v.repeat(2 if len(v) > 1 else 1, *[1] * (v.dim() - 1)) for k, v in x.items()}
    wanted, found = full.run(other), quick.run(other)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[k], found[k]) for k in wanted)


def test_a_layer_is_run_once_and_its_copies_have_their_own_weights(monkeypatch):
    module = stack()
    assert_same(module, {"x": normal(2, WIDTH)}, monkeypatch, DEPTH - 1)
    Layer.runs = 0
    effc.trace(module, {"x": normal(2, WIDTH)})
    assert Layer.runs == 1 + DEPTH  # and once each to compare the result with the module


def test_the_module_is_as_it_was(monkeypatch):
    module = stack()
    before = [(type(layer), dict(layer.__dict__)) for layer in module.layers]
    effc.trace(module, {"x": normal(2, WIDTH)})
    assert [(type(layer), dict(layer.__dict__)) for layer in module.layers] == before


def test_two_layers_are_not_worth_it(monkeypatch):
    assert_same(stack(depth=2), {"x": normal(2, WIDTH)}, monkeypatch, 0)


def test_layers_with_other_attributes_are_another_kind(monkeypatch):
    class Scaled(Layer):
        def forward(self, x):
            return self.body(x) * self.factor

    module = stack(Scaled, 6, factor=lambda i: float(i % 2))
    assert_same(module, {"x": normal(2, WIDTH)}, monkeypatch, 4)


def test_layers_with_other_settings_within_are_another_kind(monkeypatch):
    class Dilated(nn.Module):
        def __init__(self, dilation):
            super().__init__()
            self.first = nn.Conv1d(4, 4, 3, padding=dilation, dilation=dilation)
            self.second = nn.Conv1d(4, 4, 1)

        def forward(self, x):
            return self.second(self.first(x))

    module = stack(Dilated, 4, dilation=lambda i: i + 1)
    assert_same(module, {"x": normal(2, 4, 16)}, monkeypatch, 0)


def test_a_layer_that_computes_with_its_number_is_traced_itself(monkeypatch):
    class Numbered(Layer):
        def forward(self, x):
            return self.body(x) / (self.layer_idx + 1)

    module, x = stack(Numbered, layer_idx=lambda i: i), {"x": normal(2, WIDTH)}
    program = effc.trace(module, x)
    wanted = module(**x)
    assert torch.allclose(program.run(x)["output"], wanted)


def test_a_large_masked_value_does_not_hide_a_layer_that_differs(monkeypatch):
    class Numbered(Layer):
        def forward(self, x):
            return self.body(x) / (
                getattr(self, "layer" + "_idx") + 1
            )  # not to be seen in the text

    class Masked(Stack):
        def forward(self, x):
            y = super().forward(x)
            return (
                y,
                torch.cat([y, torch.full_like(y, -torch.inf)], 1),
                torch.cat([y, torch.full_like(y, -1e9)], 1),
            )

    torch.manual_seed(0)
    module = Masked([Numbered(layer_idx=i) for i in range(DEPTH)]).eval()
    x = {"x": normal(2, WIDTH)}
    found = effc.trace(module, x).run(x)
    for wanted, name in zip(module(**x), found, strict=True):
        assert torch.allclose(found[name], wanted)


def test_a_number_that_is_not_used_does_not_matter(monkeypatch):
    module = stack(layer_idx=lambda i: i)
    assert_same(module, {"x": normal(2, WIDTH)}, monkeypatch, DEPTH - 1)


def test_shapes_that_change_from_layer_to_layer(monkeypatch):
    class Growing(Layer):
        def forward(self, x):
            return torch.cat([self.body(x), x[:, :1]], 1)

    module = stack(Growing)
    assert_same(module, {"x": normal(2, 3, WIDTH)}, monkeypatch, 0)


def test_arguments_of_each_call_are_its_own(monkeypatch):
    class Masked(Layer):
        def forward(self, x, mask=None, scale=1.0):
            return self.body(x) * mask * scale, None

    class Alternating(Stack):
        def forward(self, x, a, b):
            for number, layer in enumerate(self.layers):
                x, _ = layer(x, mask=(a, b)[number % 2], scale=2.0 if number == 3 else 1.0)
            return x

    torch.manual_seed(0)
    module = Alternating([Masked() for _ in range(6)]).eval()
    x = {"x": normal(2, WIDTH), "a": normal(1, WIDTH, seed=1), "b": normal(1, WIDTH, seed=2)}
    assert_same(
        module, x, monkeypatch, 4, dims={"x": {0: "batch"}}
    )  # not the first, nor the one with another scale


def test_one_layer_called_again_and_again(monkeypatch):
    class Shared(Stack):
        def forward(self, x):
            for _ in range(4):
                for layer in self.layers:
                    x = layer(x)
            return x

    torch.manual_seed(0)
    module = Shared([Layer() for _ in range(3)]).eval()
    assert_same(module, {"x": normal(2, WIDTH)}, monkeypatch, 11)


def test_tied_weights_within_and_between_layers(monkeypatch):
    within = stack()
    for layer in within.layers:
        layer.outer.weight = nn.Parameter(layer.inner.weight.detach().T.contiguous())
        layer.again = layer.inner
    assert_same(within, {"x": normal(2, WIDTH)}, monkeypatch, DEPTH - 1)
    between = stack()
    between.layers[3].inner.weight = between.layers[1].inner.weight
    assert_same(between, {"x": normal(2, WIDTH)}, monkeypatch, DEPTH - 1)


def test_free_sizes_that_a_layer_computes_with(monkeypatch):
    class Heads(Layer):
        def forward(self, x):
            batch, words, _ = x.shape
            return (
                self.body(x).view(batch, words, 2, -1).transpose(1, 2).flatten(1, 2).view(x.shape)
            )

    x = {"x": normal(2, 3, WIDTH)}
    assert_same(stack(Heads), x, monkeypatch, DEPTH - 2, dims={"x": {0: "batch", 1: "words"}})


@pytest.mark.parametrize("kind", ["hook", "object", "tensor", "function of its own"])
def test_what_cannot_be_compared_is_traced(kind, monkeypatch):
    module = stack()
    for number, layer in enumerate(module.layers):
        if kind == "hook":
            layer.register_forward_hook(lambda m, a, y, n=number: y * n)
        elif kind == "object":
            layer.setting = object()
        elif kind == "tensor":
            layer.table = normal(WIDTH)
        else:
            layer.shift = lambda x, n=number: x + n
    assert_same(module, {"x": normal(2, WIDTH)}, monkeypatch, 0)


def test_a_layer_that_writes_into_its_input_is_traced(monkeypatch):
    class Writing(Layer):
        def forward(self, x):
            x.mul_(2)
            return self.body(x)

    module = stack(Writing)
    x = normal(2, WIDTH)
    wanted = module(x.clone())
    program = effc.trace(Call(lambda self, x: self.body(x.clone()), body=module), {"x": x})
    assert torch.equal(program.run({"x": x})["output"], wanted)


def test_a_value_from_outside_that_is_no_argument(monkeypatch):
    board = {}

    class Reading(Layer):
        def forward(self, x):
            return self.body(x) + board["value"]

    class Posting(Stack):
        def forward(self, x):
            for number, layer in enumerate(self.layers):
                board["value"] = x * number
                x = layer(x)
            return x

    torch.manual_seed(0)
    module = Posting([Reading() for _ in range(4)]).eval()
    assert_same(module, {"x": normal(2, WIDTH)}, monkeypatch, 0)


def test_an_error_in_a_layer_is_told_as_ever():
    class Broken(Layer):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return self.body(x)

    with pytest.raises(effc.errors.TraceError) as caught:
        effc.trace(stack(Broken), {"x": normal(2, WIDTH)})
    assert "test_repeat.py" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "vit", "llama", "gpt2", "t5", "mixtral"])
def test_architectures(architecture, monkeypatch):
    from transformers import AutoConfig, AutoModel

    words = {
        "bert": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
        "vit": {
            "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4,
        },
        "llama": {
            "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "gpt2": {"n_embd": 16, "n_head": 2},
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2},
        "mixtral": {
            "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_local_experts": 4,
        },
    }[architecture]  # fmt: skip
    depth = {"gpt2": "n_layer", "t5": "num_layers"}.get(architecture, "num_hidden_layers")
    config = AutoConfig.for_model(architecture, vocab_size=40, **{depth: 4}, **words)
    config.use_cache = False
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    if architecture == "t5":
        model = model.encoder
    field = "pixel_values" if architecture == "vit" else "input_ids"
    x = {field: normal(2, 3, 8, 8) if field == "pixel_values" else torch.arange(14).reshape(2, 7)}
    module = Call(lambda self, x: self.body(**{field: x})[0], body=model)
    copied = {"t5": 0, "mixtral": 0, "gpt2": 0}.get(architecture, 3)
    dims = {"x": {0: "batch"} if field == "pixel_values" else {0: "batch", 1: "sequence"}}
    assert_same(module, {"x": x[field]}, monkeypatch, copied, dims=dims)
