"""The page of `glassgpt inspect --html` in a real browser: no network, right numbers, keys, languages, contrast."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exact
import numpy as np
import pytest
import torch

from glassgpt.config.generate import Sampling
from glassgpt.config.model import MoeConfig
from glassgpt.generation.sampling import distribution, entropy
from glassgpt.interpret.page.html import page
from glassgpt.interpret.page.report import Report, collect
from glassgpt.loading import load
from glassgpt.text import Tokenizer

CHROMIUM = shutil.which("chromium")
try:
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:
    CHROMIUM = None
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium or playwright is not installed")

PROMPT = "the cat sat on the mat. Tiếng Việt 😀"
Opened = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tokenizer: Tokenizer) -> Report:
    """Six query heads on three of keys and values, so that nothing is square by chance."""
    shape = exact.shape(vocab_size=300, context_tokens=80, n_head=6, n_kv_head=3, width=24)
    return collect(exact.noisy(shape, torch.float32, size=0.15), tokenizer, PROMPT, name="tiny")


@pytest.fixture(scope="module")
def file(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(report), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Browser, file: Path) -> Iterator[Opened]:
    """Open the page; at the end there must have been no request but for the file itself, and nothing on the console."""
    told: list[str] = []
    asked: list[str] = []
    views: list[Page] = []

    def start(address: str = "language=en", width: int = 1280, theme: str = "light") -> Page:
        view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        view.on("console", lambda message: told.append(message.text))
        view.on("pageerror", lambda error: told.append(str(error)))
        view.on("request", lambda request: asked.append(request.url.partition("#")[0]))
        view.goto(f"{file.as_uri()}#{address}")
        views.append(view)
        return view

    yield start
    for view in views:
        view.close()
    assert told == []
    assert set(asked) == {file.as_uri()} and len(asked) == len(views)


# ---------------------------------------------------------------------- numbers


def random_logits(seed: int) -> torch.Tensor:
    """40 numbers, some with ties, some with -inf, some enormous."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(40, generator=generator, dtype=torch.float64)
    if seed % 4 == 1:
        logits = logits.round()  # many are equal
    if seed % 4 == 2:
        logits[torch.randperm(40, generator=generator)[:15]] = float("-inf")
    if seed % 4 == 3:
        logits[:6] = torch.tensor([1e4, -1e4, 1e4, 9999.5, -1e4, 0.0])
    return logits


def test_distribution_is_pythons(opened: Opened) -> None:
    generator = np.random.default_rng(0)
    cases, expected = [], []
    for seed in range(200):
        logits = random_logits(seed)
        temperature = float(generator.choice([0, 0.1, 0.7, 1, 5, 1e-300]))
        k, p = int(generator.integers(0, 45)), float(generator.choice([1, 0.9, 0.3]))
        settings = Sampling(temperature=temperature, top_k=k, top_p=p)
        numbers = ["-Infinity" if x == float("-inf") else x for x in logits.tolist()]
        cases.append([numbers, {"temperature": temperature, "topK": k, "topP": p}])
        expected.append(distribution(logits[None], settings)[0])
    code = "cases => cases.map(([x, settings]) => Array.from(distribution(Float64Array.from(x, Number), settings)))"
    found = torch.tensor(opened().evaluate(code, cases), dtype=torch.float64)
    assert (found - torch.stack(expected)).abs().max() < 1e-5
    assert (found.sum(-1) - 1).abs().max() < 1e-6
    all_kept = code.replace("settings)))", "{ ...settings, topP: 1 })))")
    without = torch.tensor(opened().evaluate(all_kept, cases), dtype=torch.float64)
    assert (without - torch.stack(expected)).abs().max() > 0.1  # the comparison sees a top-p that is left out


@pytest.mark.parametrize("temperature", [0, 0.1, 1, 5])
def test_next_token_panel(opened: Opened, report: Report, temperature: float) -> None:
    view = opened(f"language=en&temperature={temperature}")
    wanted = distribution(report.logits[None].double(), Sampling(temperature=temperature))[0]
    found = torch.tensor(view.evaluate("Array.from(distribution(logits, state, order))"), dtype=torch.float64)
    assert abs(float(found.sum()) - 1) < 1e-6
    assert float((found - wanted).abs().max()) < 1e-5
    rows = view.locator("#next-table tbody tr")
    best = report.next_tokens
    assert rows.count() == len(best)
    assert rows.locator("th").all_inner_texts() == [report.labels[token.id] for token in best]  # T never moves them
    columns = [[float(text.replace("−", "-")) for text in rows.locator(f"td:nth-child({i})").all_inner_texts()] for i in (2, 3)]
    wanted_columns = [[token.logit for token in best], [token.logit / (temperature or 1) for token in best]]
    assert columns == [pytest.approx(column, abs=6e-3) for column in wanted_columns]
    if temperature == 0:
        assert float(found[report.logits.argmax()]) == 1
        assert rows.locator("td:last-child").all_inner_texts() == ["100%"] + ["0%"] * (len(best) - 1)
        assert view.locator("#next-table tbody .cut").count() == len(best) - 1
    assert view.locator("#next-table tfoot .total td").inner_text() == "100%"
    bits = 0.0 if temperature == 0 else float(entropy(report.logits[None].double() / temperature) / np.log(2))
    assert view.locator("#next-facts b").first.inner_text() == f"{bits:.2f}"


