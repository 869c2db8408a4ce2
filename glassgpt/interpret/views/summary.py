"""The first look: tokens and how surprising each was, what comes next, and the heads that say so."""

from __future__ import annotations

import math
from typing import Any

from rich.text import Text

from glassgpt import charts
from glassgpt.config.inspect import Inspect
from glassgpt.generation.sampling import entropy
from glassgpt.interpret.attribution import attribute
from glassgpt.interpret.hooks import capture
from glassgpt.interpret.next_token import next_tokens, rest, surprises
from glassgpt.interpret.views.view import BLUE, ORANGE, Read, View, bar, clamped, percent, table, title, token_id
from glassgpt.model.quantised import parameter_count

SHOWN_TOKENS = 40
SHOWN_HEADS = 6


def summary(config: Inspect, read: Read) -> View:
    """Tokens with surprisal, the likeliest next tokens, and the heads that add most to the first of them."""
    logits, labels, ids = read.logits(), read.labels(), read.ids
    found = surprises(logits, ids)
    likely = next_tokens(logits[-1], config.sampling, config.top, ids.tolist())
    answer = likely[0].id if config.answer is None else token_id(read.tokenizer, config.answer, "--answer")
    against = None if config.against is None else token_id(read.tokenizer, config.against, "--against")
    heads = strongest_heads(read, answer, against)
    tokens = [
        {
            "place": place,
            "token": text,
            "id": token,
            "bytes": piece.hex,
            "group": piece.group,
            "character": piece.character,
            "surprisal_bits": None if s is None else s.surprisal_bits,
            "rank": None if s is None else s.rank,
            "expected": None if place == 0 else read.label(int(logits[place - 1].argmax())),
        }
        for place, (text, token, piece, s) in enumerate(zip(labels, ids.tolist(), read.pieces(), found, strict=True))
    ]
    facts = {
        "model": read.name,
        "parameters": parameter_count(read.model),
        "layers": read.model.config.n_layer,
        "heads": read.model.config.n_head,
        "tokens": tokens,
        "next": [{"token": read.label(x.id), "id": x.id, "probability": x.probability, "logit": x.logit} for x in likely],
        "rest": rest(likely),
        "entropy_bits": float(entropy(logits[-1:])) / math.log(2),
        "answer": read.label(answer),
        "against": None if against is None else read.label(against),
        "strongest_heads": heads,
    }
    return View(facts, (_head_line(facts), *_tokens(tokens), *_next(facts), *_heads(facts)), lambda: draw(facts))


def strongest_heads(read: Read, answer: int, against: int | None) -> list[dict[str, Any]]:
    """Heads by what they add to the answer's logit at the last position, and the token that each looks at most there."""
    parts = attribute(read.model, read.ids, answer, against=against).parts
    heads = sorted((part for part in parts if part.kind == "head"), key=lambda part: -abs(part.value))[:SHOWN_HEADS]
    with capture(read.model, sorted({f"blocks.{head.layer}.attn.pattern" for head in heads})) as seen:
        read.logits()
    labels, found = read.labels(), []
    for head in heads:
        weights = seen[f"blocks.{head.layer}.attn.pattern"][0, head.index, -1]  # (S,)
        place = int(weights.argmax())
        where = {"looks_at": labels[place], "place": place, "weight": float(weights[place])}
        found.append({"layer": head.layer, "head": head.index, "adds": head.value, **where})
    return found


# ---------------------------------------------------------------------- on a terminal


def _head_line(facts: dict[str, Any]) -> Text:
    shape = f"{facts['parameters']:,} parameters, {facts['layers']} layers of {facts['heads']} heads"
    return Text.assemble((facts["model"], "bold"), f"  {shape}")


def _tokens(tokens: list[dict[str, Any]]) -> tuple[Any, ...]:
    rows = table(">", "token", ">id", ">surprisal", "bits", ">rank", "expected here")
    left_out = len(tokens) - SHOWN_TOKENS
    for token in tokens:
        if left_out > 0 and SHOWN_TOKENS // 2 <= token["place"] < len(tokens) - SHOWN_TOKENS // 2:
            if token["place"] == SHOWN_TOKENS // 2:
                rows.add_row("", f"… {left_out} more")
            continue
        bits = token["surprisal_bits"]
        measured = ("", "", "") if bits is None else (f"{bits:.2f}", bar(bits / 16, 16, "yellow"), f"{token['rank']:,}")
        rows.add_row(str(token["place"]), Text(token["token"]), f"{token['id']:,}", *measured, Text(token["expected"] or ""))
    return (title("Tokens", "surprisal: -log2 of the probability that the model gave to this token"), rows)


def _next(facts: dict[str, Any]) -> tuple[Any, ...]:
    rows = table("token", ">id", ">probability", "", ">logit")
    for x in facts["next"]:
        rows.add_row(Text(x["token"]), f"{x['id']:,}", percent(x["probability"]), bar(x["probability"]), f"{x['logit']:.3f}")
    rows.add_row("all others", "", percent(facts["rest"]), bar(facts["rest"]), "", style="dim")
    return (title("Next token", f"entropy {facts['entropy_bits']:.2f} bits"), rows)


def _heads(facts: dict[str, Any]) -> tuple[Any, ...]:
    rows = table("layer.head", ">adds", "looks at", ">weight")
    for head in facts["strongest_heads"]:
        where = Text.assemble(head["looks_at"], (f"  (token {head['place']})", "dim"))
        rows.add_row(f"{head['layer']}.{head['head']}", f"{head['adds']:+.3f}", where, f"{head['weight']:.2f}")
    less = "" if facts["against"] is None else f", less that of {facts['against']!r}"
    return (title("Strongest heads", f"what each adds to the logit of {facts['answer']!r}{less}, at the last token"), rows)


def draw(facts: dict[str, Any]) -> Any:
    """Surprisal along the prompt, and the likeliest next tokens."""
    tokens, likely = facts["tokens"][:SHOWN_TOKENS], facts["next"]
    figure, (left, right) = charts.figure(2, (12, clamped(0.24 * max(len(tokens), len(likely)) + 1.4)), share_y=False)
    left.barh(range(len(tokens)), [token["surprisal_bits"] or 0 for token in tokens], color=ORANGE)
    charts.label_axis(left.yaxis, [token["token"] for token in tokens])
    left.set(xlabel="surprisal, bits", title="The prompt")
    right.barh(range(len(likely)), [x["probability"] for x in likely], color=BLUE)
    charts.label_axis(right.yaxis, [x["token"] for x in likely])
    right.set(xlabel="probability", xlim=(0, 1), title=f"The next token (entropy {facts['entropy_bits']:.2f} bits)")
    for axes in (left, right):
        axes.invert_yaxis()
    return figure
