"""The cache of a language model held by OpenVINO from one run to the next, in the place of its ports.

A port of a past and that of its present become a variable. The processor's plugin then computes attention and the
growing of the cache in one kernel, which writes what is new behind what is there; with ports the whole cache is copied
at every token. It finds that kernel where rows of the cache are picked by `beam_idx`, as a search along several beams
needs it; here every row stays where it is.

From outside the engine still has the ports of its file: a past that is an array is put into the variables, and what it
gives for `present` is read from them. Who carries the cache on is given what stands for it, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as op
from openvino._offline_transformations import apply_make_stateful_transformation

from effc.backends.base import Array, EngineBase, Port, cannot_run
from effc.causal import PAST, PRESENT
from effc.errors import UsageError

BEAMS = "beam_idx"
IDS, MASK = "input_ids", "attention_mask"
STEPS = 32
"""Tokens that a cache may be longer than it was asked for while an engine is timed."""


def pairs(names: Collection[str]) -> dict[str, str]:
    """The output that goes on in each input of a cache."""
    return {name: name.replace(PAST, PRESENT, 1) for name in names if name.startswith(f"{PAST}.")}


def stateful(model: Any) -> Any:
    """A model whose ports of a cache have become variables; without any position in them it begins."""
    parameters = {value.get_any_name(): value.get_node() for value in model.inputs}
    joined = pairs(parameters)
    beams = op.parameter([-1], np.int32, name=BEAMS)
    beams.output(0).get_tensor().set_names({BEAMS})
    for name in joined:
        readers = parameters[name].output(0).get_target_inputs()
        picked = op.gather(parameters[name], beams, op.constant(0, np.int64))
        for reader in readers:
            reader.replace_source_output(picked.output(0))
    model.add_parameters([beams])
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, joined)
    rows = op.gather(
        op.shape_of(parameters[IDS]), op.constant([0], np.int64), op.constant(0, np.int64)
    )
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            rest = op.constant([heads.get_length(), 0, size.get_length()], np.int64)
            zero = op.constant(0, node.get_output_element_type(0))
            node.set_arguments([op.broadcast(zero, op.concat([rows, rest], 0))])
    model.validate_nodes_and_infer_types()
    return model


@dataclass(frozen=True, eq=False)
class Held:
    """Stands for every port of a cache that an engine holds, until that runs again."""

    engine: StatefulEngine
    rows: int
    positions: int


class StatefulEngine(EngineBase):
    """A compiled model that holds its cache; `inputs` and `outputs` are the ports of its file."""

    def __init__(
        self, path: Path, compiled: Any, inputs: Sequence[Port] = (), outputs: Sequence[Port] = ()
    ) -> None:
        self._path, self.compiled = path, compiled
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._request: Any = compiled.create_infer_request()
        self._taken = [value.get_any_name() for value in compiled.inputs]
        self._given = [value.get_any_name() for value in compiled.outputs]
        # a variable is called as its two ports, one behind the other
        self._states = {
            state.name.partition(PRESENT)[0]: state for state in self._request.query_state()
        }
        self._held: Held | None = None
        self._begun: Any = None

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """A cache that comes as arrays goes out as arrays; one that is held stays."""
        caches = list(pairs(self._states).values())
        return self.carry(feeds, self._given if self._holds(feeds) else [*self._given, *caches])

    def carry(self, feeds: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Any]:
        if not self._holds(feeds):
            self._load(feeds)
        assert self._held is not None
        rows, length = feeds[IDS].shape
        before = self._held
        if rows != before.rows or feeds[MASK].shape != (rows, before.positions + length):
            raise UsageError(
                f"the engine holds a cache of {before.rows} rows and {before.positions} positions, and is fed "
                f"{IDS} {[rows, length]} with a mask {list(feeds[MASK].shape)}",
                hint="a mask is as long as the cache and the new tokens; other prompts begin with an empty cache",
            )
        given = {n: np.ascontiguousarray(feeds[n]) for n in self._taken if n != BEAMS}
        given[BEAMS] = np.arange(rows, dtype=np.int32)
        self._held = None  # nobody knows what is held where a run fails half way
        try:
            found = self._request.infer(given, share_inputs=True, share_outputs=True)
        except Exception as error:
            raise cannot_run("openvino", self._path, given, self.inputs, error) from error
        self._held = Held(self, rows, before.positions + length)
        made: dict[str, Any] = {n: np.array(found[i]) for i, n in enumerate(self._given)}
        for past, present in pairs(self._states).items():
            made[present] = self.read(past) if present in wanted else self._held
        return made

    def ready(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._holds(feeds):
            return feeds
        first = feeds[next(iter(self._states))]
        past = first.shape[2]
        if not past:
            self._load(feeds)
            return self._carried(feeds)
        held = self._held
        if held is None or self._begun is not first or held.positions - past > STEPS:
            self._load(feeds)
            self.carry(self._carried(feeds), ())  # makes room for the steps behind it
            self._begun, held = first, self._held
        assert held is not None
        mask = feeds[MASK]
        longer = np.ones((held.rows, held.positions - past), mask.dtype)
        mask = np.concatenate([mask[:, :past], longer, mask[:, past:]], axis=1)
        return {**self._carried(feeds), MASK: mask}

    def read(self, past: str) -> Array:
        """Keys or values of a layer, as they are held."""
        return np.array(self._states[past].state.data)

    def _carried(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {**feeds, **dict.fromkeys(self._states, self._held)}

    def _holds(self, feeds: Mapping[str, Any]) -> bool:
        return self._held is not None and all(feeds[name] is self._held for name in self._states)

    def _load(self, feeds: Mapping[str, Any]) -> None:
        """Put a cache that came from elsewhere into the variables."""
        arrays = {name: _array(feeds[name], name) for name in self._states}
        shapes = {array.shape[::2] for array in arrays.values()}
        if len(shapes) != 1:
            raise UsageError(
                f"the layers of a cache have other rows or positions: {sorted(shapes)}",
                hint="feed what one run of the model gave",
            )
        ((rows, positions),) = shapes
        self._held = self._begun = None
        self._request.reset_state()
        for name, array in arrays.items() if positions else ():
            self._states[name].state = openvino.Tensor(np.ascontiguousarray(array))
        self._held = Held(self, rows, positions)

    def close(self) -> None:
        self._held = self._begun = self._request = self.compiled = None
        self._states = {}


def _array(value: Any, name: str) -> Array:
    """A cache as an array, from whichever engine holds it."""
    if not isinstance(value, Held):
        return np.asarray(value)
    if value is not value.engine._held:
        raise UsageError(
            f"{name} stands for a cache that its engine holds no more: it has run since, or begun anew",
            hint="carry on what the last run gave, or begin with an empty cache",
        )
    return value.engine.read(name)
