"""Cross-entropy of a linear layer's logits, without ever holding all of them.

With 64 sequences of 1,024 tokens and 32,000 pieces the logits are 4 GB in bf16, and a plain loss reads and writes them
several times, partly in fp32. Here a chunk of rows at a time goes through the matrix product, the loss and its
gradient, which replaces the logits in place; the gradients of the inputs are ready when the forward pass ends.

`linear_cross_entropy` is the entry: this kernel on CUDA, `reference.linear_cross_entropy` elsewhere.
"""

import torch

from pldr.ops import reference

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the CPU build of torch brings no Triton
    triton = None

# Bytes of one chunk of logits.
_CHUNK_BYTES = 512 * 2**20


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over rows of the cross-entropy of `hidden @ weightᵀ + bias` against `targets`, and of their right guesses.

    Args:
        hidden: [N, M]; under autocast it is rounded to the autocast dtype, as a linear layer would.
        weight: [V, M].
        bias: [V].
        targets: [N] (int64), each in [0, V), which the kernel does not check; rows with reference.IGNORED_TARGET count
            nothing.

    Returns:
        The loss, a float32 scalar in nats, differentiable in `hidden`, `weight` and `bias`; and how many targets have
        the highest logit of their row (ties count), a float32 scalar.
    """
    if not hidden.is_cuda or triton is None:
        return reference.linear_cross_entropy(hidden, weight, bias, targets)
    if torch.is_autocast_enabled("cuda"):
        hidden = hidden.to(torch.get_autocast_dtype("cuda"))
    loss, correct, *_ = _loss_and_gradients(hidden, weight, bias, targets, torch.is_grad_enabled())
    return loss, correct


@torch.library.custom_op("pldr::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor, gradients: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed loss, right guesses, and the loss's gradients: by hidden (its dtype); by weight and bias (float32, [V, M + 8]:
    M columns of the one, then the other).

    Without `gradients` these are empty, and the two matrix products that they take are saved.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    grad_hidden, summed = _empty_gradients(hidden, weight, gradients)
    step = max(1, _CHUNK_BYTES // (vocabulary * hidden.element_size()))
    # Inputs with a column of ones: the product that gives the weight's gradient then gives the bias's, too.
    wide = hidden.new_zeros(min(step, rows), hidden.shape[1] + 8)
    wide[:, hidden.shape[1]] = 1
    for start in range(0, rows, step):
        part = hidden[start : start + step]
        logits = torch.addmm(bias, part, weight.t())
        _softmax_gradient[(len(part),)](
            logits, targets[start:], losses[start:], correct[start:], vocabulary, logits.stride(0),
            IGNORED=reference.IGNORED_TARGET, BLOCK=4096, num_warps=8,
        )  # fmt: skip
        if gradients:
            torch.mm(logits, weight, out=grad_hidden[start : start + step])
            wide[: len(part), : part.shape[1]] = part
            if hidden.dtype == torch.float32:
                summed.addmm_(logits.t(), wide[: len(part)])
            else:
                torch.addmm(summed, logits.t(), wide[: len(part)], out_dtype=torch.float32, out=summed)
    return losses.sum(), correct.sum(), grad_hidden, summed


def _empty_gradients(hidden: torch.Tensor, weight: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the gradients go: by hidden, which is overwritten; by weight and bias, summed up from zero, see below."""
    if not wanted:
        return hidden.new_empty(0), hidden.new_empty(0, dtype=torch.float32)
    vocabulary, width = weight.shape
    return torch.empty_like(hidden), hidden.new_zeros((vocabulary, width + 8), dtype=torch.float32)  # rows stay aligned


@_loss_and_gradients.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor, gradients: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, correct = (hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, correct, *_empty_gradients(hidden, weight, gradients)


def _save_gradients(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*others[1:])
    ctx.dtypes = [tensor.dtype for tensor in inputs[:3]]


def _backward(ctx, grad_loss, *_unused):  # type: ignore[no-untyped-def]
    by_hidden, summed = ctx.saved_tensors
    width = by_hidden.shape[-1]
    gradients = (by_hidden, summed[:, :width], summed[:, width])
    scaled = ((grad * grad_loss).to(dtype) for grad, dtype in zip(gradients, ctx.dtypes, strict=True))
    return *scaled, None, None


_loss_and_gradients.register_autograd(_backward, setup_context=_save_gradients)


if triton is not None:

    @triton.jit
    def _softmax_gradient(  # type: ignore[no-untyped-def]
        logits, targets, losses, correct, vocabulary, stride, IGNORED: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One row: its loss, whether its target has the highest logit, and softmax - one-hot in place of its logits.

        Where the target is ignored, all of them are zeros.
        """
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        base = logits + row * stride
        if target == IGNORED:
            for start in range(0, vocabulary, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(base + columns, tl.zeros([BLOCK], logits.dtype.element_ty), mask=columns < vocabulary)
            tl.store(losses + row, 0.0)
            tl.store(correct + row, 0.0)
            return
        # Each column of a block on its own, so that the threads meet only once; from a finite number, so that no difference is NaN.
        highest, total = tl.full([BLOCK], -1e38, tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            x = tl.load(base + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last").to(tl.float32)
            new = tl.maximum(highest, x)
            total = total * tl.exp(highest - new) + tl.exp(x - new)
            highest = new
        top = tl.max(highest, 0)
        log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
        target_logit = tl.load(base + target).to(tl.float32)
        tl.store(losses + row, log_sum - target_logit)
        tl.store(correct + row, tl.where(target_logit >= top, 1.0, 0.0))
        tl.debug_barrier()  # the target's logit is read before any warp overwrites it
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            x = tl.load(base + columns, mask=inside).to(tl.float32)
            gradient = tl.exp(x - log_sum) - tl.where(columns == target, 1.0, 0.0)
            tl.store(base + columns, gradient.to(logits.dtype.element_ty), mask=inside, eviction_policy="evict_first")
