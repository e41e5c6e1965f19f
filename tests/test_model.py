import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, TextStreamer, pipeline
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers import assert_close
from pldr import PldrConfig, PldrForCausalLM, freeze
from pldr.configuration_pldr import PRESETS
from pldr.masks import create_masks
from pldr.modeling_pldr import eager_attention
from pldr.operator import LearnedOperator, factor
from pldr.ops.reference import apply_rotary

PUBLISHED_PARAMETERS = {
    "v51-104M": 104_237_120,
    **{f"v51-110M-{i}": 109_689_362 for i in range(1, 6)},
    "v51-DAG-110M": 109_689_362,
    **{f"v51G-106M-{i}": 105_606_482 for i in range(1, 4)},
    "v52-110M-1": 109_689_362,
}


@pytest.mark.parametrize("name", PRESETS)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        model = PldrForCausalLM(PldrConfig.preset(name))
    assert model.num_parameters() == PUBLISHED_PARAMETERS[name]


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: 'v51-111M' is not a published model; choose one of v51-104M"):
        PldrConfig.preset("v51-111M")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden_size": 64}, "unknown field.*hiden_size.*did you mean 'hidden_size'"),
        ({"hidden_size": 100}, "even head dimension"),
        ({"operator": "learnt"}, "operator must be one of"),
        ({"operator_init": "zeros"}, "operator_init must be one of"),
        ({"rope_pairing": "both"}, "rope_pairing must be one of"),
        ({"initialization": "v50"}, "initialization must be one of"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be one of"),
        ({"operator_trainable": True}, "applies to operator='constant' and 'factored' only"),
        ({"attention_dropout": 1.0}, "attention_dropout must be in"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"rope_theta": -1.0}, "rope_theta must be positive"),
        ({"attention_bias": False}, "attention_bias=False is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling=.* is not supported"),
        ({"custom_G_type": "learned"}, "custom_G_type must be null"),
        ({"cache_first_G": True}, "cache_first_G=True is not supported.*pldr freeze"),
        ({"head_dim": 32}, "head_dim must be hidden_size"),
    ],
)
def test_configuration_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        PldrConfig(**fields)


def test_a_field_changed_later_is_checked_again_when_saved(small_config, tmp_path):
    config = small_config()
    config.operator = "learnt"
    with pytest.raises(StrictDataclassError, match="operator must be one of"):
        config.save_pretrained(tmp_path)


class TestInitialisation:
    """The published training code's, with its statistics checked against closed forms."""

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        config = PldrConfig(vocab_size=4000, num_hidden_layers=1, hidden_size=256, num_attention_heads=4)
        return PldrForCausalLM(config).requires_grad_(False)

    def test_linears_are_xavier_uniform_with_zero_bias(self, model):
        layer = model.model.layers[0]
        for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.down_proj, model.lm_head,
                       layer.self_attn.operator.metric_learner[0].glus[1].up_proj):  # fmt: skip
            fan_out, fan_in = linear.weight.shape
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert bound * 0.98 < linear.weight.abs().max() <= bound
            assert linear.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert (linear.bias == 0).all()

    def test_value_projection_keeps_the_linear_default(self, model):
        value = model.model.layers[0].self_attn.v_proj
        bound = 1 / math.sqrt(256)
        for tensor in (value.weight, value.bias):
            assert bound * 0.97 < tensor.abs().max() <= bound
        assert value.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)

    def test_power_law_weights_are_xavier_normal_on_three_dimensions(self, model):
        operator = model.model.layers[0].self_attn.operator
        heads, dim = 4, 64
        std = math.sqrt(2 / (dim * dim + heads * dim))
        for tensor in (operator.metric_weight, operator.exponent, operator.energy_weight):
            assert tensor.std() == pytest.approx(std, rel=0.03)
        assert (operator.metric_bias == 0).all()
        assert (operator.energy_bias == 0).all()

    def test_embedding_is_standard_normal(self, model):
        assert model.model.embed_tokens.weight.std() == pytest.approx(1.0, rel=0.01)

    def test_norms_are_identities(self, model):
        norm = model.model.layers[0].self_attn.operator.input_norm
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
        assert norm.eps == 1e-6


