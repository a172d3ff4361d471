"""Searching architectures: what it costs, what it finds, what it writes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from fits import At, Make, press_ctrl_c, weights
from law import attached, far
from pelton import IA3, Bottleneck, FixedGate, GumbelGate, LoRA, Prefix, derive, revive
from pelton.anatomy import find_anatomy
from pelton.cli.main import run as command
from pelton.compress.importance import leave_one_out, taylor
from pelton.errors import AdapterError, PeltonError, RecipeError, SpecError, TrainingError, UnknownName
from pelton.search.architecture import Architecture, chosen
from pelton.search.autopelt import resume_search, search, searched_recipe
from pelton.search.choose import by_importance, fits, random_architecture, uniform, within
from pelton.search.costs import Choices
from pelton.search.finish import finish
from pelton.search.latency_table import Entry, LatencyTable, plain_spec
from pelton.search.learning import HeldOut, gates_of
from pelton.search.picture import draw_architecture, label, shade
from pelton.search.price import ETA, Budget, Price
from pelton.search.supernet import SearchSettings
from pelton.search.unrolled import unrolled_gradients
from pelton.training.fit import Interrupted, fit, resume
from pelton.training.loading import load_recipe
from pelton.tuner import gated_blocks
from test_laws_compress import assert_same, output, tensors
from test_running import SMALL, save_texts
from test_running import recipe as text_recipe
from zoo import ARCHS

METHODS = (LoRA(rank=4, sites=("attn.q", "ffn.in")), Bottleneck(bottleneck_size=6), Prefix(prefix_length=5), IA3())
SIZES = {"lora": (1, 2, 4), "bottleneck": (3, 6), "prefix": (2, 5)}
GATE = GumbelGate(sizes=SIZES, choose="method")
ANATOMY = find_anatomy(ARCHS["bert"].build())

SEARCHED = {
    "methods": [{"kind": "lora", "rank": 2}, {"kind": "bottleneck", "bottleneck_size": 4}, {"kind": "ia3"}],
    "gate": {"kind": "mlp"},
}


def table(**costs: float) -> LatencyTable:
    """A table in which each candidate costs a share of the backbone's time a block, per unit."""
    entries = []
    for spec in METHODS:
        for size in SIZES.get(spec.kind, (None,)):
            one = spec if size is None else spec.resized(size)
            ratio = 1 + 2 * costs.get(spec.kind, 0.01) * (size or 1)
            entries.append(Entry(plain_spec(one), 1, 32, ratio, 0.0, 1.0, 2, 1, 1))
    return LatencyTable({"model_type": "bert"}, ANATOMY.blocks, tuple(entries))


def supernet(arch: str = "bert", seed: int = 2) -> Any:
    model = attached(ARCHS[arch], GATE, list(METHODS))
    generator = torch.Generator().manual_seed(seed)
    for gate in gates_of(model).values():
        with torch.no_grad():
            gate.logits.copy_(torch.randn(gate.logits.shape, generator=generator))
    return model


# ---- what a supernet becomes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_what_is_derived_computes_what_the_supernet_did(name: str) -> None:
    arch, model = ARCHS[name], supernet(name)
    before, values, out = chosen(model), tensors(model), output(arch, model)
    found = derive(model)
    assert found == before
    assert any(0 < len(choice) < 4 for choice in found.blocks.values())
    assert far(out, output(arch, model)) <= 1e-6
    config = model.peft_config["default"]
    assert config.gate_spec == FixedGate(1.0)
    size = sum(p.numel() for n, p in model.named_parameters() if ".pelton.methods." in n)
    assert size == found.parameters(find_anatomy(arch.build()))
    assert revive(model) == ["derive"]
    assert_same(model, values)
    assert torch.equal(output(arch, model), out)


def test_another_architecture_can_be_derived_saved_and_loaded(tmp_path: Path) -> None:
    arch, model = ARCHS["bert"], supernet()
    wanted = Architecture(METHODS, {1: {"lora": 2, "ia3": None}})
    derive(model, wanted)
    assert [(b.block.index, sorted(b.methods["default"])) for b in gated_blocks(model)] == [(1, ["ia3", "lora"])]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(arch.build(), tmp_path).eval()
    assert torch.equal(output(arch, model), output(arch, again))
    fresh = get_peft_model(arch.build(), wanted.config(ANATOMY))
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}


