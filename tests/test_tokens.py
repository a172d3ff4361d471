"""Token classification: tags at first subwords, entities scored as conlleval does, BIO that is not BIO."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from pelton.cli.main import run as command
from pelton.errors import DataError
from pelton.tasks.load import load_task
from pelton.tasks.metrics import tag_metrics
from pelton.tasks.tables import Table
from pelton.tasks.tokens import TokenClassification, TokenSettings
from pelton.training.fit import fit
from pelton.training.loading import parse_recipe
from pelton.training.run import Run
from tiny import write_jsonl

NAMES = ["Ann", "Bob", "Cleo"]
PLACES = ["Rome", "Oslo"]
VERBS = ["visits", "left"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *NAMES, "Ro", "##me", "Os", "##lo", "visi", "##ts", "left", "."]


def sentence(index: int) -> dict[str, Any]:
    name, place = NAMES[index % 3], PLACES[index // 3 % 2]
    words = [name, NAMES[(index + 1) % 3], VERBS[index % 2], place, "."]
    return {"tokens": words, "ner_tags": ["B-PER", "I-PER", "O", "B-LOC", "O"]}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT whose tokenizer cuts some words in two."""
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(PIECES), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 48), ("validation", 12), ("test", 12)):
        write_jsonl(folder / f"{split}.jsonl", [sentence(index) for index in range(count)])
    return folder


def table(rows: list[dict[str, Any]]) -> Table:
    return Table("t.jsonl", {key: [row[key] for row in rows] for key in rows[0]}, lines=range(1, len(rows) + 1))


def task(**settings: Any) -> TokenClassification:
    return TokenClassification.plan(TokenSettings(**settings), table([sentence(0)]))


# ---- reading -----------------------------------------------------------------------------------------------------


def test_both_marks_of_a_type_exist_and_outside_comes_first() -> None:
    assert task().labels.names == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    plain = TokenClassification.plan(TokenSettings(), table([{"words": ["a", "b"], "tags": ["NN", "VB"]}]))
    assert plain.labels.names == ("NN", "VB")
    assert plain.metrics == ("macro_f1", "accuracy", "loss")
    assert (plain.settings.word_column, plain.settings.tag_column) == ("words", "tags")


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        (["a"], ["B-PER", "O"], "t.jsonl, line 2, column 'ner_tags': expected 1 tags, one a word, but got 2."),
        ([], [], "t.jsonl, line 2, column 'tokens': expected a list of one or more words, but got []."),
        (["a"], ["B-ORG"], "line 2, column 'ner_tags', word 1: unseen label 'B-ORG'. Classes of the training data"),
        (["a", "b"], ["O", "I-PER"], "word 2: the entity starts with I-PER, but BIO tags start with B-PER. Convert"),
        (["a", "b"], ["B-LOC", "I-PER"], "word 2: the entity starts with I-PER, but BIO tags start with B-PER."),
    ],
)
def test_what_is_no_tagged_sentence_is_named(words: list[str], tags: list[str], message: str) -> None:
    with pytest.raises(DataError) as error:
        task().check(table([sentence(0), {"tokens": words, "ner_tags": tags}]))
    assert message in str(error.value)


def test_repairs_are_counted_and_said() -> None:
    rows = [{"tokens": ["a", "b", "c"], "ner_tags": ["I-PER", "I-PER", "I-LOC"]}]
    examples = task(bio="repair").check(table(rows))
    assert examples.targets == [[3, 4, 1]]
    assert examples.notes == ("t.jsonl: 2 entities that start with I- were read as if they started with B-",)
    assert task(bio="repair").check(table([sentence(0)])).notes == ()


# ---- subwords ----------------------------------------------------------------------------------------------------


