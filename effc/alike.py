"""What engines that go on with each other's cache must have alike: one that reads prompts, and one that writes.

Bits of their own leave both of them the model, as near as bits allow. Pruned or trained it is another model, and a
cache of codes means what its scales say. So every engine has such a pass, with the same graph in front of it, and takes
over what the first of them decided.
"""

from __future__ import annotations

from collections.abc import Sequence

from effc.errors import RecipeError
from effc.passes.base import Pass
from effc.source import Source


def is_twin(source: Source, role: str, other: str) -> bool:
    """Whether two graphs of a source are one and the same."""
    same = source.modules[role] is source.modules[other]
    same &= source.inputs[role] is source.inputs[other]
    asked = (source.dims, source.outputs)
    return same and all(of.get(role) == of.get(other) for of in asked)


def partners(source: Source, role: str) -> list[str]:
    """Roles of the graph of `role` whose engines give each other what they take, itself among them; else it alone."""
    linked = {frozenset((link.producer, link.consumer)) for link in source.links}
    return [
        other
        for other in source.modules
        if other == role or (frozenset((role, other)) in linked and is_twin(source, role, other))
    ]


def shared(passes: Sequence[Pass], source: Source, role: str) -> frozenset[int]:
    """Places of the passes that all partners of a role have alike."""
    if len(partners(source, role)) == 1:
        return frozenset()
    return frozenset(i for i, pass_ in enumerate(passes) if pass_.is_shared and pass_.takes(role))


def refuse_unlike(passes: Sequence[Pass], source: Source) -> None:
    """Raise RecipeError where engines that go on with each other's cache would be of unlike models."""
    for role in source.modules:
        roles = partners(source, role)
        last = max(
            (i for i, p in enumerate(passes) if p.is_shared and any(map(p.takes, roles))),
            default=-1,
        )
        for index, pass_ in enumerate(passes[: last + 1]):
            alone = [r for r in roles if pass_.takes(r)]
            if len(alone) in (0, len(roles)):
                continue
            where, them = f"passes[{index}]", " and ".join(roles)
            if pass_.is_shared:
                raise RecipeError(
                    f"{where}: {pass_.name} for {alone[0]} alone would make another model of it, and {them} go on "
                    "with each other's cache",
                    hint="leave `graphs` out: one pass for both",
                )
            raise RecipeError(
                f"{where}: {pass_.name} is for {alone[0]} alone, and {passes[last].name} behind it is to find the same "
                f"graph in {them}",
                hint=f"put `{pass_.name}` behind `{passes[last].name}`",
            )
