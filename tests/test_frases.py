"""The corpus whose truth is known: its text, what agrees in it, its best possible loss, and its tokenizer of words."""

import hashlib
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architecture import ROOT

from nanogpt_jax.cli import door
from nanogpt_jax.commands import evaluate, prepare
from nanogpt_jax.config import DataConfig, UserError
from nanogpt_jax.data import corpora, frases, shards, tokenizer
from nanogpt_jax.data.dataset import open_data
from nanogpt_jax.data.frases import grammar, words_of
from nanogpt_jax.data.grammar import Grammar, Word
from nanogpt_jax.evaluation import multiple_choice
from nanogpt_jax.run.metrics import read_metrics

SOURCES = [  # sentences of the texts that asked for this corpus
    "El gato persigue al ratón.",
    "El gato negro persigue al ratón.",
    "La gata que vive en la casa vieja está cansada.",
    "Me encanta el color negro, espero algún día tener un gato así: mi gato será negro.",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the text -------------------------------------------------------------------------------------------------------


def test_the_text_is_the_same_on_every_machine_and_with_every_python():
    assert hashlib.sha256(frases.text().encode()).hexdigest() == frases.TEXT_SHA256
    assert 0.9e6 < len(frases.text().encode()) < 1.2e6


def test_the_sentences_that_asked_for_it_can_be_said_and_the_first_and_the_last_are():
    for sentence in SOURCES:
        assert frases.written(grammar().read(words_of(sentence + "\n"))) == sentence + "\n"
    lines = frases.text().splitlines()
    assert SOURCES[0] in lines
    assert SOURCES[3] in lines
    for wrong in (
        "El gata",
        "El gato negra",
        "La gata que vive en la casa vieja está cansado",
        "El gato persigue a el",
    ):
        with pytest.raises(ValueError, match="cannot stand there; possible: "):
            grammar().read(words_of(wrong))


PLURALS = (
    "ratón ratones león leones jardín jardines feliz felices joven jóvenes gris grises marrón marrones azul azules "
)
PLURALS += "rey reyes búho búhos río ríos pintor pintores ciudad ciudades verde verdes triste tristes niña niñas"


def test_plurals_and_forms():
    pairs = PLURALS.split()
    assert [frases.plural(word) for word in pairs[::2]] == pairs[1::2]
    assert list(frases.forms("viejo").values()) == ["viejo", "viejos", "vieja", "viejas"]
    assert list(frases.forms("joven").values()) == ["joven", "jóvenes", "joven", "jóvenes"]


def test_everything_agrees_in_the_text():
    """By looking words up, in the order in which they stand: not by what the grammar says of its own words."""
    nouns = {
        form: (g, n)
        for kind in (frases.ANIMALS, frases.PEOPLE, frases.PLACES)
        for g, words in kind.items()
        for word in words.split()
        for n, form in (("s", word), ("p", frases.plural(word)))
    }
    adjectives: dict[str, set[tuple[str, str]]] = {}
    lists = (frases.COLOURS, frases.QUALITIES, frases.OF_PLACES, frases.FEELINGS, frases.POSTURES)
    for word in " ".join(lists).split():
        for gn, form in frases.forms(word).items():
            adjectives.setdefault(form, set()).add(gn)
    articles = {"al": {("m", "s")}, "del": {("m", "s")}, "mi": {("m", "s"), ("f", "s")}}
    for table in (frases.EL, frases.UN):
        for gn, article in table.items():
            articles.setdefault(article, set()).add(gn)
    checked: Counter[str] = Counter()
    for line in frases.text().splitlines():
        words = words_of(line)
        assert words[0][0].isupper()
        assert words[-1] == "."
        words[0] = words[0].lower()
        assert not re.search(r"\b(a|de) el\b", line)
        if words[0] == "me":
            wish = re.fullmatch(r"me (?:encanta|gusta) el color (\w+), espero algún día tener (una?) (\w+) así: mi (\w+)"
                                r"(?:, que vivirá [^,]+,)? será (\w+)\.", "m" + line[1:])  # fmt: skip
            assert wish, line
            gn = nouns[wish[3]]
            assert wish[4] == wish[3]
            assert wish[5] == frases.forms(wish[1])[gn]
            checked["colour"] += 1
            words = words[words.index("tener") : -3]  # the article, and the place where it will live
        seen: list[tuple[str, str]] = []  # of the nouns so far
        for i, word in enumerate(words):
            if word in nouns:
                assert nouns[word] in articles[words[i - 1]], line
                seen.append(nouns[word])
            elif word in adjectives and words[i - 1] in nouns:
                assert seen[-1] in adjectives[word], line
                checked["beside its noun"] += 1
            elif word in adjectives:
                copula = i - 2 if words[i - 1] == "muy" else i - 1
                assert words[copula] in ("es", "son", "está", "están"), line
                gn = seen[-1] if words[copula - 1] == "que" else seen[0]
                assert gn in adjectives[word], line
                assert (words[copula] in ("es", "está")) == (gn[1] == "s"), line
                checked["after a verb"] += 1
    assert checked["colour"] > 1500
    assert min(checked.values()) > 1500, checked


# ---- what is known of it --------------------------------------------------------------------------------------------


def test_what_may_come_next_is_certain_to_come():
    for arcs in grammar().arcs:
        assert math.isclose(sum(arc.probability for arc in arcs.values()), 1)
        assert all(text == arc.word.text for text, arc in arcs.items())
    assert len(grammar().arcs) < 5000


def test_the_entropy_is_what_sampled_sentences_cost():
    g, chance, nats, lengths = grammar(), random.Random(7), [], []
    for _ in range(3000):
        state, cost, sentence = 0, 0.0, g.sentence(chance)
        for word in sentence:
            arc = g.arcs[state][word.text]
            state, cost = arc.to, cost - math.log(arc.probability)
        nats.append(cost)
        lengths.append(len(sentence))
    off = np.array(nats) - g.entropy() * np.array(lengths)  # 0 on average
    assert abs(off.mean()) < 3 * off.std() / math.sqrt(len(off))
    assert 0.3 < off.std() / np.mean(lengths) < 1  # so that this can fail
    assert abs(np.mean(lengths) - sum(g.visits)) < 3 * np.std(lengths) / math.sqrt(len(lengths))


def toy() -> Grammar:
    """ "a b ." in two thirds of all sentences, else "b c ."; "c" is followed by "." or, as often, by "c ."."""
    return Grammar(
        ("s",),
        {
            "s": lambda: [(2, (Word("a"), Word("b"), Word("."))), (1, (Word("b"), Word("c"), ("more",), Word(".")))],
            "more": lambda: [(1, ()), (1, (Word("c"),))],
        },
    )


def test_a_window_knows_nothing_of_what_stands_before_it_but_how_the_text_is_written():
    g, words = toy(), "a b . b c c . a b .".split()
    log2, log3 = math.log(2), math.log(3)
    assert sum(g.visits) == pytest.approx(3 + 1 / 3 * 1 / 2)
    assert g.entropy() == pytest.approx((log3 - 2 / 3 * log2 + 1 / 3 * log2) / sum(g.visits))
    assert g.nats(words, 9).tolist() == pytest.approx([0, 0, log3, 0, log2, 0, log3 - log2, 0, 0])
    # windows of one: of three "b", two follow "a"; of three "c", two come first, and another follows half of those
    alone = [0, log3 - log2, log3, log3, log3, log3 - log2, log3 - log2, 0, log3 - log2]
    assert g.nats(words, 1).tolist() == pytest.approx(alone)
    # windows of four: the second begins with the first "c", and after the second it knows where it is
    assert g.nats(words, 4).tolist() == pytest.approx([0, 0, log3, 0, log3, 0, log3 - log2, 0, log3 - log2])


def test_windows_that_begin_with_a_sentence_lose_nothing_and_others_little():
    g, words = grammar(), ["\n", *words_of("".join(frases.text().splitlines(keepends=True)[:1000]))]
    state, full = 0, []
    for word in words[1:]:
        arc = g.arcs[state][word]
        state = arc.to
        full.append(-math.log(arc.probability))
    whole = g.nats(words, len(words))
    assert whole == pytest.approx(full)
    for block, stride in ((64, 0), (64, 16), (8, 0)):
        windows = g.nats(words, block, stride)
        assert len(windows) == len(full)
        starts = np.arange(0, len(words) - 1, block)
        for start in starts[[words[i] == "\n" for i in starts]]:
            assert stride or windows[start : start + block] == pytest.approx(full[start : start + block])
    means = [g.nats(words, block).mean() for block in (4, 16, 64)]
    assert means == sorted(means, reverse=True)
    assert means[-1] > whole.mean()
    assert means[-1] > g.nats(words, 64, 60).mean() > whole.mean()
    assert g.nats(words, 64, 16) == pytest.approx(full)  # at least 48 words before each: no sentence is longer


def test_who_does_not_know_the_grammar_is_worse_and_who_sees_the_next_word_is_better():
    words = words_of(frases.text())
    train, val = words[:180_000], words[180_000:]
    best = grammar().nats(val, 64)
    pairs, singles = Counter(itertools.pairwise(train)), Counter(train)
    bigrams = [-math.log((pairs[a, b] + 0.1) / (singles[a] + 0.1 * 430)) for a, b in itertools.pairwise(val)]
    assert np.mean(bigrams) - best.mean() > 0.2
    leak = np.where(np.arange(len(best)) % 100, best, 0)  # it sees one word in a hundred
    assert (best - leak).sum() > 200  # nats; without a leak, of probability exp(-200)


def test_only_its_own_text_read_as_words_has_a_best_possible_loss(here):
    data = open_data(DataConfig(source="frases", tokenizer="word"))
    found = corpora.best_possible("frases", data.val, data.tokenizer, 64)
    assert found is not None
    assert len(found) == len(data.val) - 1
    assert corpora.best_possible("text.txt", data.val, data.tokenizer, 64) is None
    assert corpora.best_possible("frases", data.val, tokenizer.make("char", "ab"), 64) is None
    assert data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val) == frases.text()
    assert data.tokenizer.n_vocab < 512


