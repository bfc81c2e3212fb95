"""What a graph is trained towards: another model's outputs, labels of its samples, all tokens of its texts or the last.

    distillation    T² · KL(softmax(teacher / T) ‖ softmax(student / T))            of logits (Hinton et al. 2015)
                    Σ ‖student − teacher‖² / Σ ‖teacher‖²                            of any other output

Padded positions count for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from effc.errors import TuneError

LOGITS = "logits"
Outputs = Mapping[str, Tensor]


def distillation(
    student: Outputs, teacher: Outputs, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """How far the outputs of one model are from those of another: of the logits alone where there are any.

    Outputs of unlike shapes, as keys and values of fewer heads, are left out. Raises TuneError where none is left.
    """
    names = [LOGITS] if LOGITS in student and LOGITS in teacher else list(student)
    terms = []
    for name in names:
        mine, theirs = student[name], teacher.get(name)
        if theirs is None or mine.shape != theirs.shape or not mine.is_floating_point():
            continue
        mine, theirs = (real(value, mask) for value in (mine, theirs))
        if (
            name == LOGITS and student[name].dim() < 4
        ):  # of more axes nobody knows which are classes
            terms.append(divergence(mine, theirs, temperature))
        else:
            terms.append((mine - theirs).square().sum() / theirs.square().sum().clamp_min(1e-12))
    if not terms:
        raise TuneError(
            "the graph has no output left that can be held against the model's",
            hint="train on labels or tokens: `task: labels`, `distill: 0`",
        )
    return torch.stack(terms).mean()


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL over the last axis, the mean over all rows."""
    mine = functional.log_softmax(student.flatten(0, -2) / temperature, -1)
    theirs = functional.log_softmax(teacher.flatten(0, -2) / temperature, -1)
    return temperature**2 * functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)


def labels(outputs: Outputs, wanted: Tensor) -> Tensor:
    """Cross-entropy of logits [batch, classes] and labels [batch]."""
    logits = outputs.get(LOGITS)
    if logits is None or logits.dim() != 2 or len(logits) != len(wanted):
        raise TuneError(
            "labels are for a model that gives `logits` [batch, classes]",
            hint="leave `task` out: the graph is then held to the model's own outputs",
        )
    if int(wanted.max()) >= logits.shape[1] or int(wanted.min()) < 0:
        raise TuneError(
            f"a label is {int(wanted.max())}, and the model has {logits.shape[1]} classes",
            hint="are they labels of this model?",
        )
    return functional.cross_entropy(logits, wanted)


def tokens(outputs: Outputs, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits [batch, length, vocabulary] and the token that comes next in ids [batch, length]."""
    logits, seen = _of_words(outputs, ids, mask)
    known = (seen[:, 1:] > 0) & (seen[:, :-1] > 0)
    if not bool(known.any()):
        raise TuneError(
            "no sample of a batch has a token that comes next", hint="train on longer texts"
        )
    return functional.cross_entropy(logits[:, :-1][known], ids[:, 1:][known])


def answer(outputs: Outputs, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of each row's last token that counts, in ids [batch, length], behind all those before it."""
    logits, seen = _of_words(outputs, ids, mask)
    places = torch.arange(ids.shape[1], device=ids.device)
    last = (places * (seen > 0)).amax(1)
    if int(last.min()) < 1:
        raise TuneError(
            "a sample is one token long, and has no answer behind a question",
            hint="write the answer as the last token of a text",
        )
    rows = torch.arange(len(ids), device=ids.device)
    return functional.cross_entropy(logits[rows, last - 1], ids[rows, last])


def _of_words(outputs: Outputs, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits [batch, length, vocabulary], and which tokens count. Raises TuneError where there are no such logits."""
    logits = outputs.get(LOGITS)
    if logits is None or logits.shape[:2] != ids.shape:
        raise TuneError(
            "tokens are for a language model that gives `logits` of every position",
            hint="leave `task` out: the graph is then held to the model's own outputs",
        )
    return logits, torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]


def real(value: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of a value [batch, length, …] whose mask is set; the value itself where the mask is not of it."""
    if mask is None or value.dim() < 3 or value.shape[:2] != mask.shape:
        return value
    return value[mask.bool()]
