"""The Saliency Map in a real browser: its weights are Python's, text stays text, and a person can work with it."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import DEADLINE_S, ROOT, Cli
from msgspec import inspect

from edge_agent.job import Dataset, Job, NlftOptions, SftOptions
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.saliency import Rescored, Saliency, SaliencyRecord
from edge_agent.saliency_page import saliency_page
from edge_agent.training.methods.nlft import token_weights
from edge_agent.training.saliency_scores import inner_products

WEB = ROOT / "edge_agent" / "web"
JOB = Job(model="models/<b>tiny</b>", dataset=Dataset("0" * 64), budget_bytes=2**30)
HOSTILE = (
    "</script><script>globalThis.struck = 1</script>", "<img src=x onerror='globalThis.struck = 1'>", "<!--", "-->", "]]>",
    "<style>*{}</style>", "' onmouseover='globalThis.struck = 1", '"><svg onload="globalThis.struck = 1">', "{data}",
    "${globalThis.struck = 1}", "\\u003cscript>", "&lt;b&gt;", "\u2028", "\u202e", "\0", "\t", "\n", "", "javascript:globalThis.struck = 1",
)  # fmt: skip


class Opened:
    """A page, with everything that it complained of."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, "color_scheme": "light"} | options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_function("globalThis.saliencyMap !== undefined")

    def settled(self, script: str) -> Any:
        """Return what a script says once the page has drawn what changed."""
        return self.page.evaluate(f"() => new Promise((r) => requestAnimationFrame(() => setTimeout(() => r({script}), 0)))")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def _record(number: int, tokens: list[str], seed: int, kind: Any = "incorrect", hidden_TD: Any = None, **fields: Any) -> SaliencyRecord:
    """An answer with scores from a seed, as a trainer would write it."""
    generator = torch.Generator().manual_seed(seed)
    base, standard, judge = (torch.rand(3, len(tokens), generator=generator, dtype=torch.float64) ** 0.3).log().tolist()
    hidden_TD = torch.randn(len(tokens), 8, generator=generator) if hidden_TD is None else hidden_TD
    rescored = [Rescored(e, *([x / (e + 1) for x in scores] for scores in (base, standard, judge))) for e in (1, 3)]
    record = SaliencyRecord(
        f"line-{number}", False, kind, "How many?", "Four.", "It is not." if kind == "incorrect" else None, tokens, base, standard,
        judge if kind == "incorrect" else None, [0.0] * len(tokens), [0.0] * len(tokens), _packed(hidden_TD, len(tokens) - 1), rescored,
    )  # fmt: skip
    return msgspec.structs.replace(record, **fields)


def _packed(hidden_TD: torch.Tensor, span: int) -> bytes:
    return inner_products(hidden_TD, span).numpy().tobytes()


def _directory(path: Path, records: list[SaliencyRecord], options: NlftOptions | None = None) -> Path:
    path.mkdir()
    (path / "saliency.json").write_bytes(msgspec.json.encode(Saliency(1, options or NlftOptions(), 0, records)))
    (path / "job.json").write_bytes(msgspec.json.encode(JOB))
    return path


