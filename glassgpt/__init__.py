"""GlassGPT: build a GPT, look inside it, train it. Names are imported when first used, so `import glassgpt` is instant."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glassgpt.compress.distill import distill as distill
    from glassgpt.compress.prune import prune as prune
    from glassgpt.compress.quantize import quantize as quantize
    from glassgpt.config import PRESETS as PRESETS
    from glassgpt.config import ModelConfig as ModelConfig
    from glassgpt.config import Pretrain as Pretrain
    from glassgpt.config import UserError as UserError
    from glassgpt.config import preset as preset
    from glassgpt.config.distill import Distill as Distill
    from glassgpt.config.evaluate import Evaluate as Evaluate
    from glassgpt.config.generate import Generate as Generate
    from glassgpt.config.generate import Sampling as Sampling
    from glassgpt.config.hub import Download as Download
    from glassgpt.config.hub import Export as Export
    from glassgpt.config.info import Info as Info
    from glassgpt.config.plan import Plan as Plan
    from glassgpt.config.prune import Prune as Prune
    from glassgpt.config.quantize import Quantize as Quantize
    from glassgpt.config.tuning import Dpo as Dpo
    from glassgpt.config.tuning import Grpo as Grpo
    from glassgpt.config.tuning import Ppo as Ppo
    from glassgpt.config.tuning import Reward as Reward
    from glassgpt.config.tuning import Sft as Sft
    from glassgpt.exporting import export as export
    from glassgpt.generation import complete as complete
    from glassgpt.generation import generate as generate
    from glassgpt.interpret.hooks import capture as capture
    from glassgpt.interpret.hooks import edit as edit
    from glassgpt.interpret.info import info as info
    from glassgpt.lab.plan import plan as plan
    from glassgpt.loading import download as download
    from glassgpt.loading import load as load
    from glassgpt.model import GPT as GPT
    from glassgpt.text import Tokenizer as Tokenizer
    from glassgpt.train.evaluate import evaluate as evaluate
    from glassgpt.train.pretrain import pretrain as pretrain
    from glassgpt.tuning.dpo import dpo as dpo
    from glassgpt.tuning.grpo import grpo as grpo
    from glassgpt.tuning.ppo import ppo as ppo
    from glassgpt.tuning.reward import reward as reward
    from glassgpt.tuning.sft import sft as sft

__version__ = "0.7.0"

_HOME = {
    "PRESETS": "config",
    "ModelConfig": "config",
    "Pretrain": "config",
    "UserError": "config",
    "preset": "config",
    "Evaluate": "config.evaluate",
    "Download": "config.hub",
    "Export": "config.hub",
    "Info": "config.info",
    "info": "interpret.info",
    "capture": "interpret.hooks",
    "edit": "interpret.hooks",
    "Plan": "config.plan",
    "plan": "lab.plan",
    "Generate": "config.generate",
    "Sampling": "config.generate",
    "complete": "generation",
    "generate": "generation",
    "download": "loading",
    "export": "exporting",
    "load": "loading",
    "GPT": "model",
    "Tokenizer": "text",
    "evaluate": "train.evaluate",
    "pretrain": "train.pretrain",
    "Sft": "config.tuning",
    "Reward": "config.tuning",
    "Dpo": "config.tuning",
    "Ppo": "config.tuning",
    "Grpo": "config.tuning",
    "sft": "tuning.sft",
    "reward": "tuning.reward",
    "dpo": "tuning.dpo",
    "ppo": "tuning.ppo",
    "grpo": "tuning.grpo",
    "Quantize": "config.quantize",
    "Prune": "config.prune",
    "Distill": "config.distill",
    "quantize": "compress.quantize",
    "prune": "compress.prune",
    "distill": "compress.distill",
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'glassgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"glassgpt.{_HOME[name]}"), name)
