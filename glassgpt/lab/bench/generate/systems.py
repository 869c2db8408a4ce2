"""The systems that `glassgpt bench generate` knows, and which of them a run takes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType

from glassgpt.config import UserError
from glassgpt.config.errors import nearest

FOLDER = "glassgpt.lab.bench.generate.peers"
PEERS = {
    "ours": f"{FOLDER}.ours",
    "transformers": f"{FOLDER}.transformers",
    "ctranslate2": f"{FOLDER}.ctranslate2",
    "llama.cpp": f"{FOLDER}.llama_cpp",
    "xllamacpp": f"{FOLDER}.xllamacpp",
    "onnxruntime": f"{FOLDER}.onnxruntime",
    "openvino": f"{FOLDER}.openvino",
}
"""Name on the command line -> module."""
BASE = "transformers-float32"
"""What every ratio is taken to."""
BITS = {"32": 32, "f16": 16, "float16": 16, "bf16": 16, "int8": 8, "Q8": 8, "int4": 4, "Q4": 4}
"""Part of a variant's name -> bits of a weight."""


@dataclass(frozen=True)
class System:
    """One engine in one precision."""

    peer: str
    variant: str

    @property
    def name(self) -> str:
        return f"{self.peer}-{self.variant}"

    @property
    def is_ours(self) -> bool:
        return self.peer == "ours"

    @property
    def bits(self) -> int:
        """Of a weight."""
        return next(bits for part, bits in BITS.items() if part in self.variant)


def peer_module(peer: str) -> ModuleType:
    """The module of an engine; importing it imports nothing heavy."""
    return importlib.import_module(PEERS[peer])


def known_systems() -> list[System]:
    """All of them, ours first, installed or not."""
    return [System(peer, variant) for peer in PEERS for variant in peer_module(peer).VARIANTS]


def choose(patterns: tuple[str, ...]) -> tuple[list[System], dict[str, str]]:
    """The systems that a pattern names, and why any of them are left out: {name: reason}.

    A pattern is an engine (`ours`), a system (`ours-int8`) or has wildcards. Raises UserError for one that names none, and
    when nothing that is named is installed.
    """
    known = known_systems()
    for pattern in patterns:
        if not any(_matches(pattern, system) for system in known):
            names = [*PEERS, *(system.name for system in known)]
            raise UserError(f"systems: {pattern!r} names none of them{nearest(pattern, names)}; engines: {', '.join(PEERS)}")
    named = [system for system in known if any(_matches(pattern, system) for pattern in patterns)]
    lacking = {peer: peer_module(peer).missing() for peer in PEERS}
    left_out = {s.name: f"not installed: {lacking[s.peer]}" for s in named if lacking[s.peer]}
    chosen = [system for system in named if system.name not in left_out]
    if not chosen:
        raise UserError("; ".join(f"{name} is {reason}" for name, reason in left_out.items()))
    return chosen, left_out


def _matches(pattern: str, system: System) -> bool:
    return pattern == system.peer or fnmatchcase(system.name, pattern)
