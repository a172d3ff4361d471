"""Causal-LM instruction tuning: what is read, written, learned, packed, judged and generated; bad rows by name."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import law
from pelton import MLPGate, PeltonConfig
from pelton.errors import DataError, PeltonError, RecipeError
from pelton.methods import MethodSpec
from pelton.tasks.causal import CausalLM
from pelton.tasks.causal_settings import CausalSettings
from pelton.tasks.completions import IGNORED
from pelton.tasks.conversations import Prompt
from pelton.tasks.decoding import judge
from pelton.tasks.files import read_table
from pelton.tasks.load import load_task
from pelton.tasks.packing import best_fit, pad, require_packable
from pelton.training.backbone import adapter_config
from pelton.training.feasible import require_adapter
from pelton.training.fit import Interrupted, fit, resume
from pelton.training.loading import parse_recipe
from pelton.training.recipe import Recipe
from pelton.training.run import Run
from test_fit import At, crash
from tiny import write_jsonl
from zoo import ARCHS, Arch

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
LETTERS = "abcdefghijklmnopqrstuvwxyzAIR0123456789 \n.,:#?+=-'"
DECODERS = [
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "phi3",
    "minigpt",
    "minigpt-alibi",
    "minigpt-learned",
]
GATED = {
    "methods": [
        {"kind": "lora", "rank": 2},
        {"kind": "bottleneck", "bottleneck_size": 4},
        {"kind": "prefix", "prefix_length": 3},
    ],
    "gate": {"kind": "mlp", "hidden_size": 8},
}


def save_tokenizer(folder: Path, starts: bool = True, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Saves a tokenizer of one token a letter; `starts` puts `<s>` in front of every text, as Llama's does."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *LETTERS, "<unk>"])}
    assert len(vocabulary) < 99
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def made(rows: list[dict[str, Any]], folder: Path, **settings: Any) -> tuple[CausalLM, Any]:
    """The task of some rows, and its examples."""
    table = read_table(write_jsonl(folder / "train.jsonl", rows))
    task = CausalLM.plan(CausalSettings(**({"max_length": 64, "max_new_tokens": 8} | settings)), table)
    return task, task.check(table)


def learned(feature: dict[str, Any], tokenizer: Any) -> str:
    """The text that a feature's labels spell."""
    return str(tokenizer.decode([label for label in feature["labels"] if label != IGNORED]))


