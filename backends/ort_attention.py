"""Attention as ONNX Runtime's kernel is fastest in it: heads side by side, and the cache inside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.backends.onnx_match import initializer, only_consumer, producer, take_over


def heads_side_by_side(graph: ir.Graph) -> None:
    """Attention over [batch, heads, length, size] behind reshapes → over [batch, length, hidden].

    Keys and values that are put behind a past, and repeated for groups of heads, go in as they are: the kernel does
    both (Ainslie et al. 2023 for the groups).
    """
    for node in list(graph):
        if node.op_type != "Attention" or node.domain or len(node.outputs) != 1:
            continue
        merge = merged_heads(node.outputs[0])
        key, value = (_cached(node.inputs[place]) for place in (1, 2))
        if merge is None or (key.past is None) != (value.past is None):
            continue
        if key.past is not None and (
            len(node.inputs) > 4
            or ("is_causal" in node.attributes and node.attributes["is_causal"].as_int())
        ):
            continue
        if not all(side.joined is None or _is_read_by(side, node) for side in (key, value)):
            continue
        sides = [flat(graph, node, side) for side in (node.inputs[0], key.new, value.new)]
        if any(side is None for side in sides):
            continue
        query, keys, values = (side for side in sides if side is not None)
        if (
            keys[1] != values[1]
            or query[1] != keys[1] * key.repeats
            or key.repeats != value.repeats
        ):
            continue
        inputs: list[ir.Value | None] = [query[0], keys[0], values[0], *node.inputs[3:]]
        if key.past is not None:
            inputs += [None] * (4 - len(inputs)) + [key.past, value.past]
        attributes = dict(node.attributes)
        attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", query[1])
        attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", keys[1])
        new = ir.Node(
            "", "Attention", inputs, list(attributes.values()), name=node.name,
            num_outputs=3 if key.past is not None else 1,
        )  # fmt: skip
        graph.insert_before(node, new)
        give_merged(merge, new.outputs[0])
        for made, side in zip(new.outputs[1:], (key, value), strict=False):
            assert side.joined is not None
            take_over(side.joined, made)


def _is_read_by(side: _Side, node: ir.Node) -> bool:
    """Whether an attention alone reads joined keys or values, perhaps repeated: others would wait for its output."""
    reader, value = node, side.joined
    assert value is not None
    while True:
        readers = {use.node for use in value.uses()}
        if readers == {reader}:
            return True
        if len(readers) != 1:
            return False
        (between,) = readers
        if between.op_type not in ("Unsqueeze", "Expand", "Reshape"):
            return False
        value = between.outputs[0]


@dataclass(frozen=True)
class _Side:
    """Keys or values of an attention: the new ones, those before, both joined, and how often a head is repeated."""

    new: ir.Value | None
    past: ir.Value | None = None
    joined: ir.Value | None = None
    repeats: int = 1


def _cached(value: ir.Value | None) -> _Side:
    value, repeats = repeated(value)
    join = producer(value, "Concat")
    if join is None or len(join.inputs) != 2 or join.attributes.get_int("axis", 0) not in (-2, 2):
        return _Side(value, repeats=repeats)
    past, new = join.inputs
    return _Side(new, past, join.outputs[0], repeats)


def repeated(value: ir.Value | None) -> tuple[ir.Value | None, int]:
    """What is repeated head by head, [batch, heads, length, size], and how often; the value itself where it is not."""
    reshape = producer(value, "Reshape")
    expand = producer(reshape.inputs[0], "Expand") if reshape else None
    raised = producer(expand.inputs[0], "Unsqueeze") if expand else None
    if reshape is None or expand is None or raised is None or raised.inputs[0] is None:
        return value, 1
    source = raised.inputs[0]
    shapes = (
        source.shape,
        raised.outputs[0].shape,
        expand.outputs[0].shape,
        reshape.outputs[0].shape,
    )
    if any(shape is None for shape in shapes):
        return value, 1
    before, one, many, after = (
        [size_of(n) for n in shape] for shape in shapes if shape is not None
    )
    if len(before) != 4 or one != [*before[:2], 1, *before[2:]]:
        return value, 1
    heads, repeats = before[1], many[2] if len(many) == 5 else None
    if not isinstance(heads, int) or not isinstance(repeats, int):
        return value, 1
    if many != [*before[:2], repeats, *before[2:]] or after != [
        before[0],
        heads * repeats,
        *before[2:],
    ]:
        return value, 1
    return source, repeats


def size_of(size: int | ir.SymbolicDim) -> int | str:
    return size if isinstance(size, int) else str(size.value)


def flat(graph: ir.Graph, before: ir.Node, value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """A value [batch, heads, length, size] as [batch, length, hidden], turned by its positions there, and its heads."""
    if (found := _split_heads(value)) is not None:
        return found
    rotary = producer(value, "RotaryEmbedding")
    if rotary is not None and not rotary.domain:
        inner = flat(graph, before, rotary.inputs[0])
        if inner is None:
            return None
        attributes = {**rotary.attributes, "num_heads": ir.AttrInt64("num_heads", inner[1])}
        turned = ir.Node(
            "", "RotaryEmbedding", [inner[0], *rotary.inputs[1:]], list(attributes.values()),
            name=rotary.name,
        )  # fmt: skip
        return _placed(graph, before, turned, rotary.outputs[0], inner[0].shape), inner[1]
    transpose = producer(value, "Transpose")
    if transpose is None or list(transpose.attributes.get_ints("perm", [])) != [0, 2, 1, 3]:
        return None
    split = transpose.inputs[0]
    if split is None or split.shape is None or len(split.shape) != 4:
        return None
    heads, size = split.shape[2], split.shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    shape = initializer(graph, "side.by.side", np.array([0, 0, -1], np.int64))
    beside = ir.node("Reshape", [split, shape], name=transpose.name)
    made = ir.Shape([split.shape[0], split.shape[1], heads * size])
    return _placed(graph, before, beside, transpose.outputs[0], made), heads


def _placed(
    graph: ir.Graph, before: ir.Node, node: ir.Node, old: ir.Value, shape: ir.Shape | None
) -> ir.Value:
    graph.insert_before(before, node)
    made = node.outputs[0]
    made.name, made.type, made.shape = f"{old.name}.flat", old.type, shape
    return made


def mask_every_query(graph: ir.Graph) -> None:
    """Spread a mask that is the same for every query over the queries: the kernel does not."""
    made: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    for node in list(graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        query = node.inputs[0]
        if mask is None or mask.shape is None or query is None or query.shape is None:
            continue
        if node.domain or len(mask.shape) < 2 or mask.shape[-2] != 1:
            continue
        axis = len(query.shape) - 2
        if query.shape[axis] == 1:
            continue
        if (mask, query) not in made:
            made[mask, query] = _spread(graph, node, mask, query, axis)
        node.replace_input_with(3, made[mask, query])


def _spread(
    graph: ir.Graph, before: ir.Node, mask: ir.Value, query: ir.Value, axis: int
) -> ir.Value:
    name = f"{mask.name}.of.{query.name}"
    one = initializer(graph, "one.of.shape", np.array([1], np.int64))
    size = ir.node(
        "Shape", [query], attributes={"start": axis, "end": axis + 1}, name=f"{name}.size"
    )
    shape = ir.node("Concat", [size.outputs[0], one], attributes={"axis": 0}, name=f"{name}.shape")
    spread = ir.node("Expand", [mask, shape.outputs[0]], name=name)
    for node in (size, shape, spread):
        node.outputs[0].name = node.name
        graph.insert_before(before, node)
    spread.outputs[0].type = mask.type
    return spread.outputs[0]


def _split_heads(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """What is reshaped and transposed into heads, and how many heads there are."""
    transpose = producer(value, "Transpose")
    if transpose is None or list(transpose.attributes.get_ints("perm", [])) != [0, 2, 1, 3]:
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    if reshape is None or reshape.inputs[0] is None:
        return None
    source, heads = reshape.inputs[0], _heads(reshape.inputs[0].shape, reshape.outputs[0].shape)
    return (source, heads) if heads is not None else None


def _heads(merged: ir.Shape | None, split: ir.Shape | None) -> int | None:
    """How many heads [batch, length, hidden] is split into, where nothing but the last axis is split."""
    if merged is None or split is None or len(merged) != 3 or len(split) != 4:
        return None
    heads, size = split[2], split[3]
    if not isinstance(heads, int) or not isinstance(size, int) or merged[2] != heads * size:
        return None
    same = all(
        str(a) == str(b) and str(a) != "None" for a, b in zip(merged[:2], split[:2], strict=True)
    )
    return heads if same else None


def merged_heads(value: ir.Value) -> ir.Node | None:
    """The reshape that puts heads side by side again, behind its transpose: [batch, length, hidden] or rows of it."""
    transpose = only_consumer(value, "Transpose")
    if transpose is None or list(transpose.attributes.get_ints("perm", [])) != [0, 2, 1, 3]:
        return None
    reshape = only_consumer(transpose.outputs[0], "Reshape")
    split = transpose.outputs[0].shape
    shape = reshape.outputs[0].shape if reshape is not None else None
    if split is None or shape is None or len(split) != 4:
        return None
    heads, size = split[2], split[3]
    is_of_rows = (
        len(shape) == 2 and isinstance(heads, int) and isinstance(size, int)
        and shape[1] == heads * size
    )  # fmt: skip
    return reshape if is_of_rows or _heads(shape, split) is not None else None


def give_merged(reshape: ir.Node, value: ir.Value) -> None:
    """Let who reads the reshape of `merged_heads` read `value` [batch, length, hidden], as rows where it has rows."""
    old = reshape.outputs[0]
    if old.shape is not None and len(old.shape) == 3:
        take_over(old, value)
        return
    given = reshape.inputs[0]
    assert given is not None and given.shape is not None and old.shape is not None
    value.name, value.type = f"{old.name}.side.by.side", old.type
    value.shape = ir.Shape([*given.shape[:2], old.shape[1]])
    reshape.replace_input_with(0, value)


def rotary_for_every_row(graph: ir.Graph) -> None:
    """Give RotaryEmbedding tables of the batch's size: the exporter leaves them at 1, which the kernel refuses."""
    made: dict[tuple[str, ir.Value | None], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) > 3:
            continue
        x = node.inputs[0]
        for place in (1, 2):
            table = node.inputs[place]
            wave = table.producer() if table is not None else None
            if x is None or table is None or wave is None or wave.op_type not in ("Cos", "Sin"):
                continue
            angles = wave.inputs[0]
            if angles is None or angles.shape is None or angles.shape[0] != 1:
                continue
            key = (wave.op_type, angles)
            if key not in made:
                made[key] = _expanded(graph, node, x, table)
            node.replace_input_with(place, made[key])


def _expanded(graph: ir.Graph, before: ir.Node, x: ir.Value, table: ir.Value) -> ir.Value:
    """`table` [1, length, size] repeated to [batch of x, length, size]."""
    batch = ir.node("Shape", [x], attributes={"start": 0, "end": 1})
    rest = ir.node("Shape", [table], attributes={"start": 1})
    shape = ir.node("Concat", [batch.outputs[0], rest.outputs[0]], attributes={"axis": 0})
    wide = ir.node("Expand", [table, shape.outputs[0]])
    for word, node in (("batch", batch), ("rest", rest), ("shape", shape), ("wide", wide)):
        node.outputs[0].name = f"{table.name}_{word}"
        graph.insert_before(before, node)
    return wide.outputs[0]
