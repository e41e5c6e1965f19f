"""The kernels for training, against the plain operations in float64: values, every gradient, memory, compilers."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pldr import PldrConfig, PldrForCausalLM
from pldr.operator import ResidualUnit
from pldr.ops import aligned, bilinear, metric_learner, norm, projections, reference
from pldr.recipe import OptimizationRecipe
from pldr.training.graph import WARMUP, GraphedStep
from pldr.training.optimizer import BoundedAdamW
from pldr.training.trainer import compile_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16]
# Relative, in the Euclidean norm, against float64: what rounding the inputs of each product costs.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.2e-2}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that holds NaN wherever a kernel does not write."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    blocks = [torch.full((2**n,), float("nan"), device="cuda") for n in range(8, 25)]
    del blocks


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def check(kernel, plain, inputs, dtype, **tolerances):
    """A kernel's outputs and gradients of inputs, as lists, against those of the plain operation in float64."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    outputs, expected = kernel(*inputs), plain(*exact)
    gradients = [torch.randn_like(y) for y in expected]
    torch.autograd.backward(list(outputs), [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True)])
    torch.autograd.backward(expected, gradients)
    found = [*outputs, *(x.grad for x in inputs if x.requires_grad)]
    wanted = [*expected, *(x.grad for x in exact if x.requires_grad)]
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error <= TOLERANCE[dtype], f"number {number}: {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["adjacent", "halves"])
@pytest.mark.parametrize(("batch", "length", "heads", "width"), [(2, 33, 3, 64), (1, 100, 1, 32), (3, 7, 2, 128)])
def test_projections(dtype, pairing, batch, length, heads, width):
    model = heads * width
    x, weight = rand(batch, length, model, dtype=dtype), rand(3 * model, model, dtype=dtype) / model**0.5
    bias, angles = rand(3 * model, dtype=dtype), rand(batch, length, width // 2)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def kernel(*tensors):
        return projections._project(*tensors, angles.cos(), angles.sin(), width, pairing == "adjacent")

    def plain(x, weight, bias):
        parts = F.linear(x, weight, bias).unflatten(-1, (3, heads, width)).unbind(2)
        cos, sin = (part.double()[:, None] for part in (angles.cos(), angles.sin()))
        turned = [rotate(part.transpose(1, 2), cos, sin, pairing).transpose(1, 2) for part in parts[:2]]
        return [*turned, parts[2]]

    check(kernel, plain, inputs, dtype)


def rotate(x, cos, sin, pairing):
    """`reference.apply_rotary` in float64, which that takes down to float32."""
    pairs = x.unflatten(-1, (-1, 2)) if pairing == "adjacent" else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    first, second = pairs.unbind(-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.flatten(-2) if pairing == "adjacent" else turned.transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "inner"), [(130, 64, 192), (33, 24, 100), (257, 896, 2432)])
def test_gated_unit(dtype, rows, width, inner):
    shapes = [(rows, width), (2 * inner, width), (2 * inner,), (width, inner), (width,)]
    inputs = [(rand(*shape) / shape[-1] ** 0.5).to(dtype).requires_grad_() for shape in shapes]

    def plain(z, weight, bias, down, down_bias):
        gate, up = F.linear(z, weight, bias).chunk(2, -1)
        return [F.linear(F.silu(gate) * up, down, down_bias)]

    check(lambda *tensors: aligned._gated_unit(*tensors)[:1], plain, inputs, dtype)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(70, 64), (3, 1000), (4097, 896)])
