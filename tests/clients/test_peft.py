"""PEFT: what it adapts when it is told nothing, sets of weights by name, and prefixes."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

from helpers import assert_close
from pldr import freeze, load_model
from pldr.integrations.peft import SETS, targets

IDS = torch.tensor([[5, 600, 70, 8, 900, 33, 21, 1500, 7], [44, 45, 46, 70, 71, 72, 1, 3000, 8]])
# Of modules in a layer, by set.
ADAPTED = {
    "attention": {f"self_attn.{name}_proj" for name in "qkvo"},
    "feed-forward": {f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def adapted(model):
    """The modules with LoRA, by their names in a layer."""
    names = (name for name, _ in model.named_parameters() if ".lora_A." in name)
    return {name.partition(".layers.")[2].partition(".")[2].partition(".lora_A.")[0] for name in names}


def three_steps(model, rate):
    """The losses of three steps on `IDS`."""
    optimizer = torch.optim.AdamW((tensor for tensor in model.parameters() if tensor.requires_grad), lr=rate)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@torch.no_grad()
def check_saved_and_merged(model, base, tmp_path):
    """Saved, read again and merged it gives the same logits, and what is merged is a model of ours; `base()` makes the base."""
    logits = model.eval()(IDS).logits
    assert (logits - base()(IDS).logits).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    read = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert_close(read(IDS).logits, logits, max_error=1e-6)
    read.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_close(load_model(tmp_path / "merged")(IDS).logits, logits, max_error=1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_what_it_adapts_by_itself(row, operator, dora, model_folder, tmp_path):
    """Attention and feed-forward, and nothing of the metric learner."""
    row("peft", f"{'DoRA' if dora else 'LoRA'} without target_modules: attention and feed-forward", operator)
    model = get_peft_model(load_model(model_folder(operator)), LoraConfig(task_type="CAUSAL_LM", use_dora=dora))
    assert adapted(model) == ADAPTED["attention"] | ADAPTED["feed-forward"]
    losses = three_steps(model, 1e-2)
    assert losses[2] < losses[1] < losses[0]
    check_saved_and_merged(model, lambda: load_model(model_folder(operator)), tmp_path)


@pytest.mark.parametrize("first", ["peft", "pldr"])
def test_in_either_order(first):
    """And pldr does not import peft, whose tables it writes."""
    other = {"peft": "pldr", "pldr": "peft"}[first]
    code = (
        f"import sys, {first}; assert not ('{first}' == 'pldr' and {{'peft', 'torch'}} & set(sys.modules)); import {other}; "
        "from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table; print(*table['pldrllm'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]


@pytest.mark.parametrize(
    ("operator", "name", "expected"),
    [
        ("learned", "power-law", {"self_attn.operator" + ".base_layer" * depth for depth in range(5)}),
        ("frozen", "operator", {"self_attn.operator"}),
        ("factored", "operator", {"self_attn.operator", "self_attn.operator.base_layer"}),
    ],
)
def test_operators(row, operator, name, expected, model_folder, tmp_path):
    """A constant has to be made trainable first."""
    row("peft", f"LoRA on the set {name!r}", operator)

    def base():
        model = load_model(model_folder(operator))
        if operator == "frozen":
            freeze(
                model, G_LM=torch.stack([layer.self_attn.operator.G_LM for layer in model.model.layers]), trainable=True
            )
        elif operator == "factored":
            from pldr.operator import factor

            layers = [layer.self_attn.operator for layer in model.model.layers]
            factor(model, [(layer.left, layer.right) for layer in layers], trainable=True)
        return model

    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **targets(base().config, name)))
    assert adapted(model) == expected
    losses = three_steps(model, 3e-3)
    assert losses[2] < losses[1] < losses[0]
    check_saved_and_merged(model, base, tmp_path)


def test_metric_learner(row, small_model, tmp_path):
    """Of a fresh model: once G_LM is the same for every text, three steps of its network do not move it."""
    row("peft", "LoRA on the set 'operator'", "learned")

    def base():
        return small_model(vocab_size=4096)

    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **targets(base().config, "operator", "attention")))
    learner = {name for name in adapted(model) if ".metric_learner." in name}
    assert learner
    assert adapted(model) - learner == ADAPTED["attention"]
    assert {name.rpartition(".")[2] for name in learner} == {"gate_proj", "up_proj", "down_proj"}
    losses = three_steps(model, 1e-2)
    assert losses[2] < losses[1] < losses[0]
    assert all(
        tensor.abs().max() > 0
        for name, tensor in model.named_parameters()
        if "metric_learner" in name and "lora_B" in name
    )
    check_saved_and_merged(model, base, tmp_path)


def test_names_of_sets(small_model):
    learned = small_model().config
    assert targets(learned) == targets(learned, "attention", "feed-forward")
    with pytest.raises(ValueError, match=r"'G' is not a set of weights; choose from attention, .*power-law"):
        targets(learned, "G")
    with pytest.raises(ValueError, match="choose operator or power-law"):
        targets(learned, *SETS)
    with pytest.raises(ValueError, match=r"a constant that is not trained; .*trainable=True"):
        targets(small_model(operator="constant").config, "operator")
    with pytest.raises(ValueError, match="power-law is a set of learned operators; this one is constant"):
        targets(small_model(operator="constant").config, "power-law")


@pytest.mark.parametrize("operator", ["learned", "frozen"])
def test_prefixes(row, operator, model_folder, tmp_path):
    """They train; read again they give the same logits; and generation with the cache is generation without it."""
    row("peft", "prefix tuning", operator)
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(load_model(model_folder(operator)), settings)
    losses = three_steps(model, 3e-2)
    assert losses[2] < losses[1] < losses[0]
    model.eval().save_pretrained(tmp_path / "prefix")
    read = PeftModel.from_pretrained(load_model(model_folder(operator)), tmp_path / "prefix").eval()
    ids = IDS[:1, :5]
    with torch.no_grad():
        logits = model(IDS).logits
        assert_close(read(IDS).logits, logits, max_error=1e-5)
        assert (logits - model.get_base_model()(IDS).logits).abs().max() > 1e-2
        padded = model(
            torch.cat([torch.zeros_like(IDS[:, :2]), IDS], 1),
            attention_mask=torch.cat([torch.zeros_like(IDS[:, :2]), torch.ones_like(IDS)], 1),
        ).logits
        assert_close(padded[:, 2:], logits, max_error=1e-4)
    tokens = read.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert tokens.shape == (1, 11)
    again = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert tokens.tolist() == again.tolist()


def test_prefixes_of_a_factored_operator(row, model_folder):
    row(
        "peft",
        "prefix tuning",
        "factored",
        refused="refused: PEFT makes prefixes of head_dim, its keys have fewer dimensions",
    )
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(load_model(model_folder("factored")), settings)
    with pytest.raises(ValueError, match=r"prefix has keys of 32 dimensions.*pldr\.compress"):
        model(IDS)