# ---- what is read and written --------------------------------------------------------------------------------------

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "pair": ({"prompt": "ab", "response": "cd"}, {}, "<s>ab\n", "cd</s>"),
    "completion": ({"prompt": "ab", "completion": "cd"}, {}, "<s>ab\n", "cd</s>"),
    "question": ({"question": "ab?", "answer": "cd"}, {}, "<s>ab?\n", "cd</s>"),
    "alpaca": (
        {"instruction": "ab", "input": "x", "output": "cd", "text": "other"},
        {},
        "<s>### Instruction:\nab\n\n### Input:\nx\n\n### Response:\n",
        "cd</s>",
    ),
    "alpaca without input": (
        {"instruction": "ab", "input": " ", "output": "cd"},
        {},
        "<s>### Instruction:\nab\n\n### Response:\n",
        "cd</s>",
    ),
    "named": (
        {"a": "ab", "b": "cd", "prompt": "no"},
        {"prompt_column": "a", "response_column": "b", "format": "#{prompt}: {response}."},
        "<s>#ab: ",
        "cd.</s>",
    ),
    "all": ({"prompt": "ab", "response": "cd"}, {"loss_on": "all"}, "<s>", "ab\ncd</s>"),
    "text": ({"text": "abcd"}, {}, "<s>", "abcd</s>"),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "ab"},
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": "y"},
                {"role": "assistant", "content": "cd"},
            ]
        },
        {},
        "<|system|>s</s>\n<|user|>ab</s>\n<|assistant|>x</s>\n<|user|>y</s>\n<|assistant|>",
        "cd</s>",
    ),
    "pair as chat": (
        {"instruction": "ab", "input": "x", "output": "cd"},
        {"template": "chat"},
        "<|user|>ab\n\nx</s>\n<|assistant|>",
        "cd</s>",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_written_and_its_response_learned(form: str, tokenizer: Any, tmp_path: Path) -> None:
    row, settings, given, said = FORMS[form]
    task, examples = made([row], tmp_path, **({"max_length": 128} | settings))
    for features in (task.encode(examples.inputs, tokenizer, examples.targets), task.judged(examples, tokenizer)):
        assert tokenizer.decode(features[0]["input_ids"]) == given + said
        assert learned(features[0], tokenizer) == said
    if form not in ("text", "all"):
        assert tokenizer.decode(task.encode(examples.inputs, tokenizer)[0]["input_ids"]) == given


def test_a_prompt_is_asked_as_it_was_trained_and_a_conversation_without_reply_is_taken(
    tokenizer: Any, tmp_path: Path
) -> None:
    talk = FORMS["messages"][0]["messages"]
    task, _ = made([{"messages": talk}], tmp_path)
    asked = [{"messages": talk}, {"messages": talk[:-1]}]
    one, two = task.check_inputs(read_table(write_jsonl(tmp_path / "ask.jsonl", asked)))
    assert one == two
    assert task.from_texts(["hi"], None)[0].chat() == [{"role": "user", "content": "hi"}]
    task, _ = made([FORMS["alpaca"][0]], tmp_path)
    assert task.from_texts(["hi"], ["x"]) == [Prompt("hi", "x")]
    task, _ = made([FORMS["pair"][0]], tmp_path)
    with pytest.raises(DataError, match="leave --pair out"):
        task.from_texts(["hi"], ["x"])


def test_the_first_token_is_never_learned(tmp_path: Path) -> None:
    bare = save_tokenizer(tmp_path / "bare", starts=False)
    task, examples = made([{"text": "abc"}], tmp_path)
    assert learned(task.encode(examples.inputs, bare, examples.targets)[0], bare) == "bc</s>"


@pytest.mark.parametrize(
    ("keep", "ids", "said"), [("head", "<s>abcdefg\nxyz", "xyz"), ("tail", "<s>defg\nxyz12</s>", "xyz12</s>")]
)
def test_truncation_keeps_one_end_and_says_so(keep: str, ids: str, said: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "abcdefg", "response": "xyz12"}, {"prompt": "a", "response": "x"}]
    task, examples = made([*rows, {"prompt": "abcdefghijklmn", "response": "x"}], tmp_path, max_length=12, keep=keep)
    features = task.encode(examples.inputs, tokenizer, examples.targets)
    assert tokenizer.decode(features[0]["input_ids"]) == ids
    assert learned(features[0], tokenizer) == said
    notes = task.left_out(examples, features)
    assert notes[0] == "2 of 3 training examples are longer than 12 tokens and were cut"
    if keep == "head":
        assert notes[1:] == (
            "1 of 3 training responses lost their end",
            "1 of 3 training examples were left out: nothing to learn was left",
        )
    assert len(features) == (2 if keep == "head" else 3)
    packed = CausalLM(task.settings.model_copy(update={"packing": True}))
    again = packed.encode(examples.inputs, tokenizer, examples.targets)
    assert packed.left_out(examples, again) == notes