def test_sliders_cut_tokens(opened: Opened, report: Report) -> None:
    view = opened()
    view.locator("#topK").fill("30")
    k = round(300**0.3)
    assert view.locator("#topK-text").inner_text() == str(k)
    assert view.locator("#next-table tbody tr:not(.cut)").count() == k
    view.locator("#topP").fill("0.3")
    kept = (distribution(report.logits[None].double(), Sampling(top_k=k, top_p=0.3)) > 0).sum()
    assert view.locator("#next-table tbody tr:not(.cut)").count() == int(kept)
    view.locator("#next-reset").click()
    assert view.locator("#next-table .cut").count() == 0


@pytest.mark.parametrize("k", [1, 5, 20])
def test_nothing_is_left_for_the_others_where_all_kept_tokens_are_shown(opened: Opened, k: int) -> None:
    row = opened(f"language=en&topK={k}").locator("#next-table tfoot .rest")
    assert row.locator("td").all_inner_texts() == ["×", "0%"]


def test_numbers_are_written_as_one_would(opened: Opened) -> None:
    code = (
        "[scientific(9.97e-10), scientific(-2.34e-5), scientific(1e-300), scientific(0), fixed(-0.001), fixed(-0.01), short(0)]"
    )
    wanted = ["1 × 10⁻⁹", "−2.3 × 10⁻⁵", "1 × 10⁻³⁰⁰", "0 × 10⁰", "0.00", "−0.01", "0"]
    assert opened().evaluate(code) == wanted


def test_arrays_are_read_as_they_were_written(opened: Opened, report: Report) -> None:
    view = opened()
    halves = np.arange(65536, dtype="<u2").view("<f2").astype(np.float64)
    read = np.array(view.evaluate("Array.from({ length: 65536 }, (_, i) => String(half(i)))"), dtype=np.float64)
    assert np.array_equal(read, halves, equal_nan=True)
    T = len(report.tokens)
    for stage, digits in (("pattern", 5e-4), ("scores", 1e-3), ("masked", 1e-3)):
        code = f"Array.from({{ length: {T * T} }}, (_, i) => String(attention('{stage}', 2, 4, Math.floor(i / {T}), i % {T})))"
        found = np.array(view.evaluate(code), dtype=np.float64).reshape(T, T)
        assert np.allclose(found, getattr(report, stage)[2, 4].double().numpy(), atol=digits, rtol=1e-3), stage
    cell = view.evaluate("lensCell(2, 5)")
    assert [token["id"] for token in cell["top"]] == report.lens.ids[2, 5].tolist()
    assert (cell["rank"], cell["kl"]) == (int(report.lens.rank[2, 5]), pytest.approx(float(report.lens.kl_bits[2, 5]), rel=1e-6))


def test_sum_of_the_parts_stands_beside_the_logit(opened: Opened, report: Report) -> None:
    view = opened()
    for pair, button in enumerate(view.locator("#pairs button").all()):
        button.click()
        numbers = [float(view.locator(name).inner_text().replace("−", "-")) for name in ("#why-total", "#why-logit")]
        attribution = report.attributions[pair]
        assert numbers == pytest.approx([attribution.total, attribution.logit], abs=6e-5)
        button = view.locator("#pairs button").nth(pair)
        assert button.get_attribute("aria-pressed") == "true"


# ---------------------------------------------------------------------- keys


