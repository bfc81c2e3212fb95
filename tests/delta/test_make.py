"""A delta is as small as was asked, says what it left out, and gives the package that its maker saw."""

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from packages import weights, write, write_model

from effc import package
from effc.delta import device, make, packet, rate
from effc.errors import DeltaError
from kit import assert_letter, cli, content


def hashed(root):
    """Files of a package without those of measured times."""
    slot = content(root)
    return {n: v for n, v in slot.items() if n not in package.UNHASHED and n != "manifest.json"}


def run(root, seed=0):
    x = np.random.default_rng(seed).normal(size=(5, 64)).astype("f4")
    return device.session(root, device.manifest_of(root)["engines"][0])({"x": x})["y"]


def test_the_same_package_twice_is_an_empty_delta(world):
    again = write(world.place / "again", weights())
    made = make.make(world.old, again, key=world.key, counter=1)
    assert (made.packet.entries, made.packet.texts) == ((), ())
    assert made.packet.base == made.packet.target
    assert len(made.content) < 400


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_there_and_back_is_the_same_to_the_byte(world, external, target):
    old = write(world.place / "a", weights(), external=external, target=target)
    new = write(world.place / "b", weights(1, 0.01), external=external, target=target)
    device.init(world.place / "s", old, [world.word])
    first = content(world.place / "s" / "slots" / "a")
    device.apply(world.place / "s", world.delta(old, new, 1))
    device.confirm(world.place / "s")
    assert hashed(world.place / "s" / "slots" / "b") == hashed(new)
    assert package.check(world.place / "s" / "slots" / "b") == []
    device.apply(world.place / "s", world.delta(new, old, 2))
    assert content(world.place / "s" / "slots" / "a") == first


def test_more_bytes_leave_less_out(world):
    full = make.make(world.old, world.new, key=world.key, counter=1)
    least = make.make(world.old, world.new, key=world.key, counter=1, max_error=0.999)
    budgets = np.linspace(len(least.content) + 50, len(full.content) - 200, 4).astype(int)
    made = [make.make(world.old, world.new, key=world.key, counter=1, budget=b) for b in budgets]
    assert all(len(m.content) <= b for m, b in zip(made, budgets, strict=True))
    errors = [m.packet.error for m in made]
    assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < 0.05 < errors[0]


@pytest.mark.parametrize("most", [0.5, 0.1, 0.01])
def test_the_share_that_is_left_out_is_no_more_than_was_asked(world, most):
    mirror = world.place / "mirror"
    made = make.make(world.old, world.new, key=world.key, counter=1, max_error=most, mirror=mirror)
    assert 0 < made.packet.error <= most
    old, new, got = (run(p) for p in (world.old, world.new, mirror))
    assert np.linalg.norm(got - new) < 3 * most * np.linalg.norm(old - new)


def test_a_delta_is_made_of_the_encodings_that_may_be_used(world):
    free = make.make(world.old, world.new, key=world.key, counter=1, budget=4000)
    few = make.make(
        world.old, world.new, key=world.key, counter=1, budget=4000, encodings=("topk", "ints")
    )
    assert (
        set(few.numbers["encodings"])
        <= {"topk", "ints"}
        < set(free.numbers["encodings"]) | {"topk", "ints"}
    )
    assert len(few.content) <= 4000 and few.packet.error > free.packet.error
    with pytest.raises(DeltaError, match="'q3' is no encoding") as refused:
        make.make(world.old, world.new, key=world.key, counter=1, budget=4000, encodings=("q3",))
    assert "q4" in refused.value.hint


def weighed(world, importance, mirror=None):
    how = {"budget": 2400, "mirror": mirror, "importance": importance}
    return make.make(world.old, world.new, key=world.key, counter=1, **how)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_importance_that_is_none_is_refused(world, value):
    with pytest.raises(DeltaError, match="importance of 'second'") as refused:
        weighed(world, {"second": value})
    assert refused.value.hint


def test_a_budget_that_takes_nothing_is_refused(world):
    with pytest.raises(DeltaError, match="needed to send nothing") as refused:
        make.make(world.old, world.new, key=world.key, counter=1, budget=300)
    assert "--budget" in refused.value.hint


def test_a_budget_below_what_has_to_be_sent_whole_is_refused(world):
    """Places in a table cannot be nearly right, so a budget that holds other things and not them takes nothing."""
    roots = []
    for seed in (0, 1):
        order = np.random.default_rng(seed).integers(0, 64, 4096)
        graph = helper.make_graph(
            [helper.make_node("Gather", ["x", "order"], ["y"], axis=1)], "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4096])],
            [numpy_helper.from_array(order, "order")],
        )  # fmt: skip
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        ports = [("x", 64), ("y", 4096)]
        roots.append(write_model(world.place / f"table{seed}", made, ports, source=str(seed)))
    with pytest.raises(DeltaError, match="needed to send nothing") as refused:
        make.make(*roots, key=world.key, counter=1, budget=2000)
    assert "--budget" in refused.value.hint
    assert len(make.make(*roots, key=world.key, counter=1).content) > 2000


