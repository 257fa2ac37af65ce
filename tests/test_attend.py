"""nanogpt-jax attend: its numbers are the model's, its page asks nobody, and wrong input is refused by name."""

import base64
import dataclasses
import hashlib
import html as standard_html
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import nothing_found, open_page, refused

from nanogpt_jax import config
from nanogpt_jax.commands import attend
from nanogpt_jax.config import ModelConfig
from nanogpt_jax.data import tokenizer
from nanogpt_jax.model import gpt2, watching
from nanogpt_jax.pages import attention, attention_page, html, tokens, words
from nanogpt_jax.run import run_dir
from nanogpt_jax.run.checkpoint import save_params
from nanogpt_jax.run.opened import open_run

TEXT = "El gato persigue al ratón ñ 😀\n</script> el gato come."
FORMS = [TEXT, "El gato negro duerme.", "un gato come al ratón"]


def make_run(path: Path, kind: str = "char", scale: float = 1, **model: object) -> Path:
    """A run of random weights. `scale`: of queries and keys, so that attention is not uniform."""
    found = tokenizer.make(kind, FORMS[kind != "char" :] * 40)  # of ñ and 😀, byte pairs know only the bytes
    cfg = ModelConfig(
        **{"block_size": 64, "vocab_size": found.n_vocab, "n_layer": 3, "n_head": 2, "n_embd": 32} | model
    )
    params = gpt2.init_params(cfg, jax.random.key(0))
    params["h"]["attn"]["c_attn"]["kernel"] *= 20 * scale
    path.mkdir(parents=True)
    (path / "tokenizer").mkdir()
    found.save(path / "tokenizer")
    (path / "config.json").write_text(config.to_json(config.Config(model=cfg)))
    save_params(path, params)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """runs/char, runs/pairs (own byte pairs, some of half a character), runs/short, runs/broken, runs/wide."""
    folder = tmp_path_factory.mktemp("attend")
    make_run(folder / "runs/char")
    make_run(folder / "runs/pairs", "bpe:280", scale=2)
    make_run(folder / "runs/short", block_size=16, n_head=4)
    make_run(folder / "runs/broken", scale=1e25)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "folder").mkdir()
    shutil.copytree(folder / "runs/char", folder / "runs/classifier")
    settings = json.loads((folder / "runs/char/config.json").read_text())
    (folder / "runs/classifier/config.json").write_text(json.dumps({**settings, "classify": {}}))
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def asked(*words: str) -> None:
    assert attend.main(list(words)) == 0


def data_of(page: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found)


def numbers(packed: dict) -> np.ndarray:
    return packed["low"] + packed["step"] * np.frombuffer(base64.b64decode(packed["numbers"]), "<u2")


def weights_of(data: dict) -> np.ndarray:
    """[L, H, T, T], as the page's script reads them; NaN for those left out."""
    L, H, T, K = (data[name] for name in "LHTK")
    levels = np.array(data["levels"])[np.frombuffer(base64.b64decode(data["codes"]), np.uint8)]
    found = np.where(np.tri(T, dtype=bool), np.nan, 0.0) * np.ones((L, H, 1, 1))
    if not K:
        found[:, :, *np.tril_indices(T)] = levels.reshape(L, H, -1)
        return found
    keys = np.frombuffer(base64.b64decode(data["keys"]), "<u2").reshape(L, H, T, K)
    found[:, :, :K] = np.where(np.tri(T, dtype=bool)[:K], 0, found[:, :, :K])
    found[..., 0] = 0
    for place in zip(*np.nonzero(levels.reshape(L, H, T, K)), strict=True):
        found[(*place[:3], keys[place])] = levels.reshape(L, H, T, K)[place]
    return found


def random_weights(shape: tuple[int, ...], scale: float) -> tuple[np.ndarray, np.ndarray]:
    scores = np.random.default_rng(0).normal(size=(*shape, shape[-1])).astype(np.float32) * scale
    masked = np.where(np.tri(shape[-1], dtype=bool), scores, -np.inf)
    weights = np.exp(masked - masked.max(-1, keepdims=True))
    return scores, (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, 1, 5, 20])