@pytest.mark.parametrize("pairing", ["adjacent", "halves"])
def test_rotary_against_complex_multiplication(pairing):
    x = torch.randn(2, 3, 5, 8)
    angles = torch.randn(2, 1, 5, 4)
    rotated = apply_rotary(x, angles.cos(), angles.sin(), pairing)
    pairs = x.unflatten(-1, (4, 2)).unbind(-1) if pairing == "adjacent" else x.chunk(2, -1)
    turned = torch.complex(*pairs) * torch.polar(torch.ones_like(angles), angles)
    parts = (turned.real, turned.imag)
    expected = torch.stack(parts, -1).flatten(-2) if pairing == "adjacent" else torch.cat(parts, -1)
    assert_close(rotated, expected, max_error=1e-6)


def test_rotary_table_stays_in_float32(small_model, tmp_path):
    model = small_model()
    expected = model.model.rotary_embedding.table.clone()
    assert expected.dtype == torch.float32
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for again in (model, PldrForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        assert again.dtype == torch.bfloat16
        assert torch.equal(again.model.rotary_embedding.table, expected)
    # cos and sin of position · 10000^(-2i/16).
    assert expected[0, 5, 3].item() == pytest.approx(math.cos(5 * 10000 ** (-6 / 16)), abs=1e-6)
    assert expected[1, 5, 3].item() == pytest.approx(math.sin(5 * 10000 ** (-6 / 16)), abs=1e-6)


@pytest.mark.parametrize("operator", ["learned", "constant"])
def test_save_and_load(small_model, ids, tmp_path, operator):
    model = small_model(operator=operator, operator_init="random")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PldrForCausalLM
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded.eval()(ids).logits)


def test_external_operator_must_come_with_the_weights(small_model, tmp_path):
    model = freeze(small_model(), torch.arange(4, 20))
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.self_attn.operator" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="G_LM must come with the weights"):
        PldrForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("operator", ["constant", "factored"])
def test_a_frozen_model_is_made_first_and_filled_later(small_model, tmp_path, ids, operator):
    """from_config, accelerate's empty weights, and loading onto a device map."""
    accelerate = pytest.importorskip("accelerate", reason="extra train")
    model = freeze(small_model(), torch.arange(4, 20))
    if operator == "factored":
        model = factor(model, [torch.randn(2, 2, 16, rank).unbind() for rank in (8, 16)])
    model.save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_config(model.config).eval()
    with torch.no_grad():
        expected = model(ids).logits
        assert made(ids).logits.isnan().all()  # G_LM is nobody's yet
        made.load_state_dict(model.state_dict())
        assert torch.equal(made(ids).logits, expected)
        for include_buffers in (False, True):
            with accelerate.init_empty_weights(include_buffers=include_buffers):
                empty = AutoModelForCausalLM.from_config(model.config)
            assert empty.lm_head.weight.is_meta
            if not include_buffers:
                filled = accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"}).eval()
                assert torch.equal(filled(ids).logits, expected)
        placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
        assert torch.equal(placed(ids).logits, expected)


def test_v52_is_initialised_as_the_hub_port():
    """Xavier-uniform throughout: by bound, variance and a fourth moment that tells uniform (1.8) from normal (3)."""
    config = PldrConfig.preset("v52-110M-1", num_hidden_layers=1, vocab_size=64)
    torch.manual_seed(0)
    attention = PldrForCausalLM(config).requires_grad_(False).model.layers[0].self_attn
    operator, M, H, D = attention.operator, config.hidden_size, config.num_attention_heads, config.head_dim
    assert (attention.v_proj.bias == 0).all()
    bounds = {attention.v_proj.weight: (6 / (M + M)) ** 0.5}
    bounds |= dict.fromkeys(
        (operator.metric_weight, operator.exponent, operator.energy_weight), (6 / (D * D + H * D)) ** 0.5
    )
    for weight, bound in bounds.items():
        assert weight.abs().max() <= bound
        assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.02)
        assert (weight.double() ** 4).mean() / weight.double().var() ** 2 == pytest.approx(1.8, abs=0.05)
    assert PldrConfig.preset("v51-110M-1").initialization == "v51"