def test_nothing_left_of_any_response_is_said(tokenizer: Any, tmp_path: Path) -> None:
    task, examples = made([{"prompt": "abcdefghijklmnop", "response": "x"}] * 2, tmp_path, max_length=10)
    features = task.encode(examples.inputs, tokenizer, examples.targets)
    assert len(features) == 0
    assert task.left_out(examples, features)[-1].startswith("2 of 2 training examples were left out")
    with pytest.raises(DataError, match="nothing to judge"):
        task.evaluate(examples, None, [])


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"prompt": " ", "response": "x"}, "line 2, column 'prompt': the text is empty"),
    "empty response": ({"prompt": "x", "response": ""}, "line 2, column 'response': the text is empty"),
    "no response": ({"prompt": "x"}, "line 2, column 'response': expected a text, but got nothing"),
    "number": ({"prompt": 3, "response": "x"}, "line 2, column 'prompt': expected a text, but got int 3"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_bad_pairs_are_named(bad: str, tmp_path: Path) -> None:
    row, message = BAD_ROWS[bad]
    with pytest.raises(DataError, match=message):
        made([{"prompt": "a", "response": "b"}, row], tmp_path)


USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
BAD_TALKS: dict[str, tuple[Any, str]] = {
    "ends with the user": ([USER, ASSISTANT, USER], "the last message is of 'user'"),
    "unknown role": (
        [{"role": "bot", "content": "x"}, ASSISTANT],
        "message 1: unknown role 'bot'. Known: system, user",
    ),
    "reply alone": ([ASSISTANT], "the reply has no message before it"),
    "empty list": ([], "expected a list of messages, but got an empty list"),
    "text": ("hi", "expected a list of messages, but got str 'hi'"),
    "no content": ([{"role": "user"}, ASSISTANT], "message 1: expected an object with role and content"),
    "empty content": ([{"role": "user", "content": " "}, ASSISTANT], "message 1: the content is empty"),
    "parts": ([{"role": "user", "content": [1]}, ASSISTANT], r"message 1: the content is \[1\]"),
}


@pytest.mark.parametrize("bad", BAD_TALKS)
def test_bad_conversations_are_named(bad: str, tmp_path: Path) -> None:
    talk, message = BAD_TALKS[bad]
    with pytest.raises(DataError, match=rf"train.jsonl, line 2, column 'messages'.*{message}"):
        made([{"messages": [USER, ASSISTANT]}, {"messages": talk}], tmp_path)


def test_bad_columns_and_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"which columns hold the prompt and the response.* some of a, b"):
        made([{"a": "x", "b": "y"}], tmp_path)
    with pytest.raises(DataError, match=r"no column 'respond'. Did you mean 'response'"):
        made([{"prompt": "x", "response": "y"}], tmp_path, prompt_column="prompt", response_column="respond")
    with pytest.raises(DataError, match="line 1, column 'input': expected a text or nothing, but got int 3"):
        made([{"instruction": "x", "input": 3, "output": "y"}], tmp_path)
    with pytest.raises(DataError, match=r"set task.template=chat"):
        made([{"messages": [USER, ASSISTANT]}], tmp_path, template="plain")
    with pytest.raises(DataError, match="take no chat template"):
        made([{"text": "x"}], tmp_path, template="chat")


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "two forms": ({"prompt_column": "a", "messages_column": "b"}, "exclude each other"),
    "shots": ({"shots": 2}, "set examples instead"),
    "room": ({"max_length": 8, "max_new_tokens": 8}, "max_new_tokens < max_length"),
    "no response": ({"format": "{prompt}"}, "one {response}"),
    "response first": ({"format": "{response} {prompt}"}, "one {response}"),
    "unknown field": ({"format": "{question} {response}"}, "a format knows {prompt}"),
    "open brace": ({"format": "{prompt {response}"}, "format"),
}


@pytest.mark.parametrize("bad", BAD_SETTINGS)
def test_bad_settings_are_refused(bad: str) -> None:
    values, message = BAD_SETTINGS[bad]
    with pytest.raises(PeltonError, match=message):
        parse_recipe({"backbone": "x", "task": {"kind": "causal-lm", **values}}, "test")


def test_a_chat_template_must_exist_and_keep_what_comes_before_the_reply(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def load(folder: Path) -> Callable[..., Any]:
        return lambda kind, **_: AutoTokenizer.from_pretrained(folder)

    task, examples = made([{"messages": [USER, ASSISTANT]}], tmp_path)
    save_tokenizer(tmp_path / "none", template=None)
    with pytest.raises(DataError, match="no chat template"):
        task.load_processor(load(tmp_path / "none"))
    changing = save_tokenizer(tmp_path / "changing", template="{{ messages|length }}" + CHATML)
    with pytest.raises(DataError, match="writes a conversation otherwise"):
        task.encode(examples.inputs, changing, examples.targets)
    strict = save_tokenizer(tmp_path / "strict", template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="refuses a conversation of user: roles must alternate"):
        task.encode(examples.inputs, strict)
    endless = save_tokenizer(tmp_path / "endless")
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(DataError, match="no end-of-text token"):
        task.load_processor(load(tmp_path / "endless"))


# ---- packing -------------------------------------------------------------------------------------------------------


def test_best_fit_packs_all_once_and_within_the_size() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 65, (300,), generator=generator).tolist()
    bins = best_fit(lengths, 64)
    assert sorted(item for group in bins for item in group) == list(range(300))
    assert all(sum(lengths[item] for item in group) <= 64 for group in bins)
    assert len(bins) <= math.ceil(sum(lengths) / 64 * 1.05)
    assert best_fit([3, 5, 2], 5) == [[1], [0, 2]]


LENGTHS = [5, 3, 7, 1, 4]


def _rows(seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 98, (length,), generator=generator).tolist() for length in LENGTHS]