# ---- what agrees with what ------------------------------------------------------------------------------------------


def test_items_have_one_right_answer_each_and_say_what_decides_it():
    items = frases.items(12)
    groups = Counter(item["group"] for item in items)
    assert set(groups.values()) == {12}
    assert list(groups)[:2] == ["agreement, 1 word", "agreement, 2 words"]
    assert list(groups)[5:] == [
        "agreement, 6 words or more",
        "verb, 1 to 5 words",
        "verb, 6 words or more",
        frases.COLOUR,
    ]
    assert {len(item["choices"]) for item in items if item["group"] == frases.COLOUR} == {12}
    assert frases.items(12) == items
    for item in items:
        right = item["choices"][item["gold"]]
        assert len(set(item["choices"])) == len(item["choices"]) > 1
        words = grammar().read(words_of(item["query"]))
        possible = grammar().read([*words_of(item["query"]), right])
        assert possible[-1].text == right
        for wrong in {*item["choices"]} - {right}:
            with pytest.raises(ValueError, match="cannot stand there"):
                grammar().read([*words_of(item["query"]), wrong])
        assert all(words[place].role for place in item["decided_by"])
    json.dumps(items)


def test_the_words_that_decide_are_named():
    words = grammar().read(words_of("La gata que vive en la casa vieja del abuelo está cansada"))
    found = {words[a.at].text: (words[a.decided_by[0]].text, a.distance(words)) for a in frases.agreements(words)}
    assert found == {"vive": ("gata", 2), "vieja": ("casa", 1), "está": ("gata", 9), "cansada": ("gata", 10)}
    words = grammar().read(words_of(SOURCES[3]))
    (last,) = frases.agreements(words)
    assert [words[place].text for place in last.decided_by] == ["gato", "negro"]
    assert [last.at, *last.decided_by] == [17, 15, 4]  # tokens: marks count