def test_a_byte_holds_a_weight_to_1_in_255_its_score_to_a_tenth_and_rows_sum_to_1(scale):
    scores, weights = random_weights((2, 3, 70), scale)
    stored = attention.stored(weights)
    found = np.zeros_like(weights)
    found[:, :, *np.tril_indices(70)] = attention.LEVELS[stored.codes]
    assert np.abs(found - weights).max() <= 1 / 255 + 1e-7
    assert (found[..., ~np.tri(70, dtype=bool)] == 0).all()
    assert np.abs(found.sum(-1) - 1).max() < 0.04
    assert np.abs(found.sum(-1) - 1).mean() < 0.004
    assert stored.left_out == (0, 0)
    seen = found > 0
    again = np.log(np.where(seen, found, 1)) + attention.log_sums(scores, weights)[..., None]
    assert np.abs(again - scores)[seen].max() < 0.11


def test_what_does_not_fit_is_left_out_the_smallest_first_and_its_mass_is_told():
    _, weights = random_weights((2, 3, 50), 2)
    stored = attention.stored(weights, room=3 * 2 * 3 * 50 * 7)
    assert stored.kept == 7
    assert stored.keys is not None
    kept = weights[..., 0] + np.sort(weights[..., 1:], axis=-1)[..., -6:].sum(-1)
    np.testing.assert_allclose(stored.left_out, ((1 - kept).mean(), (1 - kept).max()), atol=1e-6)
    there = stored.codes > 0
    assert (np.diff(stored.keys.astype(int), axis=-1)[there[..., 1:] & there[..., :-1]] > 0).all()
    found = attention.LEVELS[stored.codes]
    np.testing.assert_allclose(
        found, np.where(there, np.take_along_axis(weights, stored.keys.astype(int), -1), 0), atol=1 / 255
    )


def test_what_a_head_does_on_the_whole():
    T = 8
    itself, first = np.eye(T, dtype=np.float32), np.zeros((T, T), np.float32)
    first[:, 0] = 1
    alike = np.tri(T, dtype=np.float32) / np.arange(1, T + 1, dtype=np.float32)[:, None]
    found = attention.heads(np.stack([itself, first, alike])[None])
    np.testing.assert_allclose(found.entropy[0], [0, 0, np.log2(np.arange(1, T + 1)).mean()], atol=1e-6)
    np.testing.assert_allclose(found.distance[0], [0, 3.5, 1.75], atol=1e-6)
    np.testing.assert_allclose(found.first[0], [0, 1, (1 / np.arange(2, T + 1)).mean()], atol=1e-6)


def test_cosines_stand_beside_those_of_anything():
    chance = np.random.default_rng(0)
    others = chance.normal(size=(2, 400, 16)) + 10 * np.eye(16)[0]  # one dimension is large everywhere
    word = others[:, :2]
    found = attention.cosines(word, others, np.arange(400))
    assert (found.pairs[:, 0, 1] > 0.7).all()
    assert (found.anything > 0.7).all()
    assert (np.abs(found.anything_standardised) < 0.1).all()
    np.testing.assert_allclose(found.pairs[:, [0, 1], [0, 1]], 1)
    np.testing.assert_allclose(found.standardised[:, 0, 1], found.standardised[:, 1, 0])


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("ratón".encode(), "ratón"), ("ñ".encode(), "ñ"), ("😀".encode(), "😀"), (b"\n", "↵"), (b"</script>", "</script>"),
        (b" gato", "␣gato"), (b"\xc3", "<0xC3>"), (b" rat\xc3", "␣rat<0xC3>"), (b"\xb3n", "<0xB3>n"), (b"\t", "⇥"),
        ("\u0301".encode(), "◌\u0301"), ("\u202e".encode(), "<U+202E>"), (b"\x1b", "<U+001B>"), (b"", "<>"),
    ],
)  # fmt: skip
def test_a_token_is_shown_with_all_that_is_in_it(token, text):
    assert tokens.shown(token) == text


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe:300"])
def test_tokens_join_to_the_text_and_pieces_of_characters_are_known(kind):
    found = tokenizer.make(kind, FORMS * 40)
    each = [found.decode_bytes([token]) for token in found.encode(TEXT).tolist()]
    assert b"".join(each).decode() == TEXT
    pieces = tokens.pieces(each)
    whole = {
        position
        for position, token in enumerate(each)
        if b"\xff".join([token]).decode("utf-8", "replace").encode() == token
    }
    assert set(pieces) == set(range(len(each))) - whole
    assert set(pieces.values()) <= {"😀", "ó", "ñ"}
    assert (kind == "gpt2") == ("😀" in pieces.values() and "ó" not in pieces.values())
    position = tokens.last_piece(each, TEXT, "ratón")
    assert b"".join(each[: position + 1]).decode().endswith("ratón")


