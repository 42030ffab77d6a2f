"""The page in a real browser: it draws, answers to pointer and keyboard, fits a phone, and runs nothing but its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from synthetic import EVIL, make_grid, make_run
from test_report import pair_report, supervised

from pairtune.config import RewardConfig, SFTConfig, TrainConfig
from pairtune.evidence.report import write_report
from pairtune.stages.reward import reward
from pairtune.stages.rl import train
from pairtune.stages.sft import sft

pytest.importorskip("jinja2")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods and three seeds."""
    folder = tmp_path_factory.mktemp("comparison")
    return write_report(make_grid(folder), folder / "page.html")


def check(browser: Browser, page: Path, **how: Any) -> None:
    """Opens a page: no error, no request but for itself, every figure drawn, nothing wider than the window."""
    browser.open(page, **how)
    assert browser.errors == []
    assert browser.requests == [page.resolve().as_uri()]
    drawn = browser.run(
        "[...document.querySelectorAll('[data-figure]')].map(f => f.querySelectorAll('svg path, svg text.cell').length)"
    )
    assert drawn
    assert all(count > 0 for count in drawn), drawn
    assert browser.run("document.documentElement.scrollWidth") <= how.get("width", 1280)
    assert browser.run("document.title").endswith("pairtune")
    assert browser.run("document.querySelectorAll('img, iframe, object, link').length") == 0


def test_a_page_opens_and_draws(browser: Browser, tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run"))
    check(browser, page)
    browser.run(MARK.format(name="held-out", number=2))
    hover(browser)
    tip = browser.run("window.figure.querySelector('.tip').textContent")
    assert "held-out" in tip
    assert "step 20" in tip


MARK = """
window.figure = document.querySelector('[data-figure^="frontier"], [data-figure="reward"]');
window.marks = [...document.querySelectorAll('[data-series="{name}"][data-faint="no"] .mark')];
window.mark = window.marks[{number}]; window.figure = window.mark.closest('[data-figure]');
window.figure.scrollIntoView(); true
"""


def hover(browser: Browser) -> None:
    x, y = browser.run("(b => [b.x + b.width / 2, b.y + b.height / 2])(window.mark.getBoundingClientRect())")
    browser.hover(x, y)


# ------------------------------------------------------------------------------------------------------ every kind


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_a_comparison_fits_and_draws(browser: Browser, comparison: Path, width: int, dark: bool) -> None:
    check(browser, comparison, width=width, dark=dark)
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(21, 23, 26)") == dark


@pytest.mark.slow
def test_every_kind_of_run_opens(browser: Browser, tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 3.0 - 0.1 * i, "perplexity": 20.0 - i, "step_time": 1.0} for i in range(1, 9)]
    low = {"mean": 2.0, "low": 1.9, "high": 2.1}
    ends = [{"step": 8, "num_examples": 10, "loss": low, "perplexity": low}]
    check(browser, write_report(supervised(tmp_path / "sft", {"max_length": 64}, lines, ends)), width=360)
    lines = [{"step": i, "loss": 0.6, "accuracy": 0.6, "margin": 0.1, "step_time": 1.0} for i in range(1, 5)]
    path = supervised(tmp_path / "reward", {"reward": {"loss": "pairwise"}}, lines, [])
    (path / "reward_report.json").write_text(json.dumps(pair_report()))
    check(browser, write_report(path), width=360)
    browser.run("document.querySelector('[data-figure=accuracy_parts] svg').focus()")
    browser.key("ArrowDown")
    assert "100 pairs" in browser.run("document.querySelector('[data-figure=accuracy_parts] .heard').textContent")


@pytest.mark.slow
def test_runs_of_all_three_stages_as_they_are_made(browser: Browser, tmp_path: Path, tiny_model_folder: str) -> None:
    words: dict[str, Any] = {"model": tiny_model_folder, "dataset": "passed in", "chat": "never", "device": "cpu"}
    words |= {"dtype": "float32", "batch_size": 4, "max_steps": 3, "eval_steps": 0, "learning_rate": 1e-3}
    prompts = [{"prompt": f"say {word}: "} for word in ("ab", "c", "dd", "e")]
    examples = [row | {"completion": "ab!"} for row in prompts]
    pairs = [row | {"chosen": "ab!", "rejected": "cd"} for row in prompts]
    sft(SFTConfig(**words, output_dir=str(tmp_path / "sft")), train_dataset=examples, eval_dataset=examples)
    reward(RewardConfig(**words, output_dir=str(tmp_path / "reward")), train_dataset=pairs, eval_dataset=pairs)
    train(
        TrainConfig(**words, max_completion_length=6, output_dir=str(tmp_path / "train")),
        reward_funcs=[lambda prompts, completions, **_: [float(len(text)) for text in completions]],
        train_dataset=prompts,
        eval_dataset=prompts,
    )
    figures = {"sft": {"loss", "perplexity"}, "reward": {"accuracy_parts", "accuracy"}, "train": {"reward", "frontier"}}
    for stage, expected in figures.items():
        page = write_report(tmp_path / stage)
        check(browser, page)
        drawn = browser.run("[...document.querySelectorAll('[data-figure]')].map(f => f.dataset.figure)")
        assert expected <= set(drawn), stage


