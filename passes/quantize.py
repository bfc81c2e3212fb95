"""Post-training quantisation: weights become integers, activations get ranges, the graph says where.

    y = W x + b    →    y = dequantize(W_q) · dequantize(quantize(x)) + b

Weights are stored as integers, per output channel; activations take the type that the target's kernels are fast in.
A tensor that several layers share is quantised once and stays shared. A value that several layers read is quantised
once and read by all of them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, fx

from effc.calib.collectors import COLLECTORS, Channels, Gram, MinMax
from effc.calib.probe import Probe
from effc.dialect import Dialect
from effc.errors import PreconditionError
from effc.ir.edit import insert, insert_after, is_constant, lift, replace, tensor_name, tensor_of
from effc.ir.program import Graph, Origin, Program
from effc.ir.select import Select, Words, op_name, site_names, value_key
from effc.ir.splice import is_spliced
from effc.passes.base import Pass, Stats
from effc.passes.fuse import foldable
from effc.passes.split import halves, power_of_two
from effc.quant.affine import SMALLEST, dequantize, qparams, quantize, steady, weight_qparams
from effc.quant.channels import channels, columns
from effc.quant.gptq import gptq
from effc.quant.ops import DEQUANTIZE, QUANTIZE
from effc.quant.scheme import Scheme

aten = torch.ops.aten
log = logging.getLogger(__name__)

ACTIVATIONS_BEHIND_CONV = ("relu", "relu_", "relu6", "hardtanh", "clamp")
SAME_GRID = ("max_pool2d",)
"""Operators that give back some of the values that they read: on the grid of those they run on integers."""
NEVER_NEGATIVE = ("relu", "relu_", "relu6", "sigmoid", "softmax")
INT16_MAX = 2**15 - 1
SMALL_EMBEDDING = 0.01
"""An embedding table under this share of the model's bytes stays in float: nothing to gain, something to lose."""


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Quantises linear layers, convolutions and embeddings with constant weights.

    `activation_bits` 16 leaves activations in float (weight-only). `group` splits each weight row into blocks with
    a scale each, for weight-only kernels, and `weight_symmetric` false gives each a zero point too. `dtype` fp8 has
    floating point codes of 8 bit, e4m3, in place of integers on both sides of a product, and the largest magnitude for
    a range: a narrower one rounds no finer. `range` chooses activation ranges: `mse` (least squared error),
    `percentile`, or `minmax`; `weight_range` does it for weights. Weights of `wide` modules (shell patterns) have 8 bit
    whatever `bits` says: a first and a last stage are few of the bytes and most of the error. `rounding` gptq chooses
    the codes of linear layers by what they cost at the outputs, on calibration data (`effc.quant.gptq`).
    `activation_scale` token gives every row of the last axis a scale of its own, its largest magnitude, found as the
    engine runs, so that a token with huge values costs the others nothing (Yao et al. 2022, section 4.1).
    `bias_correction` adds to every bias what rounding the weights takes from the mean of the layer's output (Nagel et
    al. 2019, section 4.2): b + (W - Ŵ) E[x].
    """

    name = "quantize"
    effect = "lossy"

    dtype: Literal["int", "fp8"] = "int"
    bits: Literal[3, 4, 5, 6, 7, 8] = 8
    wide: Words = ()
    activation_bits: Literal[3, 4, 5, 6, 7, 8, 16] = 8
    range: Literal["mse", "minmax", "percentile"] = "mse"
    percentile: Annotated[float, Field(gt=0, le=100)] = 99.99
    weight_range: Literal["minmax", "mse"] = "minmax"
    weight_symmetric: bool = True
    rounding: Literal["nearest", "gptq"] = "nearest"
    group: Annotated[int, Field(ge=1)] | None = None
    activation_scale: Literal["tensor", "token"] = "tensor"
    table_bits: Literal[4, 8] = 8
    """Bits of a table that is looked up, and of an output layer that shares it; 4 needs a `group`."""
    bias_correction: bool = False
    select: Select = field(default_factory=Select)
    activation_signed: bool | None = None
    activation_symmetric: bool | None = None
    ops: tuple[str, ...] = ()
    """Operators to quantise; the target's own list where empty."""
    conv_output: bool | None = None
    conv_bias_int32: bool | None = None
    joins_codes: bool | None = None
    """Round the halves of a concatenation that `split-concat` scaled each by its own step, and join the integers."""
    conv_residual: bool | None = None
    """Let residual sums read the integers that a convolution beside them reads."""
    overflow_fix: bool | None = None
    """Widen weight scales so that two neighbouring products always fit in 16 bit (`pair_scale`)."""

    def resolve(self, dialect: Dialect) -> Self:
        def given(value: Any, otherwise: Any) -> Any:
            return otherwise if value is None else value

        if self._is_fp8 and not dialect.fp8:
            raise PreconditionError(
                f"quantize: target {dialect.name} has no kernels for dtype fp8",
                hint="`--target tensorrt` has, on GPUs of capability 8.9 and above; bits: 8 is fast everywhere",
            )
        if self._of_tokens and not dialect.token_scales:
            raise PreconditionError(
                f"quantize: target {dialect.name} has no kernels for activation_scale token",
                hint="leave it out; `--target ort` has",
            )
        if self.table_bits == 4 and not dialect.narrow_tables:
            raise PreconditionError(
                f"quantize: target {dialect.name} looks up no rows in 4 bit",
                hint="leave table_bits out; `--target ort` does",
            )
        if not self.weight_symmetric and not dialect.weight_zero_point:
            raise PreconditionError(
                f"quantize: target {dialect.name} takes no weights with a zero point",
                hint="leave weight_symmetric out, or take the target ort, openvino or onnx",
            )
        return dataclasses.replace(
            self,
            activation_signed=given(self.activation_signed, dialect.activation.signed),
            activation_symmetric=given(self.activation_symmetric, dialect.activation.symmetric),
            ops=self.ops or dialect.quantized_ops,
            conv_output=given(self.conv_output, dialect.conv_output),
            conv_bias_int32=given(self.conv_bias_int32, dialect.conv_bias_int32),
            conv_residual=given(self.conv_residual, dialect.conv_residual),
            joins_codes=given(self.joins_codes, dialect.joins_codes),
            overflow_fix=given(self.overflow_fix, dialect.overflow_fix),
        )

    @property
    def _is_fp8(self) -> bool:
        return self.dtype == "fp8"

    @property
    def _activation(self) -> Scheme:
        if self._is_fp8:
            return Scheme(fp8=True)
        return Scheme(
            bits=self.activation_bits,
            signed=bool(self.activation_signed),
            symmetric=bool(self.activation_symmetric),
            narrow=False,
        )

    @property
    def measures(self) -> bool:
        ranges = self._static and not self._of_tokens
        return ranges or self.bias_correction or self.measures_again

    @property
    def _of_tokens(self) -> bool:
        return self.activation_scale == "token"

    @property
    def measures_again(self) -> bool:
        return self.rounding == "gptq"

    @property
    def _static(self) -> bool:
        return self.activation_bits != 16

    @property
    def _pair_limit(self) -> int | None:
        """What two neighbouring weight codes may add up to beside activations of this type; None is no limit."""
        if not self.overflow_fix or not self._static or self._is_fp8:
            return None
        scheme = self._activation
        if self._of_tokens:
            return INT16_MAX // 255
        return INT16_MAX // (scheme.high - scheme.low)  # kernels shift signed codes to unsigned

    def requires(self, program: Program) -> None:
        if self._is_fp8 and (self.bits, self.activation_bits, self.group) != (8, 8, None):
            raise PreconditionError(
                "quantize: dtype fp8 has 8 bits on both sides of a product, and no groups",
                hint="leave bits, activation_bits and group out",
            )
        if self._is_fp8 and self.rounding != "nearest":
            raise PreconditionError(
                f"quantize: rounding {self.rounding} is for integers, not for dtype fp8",
                hint="leave rounding out",
            )
        if self._is_fp8 and self.range == "percentile":
            raise PreconditionError(
                "quantize: a range of dtype fp8 is the largest magnitude, not a percentile",
                hint="leave range out",
            )
        if self._of_tokens and (self._is_fp8 or not self._static):
            raise PreconditionError(
                "quantize: activation_scale token is for integer activations",
                hint="leave dtype out and set activation_bits to 8, or leave activation_scale out",
            )
        if self.group and self._static:
            raise PreconditionError(
                "quantize: group is for weights beside float activations; no integer kernel takes it otherwise",
                hint="set activation_bits to 16, or leave group out",
            )
        if not self.weight_symmetric and self._static:
            raise PreconditionError(
                "quantize: weights with a zero point are for float activations; no integer kernel takes them otherwise",
                hint="set activation_bits to 16, or leave weight_symmetric out",
            )
        if self.table_bits == 4 and not self.group:
            raise PreconditionError(
                "quantize: a table in 4 bit needs a group", hint="add group: 32"
            )
        for graph in program:
            if not self.takes(graph.role):
                continue
            chosen = set(self.sites(graph))
            for _, layer, *_ in foldable(graph):
                if layer in chosen:
                    raise PreconditionError(
                        f"quantize wants final weights, but {layer.name!r} has a batch norm behind it",
                        where=f"graph {graph.role!r}",
                        hint="put `fold-batchnorm` before `quantize`",
                    )
            if not chosen and self.select != Select():
                everything = dataclasses.replace(self, select=Select()).sites(graph)
                raise PreconditionError(
                    f"select matches none of the {len(everything)} places that quantize could take",
                    where=f"graph {graph.role!r}",
                    hint="`effc inspect MODEL` names them",
                )
            if self.wide and chosen and not any(self._is_wide(node) for node in chosen):
                raise PreconditionError(
                    f"wide matches none of the {len(chosen)} places that quantize takes",
                    where=f"graph {graph.role!r}",
                    hint="`effc inspect MODEL` names them",
                )

    def _is_wide(self, site: fx.Node) -> bool:
        """Whether the weight of a site has 8 bit whatever the others have."""
        return bool(self.wide) and Select(module=self.wide).matches(site)

    def sites(self, graph: Graph) -> list[fx.Node]:
        """Nodes that this pass would quantise, in order of execution."""
        ops = self.ops or Dialect(name="", opset=0).quantized_ops
        floor = SMALL_EMBEDDING * graph.weight_bytes()
        if self._of_tokens:  # a convolution has no rows of its own for each token
            ops = tuple(op for op in ops if not op.startswith("conv"))
        return [n for n in self.select.sites(graph) if op_name(n) in ops and _fits(graph, n, floor)]

    def probes(self, graph: Graph) -> Iterable[Probe]:
        names, sites = site_names(graph), self.sites(graph)
        compensated = self._compensated(sites)
        for node in sites:
            if op_name(node) == "embedding":
                continue
            value = node.args[0]
            assert isinstance(value, fx.Node)
            if weight_of(node) in compensated:
                yield Probe(key=_gram_key(graph, names, node), node=value, collector=Gram())
            if self.bias_correction and constant_bias(graph, node) is not None:
                key = _mean_key(graph, names, node)
                yield Probe(key=key, node=value, collector=Channels(_channel_axis(node)))
            if not self._static or self._of_tokens:
                continue
            yield Probe(
                key=value_key(graph, names, value),
                node=value,
                collector=self._collector(),
            )
            if op_name(node).startswith("conv") and self.conv_output:
                end = end_of(node)
                yield Probe(
                    key=value_key(graph, names, end),
                    node=end,
                    collector=self._collector(),
                )

    def _compensated(self, sites: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """Weights whose codes make up for each other, with the linear layers that read them; no table is among them."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for site in sites if self.rounding == "gptq" else ():
            found.setdefault(weight_of(site), []).append(site)
        return {w: s for w, s in found.items() if all(op_name(n) == "linear" for n in s)}

    def _collector(self) -> Any:
        if self._is_fp8:
            return MinMax()
        kind = COLLECTORS[self.range]
        return kind(self.percentile) if self.range == "percentile" else kind()

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        sites = self.sites(graph)
        if not sites:
            return 0
        return self._quantised(Work(self, graph, stats, site_names(graph)), sites)

    def _quantised(self, work: Work, sites: list[fx.Node]) -> int:
        schemes = _weight_schemes(self, work.graph, sites)
        for node in sites:
            weight_node = weight_of(node)
            weight = work.weight(node, weight_node, schemes[weight_node])
            if op_name(node) == "embedding":
                work.embedding(node, weight)
                continue
            work.correct_bias(node, weight)
            if self._static:
                work.input(node)
            work.layer(node, weight)
        return len(sites)


def _fits(graph: Graph, node: fx.Node, floor: float) -> bool:
    """Whether a node of the right operator really is a site."""
    weight = weight_of(node)
    if not isinstance(weight, fx.Node) or not is_constant(graph, weight):
        return False
    value = weight.meta["val"]
    if not value.is_floating_point() or is_spliced(graph, tensor_name(graph, weight) or ""):
        return False  # what was put beside a layer is small, and trained on what the layer loses
    if op_name(node) == "embedding":
        shared = any(op_name(user) != "embedding" for user in weight.users)
        return shared or bool(value.numel() * value.element_size() >= floor)
    return bool(value.dim() >= 2)


def weight_of(node: fx.Node) -> fx.Node:
    place = 0 if op_name(node) == "embedding" else 1
    weight = node.args[place]
    return weight  # type: ignore[return-value]  # `_fits` has seen to it that a site's is a node


def constant_bias(graph: Graph, site: fx.Node) -> fx.Node | None:
    bias = site.args[2] if len(site.args) > 2 else None
    return bias if isinstance(bias, fx.Node) and is_constant(graph, bias) else None


def _channel_axis(site: fx.Node) -> int:
    return 1 if op_name(site).startswith("conv") else -1


def _mean_key(graph: Graph, names: dict[fx.Node, str], site: fx.Node) -> str:
    """What the mean of every channel of what a site reads stands under."""
    axis = "" if _channel_axis(site) == -1 else f".{_channel_axis(site)}"
    return f"{value_key(graph, names, site.args[0])}:mean{axis}"  # type: ignore[arg-type]


def _gram_key(graph: Graph, names: dict[fx.Node, str], site: fx.Node) -> str:
    """What Σ x xᵀ of what a linear layer reads stands under."""
    return f"{value_key(graph, names, site.args[0])}:gram"  # type: ignore[arg-type]


def end_of(conv: fx.Node) -> fx.Node:
    """The node whose value leaves a convolution: its activation where that is the only reader."""
    if len(conv.users) == 1:
        (user,) = conv.users
        if op_name(user) in ACTIVATIONS_BEHIND_CONV:
            return user
    return conv


def _ends_in_conv(node: fx.Node) -> bool:
    """Whether a convolution reads a value, perhaps behind an activation: it gets a grid anyway."""
    return any(
        op_name(reader).startswith("conv")
        or (op_name(reader) in ACTIVATIONS_BEHIND_CONV and _ends_in_conv(reader))
        for reader in node.users
    )


def _weight_schemes(pass_: Quantize, graph: Graph, sites: list[fx.Node]) -> dict[fx.Node, Scheme]:
    """One scheme per weight. A table that is looked up has 8 bit per row, or 4 in groups, whoever else reads it."""
    looked_up = {weight_of(n) for n in sites if op_name(n) == "embedding"}
    multiplied = {weight_of(n) for n in sites if op_name(n) != "embedding"}
    schemes = {}
    for node in sites:
        weight = weight_of(node)
        if weight in looked_up:
            bits = pass_.table_bits if weight in multiplied else 8
            found = weight_scheme(weight.meta["val"].shape, bits, pass_.group)
            schemes[weight] = found if bits == 4 and found.group else Scheme(bits=8, axis=0)
        elif pass_._is_fp8:
            schemes[weight] = Scheme(axis=0, fp8=True)
        else:
            wanted = 8 if any(pass_._is_wide(user) for user in weight.users) else pass_.bits
            schemes[weight] = weight_scheme(
                weight.meta["val"].shape, wanted, pass_.group, symmetric=pass_.weight_symmetric
            )
    return schemes


def weight_scheme(
    shape: Sequence[int], bits: int, group: int | None, *, symmetric: bool = True
) -> Scheme:
    """The grid of a weight of that shape: per row where its rows are not whole groups."""
    if group is not None and (len(shape) != 2 or shape[-1] % group):
        group = None
    return Scheme(bits=bits, axis=0, group=group, symmetric=symmetric)


@dataclass
class Quantized:
    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    scheme: Scheme
    scales: Tensor


class Work:
    """The edits of one rewrite, remembering what is quantised already."""

    def __init__(
        self, pass_: Quantize, graph: Graph, stats: Stats, names: dict[fx.Node, str]
    ) -> None:
        self.options, self.graph, self.stats, self.names = pass_, graph, stats, names
        self.weights: dict[fx.Node, Quantized] = {}
        self.values: dict[fx.Node, fx.Node] = {}
        self.grids: dict[fx.Node, tuple[float, int]] = {}
        self.schemes: dict[fx.Node, Scheme] = {}
        self.means = {site: _mean_key(graph, names, site) for site in pass_.sites(graph)}
        """By site, where the channel means of what it reads stand."""
        self.grams = {
            weight: sorted({_gram_key(graph, names, site) for site in readers})
            for weight, readers in pass_._compensated(pass_.sites(graph)).items()
        }
        """By weight, where Σ x xᵀ of what its layers read stand."""

    def weight(self, site: fx.Node, node: fx.Node, scheme: Scheme) -> Quantized:
        if node in self.weights:
            return self.weights[node]
        name = tensor_name(self.graph, node) or ""
        tensor = self.target(node)
        multiplied = scheme.group is None and any(op_name(u) != "embedding" for u in node.users)
        limit = self.options._pair_limit if multiplied else None
        scale, zero = self.weight_grid(node, tensor, scheme, limit)
        codes = self.codes(node, tensor, (scale, zero, scheme), limit)
        origin = self.graph.origins[name]
        kind = "fp8" if scheme.fp8 else "int8"
        word = f"quantize {'fp8' if scheme.fp8 else f'bits={scheme.bits}'} axis={scheme.axis} group={scheme.group or 0}"
        origin = Origin(origin.source, (*origin.transforms, word))
        done = Quantized(
            codes=lift(self.graph, f"{name}_{kind}", codes, origin),
            scale=lift(self.graph, f"{name}_scale", scale, origin),
            zero_point=lift(self.graph, f"{name}_zero_point", zero, origin),
            scheme=scheme,
            scales=scale,
        )
        self.weights[node] = done
        return done

    def codes(
        self, node: fx.Node, tensor: Tensor, grid: tuple[Tensor, Tensor, Scheme], limit: int | None
    ) -> Tensor:
        """Codes of what a weight is to be near to, on a grid of scale, zero point and scheme."""
        name, (scale, zero, scheme) = tensor_name(self.graph, node) or "", grid
        if node not in self.grams:
            return quantize(tensor, scale, zero, scheme)

        def compensated() -> Tensor:
            gram, rows = self.gram(node)
            if rows < len(gram):
                log.warning("%s: %d rows are few for %d channels", name, rows, len(gram))
            return gptq(tensor, gram, scale, zero, scheme, pair_limit=limit)

        return self.stats.decide_tensor(f"{self.graph.role}/{name}", compensated)

    def target(self, node: fx.Node) -> Tensor:
        """What a weight is to be near to on its grid: itself."""
        return tensor_of(self.graph, node)

    def weight_grid(
        self, node: fx.Node, tensor: Tensor, scheme: Scheme, limit: int | None
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero point of what a weight `tensor` is to be rounded to."""
        method = self.options.weight_range
        return weight_qparams(tensor, scheme, method=method, pair_limit=limit)

    def gram(self, node: fx.Node) -> tuple[Tensor, int]:
        """Σ x xᵀ of what layers with a weight read, and of how many rows that is."""
        seen = [self.stats[key] for key in self.grams[node]]
        return torch.stack([part.matrix() for part in seen]).sum(0), sum(
            part.count for part in seen
        )

    def embedding(self, site: fx.Node, weight: Quantized) -> None:
        """Rows are looked up as integers and scaled afterwards: the table is never turned to float."""
        indices, rest = site.args[1], site.args[2:]
        if weight.scheme.group:
            self._embedding_in_groups(site, weight)
            return
        column = insert(self.graph, site, aten.unsqueeze.default, (weight.scale, 1))
        rows = insert(self.graph, site, aten.embedding.default, (weight.codes, indices, *rest))
        scales = insert(self.graph, site, aten.embedding.default, (column, indices, *rest))
        wide = insert(self.graph, site, aten.to.dtype, (rows, torch.float32))
        result = insert(self.graph, site, aten.mul.Tensor, (wide, scales))
        self.names[result] = self.names[site]  # ranges were measured under this name
        replace(self.graph, site, result)

    def _embedding_in_groups(self, site: fx.Node, weight: Quantized) -> None:
        def rows(table: fx.Node) -> fx.Node:
            return insert(self.graph, site, aten.embedding.default, (table, *site.args[1:]))

        stem = tensor_name(self.graph, weight.codes) or ""
        zero = torch.zeros((), dtype=torch.int8)
        middle = lift(self.graph, f"{stem}_zero_point", zero, Origin(stem, ("symmetric",)))
        parts = rows(weight.codes), rows(weight.scale), middle, -1, weight.scheme.group
        result = insert(self.graph, site, DEQUANTIZE, parts)
        self.names[result] = self.names[site]
        replace(self.graph, site, result)

    def correct_bias(self, site: fx.Node, weight: Quantized) -> None:
        """Give the mean of the layer's output back what rounding the weights takes from it."""
        bias, key = constant_bias(self.graph, site), self.means[site]
        if bias is None or not self.options.bias_correction:
            return
        means = self.stats.decide(key, lambda: [steady(float(m)) for m in self.stats[key].mean()])
        original = tensor_of(self.graph, weight_of(site))
        codes, zero = (tensor_of(self.graph, part) for part in (weight.codes, weight.zero_point))
        lost = columns(original - dequantize(codes, weight.scales, zero, weight.scheme)).double()
        mean = torch.tensor(means, dtype=torch.float64)[channels(original, len(means))]
        made = tensor_of(self.graph, bias).double() + (lost.sum(2) * mean).sum(1)
        self.correct(site, bias, made.to(torch.float32))

    def correct(self, site: fx.Node, bias: fx.Node, made: Tensor) -> None:
        """Put a bias anew: the one that there is may be read elsewhere too."""
        name = tensor_name(self.graph, bias) or ""
        origin = self.graph.origins[name]
        origin = Origin(origin.source, (*origin.transforms, "bias correction"))
        site.update_arg(2, lift(self.graph, f"{name}_corrected", made, origin))

    def layer(self, site: fx.Node, weight: Quantized) -> None:
        group = weight.scheme.group or 0
        args = (weight.codes, weight.scale, weight.zero_point, 0, group)
        site.update_arg(1, insert(self.graph, site, DEQUANTIZE, args))
        if op_name(site).startswith("conv") and self.options._static:
            self._conv(site, weight)

    def input(self, site: fx.Node) -> None:
        value = site.args[0]
        assert isinstance(value, fx.Node)
        if value in self.grids:
            return  # it comes off a convolution's grid already
        if self.options._of_tokens:
            if value not in self.values:
                self.values[value] = self._row_pair(value, site)
            site.update_arg(0, self.values[value])
            return
        if value not in self.values:
            self.values[value] = self._pair(value, before=site)
            if op_name(site).startswith("conv") and self.options.conv_residual:
                self._share(value, self.values[value])
        site.update_arg(0, self.values[value])

    def _row_pair(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """`dequantize(quantize(value))` with a scale for every row, found as the graph runs."""
        scheme = Scheme(bits=self.options.activation_bits)

        def put(target: Any, *args: Any) -> fx.Node:
            return insert(self.graph, before, target, args)

        most = put(aten.amax.default, put(aten.abs.default, value), [-1], True)
        scale = put(aten.clamp_min.default, put(aten.mul.Tensor, most, 1 / scheme.high), SMALLEST)
        stem = self.names.get(value, value.name).replace(":", ".")
        zero = torch.zeros((), dtype=torch.int8)
        name = lift(self.graph, f"{stem}_zero_point", zero, Origin(stem, ("token",)))
        codes = put(QUANTIZE, value, scale, name, scheme.low, scheme.high, 0, 0)
        return put(DEQUANTIZE, codes, scale, name, 0, 0)

    def _share(self, value: fx.Node, pair: fx.Node) -> None:
        """Let the residual sums beside a convolution read its integers too: the value itself is then never stored."""
        codes = pair.args[0]
        assert isinstance(codes, fx.Node)
        sums = [n for n in value.users if op_name(n) == "add" and _ends_in_conv(n)]
        if any(n < pair for n in sums):
            return
        for node in sums:
            node.replace_input_with(value, pair)
        if list(value.users) == [codes] and self._clamps(value, *self.grids[pair]):
            codes.update_arg(0, value.args[0])

    def _conv(self, site: fx.Node, weight: Quantized) -> None:
        """Integer bias on the grid s_x·s_w, and a grid behind the layer, where the fused kernel wants them."""
        bias = site.args[2] if len(site.args) > 2 else None
        dequantized = site.args[0]
        assert isinstance(dequantized, fx.Node)
        if (
            isinstance(bias, fx.Node)
            and self.options.conv_bias_int32
            and is_constant(self.graph, bias)
        ):
            step = self.grids[dequantized][0] * weight.scales.double()
            name = tensor_name(self.graph, bias) or ""
            origin = self.graph.origins[name]
            codes = torch.round(tensor_of(self.graph, bias).double() / step)
            codes = codes.clamp(-(2**31), 2**31 - 1).to(torch.int32)
            lifted = lift(
                self.graph,
                f"{name}_int32",
                codes,
                Origin(origin.source, (*origin.transforms, "int32")),
            )
            scale = lift(self.graph, f"{name}_scale", step.float(), origin)
            zero = lift(self.graph, f"{name}_zero_point", torch.zeros_like(codes), origin)
            site.update_arg(2, insert(self.graph, site, DEQUANTIZE, (lifted, scale, zero, 0, 0)))
        if not self.options.conv_output:
            return
        end = end_of(site)
        readers = list(end.users)
        if end not in self.values and all(reader.op != "output" for reader in readers):
            pair = self._pair(end, after=end)
            for reader in readers:
                reader.replace_input_with(end, pair)
            self.values[end] = pair
            if end is not site and self._clamps(end, *self.grids[pair]):
                quantized = pair.args[0]
                assert isinstance(quantized, fx.Node)
                quantized.update_arg(0, site)

    def scheme(self, value: fx.Node) -> Scheme:
        """The grid of a value: one that is never negative needs no sign, and has twice the codes without one."""
        scheme = self.options._activation
        while op_name(value) in SAME_GRID:
            value = value.args[0]  # type: ignore[assignment]
        positive = op_name(value) in NEVER_NEGATIVE
        if positive and scheme.signed and scheme.symmetric and not scheme.fp8:
            return dataclasses.replace(scheme, signed=False)
        return scheme

    def _clamps(self, activation: fx.Node, step: float, zero_point: int) -> bool:
        """Whether the grid behind an activation cuts exactly where the activation does, which then is not needed."""
        scheme = self.scheme(activation)
        low, high = (scheme.low - zero_point) * step, (scheme.high - zero_point) * step
        match op_name(activation):
            case "relu" | "relu_":
                return low >= 0
            case "relu6":
                return low >= 0 and high <= 6 + step / 2
            case "hardtanh" if len(activation.args) > 2:
                least, most = (float(v) for v in activation.args[1:3])  # type: ignore[arg-type]
                return low >= least and high <= most + step / 2
        return False

    def grid(self, value: fx.Node, key: str, scheme: Scheme) -> tuple[float, int]:
        """Step and zero point of a value, decided under `key`."""

        step, zero_point = self.stats.decide(key, lambda: list(self.measured_grid(key, scheme)))
        return step, zero_point

    def measured_grid(self, key: str, scheme: Scheme) -> tuple[float, int]:
        """Step and zero point for the range that was measured under `key`."""
        low, high = map(steady, self.stats[key].range(scheme))
        scale, zero = qparams(torch.tensor(low), torch.tensor(high), scheme)
        return float(scale), int(zero)

    def _joined(
        self,
        value: fx.Node,
        before: fx.Node,
        step: float,
        scale: fx.Node,
        zero: fx.Node,
        scheme: Scheme,
    ) -> fx.Node | None:
        """Codes of two halves of which one is scaled, each by its own step: round(r·x / s) = round(x / (s/r))."""
        parts = [power_of_two(part) for part in halves(value) or ()]
        if not self.options.joins_codes or all(factor == 1 for _, factor in parts):
            return None
        codes = []
        for part, factor in parts:
            own = scale
            if factor != 1:
                tensor = torch.tensor(step, dtype=torch.float32) / factor
                origin = self.graph.origins[tensor_name(self.graph, scale) or ""]
                own = lift(self.graph, f"{tensor_name(self.graph, scale)}_half", tensor, origin)
            args = (part, own, zero, scheme.low, scheme.high, 0, 0)
            codes.append(insert(self.graph, before, QUANTIZE, args))
        return insert(self.graph, before, aten.cat.default, (codes, 1))

    def _pair(
        self, value: fx.Node, *, before: fx.Node | None = None, after: fx.Node | None = None
    ) -> fx.Node:
        """`dequantize(quantize(value))`, its grid decided once."""
        key = value_key(self.graph, self.names, value)
        source: Any = value.args[0] if op_name(value) in SAME_GRID else None
        kept = self.grids.get(source)
        scheme = self.scheme(value) if kept is None else self.schemes[source]
        step, zero_point = kept if kept is not None else self.grid(value, key, scheme)
        origin = Origin(key, ("range",))
        stem = self.names.get(value, value.name).replace(":", ".")
        scale = lift(self.graph, f"{stem}_scale", torch.tensor(step, dtype=torch.float32), origin)
        codes_type = torch.tensor(zero_point, dtype=scheme.dtype)
        zero = lift(self.graph, f"{stem}_zero_point", codes_type, origin)
        args = (value, scale, zero, scheme.low, scheme.high, 0, 0)
        if before is not None and (
            joined := self._joined(value, before, step, scale, zero, scheme)
        ):
            pair = insert(self.graph, before, DEQUANTIZE, (joined, scale, zero, 0, 0))
        elif after is not None:
            codes = insert_after(self.graph, after, QUANTIZE, args)
            pair = insert_after(self.graph, codes, DEQUANTIZE, (codes, scale, zero, 0, 0))
        else:
            assert before is not None
            codes = insert(self.graph, before, QUANTIZE, args)
            pair = insert(self.graph, before, DEQUANTIZE, (codes, scale, zero, 0, 0))
        self.grids[pair], self.schemes[pair] = (step, zero_point), scheme
        return pair
