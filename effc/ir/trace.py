"""From an `nn.Module` to a `Program`: one `torch.export`, whose free dimensions carry names.

Dimensions are found by export itself and named afterwards, because a name declared beforehand makes export fail
wherever the model bounds the dimension (512 positions, say) without being told.
"""

from __future__ import annotations

import inspect
import keyword
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from effc.errors import TraceError, first_line
from effc.ir import known, repeat
from effc.ir.edit import know
from effc.ir.program import Graph, Origin, Program
from effc.ir.select import module_path
from effc.quiet import quiet

log = logging.getLogger(__name__)

Dims = Mapping[str, Mapping[int, str]]


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    *,
    dims: Dims | None = None,
    role: str = "main",
) -> Program:
    """Trace `module` on example `inputs` into a program of one graph.

    `dims` names the free dimensions, `{"input_ids": {0: "batch", 1: "sequence"}}`; without it the first dimension
    of every input is `batch` where they agree. A dimension to be free must be at least 2 in the example.
    Raises TraceError where the module cannot be exported, with the first reason that torch gives and the line
    of the model that it is about.
    """
    feeds = named_inputs(module, inputs)
    dims = _default_dims(feeds) if dims is None else dims
    for name, axes in dims.items():
        for axis, word in axes.items():
            if name in feeds and feeds[name].shape[axis] < 2:
                raise TraceError(
                    f"dimension {word!r} of input {name!r} is {feeds[name].shape[axis]} in the example",
                    hint="give an example of size 2 or more wherever a dimension is to stay free",
                )
    try:
        with evaluating(module), _quiet():
            exported = _export_repeating(module, feeds, dims) or _export(module, feeds, dims)
    except Exception as error:
        raise TraceError(
            f"torch.export refused {type(module).__name__}: {first_line(error)}",
            where=_place(error),
            hint=_hint(error),
        ) from error
    graph = _graph(exported, tuple(feeds), dims, role)
    return Program({role: graph})


def _hint(error: Exception) -> str:
    whole = "run with --debug for torch's whole explanation"
    if isinstance(error, GuardOnDataDependentSymNode):
        return (
            "a size or a branch hangs on the values of an input; make what decides it inside forward from numbers "
            f"(torch.tensor([[1, 4, 4]])), or move that line out of the model; {whole}"
        )
    return whole


def named_inputs(
    module: nn.Module, inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor
) -> dict[str, Tensor]:
    """Example inputs by name; where none is given, the names are those of forward's parameters."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    names = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(names) < len(inputs):
        raise TraceError(
            f"forward takes {len(names)} inputs but {len(inputs)} examples were given",
            hint="give example inputs by name, or in the order of forward's parameters",
        )
    return dict(zip(names, inputs, strict=False))


def _default_dims(feeds: Mapping[str, Tensor]) -> Dims:
    sizes = {tensor.shape[0] for tensor in feeds.values() if tensor.dim()}
    if len(sizes) != 1 or min(sizes) < 2:
        return {}
    return {name: {0: "batch"} for name, tensor in feeds.items() if tensor.dim()}


def _export_repeating(
    module: nn.Module, feeds: dict[str, Tensor], dims: Dims
) -> ExportedProgram | None:
    """The same as `_export` with every kind of layer traced once; None where layers do not repeat."""
    try:
        with repeat.marked(module) as repeats:
            if repeats is None:
                return None
            exported = _exported(module, feeds, dims)
        if repeats.are_copied and _needs_functional(exported):
            return None
        repeat.expand(exported, repeats)
        if repeats.are_copied and not _computes_as(exported, module, feeds):
            return None
        return _functional(exported)
    except Exception as error:  # whatever is wrong with the model itself is found again
        log.info("layers do not repeat: %s", first_line(error))
    return None


def _computes_as(exported: ExportedProgram, module: nn.Module, feeds: dict[str, Tensor]) -> bool:
    """Whether the copies of a layer compute what the layers do. What the module writes is written to copies."""
    state = {**exported.state_dict, **exported.constants}
    lifted = [state[s.target] for s in exported.graph_signature.input_specs if s.target is not None]
    given = {name: value.clone() for name, value in feeds.items()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        found = exported.graph_module(*lifted, *feeds.values())
        wanted = pytree.tree_leaves(torch.func.functional_call(module, buffers, (), given))
    return len(wanted) == len(found) and all(map(_is_same, wanted, found))


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, beside values of usual size: a mask's −10³⁸ must not hide the others."""
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    finite = a.isfinite()
    a, b, equal = a[finite], b[finite], torch.equal(finite, b.isfinite())
    scale = float(a.abs().median()) if a.numel() else 0.0
    return equal and torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale)


def _export(module: nn.Module, feeds: dict[str, Tensor], dims: Dims) -> ExportedProgram:
    return _functional(_exported(module, feeds, dims))