def _packed(rows: list[list[int]]) -> dict[str, Tensor]:
    """Two packed sequences of different lengths, the shorter filled up."""
    groups = [rows[:3], rows[3:]]
    return {
        "input_ids": pad([[*chain(*group)] for group in groups], 0),
        "position_ids": pad([[p for row in group for p in range(len(row))] for group in groups], 0),
    }


def _apart(model: Any, rows: list[list[int]]) -> list[Tensor]:
    logits = model(**_packed(rows), use_cache=False).logits
    first, second = logits[0, :15].split(LENGTHS[:3]), logits[1, :5].split(LENGTHS[3:])
    return [*first, *second]


def packing(arch: Arch) -> list[MethodSpec]:
    """What may be packed for, together."""
    return [spec for spec in law.together(arch) if spec.packs]


PACKING = [name for name, spec in law.METHODS.items() if spec.packs]


@pytest.mark.parametrize("method", [*PACKING, "together"])
@pytest.mark.parametrize("name", DECODERS)
def test_packed_equals_alone(name: str, method: str) -> None:
    arch = ARCHS[name]
    model = law.attached(arch, methods=packing(arch) if method == "together" else [law.METHODS[method]])
    if method == "together":
        model.get_base_model().set_attn_implementation("eager")
    rows = _rows()
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]
        assert all(law.far(a, b) < 1e-5 for a, b in zip(alone, _apart(model, rows), strict=True))
        before, rows[0] = _apart(model, rows)[1:], _rows(seed=9)[0]
        assert all(torch.equal(a, b) for a, b in zip(before, _apart(model, rows)[1:], strict=True))


@pytest.mark.parametrize("name", DECODERS)
def test_dilated_attention_keeps_packed_examples_apart(name: str) -> None:
    """Its segments are counted from the row's start, so an example's place matters, and its neighbours do not."""
    model, rows = law.attached(ARCHS[name], methods=[law.METHODS["dilated-rates"]]), _rows()
    with torch.no_grad():
        before, rows[0] = _apart(model, rows)[1:], _rows(seed=9)[0]
        assert all(torch.equal(a, b) for a, b in zip(before, _apart(model, rows)[1:], strict=True))


def test_packing_refuses_dilated_attention() -> None:
    values = {
        "backbone": "x",
        "task": {"kind": "causal-lm", "packing": True, "data": "rows.jsonl"},
        "adapter": {"methods": ["dilated"], "gate": "scalar"},
    }
    recipe = parse_recipe(values, "test")
    assert recipe.adapter is not None
    with pytest.raises(RecipeError, match="'dilated' counts its segments from the row's first token"):
        require_adapter(recipe, adapter_config(recipe.adapter))


