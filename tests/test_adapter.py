"""Adapters of PEFT are taken as PEFT itself takes them, and those of effc load there; what is not one is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import effc
from effc import adapter, checkpoint
from effc.errors import CalibrationError, PackageError, PreconditionError, SourceError
from effc.ir.edit import rebind
from effc.ir.splice import attached
from effc.passes.lora import AttachLora, MergeLora, adapter_of
from effc.passes.smooth import Smooth
from kit import assert_letter, cli

DATA = Path(os.environ.get("EFFC_DATA", Path(__file__).parents[2] / "shared" / "data"))
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.arange(3, 25).reshape(2, 11)


class Logits(nn.Module):
    """The logits of a causal language model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return {"logits": self.model(input_ids=input_ids, use_cache=False).logits}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    ).eval()


def traced(model):
    program = effc.trace(
        Logits(model), {"input_ids": IDS}, dims={"input_ids": {0: "batch", 1: "sequence"}}
    )
    for word in ("drop-noops", "fuse-linear"):
        effc.apply(effc.passes.PASSES[word](), program)
    return program


def logits(program, ids=IDS):
    return program.run(input_ids=ids)["logits"]


def distance(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def tuned_by_peft(model, **options):
    """A model of PEFT whose adapter was moved, as training would."""
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options)).eval()
    draw = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if "lora_B" in name:
            parameter.data.copy_(0.3 * noise)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * noise)
    return made


LAYERS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    "both, of many ranks": {
        "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2, "up_proj": 3},
        "alpha_pattern": {"model.layers.0.mlp.up_proj": 5},
    },
}  # fmt: skip


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_an_adapter_of_peft_gives_the_logits_of_peft_and_so_does_ours_in_peft(options, tmp_path):
    peft = pytest.importorskip("peft")

    theirs = tuned_by_peft(llama(), target_modules=LAYERS, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs(IDS).logits
    program = traced(llama())
    plain = logits(program)
    record = effc.apply(AttachLora(adapter=str(tmp_path / "theirs")), program)
    assert record.sites == 2 * len(LAYERS) and record.effect == "lossy"
    assert distance(logits(program), wanted) < 1e-6 < 0.05 < distance(plain, wanted)

    effc.save_adapter(program, tmp_path / "ours", stem="model.")
    again = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    assert torch.equal(again(IDS).logits, wanted)
    a, b = (adapter.read(tmp_path / word) for word in ("theirs", "ours"))
    assert a.digest == b.digest and len(a.layers) == record.sites

    effc.apply(MergeLora(), program, probes={"main": [{"input_ids": IDS}]})
    merged = dict(theirs.merge_and_unload().named_parameters())
    tensors = program.only().tensors()
    gaps = [
        distance(tensors[f"model.{n}"], p) for n, p in merged.items() if f"model.{n}" in tensors
    ]
    assert len(gaps) > 20 and max(gaps) < 2e-7
    assert distance(logits(program), wanted) < 1e-6


def test_weights_that_are_stored_the_other_way_round(tmp_path):
    peft = pytest.importorskip("peft")

    names = ["c_attn", "c_fc", "c_proj"]
    theirs = tuned_by_peft(gpt2(), target_modules=names, fan_in_fan_out=True)
    theirs.save_pretrained(tmp_path / "theirs")
    program = traced(gpt2())
    effc.apply(AttachLora(adapter=str(tmp_path / "theirs")), program)
    assert distance(logits(program), theirs(IDS).logits) < 1e-6
    effc.save_adapter(program, tmp_path / "ours", stem="model.")
    again = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path / "ours")).eval()
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_an_adapter_of_the_model_inside_a_model_finds_its_layers(tmp_path):
    theirs = tuned_by_peft(llama().model, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path)
    program = traced(llama())
    assert effc.apply(AttachLora(adapter=str(tmp_path)), program).sites == 2