def _html(directory: Path) -> str:
    file = directory / "map.html"
    file.write_bytes(saliency_page(JobDirectory(directory))[0])
    return file.as_uri()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty answers: every third one correct, one of them a standard answer, one of them of hostile tokens and texts."""
    words = ["Ana", " has", " ", "7", "*", "5", "=", "35", ".", "\n", "####", " 35", "<|end|>"]
    records = [_record(n, words[: 5 + n % 9] * (1 + n % 4), n, "correct" if n % 3 == 0 else "incorrect") for n in range(39)]
    records[0] = msgspec.structs.replace(records[0], standard_answer=True, judgment=None)
    text = "".join(HOSTILE)
    records.append(_record(39, [*HOSTILE], 39, id=HOSTILE[0], question=text, answer=text, judgment=text))
    return _directory(tmp_path_factory.mktemp("answers") / "job", records)


@pytest.fixture(scope="module")
def opened(browser: Any, answers: Path) -> Iterator[Opened]:
    with Opened(browser, _html(answers)) as opened:
        yield opened


def test_presets_are_those_of_the_code(opened: Opened) -> None:
    """`Corrected` are the default options, `Released` those of the released code."""
    for name, options in (("corrected", NlftOptions()), ("released", NlftOptions.released())):
        assert {"name": "nlft", **opened.page.evaluate(f"saliencyMap.choices.{name}")} == msgspec.to_builtins(options)


def _double(values: Any) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def _python_weights(records: list[SaliencyRecord], hidden: list[Any], options: NlftOptions) -> torch.Tensor:
    """Weights of likelihood and of unlikelihood, 2 x the tokens of all answers."""
    found = []
    for r, hidden_TD in zip(records, hidden, strict=True):
        base_T, standard_T, judge_T = _double(r.base), _double(r.standard), _double(r.judge)
        assert base_T is not None
        weights = token_weights(r.kind, base_T, standard_T, judge_T, hidden_TD, options)
        found.append(torch.stack([weights.likelihood_T, weights.unlikelihood_T]))
    return torch.cat(found, 1)


WEIGH = """(all) => {
    const { now, state, recompute } = saliencyMap;
    return all.map((options) => {
        state.options = options;
        recompute();
        return [[[...now.likelihood], [...now.unlikelihood]], [...now.unknown]];
    });
}"""


def _compare(page: Any, records: list[SaliencyRecord], expected: dict[NlftOptions, torch.Tensor]) -> list[int]:
    """Hold the weights of all answers that the page says it knows against Python's; return how many it does not know, by options."""
    found = page.evaluate(WEIGH, [msgspec.to_builtins(o) for o in expected])
    lengths = torch.tensor([len(r.tokens) for r in records])
    for (weights, unknown), (o, weights_2T) in zip(found, expected.items(), strict=True):
        far_T = (torch.tensor(weights, dtype=torch.float64) - weights_2T).abs().amax(0)
        known_T = ~torch.tensor(unknown, dtype=torch.bool).repeat_interleave(lengths)
        assert not (far_T[known_T] > 1e-9).any(), o
    return [sum(unknown) for _, unknown in found]


def test_weights_of_the_page_are_those_of_python_on_all_reference_vectors(browser: Any, tmp_path: Path, shared_data: Path) -> None:
    """All 220 cases, both presets and both ways of clustering, to 1e-9; the losses are the released functions' own."""
    cases = json.loads((shared_data / "nlft_reference" / "released_loss_vectors.json").read_text())
    assert len(cases) == 220
    hidden = [_double(case["hidden"]) for case in cases]
    records = []
    for n, case in enumerate(cases):
        scores = {name: None if case[name] is None else _double(case[name]).log().tolist() for name in ("base", "standard", "judge")}
        tokens = ["x"] * len(case["base"])
        products = _packed(hidden[n], min(32, len(tokens) - 1))
        records.append(_record(n, tokens, n, case["kind"], hidden[n], **scores, products=products, rescored=[]))
    options = [NlftOptions(), NlftOptions.released(), NlftOptions(cluster="like", imitate_incorrect=True)]
    with Opened(browser, _html(_directory(tmp_path / "job", records))) as opened:
        assert _compare(opened.page, records, {o: _python_weights(records, hidden, o) for o in options}) == [0, 0, 0]
        opened.page.click("[data-preset=released]")
        losses = opened.settled("[...saliencyMap.now.recordLoss]")
        assert losses == pytest.approx([case["loss"] for case in cases], rel=1e-6)
        assert opened.complaints == []