@pytest.mark.parametrize("gate", law.GATES)
def test_packed_equals_alone_under_every_gate(gate: str) -> None:
    model, rows = law.attached(ARCHS["llama"], gate, packing(ARCHS["llama"])), _rows()
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]
        assert all(law.far(a, b) < 1e-5 for a, b in zip(alone, _apart(model, rows), strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_equals_alone_where_a_kernel_gets_no_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash kernels get positions instead of a mask: blocks with a prefix read them."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "maskless", _never)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "maskless", lambda **_: None)
    backbone = ARCHS[name].build()
    expected = law.wake(get_peft_model(ARCHS[name].build(), PeltonConfig(methods=["prefix"]))).eval()
    backbone.config._attn_implementation_internal = "maskless"
    with pytest.warns(UserWarning, match="cannot carry a prefix"):
        model = law.wake(get_peft_model(backbone, PeltonConfig(methods=["prefix"]))).eval()
    rows = _rows()[:3]
    ids, places = [*chain(*rows)], [place for row in rows for place in range(len(row))]
    with torch.no_grad():
        alone = torch.cat([expected(input_ids=torch.tensor([row])).logits[0] for row in rows])
        packed = model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([places]), use_cache=False).logits[0]
    assert law.far(alone, packed) < 1e-5


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("every block has a prefix, and none of them runs this kernel")


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_may_be_packed_for(name: str) -> None:
    require_packable(ARCHS[name].build())


class Leaky(LlamaForCausalLM):  # type: ignore[misc]
    """Takes positions, and does nothing with them."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **more: Any) -> Any:
        return super().forward(input_ids, **more)


def test_a_model_that_lets_neighbours_through_is_refused() -> None:
    with pytest.raises(DataError, match=r"Leaky let a neighbour change an example's logits by .* task.packing=false"):
        require_packable(Leaky(ARCHS["llama"].build().config))
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=99))
    with pytest.raises(DataError, match="BloomForCausalLM takes no position_ids"):
        require_packable(bloom)


# ---- judging and answering -----------------------------------------------------------------------------------------


def _batch(tokenizer: Any, tmp_path: Path, rows: list[dict[str, Any]]) -> tuple[CausalLM, Any, list[dict[str, Any]]]:
    task, examples = made(rows, tmp_path)
    features = task.judged(examples, tokenizer)
    return task, examples, [features[row] for row in range(len(features))]


RAGGED = [{"prompt": "abc"[: 1 + n % 3], "response": "xyz0123456789"[: 1 + 5 * n % 13]} for n in range(7)]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_judging_equals_the_definition_over_all_tokens(
    name: str, adapted: bool, tokenizer: Any, tmp_path: Path
) -> None:
    task, examples, features = _batch(tokenizer, tmp_path, RAGGED)
    model = law.attached(ARCHS[name]) if adapted else ARCHS[name].build()
    collate = task.collator(tokenizer)
    with torch.no_grad():
        judged = judge(model, collate(features))
        nll = right = tokens = 0.0
        for feature in features:
            ids, labels = torch.tensor([feature["input_ids"]]), torch.tensor(feature["labels"])
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            for place, label in enumerate(labels[1:].tolist()):
                if label != IGNORED:
                    nll, tokens = nll - scores[place, label].item(), tokens + 1
                    right += int(scores[place].argmax()) == label
        loss = model(**collate(features)).loss.item()
    values = task.evaluate(examples, None, judged)
    assert sum(one.tokens for one in judged) == tokens == sum(len(row["response"]) + 1 for row in RAGGED)
    assert values["loss"] == pytest.approx(nll / tokens, abs=1e-5)
    assert values["loss"] == pytest.approx(loss, abs=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert values["token_accuracy"] == pytest.approx(right / tokens)
    assert task.score(values) == -values["loss"]


def test_logits_are_made_only_where_something_is_learned(tokenizer: Any, tmp_path: Path) -> None:
    task, _, features = _batch(tokenizer, tmp_path, [{"prompt": "abcdefgh", "response": "x"}] * 2)
    model, seen = ARCHS["llama"].build(), []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        judge(model, task.collator(tokenizer)(features))
    assert seen == [(2, 2, 99)]  # x and the end


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_answers_are_the_same_alone_and_in_a_batch(name: str, tokenizer: Any, tmp_path: Path) -> None:
    task, examples = made(RAGGED, tmp_path)
    model, collate = law.attached(ARCHS[name], methods=packing(ARCHS[name]), std=0.05), task.collator(tokenizer)
    features = list(task.encode(examples.inputs, tokenizer))
    with torch.no_grad():
        together = task.outputs(model, collate(features))
        alone = [task.outputs(model, collate([feature]))[0] for feature in features]
        ids = torch.tensor([features[0]["input_ids"]])
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert together == alone
    text = tokenizer.decode(ids[0, len(features[0]["input_ids"]) :], skip_special_tokens=True)
    assert alone[0].finished or alone[0].text == text


def test_the_end_of_a_long_prompt_is_asked(tokenizer: Any, tmp_path: Path) -> None:
    task, _ = made(RAGGED, tmp_path, max_length=14)
    features = task.encode([Prompt("abcdefgh"), Prompt("a")], tokenizer)
    assert tokenizer.decode(features[0]["input_ids"]) == "<s>efgh\n"
    assert features["cut"] == [4, 0]


# ---- training ------------------------------------------------------------------------------------------------------

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a recipe over a random decoder and rows that it can learn; keywords change its training section."""

    def build(
        name: str = "llama",
        adapter: Any = GATED,
        task: dict[str, Any] | None = None,
        rows: list[dict[str, Any]] | None = None,
        **training: Any,
    ) -> Recipe:
        data, backbone = tmp_path / "data", tmp_path / name
        for split in ("train", "validation", "test"):
            (data / split).parent.mkdir(exist_ok=True)
            write_jsonl(data / f"{split}.jsonl", rows or [*RAGGED, {"prompt": "a", "response": "b"}] * 2)
        if not backbone.exists():
            ARCHS[name].build().save_pretrained(backbone)
            save_tokenizer(backbone)
        values = {
            "name": "tiny",
            "backbone": str(backbone),
            "task": {"kind": "causal-lm", "data": str(data), "max_length": 32, "max_new_tokens": 4} | (task or {}),
            "adapter": adapter,
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "log_every": 1, "seed": 7} | training,
            "output": str(tmp_path / "runs"),
        }
        return parse_recipe(values, "test")

    return build


