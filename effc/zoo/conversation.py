"""A model that tells the emotion of every utterance, and learns beside it who speaks (Li et al., arXiv 2003.01478).

An encoder reads every utterance by itself, v [batch, N, hidden] is the mean over its pieces. Three recurrences read the
conversation in both directions: s is shared, e is for emotions and p for speakers. Then

    c = softmax(W_q e (W_k p)ᵀ / √d, over utterances) W_v p
    emotion = MLP [s; e; c]             speaker = MLP [s; p]

so that what tells speakers apart reaches emotions by s and by c. Who speaks is asked in training alone: the model is
given no names, and of a package `drop-head` takes the speakers' MLP away. p stays, since c is made of it.

The paper has GRUs, which an export fixes to one length. Here gates read the input alone (Feng et al., 2024, minGRU), so
that a state is a sum with weights that are known beforehand, for every length at once:

    h_t = (1 − z_t) h_{t−1} + z_t u_t = Σ_{r ≤ t} exp(Σ_{r < q ≤ t} log(1 − z_q)) z_r u_r
    z = σ(W_z v), u = tanh(W_u v)

Eight channels share a gate. Layout and numbers of the model are ours: the paper's own were not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from effc.zoo.conversation_task import Settings

MASKED = -1e4
SHARED = 8
"""Channels that have one gate."""
HEADS = 4


class Recurrence(nn.Module):
    """Gated states of both directions, as weighted sums."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.gates = size // SHARED
        self.value = nn.Linear(width, 2 * size)
        self.gate = nn.Linear(width, 2 * self.gates)

    def forward(self, v: Tensor, sees: Tensor) -> Tensor:
        """v [batch, N, width] and `sees` [2, batch, 1, N, N], see `views`, → [batch, N, 2 · size]"""
        made = []
        value, gate = torch.tanh(self.value(v)), self.gate(v).transpose(1, 2)
        for part, (u, a) in enumerate(zip(value.chunk(2, -1), gate.chunk(2, 1), strict=True)):
            kept = -functional.softplus(a)  # log(1 − z) [batch, gates, N]
            passed = kept.cumsum(-1)
            # log of what is left at t of r: behind it, passed_t − passed_r; ahead of it what lies before r and not t
            way = passed if part == 0 else kept - passed
            left = torch.where(sees[part], way[..., :, None] - way[..., None, :], MASKED).exp()
            u = u.unflatten(-1, (self.gates, SHARED)).transpose(1, 2)
            h = left @ (torch.sigmoid(a)[..., None] * u)
            made.append(h.transpose(1, 2).flatten(2))
        return torch.cat(made, -1)


class Bridge(nn.Module):
    """What an emotion's states take from those of the speakers, over the conversation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, e: Tensor, p: Tensor, bias: Tensor) -> Tensor:
        """e, p [batch, N, width], bias [batch, 1, N, N] → [batch, N, width]"""
        query, key, value = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, x in ((self.query, e), (self.key, p), (self.value, p))
        )
        seen = functional.scaled_dot_product_attention(query, key, value, bias)
        return seen.transpose(1, 2).flatten(2)


class ConversationModel(nn.Module):
    """An encoder of transformers, three recurrences and two heads.

    Inputs are those of `conversation_layout.inputs`; outputs `emotion` and `speaker` [batch, N, classes]. The second is
    not there where the settings have no speakers, and then nothing that only it needs.
    """

    def __init__(self, encoder: nn.Module, settings: Settings, emotions: int) -> None:
        super().__init__()
        hidden, size = int(encoder.config.hidden_size), settings.size  # type: ignore[union-attr, arg-type]
        self.encoder, self.tells_speakers, wide = encoder, bool(settings.speakers), 2 * size
        self.shared, self.own = Recurrence(hidden, size), Recurrence(hidden, size)
        self.emotion = _head((3 if self.tells_speakers else 2) * wide, size, emotions)
        if self.tells_speakers:
            self.theirs = Recurrence(hidden, size)
            self.bridge = Bridge(wide)
            self.speaker = _head(2 * wide, size, len(settings.speakers) + 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, gather: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        read = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask[..., None].to(read.dtype)
        v = ((read * real).sum(1) / real.sum(1))[gather]
        sees = views(present)
        s, e = self.shared(v, sees), self.own(v, sees)
        if not self.tells_speakers:
            return {"emotion": self.emotion(torch.cat((s, e), -1))}
        p = self.theirs(v, sees)
        bias = torch.where(present[:, None, None, :] > 0, 0.0, MASKED)
        c = self.bridge(e, p, bias.expand(-1, -1, present.shape[1], -1))
        return {
            "emotion": self.emotion(torch.cat((s, e, c), -1)),
            "speaker": self.speaker(torch.cat((s, p), -1)),
        }


def views(present: Tensor) -> Tensor:
    """Which utterances lie behind and ahead of each [2, batch, 1, N, N], itself included; none that is padding."""
    places = torch.arange(present.shape[1], device=present.device)
    behind = places[:, None] >= places
    ahead = (places[:, None] <= places) & (present[:, None, None, :] > 0)
    return torch.stack((behind.expand_as(ahead), ahead))


def _head(width: int, inner: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, classes))


def loss(
    outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], weights: Mapping[str, float]
) -> Tensor:
    """The weighted sum of both cross-entropies, each the mean over utterances that count; −100 does not."""
    terms = []
    for name, weight in weights.items():
        if name not in outputs:
            continue
        tags = wanted[name].flatten()
        off = functional.cross_entropy(outputs[name].flatten(0, 1), tags, reduction="sum")
        terms.append(weight * off / (tags >= 0).sum().clamp(min=1))
    return torch.stack(terms).sum()