@pytest.mark.slow
def test_a_large_comparison_stays_small_and_fits_a_phone(browser: Browser, tmp_path: Path) -> None:
    methods = ("p3o", "ppo", "rloo", "online_dpo", "raft", "reinforce", "copg")
    runs = make_grid(tmp_path, methods, (0.02, 0.05, 0.1, 0.2), num_seeds=2, num_prompts=40)
    page = write_report(runs, tmp_path / "page.html")
    assert page.stat().st_size < 1_500_000
    check(browser, page, width=360)
    check(browser, page)
    heat = "document.querySelector('[data-figure=win_matrix]')"
    assert browser.run(f"[...{heat}.querySelectorAll('text.cell')].every(t => /^[0-9]+$/.test(t.textContent))")
    assert (
        browser.run(f"{heat}.querySelectorAll('text.cell').length") == 8 * 7
    )  # seven methods at one beta, and the start


# ------------------------------------------------------------------------------------------------ pointer, keyboard


@pytest.mark.slow
def test_hovering_tells_method_step_seeds_and_intervals(browser: Browser, comparison: Path) -> None:
    check(browser, comparison)
    browser.run(MARK.format(name="p3o joint", number=2))
    tip = "window.figure.querySelector('.tip')"
    assert browser.run(f"{tip}.hidden")
    hover(browser)
    text = browser.run(f"[...{tip}.children].map(child => child.textContent)")
    assert text[:2] == ["p3o joint", "step 20, mean of seeds 0, 1, 2"]
    assert text[2].startswith("reward 0.")
    assert text[2].count(",") == 1  # with its interval
    assert text[3].startswith("KL 1.")
    assert not browser.run(f"{tip}.hidden")
    browser.hover(2, 2)
    assert browser.run(f"{tip}.hidden")


@pytest.mark.slow
def test_the_keyboard_walks_along_a_figure_and_is_heard(browser: Browser, comparison: Path) -> None:
    check(browser, comparison)
    browser.run("document.querySelector('#frontier select') || document.querySelector('nav a:last-child').focus()")
    for _ in range(12):  # the first figure comes within a few tabs
        browser.key("Tab")
        if browser.run("document.activeElement.tagName") == "svg":
            break
    figure = "document.activeElement.closest('[data-figure]')"
    assert browser.run(f"{figure}.dataset.figure") == "frontier"
    heard = f"{figure}.querySelector('.heard').textContent"
    first = browser.run(heard)
    assert first.startswith("p3o joint, step 0, mean of seeds 0, 1, 2, reward ")
    browser.key("ArrowRight")
    assert browser.run(heard).startswith("p3o joint, step 10, mean")
    browser.key("ArrowDown")
    assert browser.run(heard).startswith("p3o joint, step 10, seed 0 alone")
    browser.key("End")
    assert browser.run(heard).startswith("best of n")
    assert not browser.run(f"{figure}.querySelector('.tip').hidden")
    browser.key("Escape")
    assert browser.run(f"{figure}.querySelector('.tip').hidden")


@pytest.mark.slow
@pytest.mark.parametrize("by_keyboard", [False, True])
def test_a_legend_switches_a_method_off_everywhere_and_on_again(
    browser: Browser, comparison: Path, by_keyboard: bool
) -> None:
    check(browser, comparison)
    button = "document.querySelector('[data-figure=frontier] .legend button[data-group=ppo]')"
    lines = "document.querySelectorAll('[data-series=ppo]').length"
    rows = "[...document.querySelectorAll('tr[data-group=ppo]')]"
    before = browser.run(lines)
    assert before >= 5  # mean and seeds on the frontier, and its training curve
    assert browser.run(f"{rows}.length") >= 4

    def press() -> None:
        if by_keyboard:
            browser.run(f"{button}.focus()")
            browser.key("Enter")
        else:
            browser.run(f"{button}.click()")

    press()
    assert browser.run(lines) == 0
    assert browser.run(f"{rows}.every(row => row.hidden && row.offsetHeight === 0)")
    assert browser.run(f"{button}.getAttribute('aria-pressed')") == "false"
    assert browser.run("document.querySelectorAll('[data-figure=win_matrix] text.cell').length") == 3 * 2
    if by_keyboard:  # the focus stays where the key was pressed
        assert browser.run(f"document.activeElement === {button}")
    press()
    assert browser.run(lines) == before
    assert browser.run(f"{rows}.every(row => !row.hidden)")
    assert browser.errors == []