def history(run: Run) -> list[dict[str, Any]]:
    return [entry for entry in map(json.loads, run.folder.history.read_text().splitlines()) if "grad_norm" in entry]


TALKS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]}
    for row in RAGGED
]
FITS: dict[str, tuple[str, Any, dict[str, Any], list[dict[str, Any]] | None]] = {
    "gpt2": ("gpt2", GATED, {}, None),
    "mistral, packed": ("mistral", GATED, {"packing": True}, None),
    "gemma3, chat, packed": ("gemma3", GATED, {"packing": True}, TALKS),
    "qwen3, all weights": ("qwen3", None, {"loss_on": "all"}, None),
    "phi3, default, text": ("phi3", {"preset": "default"}, {}, [{"text": row["response"] * 2} for row in RAGGED]),
}


@pytest.mark.parametrize("case", FITS)
def test_a_run_trains_loads_judges_and_answers(case: str, make: Make) -> None:
    name, adapter, task, rows = FITS[case]
    run = fit(make(name, adapter, task, rows, batch_size=2, epochs=3))
    metrics = run.folder.read("metrics")
    assert set(metrics["test"]) == {"loss", "perplexity", "token_accuracy", "score"}
    assert metrics["train_features"] < metrics["train_examples"] or not run.task.settings.packing
    loaded = Run.load(run.folder.path)
    assert loaded.evaluate(loaded.examples()) == pytest.approx(metrics["test"], rel=1e-5)
    asked = loaded.task.check_inputs(read_table(Path(str(loaded.recipe.task.data)) / "test.jsonl"))
    said = loaded.predict(asked)
    assert said == run.predict(asked)
    assert len(said) == len(asked)
    losses = [entry["loss"] for entry in history(run)]
    assert losses[-1] < losses[0]
    if adapter is not None:
        assert run.folder.gate_values.exists()


def test_a_model_learns_to_answer_and_to_stop(make: Make) -> None:
    rows = [{"prompt": word, "response": answer} for word, answer in (("warm", "yes"), ("cold", "no"))] * 8
    recipe = make(adapter=None, rows=rows, backbone_learning_rate=2e-2, max_steps=60, epochs=30, schedule="cosine")
    run = fit(recipe)
    yes, no = run.predict([Prompt("warm"), Prompt("cold")])
    assert (yes.completion, no.completion, yes.finished, no.finished) == ("yes", "no", True, True)
    assert (yes.prompt, yes.cut) == ("warm", 0)
    assert run.folder.read("metrics")["test"]["token_accuracy"] == 1.0


def _steps(run: Run) -> list[float]:
    return [entry[name] for entry in history(run) for name in ("loss", "grad_norm")]


@pytest.mark.parametrize("task", [{}, {"packing": True}], ids=["rows", "packed"])
def test_accumulated_batches_equal_one_batch(task: dict[str, Any], make: Make) -> None:
    more = {"max_length": 12, "max_new_tokens": 4} | task
    whole = fit(make(task=more, max_steps=3))
    parts = fit(make(task=more, max_steps=3, batch_size=2, gradient_accumulation=4))
    assert _steps(parts) == pytest.approx(_steps(whole), rel=2e-4)


def test_gate_penalties_of_accumulated_batches_are_not_added_up(make: Make) -> None:
    """A penalty is a mean over all tokens of a batch, so parts of it weighted by learned tokens come close to it."""
    found = []
    for size, parts in ((8, 1), (2, 4)):
        for weight in (0.0, 0.5):
            gate = {**GATED, "gate": {"kind": "mlp", "hidden_size": 8, "entropy": weight}}
            run = fit(make(adapter=gate, max_steps=1, batch_size=size, gradient_accumulation=parts))
            found.append(history(run)[0]["loss"])
    assert found[3] - found[2] == pytest.approx(found[1] - found[0], rel=1e-3)
    assert found[1] - found[0] > 0.1