def test_add_norm(rows, width, rounded):
    x, residual = rand(rows, width, dtype=torch.bfloat16), rand(rows, width)
    inputs = [tensor.requires_grad_() for tensor in (x, residual, rand(width), rand(width))]

    def kernel(*tensors):
        return norm._add_norm(*tensors, 1e-6, rounded)[: 1 + rounded]

    def plain(x, residual, weight, bias):
        y = F.layer_norm(x + residual, (width,), weight, bias, 1e-6)
        return [y, y][: 1 + rounded]

    check(kernel, plain, inputs, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize(("batch", "length", "heads", "width"), [(2, 65, 3, 64), (3, 17, 1, 32), (1, 200, 2, 128)])
def test_operator_and_density(dtype, per_sequence, batch, length, heads, width):
    # Not contiguous: heads of a wider tensor.
    query = rand(batch, length, heads + 1, width, dtype=dtype)[:, :, 1:].detach().requires_grad_()
    G = rand(batch if per_sequence else 1, heads, width, width).requires_grad_()
    check(lambda q, g: [bilinear._apply(q, g)], lambda q, g: [torch.einsum("bthd,bhde->bthe", q, g.expand(batch, -1, -1, -1))],
          [query, G], dtype)  # fmt: skip
    query = query.detach().requires_grad_()
    check(lambda q: [bilinear._density(q)], lambda q: [reference.density_matrix(q.transpose(1, 2))], [query], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "inner", "glus", "units", "rows"), [(64, 170, 2, 8, 5000), (32, 70, 1, 3, 77), (128, 340, 2, 2, 301), (64, 16, 3, 1, 64)]
)  # fmt: skip
def test_residual_network(dtype, width, inner, glus, units, rows):
    config = SimpleNamespace(head_dim=width, metric_learner_width=inner, metric_learner_glus=glus, layer_norm_eps=1e-6)
    network = nn.ModuleList(ResidualUnit(config) for _ in range(units)).cuda()
    for unit in network:
        nn.init.normal_(unit.norm.weight, 1.0, 0.2)
        nn.init.normal_(unit.norm.bias, 0.0, 0.2)
    x, gradient = rand(rows, width), rand(rows, width)

    def run(forward, network, x):
        x = x.clone().requires_grad_()
        network.zero_grad()
        y = forward(network, x)
        y.backward(gradient.to(y.dtype))
        return [y.detach().double(), x.grad.double(), *(p.grad.double() for p in network.parameters())]

    def plain(network, x):
        for unit in network:
            x = unit(x)
        return x

    def kernels(network, x):
        parameters = metric_learner.parameters_of(network)
        return metric_learner._network(x, parameters, units, 1e-6, dtype)[0]

    def errors(found):
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    found = run(kernels, network, x)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        usual = run(plain, network, x)
    exact = run(plain, network.double(), x.double())
    assert max(errors(found)) <= TOLERANCE[dtype]
    # No further from the truth than PyTorch's own steps in this precision, but for the rounding of float16 (2^-11) in what is kept.
    for one, other in zip(errors(found), errors(usual), strict=True):
        assert one <= 1.5 * other + (1e-6 if dtype == torch.float32 else 2**-11)


def test_operations_are_well_formed():
    x = rand(64, 64, dtype=torch.bfloat16).requires_grad_()
    angles = rand(1, 32, 16)
    w, b = rand(192, 64, dtype=torch.bfloat16).requires_grad_(), rand(192, dtype=torch.bfloat16).requires_grad_()
    config = SimpleNamespace(head_dim=64, metric_learner_width=24, metric_learner_glus=2, layer_norm_eps=1e-6)
    network = nn.ModuleList([ResidualUnit(config)]).cuda()
    query = rand(2, 32, 2, 32, dtype=torch.bfloat16).requires_grad_()
    cases = [
        (
            projections._project,
            (x.detach().view(2, 32, 64).requires_grad_(), w, b, angles.cos(), angles.sin(), 32, True),
        ),
        (aligned._gated_unit, (x, w[:128], b[:128], rand(64, 64, dtype=torch.bfloat16), b[:64])),
        (norm._add_norm, (x, rand(64, 64), rand(64).requires_grad_(), rand(64), 1e-6, True)),
        (bilinear._apply, (query, rand(2, 2, 32, 32).requires_grad_())),
        (bilinear._density, (query,)),
        (metric_learner._network, (rand(64, 64), metric_learner.parameters_of(network), 1, 1e-6, torch.bfloat16)),
    ]
    for operation, arguments in cases:
        torch.library.opcheck(
            operation, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )


