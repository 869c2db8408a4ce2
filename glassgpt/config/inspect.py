"""Knobs of `glassgpt inspect`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from glassgpt.config.errors import UserError, check_at_least, check_choices, check_seed
from glassgpt.config.generate import Sampling

VIEWS = ("attention", "heads", "lens", "why", "next", "tree", "patch", "trace", "ablate", "sae")
"""The views beside the summary, each asked for by the flag of its name; --compare is one too, or shows another for two models."""
USED_BY = {
    "stage": ("attention",),
    "patch_what": ("patch",),
    "noise_samples": ("trace",),
    "sae_at": ("sae",),
    "sae_features": ("sae",),
    "sae_kind": ("sae",),
    "tuned_lens": ("lens",),
    "source": ("sae", "lens", "ablate"),
    "steps": ("sae", "lens"),
    "answer": ("summary", "page", "why", "patch", "trace", "ablate"),
    "against": ("summary", "page", "why", "patch", "ablate"),
    "neurons": ("why",),
    "position": ("why", "next"),
    "top": ("summary", "lens", "why", "next", "compare", "ablate", "sae"),
    "width": ("tree",),
    "depth": ("tree",),
    "sampling": ("summary", "next", "tree"),
    "png": ("summary", "compare", *VIEWS),
    "svg": ("summary", "compare", *VIEWS),
    "prompt": ("summary", "page", "compare", *(view for view in VIEWS if view != "patch")),
    "prompt_file": ("summary", "page", "compare", *(view for view in VIEWS if view != "patch")),
}
"""What each option is for; given to another view, it is refused."""


@dataclass(frozen=True)
class Inspect:
    """Look inside a model while it reads a prompt: tokens, attention, what each layer expects, why the next token is likely.

    Without a view the summary is shown. Views: --attention, --heads, --lens, --why, --next, --tree, --patch, --trace, --ablate,
    --sae; and --compare, alone or with a view, for two models. --html writes the whole as one page that needs no network; --png
    and --svg draw the view, --json prints its numbers.
    """

    model: Annotated[str | None, Positional, arg(metavar="MODEL")] = None
    """A bundled model (storyteller, the default, or induction), a run folder, a Hugging Face folder or a downloaded hub id."""
    prompt: str = ""
    """The text that the model reads."""
    prompt_file: str | None = None
    """Read it from this UTF-8 file instead (- is standard input)."""
    html: str | None = None
    """Write a page with everything to this file: opens in any browser, without a network."""
    attention: Annotated[str | None, arg(metavar="all|rollout|LAYER.HEAD")] = None
    """View: who looks at whom, of all heads or of one, as in 3.2; rollout follows attention through all layers to the prompt."""
    stage: Literal["scores", "masked", "pattern", "weighted"] = "pattern"
    """What of one head: scores before the mask, after it, after softmax, or weighted by the size of the value that is moved."""
    heads: bool = False
    """View: what every head does: previous token, duplicate token, induction, each score beside its control without repeats.
    Needs no prompt; with one, also where its last token looks."""
    lens: bool = False
    """View: what every layer would say comes next (logit lens; with --tuned-lens the trained one)."""
    why: bool = False
    """View: what each part of the model adds to the logit of --answer (the likeliest token when not given), less --against's."""
    neurons: bool = False
    """--why: also the neurons that add most."""
    next: bool = False
    """View: the distribution of the next token over the whole vocabulary, from logit to probability, with the sampling flags."""
    tree: bool = False
    """View: the likeliest ways to go on, as a tree of probabilities."""
    compare: Annotated[tuple[str, str] | None, arg(metavar="A B")] = None
    """Two models on the same prompt (before and after tuning, two checkpoints), by themselves or in the view asked for."""
    patch: Annotated[tuple[str, str] | None, arg(metavar="PROMPT_A PROMPT_B")] = None
    """View: activation patching. States of prompt A are put into the run on B, place by place; needs --answer and --against."""
    patch_what: Literal["residual", "attn", "mlp", "heads"] = "residual"
    """What is patched: the residual stream, outputs of attention or MLP (layers x positions), or heads (layers x heads)."""
    trace: str | None = None
    """View: causal tracing. This part of the prompt is hidden by noise, and states are restored one by one; needs --answer."""
    noise_samples: int = 10
    """Draws of the noise, whose mean is shown."""
    ablate: Literal["zero", "mean", "resample"] | None = None
    """View: what the model loses without each head and each MLP: nothing in its place, its mean, or what it does in another text
    (of --source). The loss of the prompt is measured, or what is said of --answer and --against."""
    sae: str | None = None
    """View: features of the sparse autoencoder in this folder. Where there is none it is trained first, on --source."""
    sae_at: str | None = None
    """The activation that it is trained on, as in docs/activations.md (default: the residual stream after the middle block)."""
    sae_features: int | None = None
    """Features of an autoencoder that is trained (default 2048)."""
    sae_kind: Literal["topk", "l1"] | None = None
    """How it is made sparse: the 32 largest features of each token (topk, the default), or a penalty on their sum."""
    tuned_lens: str | None = None
    """Use the tuned lens in this folder with --lens. Where there is none it is trained first, on --source."""
    source: tuple[str, ...] = ()
    """Text (files, folders, hf:...) to train an autoencoder or a tuned lens on, or to take an ablation's values from."""
    steps: int | None = None
    """Steps of such a training (default 500)."""
    answer: str | None = None
    """The next token that --why, --patch, --trace, --ablate and the page ask for, as text: " Mary"."""
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
        """The view asked for; the page or the summary when none is."""
        asked = self._asked()
        return asked[0] if asked else "page" if self.html is not None else "compare" if self.compare else "summary"

    def _asked(self) -> list[str]:
        return [name for name in VIEWS if getattr(self, name) not in (None, False)]

    def __post_init__(self) -> None:
        check_at_least(1, self, "top", "width", "depth", "sae_features", "steps", "noise_samples")
        check_choices(self)
        check_seed(self.seed)
        if len(self._asked()) > 1:
            raise UserError(f"one view at a time; got --{' and --'.join(self._asked())}")
        if self.html is not None and (self._asked() or self.compare):
            other = (self._asked() or ["compare"])[0]
            raise UserError(
                f"--html writes every view of one model and prompt; leave out --{other}, whose picture is --svg or --png"
            )
        if self.model is not None and self.compare:
            raise UserError(f"--compare names its two models itself; leave out {self.model!r}")
        self._refuse_unused()
        if self.prompt and self.prompt_file is not None:
            raise UserError("give --prompt or --prompt-file, not both")
        if self.view == "patch" and (self.answer is None or self.against is None):
            raise UserError('--patch needs two next tokens to tell apart: --answer " Mary" --against " John"')
        if self.view == "trace" and self.answer is None:
            raise UserError('--trace needs --answer, the next token whose probability is watched: --answer " Paris"')
        if (self.source or self.steps) and self.view == "lens" and self.tuned_lens is None:
            raise UserError("--source and --steps train a tuned lens; say where it is to be with --tuned-lens FOLDER")

    def _refuse_unused(self) -> None:
        """An option that the view would not look at is a mistake, not a detail."""
        defaults = {f.name: _default(f) for f in dataclasses.fields(self)}
        for name, views in USED_BY.items():
            if getattr(self, name) != defaults[name] and self.view not in views:
                flag = f"--{name.replace('_', '-')}" if name != "sampling" else "how to sample"
                allowed = ", ".join(
                    f"--{view}" if view in VIEWS else "--html" if view == "page" else f"the {view}" for view in views
                )
                shown = f"--{self.view}" if self.view in VIEWS else f"the {self.view}"
                raise UserError(f"{flag} is for {allowed}; {shown} does not use it")
        written = self.sampling.presence_penalty, self.sampling.frequency_penalty
        if written != (0, 0) and self.view != "tree":
            raise UserError(
                "presence and frequency penalties count tokens that were written, and here none is; use them with --tree"
            )


def _shown(view: str) -> str:
    return "the summary" if view == "summary" else "--html" if view == "page" else f"--{view}"


def _default(of: dataclasses.Field[Any]) -> Any:
    return of.default if of.default_factory is dataclasses.MISSING else of.default_factory()
