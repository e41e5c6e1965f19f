"""The one tolerance helper of the test suite."""

import torch


def assert_close(actual, expected, *, max_error=None, rms_ratio=None, name="tensor"):
    """Compare tensors by largest absolute error or by RMS(error) / RMS(expected); one of the two must be given.

    Rejects NaN, and any difference of shape or dtype. The message names the largest error and where it is.
    """
    assert (max_error is None) != (rms_ratio is None), "give exactly one tolerance"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype} != {expected.dtype}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN"
    error = (actual - expected).abs()
    ratio = (error.square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-30)).item()
    worst = error.max().item()
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape)) if error.dim() else ()
    message = f"{name}: max error {worst:.3e} at {index}, RMS ratio {ratio:.3e}"
    assert (worst <= max_error) if max_error is not None else (ratio <= rms_ratio), message