def test_a_character_that_the_text_cuts_off_is_a_piece_of_nothing_known():
    assert tokens.pieces([b"a", b"\xf0\x9f", b"\x98\x80", b"\xc3"]) == {1: "😀", 2: "😀", 3: ""}


def test_a_word_is_a_word_of_its_own():
    each = [c.encode() for c in "gatos y gato"]
    assert tokens.last_piece(each, "gatos y gato", "gato") == 11
    assert tokens.last_piece(each, "gatos y gato", "gat") == -1


def test_both_languages_say_the_same():
    english, spanish = words.ATTENTION["en"], words.ATTENTION["es"]
    assert list(english) == list(spanish)
    for key in english:
        assert set(re.findall(r"\{\w+\}", english[key])) == set(re.findall(r"\{\w+\}", spanish[key])), key


# ---- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["char", "pairs"])
def test_the_page_holds_what_the_forward_pass_computed(here, run, capsys):
    asked(f"runs/{run}", TEXT, "--out", "page.html", "--npz", "all.npz")
    out = capsys.readouterr().out
    assert re.match(
        r"page.html: (0\.\d MB|\d\d kB), 3 layers of 2 heads over \d+ tokens\nall.npz\nopen it in a browser", out
    )
    data, opened = data_of(Path("page.html").read_text(encoding="utf-8")), open_run(Path(f"runs/{run}"))
    ids = opened.tokenizer.encode(TEXT)
    params, _ = opened.load()
    cfg = dataclasses.replace(opened.cfg.model, attention="reference", scan_unroll=1)
    seen = watching.watch(cfg, params, ids)
    lens = watching.lens(cfg, params, seen, 5)

    assert np.abs(weights_of(data) - np.asarray(seen.weights)).max() <= 1 / 255 + 1e-6
    shape = seen.value_norms.shape
    norms = numbers(data["valueNorms"]).reshape(shape)
    np.testing.assert_allclose(norms, seen.value_norms, atol=np.ptp(norms) / 1e5)
    np.testing.assert_allclose(numbers(data["divergence"]).reshape(4, -1), lens.divergence, atol=1e-4)
    log_probability = np.asarray(jax.nn.log_softmax(seen.logits))
    losses = [None, *(-log_probability[np.arange(len(ids) - 1), ids[1:]]).tolist()]
    assert data["loss"][0] is None
    np.testing.assert_allclose(data["loss"][1:], losses[1:], rtol=1e-4)
    assert "".join(data["vocabulary"][i] for i in data["text"][:7]).startswith("El␣gato"[:3])
    likeliest = np.frombuffer(base64.b64decode(data["likeliest"]), "<u4").reshape(lens.likeliest.shape)
    one = int(lens.likeliest[2, 3, 0])
    assert data["vocabulary"][likeliest[2, 3, 0]] == tokens.shown(opened.tokenizer.decode_bytes([one]))

    with np.load("all.npz") as kept:
        np.testing.assert_allclose(kept["weights"], seen.weights, atol=1e-6)
        np.testing.assert_allclose(kept["scores"], seen.scores, atol=1e-4)
        np.testing.assert_allclose(kept["value_norms"], seen.value_norms, rtol=1e-5)
        np.testing.assert_allclose(kept["losses"], losses[1:], rtol=1e-4)
        assert (kept["tokens"] == ids).all()