@pytest.mark.parametrize("operator", ["learned", "constant"])
@pytest.mark.parametrize("pairing", ["adjacent", "halves"])
def test_model_with_kernels_is_the_model(operator, pairing, monkeypatch):
    """Losses and gradients of bf16 autocast, eager and compiled, are as near to float32's as those of the plain operations."""
    config = PldrConfig(
        vocab_size=500, hidden_size=128, num_attention_heads=2, num_hidden_layers=2, metric_learner_units=2,
        metric_learner_width=170, operator=operator, operator_init="identity", rope_pairing=pairing, max_position_embeddings=256,
    )  # fmt: skip
    model = PldrForCausalLM(config).cuda().train()
    ids = torch.randint(4, 500, (40, 129), device="cuda")

    def run(autocast=True):
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False, return_logits=False).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().double() for p in model.parameters()])

    calls = []
    for module, name in (
        (metric_learner, "_network"),
        (projections, "_project"),
        (aligned, "_gated_unit"),
        (norm, "_add_norm"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name: calls.append(n) or f(*a))
    exact, found = run(autocast=False), run()
    assert set(calls) == {"_project", "_gated_unit", "_add_norm"} | ({"_network"} if operator == "learned" else set())
    monkeypatch.undo()
    compile_layers(model)
    compiled = run()
    for layer in model.model.layers:
        layer._compiled_call_impl = None
    for module in (aligned, bilinear, metric_learner, norm, projections):
        monkeypatch.setattr(module, "training_dtype", lambda x: None)
    plain = run()
    for loss, gradients in (found, compiled):
        assert loss == pytest.approx(exact[0], rel=1e-4)
        assert (gradients - exact[1]).norm() <= 1.3 * (plain[1] - exact[1]).norm()


@pytest.mark.parametrize("operator", ["learned", "constant"])
def test_a_model_in_bf16_without_autocast(operator, monkeypatch):
    """As fine-tuning scripts have it: gradients are as near to those of the same weights in float32 as without the kernels."""
    config = PldrConfig(
        vocab_size=500, hidden_size=128, num_attention_heads=2, num_hidden_layers=2, metric_learner_units=2,
        metric_learner_width=170, operator=operator, operator_init="identity", max_position_embeddings=256,
    )  # fmt: skip
    model = PldrForCausalLM(config).cuda().bfloat16().train()
    ids = torch.randint(4, 500, (40, 129), device="cuda")

    def gradients(model):
        model(input_ids=ids, labels=ids, use_cache=False, return_logits=False).loss.backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    exact, found = gradients(copy.deepcopy(model).float()), gradients(copy.deepcopy(model))
    for module in (aligned, bilinear, metric_learner, norm, projections):
        monkeypatch.setattr(module, "training_dtype", lambda x: None)
    plain = gradients(model)
    assert (found - exact).norm() <= 1.3 * (plain - exact).norm()


@pytest.mark.parametrize("fields", [{}, {"operator": "learned", "metric_learner_units": 1, "metric_learner_width": 64}])
def test_a_step_as_a_graph_is_the_step(tmp_path, fields):
    """Losses and weights of a run with the graph are those without; evaluation between the steps, a hand-off, and going on
    change nothing.
    """
    from pldr import HELD_OUT, STORIES, load_model
    from pldr.recipe import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe
    from pldr.training.run import train

    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "operator": "constant"} | fields
    handoff = {"handoff_step": 13} if fields else {}

    def run(name, **changes):
        settings = {"steps": 20, "batch_size": 8, "warmup_steps": 2, "learning_rate": 1e-3, "cuda_graph": "never"}
        recipe = Recipe(
            str(tmp_path / name),
            DataRecipe([str(HELD_OUT)], [str(HELD_OUT)], tokenizer=str(STORIES), sequence_length=64, cache=str(tmp_path / "cache")),
            ModelRecipe(config=shape),
            OptimizationRecipe(**settings | handoff | changes), log_steps=1, eval_steps=7, save_steps=8, report_to=[],
        )  # fmt: skip
        train(recipe, progress=False)
        return recipe, load_model(recipe.output).state_dict()

    recipe, graph = run("graph", cuda_graph="auto")
    _, eager = run("eager")
    _, again = run("again")
    _, other = run("other", learning_rate=1.01e-3)
    train(recipe, resume=tmp_path / "graph" / "checkpoint-16", progress=False)
    resumed = load_model(recipe.output).state_dict()
    away = [max((a[k] - eager[k]).abs().max().item() for k in eager) for a in (graph, resumed, again, other)]
    assert max(away[:2]) <= 3 * away[2] + 1e-6, away  # sums on a GPU come in another order each time
    assert away[3] > 10 * max(away[:2]), away