def test_a_walk_that_leaves_what_was_recorded_is_never_shown_as_known(browser: Any, tmp_path: Path) -> None:
    """With all products every walk is Python's; with eight or 32 a token those that may be others are marked, and no other differs."""
    generator = torch.Generator().manual_seed(5)
    hidden, tokens = [], [3, 60, 90, 130, 1, 70]
    for n, length in enumerate(tokens):
        states_TD = torch.randn(length, (4, 16, 64)[n % 3], generator=generator, dtype=torch.float64)
        for t in range(1, length):
            states_TD[t] += (0.0, 0.5, 0.9, 0.97)[n % 4] * states_TD[t - 1]
        hidden.append(states_TD)
    options = [
        NlftOptions(cluster=cluster, cluster_max_span=span, cluster_distance=distance)
        for cluster in ("like", "unlike") for span in (None, 10, 40) for distance in (0.1, 0.4, 0.9)
    ]  # fmt: skip
    records = [_record(n, ["x"] * len(h), n, "correct", h) for n, h in enumerate(hidden)]
    expected, unknown = {o: _python_weights(records, hidden, o) for o in options}, []
    for span in (1000, 32, 8):
        kept = [msgspec.structs.replace(r, products=_packed(h, min(span, len(h) - 1))) for r, h in zip(records, hidden, strict=True)]
        with Opened(browser, _html(_directory(tmp_path / str(span), kept))) as opened:
            unknown.append(sum(_compare(opened.page, kept, expected)))
    assert unknown[0] == 0
    assert 0 < unknown[1] < unknown[2]
    none = [msgspec.structs.replace(r, products=None) for r in records]
    with Opened(browser, _html(_directory(tmp_path / "none", none))) as opened:
        assert _compare(opened.page, none, {o: expected[o] for o in options[:2]}) == [len(none), len(none)]


def test_hostile_text_stays_text(opened: Opened) -> None:
    """Whatever stands in tokens, ids, questions, answers, judgments and the model's name is shown, and is no markup and no script."""
    page = opened.page
    page.evaluate("saliencyMap.select(39)")
    shown = page.evaluate("[...document.querySelectorAll('.flow .t')].map((e) => e.textContent)")
    assert shown[:2] == [*HOSTILE[:2]]
    assert shown[12:18] == ["⟨2028⟩", "⟨202E⟩", "⟨0000⟩", "⇥", "↵\n", "◌"]
    assert page.inner_text("h2") == HOSTILE[0]
    for part in page.evaluate("[...document.querySelectorAll('.answer .text')].map((e) => e.textContent)"):
        assert all(text in part for text in HOSTILE[:6])
    assert "<b>tiny</b>" not in page.inner_html(".facts")
    assert "b>" in page.inner_text(".facts")
    for i in range(len(HOSTILE)):
        page.evaluate(f"document.getElementById('token-{i}').click()")
    found = "[globalThis.struck, document.scripts.length, document.images.length, document.querySelectorAll('svg[onload]').length]"
    assert page.evaluate(found) == [None, 2, 0, 0]
    assert opened.complaints == []


def test_the_page_may_run_nothing_but_itself(browser: Any, answers: Path) -> None:
    """The policy has the hashes of the page's own script and style sheet, and nothing unsafe; what else is tried is refused."""
    page, policy = saliency_page(JobDirectory(answers))
    [script] = re.findall(r'<script type="module">(.*?)</script>', page.decode(), re.DOTALL)
    [style] = re.findall(r"<style>(.*?)</style>", page.decode(), re.DOTALL)
    for kind, text in (("script", script), ("style", style)):
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", script + style)
    with Opened(browser, _html(answers)) as opened:
        markup = "() => { try { document.body.innerHTML = '<b>x</b>'; return 'taken' } catch (e) { return e.name } }"
        assert opened.page.evaluate(markup) == "TypeError"
        assert opened.page.evaluate("fetch('data:text/plain,x').then(() => 'fetched', (e) => e.name)") == "TypeError"
        opened.page.evaluate(
            "() => { const b = document.createElement('b'); b.setAttribute('style', 'color: red'); document.body.append(b) }"
        )
        assert opened.page.evaluate("getComputedStyle(document.querySelector('body > b')).color") != "rgb(255, 0, 0)"


