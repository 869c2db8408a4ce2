"""The command `glassgpt`: a table of verbs, of one or two words, each a configuration class and the function that takes it.

Nothing heavy is imported until a verb runs: `--help` answers without torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glassgpt import __version__
from glassgpt.config.errors import UserError, nearest


class Command(NamedTuple):
    summary: str
    config: str
    """`module:Class` of the frozen dataclass that holds its options."""
    function: str
    """`module:function` that takes the configuration and nothing else."""


COMMANDS = {
    "demo": Command("see a GPT-2 at work in two minutes", "config.lab:Demo", "lab.demo:demo"),
    "inspect": Command(
        "look inside: tokens, attention, lenses, attribution, patching", "config.inspect:Inspect", "interpret.inspect:inspect"
    ),
    "info": Command("what a model is made of: parameters, QKV, memory", "config.info:Info", "interpret.info:info"),
    "plan": Command("what training takes: operations, memory, time, cost", "config.plan:Plan", "lab.plan:plan"),
    "generate": Command("continue prompts", "config.generate:Generate", "generation.writer:generate"),
    "chat": Command("talk with a model, turn by turn", "config.chat:Chat", "generation.chat:chat"),
    "pretrain": Command("train a model on text", "config.pretrain:Pretrain", "train.pretrain:pretrain"),
    "sft": Command("teach a model to answer: supervised fine-tuning", "config.tuning:Sft", "tuning.sft:sft"),
    "reward": Command("train a reward model on pairs of answers", "config.tuning:Reward", "tuning.reward:reward"),
    "dpo": Command("prefer better answers: DPO, IPO, KTO", "config.tuning:Dpo", "tuning.dpo:dpo"),
    "ppo": Command("reinforcement learning with a value head", "config.tuning:Ppo", "tuning.ppo:ppo"),
    "grpo": Command("reinforcement learning by comparing answers", "config.tuning:Grpo", "tuning.grpo:grpo"),
    "data inspect": Command(
        "what a model would learn from a file", "config.tuning:DataInspect", "tuning.data_inspect:data_inspect"
    ),
    "runs": Command("list and compare training runs", "config.runs:Runs", "train.runs:runs"),
    "evaluate": Command("bits per byte of a model on text", "config.evaluate:Evaluate", "train.evaluate:evaluate"),
    "download": Command("fetch a model from the Hugging Face hub", "config.hub:Download", "loading:download"),
    "export": Command("write a model for other programs", "config.hub:Export", "exporting:export"),
    "merge": Command("add an adapter to the weights of its base", "config.hub:Merge", "exporting:merge"),
    "quantize": Command("store a model in 8 or 4 bits", "config.quantize:Quantize", "compress.quantize:quantize"),
    "prune": Command("take weights, heads or channels out of a model", "config.prune:Prune", "compress.prune:prune"),
    "distill": Command("teach a smaller model what a larger one knows", "config.distill:Distill", "compress.distill:distill"),
    "bench generate": Command(
        "speed of generation beside other engines", "config.bench:BenchGenerate", "lab.bench.generate.generate:bench_generate"
    ),
    "bench speculative": Command(
        "what guessing tokens ahead buys", "config.bench:BenchSpeculative", "lab.bench.speculative:bench_speculative"
    ),
    "bench train": Command("speed and memory of training beside peers", "config.bench:BenchTrain", "lab.bench.train:bench_train"),
    "bench device": Command("CPU against GPU, float32 against bf16", "config.bench:BenchDevice", "lab.bench.device:bench_device"),
    "bench inspect": Command(
        "capture and patching beside TransformerLens", "config.bench:BenchInspect", "lab.bench.inspect:bench_inspect"
    ),
    "lab speedrun": Command("time to a loss beside nanoGPT's recipe", "config.bench:Speedrun", "lab.speedrun:speedrun"),
    "lab scaling": Command("scaling laws from a ladder of small runs", "config.scaling:Scaling", "lab.scaling:scaling"),
    "lab alignment": Command(
        "PPO, DPO, GRPO: a reward met, one gamed", "config.alignment:Alignment", "lab.alignment.alignment:alignment"
    ),
    "lab ladder": Command("what each step from GPT-2 to a modern model buys", "config.ladder:Ladder", "lab.ladder.ladder:ladder"),
    "lab gradient-balance": Command(
        "does fine-tuning learn from instruction or response?",
        "config.gradient_balance:GradientBalance",
        "lab.gradient_balance.gradient_balance:gradient_balance",
    ),
    "lab temperature": Command(
        "temperature and top-p measured beside real text",
        "config.temperature:Temperature",
        "lab.temperature.sweep:temperature_sweep",
    ),
    "lab coherence": Command("how far back a model looks", "config.coherence:Coherence", "lab.coherence.coherence:coherence"),
    "lab compression": Command(
        "size, speed and quality of every smaller model",
        "config.compression:Compression",
        "lab.compression.compression:compression",
    ),
    "lab qkv": Command("fused QKV or three matrices; tied head or not", "config.qkv:Qkv", "lab.qkv.qkv:qkv"),
}
GROUPS = {verb.split()[0] for verb in COMMANDS if " " in verb}
CONFIG_FLAG = "--config"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # a terminal that cannot show a character shows ? instead
    words = 2 if arguments and arguments[0] in GROUPS else 1
    verb, rest = " ".join(arguments[:words]) or "--help", arguments[words:]
    group, _, second = verb.partition(" ") if words == 2 else ("", "", verb)
    if second in ("", "-h", "--help", "help"):
        print(usage(group))
        return 0
    if verb in ("-V", "--version"):
        print(f"glassgpt {__version__}")
        return 0
    try:
        if verb not in COMMANDS:
            known = [name for name in COMMANDS if name.startswith(group)]
            raise UserError(f"unknown command {verb!r}{nearest(verb, known)}; commands: {', '.join(known)}")
        config = parse(verb, rest)
        _resolve(COMMANDS[verb].function)(config)
    except UserError as error:
        name = f"glassgpt {verb}" if verb in COMMANDS else "glassgpt"
        if not getattr(error, "told", False):
            print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `glassgpt ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that may not be written: what is complete stays as it was
        where = f": {error.filename}" if error.filename else ""
        print(f"glassgpt {verb}: error: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def usage(group: str = "") -> str:
    """All commands, or those of a group (`bench`, `lab`)."""
    shown = {verb: command for verb, command in COMMANDS.items() if verb.startswith(group)}
    width = max(map(len, shown))
    lines = [f"  {verb:{width}}  {command.summary}" for verb, command in shown.items()]
    return "\n".join(
        [
            f"usage: glassgpt {f'{group} ' if group else ''}COMMAND [options]",
            "",
            "Build a GPT, look inside it, train it.",
            "",
            *lines,
            "",
            "`glassgpt COMMAND --help` lists the options of one; `--config FILE.yaml` reads them from a file.",
        ]
    )


def parse(verb: str, arguments: list[str]) -> Any:
    """The configuration of a verb: defaults, then `--config FILE.yaml`, then `--model PRESET`, then the other flags."""
    import tyro

    from glassgpt.config.files import read_yaml
    from glassgpt.config.model import preset

    kind = _resolve(COMMANDS[verb].config)
    arguments, files = _take(arguments, CONFIG_FLAG)
    default = read_yaml(files[-1], kind, _empty(kind)) if files else None
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if default is None and "resume" in fields and "--resume" in arguments:
        default = _of_run(kind, arguments)
    if "model" in fields and _holds_model(fields["model"]):
        arguments, presets = _take(arguments, "--model")
        if presets:
            default = dataclasses.replace(kind() if default is None else default, model=preset(presets[-1]))
    return tyro.cli(
        kind,
        prog=f"glassgpt {verb}",
        description=_description(kind),
        args=arguments,
        default=default,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _description(kind: type) -> str:
    lines = [inspect.cleandoc(kind.__doc__ or ""), "--config FILE.yaml reads options from a file; flags override it."]
    if any(_holds_model(field) for field in dataclasses.fields(kind)):
        lines.append("--model PRESET starts from a named shape (`nano`, `gpt2`, ...); --model.FIELD changes one field of it.")
    return "\n".join(lines)


def _empty(kind: type) -> Any:
    """A configuration in which what has no default is still to come from the command line."""
    import tyro

    required = (f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING)
    return kind(**dict.fromkeys(required, tyro.MISSING))


def _take(arguments: list[str], flag: str) -> tuple[list[str], list[str]]:
    """Take `flag VALUE` and `flag=VALUE` out of the arguments; returns (the others, the values)."""
    others, values = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == flag:
            value = next(rest, None)
            if value is None:
                raise UserError(f"{flag} needs a value")
            values.append(value)
        elif argument.startswith(f"{flag}="):
            values.append(argument.removeprefix(f"{flag}="))
        else:
            others.append(argument)
    return others, values


def _holds_model(field: dataclasses.Field[Any]) -> bool:
    return "ModelConfig" in str(field.type)


def _of_run(kind: type, arguments: list[str]) -> Any:
    """A resumed run starts from its own saved configuration."""
    from glassgpt.config.files import CONFIG_FILE, read_yaml

    _, named = _take([argument.replace("--out_dir", "--out-dir") for argument in arguments], "--out-dir")
    folder = Path(named[-1] if named else kind().out_dir)
    path = folder / CONFIG_FILE
    return read_yaml(path, kind) if path.is_file() else None


def _resolve(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(f"glassgpt.{module}"), name)