def test_initialisation_meets_a_linear_without_bias(small_config):
    model = PldrForCausalLM(small_config())
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 85, bias=False)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    model._init_weights(model.model.layers[0].mlp.up_proj)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("operator", ["learned", "constant", "factored"])
def test_a_padded_batch_has_one_answer(small_model, ids, operator, implementation):
    """Right-padded, left-padded or with holes in its mask: what is no padding comes out as in eager attention."""
    fields = {} if operator == "learned" else {"operator_init": "random"}
    fields |= {"operator_ranks": [8, 16]} if operator == "factored" else {}
    model = small_model(operator=operator, **fields)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, 9:], mask[2, 4:7] = 0, 0, 0
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation(implementation)
        assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected, max_error=1e-5)
        alone = model(ids[1:2, :9]).logits[0]
        assert_close(model(ids, attention_mask=mask).logits[1, :9], alone, max_error=1e-5)


def test_a_draft_may_end_before_the_last_layer(small_model, ids):
    """transformers sets the number of layers for an early exit, and after an error does not set it back."""
    model = small_model(operator="constant", num_hidden_layers=4)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True, use_cache=False).hidden_states[2]
        model.config.num_hidden_layers = 2
        assert torch.equal(model.model(ids, use_cache=False).last_hidden_state, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False)[:, :16], ids)
        model.config.num_hidden_layers = 4
        tokens = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
        early = model.generate(ids[:1], max_new_tokens=8, do_sample=False, assistant_early_exit=2)
        assert torch.equal(tokens, early)
        assert model.config.num_hidden_layers == 4


def test_meta_device_then_materialised(small_model, small_config, ids):
    model = small_model()
    with torch.device("meta"):
        empty = PldrForCausalLM(small_config())
    assert all(parameter.is_meta for parameter in empty.parameters())
    # Materialised the way FSDP and accelerate do it: storage, then weights, then what is not saved.
    empty.to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    empty.model.rotary_embedding.table.copy_(empty.model.rotary_embedding.compute())
    loaded = PldrForCausalLM.from_pretrained(None, config=small_config(), state_dict=model.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, empty(ids).logits)
        assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_implementations_agree(small_model, ids, implementation, padded):
    model = small_model()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(implementation)
        used = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, eager_attention)
        assert implementation in used.__name__
        logits = model(ids, attention_mask=mask).logits
    # Positions that are padding themselves have no defined output. The two sum the softmax in another order.
    kept = mask.bool()
    assert_close(logits[kept], expected[kept], rms_ratio=1e-5, name=implementation)


def test_no_mask_is_built_where_causality_is_enough(small_model, ids, monkeypatch):
    model = small_model()
    seen = []

    def recording(**kwargs):
        seen.append(create_causal_mask(**kwargs))
        return seen[-1]

    monkeypatch.setattr("pldr.masks.create_causal_mask", recording)
    with torch.no_grad():
        model(ids)
        model.generate(ids[:1], max_new_tokens=3, do_sample=False)
        assert len(seen) == 4
        assert all(mask is None for mask in seen)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        model(ids, attention_mask=mask)
    assert seen[-1].shape == (3, 1, 16, 16)


def test_padding_mask_only_for_learned_operators(small_config, ids):
    embeds, mask = torch.empty(3, 16, 0), torch.ones_like(ids)
    mask[0, :3] = 0
    learned = create_masks(small_config(_attn_implementation="sdpa"), embeds, mask, None, None)
    assert torch.equal(learned["padding"], mask)
    constant = create_masks(small_config(operator="constant", _attn_implementation="sdpa"), embeds, mask, None, None)
    assert constant["padding"] is None
    assert torch.equal(constant["attention"], learned["attention"])


def test_context_length_is_enforced(small_model):
    model = small_model()
    ids = torch.full((1, 65), 5)
    with pytest.raises(ValueError, match="65 tokens is longer than the context length max_position_embeddings=64"):
        model(ids)
    cache = model(ids[:, :60]).past_key_values
    with pytest.raises(ValueError, match="65 tokens is longer"):
        model(ids[:, :5], past_key_values=cache)