def test_nothing_and_other_gates_cannot_be_derived() -> None:
    model = supernet()
    before = tensors(model)
    with pytest.raises(AdapterError, match=r"has no methods.*train the head"):
        derive(model, Architecture(METHODS, {}))
    assert_same(model, before)
    with pytest.raises(AdapterError, match=r"do not choose: they are 'mlp'. Attach it with GumbelGate"):
        derive(attached(ARCHS["bert"]))


# ---- what it costs -----------------------------------------------------------------------------------------------


def test_the_expected_cost_of_a_certain_choice_is_its_cost() -> None:
    choices = Choices.of(METHODS, GATE, ANATOMY, table(lora=0.02, prefix=0.03))
    model = supernet()
    found = chosen(model)
    with torch.no_grad():
        for gate in gates_of(model).values():
            gate.logits[gate.place.gather(1, gate.picks()[:, None])] = 1e4
    probabilities = {block: gate.probabilities().detach() for block, gate in gates_of(model).items()}
    parameters, latency = choices.cost(found)
    assert parameters == found.parameters(ANATOMY)
    assert float(choices.parameters(probabilities)) == pytest.approx(parameters)
    assert float(choices.latency(probabilities)) == pytest.approx(latency)
    times = table(lora=0.02, prefix=0.03)
    assert latency == pytest.approx(times.ratio([found.specs(block) for block in (0, 1)], 1, 32), abs=1e-6)


def test_full_and_range() -> None:
    choices = Choices.of(METHODS, GATE, ANATOMY, table())
    assert choices.full.blocks == {b: {"lora": 4, "bottleneck": 6, "prefix": 5, "ia3": None} for b in (0, 1)}
    low, high = choices.range["parameters"]
    assert (low, high) == (32 + 32 + 48, choices.full.parameters(ANATOMY))
    assert choices.range["latency"][1] > choices.range["latency"][0] > 1
    one = Choices.of(METHODS, GumbelGate(sizes=SIZES), ANATOMY)
    assert all(len(choice) == 1 for choice in one.full.blocks.values())
    assert one.cost(one.full)[1] == 1.0  # without a table nothing takes time


def test_a_budget_pushes_until_it_holds() -> None:
    budget = Budget(100.0)
    over, under = torch.tensor(150.0, requires_grad=True), torch.tensor(50.0, requires_grad=True)
    assert float(budget.term(under).detach()) == 0.0
    budget.term(over).backward()
    assert float(over.grad) > 0
    for _ in range(10):
        budget.update(150.0)
    assert budget.multiplier == pytest.approx(10 * ETA * 0.5)
    for _ in range(30):
        budget.update(50.0)
    assert budget.multiplier == 0.0


BUDGETS: list[tuple[dict[str, float], str]] = [
    ({"parameters": 10.0}, r"`112 <= budget_parameters <= 2,\d+ \(the cheapest part alone … everything\)`.*=10\.0"),
    ({"parameters": 1e9}, r"`112 <= budget_parameters"),
    ({"latency": 1.0}, r"`1\.\d+ <= budget_latency <= 1\.\d+ "),
    ({"latency": 9.0}, r"<= budget_latency <= 1\.\d+ .*got budget_latency=9\.0"),
    ({"alpha": -1.0}, r"`0 <= alpha < inf`"),
    ({"beta": float("nan")}, r"`0 <= beta < inf`"),
]


