"""A pass of one's own: `linear(x) * number` becomes one linear layer with a scaled weight and bias.

s · (W x + b)  =  (s W) x + s b
"""

from dataclasses import dataclass

import effc
from effc.ir.edit import is_constant, rebind, replace, tensor_name, tensor_of
from effc.ir.select import op_name


@effc.register
@dataclass(frozen=True, kw_only=True)
class FoldScale(effc.Pass):
    """Folds multiplication by a number into the linear layer in front of it."""

    name = "fold-scale"

    def rewrite(self, graph, stats):
        changed = 0
        for node in graph.nodes:
            if op_name(node) != "mul" or not isinstance(node.args[1], int | float):
                continue
            layer, number = node.args
            tensors = layer.args[1:] if op_name(layer) == "linear" else ()
            owned = all(is_constant(graph, t) and len(t.users) == 1 for t in tensors)
            if not tensors or not owned or len(layer.users) > 1:
                continue
            for tensor in tensors:
                scaled = tensor_of(graph, tensor) * number
                rebind(graph, tensor_name(graph, tensor), scaled, f"times {number:g}")
            replace(graph, node, layer)
            changed += 1
        return changed
