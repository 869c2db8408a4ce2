"""How a student begins: from random weights, from some of its teacher's blocks, or as another model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glassgpt.compress.matching import copied_layers, matched_layers
from glassgpt.config import ModelConfig, UserError
from glassgpt.config.distill import Distill, StudentConfig
from glassgpt.loading import find, find_config, load
from glassgpt.model import GPT, use_attention
from glassgpt.model.quantised import dequantised, recipe_of
from glassgpt.text import Tokenizer
from glassgpt.train import machine


class Guided(nn.Module):
    """A student whose hidden states are compared, and where widths differ a linear map of each block's output (B, T, D) to the
    teacher's width (B, T, D')."""

    def __init__(self, model: GPT, teacher: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.layers = matched_layers(model.config.n_layer, teacher.n_layer)
        """The teacher's block that each of the student's is compared with."""
        like, width = model.token_embedding.weight, model.config.width
        maps = self.layers if width != teacher.width else []
        self.head = nn.ModuleList(  # the name under which a checkpoint has it beside the plain model
            nn.Linear(width, teacher.width, bias=False, device=like.device, dtype=like.dtype) for _ in maps
        )

    def mapped(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of all blocks in the teacher's width."""
        if not len(self.head):
            return list(states)
        return [linear(state) for linear, state in zip(self.head, states, strict=True)]


def open_teacher(config: Distill, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The teacher, never to be changed, and its tokenizer."""
    teacher, tokenizer = load(config.teacher, device=str(device))
    teacher = dequantised(teacher)  # of a quantised one the same weights, not made anew in every step
    if config.precision == "fp64":
        teacher.double()
    use_attention(teacher, machine.attend_by(device))
    return teacher.requires_grad_(False).eval(), tokenizer


def begin(config: Distill, teacher: GPT, tokenizer: Tokenizer) -> GPT:
    """The student before its first step, in training mode. Its draws follow from the seed alone.

    Raises UserError for another vocabulary than the teacher's, for `init layers` between shapes that differ in more than
    the number of blocks, and for a model that cannot be trained as it is.
    """
    torch.manual_seed(config.seed)
    if config.init not in ("layers", "random"):
        model = _another(config, teacher, tokenizer)
    else:
        shape = config.student.shape(teacher.config)
        model = _some_layers(shape, teacher) if config.init == "layers" else GPT(shape)
    device = next(teacher.parameters()).device
    model.to(device, torch.float64 if config.precision == "fp64" else torch.float32)
    use_attention(model, machine.attend_by(device))
    return model.requires_grad_(True).train()


def check(config: Distill) -> None:
    """What can be refused before anything is loaded or written: UserError as in `begin`."""
    shape, _ = find_config(config.teacher)
    if config.init == "layers":
        _layers_of(config.student.shape(shape), shape)
    elif config.init == "random":
        config.student.shape(shape)
    elif config.student != StudentConfig():
        raise UserError(f"--init {config.init} keeps that model's shape; leave --student out")
    else:
        find(config.init)


def _layers_of(shape: ModelConfig, teacher: ModelConfig) -> list[int]:
    """The teacher's block that each of the student's begins as."""
    names = [field.name for field in dataclasses.fields(shape) if field.name != "n_layer"]
    if differing := [name for name in names if getattr(shape, name) != getattr(teacher, name)]:
        name = differing[0]
        given = f"the student's {name} is {getattr(shape, name)}, the teacher's {getattr(teacher, name)}"
        if name == "moe":
            given = "the teacher is a mixture of experts, the student is not"
        raise UserError(f"--init layers copies blocks, which must be alike: {given}; use --init random, or leave it as it is")
    if shape.n_layer > teacher.n_layer:
        raise UserError(
            f"--init layers has {teacher.n_layer} blocks to copy and the student {shape.n_layer}; use --init random, or fewer"
        )
    return copied_layers(shape.n_layer, teacher.n_layer)


@torch.no_grad()
def _some_layers(shape: ModelConfig, teacher: GPT) -> GPT:
    layers, spans = _layers_of(shape, teacher.config), teacher.config.spans
    kept = tuple(spans[layer % len(spans)] for layer in layers)
    if len(set(kept)) == 1:
        kept = kept[:1]
    window = None if kept == ("full",) else shape.window_tokens
    model = GPT(dataclasses.replace(shape, spans=kept, window_tokens=window))
    for name, parameter in model.named_parameters():
        first, _, rest = name.partition(".")
        number, _, inside = rest.partition(".")
        source = f"blocks.{layers[int(number)]}.{inside}" if first == "blocks" else name
        parameter.copy_(teacher.get_parameter(source))
    return model


def _another(config: Distill, teacher: GPT, tokenizer: Tokenizer) -> GPT:
    model, its = load(config.init, device=str(next(teacher.parameters()).device))
    ours = (teacher.config.vocab_size, tokenizer.with_template(None).sha256)
    if ours != (model.config.vocab_size, its.with_template(None).sha256):
        raise UserError(
            f"{config.init} and the teacher {config.teacher} have different vocabularies ({model.config.vocab_size:,} and"
            f" {teacher.config.vocab_size:,} ids), so they cannot be compared; take a student with the teacher's tokenizer"
        )
    if model.config.moe.experts:
        raise UserError(f"{config.init} is a mixture of experts, whose routers are not trained here; take a dense student")
    if recipe_of(model) is not None:
        raise UserError(f"{config.init} is quantised, and codes cannot be trained; name the model that it was made from")
    return model
