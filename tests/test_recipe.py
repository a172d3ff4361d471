"""Recipes: every shipped one is valid; every mistake is one line that says what to type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pelton.errors import PeltonError, RecipeError
from pelton.tasks.load import TASK_KINDS
from pelton.training.backbone import adapter_config, locate
from pelton.training.feasible import require_adapter
from pelton.training.loading import dump_recipe, load_recipe, parse_recipe, shipped_recipes
from pelton.training.recipe import AdapterSettings, Recipe, TrainingSettings

SHIPPED = (
    "banking77, camvid-segment, clinc150, glue, images, instructions, minigpt-adapt, minigpt-shakespeare, mrpc, ner, "
    "recon-pretrain, squad"
)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    if not recipe.backbone.startswith("new:"):  # that is trained as it is
        assert recipe.adapter is not None
        adapter_config(recipe.adapter)
    if recipe.backbone.startswith("pkg:"):
        assert Path(locate(recipe.backbone), "config.json").is_file()


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_dumped_recipe_reads_back_the_same(name: str, tmp_path: Path) -> None:
    changes = ["task.test=held.jsonl", "training.learning_rate=1e-4"]
    if not load_recipe(name).trains_backbone:
        changes.append("adapter.gate.kind=mlp")
    recipe = load_recipe(name, changes)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert set(yaml.safe_load(path.read_text())) == set(Recipe.model_fields)


def test_overrides_reach_every_depth_and_come_in_order() -> None:
    changes = ["training.epochs=3", "training.epochs=4", "adapter=null", "adapter.methods=[{kind: lora}, prefix]"]
    recipe = load_recipe("banking77", [*changes, "adapter.methods.0.rank=2", "task.data=/some/where"])
    assert recipe.training.epochs == 4
    assert recipe.task.data == "/some/where"
    assert recipe.adapter == AdapterSettings(methods=[{"kind": "lora", "rank": 2}, "prefix"])


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("bankng77", [], f"Unknown recipe 'bankng77'. Did you mean 'banking77'? Known: {SHIPPED}."),
        ("nowhere.yaml", [], f"Recipe nowhere.yaml does not exist. Shipped recipes: {SHIPPED}."),
        (
            "banking77",
            ["training.epoch=3"],
            "unknown key 'training.epoch'. Did you mean 'training.epochs'? Known: epochs,",
        ),
        ("banking77", ["trainin.epochs=3"], "unknown key 'trainin'. Did you mean 'training'? Known: name,"),
        ("banking77", ["adapter.presett=lora"], "unknown key 'adapter.presett'. Did you mean 'adapter.preset'?"),
        ("banking77", ["task.shots=0"], "task.shots: input should be greater than or equal to 1, but got 0"),
        ("banking77", ["training.epochs=many"], "training.epochs: input should be a valid number"),
        ("banking77", ["training.warmup_ratio=1"], "training.warmup_ratio: input should be less than 1, but got 1"),
        ("banking77", ["task.head=cls"], "task.head: input should be 'pooler' or 'mean', but got 'cls'"),
        ("banking77", ["adapter.methods=[lora]"], "set adapter.preset=null to list methods"),
        ("banking77", ["backbone=null"], "backbone: input should be a valid string, but got None"),
        ("banking77", ["epochs"], "An override looks like training.epochs=3, but got 'epochs'."),
        ("banking77", ["name.first=x"], "'name.first=x' asks for keys inside 'name', which is 'banking77'."),
        ("banking77", ["training.epochs=[1"], "The value of 'training.epochs=[1' is not YAML"),
        ("banking77", ["adapter.methods=[lora]", "adapter.methods.1.rank=2"], "expected a position from 0 to 0"),
    ],
)
def test_mistakes(source: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(source, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for text, message in (("a: [", "is not UTF-8 YAML"), ("- a", "must hold keys and values, but got list")):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
    with pytest.raises(RecipeError, match=r"'task' is missing. Set it in the file or with --set task=VALUE"):
        parse_recipe({"backbone": "x"}, "r")


def test_presets_are_the_cores_own_and_a_gate_takes_the_place_of_theirs() -> None:
    assert [spec.kind for spec in adapter_config(AdapterSettings(preset="unipelt")).specs] == [
        "lora",
        "bottleneck",
        "prefix",
    ]
    single = adapter_config(AdapterSettings(preset="ia3"))
    assert ([spec.kind for spec in single.specs], single.gate_spec.kind) == (["ia3"], "fixed")
    other = adapter_config(AdapterSettings(preset="unipelt_ap", gate={"kind": "scalar"}, modules_to_save=["pooler"]))
    assert ([spec.kind for spec in other.specs], other.gate_spec.kind) == (["bottleneck", "prefix"], "scalar")
    assert other.modules_to_save == ["pooler"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "uniplet"}, "Unknown preset 'uniplet'. Did you mean 'unipelt'?"),
        ({"methods": ["loraa"]}, "Unknown method 'loraa'. Did you mean 'lora'?"),
        ({"methods": [{"kind": "lora", "rnk": 2}]}, "Did you mean 'rank'?"),
        ({"gate": "mpl"}, "Unknown gate 'mpl'."),
        ({"gate": 3}, "A gate is a spec, a name or a mapping"),
    ],
)
def test_adapters_that_do_not_exist(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PeltonError) as error:
        adapter_config(AdapterSettings(**settings))
    assert message in str(error.value)


def test_a_backbone_in_a_package_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match=r"not installed: pip install 'no-such-package'"):
        locate("pkg:no_such_package/model")
    with pytest.raises(RecipeError, match="the package yaml has no folder 'model'"):
        locate("pkg:yaml/model")


# ---- settings without an effect ----------------------------------------------------------------------------------


def require(adapter: object, **training: object) -> Recipe:
    """Checks a recipe as a run does before anything is loaded."""
    recipe = parse_recipe({"backbone": "x", "task": {"data": "y"}, "adapter": adapter, "training": training}, "r")
    require_adapter(recipe, None if recipe.adapter is None else adapter_config(recipe.adapter))
    return recipe


FROZEN = {"kind": "frozen", "values": {"0": {"lora": 0.5}}}
PENALTY = {"schedule": "linear_up"}


@pytest.mark.parametrize(
    ("adapter", "training", "message"),
    [
        ({"preset": "lora"}, {"gate_warmup_steps": 3}, "gate_warmup_steps would have no effect, since a fixed gate"),
        ({"preset": "lora"}, {"gate_temperature_end": 0.1}, "gate_temperature_end would have no effect, since a fixed"),
        ({"preset": "lora"}, {"penalty": PENALTY}, "penalty would have no effect, since a fixed gate learns nothing"),
        ({"methods": ["lora"], "gate": FROZEN}, {"gate_warmup_steps": 3}, "since a frozen gate learns nothing"),
        ({"preset": "head"}, {"gate_warmup_steps": 3}, "since the recipe has no methods"),
        ({"preset": "head"}, {"gate_learning_rate": 1e-3}, "since the recipe has no methods"),
        (None, {"gate_learning_rate": 1e-3}, "since the recipe has no methods"),
        ({}, {"early_stopping_min_delta": 0.1}, "since training.early_stopping_patience is not given. Leave it out."),
        (None, {"early_stopping_min_delta": 0.1}, "training.early_stopping_min_delta would have no effect"),
    ],
)
def test_settings_without_an_effect_are_refused(adapter: object, training: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        require(adapter, **training)
    assert message in str(error.value)


def test_settings_that_others_need_are_let_be() -> None:
    require({"preset": "lora"}, gate_learning_rate=1e-3)  # comparisons give one to every gate
    require({"preset": "lora"}, contribution_window=10)
    require({"methods": ["lora"], "gate": "scalar"}, gate_warmup_steps=3)
    require({}, early_stopping_min_delta=0.1, early_stopping_patience=2)
    require({}, early_stopping_min_delta=0.1, early_stopping_patience=None)  # turned off


def test_a_rate_of_a_frozen_backbone_is_said_to_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    for adapter in ({}, {"preset": "head"}):
        require(adapter, backbone_learning_rate=1e-3)
        said = "training.backbone_learning_rate=0.001 has no effect, since the backbone is frozen. Leave it out."
        assert [record.getMessage() for record in caplog.records] == [said]
        caplog.clear()
    require({}, backbone_learning_rate=1e-3, train_backbone=True)
    require(None, backbone_learning_rate=1e-3)
    require({})
    assert not caplog.records


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_set_nothing_without_an_effect(name: str, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe(name)
    require_adapter(recipe, None if recipe.adapter is None else adapter_config(recipe.adapter))
    assert not caplog.records


# ---- what the pages on tasks and training say --------------------------------------------------------------------

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("tasks", "training")}
SNIPPETS = [
    pytest.param(snippet, id=f"{name}-{number}")
    for name, page in PAGES.items()
    for number, snippet in enumerate(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL), 1)
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_what_a_page_shows_is_a_recipe(snippet: str, caplog: pytest.LogCaptureFixture) -> None:
    values = {"backbone": "x", "task": {"data": "y"}, **yaml.safe_load(snippet)}
    recipe = parse_recipe(values, "page")
    require_adapter(recipe, None if recipe.adapter is None else adapter_config(recipe.adapter))
    assert not caplog.records


@pytest.mark.parametrize("name", PAGES)
def test_keys_that_a_page_names_exist(name: str) -> None:
    tasks = {key for settings in TASK_KINDS.values() for key in settings.model_fields}
    known = {"task": tasks, "training": {*TrainingSettings.model_fields}, "adapter": {*AdapterSettings.model_fields}}
    found = re.findall(r"(?<!pelton\.)\b(task|training|adapter)\.([a-z_0-9]+)(?:\.([a-z_0-9]+))?", PAGES[name])
    keys = [(section, key, inner) for section, key, inner in found if key != "md"]
    assert keys
    for section, key, inner in keys:
        assert key in known[section], (section, key)
        if inner:
            section_of = type(getattr(TrainingSettings(), key))
            assert inner in section_of.model_fields, (key, inner)


@pytest.mark.parametrize("section", re.split(r"^## ", PAGES["tasks"], flags=re.MULTILINE)[2:])
def test_settings_that_a_kind_is_said_to_have_exist(section: str) -> None:
    settings = TASK_KINDS[re.findall(r"`([\w-]+)`", section.splitlines()[0])[0]]
    said = _paragraph("Settings", section)
    names = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", said, flags=re.DOTALL))  # values are in brackets
    assert names
    assert set(names) <= set(settings.model_fields)
    scores, default = _paragraph("Scores", section), settings.model_fields["score"].default
    assert not scores or "those of" in scores or all(f"`{name}`" in scores for name in default)


def _paragraph(word: str, text: str) -> str:
    found = re.search(rf"^{word}: (.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    return "" if found is None else found[1]


def test_every_kind_has_a_place_on_the_page() -> None:
    assert all(f"`{kind}`" in PAGES["tasks"] for kind in TASK_KINDS)


def test_every_training_setting_is_on_its_page() -> None:
    for key in TrainingSettings.model_fields:
        assert re.search(rf"\b{key}\b", PAGES["training"]), key
    for links in PAGES.values():
        for path in re.findall(r"\]\(([\w./-]+)\)", links):
            assert (DOCS / path).exists(), path