# ---- in training and eval -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_it_stands_beside_every_loss_and_no_untrained_model_is_better(here, capsys, monkeypatch):
    monkeypatch.setattr("nanogpt_jax.inference.sampler.opening_and_continuation", lambda *_, **__: "")
    flags = (
        "--model.n-layer 1 --model.n-embd 32 --train.steps 6 --train.eval-every 3 --train.batch-size 8 --run-dir run"
    )
    assert door("train").main(["frases", *flags.split()]) == 0
    logged = [row for row in read_metrics(Path("run/metrics.jsonl")) if "val/loss" in row]
    (best,) = {row["val/best_possible"] for row in logged}
    assert all(row["val/loss"] > best for row in logged)
    out, err = capsys.readouterr()
    loss = logged[-1]["val/loss"]
    assert f"validation loss {loss:.4f}, the best possible {best:.4f}, at the last step" in out
    assert f"step 6: validation loss {loss:.4f}, the best possible {best:.4f}, " in err + out

    monkeypatch.setitem(multiple_choice.BUILT_IN, "frases", lambda: frases.items(3))
    assert evaluate.main("run --split val --choices frases --json all.json".split()) == 0
    column = json.loads(Path("all.json").read_text())["runs"][0]
    assert column["loss"]["best_possible"]["value"] == best
    above = column["loss"]["above_best"]
    assert above["value"] == pytest.approx(loss - best)
    assert above["error"] > 0
    out = capsys.readouterr().out
    assert f"best possible {best:>12.6f} ± " in out
    assert f"nats a token: {above['value'] / best:.1%}" in out
    assert re.search(r"acc, colour after así +[01]\.\d{4} ± 0\.\d{4} \(3 items\)", out)
    groups = column["choices"]["groups"]
    assert sum(group["items"] for group in groups.values()) == column["choices"]["items"] == 27
    total = sum(group["items"] * group["acc"]["value"] for group in groups.values())
    assert total / 27 == pytest.approx(column["choices"]["acc"]["value"])