def test_what_one_round_leaves_the_next_one_sends(world):
    """Closed loop: after three rounds to a standing target less is missing than after one, mirrors and device equal."""
    store, held = world.store(), world.old
    missing = []
    for round_ in (1, 2, 3):
        mirror = world.place / f"mirror{round_}"
        made = make.make(held, world.new, key=world.key, counter=round_, budget=2400, mirror=mirror)
        (world.place / "up").write_bytes(made.content)
        device.apply(store, world.place / "up")
        device.confirm(store)
        serving, _ = device.start(store)
        assert content(serving) == content(mirror)
        held = mirror
        missing.append(np.linalg.norm(run(mirror) - run(world.new)))
    assert missing[2] < missing[1] < missing[0]
    assert missing[2] < 0.5 * missing[0]


def test_what_matters_more_is_sent_first(world):
    """A weight whose errors cost 10⁶ times as much is nearer for the same bytes."""
    off = {}
    for name, importance in (("even", {}), ("second", {"second": 1e6})):
        mirror = world.place / name
        weighed(world, importance, mirror)
        found, wanted = (_tensor(p, "second") for p in (mirror, world.new))
        off[name] = np.linalg.norm(found - wanted)
    assert off["second"] < 0.5 * off["even"]


def _tensor(root, name):
    import onnx

    model = onnx.load(root / "model.onnx")
    return onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def test_another_graph_is_refused_with_what_to_do(world):
    tensors = weights(1, 0.01)
    tensors["bias"] = tensors["bias"][None]
    other = write(world.place / "other", tensors)
    with pytest.raises(DeltaError, match="another graph") as refused:
        make.make(world.old, other, key=world.key, counter=1)
    assert "--decisions" in refused.value.hint


def way(size, error):
    payload = bytes(size - rate.ENTRY_BYTES)
    return rate.Candidate(
        error=error, parts=(rate.Part(tensor=None, encoding="", payload=payload),)
    )


def test_what_is_left_of_a_budget_is_filled_with_what_fits():
    """A way that is not on the hull is better than none where the next step of the hull does not fit."""
    units = [
        rate.Unit(name=n, candidates=(rate.Candidate(error=10.0), way(60, 9.9), way(1000, 0)))
        for n in "ab"
    ]
    for budget, errors in ((59, [10, 10]), (100, [9.9, 10]), (120, [9.9, 9.9]), (1060, [0, 9.9])):
        chosen = rate.allocate(units, most_bytes=budget)
        assert [c.error for c in chosen] == errors