def test_modules_work_as_files_and_their_fields_are_those_of_the_options(browser: Any, answers: Path) -> None:
    """The same scripts, served as they are, make the same page; there is a control for every field, with its bounds and values."""
    context = browser.new_context()
    page = context.new_page()
    data = re.findall(rb'id="data">(.*?)</script>', saliency_page(JobDirectory(answers))[0], re.DOTALL)[0].decode()
    kinds = {".js": "text/javascript", ".css": "text/css"}
    sheets = "".join(f"<link rel=stylesheet href={name}.css>" for name in ("colours", "saliency"))
    body = f'<!doctype html>{sheets}<div id=map></div><script type="application/json" id=data>{data}</script>'

    def answer(route: Any) -> None:
        file = WEB / Path(route.request.url).name
        if file.suffix in kinds:
            route.fulfill(path=file, content_type=kinds[file.suffix])
        else:
            route.fulfill(body=body + "<script type=module src=page.js></script>", content_type="text/html")

    page.route("http://page.test/**", answer)
    page.goto("http://page.test/")
    page.wait_for_function("globalThis.saliencyMap !== undefined")
    assert page.locator(".flow .t").count() > 0
    fields = page.evaluate("import('http://page.test/options.js').then(({ FIELDS }) => JSON.parse(JSON.stringify(FIELDS)))")
    context.close()
    known = {f.name: inspect.type_info(f.type) for f in msgspec.structs.fields(NlftOptions)}
    assert {f["name"] for f in fields} == set(known)
    for field in fields:
        kind = known[field["name"]]
        if isinstance(kind, inspect.UnionType):
            [kind] = [part for part in kind.types if not isinstance(part, inspect.NoneType)]
            assert field["nullable"]
        if isinstance(kind, inspect.LiteralType):
            assert sorted(field["choices"]) == sorted(kind.values)
        elif not isinstance(kind, inspect.BoolType):
            assert isinstance(kind, inspect.IntType | inspect.FloatType)
            open_ = field.get("open", False)
            assert (field["kind"] == "whole") == isinstance(kind, inspect.IntType)
            assert (kind.gt if open_ else kind.ge) == field["least"]
            assert (kind.lt if open_ else kind.le) == field["most"]


def test_sliders_and_keys_change_everything_at_once(opened: Opened) -> None:
    """Keys move a slider, and with it weights, shares and losses; arrows walk over tokens, J and K over answers, brackets over epochs."""
    page = opened.page
    page.click("[data-preset=corrected]")
    page.evaluate("saliencyMap.select(1)")
    before = opened.settled("[saliencyMap.now.salient.reduce((a, b) => a + b), document.querySelector('.totals dd').textContent]")
    slider = page.locator("[name=judge_base_ratio]").locator("xpath=../..").locator("input[type=range]")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("PageDown")
    after = opened.settled("[saliencyMap.now.salient.reduce((a, b) => a + b), document.querySelector('.totals dd').textContent]")
    assert after[0] > before[0]
    assert after[1] != before[1]
    assert page.evaluate("saliencyMap.options().judge_base_ratio") < 1.5
    assert page.evaluate("saliencyMap.changed.some((n) => n > 0)")
    assert page.locator(".flow .differs").count() == page.evaluate("saliencyMap.changed[1]")
    page.fill("[name=judge_base_ratio]", "-1")
    assert page.get_attribute("[name=judge_base_ratio]", "aria-invalid") == "true"
    page.fill("[name=judge_base_ratio]", "1.5")
    assert page.evaluate("saliencyMap.options().judge_base_ratio") == 1.5
    page.locator(".flow").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.evaluate("saliencyMap.state.token") == 1
    assert "2 of" in page.inner_text(".details .role")
    first = page.evaluate("saliencyMap.state.record")
    page.keyboard.press("j")
    second = page.evaluate("saliencyMap.state.record")
    page.keyboard.press("k")
    assert page.evaluate("saliencyMap.state.record") == first != second
    page.keyboard.press("]")
    assert opened.settled("document.querySelector('.stepper output').textContent") == "epoch 1 · 2 of 3"
    assert page.evaluate("saliencyMap.table.steps[1].base[0]") == pytest.approx(page.evaluate("saliencyMap.table.steps[0].base[0]") / 2)
    page.keyboard.press("[")