def test_a_fresh_adapter_of_effc_loads_in_peft_and_changes_nothing_there(tmp_path):
    peft = pytest.importorskip("peft")
    for form in ("lora", "rslora", "dora"):
        program = traced(llama())
        effc.apply(AttachLora(rank=3, alpha=5, form=form), program)
        effc.save_adapter(program, tmp_path / form, stem="model.")
        again = peft.PeftModel.from_pretrained(llama(), str(tmp_path / form)).eval()
        assert distance(again(IDS).logits, llama()(IDS).logits) < 1e-6
        config = json.loads((tmp_path / form / adapter.CONFIG).read_text())
        assert (config["r"], config["lora_alpha"]) == (3, 5)
        assert (config["use_rslora"], config["use_dora"]) == (form == "rslora", form == "dora")


def test_what_is_not_the_model_with_an_adapter_is_not_written_as_one(tmp_path):
    program = traced(llama())
    with pytest.raises(PreconditionError, match="no adapter is attached"):
        effc.save_adapter(program, tmp_path / "a")
    effc.apply(AttachLora(rank=2), program)
    name = next(n for n in program.only().tensors() if n.endswith("norm.weight"))
    rebind(program.only(), name, 2 * program.only().tensors()[name], "tuned")
    with pytest.raises(
        PreconditionError, match=r"not for the model as it came: .*norm.weight is tuned"
    ):
        effc.save_adapter(program, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    program = traced(llama())
    effc.apply(AttachLora(rank=2), program)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(PackageError, match="something else than an adapter"):
        effc.save_adapter(program, tmp_path / "mine")
    effc.save_adapter(program, tmp_path / "b")
    effc.save_adapter(program, tmp_path / "b")  # its own it writes anew


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An adapter for the small Llama, written by effc."""
    place = tmp_path_factory.mktemp("adapter")
    program = traced(llama())
    effc.apply(AttachLora(rank=2, select=effc.Select(module="*q_proj")), program)
    effc.save_adapter(program, place / "a", stem="model.")
    return place / "a"


def spoilt(whole, place, tensors=None, **settings):
    """A copy of an adapter with other settings or tensors."""
    place.mkdir(exist_ok=True)
    config = json.loads((whole / adapter.CONFIG).read_text())
    (place / adapter.CONFIG).write_text(json.dumps({**config, **settings}))
    held = load_file(whole / adapter.WEIGHTS)
    save_file(tensors(held) if tensors else held, place / adapter.WEIGHTS)
    return place


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is 'None'"),
        ({"bias": "lora_only"}, "brings biases of the base"),
        ({"modules_to_save": ["lm_head"]}, "whole layers of its own"),
        ({"lora_bias": True}, "biases in its products"),
        ({"trainable_token_indices": [1]}, "single rows of the embedding"),
        ({"alora_invocation_tokens": [1, 2]}, "behind certain tokens only"),
        ({"use_new_thing": True}, "effc does not know what that changes"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the weights of the base too"),
        ({"r": 3}, r"A \[2, 16\] and B \[16, 2\], which are not of rank 3"),
        ({"r": "2"}, "r is 2, and no number above 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "has the regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern is no mapping"),
        ({"use_dora": True}, "has A and B where adapter_config.json asks for A and B and magnitude"),
    ],
)  # fmt: skip
def test_settings_that_ask_for_something_else_are_refused_with_the_reason(
    whole, tmp_path, settings, reason
):
    place = spoilt(whole, tmp_path / "a", **settings)
    with pytest.raises(SourceError, match=reason) as error:
        adapter.read(place)
    assert error.value.hint


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {f"{Q}A.weight": t[f"{Q}A.weight"]}, "has A where"),
        (lambda t: {**t, f"{Q}A.weight": t[f"{Q}A.weight"].t().contiguous()}, "not of rank 2"),
        (lambda t: {**t, f"{Q}B.weight": torch.full((16, 2), torch.nan)}, "no numbers"),
        (lambda t: {**t, f"{Q}B.weight": torch.zeros(16, 2, dtype=torch.int8)}, "is int8"),
        (lambda t: {**t, f"{Q}B.bias": torch.zeros(16)}, "none of a linear layer's adapter"),
        (lambda t: {**t, f"{Q}embedding_A": torch.zeros(2, 64)}, "which is an embedding's"),
        (
            lambda t: {**t, f"{Q}magnitude_vector": torch.ones(16)},
            "has A and B and magnitude where",
        ),
        (lambda t: {}, "holds no tensor"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(whole, tmp_path, change, reason):
    place = spoilt(whole, tmp_path / "a", change)
    with pytest.raises(SourceError, match=reason) as error:
        adapter.read(place)
    assert error.value.hint


def test_files_that_are_missing_or_damaged_are_said(whole, tmp_path):
    with pytest.raises(SourceError, match="is no adapter: it has no adapter_config"):
        adapter.read(tmp_path / "nowhere")
    place = spoilt(whole, tmp_path / "a")
    content = (place / adapter.WEIGHTS).read_bytes()
    (place / adapter.WEIGHTS).write_bytes(content[:100])
    with pytest.raises(SourceError, match="it does not load"):
        adapter.read(place)
    (place / adapter.WEIGHTS).unlink()
    with pytest.raises(SourceError, match=r"has no adapter_model\.safetensors"):
        adapter.read(place)
    (place / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError, match="only as pickle") as error:
        adapter.read(place)
    assert "safe_serialization" in error.value.hint
    (place / adapter.CONFIG).write_text("[" * 100)
    with pytest.raises(SourceError, match="cannot be read"):
        adapter.read(place)
    (place / adapter.CONFIG).write_text("[]")
    with pytest.raises(SourceError, match="holds no settings"):
        adapter.read(place)
    (place / adapter.CONFIG).unlink()
    os.mkfifo(place / adapter.CONFIG)
    with pytest.raises(SourceError, match="has no adapter_config"):
        adapter.read(place)


def test_an_adapter_of_another_base_is_refused_by_name_or_by_shape(whole, tmp_path):
    moved = spoilt(
        whole,
        tmp_path / "a",
        lambda t: {k.replace("layers.1.", "layers.7."): v for k, v in t.items()},
    )
    program = traced(llama())
    before = effc.show(program)
    with pytest.raises(
        PreconditionError, match=r"another base: .* no linear layer 'model.layers.7"
    ):
        effc.apply(AttachLora(adapter=str(moved)), program)
    wide = spoilt(
        whole, tmp_path / "b",
        lambda t: {k: torch.zeros(v.shape[0], 24) if "lora_A" in k else v for k, v in t.items()},
    )  # fmt: skip
    with pytest.raises(PreconditionError, match=r"q_proj is \[16, 16\] here, and \[16, 24\] there"):
        effc.apply(AttachLora(adapter=str(wide)), program)
    tricky = spoilt(
        whole,
        tmp_path / "c",
        lambda t: {k.replace("model.layers", "../../layers"): v for k, v in t.items()},
    )
    with pytest.raises(PreconditionError, match="another base"):
        effc.apply(AttachLora(adapter=str(tricky)), program)
    assert effc.show(program) == before


def test_a_replay_holds_the_adapter_to_the_recorded_one(whole, tmp_path):
    program = traced(llama())
    pass_ = AttachLora(adapter=str(whole))
    record = effc.apply(pass_, program.clone())
    assert effc.apply(pass_, program.clone(), recorded=record.decisions).sites == 2
    other = spoilt(whole, tmp_path / "a", lora_alpha=77)
    with pytest.raises(
        CalibrationError, match="another adapter than that of the recorded decisions"
    ):
        effc.apply(AttachLora(adapter=str(other)), program.clone(), recorded=record.decisions)


def test_numbers_of_16_bit_are_taken_in_the_type_of_the_layer(whole, tmp_path):
    half = spoilt(whole, tmp_path / "a", lambda t: {k: v.to(torch.bfloat16) for k, v in t.items()})
    program = traced(llama())
    effc.apply(AttachLora(adapter=str(half)), program)
    assert {program.only().tensors()[n].dtype for n in attached(program.only())} == {torch.float32}


STORIES = DATA / "stories260k-llama"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="no stories260K")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "cache"))
    lines = (DATA / "tinystories" / "train_head.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "texts.txt").write_text(
        "\n".join(line for line in lines if len(line) > 80), encoding="utf-8"
    )
    (tmp_path / "r.yaml").write_text(yaml.dump({
        "source": {"transformers": str(STORIES)},
        "calib": {"file": str(tmp_path / "texts.txt"), "samples": 32, "batch": 8, "max_length": 64},
        "passes": [
            {"pass": "attach-lora", "rank": 4, "alpha": 8},
            {
                "pass": "tune", "steps": 12, "lr": 0.003, "distill": 0, "task": "tokens", "samples": 96, "held": 16,
                "batch": 8,
            },
            "merge-lora",
            "quantize",
        ],
        "bench": False, "gate": False,
    }), encoding="utf-8")  # fmt: skip
    return tmp_path


@needs_stories
@pytest.mark.slow
def test_attach_train_merge_quantise_in_one_recipe(recipe):
    """Killed, gone on with, kept, taken by a compile, and given to PEFT."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    ran = cli("tune", recipe / "r.yaml", "-o", recipe / "ck", "--json", recipe / "t.json")
    assert ran.code == 0, ran.err
    curve = json.loads((recipe / "t.json").read_text())["curves"]["1.main"]
    assert min(p["held"] for p in curve) < curve[0]["held"]
    held = load_file(recipe / "ck" / "1.main.safetensors")
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (172, 64), (172, 64), (64, 172)]  # of a layer
    assert sum(t.numel() for t in held.values()) == 5 * sum(
        4 * (out + inner) for out, inner in shapes
    )
    assert all(name.endswith((".lora_A", ".lora_B")) for name in held)
    files = json.loads((recipe / "ck" / "tune.json").read_text())["files"]
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files.keys()

    ran = cli("compile", recipe / "r.yaml", "--tuned", recipe / "ck", "-o", recipe / "out")
    assert ran.code == 0, ran.err
    report = json.loads((recipe / "out" / "report.json").read_text())
    passes = {p["name"]: p for p in report["passes"]}
    assert (
        passes["attach-lora"]["drift"]["rel_l2"] == 0
        and passes["merge-lora"]["drift"]["rel_l2"] < 1e-5
    )
    assert passes["attach-lora"]["nodes"] == passes["merge-lora"]["nodes"][::-1]
    layers = report["layers"]["ort"] if isinstance(report["layers"], dict) else report["layers"]
    assert not any("lora" in json.dumps(layer) for layer in layers)

    base = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(base, str(recipe / "ck" / "adapter")).eval()
    program = traced(AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval())
    effc.apply(AttachLora(rank=4, alpha=8), program)
    for name, tensor in held.items():
        rebind(program.only(), name, tensor, "tuned")
    assert distance(logits(program, IDS * 9), theirs(IDS * 9).logits) < 1e-6

    (recipe / "ck" / "adapter" / "notes.txt").write_text("mine")
    ran = cli("tune", recipe / "r.yaml", "-o", recipe / "ck")
    assert_letter(ran, "TuneError", 13, "something else than a checkpoint")
    (recipe / "ck" / "adapter" / "notes.txt").unlink()
    (recipe / "ck" / "adapter" / "empty").mkdir()
    ran = cli("tune", recipe / "r.yaml", "-o", recipe / "ck")
    assert_letter(ran, "TuneError", 13, "something else than a checkpoint")
    (recipe / "ck" / "adapter" / "empty").rmdir()
    assert cli("tune", recipe / "r.yaml", "-o", recipe / "ck").code == 0  # its own it replaces
    config = recipe / "ck" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    ran = cli("compile", recipe / "r.yaml", "--tuned", recipe / "ck", "-o", recipe / "other")
    assert_letter(ran, "TuneError", 13, "is not what it was written as")


