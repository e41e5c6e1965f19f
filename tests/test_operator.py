import pytest
import torch

from helpers import assert_close, shared
from pldr import (
    ConstantOperator,
    LearnedOperator,
    PldrForCausalLM,
    deductive_outputs,
    freeze,
    load_model,
    load_predefined_G,
)
from pldr.operator import stored_operator
from pldr.ops import reference


def test_identity_operator_is_scaled_dot_product_attention(small_model):
    """With G_LM = identity, the operator hands queries and keys through, bit for bit."""
    operator = small_model(operator="constant").model.layers[0].self_attn.operator
    query, key = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    new_query, new_key, _ = operator(query, key)
    assert torch.equal(new_query, query)
    assert torch.equal(new_key, key)


def test_random_operator_is_standard_normal_and_seeded(small_model):
    one, same, other = (small_model(seed, operator="constant", operator_init="random") for seed in (1, 1, 2))
    G_LM = deductive_outputs(one, torch.tensor([[5]])).G_LM
    assert G_LM.std().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(G_LM, deductive_outputs(same, torch.tensor([[5]])).G_LM)
    assert not torch.equal(G_LM, deductive_outputs(other, torch.tensor([[5]])).G_LM)


def test_only_a_trainable_constant_is_a_parameter(small_model, ids):
    fixed, trained = (small_model(operator="constant", operator_trainable=flag) for flag in (False, True))
    assert trained.num_parameters() - fixed.num_parameters() == 2 * 2 * 16 * 16
    trained(ids, labels=ids).loss.backward()
    assert trained.model.layers[0].self_attn.operator.G_LM.grad.abs().sum() > 0


def test_power_law_by_hand():
    """One head, D = 2, every step written out."""
    A = torch.tensor([[[[1.0, 2.0], [3.0, -1.0]]]])
    W, b = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[0.5, 0.0], [0.0, -1.0]]])
    p, a = torch.tensor([[[2.0, 0.5], [-1.0, 0.0]]]), torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])
    b_a = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    A_LM, A_P, G_LM = reference.power_law(A, W, b, p, a, b_a)
    z = torch.tensor([[1.5, 2.0], [4.0, 0.0]])  # W A + b
    expected_metric = z * z / (1 + torch.exp(-z)) + 1e-9
    expected_potential = torch.stack([torch.stack([expected_metric[0, 0] ** 2, expected_metric[0, 1] ** 0.5]),
                                      torch.stack([1 / expected_metric[1, 0], torch.tensor(1.0)])])  # fmt: skip
    assert_close(A_LM[0, 0], expected_metric, max_error=1e-6)
    assert_close(A_P[0, 0], expected_potential, max_error=1e-5)
    row = expected_potential
    expected = torch.stack([row[0] + 2 * row[1] + torch.tensor([0.0, 1.0]), row[1] + torch.tensor([1.0, 0.0])])
    assert_close(G_LM[0, 0], expected, max_error=1e-5)


def test_density_matrix_ignores_padding_even_where_it_is_nan():
    query = torch.randn(2, 3, 6, 4)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    poisoned = query.clone()
    poisoned[0, :, :2] = float("nan")
    density = reference.density_matrix(poisoned, mask)
    assert_close(density[0], query[0, :, 2:].transpose(-1, -2) @ query[0, :, 2:], max_error=1e-5)
    assert_close(density[1], query[1].transpose(-1, -2) @ query[1], max_error=1e-5)


