"""Each fast path against the plain reference: outputs and every gradient."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from helpers import assert_close
from pldr import modeling_pldr, operator
from pldr.ops import aligned, reference
from pldr.ops.cross_entropy import _loss_and_gradients, linear_cross_entropy


def gradients(function, *tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def problem(rows, width, vocabulary, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    bias = torch.randn(vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[::2] = (hidden @ weight.T + bias).argmax(1)[::2]  # right guesses
    if rows > 2:
        targets[1::3] = reference.IGNORED_TARGET
    return hidden.to(device, dtype), weight.to(device), bias.to(device), targets.to(device)


def test_reference_cross_entropy_by_definition():
    hidden, weight, bias, targets = problem(7, 5, 11)
    logs = (hidden @ weight.T + bias).log_softmax(-1)
    kept = targets != reference.IGNORED_TARGET
    expected = -logs[torch.arange(7), targets.clamp(min=0)][kept].sum()
    loss, correct = linear_cross_entropy(hidden, weight, bias, targets)
    assert_close(loss, expected, max_error=1e-5)
    guesses = F.linear(hidden, weight, bias).argmax(1)
    assert correct == (guesses == targets).sum()


def test_loss_without_logits_is_the_loss_with_them(small_model, ids):
    model, labels = small_model(), ids.clone()
    labels[1, 4:] = -100
    with_logits, without = (model(ids, labels=labels, return_logits=flag) for flag in (True, False))
    assert without.logits is None
    assert_close(without.loss, with_logits.loss, max_error=1e-6)
    for settings in ({}, {"num_items_in_batch": 11}):
        (one, _), (other, _) = (
            gradients(lambda w, f=flag, s=settings: _with_head(model, w)(ids, labels=labels, return_logits=f, **s).loss,
                      model.lm_head.weight) for flag in (True, False)
        )  # fmt: skip
        assert_close(one, other, max_error=1e-6)


def _with_head(model, weight):
    return lambda *args, **kwargs: torch.func.functional_call(model, {"lm_head.weight": weight}, args, kwargs)


def linears(width, inner, dtype=torch.float32):
    torch.manual_seed(inner)
    return [torch.nn.Linear(*size, dtype=dtype) for size in ((width, inner), (width, inner), (inner, width))]


# The published inner widths are 170 and 2389: 149 leaves the same remainders as the latter, by 8 and by 64.
@pytest.mark.parametrize("inner", [170, 149, 65, 64, 63, 1])
def test_padded_gated_linear_unit(inner):
    """Its result and every gradient, in float64: sums of up to 170 terms in another order differ by some 1e-15."""
    layers = linears(16, inner, torch.float64)
    z = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    outputs = [unit(z, *layers) for unit in (aligned.padded_gated_linear_unit, reference.gated_linear_unit)]
    assert_close(*outputs, rms_ratio=1e-13)
    leaves = [z, *(parameter for layer in layers for parameter in layer.parameters())]
    padded, plain = (torch.autograd.grad(output.square().sum(), leaves) for output in outputs)
    for one, other in zip(padded, plain, strict=True):
        assert_close(one, other, rms_ratio=1e-13)


def test_gated_linear_unit_on_the_cpu_is_the_reference():
    layers, z = linears(16, 21), torch.randn(2000, 16)
    assert torch.equal(aligned.gated_linear_unit(z, *layers), reference.gated_linear_unit(z, *layers))


class Adapted(torch.nn.Linear):
    """As adapters are: a layer of a class of its own, which adds something to what its weight gives."""

    def forward(self, x):
        return super().forward(x) + 1


class Quantised(torch.Tensor):
    """As quantised weights are: another kind of tensor in an ordinary layer."""


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def replace_forward(layer):
    layer.forward = lambda x: torch.nn.Linear.forward(layer, x) + 1


NOT_PLAIN = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda module, inputs, output: output + 1),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *arguments: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda *arguments: None),
    "subclass": lambda layer: setattr(layer, "__class__", Adapted),
    "parametrisation": lambda layer: register_parametrization(layer, "weight", Doubled()),
    "quantised weight": lambda layer: setattr(
        layer, "weight", torch.nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    ),
    "integer weight": lambda layer: setattr(
        layer, "weight", torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    ),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "another forward": replace_forward,
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_layers_that_are_more_than_their_weights_are_called(kind, which, monkeypatch):
    """The padded form reads weights past the layers; where that would skip something, they are called as they are."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    padded = []
    monkeypatch.setattr(aligned, "padded_gated_linear_unit", lambda z, *layers: padded.append(z))
    monkeypatch.setattr(reference, "gated_linear_unit", lambda z, *layers: z)
    z = torch.randn(600, 16).as_subclass(OnGpu)
    layers = linears(16, 21)
    assert all(map(aligned.is_plain, layers))
    aligned.gated_linear_unit(z, *layers)
    assert len(padded) == 1
    NOT_PLAIN[kind](layers[which])
    assert not aligned.is_plain(layers[which])
    assert aligned.gated_linear_unit(z, *layers) is z
    assert len(padded) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("vocabulary", [97, 4095, 4096, 4097, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_kernel(rows, vocabulary, dtype, monkeypatch):
    # A small chunk, so that the last one is partial; empty memory is NaN, so that nothing unwritten passes.
    monkeypatch.setattr("pldr.ops.cross_entropy._CHUNK_BYTES", 300 * vocabulary * 2)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        hidden, weight, bias, targets = problem(rows, 48, vocabulary, "cuda", dtype)
        _, correct = linear_cross_entropy(hidden, weight, bias, targets)
        with torch.no_grad():  # the same, without the products that gradients take
            *alone, by_hidden, summed = _loss_and_gradients(hidden, weight, bias, targets, False)
            assert by_hidden.numel() == summed.numel() == 0
        loss, grads = gradients(lambda *t: linear_cross_entropy(*t, targets)[0], hidden, weight, bias)
        _, guessed = reference.linear_cross_entropy(hidden, weight.to(dtype), bias.to(dtype), targets)
        rounded = [tensor.to(dtype).double() for tensor in (hidden, weight, bias)]
        expected, wanted = gradients(lambda *t: reference.linear_cross_entropy(*t, targets)[0], *rounded)
    finally:
        torch.use_deterministic_algorithms(False)
    # fp32 sums thousands of terms; bf16 rounds each logit and each gradient to 8 bits.
    ratio = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close(loss.double(), expected.double(), rms_ratio=ratio, name="loss")
    assert alone == [loss, correct]
    assert rows // 3 <= guessed
    assert_close(correct, guessed, max_error=0, name="right guesses")
    for grad, want, name in zip(grads, wanted, ("hidden", "weight", "bias"), strict=True):
        assert_close(grad.double(), want.double(), rms_ratio=ratio, name=name)


@pytest.mark.gpu
def test_cross_entropy_is_a_proper_operator():
    hidden, weight, bias, targets = problem(10, 16, 100, "cuda")
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_loss_and_gradients, (*inputs, targets), test_utils=tests)
    torch.library.opcheck(_loss_and_gradients, (hidden.detach(), weight.detach(), bias.detach(), targets, False),
                          test_utils=tests[:2])  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ["learned", "constant"])