@needs_stories
@pytest.mark.slow
def test_a_recipe_takes_the_adapter_of_a_checkpoint_beside_it(recipe):
    assert cli("tune", recipe / "r.yaml", "-o", recipe / "ck").code == 0
    held = load_file(recipe / "ck" / "1.main.safetensors")
    (recipe / "take.yaml").write_text(yaml.dump({
        "source": {"transformers": str(STORIES)}, "bench": False, "gate": False,
        "passes": [{"pass": "attach-lora", "adapter": "ck/adapter"}, "merge-lora"],
    }), encoding="utf-8")  # fmt: skip
    ran = cli("compile", recipe / "take.yaml", "-o", recipe / "out")
    assert ran.code == 0, ran.err
    report = json.loads((recipe / "out" / "report.json").read_text())
    sites = {p["name"]: p["sites"] for p in report["passes"]}
    assert sites["attach-lora"] == sites["merge-lora"] == len(held) / 2
    assert (
        yaml.safe_load((recipe / "out" / "recipe.yaml").read_text())["passes"][0]["adapter"]
        == "adapter"
    )


@needs_stories
@pytest.mark.slow
def test_two_graphs_of_a_model_are_trained_alike(recipe):
    words = ("--set", "source.roles=[prefill, decode]", "--set", "passes.1.steps=3")
    ran = cli("tune", recipe / "r.yaml", "-o", recipe / "ck", *words)
    assert ran.code == 0, ran.err
    a, b = (load_file(recipe / "ck" / f"1.{role}.safetensors") for role in ("prefill", "decode"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (recipe / "ck" / "prefill" / "adapter" / adapter.CONFIG).is_file()


def test_a_training_that_goes_on_behind_a_break_keeps_the_adapter(tmp_path, monkeypatch):
    """As `test_tuning` has it for a module, with the tensors of adapters in a graph."""
    from effc.train import loop
    from effc.train.graph import InGraph

    monkeypatch.setattr(loop, "SAVE_S", 0.0)
    program = traced(llama())
    effc.apply(AttachLora(rank=2), program)
    graph = program.only()

    def run(folder, die_at=None):
        module = InGraph(graph, attached(graph))

        def progress(done, of):
            if done == die_at:
                raise KeyboardInterrupt

        def loss(made, feeds):
            return made(feeds)["logits"].square().mean()

        schedule = loop.Schedule(steps=6, lr=0.05, check_every=2)
        try:
            loop.fit(
                module,
                loss,
                lambda step: {"input_ids": IDS},
                schedule,
                folder=folder,
                progress=progress,
            )
        except KeyboardInterrupt:
            return None
        return module.tensors()

    wanted = run(tmp_path / "a")
    assert run(tmp_path / "b", die_at=4) is None
    found = run(tmp_path / "b")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_file_of_a_pass_counts_from_the_folder_of_the_recipe(tmp_path, monkeypatch):
    from effc import recipe as recipes

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "lines.txt").write_text("a\n")
    (tmp_path / "in" / "r.yaml").write_text(yaml.dump({
        "source": {"python": "kit:nobody"},
        "passes": [{"pass": "tune", "file": "lines.txt"}, {"pass": "attach-lora", "adapter": "not/there"}],
    }))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    made = recipes.read(Path("in/r.yaml"))
    assert made.passes[0].file == "in/lines.txt" and made.passes[1].adapter == "not/there"
    data = yaml.safe_load(made.portable())
    assert data["passes"][0]["file"] == "lines.txt" and data["passes"][1]["adapter"] == "there"
    (step, _) = checkpoint.steps_of([AttachLora(adapter="/a/b"), effc.passes.PASSES["tune"]()])
    assert step["adapter"] == "b"


def test_smoothed_weights_are_not_the_base_of_an_adapter(tmp_path):
    program = traced(llama())
    effc.apply(AttachLora(rank=2), program)
    graph = program.only()
    name = next(n for n in graph.tensors() if n.endswith("q_proj.weight"))
    rebind(graph, name, 2 * graph.tensors()[name], Smooth.name)
    with pytest.raises(PreconditionError, match=r"q_proj\.weight is smooth"):
        adapter_of(graph, "model.")