def test_keyboard_from_the_tokens_to_the_table_of_a_head(opened: Opened, report: Report) -> None:
    view = opened("language=en&position=0&layer=0&head=0")
    for _ in range(40):
        view.keyboard.press("Tab")
        if view.evaluate("document.activeElement.getAttribute('role')") == "option":
            break
    for _ in range(6):
        view.keyboard.press("ArrowRight")
    assert view.locator("#chips [aria-selected=true]").get_attribute("data-position") == "6"
    for _ in range(20):
        view.keyboard.press("Tab")
        if view.evaluate("document.activeElement.getAttribute('role')") == "gridcell":
            break
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        view.keyboard.press(key)
    assert view.evaluate("[state.layer, state.head, document.activeElement.id]") == [1, 2, "pattern"]
    assert "L1 H2" in str(view.locator("#pattern").get_attribute("aria-label"))
    view.keyboard.press("Tab")
    view.keyboard.press("Enter")
    rows = view.locator("#table tbody tr")
    assert rows.count() == len(report.tokens)
    shown = [float(text.rstrip("%")) / 100 for text in rows.locator("td:last-child").all_inner_texts()[:7]]
    assert shown == pytest.approx(report.pattern[1, 2, 6, :7].tolist(), abs=6e-4)
    view.keyboard.press("]")
    assert view.evaluate("state.layer") == 2


def test_a_link_brings_back_the_selection(opened: Opened) -> None:
    first = opened()
    first.locator("#chips [role=option]").nth(3).click()
    first.locator('#heads [data-head="1.4"]').click()
    first.locator('#stages [data-value="scores"]').click()
    first.locator("#themes button").nth(2).click()
    first.locator('#lens-scroll [data-cell="2.3"]').click()
    second = opened(first.url.partition("#")[2])
    selected = "[state.language, state.theme, state.position, state.layer, state.head, state.row, state.stage]"
    for view in (first, second):
        wanted = ["en", "dark", 3, 1, 4, 2, "scores"]
        assert view.evaluate(selected) == wanted
        assert view.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


def test_first_places_are_in_the_link_too(opened: Opened) -> None:
    first = opened("language=en&layer=1&head=4&key=3")
    first.evaluate("change({ layer: 0, head: 0, key: 0, topK: 3 })")
    second = opened(first.url.partition("#")[2])
    assert second.evaluate("[state.layer, state.head, state.key, state.topK]") == [0, 0, 0, 3]
    assert second.evaluate("bestHead()") != {"layer": 0, "head": 0}  # where a link that leaves them out leads


def followed(view: Page, address: str) -> None:
    """Another link in the same tab."""
    view.evaluate(
        "address => new Promise((done) => { addEventListener('hashchange', done, { once: true }); location.hash = address; })",
        address,
    )


def test_another_link_in_the_same_tab_starts_anew(opened: Opened) -> None:
    view = opened("language=en&position=3&temperature=2&theme=dark")
    followed(view, "layer=1&language=vi")
    best = view.evaluate("bestHead()")
    names = "[state.position, state.temperature, state.theme, state.layer, state.head, state.language]"
    assert view.evaluate(names) == [view.evaluate("T - 1"), 1, "system", 1, best["head"], "vi"]
    assert view.locator("html").get_attribute("lang") == "vi"


def test_a_link_to_a_section_keeps_the_selection_and_draws_nothing(opened: Opened) -> None:
    view = opened("language=en")
    view.evaluate("change({ position: 9, layer: 1, head: 2, key: 4 })")
    before = view.evaluate("({ ...state })")
    view.evaluate("watchers.push({ names: [], draw: () => { throw new Error('drawn') } })")
    top = view.evaluate("""() => new Promise((done) => {
        addEventListener("scrollend", () => done(find("weights").getBoundingClientRect().top));
        document.querySelector('nav a[href="#weights"]').click();
    })""")
    assert 0 < top < 300  # under the ribbon
    assert view.evaluate("({ ...state })") == before
    assert opened(view.url.partition("#")[2]).evaluate("({ ...state })") == before


def test_nonsense_in_a_link_is_left_out(opened: Opened) -> None:
    view = opened(
        "language=xx&position=999&layer=-1&head=a&temperature=9&stage=no&what=1&__proto__=1&constructor=x&toString=&hasOwnProperty=2"
    )
    state = view.evaluate("state")
    assert (state["language"], state["temperature"], state["stage"]) == ("en", 1, "pattern")
    assert view.locator("#heads .cell").count() == 18 and "constructor" not in state


# ---------------------------------------------------------------------- words, looks


UNTRANSLATED = """() => {
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const home = walker.currentNode.parentElement;
        if (!home.closest("[translate=no], script, noscript, [hidden]")) found.push(walker.currentNode.data);
    }
    for (const node of document.querySelectorAll("[aria-label], [title], [aria-valuetext]"))
        for (const name of ["aria-label", "title", "aria-valuetext"])
            if (!node.matches("[translate=no], .cell, .group, [lang]")) found.push(node.getAttribute(name) ?? "");
    return found.filter((text) => /\\p{L}/u.test(text) && !text.includes("["));
}"""


