"""Every quantised layer with the error that it makes, and its share of that of the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from effc.case import Case, few, tensors, unmatched
from effc.ir.align import is_weight
from effc.ir.gap import decibel, difference, power
from effc.ir.program import Graph
from effc.ir.select import op_name, site_names
from effc.ir.values import Values, compared
from effc.noise import Local, measured
from effc.quant.ops import DEQUANTIZE

TOKENS = 256
"""Of a batch, as many are looked at: every compile does it, and it should not be what takes the most memory."""


def layer_errors(reference: Graph, graph: Graph, feeds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every layer with an integer weight in order of execution, from one pass over (some rows of) one batch.

    `sqnr_db` is the signal to noise of its output with every error before it, `local_db` with its own alone: that of
    its weight and of the grids on its inputs. `share` is its part of the squared error of the outputs, estimated from
    `rows` of the batch and `probes` random signs for each.
    """
    layers = Layers(reference, graph, few(graph, tensors(graph, feeds), TOKENS))
    return layers.told(layers.measured())


class Layers(Case):
    """Looks at layers whose weights are integers."""

    def measured(self) -> dict[Local, float]:
        """Every layer with an integer weight, and the grids on its inputs; with the signal to noise it has in all."""
        sites = [n for n in self.graph.nodes if self.is_layer(n)]
        grids = [
            n for n in self.graph.nodes if n.target is DEQUANTIZE and n.users.keys() <= set(sites)
        ]
        self.alignment = unmatched(self.alignment, grids)
        weights = [n for n in self.graph.nodes if is_weight(n)]
        mine = Values(self.graph, self.feeds, more=dict.fromkeys([*sites, *weights], 1))
        seen: dict[fx.Node, Tensor] = {}
        reached = {}
        with torch.enable_grad():
            theirs = self.theirs(seen)
            for place, item in enumerate(
                compared(theirs, self.graph, self.alignment, self.feeds, weights=mine)
            ):
                if item.node not in sites:
                    continue
                if item.node not in self.alignment.beside:
                    seen[item.node] = item.theirs
                with torch.no_grad():
                    local = measured(place, item, self.padding)
                    off = difference(mine(item.node), item.theirs.detach())
                    reached[local] = decibel(
                        local.signal, power(self.padding.zeroed(item.node, off))
                    )
            outputs = theirs.outputs()
            with torch.no_grad():
                self.exact = {name: value.detach() for name, value in outputs.items()}
                self.total = self.off(mine.outputs())
            self.estimate(reached, seen, outputs)
        return reached

    def told(self, reached: Mapping[Local, float]) -> list[dict[str, Any]]:
        """Layers as `layer_errors` gives them."""
        names, whole = site_names(self.reference), max(1.0, sum(x.share for x in reached))
        calls = {x: self.call_of(x.node) for x in reached}
        return [
            {
                "site": names[calls[x]],
                "op": op_name(calls[x]),
                "sqnr_db": db,
                "local_db": x.local_db,
                "share": x.share / whole,
                "rows": self.rows,
                "probes": self.probes,
            }
            for x, db in reached.items()
        ]

    def call_of(self, node: fx.Node) -> fx.Node:
        """The call of the reference that became a node."""
        return self.alignment.calls.get(node, self.alignment.values[node])

    def is_layer(self, node: fx.Node) -> bool:
        """Whether a node is a layer whose weight is integers."""
        if any(is_weight(n) and n.meta["val"].dim() > 1 for n in node.all_input_nodes):
            return node in self.alignment.values
        other = self.alignment.values.get(node)
        return other is not None and op_name(other) == "embedding" and op_name(node) == "mul"