def _exported(module: nn.Module, feeds: dict[str, Tensor], dims: Dims) -> ExportedProgram:
    taken = inspect.signature(module.forward).parameters
    words = {name: name if name in taken else spelled(name) for name in feeds}
    shapes = {words[name]: dict.fromkeys(dims.get(name, {}), Dim.AUTO) for name in feeds}
    given = {words[name]: value for name, value in feeds.items()}
    with torch.no_grad(), known.numbers():
        try:
            exported = torch.export.export(module, (), kwargs=given, dynamic_shapes=shapes)
        except GuardOnDataDependentSymNode:  # seldom: more is known where it must be
            with known.Tables():
                exported = torch.export.export(module, (), kwargs=given, dynamic_shapes=shapes)
    # torch 2.13 forgets readers of outputs where it inlines a part that ran without gradients
    for node in exported.graph.nodes:
        for source in node.all_input_nodes:
            source.users.setdefault(node)
    return known.folded(exported)


def spelled(name: str) -> str:
    """The name of an input as Python can spell a parameter."""
    word = re.sub(r"\W", "_", name)
    is_own = word.isidentifier() and not keyword.iskeyword(word) and word != "self"
    return word if is_own else f"_{word}"


def _functional(exported: ExportedProgram) -> ExportedProgram:
    if _needs_functional(exported):
        exported = exported.run_decompositions({})
    return exported


def _needs_functional(exported: ExportedProgram) -> bool:
    """Whether the graph writes into tensors or holds sub-graphs, which passes must not meet."""
    for node in exported.graph.nodes:
        if node.op == "get_attr":
            return True
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            return True
    return False


def _graph(exported: ExportedProgram, inputs: tuple[str, ...], dims: Dims, role: str) -> Graph:
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    user = exported.graph_signature.user_inputs
    names: dict[str, str] = {}
    for name, placeholder in zip(inputs, user, strict=True):
        value = placeholders[str(placeholder)].meta["val"]
        for axis, word in dims.get(name, {}).items():
            size = value.shape[axis]
            if isinstance(size, int):
                log.warning("dimension %r of %r is fixed to %d by the model", word, name, size)
            else:
                names.setdefault(str(size), word)
    tensors = exported.graph_signature.input_specs
    origins = {s.target: Origin(s.target) for s in tensors if s.target is not None}
    graph = Graph(role, exported, inputs, output_names(exported.call_spec.out_spec), names, origins)
    for node in graph.nodes:
        know(node)
    _refuse_odd_outputs(graph)
    return graph


def output_names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    """Names of the outputs: keys where the model returns a mapping, `output`, `output_1` … elsewhere."""
    tree = pytree.tree_unflatten(range(spec.num_leaves), spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    names = []
    for position, (path, _) in enumerate(paths):
        keys = [str(k.key) for k in path if isinstance(k, pytree.MappingKey)]
        rest = [str(k.idx) for k in path if isinstance(k, pytree.SequenceKey)]
        if keys:
            names.append(".".join(keys + rest))
        else:
            names.append("output" if len(paths) == 1 else f"output_{position}")
    return tuple(names)


def _refuse_odd_outputs(graph: Graph) -> None:
    (output,) = [n for n in graph.fx.nodes if n.op == "output"]
    for name, node in zip(graph.outputs, output.args[0], strict=True):
        if not isinstance(getattr(node, "meta", {}).get("val"), Tensor):
            raise TraceError(f"output {name!r} is not a tensor", hint="return tensors only")


def refuse_chance(graph: Graph) -> None:
    """Raise TraceError where numbers are drawn anew at every run: nothing is left to hold an engine against."""
    for node in graph.nodes:
        if node.users and _draws(node):
            word = str(node.target.overloadpacket.__name__)  # type: ignore[union-attr]
            raise TraceError(
                f"{node.name} draws random numbers at every run ({word})",
                where=module_path(node) or None,
                hint="give what is drawn as an input of the model, or set it to its mean",
            )


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operator draws numbers; those that can be told not to say so by `train` or by `p`."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    switch = next((word for word in ("train", "training", "dropout_p") if word in names), None)
    return switch is None or bool(given.get(switch, switch != "dropout_p" and switch != "training"))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every part of a module in evaluation mode, and each in its own mode again afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on its own internals; it prints graphs that it gave up on."""
    names = ("torch.export", "torch.fx", "torch._export", "torch._subclasses")
    with quiet(*names, level=logging.CRITICAL), redirect_stderr(StringIO()):
        yield


_NOT_THE_MODEL = {"effc", "torch", "sympy", "mpmath", "numpy", *sys.stdlib_module_names}


def _place(error: BaseException | None) -> str | None:
    """The line of the model's own code that an error came out of, where there is one."""
    while error is not None:
        for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
            module = str(frame.f_globals.get("__name__", "torch")).partition(".")[0]
            if module == "__main__" or module not in _NOT_THE_MODEL:
                return f"{frame.f_code.co_name}, {frame.f_code.co_filename} line {line}"
        error = error.__cause__ or error.__context__
    return None