def test_an_optimiser_as_a_graph_is_the_optimiser():
    """Weights, moments and counts of steps, with rates that change, a step that is left out, and a bound that is met."""
    recipe = OptimizationRecipe(clip_value=0.5)
    one, two = ([nn.Parameter(rand(7, 3)), nn.Parameter(rand(5))] for _ in range(2))
    for a, b in zip(one, two, strict=True):
        b.data.copy_(a.data)
    graphed, eager = BoundedAdamW(one, recipe, graphed=True), BoundedAdamW(two, recipe)
    still = [rand(*p.shape) for p in one]
    for step in range(8):
        for p, q, gradient in zip(one, two, still, strict=True):
            gradient.normal_()
            p.grad, q.grad = gradient, gradient.clone()
        graphed.gradients_stay = step >= 2
        for optimizer in (graphed, eager):
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            optimizer.found_inf = torch.tensor(float(step == 5), device="cuda")
            optimizer.step()
        assert all(p.grad.abs().max() == 0.5 for p in one[:1])
    assert graphed._graph is not None
    assert eager._graph is None
    assert graphed.param_groups[0]["lr"] == 8e-3
    for p, q in zip(one, two, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)
        for name, value in eager.state[q].items():
            assert torch.allclose(graphed.state[p][name], value, rtol=1e-6, atol=1e-7), name
        assert graphed.state[p]["step"] == 7


def test_a_step_that_can_not_be_a_graph_says_why():
    weight = nn.Parameter(rand(3, 3))

    def step(inputs):
        loss = (weight * inputs["x"]).sum()
        loss.backward()
        loss.item()
        return (loss.detach(),)

    graphed = GraphedStep(step, [weight])
    for _ in range(WARMUP):
        graphed({"x": rand(3, 3)})
        assert not graphed.replayed
    generator = torch.cuda.default_generators[0]
    before = generator.clone_state()
    try:
        with pytest.raises(RuntimeError, match=r"optimization.cuda_graph: .*capturing.*; set it to never"):
            graphed({"x": rand(3, 3)})
    finally:  # both are left as the recording, which ended early, had them
        generator.graphsafe_set_state(before)
        torch.cuda.set_stream(torch.cuda.default_stream())


def test_200_steps_with_kernels_are_as_near_to_plain_ones_as_these_to_themselves(monkeypatch):
    """As near as plain steps are to plain steps from weights that were moved by 1e-7 of their size."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from bench_train import curves

    found = curves(PldrConfig(vocab_size=6144, hidden_size=256, num_attention_heads=4, num_hidden_layers=3), steps=200)
    assert found["last"] < 0.8 * found["first"]  # they learn
    assert found["mean_of_perturbed"] > 0
    assert found["mean_difference"] < 1.5 * found["mean_of_perturbed"]
    assert found["largest_difference"] < 1.5 * found["largest_of_perturbed"]