@pytest.mark.parametrize(("given", "message"), BUDGETS)
def test_budgets_that_mean_nothing_are_refused_with_the_range(given: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Price(Choices.of(METHODS, GATE, ANATOMY, table()), **given)


def test_times_without_a_table_are_refused() -> None:
    with pytest.raises(SpecError, match="alpha and budget_latency have a latency table"):
        Price(Choices.of(METHODS, GATE, ANATOMY), alpha=1.0)


# ---- choosing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_every_way_to_choose_keeps_the_budget(share: float) -> None:
    choices = Choices.of(METHODS, GATE, ANATOMY, table())
    limits = {
        "parameters": share * choices.range["parameters"][1],
        "latency": 1 + share * (choices.range["latency"][1] - 1),
    }
    model = supernet()
    matters = {str(block): {"lora": 3.0 + block, "bottleneck": 2.0, "prefix": 1.0, "ia3": 0.5} for block in (0, 1)}
    found = [
        within(choices, gates_of(model), limits),
        uniform(choices, limits),
        random_architecture(choices, limits, seed=1),
        by_importance(choices, matters, limits),
    ]
    assert all(fits(choices, one, limits) for one in found)
    assert found[1].blocks[0] == found[1].blocks[1]
    assert random_architecture(choices, limits, seed=1) == found[2]
    if share == 1.0:
        assert found[0] == chosen(model)
        assert found[1] == found[3] == choices.full


def test_what_is_likeliest_goes_last() -> None:
    choices = Choices.of(METHODS, GATE, ANATOMY)
    gates = gates_of(supernet())
    with torch.no_grad():
        for gate in gates.values():
            gate.logits.fill_(0.0)
            gate.logits[gate.place[:, 1]] = 2.0  # everything at its smallest, a little
        gates[1].logits[gates[1].place[0, 3]] = 20.0  # LoRA at its largest in block 1 for sure
    limit = choices.cost(Architecture(METHODS, {1: {"lora": 4}}))[0]
    assert within(choices, gates, {"parameters": limit}).blocks == {1: {"lora": 4}}


def test_a_scarce_budget_is_used_up() -> None:
    choices = Choices.of(METHODS, GATE, ANATOMY, table())
    gates = gates_of(supernet())
    with torch.no_grad():
        for gate in gates.values():
            gate.logits[gate.place[:, 0]] = 9.0  # all are shut
        gates[1].logits[gates[1].place[0, 3]] = 8.0  # LoRA at its largest in block 1 comes first
    limits = {"parameters": 0.5 * choices.range["parameters"][1], "latency": choices.range["latency"][1]}
    assert not any(within(choices, gates, limits).blocks.values())
    filled = within(choices, gates, limits, ["parameters"])
    assert filled.blocks[1]["lora"] == 4
    assert fits(choices, filled, limits)
    least = min(float(costs.parameters[costs.parameters > 0].min()) for costs in choices.blocks.values())
    assert choices.cost(filled)[0] > limits["parameters"] - least
    assert within(choices, gates, {**limits, "latency": 1.0 + 1e-6}, ["parameters"]) == within(choices, gates, limits)


# ---- the search itself -------------------------------------------------------------------------------------------


def test_a_search_writes_a_recipe_that_trains(make: Make, tmp_path: Path) -> None:
    found = search(make(SEARCHED, epochs=3), SearchSettings(budget_parameters=0.5, sizes={"lora": (1,)}))
    folder = found.run.folder.path
    assert 0 < found.parameters <= 0.5 * found.full[0]
    assert found.latency is None
    assert (folder / "architecture.png").read_bytes()[:4] == b"\x89PNG"
    noted = json.loads((folder / "architecture.json").read_text())
    assert noted["parameters"] == [found.parameters, found.full[0]]
    assert noted["trace"]
    assert noted["metrics"] == found.metrics
    assert {c for choice in found.architecture.blocks.values() for c in choice} <= {"lora", "bottleneck", "ia3"}
    recipe = load_recipe(folder / "architecture.yaml")
    assert recipe == found.recipe
    trained = fit(recipe)
    size = sum(p.numel() for n, p in trained.model.named_parameters() if ".pelton.methods." in n)
    assert size == found.parameters
    again = load_recipe(folder / "architecture.yaml", [f"adapter.start={folder / 'derived'}", "training.max_steps=1"])
    inherited = fit(again, callbacks=[At(1, lambda model: None)])
    assert {n: p.shape for n, p in weights(inherited).items()} == {n: p.shape for n, p in weights(trained).items()}


def test_inherited_weights_begin_where_the_search_ended(make: Make) -> None:
    found = search(make(SEARCHED, epochs=2), SearchSettings(beta=0.01))
    start = found.run.folder.path / "derived"
    same = found.recipe.model_copy(
        update={
            "adapter": found.recipe.adapter.model_copy(update={"start": str(start)}),
            "training": found.recipe.training.model_copy(update={"max_steps": 1, "learning_rate": 1e-12}),
        }
    )
    trained = fit(same)
    assert trained.folder.read("metrics")["validation"] == pytest.approx(found.metrics, abs=1e-5)


def test_what_was_found_is_trained_both_ways(make: Make, tmp_path: Path) -> None:
    found = search(make(SEARCHED, epochs=2), SearchSettings(beta=0.01))
    finished = finish(found)
    assert list(finished.runs) == ["scratch", "inherited"]
    assert finished.scores[finished.best] == max(finished.scores.values())
    assert finished.run is finished.runs[finished.best]
    starts = {start: run.recipe.adapter.start for start, run in finished.runs.items() if run.recipe.adapter is not None}
    assert starts == {"scratch": None, "inherited": str(found.run.folder.path / "derived")}
    shapes = [{n: p.shape for n, p in weights(run).items()} for run in finished.runs.values()]
    assert shapes[0] == shapes[1]
    with pytest.raises(TrainingError, match=r"no validation rows to choose between two trainings by"):
        finish(dataclasses.replace(found, metrics={}))
    empty = Architecture(METHODS, {})
    alone = finish(
        dataclasses.replace(found, architecture=empty, recipe=searched_recipe(found.recipe, empty, ANATOMY), metrics={})
    )
    assert alone.best == "scratch"
    assert list(alone.runs) == ["scratch"]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_interrupted_search_finds_the_same(make: Make, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SearchSettings(budget_parameters=0.5, bilevel=order > 0, second_order=order > 1)
    whole = search(make(SEARCHED, log_every=1), settings)

    from pelton.search import autopelt

    def stopped(recipe: Any, **options: Any) -> Any:
        return fit(recipe, **{**options, "callbacks": [*options["callbacks"], At(8, press_ctrl_c)]})

    monkeypatch.setattr(autopelt, "fit", stopped)
    with pytest.raises(Interrupted) as stop:
        search(make(SEARCHED, log_every=1), settings)
    with pytest.raises(TrainingError, match=r"is a search. Go on with: pelton autopelt --resume"):
        resume(stop.value.folder)
    again = resume_search(stop.value.folder)
    assert again.architecture == whole.architecture
    for name, value in weights(whole.run).items():
        torch.testing.assert_close(value, weights(again.run)[name], atol=1e-6, rtol=0)
    traces = [json.loads((f.run.folder.path / "architecture.json").read_text())["trace"] for f in (whole, again)]
    assert traces[0] == traces[1]


@pytest.mark.parametrize("phase", ["trained", "finished"])
def test_a_search_that_ends_after_its_training_is_recovered(make: Make, phase: str) -> None:
    whole = search(make(SEARCHED, log_every=1), SearchSettings(budget_parameters=0.3))
    folder = whole.run.folder.path
    told = json.loads((folder / "architecture.json").read_text())
    with pytest.raises(TrainingError, match="is finished: there is nothing to resume"):
        resume_search(folder)
    for name in ("architecture.json", "architecture.yaml", "architecture.png"):
        (folder / name).unlink()
    shutil.rmtree(folder / "derived")
    (folder / "learned.json").unlink()  # earlier versions had the last checkpoint alone
    whole.run.folder.set_phase(phase)
    again = resume_search(folder)
    assert again.architecture == whole.architecture
    assert json.loads((folder / "architecture.json").read_text()) == told
    assert told["trace"]


@pytest.mark.parametrize("bilevel", [False, True])
def test_new_backbones_are_searched_as_their_config_makes_them(tmp_path: Path, bilevel: bool) -> None:
    save_texts(tmp_path / "data")
    adapter = {"methods": [{"kind": "lora", "rank": 2}, {"kind": "bottleneck", "bottleneck_size": 4}]}
    config = SMALL | {"num_hidden_layers": 6}
    recipe = text_recipe(
        tmp_path, tmp_path / "data", adapter=adapter, backbone_config=config, training={"train_backbone": True}
    )
    found = search(recipe, SearchSettings(budget_parameters=0.5, bilevel=bilevel))
    assert len(found.architecture.blocks) == 6
    methods = [p for n, p in fit(found.recipe).model.named_parameters() if ".pelton.methods." in n]
    assert sum(p.numel() for p in methods) == found.parameters <= 0.5 * found.full[0]


def test_bilevel_gates_learn_from_held_out_rows_only(make: Make) -> None:
    """On training rows whose labels are noise weights learn noise; gates that see other rows are not told by them."""
    seen: list[int] = []
    original = HeldOut.loss

    def counted(self: HeldOut, model: Any, step: int) -> Any:
        seen.append(step)
        return original(self, model, step)

    HeldOut.loss = counted  # type: ignore[method-assign]
    try:
        search(make(SEARCHED, epochs=2), SearchSettings(bilevel=True, warmup=0.5))
    finally:
        HeldOut.loss = original  # type: ignore[method-assign]
    assert seen == list(range(6, 12))  # after the warm-up, once a step


def test_the_second_order_is_the_gradient_through_a_step_of_the_weights() -> None:
    """Against autograd through the virtual step; every weight has a rate of its own, one has no gradient."""
    torch.manual_seed(0)
    gate = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    weights = [torch.nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (3, 3, 2)]
    model = torch.nn.ParameterList([gate, *weights])
    rates = list(zip(weights, (0.1, 0.3, 0.5), strict=True))

    def loss(target: float, gate: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return ((gate.sigmoid() * one).tanh() @ other - target).square() + (one * gate).square().sum() / 9

    def held(model: Any, step: int) -> torch.Tensor:
        return loss(2.0, gate, weights[0], weights[1])

    def train(model: Any, step: int) -> torch.Tensor:
        return loss(-1.0, gate, weights[0], weights[1])

    gradients = torch.autograd.grad(train(model, 0), weights[:2], create_graph=True)
    moved = [w - rate * g for (w, rate), g in zip(rates[:2], gradients, strict=True)]
    expected = torch.autograd.grad(loss(2.0, gate, *moved), gate)[0]
    for weight, gradient in zip(weights, gradients, strict=False):
        weight.grad = gradient.detach()
    before = [w.detach().clone() for w in weights]
    value, (found,) = unrolled_gradients(model, [gate], rates, 0, held, train)
    torch.testing.assert_close(value, loss(2.0, gate, *moved))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    first = torch.autograd.grad(held(model, 0), gate)[0]
    assert (found - first).abs().max() > 0.05
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_the_second_order_needs_bilevel_search() -> None:
    with pytest.raises(SpecError, match="second_order is for bilevel search"):
        SearchSettings(second_order=True)


def test_held_out_batches_depend_on_the_step_alone() -> None:
    rows = list(range(10))
    one, other = (HeldOut(rows, lambda some: {"x": some}, 4, seed=3) for _ in range(2))
    assert [one.batch(step) for step in range(6)] == [other.batch(step) for step in range(6)]
    assert one.batch(0) != one.batch(2)
    assert len({x for step in (0, 1) for x in one.batch(step)["x"]}) == 8


REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[PeltonError], str]] = [
    ({}, {"budget_parameters": 1e-9}, SpecError, r"<= budget_parameters <= .*the cheapest part alone"),
    (
        {},
        {"sizes": {"lorra": (1,)}},
        UnknownName,
        r"Unknown method of this recipe in sizes 'lorra'. Did you mean 'lora'",
    ),
    ({}, {"sizes": {"lora": (4,)}}, SpecError, r"a size of 'lora' is at most its rank, 2"),
    ({}, {"sizes": {"ia3": (4,)}}, SpecError, r"'ia3' has one size only"),
    ({"precision": "fp16"}, {}, RecipeError, "fp16 scales. Set training.precision to bf16 or fp32"),
]


@pytest.mark.parametrize(("training", "settings", "error", "message"), REFUSED)
def test_what_cannot_be_searched_is_refused_before_a_folder_is_made(
    make: Make, tmp_path: Path, training: dict[str, Any], settings: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        search(make(SEARCHED, **training), SearchSettings(**settings))
    assert not (tmp_path / "runs").exists()


def test_bilevel_without_validation_rows_and_without_methods(make: Make, tmp_path: Path) -> None:
    recipe = make(SEARCHED, {"validation_fraction": 0.0})
    (tmp_path / "data" / "validation.jsonl").unlink()
    with pytest.raises(TrainingError, match=r"on validation rows, and there are none. Raise task.validation_fraction"):
        search(recipe, SearchSettings(bilevel=True))
    with pytest.raises(RecipeError, match="A search needs methods to choose from"):
        search(make({"preset": "head"}))
    with pytest.raises(TrainingError, match="holds no search"):
        resume_search(tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_no_number_stops_the_search(make: Make) -> None:
    original = HeldOut.loss
    HeldOut.loss = lambda self, model, step: original(self, model, step) * float("nan")  # type: ignore[method-assign]
    try:
        with pytest.raises(TrainingError, match=r"stopped at step 2: the held-out loss is nan. Lower training"):
            search(make(SEARCHED), SearchSettings(bilevel=True, warmup=0.05))
    finally:
        HeldOut.loss = original  # type: ignore[method-assign]


# ---- recipes, pictures, commands ---------------------------------------------------------------------------------


def test_sizes_and_starts_of_recipes_are_checked(make: Make, tmp_path: Path) -> None:
    lora = {"methods": [{"kind": "lora", "rank": 4}], "gate": "fixed"}
    run = fit(make({**lora, "sizes": {"0.lora.attn_q": 1}}, max_steps=1))
    shapes = {n: tuple(p.shape) for n, p in run.model.named_parameters() if n.endswith(".A")}
    assert sorted(shape[0] for shape in shapes.values()) == [1, 4, 4, 4]
    with pytest.raises(UnknownName, match=r"Unknown part in sizes '0.lora.attn_qq'. Did you mean '0.lora.attn_q'"):
        fit(make({**lora, "sizes": {"0.lora.attn_qq": 1}}))
    with pytest.raises(RecipeError, match=r"adapter.start: .*holds no adapter_model.safetensors"):
        fit(make({**lora, "start": str(tmp_path)}))
    with pytest.raises(AdapterError, match="attn_q"):
        fit(make({**lora, "start": str(run.folder.adapter)}))
    with pytest.raises(RecipeError, match="sizes and start are for methods, and preset head has none"):
        make({"preset": "head", "start": "x"})


def test_the_picture_shades_by_size(tmp_path: Path) -> None:
    found = Architecture(METHODS, {0: {"lora": 1, "ia3": None}, 1: {"lora": 4}})
    assert label(found, METHODS[0], 0) == "1"
    assert label(found, METHODS[3], 0) == "•"
    assert label(found, METHODS[1], 0) == ""
    assert 0 == shade(found, METHODS[1], 0) < shade(found, METHODS[0], 0) < shade(found, METHODS[0], 1) == 1
    draw_architecture(found, ANATOMY, tmp_path / "a.png")
    with pytest.raises(TrainingError, match="cannot be drawn"):
        draw_architecture(found, ANATOMY, tmp_path / "a.nope")


def test_an_architecture_without_methods_trains_the_head() -> None:
    assert Architecture(METHODS, {}).settings(ANATOMY) == {"preset": "head"}


def test_settings_of_what_is_gone_go_along(make: Make) -> None:
    rates = {"lora": 1e-3, "ia3": 1e-2}
    recipe = make(SEARCHED, method_learning_rates=rates, up_rate_ratio=4.0, gate_temperature_end=0.1, max_steps=1)
    for blocks, left, ratio in (
        ({0: {"lora": 2}}, {"lora": 1e-3}, 4.0),
        ({0: {"ia3": None}}, {"ia3": 1e-2}, 1.0),
        ({}, {}, 1.0),
    ):
        found = searched_recipe(recipe, Architecture((LoRA(rank=2), IA3()), blocks), ANATOMY)
        assert found.training.method_learning_rates == left
        assert found.training.up_rate_ratio == ratio
        fit(found)


def test_units_count_for_their_method_in_importance() -> None:
    """Where nothing but LoRA is chosen, nothing else matters; taking it out is what closing it is."""
    arch, model = ARCHS["bert"], supernet()
    with torch.no_grad():
        for gate in gates_of(model).values():
            gate.logits.fill_(-9.0)
            gate.logits[gate.place[:, 0]] = 0.0
            gate.logits[gate.place[0, 2]] = 9.0
    labels = {"labels": torch.tensor([0, 1, 0])}
    found = taylor(model, [arch.inputs() | labels])
    assert all(row["lora"] > 0 and row["ia3"] == row["prefix"] == row["bottleneck"] == 0 for row in found.values())
    out = output(arch, model)
    without = leave_one_out(model, lambda: float((output(arch, model) - out).abs().sum()))
    assert all(row["lora"] < 0 and row["ia3"] == row["prefix"] == 0 for row in without.values())


def test_the_command_searches(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pelton.training.loading import dump_recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make(SEARCHED, epochs=1)))
    assert command(["autopelt", str(recipe), "--budget-params", "0.5", "--sizes", "lora=1,2"]) == 0
    out = capsys.readouterr().out
    assert "architecture.yaml" in out
    assert "parameters" in out
    assert command(["autopelt", str(recipe), "--budget-params", "0.5", "--train"]) == 0
    trained = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[0] for line in trained] == ["scratch", "inherited"]
    assert sum(line.endswith("better") for line in trained) == 1
    for arguments, message in (
        ([str(recipe), "--sizes", "lora:1"], "expected sizes such as lora=2,4,8"),
        ([str(recipe), "--shape", "8"], "expected examples x tokens such as 8x64"),
        ([], "give either a recipe or --resume RUN"),
        (["--resume", str(tmp_path), "--beta", "0.1"], "goes on as the search began"),
        (["--resume", str(tmp_path), "--set", "training.epochs=9"], "goes on as the search began"),
        ([str(recipe), "--budget-params", "1e12"], "<= budget_parameters <="),
    ):
        assert command(["autopelt", *arguments]) == 2
        assert message in capsys.readouterr().err