class TestFreeze:
    def test_from_one_prompt(self, small_model, ids, tmp_path):
        model = small_model()
        expected = deductive_outputs(model, ids[:1]).G_LM
        with torch.no_grad():
            logits = model(ids[:1]).logits
        learned = model.num_parameters()
        freeze(model, ids[:1])
        assert not any(isinstance(module, LearnedOperator) for module in model.modules())
        assert model.num_parameters() < learned
        assert torch.equal(deductive_outputs(model, ids[1:]).G_LM, expected)
        with torch.no_grad():
            assert_close(model(ids[:1]).logits, logits, max_error=1e-5)

        model.save_pretrained(tmp_path)
        loaded = load_model(tmp_path)
        assert all(isinstance(layer.self_attn.operator, ConstantOperator) for layer in loaded.model.layers)
        assert not any("metric_learner" in name for name in loaded.state_dict())
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)

    def test_several_prompts_of_different_lengths_are_averaged(self, small_model, ids):
        model = small_model()
        prompts = [ids[0], ids[1, :7]]
        each = [deductive_outputs(model, prompt[None]).G_LM for prompt in prompts]
        frozen = deductive_outputs(freeze(model, prompts), ids[:1]).G_LM
        assert_close(frozen, (each[0] + each[1]) / 2, max_error=1e-6)

    def test_tensor_from_elsewhere_and_exchange(self, small_model, ids):
        model = small_model()
        for G_LM in (torch.randn(2, 2, 16, 16), [torch.randn(1, 2, 16, 16) for _ in range(2)]):
            freeze(model, G_LM=G_LM)
            expected = torch.stack(list(G_LM)).reshape(2, 1, 2, 16, 16)
            assert torch.equal(deductive_outputs(model, ids).G_LM, expected)

    def test_trainable(self, small_model, ids, tmp_path):
        model = freeze(small_model(), ids[:1], trainable=True)
        assert model.model.layers[0].self_attn.operator.G_LM.requires_grad
        model.save_pretrained(tmp_path)
        assert PldrForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn.operator.G_LM.requires_grad

    def test_keeps_the_training_mode(self, small_model, ids):
        model = small_model().train()
        assert all(module.training for module in freeze(model, ids[:1]).modules())

    def test_hooks_still_record_once(self, small_model, ids):
        model = small_model()
        model(ids, output_deductive_outputs=True, output_hidden_states=True)
        freeze(model, ids[:1])
        output = model(ids, output_deductive_outputs=True, output_hidden_states=True)
        assert len(output.deductive_outputs) == 2
        assert len(output.hidden_states) == 3

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: torch.randn(3, 2, 16, 16), "has 3 layers, the model has 2"),
            (lambda: torch.randn(2, 4, 16, 16), r"layer 0 has shape \(4, 16, 16\)"),
            (lambda: torch.randn(2, 2, 16, 8), r"layer 0 has shape \(2, 16, 8\)"),
            (lambda: torch.randn(2, 3, 2, 16, 16), r"layer 0 has shape \(3, 2, 16, 16\)"),
            (lambda: torch.full((2, 2, 16, 16), float("nan")), "layer 0 holds NaN"),
            (lambda: [torch.zeros(2, 16, 16), torch.full((2, 16, 16), float("inf"))], "layer 1 holds NaN"),
        ],
    )
    def test_unfit_tensor_is_refused_and_nothing_changes(self, small_model, make, message):
        model = small_model()
        with pytest.raises(ValueError, match=message):
            freeze(model, G_LM=make())
        assert model.config.operator == "learned"
        assert all(isinstance(layer.self_attn.operator, LearnedOperator) for layer in model.model.layers)

    def test_arguments(self, small_model, ids):
        model = small_model()
        with pytest.raises(ValueError, match="either prompts or G_LM"):
            freeze(model)
        with pytest.raises(ValueError, match="either prompts or G_LM"):
            freeze(model, ids, G_LM=torch.zeros(2, 2, 16, 16))
        with pytest.raises(ValueError, match="no prompts given"):
            freeze(model, [])
        with pytest.raises(ValueError, match="a prompt is empty"):
            freeze(model, [ids[0, :0]])
        with pytest.raises(ValueError, match="constant already"):
            freeze(freeze(model, ids[:1]), ids[:1])

    def test_one_prompt_in_any_form(self, small_model, ids):
        expected = deductive_outputs(small_model(), ids[:1]).G_LM
        for prompts in (ids[0], ids[:1], [ids[0]], [ids[:1]], [ids[0].tolist()]):
            assert torch.equal(deductive_outputs(freeze(small_model(), prompts), ids[:1]).G_LM, expected)
        for prompts in (ids[0].tolist(), [ids[:2]]):
            with pytest.raises(ValueError, match=r"a prompt must be token ids \[T\]"):
                freeze(small_model(), prompts)

    def test_complex_and_integer_tensors_are_refused(self, small_model):
        for dtype in (torch.complex64, torch.int64):
            with pytest.raises(ValueError, match="must hold real floating-point numbers"):
                freeze(small_model(), G_LM=torch.zeros(2, 2, 16, 16, dtype=dtype))


def test_freezing_leaves_the_configuration_of_others(small_config):
    """Two models of one configuration: freezing one changes neither the other nor what is made of it later."""
    config = small_config()
    one, other = PldrForCausalLM(config), PldrForCausalLM(config)
    freeze(one, [torch.arange(4, 12)])
    assert one.config.operator == one.model.config.operator == "constant"
    assert config.operator == other.config.operator == "learned"
    assert other.config is config
    assert not any(getattr(module, "config", None) is config for module in one.modules())
    other(torch.arange(4, 12)[None])  # with a cache for a learned operator


def test_uniform_is_the_published_random_operator_and_random_is_read_as_normal(small_model):
    uniform = stored_operator(
        small_model(operator="constant", operator_init="uniform", hidden_size=128, num_attention_heads=2)
    )
    assert 0 <= uniform.min() < uniform.max() <= 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    assert uniform.std() == pytest.approx(12**-0.5, abs=0.01)
    largest, following = torch.linalg.svdvals(uniform[0, 0])[:2]
    assert largest == pytest.approx(32, abs=1)  # of 64 dimensions: that of the mean, 64/2
    assert following < 6
    torch.manual_seed(0)
    normal = stored_operator(small_model(operator="constant", operator_init="normal"))
    torch.manual_seed(0)
    before = small_model(operator="constant", operator_init="random")
    assert before.config.operator_init == "normal"
    assert torch.equal(stored_operator(before), normal)
    with pytest.raises(ValueError, match="operator_init='uniform' applies to"):
        small_model(operator="factored", operator_init="uniform", operator_ranks=[8, 8], hidden_size=64)


def test_the_papers_random_operator_is_uniform():
    tensor = load_predefined_G(shared("data/G_LM-RANDOM_NORMAL-paper.pkl"))
    assert 0 <= tensor.min() < tensor.max() <= 1
    assert tensor.mean() == pytest.approx(0.4997, abs=1e-4)
    assert tensor.std() == pytest.approx(0.2883, abs=1e-4)
    assert torch.linalg.svdvals(tensor[0, 0])[:2].tolist() == pytest.approx([32.1, 4.5], abs=0.1)