def test_gate_penalties_are_shared_where_any_trainer_counts_tokens(tokenizer: Any, tmp_path: Path) -> None:
    task, _, features = _batch(tokenizer, tmp_path, RAGGED)
    batches = [task.collator(tokenizer)(features[:3]), task.collator(tokenizer)(features[3:])]
    tokens = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
    plain, penalised = (
        law.attached(ARCHS["llama"], gate=MLPGate(hidden_size=8, entropy=weight)).train() for weight in (0.0, 0.5)
    )
    alone = [(penalised(**batch).loss - plain(**batch).loss).item() for batch in batches]
    total = torch.tensor(sum(tokens))
    shared = [
        (penalised(**b, num_items_in_batch=total).loss - plain(**b, num_items_in_batch=total).loss).item()
        for b in batches
    ]
    assert min(alone) > 0.05
    expected = [one * count / sum(tokens) for one, count in zip(alone, tokens, strict=True)]
    assert shared == pytest.approx(expected, abs=1e-5)


def test_a_packed_step_equals_a_step_over_rows(make: Make) -> None:
    adapter = {**GATED, "init": "random"}  # the loss's gradient is averaged over other batches where rows are packed
    whole = fit(make(adapter=adapter, batch_size=16, max_steps=1))
    packed = fit(make(task={"packing": True}, adapter=adapter, batch_size=16, max_steps=1))
    assert _steps(packed) == pytest.approx(_steps(whole), rel=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(make: Make) -> None:
    recipe = make(task={"packing": True, "max_length": 16}, batch_size=2, epochs=3, evaluate_every=2)
    whole = fit(recipe)
    with pytest.raises(Interrupted) as broken:
        fit(recipe, callbacks=[At(3, crash)])
    again = resume(broken.value.folder)
    assert again.folder.read("metrics")["test"] == whole.folder.read("metrics")["test"]


def test_truncation_is_noted_and_what_does_not_fit_is_refused(make: Make, tmp_path: Path) -> None:
    rows = [{"prompt": "abcdefghijklmnop", "response": "x"}, {"prompt": "a", "response": "xyz"}]
    run = fit(make(rows=rows, task={"max_length": 12}, max_steps=1))
    assert "1 of 2 training examples were left out: nothing to learn was left" in run.folder.read("data")["notes"]
    before = list((tmp_path / "runs").iterdir())
    with pytest.raises(
        DataError, match=r"Nothing is left to learn .* task.max_length=12. Raise it, or set task.keep=tail"
    ):
        fit(make(rows=rows[:1] * 2, task={"max_length": 12}))
    with pytest.raises(DataError, match="max_length is 100, but the backbone has 64 positions"):
        fit(make(task={"max_length": 100}))
    assert list((tmp_path / "runs").iterdir()) == before


@pytest.mark.parametrize("way", ["streaming", "memory_map"])
def test_rows_are_packed_wherever_they_come_from(way: str, make: Make) -> None:
    run = fit(make(task={"packing": True, way: True, "max_length": 24}, max_steps=3, batch_size=2))
    assert [entry["step"] for entry in history(run)] == [1, 2, 3]


def test_examples_are_drawn(make: Make) -> None:
    recipe = make(task={"examples": 5})
    assert len(load_task(recipe.task, 1).splits["train"]) == 5


# ---- TRL -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl 1.16
def test_the_example_with_trl_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = Path(__file__).parent.parent / "examples" / "sft.py"
    options = ["--pretrain-steps", "12", "--steps", "6", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(r"trainable params: [\d,]+ \|\|", out)
    with_it, loaded = (re.search(rf"right {when}: (\d+%)", out) for when in ("with it", "after loading"))
    assert with_it is not None
    assert loaded is not None
    assert with_it[1] == loaded[1]


def test_flattened_batches_keep_examples_apart() -> None:
    """TRL and transformers flatten a batch into one row: the loss is that of the rows one by one."""
    model = law.attached(ARCHS["llama"], methods=packing(ARCHS["llama"]))
    rows = [torch.tensor([row]) for row in _rows() if len(row) > 1]
    collator = DataCollatorWithFlattening()
    batch = collator([{"input_ids": row[0].tolist(), "labels": row[0].tolist()} for row in rows])
    with torch.no_grad():
        together = model(**batch, use_cache=False).loss
        parts = [model(input_ids=row, labels=row).loss * (row.shape[1] - 1) for row in rows]
    assert together.item() == pytest.approx(sum(parts).item() / sum(row.shape[1] - 1 for row in rows), rel=1e-5)