def test_a_tag_stands_at_its_words_first_subword(backbone: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(backbone)
    encoded = task().encode([("Ann", "visits", "Rome")], tokenizer, [[3, 0, 1]])
    assert tokenizer.convert_ids_to_tokens(encoded[0]["input_ids"]) == [
        "[CLS]", "Ann", "visi", "##ts", "Ro", "##me", "[SEP]",
    ]  # fmt: skip
    assert encoded[0]["labels"] == [-100, 3, 0, -100, 1, -100, -100]
    assert encoded[0]["starts"] == [1, 2, 4]
    cut = task(max_length=4).encode([("Ann", "visits", "Rome")], tokenizer, [[3, 0, 1]])
    assert cut[0]["starts"] == [1, 2, -1]


def test_entities_are_scored_as_seqeval_does() -> None:
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    rng = random.Random(0)
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    true = [[rng.choice(names) for _ in range(rng.randint(1, 9))] for _ in range(50)]
    predicted = [[tag if rng.random() < 0.7 else rng.choice(names) for tag in tags] for tags in true]
    found = tag_metrics(true, predicted, entities=True)
    assert found == {
        "f1": f1_score(true, predicted),
        "precision": precision_score(true, predicted),
        "recall": recall_score(true, predicted),
        "accuracy": pytest.approx(accuracy_score(true, predicted)),
    }
    half = tag_metrics([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-LOC"]], entities=True)
    assert (half["f1"], half["accuracy"]) == (0.5, 0.75)


# ---- training ----------------------------------------------------------------------------------------------------


def recipe(backbone: Path, data: Path, output: Path, **task_settings: Any) -> Any:
    values = {
        "backbone": str(backbone),
        "task": {"kind": "token-classification", "data": str(data), **task_settings},
        "adapter": {"methods": [{"kind": "lora", "rank": 4}, {"kind": "bottleneck", "bottleneck_size": 8}]},
        "training": {"epochs": 12, "batch_size": 8, "learning_rate": 2e-2, "seed": 0, "trackers": []},
        "output": str(output),
    }
    return parse_recipe(values, "test")


def test_it_learns_and_a_loaded_run_says_the_same(
    backbone: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = fit(recipe(backbone, data, tmp_path / "runs"))
    metrics = trained.folder.read("metrics")
    assert set(metrics["test"]) == {"f1", "precision", "recall", "accuracy", "loss", "score"}
    assert metrics["test"]["f1"] > 0.9
    loaded = Run.load(trained.folder.path)
    assert loaded.evaluate(loaded.examples()) == pytest.approx(metrics["test"], abs=1e-6)
    alone = loaded.predict([("Ann", "Bob", "left", "Oslo", ".")])[0]
    assert alone.tags == ("B-PER", "I-PER", "O", "B-LOC", "O")
    capsys.readouterr()
    assert command(["predict", str(trained.folder.path), "--text", "Ann Bob left Oslo ."]) == 0
    assert json.loads(capsys.readouterr().out)["tags"] == list(alone.tags)


def test_words_that_were_cut_off_are_predicted_outside(backbone: Path, data: Path, tmp_path: Path) -> None:
    trained = fit(recipe(backbone, data, tmp_path / "runs", max_length=4))
    found = trained.predict([("Ann", "Bob", "left", "Oslo", ".")])[0]
    assert found.tags[2:] == ("O", "O", "O")
    assert trained.folder.read("metrics")["test"]["recall"] <= 0.5
    words = [
        len(tokens) for tokens in load_task(trained.recipe.task, trained.recipe.training.seed).splits["train"].inputs
    ]
    lost = f"{sum(words) - 2 * len(words)} words of {len(words)} training sentences are behind task.max_length"
    assert any(note.startswith(lost) for note in trained.folder.read("data")["notes"])


def test_few_sentences_keep_the_share_that_has_entities(tmp_path: Path) -> None:
    rows = [sentence(i) if i % 4 == 0 else {"tokens": ["left"], "ner_tags": ["O"]} for i in range(80)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    settings = TokenSettings(data=str(tmp_path), examples=20, validation_examples=8)
    splits = load_task(settings, seed=1).splits
    assert sum(len(set(tags)) > 1 for tags in splits["train"].targets) == 5
    assert sum(len(set(tags)) > 1 for tags in splits["validation"].targets) == 2
