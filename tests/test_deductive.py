import math

import pytest
import torch

from helpers import assert_close
from pldr.deductive import dag_loss, deductive_outputs, log_determinant, numerical_rank, row_jacobians, variation


def test_dag_loss_in_closed_form():
    # A diagonal X: trace(expm(X∘X)) = sum of exp(x²).
    diagonal = torch.tensor([0.5, -1.0, 1.5])
    expected = abs(math.log(sum(math.exp(x * x) for x in (0.5, 1.0, 1.5)) / 3))
    assert dag_loss(torch.diag(diagonal)).item() == pytest.approx(expected, rel=1e-6)
    # Strictly triangular, a directed acyclic graph: the loss vanishes.
    assert dag_loss(torch.triu(torch.randn(5, 5), diagonal=1)).item() == pytest.approx(0.0, abs=1e-6)
    # A cycle of two: trace(expm([[0, 1], [1, 0]])) = 2 cosh 1.
    assert dag_loss(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).item() == pytest.approx(math.log(math.cosh(1)), rel=1e-5)


def test_dag_loss_averages_and_differentiates():
    X = torch.randn(2, 3, 4, 4, dtype=torch.float64) / 2
    assert_close(dag_loss(X), torch.stack([dag_loss(x) for x in X.flatten(0, 1)]).mean(), max_error=1e-12)
    assert torch.autograd.gradcheck(dag_loss, X[0].requires_grad_())
    assert dag_loss(X.bfloat16()).dtype == torch.float32


def test_variation():
    mean = torch.randn(2, 1, 3, 4, 4)
    assert variation(mean.expand(2, 5, 3, 4, 4)).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    noise = torch.randn(2, 2, 3, 4, 4)
    noise[:, 1] = -noise[:, 0]  # the mean over passages stays
    expected = (noise[:, 0].square().mean((1, 2, 3)) / mean[:, 0].square().mean((1, 2, 3))).sqrt()
    assert_close(variation(mean + noise), expected.double(), rms_ratio=1e-5)
    with pytest.raises(ValueError, match="at least two passages"):
        variation(mean)


def test_determinant_and_rank():
    sign, log = log_determinant(torch.diag(torch.tensor([-1e-30] + [1e-30] * 19)))
    assert (sign.item(), log.item()) == (-1.0, pytest.approx(-600.0))
    vector = torch.arange(1.0, 9.0)
    assert numerical_rank(torch.outer(vector, vector)).item() == 1
    values = torch.diag(torch.tensor([2.0, 0.1, 0.019, 1e-4]))
    assert numerical_rank(values).item() == 2
    assert numerical_rank(values, 1e-3).item() == 3


@pytest.mark.parametrize("function", [variation, log_determinant, numerical_rank])
def test_values_that_are_not_finite_are_refused(function):
    X = torch.ones(1, 2, 1, 3, 3)
    X[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        function(X)


def test_outputs_satisfy_the_equations(small_model, ids):
    """Recomputed from the model's own parameters, one head at a time."""
    model = small_model()
    outputs = deductive_outputs(model, ids)
    assert all(tensor.shape == (2, 3, 2, 16, 16) for tensor in outputs)
    operator = model.model.layers[1].self_attn.operator
    for head in range(2):
        z = operator.metric_weight[head] @ outputs.A[1, :, head] + operator.metric_bias[head]
        A_LM = z * z * torch.sigmoid(z) + 1e-9
        assert_close(outputs.A_LM[1, :, head], A_LM.detach(), max_error=1e-5)
        A_P = torch.exp(operator.exponent[head] * outputs.A_LM[1, :, head].log())
        assert_close(outputs.A_P[1, :, head], A_P.detach(), max_error=1e-5)
        G_LM = operator.energy_weight[head] @ outputs.A_P[1, :, head] + operator.energy_bias[head]
        assert_close(outputs.G_LM[1, :, head], G_LM.detach(), max_error=1e-5)


def test_training_mode_is_kept(small_model, ids):
    model = small_model().train()
    deductive_outputs(model, ids)
    assert model.training


def test_they_print_in_a_few_lines_and_are_pictures_in_a_notebook(small_model, ids):
    outputs = deductive_outputs(small_model(), ids)
    assert repr(outputs).startswith("DeductiveOutputs(A=[2, 3, 2, 16, 16] float32, A_LM=")
    assert len(repr(outputs)) < 200
    html = outputs._repr_html_()
    assert html.count("data:image/png;base64,") == 2  # a row a layer
    (_, layer) = small_model(operator="constant")(ids, output_deductive_outputs=True).deductive_outputs
    assert repr(layer) == "DeductiveOutputs(A=None, A_LM=None, A_P=None, G_LM=[1, 2, 16, 16] float32)"
    assert layer._repr_html_().count("<img") == 1


class TestRowJacobians:
    def test_against_differences(self, small_model, ids):
        model = small_model().double()
        operator = model.model.layers[1].self_attn.operator
        found = row_jacobians(model, ids, rows=5)
        assert found.shape == (2, 5, 16, 16)
        seen = []
        hook = operator.input_norm.register_forward_hook(lambda module, args, output: seen.append(output))
        deductive_outputs(model, ids)
        hook.remove()
        every = seen[0].flatten(0, -2)
        row = every[:: len(every) // 5][3]
        with torch.no_grad():
            for place in (0, 7):
                step = 1e-5 * torch.eye(16, dtype=torch.float64)[place]
                ends = [row + step, row - step]
                for unit in operator.metric_learner:
                    ends = [unit(end) for end in ends]
                assert_close(found[1, 3, :, place], (ends[0] - ends[1]) / 2e-5, max_error=1e-6)

    def test_a_network_that_forgets_its_input_has_none(self, small_model, ids):
        model = small_model()
        for unit in model.model.layers[0].self_attn.operator.metric_learner:
            torch.nn.init.zeros_(unit.norm.weight)
        found = row_jacobians(model, ids)
        assert found[0].abs().max() == 0
        assert found[1].abs().max() > 0.1
        assert not model.model.layers[0].self_attn.operator.input_norm._forward_hooks

    def test_a_constant_operator_has_no_network(self, small_model, ids):
        with pytest.raises(ValueError, match="row_jacobians: needs a learned operator"):
            row_jacobians(small_model(operator="constant"), ids)