def test_the_largest_are_found_and_of_equal_ones_the_first():
    values = np.array([3, 1, 2, 3, 2, 2], "f4")
    found = [rate.largest(values, count).tolist() for count in (1, 2, 3, 4, 6)]
    assert found == [[0], [0, 3], [0, 2, 3], [0, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


def test_the_hull_leaves_out_what_never_pays():
    ways = [rate.Candidate(error=10.0), way(100, 9), way(200, 2), way(250, 3), way(400, 0)]
    assert [w.error for w in rate.hull(ways)] == [10, 2, 0]


def test_the_command_line_makes_reads_and_takes_a_delta(world):
    place = world.place
    assert cli("delta", "keygen", "-o", place / "own").code == 0
    assert (place / "own").stat().st_mode & 0o77 == 0
    again = cli("delta", "keygen", "-o", place / "own")
    assert_letter(again, "DeltaError", 14, "never replaced")
    ran = cli(
        "delta",
        "make",
        world.old,
        world.new,
        "-o",
        place / "up",
        "--key",
        place / "own",
        "--release",
        3,
        "--budget",
        "3KB",
        "--json",
        place / "n.json",
    )
    assert ran.code == 0, ran.err
    numbers = json.loads((place / "n.json").read_text())
    assert numbers["bytes"] == (place / "up").stat().st_size <= 3000
    seen = cli("delta", "inspect", place / "up", "--key", place / "own.pub", "--json", "-")
    assert json.loads(seen.out)["counter"] == 3
    assert cli("delta", "init", place / "s", world.old, "--key", place / "own.pub").code == 0
    for words in (
        ("apply", place / "s", place / "up"),
        ("status", place / "s"),
        ("confirm", place / "s"),
        ("rollback", place / "s"),
    ):
        ran = cli("delta", *words)
        assert ran.code == 0 and "serves" in ran.out, ran.err
    foreign = cli("delta", "inspect", place / "up", "--key", world.place / "key.pub")
    assert_letter(foreign, "DeltaError", 14, "none of the trusted keys")


@pytest.mark.parametrize(
    ("words", "name", "code"),
    [
        (("--max-error", 2), "DeltaError", 14),
        (("--budget", "much"), "UsageError", 2),
        (("--budget", 1), "DeltaError", 14),
        (("--self-test", "nothing.safetensors"), "DeltaError", 14),
        (("--key", "nothing"), "DeltaError", 14),
    ],
)
def test_a_wrong_call_writes_nothing(world, words, name, code):
    ran = cli(
        "delta",
        "make",
        world.old,
        world.new,
        "-o",
        world.place / "up",
        "--release",
        1,
        "--key",
        world.key,
        *words,
    )
    assert_letter(ran, name, code)
    assert not (world.place / "up").exists()


def test_the_file_of_a_delta_is_the_same_twice(world):
    first, second = (
        make.make(world.old, world.new, key=world.key, counter=1, budget=3000).content
        for _ in range(2)
    )
    assert first == second
    packet.check_signature(first, [world.word])


def test_every_budget_above_the_empty_delta_gives_one_within_it(world):
    def sent(budget):
        return make.make(world.old, world.new, key=world.key, counter=1, budget=budget)

    with pytest.raises(DeltaError) as refused:
        sent(1)
    least, most = int(refused.value.what.split()[0]), len(sent(1 << 20).content)
    with pytest.raises(DeltaError, match=f"^{least} bytes are needed"):
        sent(least - 1)
    for budget in (least, least + 1, least + 99, *range(least + 300, most + 300, 400)):
        found = sent(budget)
        assert len(found.content) <= budget
        assert found.packet.error < 1 or budget < least + 300


def test_a_chain_of_tight_budgets_of_codes_alone_goes_on_to_the_end(world):
    """Where whole tensors never fit, the codes that matter most go first, round for round, and none is lost."""
    tensors = weights()
    codes = tensors["first.codes"].astype(int)
    steps = np.random.default_rng(3).integers(-2, 3, codes.shape)
    tensors["first.codes"] = np.clip(codes + steps, -127, 127).astype(np.int8)
    new = write(world.place / "codes", tensors)
    held, errors = world.old, []
    whole = len(make.make(held, new, key=world.key, counter=1).content)
    for round_ in range(1, 13):
        mirror = world.place / f"tight{round_}"
        make.make(held, new, key=world.key, counter=round_, budget=whole // 2, mirror=mirror)
        held = mirror
        errors.append(float(np.linalg.norm(_codes(mirror) - _codes(new))))
        if not errors[-1]:
            break
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(errors)
    assert errors[-1] == 0


def _codes(root):
    return _tensor(root, "first.codes").astype(int)


def _as_the_compiler_writes_it():
    """A table in codes, and a product of ONNX Runtime's with weights in codes and a zero point that two share."""
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    i8 = draw.integers(-99, 99, (3, 8, 8)).astype("i1")
    table = draw.integers(-99, 99, (30, 8)).astype("i1")
    tensors = {
        "table": table, "table_scale": np.full(30, 0.01, "f4"), "one": np.array([1]),
        "a": i8[0], "b": i8[1], "a_scale": np.full(8, 0.01, "f4"), "b_scale": np.full(8, 0.01, "f4"),
        "zero": np.zeros(8, "i1"), "x_scale": np.array(0.02, "f4"), "x_zero": np.array(128, "u1"),
    }  # fmt: skip
    nodes = [
        helper.make_node("Unsqueeze", ["table_scale", "one"], ["wide"]),
        helper.make_node("Gather", ["table", "ids"], ["g"], axis=0),
        helper.make_node("Gather", ["wide", "ids"], ["h"], axis=0),
        helper.make_node("Cast", ["g"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["c", "h"], ["x"]),
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
    ]
    for name in "ab":
        inputs = ["q", name, "x_scale", f"{name}_scale", "x_zero", "zero"]
        how = {"domain": "com.microsoft"}
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [f"y{name}"], **how))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 4])],
        [helper.make_tensor_value_info(f"y{n}", TensorProto.FLOAT, ["batch", 4, 8]) for n in "ab"],
        [numpy_helper.from_array(v, n) for n, v in tensors.items()],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10)


def test_codes_are_known_where_the_compiler_writes_them(tmp_path):
    import onnx
    import onnxruntime

    from effc.delta import weights as places

    onnx.save(_as_the_compiler_writes_it(), tmp_path / "model.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = places.read(tmp_path, "model.onnx").coded
    assert [(c.codes, c.scale, c.zero, c.axis) for c in found] == [
        ("a", "a_scale", "zero", -1),
        ("b", "b_scale", "zero", -1),
        ("table", "table_scale", None, 0),
    ]
