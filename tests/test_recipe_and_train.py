import ast
import dataclasses
import inspect
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Trainer

from helpers import TINY
from pldr import dag_loss, deductive_outputs, freeze, load_model, load_predefined_G, load_tokenizer, plots
from pldr.configuration_pldr import PRESETS
from pldr.data.rows import cached_rows, collate
from pldr.data.sources import Source
from pldr.data.vocabulary import train_tokenizer
from pldr.deductive import variation
from pldr.evaluation.modes import operator_metrics
from pldr.files import whole_folder
from pldr.plots import plot_run
from pldr.recipe import OptimizationRecipe, Recipe, find_recipe, load_recipe
from pldr.training.callbacks import ProgressBar
from pldr.training.graph import may_be_graph
from pldr.training.operators import operators
from pldr.training.run import build_model, train
from pldr.training.trainer import PldrTrainer, training_arguments

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("[!_]*.yaml"))
BASES = sorted(RECIPES[0].parent.glob("_*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_build(path, toy_tokenizer, tmp_path):
    recipe = load_recipe(path)
    recipe.model.config["vocab_size"] = len(toy_tokenizer)
    if recipe.model.G_LM is not None:  # made by the user
        save_file({"G_LM": torch.randn(5, 14, 64, 64)}, tmp_path / "G.safetensors")
        recipe.model.G_LM = str(tmp_path / "G.safetensors")
        recipe.model.config |= {"num_hidden_layers": 5}
        assert build_model(recipe, toy_tokenizer).config.operator == "constant"
        return
    with torch.device("meta"):
        assert build_model(recipe, toy_tokenizer).num_parameters() > 0


def test_every_published_model_has_a_recipe():
    assert set(PRESETS) <= {path.stem for path in RECIPES}
    for name in PRESETS:
        assert load_recipe(name).model.preset == name
    assert load_recipe("v51-110M-2").optimization.warmup_steps == 4000
    assert load_recipe("v52-110M-1").optimization.learning_rate == 1.2e-3
    dag = load_recipe("v51-DAG-110M").optimization
    assert dag.dag_A_LM == dag.dag_A_P == dag.dag_G_LM == 0.05
    assert dag.learning_rate == 1.5e-3


def test_recipes_are_found_by_name():
    assert find_recipe("demo-cpu").samefile(find_recipe("recipes/demo-cpu.yaml"))
    with pytest.raises(FileNotFoundError, match=r"no recipe of that name; there are demo-cpu, laptop, "):
        find_recipe("demo-gpu")
    # A place that does not exist is not a name.
    for place in ("/nowhere/demo-cpu.yaml", "demo-cpu.txt"):
        with pytest.raises(FileNotFoundError):
            find_recipe(place)


class TestBases:
    """`base: NAME` in a recipe."""

    def test_sections_are_merged_and_lists_replaced(self, tmp_path):
        (tmp_path / "below.yaml").write_text(
            "seed: 5\ndata: {train: [a, b], text_column: story}\nmodel: {config: {hidden_size: 64}}\n"
        )
        (tmp_path / "between.yaml").write_text("base: below\ndata: {train: [c]}\n")
        (tmp_path / "recipe.yaml").write_text(
            "base: between.yaml\noutput: out\nmodel: {config: {num_attention_heads: 2}}\n"
        )
        recipe = load_recipe(tmp_path / "recipe.yaml", ["data.text_column=text"])
        assert (recipe.output, recipe.seed, recipe.data.train, recipe.data.text_column) == ("out", 5, ["c"], "text")
        assert recipe.model.config == {"hidden_size": 64, "num_attention_heads": 2}

    def test_a_recipe_by_name_is_a_base_too(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("base: demo-cpu\noutput: mine\n")
        assert load_recipe(tmp_path / "mine.yaml") == dataclasses.replace(load_recipe("demo-cpu"), output="mine")

    @pytest.mark.parametrize(
        ("base", "message"),
        [
            ("nothing", "mine.yaml: base: no file .*nothing.yaml; .*no recipe of that name"),
            ("[a]", r"mine.yaml: base must be the name of a recipe, got \['a'\]"),
            ("mine", "mine.yaml: base: mine leads back to .*mine.yaml"),
            ("other", "other.yaml: base: mine leads back to .*mine.yaml"),
            ("broken", "broken.yaml: not valid YAML"),
        ],
    )
    def test_errors_name_the_file_in_one_line(self, tmp_path, base, message):
        (tmp_path / "mine.yaml").write_text(f"base: {base}\noutput: x\n")
        (tmp_path / "other.yaml").write_text("base: mine\n")
        (tmp_path / "broken.yaml").write_text("output: [\n")
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_recipe(tmp_path / "mine.yaml")
        assert "\n" not in str(error.value)

    def test_those_that_ship_with_pldr_are_no_recipes(self):
        """They are named by others, are not listed, and do not train."""
        assert {yaml.safe_load(path.read_text()).get("base") for path in RECIPES} - {None} == {p.stem for p in BASES}
        for base in BASES:
            with pytest.raises(ValueError, match="missing key"):
                load_recipe(base)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outptu: x\ndata: {train: [a]}", "unknown key 'outptu'; did you mean 'output'"),
        ("output: x\ndata: {train: [a], sequence_len: 5}", "data: unknown key 'sequence_len'; did you mean"),
        ("output: x\ndata: {train: [a], sequence_length: long}", "data.sequence_length: must be of type int"),
        ("output: x\ndata: {train: [a], sequence_length: true}", "data.sequence_length: must be of type int"),
        ("output: x\ndata: {train: a}", "data.train: must be a list"),
        ("output: x\ndata: {train: [1]}", r"data.train\[0\]: must be of type str"),
        ("output: x\ndata: [a]", "data: must be a section"),
        ("output: x\ndata: {train: [a]}\noptimization: {learning_rate: fast}", "learning_rate: must be a number"),
        ("output: x\ndata: {train: [a]}\noptimization: {steps: 0}", "optimization.steps must be at least 1, got 0"),
        ("output: x\ndata: {train: [a]}\nlog_steps: 0", "recipe: log_steps must be at least 1, got 0"),
        ("output: x\ndata: {train: [a], sequence_length: 1}", "data.sequence_length must be at least 2, got 1"),
        ("output: x\ndata: {train: [a], layout: flat}", "data.layout must be packed, padded or unpadded, got 'flat'"),
        (
            "output: x\ndata: {train: [a]}\nreport_to: [paper]",
            r"report_to must be any of tensorboard, .*, got \['paper'",
        ),
        ("output: x\ndata: {train: [a]}\noptimization: {epsilon: .inf}", "epsilon must be finite and above 0, got inf"),
        (
            "output: x\ndata: {train: [a]}\noptimization: {dag_A_P: -1}",
            "dag_A_P must be finite and at least 0, got -1.0",
        ),
        ("output: x\ndata: {train: [a]}\noptimization: {final_rate: 2}", "final_rate must be between 0 and 1, got 2.0"),
        (
            "output: x\ndata: {train: [a]}\noptimization: {clip_norm: 2}",
            "clip_value=1.0 or .*clip_norm=2.0 to null, not both",
        ),
        (
            "output: x\ndata: {train: [a]}\noptimization: {warmup_steps: 10, steps: 5}",
            "warmup_steps must be between 0 and .*steps=5, got 10",
        ),
        ("output: x\ndata: {train: [a]}\noptimization: {precision: fp8}", "precision must be fp32 or bf16, got"),
        ("output: x\ndata: {train: []}", r"data.train must be a list of at least one name, got \[\]"),
        ("output: x", "missing key 'data'"),
        ("- a list", "must be a section with keys"),
        ("output: [", "not valid YAML"),
        ("seed: " + "9" * 5000, r"r\.yaml: not valid YAML \(Exceeds the limit"),
        ('seed: !!int ""', r"r\.yaml: not valid YAML \("),
        ("output: 2020-99-99", r"r\.yaml: not valid YAML \(month must be"),
        ("data: {train: &a [*a]}", r"r\.yaml: not valid YAML \(its aliases make more than 100,000 values"),
        (
            "model: {config: {hidden_size: [&a0 [x, x],"
            + ",".join(f"&a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))
            + "]}}",
            r"r\.yaml: not valid YAML \(its aliases make more than 100,000 values",
        ),
        ("", "must be a section with keys"),
    ],
)
def test_recipe_errors_name_the_place(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_an_override_that_is_not_yaml_is_named(write_recipe):
    with pytest.raises(ValueError, match=r"recipe: override 'seed=9+': not valid YAML \(Exceeds the limit"):
        load_recipe(write_recipe(), ["seed=" + "9" * 5000])


def test_overrides(write_recipe):
    recipe = load_recipe(write_recipe(), ["optimization.steps=7", "optimization.learning_rate=1e-4",
                                          "model.config.num_hidden_layers=3", "seed=9"])  # fmt: skip
    assert isinstance(recipe, Recipe)
    assert (recipe.optimization.steps, recipe.optimization.learning_rate, recipe.seed) == (7, 1e-4, 9)
    assert recipe.model.config["num_hidden_layers"] == 3
    for override, message in [("steps", "not of the form key=value"), ("optimization.step=1", "unknown key 'step'"),
                              ("output.x=1", "output is not a section"),
                              ("data.train.x=1", "train is not a section")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_recipe(write_recipe(), [override])


class TestTrain:
    def test_learns_saves_and_repeats_itself(self, write_recipe, tmp_path):
        recipe = load_recipe(write_recipe(optimization__steps=60))
        summary = train(recipe, progress=False)
        assert summary["tokens"] == 60 * 4 * 32
        # A text of independent words from a list of 23 can not be predicted better than ln 23 a word.
        assert summary["validation_loss"] < 0.75 * math.log(290)
        model, tokenizer = load_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")
        assert model.config.vocab_size == len(tokenizer) == 290
        assert not list(tmp_path.glob(".out*"))

        recipe.output = str(tmp_path / "again")
        assert train(recipe, progress=False)["train_loss"] == summary["train_loss"]
        again = load_model(tmp_path / "again").state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())

    def test_a_run_that_is_cut_short_reports_what_it_did(self, write_recipe, tmp_path, monkeypatch):
        original = ProgressBar.on_step_end

        def stop_after_five(self, args, state, control, **kwargs):
            original(self, args, state, control, **kwargs)
            control.should_training_stop = state.global_step == 5

        monkeypatch.setattr(ProgressBar, "on_step_end", stop_after_five)
        summary = train(load_recipe(write_recipe()), progress=False)
        assert (summary["steps"], summary["tokens"]) == (5, 5 * 4 * 32)

    def test_new_tokenizer_and_constant_operator(self, write_recipe, tmp_path):
        path = write_recipe(data__tokenizer=None, data__vocab_size=290, optimization__steps=3)
        recipe = load_recipe(path, ["model.config.operator=constant", "model.config.operator_init=random",
                                    "model.config.operator_trainable=true"])  # fmt: skip
        train(recipe, progress=False)
        model = load_model(tmp_path / "out")
        assert model.config.operator == "constant"
        assert (tmp_path / "out" / "tokenizer.model").exists()

    def test_transferred_operator(self, write_recipe, tmp_path, toy_tokenizer):
        from safetensors.torch import save_file

        G_LM = torch.randn(2, 2, 16, 16)
        save_file({"G_LM": G_LM}, tmp_path / "G.safetensors")
        recipe = load_recipe(write_recipe(model__G_LM=str(tmp_path / "G.safetensors")))
        model = build_model(recipe, toy_tokenizer)
        assert torch.equal(model.model.layers[1].self_attn.operator.G_LM, G_LM[1])
        train(recipe, progress=False)
        assert torch.equal(load_model(tmp_path / "out").model.layers[1].self_attn.operator.G_LM, G_LM[1])

    def test_optimiser_is_the_published_one(self, write_recipe, toy_tokenizer, tmp_path):
        recipe = load_recipe(write_recipe(optimization__steps=100, optimization__warmup_steps=10))
        trainer = PldrTrainer(recipe, tmp_path, model=build_model(recipe, toy_tokenizer),
                              args=training_arguments(recipe, tmp_path))  # fmt: skip
        trainer.create_optimizer_and_scheduler(100)
        groups = [group for group in trainer.optimizer.param_groups if group["params"]]
        assert [(group["weight_decay"], group["betas"], group["eps"]) for group in groups] == [(0.1, (0.9, 0.95), 1e-5)]
        assert sum(p.numel() for p in groups[0]["params"]) == trainer.model.num_parameters()
        rates = []
        for _ in range(100):
            rates.append(trainer.lr_scheduler.get_last_lr()[0])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        assert rates[0] == 0
        assert rates[10] == pytest.approx(3e-3)
        assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(3e-4)

    @pytest.mark.parametrize("bound", ["clip_value", "clip_norm"])
    def test_gradients_are_clipped(self, write_recipe, toy_tokenizer, tmp_path, monkeypatch, bound):
        changes = {"optimization__clip_value": None, "optimization__clip_norm": None, f"optimization__{bound}": 1e-4}
        recipe = load_recipe(write_recipe(optimization__steps=1, optimization__warmup_steps=0, **changes))
        seen = {}
        original = torch.optim.AdamW.step

        def step(optimizer, *args, **kwargs):
            gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
            seen["value"] = max(g.abs().max().item() for g in gradients)
            seen["norm"] = torch.cat(gradients).norm().item()
            return original(optimizer, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        train(recipe, progress=False)
        limit = 1e-4 * (1 + 1e-5)
        assert seen["value"] <= limit
        assert (seen["norm"] <= limit) == (bound == "clip_norm")

    def test_infinite_loss_stops_and_leaves_nothing(self, write_recipe, tmp_path):
        recipe = load_recipe(write_recipe(optimization__learning_rate=1e30, optimization__clip_value=None))
        with pytest.raises(
            FloatingPointError,
            match=r"became nan at step \d+ \(data rows .*no checkpoint.*lower optimization.learning_rate",
        ):
            train(recipe, progress=False)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))

    def test_dag_regularisation_is_the_sum_that_it_says(self, write_recipe, toy_tokenizer, tmp_path, ids):
        """One step's loss and gradients: cross-entropy + coefficient · DAG loss of each deductive output."""
        settings = {"optimization__dag_A_LM": 0.05, "optimization__dag_G_LM": 0.5, "optimization__accumulation": 2}
        recipe = load_recipe(write_recipe(**settings))
        model = build_model(recipe, toy_tokenizer).train()
        trainer = PldrTrainer(recipe, tmp_path, model=model,
                              args=training_arguments(recipe, tmp_path))  # fmt: skip
        trainer.current_gradient_accumulation_steps = 2  # as inside a step of two batches
        batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=45)
        output = model(**batch, use_cache=False, output_deductive_outputs=True)
        layers = output.deductive_outputs
        dag = {name: dag_loss(torch.stack([getattr(layer, name) for layer in layers])) for name in ("A_LM", "G_LM")}
        expected = output.loss + (0.05 * dag["A_LM"] + 0.5 * dag["G_LM"]) / 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        (one,) = torch.autograd.grad(loss, model.model.layers[0].self_attn.operator.exponent)
        (other,) = torch.autograd.grad(expected, model.model.layers[0].self_attn.operator.exponent)
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-8)
        model.eval()
        plain = trainer.compute_loss(model, dict(batch), num_items_in_batch=45)
        assert plain.item() == pytest.approx(output.loss.item(), rel=1e-6)

    def test_dag_regularisation_lowers_the_dag_loss(self, write_recipe, tmp_path):
        losses = []
        for coefficient in (0.0, 5.0):
            recipe = load_recipe(write_recipe(optimization__steps=60, optimization__dag_G_LM=coefficient,
                                              output=str(tmp_path / f"dag-{coefficient}")))  # fmt: skip
            train(recipe, progress=False)
            model = load_model(recipe.output)
            losses.append(dag_loss(deductive_outputs(model, torch.arange(5, 25)[None]).G_LM).item())
        assert losses[1] < 0.5 * losses[0]

    def test_handoff_keeps_the_optimiser_for_what_remains(self, write_recipe, tmp_path, monkeypatch):
        recipe = load_recipe(write_recipe(optimization__steps=12, optimization__handoff_step=6, log_steps=1))
        seen = {}
        original = PldrTrainer.restore_run

        def watched(trainer):  # the optimiser is loaded, the first step not taken
            original(trainer)
            checkpoint = trainer.start
            learned = load_model(checkpoint)
            expected = deductive_outputs(learned, trainer.eval_dataset.full_rows(16)[:, :-1]).G_LM.mean(1)
            operators = [layer.self_attn.operator for layer in trainer.model.model.layers]
            seen["constant"] = all(
                torch.allclose(operator.G_LM, G, atol=1e-5) for operator, G in zip(operators, expected, strict=True)
            )
            saved = load_file(checkpoint / "optimizer.safetensors")
            names = {parameter: name for name, parameter in trainer.model.named_parameters()}
            optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
            seen["parameters"] = set(optimised) == set(names)
            seen["states"] = {names[p] for p in trainer.optimizer.state} == {
                n for n in names.values() if "G_LM" not in n
            }
            seen["kept"] = all(
                torch.equal(value, saved[f"{names[p]}.{key}"])
                for p, state in trainer.optimizer.state.items() for key, value in state.items()
            )  # fmt: skip
            seen["G_LM"] = operators[0].G_LM.detach().clone()

        monkeypatch.setattr(PldrTrainer, "restore_run", watched)
        summary = train(recipe, progress=False)
        assert (summary["steps"], summary["tokens"]) == (12, 12 * 4 * 32)
        assert all(seen[name] for name in ("constant", "kept", "parameters", "states"))
        model = load_model(tmp_path / "out")
        assert model.config.operator_trainable
        assert not torch.equal(model.model.layers[0].self_attn.operator.G_LM, seen["G_LM"])  # it learns on
        losses = [line["loss"] for line in map(json.loads, (tmp_path / "out" / "log.jsonl").open()) if "loss" in line]
        assert len(losses) == 12
        assert abs(losses[6] - losses[5]) < 0.5  # no jump where the operator changes hands

    def test_evaluations_log_how_constant_the_operator_is(self, write_recipe, tmp_path):
        train(load_recipe(write_recipe(eval_steps=6)), progress=False)
        lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
        probes = [line for line in lines if "G_variation" in line]
        assert [line["step"] for line in probes] == [6, 12, 12]  # the last once more at the end
        assert all(len(line["G_variation"]) == 2 and min(line["G_variation"]) > 0 for line in probes)
        assert [line["step"] for line in lines if "eval_loss" in line] == [6, 12, 12]
        assert [line["step"] for line in lines if "learning_rate" in line] == [4, 8, 12]

    def test_evaluations_keep_the_operator(self, write_recipe, tmp_path, monkeypatch):
        probed = []

        def metrics(model, rows):
            probed.append(rows)
            return operator_metrics(model, rows)

        monkeypatch.setattr("pldr.training.trainer.operator_metrics", metrics)
        train(load_recipe(write_recipe(eval_steps=5)), progress=False)
        found = operators(tmp_path / "out")
        assert list(found) == [5, 10, 12]
        early, _, last = (load_predefined_G(file) for file in found.values())
        model = load_model(tmp_path / "out")
        assert torch.equal(last, deductive_outputs(model, probed[-1][:1, :-1]).G_LM[:, 0].bfloat16())
        assert not torch.equal(early, last)

    def test_operator_metrics_against_separate_forwards(self, small_model, ids):
        inputs, batch = ids[:, :-1], {"input_ids": ids[1:, :-1], "shift_labels": ids[1:, 1:]}
        model, frozen = small_model(), freeze(small_model(), inputs[:1])
        metrics = operator_metrics(model, ids)
        with torch.no_grad():
            difference = frozen(**batch).loss - model(**batch).loss
        assert metrics["G_frozen_difference"] == pytest.approx(difference.item(), abs=1e-6)
        assert metrics["G_variation"] == pytest.approx(variation(deductive_outputs(model, inputs).G_LM).tolist())
        G_LM = deductive_outputs(model, inputs).G_LM.double()
        assert metrics["G_rank"] == pytest.approx(
            torch.linalg.matrix_rank(G_LM, rtol=1e-2).double().mean((1, 2)).tolist()
        )
        wanted = G_LM.det().abs().log10().mean((1, 2))
        assert metrics["G_log10_determinant"] == pytest.approx(wanted.tolist(), rel=1e-6)
        assert all(0 < gain <= norm for gain, norm in zip(metrics["row_gain"], metrics["row_norm"], strict=True))

    @pytest.mark.parametrize("rows", [1, 7])
    def test_an_evaluation_is_over_everything(self, write_recipe, toy_tokenizer, tmp_path, rows):
        """Also where the rows are no multiple of the batch of four, or less than one. The DAG loss is logged beside the other."""
        recipe = load_recipe(write_recipe(optimization__dag_A_P=0.5))
        model = build_model(recipe, toy_tokenizer).eval()
        held_out = cached_rows(Source(recipe.data.validation), toy_tokenizer, recipe.data)
        held_out._count = rows
        trainer = PldrTrainer(recipe, tmp_path, model=model, eval_dataset=held_out,
                              args=training_arguments(recipe, tmp_path),
                              data_collator=partial(collate, pad_token_id=0, length=None))  # fmt: skip
        ids = held_out.full_rows(rows)
        with torch.no_grad():
            output = model(ids[:, :-1], shift_labels=ids[:, 1:], use_cache=False, output_deductive_outputs=True)
        dag = dag_loss(torch.stack([layer.A_P for layer in output.deductive_outputs])).item()
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-6)
        assert dag > 0
        assert found["eval_regularised_loss"] - found["eval_loss"] == pytest.approx(0.5 * dag, rel=1e-4)

    def test_accumulated_batches_are_one_batch(self, write_recipe, tmp_path):
        """With DAG loss, and with a last step of fewer batches than the others: 4 × 1, 2 × 2 and 1 × 4 sequences."""
        losses = []
        for batch_size in (4, 2, 1):
            path = write_recipe(
                output=str(tmp_path / f"out-{batch_size}"), optimization__batch_size=batch_size, log_steps=1,
                optimization__accumulation=4 // batch_size, optimization__steps=3, optimization__dag_G_LM=0.5,
            )  # fmt: skip
            train(load_recipe(path), progress=False)
            lines = map(json.loads, (tmp_path / f"out-{batch_size}" / "log.jsonl").open())
            losses.append([line["loss"] for line in lines if "loss" in line])
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
        assert losses[2] == pytest.approx(losses[0], rel=1e-3)

    @pytest.mark.parametrize("return_logits", [False, True])
    @pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
    def test_a_batch_without_targets_counts_nothing(self, small_model, ids, return_logits, items):
        model = small_model().train()
        labels = torch.full_like(ids, -100)
        output = model(ids, labels=labels, return_logits=return_logits, num_items_in_batch=items)
        assert (output.loss.item(), output.accuracy.item()) == (0, 0)
        output.loss.backward()
        assert all((p.grad == 0).all() for p in model.parameters())

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_rows_of_one_token(self, write_recipe, tmp_path, toy_tokenizer, accumulation):
        """Padded, they have no target: the loss of such a step is 0, and such a batch is no part of an accuracy."""
        words = ["the"]
        while (len(toy_tokenizer(" ".join(words))["input_ids"]) + 1) % 33 != 1:  # and [END]
            words.append("cat")
        for name in ("train", "held-out"):
            (tmp_path / name).write_text(" ".join(words))
        changes = {"optimization__batch_size": 1, "optimization__accumulation": accumulation, "data__layout": "padded"}
        recipe = load_recipe(write_recipe(**changes, log_steps=1, eval_steps=5, data__train=[str(tmp_path / "train")],
                                          data__validation=[str(tmp_path / "held-out")]))  # fmt: skip
        held_out = cached_rows(Source(recipe.data.validation), toy_tokenizer, recipe.data)
        assert sorted(len(row["input_ids"]) for row in held_out)[:2] == [1, 33]
        train(recipe, progress=False)
        lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").open()]
        assert all(isinstance(value, (int, float, list)) for line in lines for value in line.values())  # none is null
        losses = [line["loss"] for line in lines if "loss" in line]
        assert (accumulation == 1) == (0.0 in losses)
        first, *_, last = (loss for loss in losses if loss)
        assert last < first

    def test_accuracy_is_over_targets(self, write_recipe, toy_tokenizer, tmp_path):
        """Not over batches, of which a short one would count as much as a full one."""
        recipe = load_recipe(write_recipe(optimization__batch_size=1, data__layout="padded"))
        model = build_model(recipe, toy_tokenizer).train()
        trainer = PldrTrainer(recipe, tmp_path, model=model, args=training_arguments(recipe, tmp_path))
        row = torch.randint(4, 290, (1, 33), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            guesses = model(row[:, :-1]).logits[0].argmax(-1)
        row[0, 1:3] = guesses[:2]  # G_LM depends on the ids, so that the guesses may be others now
        ids, targets = row[:, :-1], row[:, 1:]
        right = (model(ids).logits[0].argmax(-1) == targets[0]).float()
        for kept in (31, 2, 0):
            labels = targets.clone()
            labels[0, kept:] = -100
            trainer.compute_loss(model, {"input_ids": ids, "shift_labels": labels}, num_items_in_batch=33)
        assert right.sum() + right[:2].sum() > 0
        assert trainer.accuracy() == pytest.approx((right.sum() + right[:2].sum()).item() / 33)
        assert trainer.accuracy() == 0  # no batch since

    def test_no_loss_has_its_last_target_among_its_inputs(self, write_recipe, toy_tokenizer, tmp_path):
        """A learned G_LM sums over all inputs: another last token of a row may change the loss of that target alone.

        The control: with the labels among the inputs, as other users of the model may have them, it changes all.
        """
        recipe = load_recipe(write_recipe())
        trainer = PldrTrainer(recipe, tmp_path, model=build_model(recipe, toy_tokenizer).eval(),
                              args=training_arguments(recipe, tmp_path))  # fmt: skip
        model, operator = trainer.model, trainer.model.model.layers[0].self_attn.operator
        rows = torch.randint(4, 290, (1, 33), generator=torch.Generator().manual_seed(1)).repeat(2, 1)
        rows[1, -1] = 4 + (rows[0, -1] + 1) % 286
        ours, control = [], []
        for row in rows:
            batch = collate([{"input_ids": row, "row": 0}], pad_token_id=0, length=None)
            batch["shift_labels"][:, -1] = -100  # what is left has the same targets in both
            ours.append(trainer.compute_loss(model, batch, num_items_in_batch=31))
            labels = row[None].clone()
            labels[:, -1] = -100
            control.append(model(row[None], labels=labels, use_cache=False).loss)
        gradients = [torch.autograd.grad(loss, operator.energy_weight)[0] for loss in (*ours, *control)]
        assert torch.equal(ours[0], ours[1])
        assert torch.equal(gradients[0], gradients[1])
        assert not torch.equal(control[0], control[1])
        assert not torch.allclose(gradients[2], gradients[3], rtol=1e-3)

    def test_tokens_are_counted_not_computed(self, write_recipe, tmp_path):
        """The last step of an epoch has fewer batches than the accumulation asks for."""
        recipe = load_recipe(write_recipe(optimization__batch_size=7, optimization__accumulation=5))
        rows = len(cached_rows(Source(recipe.data.train), load_tokenizer(recipe.data.tokenizer), recipe.data))
        summary = train(recipe, progress=False)
        batches = [min(5, rows // 7 - start) for start in range(0, rows // 7, 5)]
        expected = sum(batches[step % len(batches)] for step in range(12)) * 7 * 32
        assert summary["tokens"] == expected < 12 * 5 * 7 * 32

    def test_the_text_column_reaches_the_tokenizer(self, write_recipe, tmp_path, texts):
        lines = [json.dumps({"text": 5, "story": file.read_text()}) for file in sorted(texts.glob("*.txt"))]
        (tmp_path / "stories.jsonl").write_text("\n".join(lines) + "\n")
        path = write_recipe(data__train=[str(tmp_path / "stories.jsonl")], data__text_column="story", data__validation=[],
                            data__tokenizer=None, data__vocab_size=290, optimization__steps=2,
                            optimization__warmup_steps=1)  # fmt: skip
        assert train(load_recipe(path), progress=False)["steps"] == 2

    def test_a_short_run_that_diverges_is_not_a_success(self, write_recipe, tmp_path):
        """Shorter than the log interval, so that no log line could show it."""
        recipe = load_recipe(
            write_recipe(optimization__learning_rate=1e30, optimization__clip_value=None, log_steps=500)
        )
        with pytest.raises(
            FloatingPointError, match=r"7 steps in a row were skipped, and 6 may be .* became nan at step 9"
        ):
            train(recipe, progress=False)
        assert not (tmp_path / "out").exists()

    def test_a_short_run_reports_a_loss_and_keeps_the_cache_on(self, write_recipe, tmp_path):
        summary = train(load_recipe(write_recipe(log_steps=500)), progress=False)
        assert math.isfinite(summary["train_loss"])
        assert 0 <= summary["train_accuracy"] <= 1
        assert load_model(tmp_path / "out").config.use_cache

    def test_bf16_autocast_on_the_cpu(self, write_recipe, tmp_path):
        assert math.isfinite(
            train(load_recipe(write_recipe(optimization__precision="bf16")), progress=False)["train_loss"]
        )

    def test_gradient_checkpointing(self, write_recipe, tmp_path):
        one = train(load_recipe(write_recipe()), progress=False)
        path = write_recipe(output=str(tmp_path / "other"), optimization__gradient_checkpointing=True)
        assert train(load_recipe(path), progress=False)["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)

    def test_errors_come_before_the_work(self, write_recipe, tmp_path):
        def message(**changes):
            with pytest.raises((ValueError, OSError)) as error:
                train(load_recipe(write_recipe(**changes)), progress=False)
            return str(error.value)

        assert "longer than max_position_embeddings=64" in message(data__sequence_length=65)
        assert "the tokenizer has 290" in message(model__config=TINY | {"vocab_size": 5})
        assert "unknown field" in message(model__config=TINY | {"heads": 5})
        assert "hidden_size" in message(model__config=TINY | {"hidden_size": "wide"})
        assert "is not a published model" in message(model__preset="v99")
        constant = {"model__config": TINY | {"operator": "constant"}, "optimization__dag_G_LM": 0.1}
        assert "need a learned operator" in message(**constant)
        assert "eval_steps=5 needs data.validation" in message(eval_steps=5, data__validation=[])
        assert "needs data.validation" in message(optimization__handoff_step=5, data__validation=[])
        assert "between 1 and steps - 1" in message(optimization__handoff_step=12)
        assert "needs a learned operator" in message(**(constant | {"optimization__dag_G_LM": 0.0,
                                                                    "optimization__handoff_step": 5}))  # fmt: skip
        assert "which optimization.handoff_step=5 drops" in message(
            optimization__handoff_step=5, optimization__dag_A_P=0.1
        )
        assert "less than one step of 5000" in message(optimization__batch_size=5000)
        assert "less than one step of 20000" in message(optimization__accumulation=5000)
        assert "beta1 must be at least 0 and less than 1" in message(optimization__beta1=1.0)
        assert "clip_value must be finite and above 0, got nan" in message(optimization__clip_value=float("nan"))
        assert "matches no file" in message(data__train=["nothing.txt"], output=str(tmp_path / "a" / "b" / "c"))
        assert not (tmp_path / "a").exists()
        assert "current folder or a mount point" in message(output=".")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").write_text("keep me")
        assert "exists and is not empty" in message(output=str(tmp_path / "full"))
        assert "is a file" in message(output=str(tmp_path / "full" / "file"))
        assert (tmp_path / "full" / "file").read_text() == "keep me"


OVERRIDES = [
    "_clip_grad_norm", "_get_grad_norm", "_get_output_dir", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state",
    "_load_scaler", "_save_checkpoint", "_save_optimizer_and_scheduler", "_save_rng_state", "_wrap_model", "compute_loss", "create_optimizer", "evaluate", "floating_point_ops",
    "get_train_dataloader", "log", "save_model", "training_step",
]  # fmt: skip


class TestTheInstalledTrainer:
    """What `PldrTrainer` replaces in transformers' Trainer, much of it private, is still there and called alike."""

    SOURCE = ast.parse(inspect.getsource(inspect.getmodule(Trainer)))

    def test_the_list_is_complete(self):
        ours = {name for name, value in vars(PldrTrainer).items() if inspect.isfunction(value)}
        assert sorted(ours & {*dir(Trainer)} - {"__init__"}) == OVERRIDES

    @pytest.mark.parametrize("name", OVERRIDES)
    def test_it_calls_what_we_override(self, name):
        ours = inspect.signature(getattr(PldrTrainer, name))
        theirs = inspect.signature(getattr(Trainer, name))  # AttributeError: the method is gone
        named = [p.name for p in ours.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert named == [*theirs.parameters][: len(named)], f"{name}: the Trainer's parameters are {theirs}"
        calls = [node for node in ast.walk(self.SOURCE)
                 if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{name}"]  # fmt: skip
        assert calls, f"{name}: the Trainer no longer calls it"
        for call in calls:
            if not any(isinstance(argument, ast.Starred) for argument in call.args):
                try:
                    ours.bind(None, *call.args, **{word.arg: word.value for word in call.keywords if word.arg})
                except TypeError as error:
                    pytest.fail(f"{name}: the Trainer calls {ast.unparse(call)}: {error}")

    @pytest.mark.parametrize("name", ["_tr_loss", "_globalstep_last_logged"])
    def test_sums_are_set_before_a_training_begins(self, name):
        """Where `Stops.on_train_begin` then restores them; and they are what the log lines are made of."""
        functions = [node for node in ast.walk(self.SOURCE) if isinstance(node, ast.FunctionDef)]
        (loop,) = [
            f for f in functions if "callback_handler.on_train_begin(" in ast.unparse(f) and f.name != "__init__"
        ]
        lines = ast.unparse(loop).splitlines()
        (begin,) = [row for row, line in enumerate(lines) if "callback_handler.on_train_begin(" in line]
        resets = [row for row, line in enumerate(lines) if line.strip().startswith(f"self.{name} = ")]
        assert resets, f"{name}: the Trainer does not set it where a training begins"
        assert max(resets) < begin, f"{name}: the Trainer resets it after on_train_begin"
        assert ast.unparse(self.SOURCE).count(f"self.{name}") > 2, f"{name}: the Trainer no longer reads it"

    def test_the_number_of_devices_can_be_set(self, write_recipe, tmp_path):
        arguments = training_arguments(load_recipe(write_recipe()), tmp_path)
        arguments._n_gpu = 7
        assert arguments.n_gpu == 7


class TestWholeFolder:
    def test_failure_leaves_the_old_folder(self, tmp_path):
        target = tmp_path / "folder"
        with whole_folder(target) as folder:
            (folder / "a").write_text("old")

        def fail():
            with whole_folder(target, overwrite=True) as folder:
                (folder / "a").write_text("new")
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert (target / "a").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
        with whole_folder(target, overwrite=True) as folder:
            (folder / "b").write_text("new")
        assert [path.name for path in target.iterdir()] == ["b"]
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_when_a_step_may_be_a_graph():
    gpu = torch.device("cuda", 0)
    assert may_be_graph(OptimizationRecipe(), gpu)
    assert not may_be_graph(OptimizationRecipe(), gpu, processes=2)
    assert not may_be_graph(OptimizationRecipe(), torch.device("cpu"))
    for refused in ({"cuda_graph": "never"}, {"accumulation": 2}, {"gradient_checkpointing": True}, {"dag_G_LM": 0.1}):
        assert not may_be_graph(OptimizationRecipe(**refused), gpu), refused


def test_part_of_the_training_text_can_be_held_out(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe(data__validation=[], data__hold_out=0.2, eval_steps=6))
    summary = train(recipe, progress=False)
    assert math.isfinite(summary["validation_loss"])
    for changes, message in [({"data__hold_out": 1.5}, "must be at least 0 and less than 1, got 1.5"),
                             ({"data__hold_out": 0.1}, "data.hold_out=0.1 splits .*without data.validation"),
                             ({"data__hold_out": 1e-6, "data__validation": []}, "can not be split so")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train(load_recipe(write_recipe(**changes)), overwrite=True, progress=False)


def test_an_operator_can_come_from_a_model(write_recipe, tmp_path, toy_tokenizer):
    recipe = load_recipe(write_recipe())
    train(recipe, progress=False)
    model = load_model(tmp_path / "out")
    with pytest.raises(ValueError, match="freeze it first"):
        build_model(load_recipe(write_recipe(model__G_LM=str(tmp_path / "out"))), toy_tokenizer)
    G_LM = freeze(model, torch.arange(5, 20)[None]).model.layers[1].self_attn.operator.G_LM
    model.save_pretrained(tmp_path / "frozen")
    transferred = build_model(load_recipe(write_recipe(model__G_LM=str(tmp_path / "frozen"))), toy_tokenizer)
    assert torch.equal(transferred.model.layers[1].self_attn.operator.G_LM, G_LM)


def test_a_tokenizer_of_documents(texts, tmp_path):
    (texts / "13.txt").write_bytes(b"\xff")
    folder = tmp_path / "tokenizer"
    made = train_tokenizer([f"{texts}/*.txt"], folder, vocab_size=285)
    assert (made.folder, made.vocab_size) == (folder, 285)
    assert made.skipped == f"1 skipped: not valid UTF-8 (first: {texts}/13.txt)"
    ids = load_tokenizer(folder)("the cat sat on a mat.")["input_ids"]
    assert load_tokenizer(folder / "tokenizer.model")("the cat sat on a mat.")["input_ids"] == ids
    with pytest.raises(FileExistsError, match="is not empty"):
        train_tokenizer([f"{texts}/*.txt"], folder)
    with pytest.raises(ValueError, match=r"13\.txt: not valid UTF-8"):
        train_tokenizer([f"{texts}/*.txt"], folder, strict=True, overwrite=True)
    with pytest.raises(ValueError, match="must be unigram or bpe, got 'words'"):
        train_tokenizer(f"{texts}/0*.txt", folder, model="words", overwrite=True)
    assert len(load_tokenizer(folder)) == 285  # what failed has left it as it was
    assert train_tokenizer(f"{texts}/0*.txt", folder, vocab_size=300, model="bpe", overwrite=True).skipped == ""
    assert len(load_tokenizer(folder)) == 300


def test_the_log_has_what_one_wants_to_watch(write_recipe, tmp_path):
    train(load_recipe(write_recipe(eval_steps=6, data__test=["pydoc-topics:validation"])), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").open()]
    logged = [line for line in lines if "loss" in line]
    assert all(0 <= line[name] <= 1 for line in logged for name in ("accuracy", "global_accuracy"))
    assert logged[-1]["global_loss"] == pytest.approx(sum(line["loss"] for line in logged) / len(logged))
    probes = [line for line in lines if "G_variation" in line]
    assert all(line[f"dag_{name}"] >= 0 for line in probes for name in ("A_LM", "A_P", "G_LM"))
    assert {"eval_accuracy", "test_loss", "test_accuracy"} <= {key for line in lines for key in line}
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))


def test_what_is_logged_is_drawn(write_recipe, tmp_path):
    """A picture shows all that a training measures; what has no curve is counted here."""
    bounds = {"optimization__clip_value": None, "optimization__clip_norm": 1.0, "optimization__dag_G_LM": 0.1}
    recipe = write_recipe(eval_steps=6, data__test=["pydoc-topics:validation"], log_steps=1, **bounds)
    train(load_recipe(recipe), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").open()]
    logged = {name for line in lines for name in line}
    drawn = {name for panel in plots._PANELS for name in panel.curves}
    assert drawn - logged == set()
    assert logged - drawn == {"step", "global_loss", "global_accuracy", "train_runtime", "total_flos"}
    assert plot_run(tmp_path / "out").is_file()
