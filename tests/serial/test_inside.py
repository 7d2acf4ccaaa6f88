"""Looking inside: maps are the model's own, attributions add up, pages run nothing that a text brings."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numerics import directional
from whole import Driven

from mlm_mpi import generation
from mlm_mpi.backend.arrays import cpu
from mlm_mpi.data.batch import Batch
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import MlmError
from mlm_mpi.inside import answer, colours, page, picture, question
from mlm_mpi.inside.explanation import Attribution, Explanation, Row
from mlm_mpi.layers.base import Context, Map, Sizes, Trunk
from mlm_mpi.layers.classes import ClassHead
from mlm_mpi.layers.embedding import TokenEmbedding
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.layers.recurrent import Identity
from mlm_mpi.models import bert, encoder_decoder, gpt, gru, llama, lstm

TOKENS, TEXT, LABELS = Tokenizer.bytes(), "ten words", ["bad", "good", "dull"]
SIZES = {"layers": 2, "width": 24, "context": 40, "dropout": 0.3, "init_std": 0.2}
WINDOWED = llama.Settings(
    **SIZES, heads=6, key_value_heads=2, head_width=4, window=7, full_every=2, qk_norm=True, qkv_bias=True,
    logit_cap=5.0, rotary_scaling="yarn", rotary_factor=4.0,
)  # fmt: skip
MODELS = {
    "gpt": (gpt, gpt.Settings(**SIZES, heads=3)),
    "llama": (llama, WINDOWED),
    "lstm": (lstm, lstm.Settings(**SIZES)),
    "gru": (gru, gru.Settings(**SIZES)),
    "masked": (bert, bert.Settings(**SIZES, heads=3)),
    "first": (bert, bert.Settings(**SIZES, heads=3, norm="pre")),
    "mean": (bert, bert.Settings(**SIZES, heads=3)),
    "pair": (encoder_decoder, encoder_decoder.Settings(**SIZES, heads=3, lexical=True)),
}
every_model = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in ("gru", "first") else kind for kind in MODELS]
)


def model_of(kind: str, dtype: str = "f8") -> Driven:
    module, settings = MODELS[kind]
    settings = settings.resolved() if hasattr(settings, "resolved") else settings
    trunk = module.build(settings, Sizes(TOKENS.vocab_size))
    head = TokenHead(trunk)
    if kind in ("first", "mean"):
        trunk.table.tied = False
        head = ClassHead(24, len(LABELS), bert.final_norm(settings), kind, 0.3, 0.3, smoothing=0.1)
    driven = Driven([*trunk.parts, head], dtype)
    driven.store.initialise(1)
    return driven


def asked(kind: str, target: str | None = None) -> question.Question:
    if kind in ("first", "mean"):
        return question.label_of(TOKENS, TEXT, None, 40, LABELS, target)
    if kind == "masked":
        return question.hidden_token(TOKENS, TEXT, 40, 5, target)
    if kind == "pair":
        return question.written_token(TOKENS, question.source_of(TOKENS, TEXT, 40), "dix mots", 40, 3, target)
    return question.next_token(TOKENS, TEXT, 40, None, target)


def explained(
    kind: str, score: str = "logit", steps: int = 512, target: str | None = None, dtype: str = "f8"
) -> Explanation:
    path = answer.Integration(score, "end", steps)
    parts = model_of(kind, dtype).chain.parts
    return answer.explain(parts, asked(kind, target), cpu(dtype), TOKENS.eot, path, 3, "model")


@pytest.mark.parametrize("kind", ["gpt", "llama", "masked", "mean"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_maps_are_what_the_model_attends_with(kind: str, dtype: str) -> None:
    """Values weighted by them are what the fused kernel gives; rows sum to 1; what is hidden is 0."""
    parts, made = model_of(kind, dtype).chain.parts, asked(kind)
    ctx = Context(batch=made.batch)
    flows = answer.walk(parts, ctx)
    length = len(made.tokens)
    maps = answer.attention_maps(parts, flows, ctx, length)
    assert [*maps] == ["block0.attention", "block1.attention"]
    for number, (block, flow) in enumerate(zip(parts[1:-1], flows, strict=False)):
        x = flow[0] if kind in ("masked", "mean") else block.norm1.forward(flow[0], ctx)[0]
        saved, (p, *sides) = block.mixer.forward(x, ctx)[1], maps[block.mixer.name]
        assert sides == ["batch", "batch"]
        if kind == "llama":
            units, o = saved[1], saved[4]
            v = np.repeat(units[0, :, :, -1].swapaxes(0, 1), 3, axis=0)  # (H, T, D)
        else:
            qkv, o = saved[1], saved[2]
            v = block.mixer._split(qkv[:, :length])[2][0]
        assert p.shape == (len(v), length, length) and p.dtype == np.float64
        assert np.abs((p @ v).swapaxes(0, 1) - o[0, :length]).max() < (1e-6 if dtype == "f4" else 1e-13)
        assert np.abs(p.sum(axis=2) - 1).max() < 1e-12
        column, row = np.arange(length), np.arange(length)[:, None]
        later, older = column > row, column <= row - 7
        if kind in ("gpt", "llama"):
            assert not p[:, later].any() and (p[:, ~later & ~older] > 0).all()
        assert (kind == "llama" and number == 0) != p[:, older].any()


def test_texts_of_a_row_do_not_see_each_other() -> None:
    parts = model_of("mean").chain.parts
    ids = np.arange(24, dtype=np.int32)[None]
    ctx = Context(batch=Batch(0, 0, {"ids": ids}, {}, 0, texts=(9, 20)))
    ((p, *_),) = parts[1].maps(parts[0].forward((), ctx)[0], ctx).values()
    assert np.allclose(p[0, :, :20].sum(axis=2), 1) and not p[0, :, :9, 9:].any() and not p[0, :, 9:20, :9].any()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_maps_of_two_texts_are_what_both_halves_attend_with(dtype: str) -> None:
    parts, made = model_of("pair", dtype).chain.parts, asked("pair")
    ctx = Context(batch=made.batch)
    flows, texts = answer.walk(parts, ctx), {"batch": len(made.tokens), "source": len(made.source)}
    maps = answer.attention_maps(parts, flows, ctx, len(made.tokens))
    assert texts == {"batch": 9, "source": 10} and [(*one[1:],) for one in maps.values()] == [
        *2 * [("source", "source")], *2 * [("batch", "batch"), ("batch", "source")], ("batch", "source"),
    ]  # fmt: skip
    for p, rows, columns in maps.values():
        assert p.shape == (3, texts[rows], texts[columns]) and np.abs(p.sum(axis=2) - 1).max() < 1e-12
        assert (p > 0).all() or (rows, columns) == ("batch", "batch")
    block, (y, memory, _) = parts[3], flows[2]
    y = block.mixer.forward(block.norm1.forward(y, ctx)[0], ctx, residual=y)[0]
    kept = block.cross.forward(block.norm2.forward(y, ctx)[0], memory, ctx)[1]
    values, o = block.cross._split(kept[2], kept[3])[2][0], kept[4][0]
    found = (maps["decoder.block0.cross"].probabilities @ values).swapaxes(0, 1)
    assert np.abs(found - o).max() < (1e-6 if dtype == "f4" else 1e-13)


def test_the_lens_of_a_translation_is_the_decoder_and_it_is_called_by_its_halves() -> None:
    told, made = explained("pair", steps=32), asked("pair")
    assert [row.name for row in told.lens] == ["embedding", "layer 1", "layer 2", "layer 3"]
    hidden = model_of("pair").chain.without_last_part().forward((), Context(batch=made.batch))[0][0]
    logits = model_of("pair").chain.parts[-1].logits(hidden, Context())[0]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(told.lens[-1].came, p[np.arange(9), [*b"dix mots", TOKENS.eot]])
    assert told.attribution.output == "x" and told.at == 2 and len(told.attribution.values) == 10
    assert told.layers() == [
        "encoder 1",
        "encoder 2",
        *(f"decoder {n}{to}" for n in (1, 2) for to in ("", " to encoder")),
        "decoder 3 to encoder",
    ]


@every_model
def test_gradients_are_those_of_the_score(kind: str) -> None:
    parts, made = model_of(kind).chain.parts, asked(kind)
    ctx = Context(batch=made.batch, gradients=answer._Unread())
    flow, _ = parts[0].forward((), ctx)
    for what in ("logit", "log-probability"):
        score = answer._scorer(2, what)
        for array, gradient in zip(flow, answer._gradient(parts, flow, made, ctx, score), strict=True):
            directional(lambda score=score: score(answer._logits(parts, flow, made, ctx))[0], array, gradient)


@every_model
@pytest.mark.parametrize("score", ["logit", pytest.param("log-probability", marks=pytest.mark.slow)])
def test_attributions_add_up(kind: str, score: str) -> None:
    """Completeness (Sundararajan et al., proposition 1), of a target that is not the likeliest, too."""
    target = None if score == "logit" else "bad" if kind in ("first", "mean") else "z"
    told = explained(kind, score, 512, target, "f4").attribution
    assert told.output == (target or told.output) and told.gap < 2e-4
    assert abs(told.difference) > 1e-2
    assert told.values[-1 if kind == "pair" else 0] == 0.0, "an end of text is its own baseline"
    if score == "log-probability":
        assert np.exp(told.value) == pytest.approx(told.probability)


def test_a_turn_that_few_points_would_miss_is_found() -> None:
    """A score that turns within 0.2 % of the way, shared by two positions; where there is no room, it is left."""

    def rate(point: float) -> np.ndarray:
        return np.array([0.25, 0.75]) / 0.002 * (1.0 - value(point) ** 2)

    def value(point: float) -> float:
        return float(np.tanh((point - 0.1) / 0.002))

    found, asked = answer.along(rate, value, 512)
    assert np.allclose(found, [0.5, 1.5], atol=1e-4) and 32 < asked <= 200
    found, asked = answer.along(rate, value, 39)
    assert abs(found.sum() - 2) > 0.01 and asked == 32


def test_what_comes_behind_adds_nothing() -> None:
    made = question.next_token(TOKENS, TEXT, 40, 5, None)
    told = answer.explain(model_of("gpt").chain.parts, made, cpu("f8"), TOKENS.eot, answer.Integration(), 1, "model")
    assert told.attribution.output == TEXT[4] and told.attribution.values[1:5].all()
    assert not told.attribution.values[5:].any()


def test_of_a_linear_model_it_is_exact() -> None:
    embedding = TokenEmbedding("embed", TOKENS.vocab_size, 8, 1.0, 0.0)
    model = Driven([embedding, TokenHead(Trunk([embedding], Identity(), 8, embedding.tokens))])
    model.store.initialise(0)
    made, table = asked("gpt", "z"), embedding.tokens.data
    for baseline, start in (("end", table[TOKENS.eot]), ("zero", 0.0)):
        path = answer.Integration("logit", baseline)
        told = answer.explain(model.chain.parts, made, cpu("f8"), TOKENS.eot, path, 1, "model").attribution
        wanted = np.zeros(len(made.tokens))
        wanted[-1] = (table[ord(TEXT[-1])] - start) @ table[ord("z")]
        assert np.allclose(told.values, wanted, rtol=1e-12) and told.gap < 1e-12


def lens_of(kind: str) -> tuple[list[Row], Driven]:
    model, made = model_of(kind), asked(kind)
    ctx = Context(batch=made.batch)
    return answer.logit_lens(model.chain.parts, answer.walk(model.chain.parts, ctx), made, ctx, 3), model


@pytest.mark.parametrize("kind", ["gpt", "llama", "lstm"])
def test_the_lens_of_the_last_layer_is_the_model(kind: str) -> None:
    rows, model = lens_of(kind)
    logits = generation.logits(model.chain, asked(kind).batch.inputs["ids"])[0]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    assert [row.name for row in rows] == ["embedding", "layer 1", "layer 2"]
    best = np.argsort(-p, axis=1)[:, :3]
    assert [[word for word, _ in some] for some in rows[-1].top] == [
        [question.shown(TOKENS, int(number)) for number in some] for some in best
    ]
    came = p[np.arange(len(TEXT)), list(TEXT.encode())]
    assert np.allclose(rows[-1].came[:-1], came) and np.isnan(rows[-1].came[-1])
    assert not np.allclose(rows[-1].came[:-1], rows[0].came[:-1])


def test_the_lens_of_a_classifier_is_of_the_text() -> None:
    rows, model = lens_of("mean")
    ctx = Context(batch=replace(asked("mean").batch, targets={}))
    model.chain.forward((), ctx)
    found = dict(rows[-1].top[0])
    assert [*found] == sorted(found, key=found.get, reverse=True)
    assert np.allclose([found[label] for label in LABELS], ctx.tally["probabilities"][0])


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        (lambda: question.next_token(TOKENS, "", 40, None, None), "the text is empty: give some words"),
        (lambda: question.next_token(TOKENS, "x" * 40, 40, None, None),
         "the text has 40 tokens, there is room for 39 (model.context = 40): shorten it"),
        (lambda: question.next_token(TOKENS, "x" * 256, 4000, None, None),
         "the text has 256 tokens, there is room for 255 (256 tokens on a page): shorten it"),
        (lambda: question.next_token(TOKENS, "ab", 40, 3, None),
         "--at 3 is no token of the text, which has 2: 1 'a', 2 'b'"),
        (lambda: question.next_token(TOKENS, "ab", 40, 1, "é"),
         r"--target 'é' is 2 tokens of this model: give one of '\\xc3', '\\xa9'"),
        (lambda: question.next_token(TOKENS, "ab", 40, 1, ""), "--target '' is 0 tokens of this model: give one"),
        (lambda: question.hidden_token(TOKENS, "ab", 40, None, None),
         "this model is asked for a hidden token: give its number by --at, 1 'a', 2 'b'"),
        (lambda: question.label_of(TOKENS, "ab", None, 40, LABELS, "god"),
         "--target 'god' is no label of this model; did you mean 'good'?"),
        (lambda: question.written_token(TOKENS, np.array([97, 256]), "", 40, 1, None),
         "the text is empty: give some words"),
        (lambda: question.written_token(TOKENS, np.array([97, 256]), [98], 40, 3, None),
         "--at 3 is no token of the translation, which has 2: 1 'b', 2 '■'"),
        (lambda: question.label_of(TOKENS, "a" * 20, "b" * 20, 40, LABELS, None),
         "the two texts have 3 tokens more than there is room for: shorten them"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line(ask, line: str) -> None:
    with pytest.raises(MlmError) as refused:
        ask()
    assert str(refused.value) == line


EVIL = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&lt;",
    "@DATA@",
    "\u2028\n",
    "$x^2$",
    "'\"",
]


def told_of(length: int, layers: int = 2, heads: int = 3) -> Explanation:
    """Of tokens that would rather be something else."""
    draws = np.random.default_rng(length)
    tokens = [EVIL[number % len(EVIL)] for number in range(length)]
    p = draws.random((layers, heads, length, length)) * np.tri(length)
    maps = {f"block{number}.attention": Map(one / one.sum(axis=2, keepdims=True)) for number, one in enumerate(p)}
    top = [[(token, 0.5), (EVIL[0], 0.25)] for token in tokens]
    lens = [Row(name, top, np.full(length, np.nan)) for name in ("embedding", "layer 1")]
    account = Attribution(EVIL[0], 0.5, "logit", 3.0, "ends of text", 1.0, 64, draws.normal(size=length))
    model = f"{EVIL[0]}</title>, step 3"
    return Explanation(model, "which token follows", tokens, length - 1, maps, tokens, lens, account)


def two_told(source: int, target: int) -> Explanation:
    """Of a text and its translation."""
    plain, tokens = told_of(target), [EVIL[number % len(EVIL)] for number in range(source)]
    draws, sizes = np.random.default_rng(source), {"batch": target, "source": source}
    maps = {}
    for rows, columns in (("source", "source"), ("batch", "batch"), ("batch", "source")):
        p = draws.random((3, sizes[rows], sizes[columns]))
        maps[f"{rows}.{columns}"] = Map(p / p.sum(axis=2, keepdims=True), rows, columns)
    account = replace(plain.attribution, values=draws.normal(size=source))
    return replace(plain, maps=maps, source=tokens, attribution=account)


def block(text: str, opening: str, end: str = "</script>") -> str:
    return text.partition(opening)[2].partition(end)[0]


@pytest.mark.parametrize("length", [1, 9, "two"])
def test_a_page_holds_its_numbers_and_runs_nothing_else(length: int | str) -> None:
    told = two_told(9, 4) if length == "two" else told_of(length)
    text = page.page(told, 1, 0).decode()
    data = json.loads(block(text, 'id="data">'))
    assert data["tokens"] == told.tokens and data["model"] == told.model
    for layer, (p, *_) in zip(data["layers"], told.maps.values(), strict=True):
        root = np.frombuffer(base64.b64decode(layer["map"]), np.uint8).reshape(p.shape) / 255
        assert np.abs(root**2 - p).max() < 0.004
    assert re.findall(r"<script[^>]*>", text) == ['<script type="application/json" id="data">', "<script>"]
    assert text.count("</script>") == text.count("<script") == 2 and "onerror" not in text.replace(
        block(text, 'id="data">'), ""
    )
    assert html.escape(told.model) in text.partition("</title>")[0]
    policy = text.partition("Content-Security-Policy")[2].partition(">")[0]
    for written in (block(text, "<script>"), block(text, "<style>", "</style>")):
        assert base64.b64encode(hashlib.sha256(written.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy and not re.search(r"(src|href)\s*=\s*[\"']?(http|//)", text)
    assert "innerHTML" not in text and "eval(" not in text


def test_a_page_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_BYTES", 2 * 3 * 81 - 1)
    data = json.loads(block(page.page(told_of(9), 0, 2).decode(), 'id="data">'))
    assert (
        [layer["heads"] for layer in data["layers"]] == [1, 1]
        and data["head"] == 0
        and "mean of its heads" in data["limits"]
    )


def test_a_picture_is_a_png_of_any_text() -> None:
    """One without attention; of one with it, tests/programs/test_explain.py."""
    assert picture.picture(replace(told_of(9), maps={}), 0).startswith(b"\x89PNG\r\n")


def test_scales_have_equal_steps_and_text_on_them_can_be_read() -> None:
    for kind in ("amount", "sign"):
        for theme in ("light", "dark"):
            scale = colours.scale(kind, theme)
            linear = np.where(scale <= 10.3, scale / 255 / 12.92, ((scale / 255 + 0.055) / 1.055) ** 2.4)
            lab = np.cbrt(linear @ np.linalg.inv(colours._TO_RGB).T) @ np.linalg.inv(colours._TO_LMS).T
            steps = np.linalg.norm(np.diff(lab[::16], axis=0), axis=1)
            assert steps.max() < 1.15 * steps.min(), f"{kind} {theme}"
            light = linear @ [0.2126, 0.7152, 0.0722]  # as page.js
            contrast = np.where(light > 0.179, (light + 0.05) / 0.05, 1.05 / (light + 0.05))
            assert contrast.min() >= 4.5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_draws_it_and_has_nothing_to_complain_of(tmp_path: Path) -> None:
    two = [(two_told(9, 4), layer, 4 + 9 + 9) for layer in range(3)]
    for told, layer, buttons in (*((told_of(length), 1, 2 * length) for length in (1, 40, 256)), *two):
        (tmp_path / "page.html").write_bytes(page.page(told, layer, 0))
        words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        words += ["--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom", f"file://{tmp_path}/page.html"]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in ended.stderr
        assert len(re.findall(r'class="token[ "]', ended.stdout)) == buttons and "Position" in ended.stdout
        assert len(re.findall(r"<script[ >]", ended.stdout)) == 2 and "<img" not in ended.stdout
