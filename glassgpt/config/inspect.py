"""Knobs of `glassgpt inspect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from glassgpt.config.errors import UserError, check_at_least, check_choices, check_seed
from glassgpt.config.generate import Sampling

VIEWS = ("attention", "heads", "lens", "why", "next", "tree", "compare", "patch", "trace", "sae")
"""The views beside the summary, each asked for by the flag of its name."""


@dataclass(frozen=True)
class Inspect:
    """Look inside a model while it reads a prompt: tokens, attention, what each layer expects, why the next token is likely.

    Without a view the summary is shown. Views: --attention, --heads, --lens, --why, --next, --tree, --compare, --patch, --trace,
    --sae.
    --html writes the whole as one page that needs no network; --png and --svg draw the view, --json prints its numbers.
    """

    model: Annotated[str | None, Positional, arg(metavar="MODEL")] = None
    """A bundled model (storyteller, the default, or induction), a run folder, a Hugging Face folder or a downloaded hub id."""
    prompt: str = ""
    """The text that the model reads."""
    prompt_file: str | None = None
    """Read it from this UTF-8 file instead (- is standard input)."""
    html: str | None = None
    """Write a page with everything to this file: opens in any browser, without a network."""
    attention: Annotated[str | None, arg(metavar="all|LAYER.HEAD")] = None
    """View: who looks at whom, of all heads or of one, as in 3.2."""
    heads: bool = False
    """View: what every head does: previous token, duplicate token, induction, each score beside its control without repeats."""
    lens: bool = False
    """View: what every layer would say comes next (logit lens; with --tuned-lens the trained one)."""
    why: bool = False
    """View: what each part of the model adds to the logit of --answer (the likeliest token when not given), less --against's."""
    next: bool = False
    """View: the distribution of the next token over the whole vocabulary, from logit to probability, with the sampling flags."""
    tree: bool = False
    """View: the likeliest ways to go on, as a tree of probabilities."""
    compare: Annotated[tuple[str, str] | None, arg(metavar="A B")] = None
    """View: two models on the same prompt (before and after tuning, two checkpoints)."""
    patch: Annotated[tuple[str, str] | None, arg(metavar="PROMPT_A PROMPT_B")] = None
    """View: activation patching. States of prompt A are put into the run on B, place by place; needs --answer and --against."""
    patch_what: Literal["residual", "attn", "mlp", "heads"] = "residual"
    """What is patched: the residual stream, outputs of attention or MLP (layers x positions), or heads (layers x heads)."""
    trace: str | None = None
    """View: causal tracing. This part of the prompt is hidden by noise, and states are restored place by place."""
    sae: str | None = None
    """View: features of the sparse autoencoder in this folder. Where there is none it is trained first, on --source."""
    sae_at: str | None = None
    """The activation that it is trained on, as in docs/activations.md (default: the residual stream after the middle block)."""
    sae_features: int = 2048
    """Features of an autoencoder that is trained."""
    sae_kind: Literal["topk", "l1"] = "topk"
    """How it is made sparse: the k largest features of each token, or a penalty on their sum."""
    tuned_lens: str | None = None
    """Use the tuned lens in this folder with --lens. Where there is none it is trained first, on --source."""
    source: tuple[str, ...] = ()
    """Text (files, folders, hf:...) to train an autoencoder or a tuned lens on."""
    steps: int = 500
    """Steps of such a training."""
    answer: str | None = None
    """The next token that --why, --patch and --trace ask for, as text: " Mary"."""
    against: str | None = None
    """The token whose logit is subtracted."""
    position: int = -1
    """The token of the prompt after which --why and --next look, counted from 0 (-1: the last)."""
    top: int = 10
    """Rows of a list."""
    width: int = 3
    """Children of each node of the tree."""
    depth: int = 3
    """Depth of the tree in tokens."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    """How the next token would be drawn (--next, --tree, and where the page's sliders start)."""
    png: str | None = None
    """Draw the view into this PNG file."""
    svg: str | None = None
    """Draw the view into this SVG file."""
    json: bool = False
    """Print the numbers as one JSON object."""
    seed: int = 0
    """Seed of random probes, noise and training."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Arithmetic."""

    @property
    def view(self) -> str:
        """The view asked for; the summary when none is."""
        return next((name for name in VIEWS if getattr(self, name) not in (None, False)), "summary")

    def __post_init__(self) -> None:
        check_at_least(1, self, "top", "width", "depth", "sae_features", "steps")
        check_choices(self)
        check_seed(self.seed)
        asked = [name for name in VIEWS if getattr(self, name) not in (None, False)]
        if len(asked) > 1:
            raise UserError(f"one view at a time; got --{' and --'.join(asked)}")
        if self.model is not None and self.view == "compare":
            raise UserError(f"--compare names its two models itself; leave out {self.model!r}")
        if self.html is not None and asked:
            raise UserError(f"--html writes every view of a prompt; leave out --{asked[0]} (its picture: --svg or --png)")
        if self.prompt and self.prompt_file is not None:
            raise UserError("give --prompt or --prompt-file, not both")
        if self.view == "patch" and (self.answer is None or self.against is None):
            raise UserError('--patch needs two next tokens to tell apart: --answer " Mary" --against " John"')
        if self.view == "trace" and self.answer is None:
            raise UserError('--trace needs --answer, the next token whose probability is watched: --answer " Paris"')
        if self.against is not None and self.view not in ("why", "patch", "summary"):
            raise UserError(f"--against is for --why and --patch; got it with --{self.view}")
        if self.tuned_lens is not None and self.view != "lens":
            raise UserError("--tuned-lens is for the view --lens; add --lens")