class TestPackedRows:
    """Several sequences in one row, told apart by positions that begin anew."""

    @pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("operator", ["learned", "constant", "factored"])
    def test_each_sequence_is_as_alone(self, small_model, operator, attention):
        ranks = {"operator_ranks": [8, 16]} if operator == "factored" else {}
        init = {} if operator == "learned" else {"operator_init": "random"}
        model = small_model(operator=operator, **init, **ranks)
        model.set_attn_implementation(attention)
        rows = [(5, 11, 18), (20, 1, 13)]
        ids = torch.randint(4, 97, (2, 34), generator=torch.Generator().manual_seed(6))
        positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
        with torch.no_grad():
            output = model(ids, position_ids=positions)
            assert output.past_key_values is None
            for row, lengths in enumerate(rows):
                packed, alone = output.logits[row].split(lengths), ids[row].split(lengths)
                for logits, sequence in zip(packed, alone, strict=True):
                    assert_close(logits, model(sequence[None]).logits[0], max_error=1e-5)

    def test_gradients_of_a_learned_operator(self, small_model):
        model = small_model()
        ids = torch.randint(4, 97, (1, 30), generator=torch.Generator().manual_seed(6))
        positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
        model(ids, position_ids=positions).logits.square().sum().backward()
        packed = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        sum(model(part).logits.square().sum() for part in ids.split([12, 18], dim=1)).backward()
        for gradient, parameter in zip(packed, model.parameters(), strict=True):
            assert_close(gradient, parameter.grad, rms_ratio=1e-4)

    @pytest.mark.parametrize("operator", ["learned", "constant"])
    def test_rows_may_be_longer_than_the_context(self, small_model, operator):
        """Sequences may not."""
        model = small_model(operator=operator)
        ids = torch.full((1, 150), 5)
        with torch.no_grad():
            model(ids, position_ids=(torch.arange(150) % 50)[None])
            padded = torch.ones_like(ids[:, :80])
            padded[:, :30] = 0
            assert_close(
                model(ids[:, :80], attention_mask=padded).logits[:, 30:], model(ids[:, :50]).logits, max_error=1e-5
            )
        for positions in (torch.arange(150) % 65, torch.arange(149, -1, -1) + 1):
            with pytest.raises(ValueError, match="longer than the context length"):
                model(ids, position_ids=positions[None])
        with pytest.raises(ValueError, match="input of 71 tokens is longer than the context length"):
            model(ids[:, :1], position_ids=torch.tensor([[70]]))

    def test_compiling_can_not_see_them(self, small_model, ids):
        forward = torch.compile(small_model().forward, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="pass attention_mask as well"):
            forward(ids, position_ids=torch.arange(16)[None])


def test_input_ids_or_embeddings(small_model, ids):
    model = small_model()
    with pytest.raises(ValueError, match="exactly one of"):
        model()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)


