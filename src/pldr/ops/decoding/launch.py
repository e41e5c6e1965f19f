"""Programmatic dependent launch (PDL, Hopper and later): a kernel starts while its predecessor still runs.

It fetches what no step changes, its weights, and waits only where it needs what was computed before. Each kernel of
decoding calls `release`, from when on the next one may start, and `wait`, until all before it have ended and what they
wrote is seen. A kernel whose successor reads, before it waits, what is older than the kernel itself, releases it only
after its own wait (LATE).
"""

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before 3.4
    gdc_wait = gdc_launch_dependents = None


def dependent(x: torch.Tensor) -> dict[str, bool]:
    """Launch arguments of a kernel that starts before its predecessor has ended, where the device can."""
    pdl = gdc_wait is not None and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@triton.jit
def wait(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until the kernels before have ended and what they wrote is seen."""
    if PDL:
        gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel start; it waits for this one by itself."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers):  # type: ignore[no-untyped-def]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