def test_groups_of_a_file(here):
    rows = [{"query": "El", "choices": ["gato", "gata"], "gold": 0}, {"query": "La", "choices": ["a", "b"], "gold": 1}]
    Path("items.jsonl").write_text("\n".join(json.dumps(row | {"group": "x"}) for row in rows), encoding="utf-8")
    assert [item.group for item in multiple_choice.read_choices("items.jsonl")] == ["x", "x"]
    Path("items.jsonl").write_text(json.dumps(rows[0] | {"group": 3}), encoding="utf-8")
    with pytest.raises(UserError, match=r"items.jsonl, line 1: group must be text, but is 3"):
        multiple_choice.read_choices("items.jsonl")


@pytest.mark.slow
def test_the_recipe_comes_within_3_percent_of_the_best_and_has_99_of_100_right(here, users_env):
    command = [sys.executable, "-m", "nanogpt_jax", "train", "frases", "--run-dir", "run"]
    subprocess.run(command, cwd=here, env=users_env, capture_output=True, check=True)
    assert evaluate.main("run --split val --choices frases --json all.json".split()) == 0
    column = json.loads(Path("all.json").read_text())["runs"][0]
    above, best = column["loss"]["above_best"], column["loss"]["best_possible"]
    assert 3 * above["error"] < above["value"] < 0.03 * best["value"]
    for name, group in column["choices"]["groups"].items():
        assert group["acc"]["value"] >= 0.99, name


# ---- words as tokens ------------------------------------------------------------------------------------------------

WORDS = tokenizer.make("word", "El gato, el ratón: un día.\nLa 2ª gata_x\t😀 ¿negro?")


@settings(max_examples=200)
@given(st.text(), st.booleans())
def test_word_round_trip(text: str, end: bool):
    try:
        made = tokenizer.make("word", [text[:5], text[5:]], end_of_text=end)
    except IndexError:
        assert not text
        return
    again = type(made)(made.stored)
    assert again.fingerprint == made.fingerprint
    ids = again.encode(text)
    assert ids.dtype == np.int32
    assert (again.decode(ids), again.decode_bytes(ids)) == (text, text.encode())
    assert "".join(again.decode([i]) for i in ids) == text
    assert again.end_of_text == (again.n_vocab - 1 if end else None)
    assert again.decode(again.encode("\n")) == "\n"  # a sample can begin


@given(st.lists(st.text("añ9_ \n.,"), max_size=8), st.integers(0, 40))
def test_words_are_whole_in_both_splits_wherever_the_cut_falls(blocks: list[str], cut: int):
    text = "".join(blocks)
    found = {"train": "", "val": ""}
    for piece in shards.of_text(iter([(block, False) for block in blocks]), min(cut, len(text)), between_words=True):
        found[piece.split] += piece.text
    assert found["train"] + found["val"] == text
    assert len(found["train"]) >= min(cut, len(text))
    words = tokenizer.WORD.findall
    assert words(found["train"]) + words(found["val"]) == words(text)
    assert not re.search(r"\s", found["train"][cut:])  # and no further than it must be


def test_pieces_of_a_long_text_keep_its_words(here, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 100)
    Path("text.txt").write_text("".join(f"palabra{i % 50},  y\n\nmás " for i in range(400)), encoding="utf-8")
    data = open_data(DataConfig(source="text.txt", tokenizer="word", val_fraction=0.31))
    text = Path("text.txt").read_text(encoding="utf-8")
    assert [*data.train.tolist(), *data.val.tolist()] == data.tokenizer.encode(text).tolist()
    assert data.tokenizer.n_vocab == len(set(tokenizer.WORD.findall(text)))