def test_answers_are_sorted_and_found(opened: Opened) -> None:
    """By flagged share, loss and length; only correct or incorrect ones, or those with a word; few lines exist at a time."""
    page = opened.page
    page.click("[data-preset=corrected]")
    listed = "[...document.querySelectorAll('.row')].sort((a, b) => a.offsetTop - b.offsetTop).map((e) => Number(e.id.slice(7)))"
    values = {
        "flagged": "(r) => saliencyMap.now.salient[r] / (saliencyMap.table.starts[r + 1] - saliencyMap.table.starts[r])",
        "loss": "(r) => saliencyMap.now.recordLoss[r]",
        "length": "(r) => saliencyMap.table.starts[r + 1] - saliencyMap.table.starts[r]",
    }
    page.check("input[name=filter][value=incorrect]", force=True)
    for name, value in values.items():
        page.click(f".heads [data-sort={name}]")
        down = page.get_attribute(f".heads [data-sort={name}]", "data-turn") == "down"
        found = page.evaluate(f"({listed}).map({value})")
        assert found == sorted(found, reverse=down)
        assert 5 < len(found) < 27
    assert page.inner_text(".found") == "27 of 40 answers"
    page.check("input[name=filter][value=correct]", force=True)
    assert page.inner_text(".found") == "13 of 40 answers"
    page.check("input[name=filter][value=all]", force=True)
    page.fill("input[type=search]", "onerror")
    assert page.evaluate(listed) == [39]
    page.fill("input[type=search]", "")
    page.click("[data-preset=released]")
    assert page.evaluate("[saliencyMap.trained(0), saliencyMap.trained(1)]") == [False, True]


def test_use_these_options_is_a_job_document(opened: Opened) -> None:
    """What is copied is the job with the chosen options, and its `--set` options make the same job."""
    page = opened.page
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("[data-preset=released]")
    page.fill("[name=judge_minimum]", "0.125")
    page.click("text=Use these options")
    page.wait_for_function("document.querySelector('dialog [role=status]').textContent !== ''")
    copied = page.evaluate("navigator.clipboard.readText()")
    wanted = msgspec.structs.replace(NlftOptions.released(), judge_minimum=0.125)
    assert msgspec.json.decode(copied, type=Job) == msgspec.structs.replace(JOB, method=wanted)
    settings = page.input_value("dialog textarea >> nth=1").split("--set ")[1:]
    page.click("text=Close")
    made = build_job("tiny", WEB / "page.js", None, {"budget_bytes": 2**30, "method.name": "nlft"}, [s.strip() for s in settings])
    assert made.method == wanted


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_and_everything_is_legible(browser: Any, answers: Path, scheme: str) -> None:
    """From 390 to 1440 pixels nothing makes the page scroll sideways, and text on every level of colour has a contrast of 4.5."""
    with Opened(browser, _html(answers), color_scheme=scheme) as opened:
        page = opened.page
        for width in (390, 800, 1180, 1440):
            page.set_viewport_size({"width": width, "height": 844})
            for panel in ("answer", "list", "options"):
                page.evaluate(f"document.getElementById('map').dataset.panel = '{panel}'")
                assert opened.settled("document.documentElement.scrollWidth") <= width, (width, panel)
        worst = page.evaluate(
            """() => {
                const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
                const light = (colour) => {
                    context.fillStyle = colour;
                    context.fillRect(0, 0, 1, 1);
                    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
                        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                };
                return Math.min(...['n8', 'n4', 'zero', 'p4', 'p8'].map((level) => {
                    const span = document.createElement('span');
                    span.className = `t ${level}`;
                    document.querySelector('.flow').append(span);
                    const { color, backgroundColor } = getComputedStyle(span);
                    const [a, b] = [light(color), light(backgroundColor)].sort((x, y) => y - x);
                    return (a + 0.05) / (b + 0.05);
                }));
            }"""
        )
        assert worst >= 4.5


