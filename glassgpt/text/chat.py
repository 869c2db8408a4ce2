"""Chats: messages to one string, and to ids with a mask of what is to be learnt."""

from __future__ import annotations

from typing import NamedTuple


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`; templates may know others."""
    content: str
