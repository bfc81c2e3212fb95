"""Tasks by word, and where each is written; to name them loads none."""

from __future__ import annotations

from effc.errors import SourceError
from effc.table import Table

TASKS = Table(
    "task",
    {
        "cer": "effc.zoo.conversation_task:Conversations",
        "diaasq": "effc.zoo.dialogue_task:Dialogues",
        "lexical-fusion": "effc.zoo.fusion_task:LexicalFusions",
    },
    error=SourceError,
)