def test_command_serves_the_page_to_this_machine_only(answers: Path) -> None:
    """On loopback, at a path of its own, to no other name of the host; it ends on Ctrl-C."""
    command = [sys.executable, "-m", "edge_agent", "saliency", str(answers), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        host, path = re.fullmatch(r"http://(127\.0\.0\.1:\d+)(/[\w-]{43}/)", url).groups()  # type: ignore[union-attr]
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:  # noqa: S310
            assert response.read() == saliency_page(JobDirectory(answers))[0]
            assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
            assert response.headers["Cache-Control"] == "no-store"
        for asked, name in (("/", host), (path, "rebound.example:80"), (path + "x", host), ("/favicon.ico", host)):
            connection = http.client.HTTPConnection(host, timeout=DEADLINE_S)
            connection.request("GET", asked, headers={"Host": name})
            assert connection.getresponse().status == 404
            connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0


def test_command_writes_one_private_file(answers: Path, tmp_path: Path, cli: Cli) -> None:
    """`--html` writes the page, which holds text of the dataset, for its owner only."""
    file = tmp_path / "new" / "map.html"
    ran = cli("saliency", answers, "--html", file)
    assert (ran.code, ran.out.strip()) == (0, str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_bytes() == saliency_page(JobDirectory(answers))[0]


BROKEN = {
    "different lengths": lambda r: msgspec.structs.replace(r, standard=[-1.0]),
    "no tokens": lambda r: msgspec.structs.replace(r, tokens=[]),
    "no whole rows": lambda r: msgspec.structs.replace(r, products=b"123"),
    "and no other, has `judge`": lambda r: msgspec.structs.replace(r, judge=None),
}


@pytest.mark.parametrize("problem", [*BROKEN, "is no directory", "has no saliency.json", "Expected `float`"])
def test_what_cannot_be_shown_is_said(problem: str, tmp_path: Path) -> None:
    """A directory without a map, or with a broken one, is an error that says what to give."""
    from edge_agent.errors import SaliencyUnusable

    if problem in BROKEN:
        _directory(tmp_path / "job", [BROKEN[problem](_record(1, ["a", "b"], 1))])
    elif problem != "is no directory":
        (tmp_path / "job").mkdir()
    if problem == "Expected `float`":
        text = msgspec.json.encode(Saliency(1, NlftOptions(), 0, [_record(1, ["a"], 1)])).replace(b'"base":[', b'"base":["')
        (tmp_path / "job" / "saliency.json").write_bytes(text.replace(b'],"standard":[', b'"],"standard":['))
    with pytest.raises(SaliencyUnusable, match=re.escape(problem) + ".*give the directory or the id of a job"):
        saliency_page(JobDirectory(tmp_path / "job"))


def test_page_of_a_directory_without_its_job(tmp_path: Path) -> None:
    """The file alone can be shown; a job of another method is shown as what it is."""
    directory = _directory(tmp_path / "job", [_record(1, ["a"], 1)])
    (directory / "job.json").unlink()
    assert b'"job":null' in saliency_page(JobDirectory(directory))[0]
    (directory / "job.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(JOB, method=SftOptions())))
    assert b'"name":"sft"' in saliency_page(JobDirectory(directory))[0]