def test_nothing_is_left_untranslated(opened: Opened) -> None:
    """In a language in which every text is its key in brackets, there is nothing outside brackets but the model's own terms."""
    view = opened()
    view.evaluate("""() => {
        WORDS.test = Object.fromEntries(Object.entries(WORDS.en).map(([key, text]) =>
            [key, `[${key}${(text.match(/{\\w+}/g) ?? []).join("")}]`]));
        WORDS.test.locale = "vi";
        change({ language: "test", temperature: 0.5, topP: 0.5 });
        document.getElementById("table-button").click();
    }""")
    words = view.evaluate(UNTRANSLATED)
    assert words == []
    view.evaluate("document.querySelector('#why-note').append(' Look here.')")
    assert view.evaluate(UNTRANSLATED) == [" Look here."]


def test_languages(opened: Opened) -> None:
    view = opened("language=vi")
    assert view.locator("html").get_attribute("lang") == "vi"
    assert view.locator("#why-title").inner_text() == "Vì sao là token này"
    assert view.locator("#tied").inner_text().count("7.200") == 1  # 300 x 24, as Vietnamese writes it
    view.locator("#languages button").first.click()
    assert view.locator("#why-title").inner_text() == "Why this token"
    assert view.locator("#tied").inner_text().count("7,200") == 1


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("language", ["en", "vi"])
def test_nothing_sticks_out(opened: Opened, width: int, language: str) -> None:
    view = opened(f"language={language}", width)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    outside = """() => [...document.querySelectorAll("body *")].filter((node) => {
        const box = node.getBoundingClientRect();
        return box.width > 0 && box.right > innerWidth + 1 && !node.closest(".scroll, #chips, .heads, nav, .skip");
    }).map((node) => node.outerHTML.slice(0, 80))"""
    assert view.evaluate(outside) == []
    assert "\N{REPLACEMENT CHARACTER}" not in view.locator("body").inner_text()