def test_the_page_asks_nobody_runs_its_own_script_alone_and_escapes_the_text(here, capsys):
    attack = "</script> el gato come."
    asked("runs/char", attack, "--out", "page.html", "--word", "gato", "--in", attack, "--in", "El gato negro duerme.")
    page = Path("page.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    style, script = re.search("<style>(.*?)</style>", page, re.S), re.search("<script>(.*?)</script>", page, re.S)
    for kind, inside in (("style-src", style), ("script-src", script)):
        assert inside
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in standard_html.unescape(policy)
    assert policy.startswith("default-src ")
    assert "unsafe" not in policy
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(
        r"""\s(style|on\w+|src|href|action)=["']?|https?:|@import|url\(""", re.sub("<script.*", "", page, flags=re.S)
    )
    assert "&lt;/script&gt;" in page
    assert not re.search(r"https?:|fetch\(|import\(|XMLHttp|innerHTML", html.asset("attention.js"))
    assert capsys.readouterr().err.count("\n") == 1


def test_no_text_ends_the_data_or_the_page():
    nasty = {"x": "</script><script>alert(1)</script><!--\u2028\ud800"}
    text = html.as_json(nasty)
    assert "<" not in text
    assert json.loads(text) == nasty
    assert "<i>" not in html.page("<i>", html.filled("{{a}}", {"a": "<i>"}), data=nasty)
    with pytest.raises(AssertionError):
        html.page("", "", script="a = '</script>'")


def test_a_long_text_is_cut_and_said_and_what_is_left_out_is_said(here, capsys, monkeypatch):
    monkeypatch.setattr(attention, "ROOM", 3 * 3 * 2 * 64 * 5)
    monkeypatch.setattr(attention.stored, "__defaults__", (attention.ROOM,))
    asked("runs/char", (TEXT + "\n") * 3, "--out", "page.html", "--language", "es")
    assert (
        "note: the text has 162 tokens, and runs/char sees 64 at once: the page shows the first 64"
        in capsys.readouterr().err
    )
    page = Path("page.html").read_text(encoding="utf-8")
    assert '<html lang="es">' in page
    assert "El texto tiene 162 tokens y el modelo ve 64 a la vez: esta página muestra los primeros 64." in page
    assert re.search(
        r"solo se guardan el primero y los mayores, 5 pesos: queda fuera \d+,\d % de media, \d+,\d % en", page
    )
    found = weights_of(data_of(page))
    assert np.isnan(found[:, :, 63]).sum(-1).min() >= 59
    assert not np.isnan(found[:, :, :5]).any()


def test_two_runs_are_compared_token_by_token(here, capsys):
    asked("runs/char", TEXT[:16], "--versus", "runs/short", "--out", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    both = []
    for run in ("char", "short"):
        asked(f"runs/{run}", TEXT[:16], "--npz", "one.npz", "--out", "one.html")
        with np.load("one.npz") as kept:
            both.append(kept["losses"])
    np.testing.assert_allclose(data_of(page)["difference"][1:], both[0] - both[1], atol=1e-4)
    assert f"runs/short, step 0, has a mean loss of {both[1].mean():.3f}" in page


@pytest.mark.parametrize("run", ["char", "pairs"])
def test_a_word_has_the_same_embedding_in_every_sentence_and_then_other_vectors(here, run):
    sentences = ["el gato come.", "El gato negro duerme.", "un gato come al ratón"]
    asked(f"runs/{run}", "--word", "gato", *(f"--in={one}" for one in sentences), "--out", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page)
    cells = {
        name: [float(x) if x != "nan" else np.nan for x in re.findall("<td>(.*?)</td>", row)] for name, row in rows
    }
    assert list(cells) == ["token embedding alone", "with its position", *(f"after layer {n}" for n in (1, 2, 3))]
    assert cells["token embedding alone"][:3] == [1, 1, 1]
    assert cells["token embedding alone"][4:7] == [1, 1, 1]
    assert all(x < 1 for x in cells["after layer 3"])
    assert [len(row) for row in cells.values()] == [8] * 5
    assert page.count("<mark>") == 3


def test_the_page_of_a_run_is_its_own_and_goes_with_it(here, capsys):
    shutil.copytree("runs/char", "runs/own", dirs_exist_ok=True)
    asked("runs/own", "gato", "--picture", "one.svg", "--layer", "3", "--head", "2")
    assert "runs/own/attention.html" in capsys.readouterr().out
    assert data_of(Path("runs/own/attention.html").read_text(encoding="utf-8"))["head"] == 5
    assert "<svg" in Path("one.svg").read_text(encoding="utf-8")
    assert run_dir.ATTENTION_PAGE in run_dir.WRITTEN  # set aside and deleted with the run that it shows
    assert run_dir._is_ours("attention.html")


def test_documents_kept_apart_and_a_text_of_one_token(here):
    make_run(Path("runs/apart"), "bpe:280", separate_documents=True, end_of_text=279)
    asked("runs/apart", TEXT, "--out", "page.html")
    asked("runs/char", "E", "--out", "page.html")
    assert data_of(Path("page.html").read_text(encoding="utf-8"))["loss"] == [None]


# ---- wrong inputs ---------------------------------------------------------------------------------------------------

# (what is wrong, command line, words of the message)
WRONG = [
    ("nothing", [], ["which run, and which text?\n       nanogpt-jax attend RUN TEXT"]),
    ("no text", ["runs/char"], ["a text is missing: nanogpt-jax attend runs/char TEXT, or --text-file"]),
    ("an empty text", ["runs/char", ""], ["TEXT is empty: there is nothing to look at"]),
    ("a text without quotes", ["runs/char", "el", "gato"], ["one run and one text, but got runs/char, el, gato", "in quotes"]),
    ("two texts", ["runs/char", "gato", "--text-file=text.txt"], ["TEXT and --text-file=text.txt exclude each other"]),
    ("no run", ["runs/chr", "gato"], ["no run runs/chr", "did you mean runs/char?"]),
    ("a file for a run", ["text.txt", "gato"], ["text.txt is a file; a run is a directory"]),
    ("a classifier", ["runs/classifier", "gato"], ["runs/classifier is a classifier, not a language model"]),
    ("no file", ["runs/char", "--text-file=gone.txt"], ["--text-file=gone.txt"]),
    ("an empty file", ["runs/char", "--text-file=empty.txt"], ["--text-file=empty.txt is empty"]),
    ("an unknown character", ["runs/char", "gato Ω"], ["TEXT: character 'Ω' at position 5 is not among the"]),
    ("half a character", ["runs/pairs", "gato \udcff"], ["TEXT: character '\\udcff' at position 5 is half a character"]),
    ("a layer beyond", ["runs/char", "gato", "--layer=99"], ["--layer=99: runs/char has 3 of them, 1 to 3"]),
    ("a head beyond", ["runs/char", "gato", "--head=3"], ["--head=3: runs/char has 2 of them, 1 to 2"]),
    ("layer 0", ["runs/char", "gato", "--layer=0"], ["--layer=0 must be a whole number, at least 1"]),
    ("a layer in words", ["runs/char", "gato", "--layer=two"], ["--layer=two must be a whole number"]),
    ("no such checkpoint", ["runs/char", "gato", "--checkpoint=7"], ["runs/char has no checkpoint 7; it has 0, best and latest"]),
    ("a checkpoint of no kind", ["runs/char", "gato", "--checkpoint=newest"], ["newest"]),
    ("a language", ["runs/char", "gato", "--language=fr"], ["--language=fr is not one of en, es"]),
    ("another tokenizer", ["runs/char", "gato", "--versus=runs/pairs"], ["--versus=runs/pairs has another tokenizer than runs/char", "nanogpt-jax eval"]),
    ("too short a context", ["runs/char", TEXT, "--versus=runs/short"], ["--versus=runs/short sees 16 tokens at once, and the text has 53: give a shorter one"]),
    ("no run to compare", ["runs/char", "gato", "--versus=runs/shrt"], ["no run runs/shrt", "did you mean runs/short?"]),
    ("a word alone", ["runs/char", "gato", "--word=gato"], ["--word=gato needs two sentences to compare, or more: --in TEXT --in TEXT"]),
    ("one sentence", ["runs/char", "gato", "--word=gato", "--in=un gato"], ["--word=gato needs two sentences"]),
    ("sentences alone", ["runs/char", "gato", "--in=un gato"], ["--in gives a sentence with the word of --word, which is missing"]),
    ("an empty sentence", ["runs/char", "--word=gato", "--in=un gato", "--in="], ["--in is empty"]),
    ("an empty word", ["runs/char", "--word=", "--in=un gato", "--in=el gato"], ["--word is empty"]),
    ("a word that is not there", ["runs/char", "--word=perro", "--in=un gato", "--in=el gato"], ["--word=perro is not a word of --in=un gato"]),
    ("a word in a word", ["runs/char", "--word=gat", "--in=un gato", "--in=el gato"], ["--word=gat is not a word of --in=un gato"]),
    ("capitals", ["runs/char", "--word=El", "--in=El gato", "--in=el gato"], ["--word=El is not a word of --in=el gato\n       capital and small letters count"]),
    ("a word beyond", ["runs/short", "--word=ratón", "--in=un ratón", "--in=un gato come al ratón"], ["--word=ratón is token 21 of --in=un gato come al ratón, beyond the 16 that runs/short sees at once"]),
    ("an unknown character in a sentence", ["runs/char", "--word=gato", "--in=un gato", "--in=gato Ω"], ["--in=gato Ω: character 'Ω'"]),
    ("a directory for a page", ["runs/char", "gato", "--out=folder"], ["--out=folder is a directory; give a file"]),
    ("no directory for a page", ["runs/char", "gato", "--out=gone/page.html"], ["--out=gone/page.html: there is no directory gone"]),
    ("an empty name", ["runs/char", "gato", "--out="], ["--out is empty"]),
    ("a directory for numbers", ["runs/char", "gato", "--npz=folder"], ["--npz=folder is a directory; give a file"]),
    ("a picture of another kind", ["runs/char", "gato", "--picture=one.jpg"], ["--picture=one.jpg must end in .svg or .png"]),
    ("a full disk", ["runs/char", "gato", "--out=/dev/full"], ["cannot write --out=/dev/full: No space left on device"]),
    ("a model that has diverged", ["runs/broken", "gato"], ["runs/broken at step 0 gives logits that are not finite: it has diverged"]),
    ("a typo", ["runs/char", "gato", "--layr=1"], ["unknown flag --layr\n       did you mean --layer?"]),
    ("a typo for --in", ["runs/char", "--inn=a"], ["unknown flag --inn\n       did you mean --in?"]),
    ("twice", ["runs/char", "gato", "--layer=1", "--layer=2"], ["--layer was given twice: 1 and 2"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_input(here, capsys, line, message):
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    code, out, err = _refusal(line, capsys)
    assert (code, out) == (2, "")
    for words_of_it in message:
        assert words_of_it in err, err
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()} == before


def _refusal(line, capsys):
    from nanogpt_jax import cli

    code = cli.guarded(attend.main, line)
    out, err = capsys.readouterr()
    assert re.search("^error: ", err, re.M), err
    assert "Traceback" not in err
    return code, out, err


def test_a_picture_without_matplotlib_and_a_page_through_a_link(here, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    refused(
        attend.main,
        "runs/char gato --picture one.svg",
        capsys,
        "--picture=one.svg needs pip install 'nanogpt-jax[plot]'",
    )
    shutil.copytree("runs/char", "runs/linked")
    os.symlink("/etc/passwd", "runs/linked/attention.html")
    refused(attend.main, "runs/linked gato", capsys, "runs/linked/attention.html is a link, and not a file", "--out")


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(place):
    """One page of each kind: (file, what is special)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        more = ["--word", "gato", "--in", "el gato come.", "--in", "El gato negro duerme."]
        asked("runs/char", TEXT, "--out", "whole.html", "--versus", "runs/char", *more)
        asked("runs/pairs", TEXT, "--out", "pairs.html", "--language", "es")
        patch.setattr(attention.stored, "__defaults__", (3 * 3 * 2 * 53 * 5,))
        asked("runs/char", TEXT, "--out", "sparse.html")
    return {name: place / f"{name}.html" for name in ("whole", "pairs", "sparse")}


def opened(browser, path: Path, **context: object):
    """The page, when its script is ready, and its errors and requests as they come."""
    page, seen = open_page(browser, path, **context)
    page.wait_for_selector("html[data-ready]", state="attached")
    return page, seen


def reading(page) -> str:
    page.wait_for_timeout(150)
    return page.text_content("#reading")


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        *(("whole", 1280, "light"), ("whole", 1280, "dark"), ("whole", 390, "light"), ("whole", 390, "dark")),
        *(("pairs", 390, "light"), ("sparse", 1280, "dark")),
    ],
)
def test_axe_finds_nothing_and_the_page_asks_nobody(browser, axe, pages, name, width, scheme):
    size = {"width": width, "height": 800}
    page, seen = opened(browser, pages[name], viewport=size, color_scheme=scheme, has_touch=width < 400)
    assert seen == [pages[name].as_uri()]
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.wait_for_timeout(150)
    nothing_found(page, axe, seen)


@pytest.mark.browser
def test_every_value_is_reached_by_the_keyboard_and_is_the_models(browser, pages, place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        asked("runs/char", TEXT, "--out", "again.html", "--npz", "again.npz")
    with np.load(place / "again.npz") as kept:
        weights, scores, norms = kept["weights"], kept["scores"], kept["value_norms"]
    page, _ = opened(browser, pages["whole"])
    page.focus("#matrix")
    for key in ("Home", "PageDown", "ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    found = re.match(
        r"(\d+) «.*?» looks at 3 «␣»: weight ([\d.e-]+), score before the softmax (-?[\d.]+), ‖α·V‖ ([\d.]+) \(‖V‖ ([\d.]+)\)",
        reading(page),
    )
    assert found, reading(page)
    t = int(found[1]) - 1
    assert abs(float(found[2]) - weights[0, 0, t, 2]) < 1 / 255 + 5e-4
    assert abs(float(found[3]) - scores[0, 0, t, 2]) < 0.12
    assert abs(float(found[5]) - norms[0, 0, 2]) < 1e-3
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert "masked, weight exactly 0" in reading(page)
    assert "goes to the first token, «E», the sink" in page.text_content("#row-says")
    page.focus("#heads [aria-selected=true]")
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(100)
    assert page.text_content("#head-title") == "One head in full: layer 2, head 1"
    page.focus("#strip [aria-selected=true]")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert reading(page).startswith("2 «l» looks at")
    page.evaluate("document.getElementById('row-details').open = true")
    page.wait_for_timeout(100)
    assert page.locator("#row-table tbody tr").count() == 2
    assert "layer 2, head 1: entropy" in page.locator("#heads [aria-selected=true]").text_content()
    page.select_option("#sort", "entropy")
    shown = [float(text.split(": ")[1]) for text in page.locator("#heads .figure").all_text_contents()]
    assert shown == sorted(shown)
    page.select_option("#strip-shows", "difference")
    assert set(page.locator("#strip .figure").all_text_contents()) == {"–", "0.00"}
    page.context.close()


@pytest.mark.browser
def test_a_hover_a_touch_and_what_was_left_out(browser, pages):
    page, _ = opened(browser, pages["sparse"])
    page.evaluate("matrix.scrollIntoView({block: 'end'})")
    box = page.locator("#matrix").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.995)
    assert reading(page).startswith("53 «.» looks at")
    assert page.is_visible("#left-out-legend")
    assert "Of this row the first and the largest are kept, 5 in all" in page.text_content("#row-says")
    # a masked cell is hatched, of two colours; one of the triangle is of one
    colours = """(x, y) => { const all = new Set(), pen = matrix.getContext('2d'), n = matrix.width;
        for (const p of pen.getImageData(n * x, n * y, 14, 14).data.entries()) if (p[0] % 4 === 0) all.add(p[1]); return all.size; }"""
    assert page.evaluate(f"({colours})(0.9, 0.3)") > 1
    page.context.close()
    page, _ = opened(browser, pages["pairs"], viewport={"width": 390, "height": 800}, has_touch=True)
    page.locator("#strip [role=option]").nth(3).tap()
    assert reading(page).startswith("4 «")
    assert "<0xC3>, parte del carácter ñ" in page.text_content("#strip")
    assert "parte del carácter 😀" in page.text_content("#strip")
    page.context.close()


@pytest.mark.browser
def test_it_is_quick(browser, place):
    """A page of 6 x 6 heads over 256 tokens. The bars are for 12 x 12; times here leave room for a slow machine."""
    _, weights = random_weights((6, 6, 256), 3)
    T = 256
    chance = np.random.default_rng(0)
    seen = attention_page.Watched(
        chance.integers(0, 200, T).tolist(), np.log(np.maximum(weights, 1e-30)), weights, np.ones((6, 6, T), np.float32),
        np.ones(T - 1), chance.integers(0, 200, (7, T, 5)), np.full((7, T, 5), 0.2), np.ones((7, T)),
    )  # fmt: skip
    about = attention_page.About("runs/x", 1, "char", T, (0, 0))
    path = place / "quick.html"
    path.write_text(attention_page.page(about, seen, lambda token: f"t{token}".encode(), None, None), encoding="utf-8")
    assert path.stat().st_size < 10e6 / 4
    page, _ = opened(browser, path)
    assert page.evaluate("performance.now()") < 6000
    answer = """() => { const times = []; for (let i = 0; i < 20; i++) { const from = performance.now();
        Object.assign(chosen, {query: 100 + 7 * i, key: 5 * i}); answer(); document.body.offsetHeight;
        times.push(performance.now() - from); } return times.sort((a, b) => a - b)[10]; }"""
    assert page.evaluate(answer) < 50
    page.context.close()