def test_a_word_has_the_space_before_it():
    pieces = [WORDS.decode([i]) for i in WORDS.encode("El gato, el ratón: un día.\nLa 2ª gata_x\t😀 ¿negro?")]
    assert pieces == ["El", " gato", ",", " el", " ratón", ":", " un", " día", ".", "\n", "La", " 2ª", " gata_x", "\t", "😀", " ¿", "negro", "?"]  # fmt: skip


def test_a_prompt_can_begin_with_a_word_that_is_known_after_a_space():
    assert WORDS.decode(WORDS.encode("gato, el")) == " gato, el"
    assert WORDS.encode("gato").tolist() == WORDS.encode(" gato").tolist()
    assert WORDS.encode("El").tolist() != WORDS.encode(" el").tolist()
    assert WORDS.encode("").tolist() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("El gatto, el", "word 'gatto' at position 3 is not among the 18 words and marks that this tokenizer knows\n       did you mean gato?"),
        ("un xylophone", "word 'xylophone' at position 4 is not among the 18 words"),  # read as " un": a place more
        ("El xylophone", "leave it out, or train with --data.tokenizer=gpt2, which knows all text"),
        ("El gato\nel", "word 'el' at position 8 is not among the 18 words and marks that this tokenizer knows\n       it is known only after a space before it"),
        ("El negro", "it is known only without a space before it"),
        ("El rato\u0301n", "NFD"),
        ("El\u2003gato", "word '\\u2003' at position 2"),
        ("El \udce9", "word '\\udce9' at position 3"),
    ],
)  # fmt: skip
def test_unknown_words(text: str, message: str):
    with pytest.raises(tokenizer.UnknownText) as error:
        WORDS.encode(text)
    assert message in str(error.value)


def test_documents_and_mixtures_of_words(here):
    rows = ["uno dos", "tres", "cuatro cinco", "dos uno", "tres tres"] * 4
    Path("a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    Path("b.txt").write_text("seis siete " * 50, encoding="utf-8")
    data = open_data(DataConfig(source="a.jsonl", tokenizer="word"))
    words = {data.tokenizer.decode([i]) for i in range(data.tokenizer.n_vocab)}
    assert words == {"uno", " dos", "tres", "cuatro", " cinco", "dos", " uno", " tres", "\n", "<|endoftext|>"}
    mixed = open_data(DataConfig(mixture={"a.jsonl": 1, "b.txt": 2}, tokenizer="word"))
    assert mixed.tokenizer.n_vocab == len(words | {"seis", " siete", " seis", " "})
    Path("empty.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(UserError, match="holds no text"):
        open_data(DataConfig(source="empty.jsonl", tokenizer="word"))


def test_a_text_of_too_many_words_is_refused(here, monkeypatch, capsys):
    monkeypatch.setattr(tokenizer, "MOST_WORDS", 20)
    Path("many.txt").write_text(" ".join(map(str, range(100))), encoding="utf-8")
    refused(prepare.main, "many.txt --tokenizer word", capsys, "more than 20 different words", "bpe:8192")
    refused(prepare.main, "many.txt --tokenizer words", capsys, "none of char, word, gpt2", "did you mean word?")


@pytest.mark.parametrize("stored", [b"", b"[]", b"{}", b'{"words": [], "end_of_text": false}', b'{"words": "ab", "end": 1}', b'{"words": ["a", "a"], "end_of_text": false}', b'{"words": ["a", 1], "end_of_text": false}', b'{"words": 3, "end_of_text": false}'])  # fmt: skip
def test_damaged_words(here, stored: bytes):
    tokenizer.make("word", "un gato").save(Path("t"))
    assert tokenizer.load(Path("t")).decode([0, 1, 2]) == "\n gatoun"
    Path("t/words.json").write_bytes(stored)
    with pytest.raises(UserError, match=r"words\.json is damaged"):
        tokenizer.load(Path("t"))
    about = {"kind": "word", "fingerprint": tokenizer._fingerprint("word", stored)}
    Path("t/tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"words\.json is damaged"):
        tokenizer.load(Path("t"))


def test_the_corpus_is_offered_and_described():
    assert "frases" in corpora.CORPORA
    assert "frases" in (ROOT / "nanogpt_jax/data/README.md").read_text(encoding="utf-8")