def test_loss_and_logits_to_keep(small_model, ids):
    model = small_model()
    with torch.no_grad():
        output = model(ids, labels=ids)
        expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert_close(output.loss, expected, max_error=1e-6)
        inputs, targets = ids[:, :-1], ids[:, 1:]  # of which the last is no input now
        expected = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
        for return_logits in (True, False):
            for labels in (None, ids):  # which count nothing beside the others
                shifted = model(inputs, labels=labels, shift_labels=targets, return_logits=return_logits)
                assert_close(shifted.loss, expected, max_error=1e-6)
        assert torch.equal(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
        assert torch.equal(model(ids, logits_to_keep=torch.tensor([3, 5])).logits, output.logits[:, [3, 5]])
    with pytest.raises(ValueError, match="the loss needs the logits of every position"):
        model(ids, labels=ids, logits_to_keep=1)


class TestDeductiveOutputs:
    def test_named_and_shaped(self, small_model, ids):
        layers = small_model()(ids, output_deductive_outputs=True).deductive_outputs
        assert len(layers) == 2
        for layer in layers:
            assert layer._fields == ("A", "A_LM", "A_P", "G_LM")
            assert all(tensor.shape == (3, 2, 16, 16) for tensor in layer)
            assert (layer.A_LM > 0).all()

    def test_not_returned_unless_asked(self, small_model, ids):
        output = small_model()(ids)
        assert output.deductive_outputs is None
        assert output.attentions is None

    def test_asking_for_them_computes_nothing_more(self, small_model, ids):
        """Not asked for, they cost nothing: the same operations run either way."""
        model = small_model()

        class Count(TorchDispatchMode):
            def __init__(self):
                super().__init__()
                self.calls = []

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.calls.append(str(function))
                return function(*args, **(kwargs or {}))

        counts = []
        for asked in (False, True):
            with torch.no_grad(), Count() as count:
                model(ids, use_cache=False, output_deductive_outputs=asked)
            counts.append(count.calls)
        assert counts[0] == counts[1]

    def test_constant_operator_has_only_G(self, small_model, ids):
        (layer, _) = small_model(operator="constant")(ids, output_deductive_outputs=True).deductive_outputs
        assert layer[:3] == (None, None, None)
        assert torch.equal(layer.G_LM, torch.eye(16).expand(1, 2, 16, 16))

    def test_attention_weights_and_hidden_states(self, small_model, ids):
        model = small_model()
        model.set_attn_implementation("eager")
        output = model(ids, output_attentions=True, output_hidden_states=True)
        assert [tuple(weights.shape) for weights in output.attentions] == [(3, 2, 16, 16)] * 2
        assert len(output.hidden_states) == 3


class TestPrecisionAndCompilation:
    @pytest.mark.slow
    @pytest.mark.parametrize("operator", ["learned", "constant"])
    def test_training_forward_compiles_without_graph_breaks(self, small_model, ids, operator):
        model = small_model(operator=operator, operator_init="random").train()
        # The aot_eager backend traces forward and backward without a C++ compiler; fullgraph refuses any break.
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:], "use_cache": False}
        expected = model(**batch)
        expected.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        output = compiled(**batch)
        output.loss.backward()
        assert_close(output.loss, expected.loss, max_error=1e-6)
        for name, parameter in model.named_parameters():
            if name in gradients:
                assert_close(parameter.grad, gradients[name], rms_ratio=1e-4, name=name)

    @pytest.mark.parametrize("operator", ["learned", "constant"])
    def test_bf16_and_autocast_stay_near_fp32(self, small_model, ids, operator):
        model = small_model(operator=operator, operator_init="random")
        with torch.no_grad():
            expected = model(ids).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                under_autocast = model(ids).logits.float()
            in_bf16 = model.to(torch.bfloat16)(ids).logits
        assert in_bf16.dtype == torch.bfloat16
        # bf16 keeps 8 bits: 4e-3 a rounding, accumulated over two layers and the metric learner.
        assert_close(under_autocast, expected, rms_ratio=5e-2)
        assert_close(in_bf16.float(), expected, rms_ratio=5e-2)

    def test_gradient_checkpointing_changes_nothing(self, small_model, ids, monkeypatch):
        model = small_model().train()
        calls = []
        original = LearnedOperator.metric
        monkeypatch.setattr(LearnedOperator, "metric", lambda *args: calls.append(1) or original(*args))
        model(ids, labels=ids, use_cache=False).loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert len(calls) == 2 + 4  # two layers, once; then once forward and once again in the backward pass
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, expected[name], max_error=1e-7, name=name)


class TestGenerate:
    def test_sampling_is_seeded_and_top_k_1_is_greedy(self, small_model, ids):
        model = small_model()
        greedy = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
        narrow = model.generate(ids[:1], max_new_tokens=8, do_sample=True, top_k=1, temperature=0.7)
        assert torch.equal(greedy, narrow)
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(model.generate(ids[:1], max_new_tokens=8, do_sample=True, top_p=0.95, top_k=0))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_beams_find_a_likelier_text_than_greedy(self, small_model, ids):
        """With constant G, log-likelihoods are causal, so they can be compared."""
        model = small_model(operator="constant", operator_init="random")

        def log_likelihood(tokens):
            with torch.no_grad():
                logs = model(tokens).logits.log_softmax(-1)[:, :-1]
            return logs.gather(-1, tokens[:, 1:, None])[:, 15:].sum().item()

        greedy = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
        beams = model.generate(ids[:1], max_new_tokens=6, do_sample=False, num_beams=8, eos_token_id=None)
        assert not torch.equal(beams, greedy)
        assert log_likelihood(beams) > log_likelihood(greedy)

    def test_streamer_and_pipeline(self, small_model, toy_tokenizer, capsys):
        model = small_model(vocab_size=len(toy_tokenizer))
        prompt = toy_tokenizer("the cat sat", return_tensors="pt").input_ids
        expected = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
        streamer = TextStreamer(toy_tokenizer, skip_prompt=True)
        model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, streamer=streamer)
        text = toy_tokenizer.decode(expected[0, prompt.shape[1] :])
        assert text.strip() in capsys.readouterr().out
        generator = pipeline("text-generation", model=model, tokenizer=toy_tokenizer)
        result = generator("the cat sat", max_new_tokens=5, do_sample=False, eos_token_id=None)[0]["generated_text"]
        assert result == "the cat sat" + toy_tokenizer.decode(expected[0])[len("the cat sat") :]