CONTRASTS = """() => {
    const parsed = (text) => {
        const numbers = text.match(/[\\d.]+/g).map(Number);
        const scale = text.startsWith("color(srgb") ? 255 : 1;
        return [...numbers.slice(0, 3).map((x) => x * scale), numbers[3] ?? 1];
    };
    const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
    const behind = (node) => {
        if (!node) return [255, 255, 255, 1];
        const colour = parsed(getComputedStyle(node).backgroundColor);
        return colour[3] === 1 ? colour : over(colour, behind(node.parentElement));
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !node.getClientRects().length) continue;
        if (node.closest(".skip, :disabled, noscript")) continue;
        const back = behind(node);
        const ink = parsed(getComputedStyle(node).color);
        ink[3] *= Number(getComputedStyle(node).opacity);
        const [x, y] = [luminance(over(ink, back)), luminance(back)].sort((a, b) => b - a);
        found.push([(x + 0.05) / (y + 0.05), walker.currentNode.data.trim(), node.className]);
    }
    return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(opened: Opened, theme: str) -> None:
    view = opened("language=en&topP=0.5", theme=theme)
    contrasts = view.evaluate(CONTRASTS)
    assert len(contrasts) > 300
    assert contrasts[0][0] >= 4.5, contrasts[:5]
    view.evaluate("document.getElementById('why-note').style.color = 'rgb(128 128 128 / 80%)'")
    assert view.evaluate(CONTRASTS)[0][0] < 4.5  # the check sees pale text


def test_motion_can_be_switched_off(browser: Browser, file: Path) -> None:
    view = browser.new_page(reduced_motion="reduce")
    view.goto(file.as_uri())
    assert view.evaluate("getComputedStyle(document.querySelector('.bar.glide i')).transitionDuration") == "0s"
    view.close()


def test_a_single_token_and_a_long_prompt(browser: Browser, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = exact.noisy(exact.shape(vocab_size=300, context_tokens=80, position="alibi", tied_head=False), torch.float32)
    for name, prompt in (("one", "t"), ("long", "the cat " * 36)):
        (tmp_path / name).write_text(page(collect(model, tokenizer, prompt, name=name)), encoding="utf-8")
        (tmp_path / name).rename(tmp_path / f"{name}.html")
        view, errors = browser.new_page(), []
        view.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        view.goto((tmp_path / f"{name}.html").as_uri())
        assert errors == []
        assert view.locator("#stages button").count() == (3 if name == "one" else 1)
        view.close()


def test_layers_go_up_and_heads_share_keys(opened: Opened, report: Report) -> None:
    view = opened("language=en&layer=1&head=5&sort=induction")
    assert view.locator("#lens-scroll tbody th").all_inner_texts() == ["L2", "L1", "L0", "embed"]
    pressed = [slab.locator("button[aria-pressed=true]").all_inner_texts() for slab in view.locator(".slab").all()]
    assert pressed == [["5"], ["2"], ["2"]]  # six heads of queries, three of keys and values
    scores = [float(text) for text in view.locator("#heads .cell b").all_inner_texts()]
    assert scores == pytest.approx(sorted((head.induction for head in report.heads), reverse=True), abs=6e-3)


def test_a_model_whose_every_arrow_is_known(browser: Browser, tmp_path: Path) -> None:
    """The hand-built induction model: its page opens at the induction head, which looks where it must."""
    model, words = load("induction")
    prompt = words.decode([3, 7, 9, 4, 3, 7, 9])
    file = tmp_path / "page.html"
    file.write_text(page(collect(model, words, prompt, name="induction")), encoding="utf-8")
    view = browser.new_page()
    view.goto(f"{file.as_uri()}#language=en")
    fish = words.decode([4]).replace(" ", "·")
    assert view.locator("#head-title").inner_text() == "L1 H0"
    assert view.locator(".ghost .token").inner_text() == fish
    assert view.locator("#reading .token").all_inner_texts() == [words.decode([9]).replace(" ", "·"), fish]
    assert view.locator("#reading .step.on b").inner_text() in ("100%", "100.0%")
    score, control = (float(text) for text in view.locator('#badges [data-measure="induction"] b').all_inner_texts())
    assert score > 0.97 and control < 0.1
    view.close()


@pytest.fixture
def shown(browser: Browser, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """The page of another model, at 1280 pixels."""
    views, errors = [], []

    def start(address: str, prompt: str = PROMPT, **shape: Any) -> Page:
        model = exact.noisy(exact.shape(**{"vocab_size": 300, "context_tokens": 80} | shape), torch.float32)
        file = tmp_path / "page.html"
        file.write_text(page(collect(model, tokenizer, prompt, name="other")), encoding="utf-8")
        view = browser.new_page(viewport={"width": 1280, "height": 900})
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.goto(f"{file.as_uri()}#{address}")
        views.append(view)
        return view

    yield start
    for view in views:
        view.close()
    assert errors == []


def test_sixteen_heads_have_room(shown: Callable[..., Page]) -> None:
    view = shown("language=en", n_head=16, width=32, n_layer=2)
    overlaps = """() => {
        const boxes = [...document.querySelectorAll("#heads [role=columnheader]")].map((node) => {
            const range = document.createRange();
            range.selectNodeContents(node);
            return range.getBoundingClientRect();
        });
        return boxes.filter((box, i) => i && box.left < boxes[i - 1].right + 1).length;
    }"""
    assert view.evaluate(overlaps) == 0
    view.evaluate("document.querySelectorAll('#heads [role=columnheader]').forEach((node) => node.prepend('H'))")
    assert view.evaluate(overlaps) > 0  # the check sees names that are too long
    view.evaluate("change({ sort: 'induction' })")
    assert view.evaluate("[...document.querySelectorAll('.heads')].map((box) => box.scrollWidth - box.clientWidth)") == [0]
    scores = [float(text) for text in view.locator("#heads .cell b").all_inner_texts()]
    assert len(scores) == 32 and scores == sorted(scores, reverse=True)
    view.locator("#heads .cell").first.focus()
    view.locator("#heads .cell").first.click()
    view.keyboard.press("ArrowDown")
    second_row = view.locator("#heads [role=row]").nth(1).locator(".cell").first
    assert second_row.get_attribute("aria-selected") == "true"


def test_a_capped_mixture_too_short_for_scores(shown: Callable[..., Page]) -> None:
    moe = MoeConfig(experts=3, shared=1)
    view = shown("language=vi&sort=induction", "the", context_tokens=5, logit_cap=9.0, moe=moe)
    assert view.evaluate("[state.layer, state.head, state.sort]") == [0, 0, "layer"]
    assert view.locator("#badges > *").count() == 0
    assert view.locator("#badges-note").inner_text().startswith("Các head không có điểm")
    assert view.locator("#heads .cell").first.get_attribute("aria-label") == "L0 H0"
    bars = view.locator("#why-bars").inner_text()
    assert "chuyên gia dùng chung 0" in bars and "expert" not in bars
    for pair, label in enumerate(
        ["logit của mô hình, trước khi bị giới hạn", "hiệu hai logit của mô hình, trước khi bị giới hạn"]
    ):
        view.locator("#pairs button").nth(pair).click()
        assert view.locator("#why-sum .equals").inner_text() == "="
        assert view.locator("#why-sum span small").all_inner_texts()[1] == label