@pytest.mark.slow
def test_any_metric_can_be_chosen(browser: Browser, comparison: Path) -> None:
    check(browser, comparison)
    figure = "document.querySelector('#curves [data-figure]')"
    shape = f"{figure}.querySelector('[data-series=\"p3o joint\"] path').getAttribute('d')"
    before = browser.run(shape)
    choose(browser, f"{figure}.querySelector('select')", "metric-grad_norm")
    assert browser.run(shape) != before
    assert browser.run(f"{figure}.querySelector('svg').textContent.includes('grad_norm')")


def choose(browser: Browser, select: str, value: str) -> None:
    browser.run(f"(s => {{ s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change')); }})({select})")


# -------------------------------------------------------------------------------------------------------- completions

CARDS = "[...document.querySelectorAll('.sample')]"


@pytest.mark.slow
def test_completions_are_searched_ordered_and_chosen(browser: Browser, comparison: Path) -> None:
    check(browser, comparison)
    data = browser.run("JSON.parse(document.getElementById('data').textContent).completions")
    first, second, other = data["policies"][0], data["policies"][1], data["policies"][3]
    assert (first["name"], second["name"], other["name"]) == (
        "starting policy",
        "p3o joint, seed 0",
        "p3o joint, seed 2",
    )
    rows = f"{CARDS}.map(card => +card.dataset.row)"
    assert browser.run(rows) == list(range(8))
    browser.run("document.querySelector('.more').click()")
    assert browser.run(rows) == list(range(12))
    assert browser.run("document.querySelector('.more').hidden")

    def gains(policy: Any) -> list[float]:
        pairs = zip(first["completions"], policy["completions"], strict=True)
        return [b["reward"] - a["reward"] for a, b in pairs]

    order, right = "document.querySelector('[name=order]')", "document.querySelector('[name=right]')"
    choose(browser, order, "gain")
    assert browser.run(rows) == sorted(range(12), key=lambda row: -gains(second)[row])[:8]
    choose(browser, order, "loss")
    assert browser.run(rows) == sorted(range(12), key=lambda row: gains(second)[row])[:8]
    choose(browser, right, "3")
    assert browser.run(rows) == sorted(range(12), key=lambda row: gains(other)[row])[:8]
    assert "p3o joint, seed 2" in browser.run(f"{CARDS}[0].textContent")
    choose(browser, order, "longest")
    lengths = [max(a["length"], b["length"]) for a, b in zip(first["completions"], other["completions"], strict=True)]
    assert browser.run(rows) == sorted(range(12), key=lambda row: -lengths[row])[:8]

    search(browser, "THING 7")
    assert browser.run(rows) == [7]
    assert browser.run(f"{CARDS}[0].querySelector('mark').textContent") == "thing 7"
    assert "1 of 1 shown; 1 of 12 hold" in browser.run("document.querySelector('.count').textContent")
    search(browser, "no such words")
    assert browser.run(rows) == []


def search(browser: Browser, words: str) -> None:
    browser.run(
        f"(s => {{ s.value = {json.dumps(words)}; s.dispatchEvent(new Event('input')); }})"
        "(document.querySelector('[name=search]'))"
    )


@pytest.mark.slow
def test_what_a_model_wrote_is_shown_and_never_run(browser: Browser, comparison: Path) -> None:
    check(browser, comparison)
    texts = browser.run("[...document.querySelectorAll('.completion, .prompt')].map(p => p.textContent)")
    assert texts.count(EVIL) == 2  # the prompt of row 1 and the completion of row 0, to the letter
    search(browser, "<script>")
    assert browser.run(f"{CARDS}.length") == 2
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.title").endswith("pairtune")
    # Even markup that got in could do nothing: the page's policy names its own script alone.
    browser.run(
        "(s => { s.textContent = 'document.title = 1'; document.body.append(s); })(document.createElement('script'))"
    )
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title = 1\">')")
    answer = browser.run("fetch('https://example.org/').then(() => 'sent', () => 'refused')")
    assert answer == "refused"
    assert browser.run("document.title").endswith("pairtune")
    assert any("Content Security Policy" in error for error in browser.errors)


# -------------------------------------------------------------------------------------------------------------- print


@pytest.mark.slow
def test_print_is_light_and_whole(browser: Browser, comparison: Path, tmp_path: Path) -> None:
    check(browser, comparison, dark=True, media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.body).color") == "rgb(28, 31, 35)"
    for hidden in ("nav", ".controls", ".more"):
        assert browser.run(f"getComputedStyle(document.querySelector('{hidden}')).display") == "none", hidden
    folded = "document.querySelectorAll('details:not([open])').length"
    assert browser.run(folded) > 0
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run(folded) == 0
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert browser.run(folded) > 0
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