def test_model_on_the_gpu_is_the_model_on_the_cpu(small_model, operator):
    """With enough rows for the aligned path, losses and gradients in fp32.

    The power law amplifies rounding: on the CPU alone fp32 gradients of such ids differ from fp64 ones by 2e-4 to 3e-2.
    These are ids for which it is 2e-4.
    """
    ids = torch.randint(4, 97, (16, 64), generator=torch.Generator().manual_seed(3))
    model = small_model(operator=operator, operator_init="random")
    expected = model(ids, labels=ids, use_cache=False)
    expected.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    loss = model(ids.cuda(), labels=ids.cuda(), use_cache=False, return_logits=False).loss
    loss.backward()
    assert_close(loss.cpu(), expected.loss, max_error=1e-5)
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert_close(parameter.grad.cpu(), wanted[name], rms_ratio=1e-3, name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "forward hook", "subclass", "parametrisation", "another forward"])
def test_gated_linear_unit_on_the_gpu_is_the_reference(kind):
    layers = [layer.cuda() for layer in linears(64, 170)]
    if kind is not None:
        NOT_PLAIN[kind](layers[1])
    torch.backends.cuda.matmul.allow_tf32 = False
    z = torch.randn(1000, 64, device="cuda")
    # Sums of up to 170 terms in fp32, in another order.
    assert_close(aligned.gated_linear_unit(z, *layers), reference.gated_linear_unit(z, *layers), rms_ratio=1e-5)


def test_the_model_takes_its_operations_by_the_doors():
    """Not straight from the reference, which would cost a GPU a third of its speed and nobody a wrong number."""
    assert modeling_pldr.linear_cross_entropy is linear_cross_entropy
    assert linear_cross_entropy is not reference.linear_cross_entropy
    assert operator.gated_linear_unit is aligned.gated_linear_unit


@pytest.mark.gpu
def test_the_loss_never_holds_all_logits(small_model):
    """Neither do its gradients: of 64 × 64 tokens and 4,096 pieces in fp32 they would be 64 MiB each."""
    model = small_model(vocab_size=4096).cuda().bfloat16()
    ids = torch.randint(4, 97, (64, 64), device="cuda")
    model(ids[:1], labels=ids[:1], use_cache=False, return_logits=False).loss.backward()
    peaks = []
    for return_logits in (False, True):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(ids, labels=ids, use_cache=False, return_logits=return_logits).loss.backward()
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    assert peaks[0] < peaks[1] - 64
