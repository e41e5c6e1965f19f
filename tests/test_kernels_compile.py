"""The engine's kernels, compiled for a Hopper GPU on whatever machine this is: what the compiler refuses is seen without one."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: torch's build for the CPU does not bring it")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pldr.ops import aligned, bilinear, cross_entropy, metric_learner, norm, projections  # noqa: E402
from pldr.ops.decoding import attention, choice, few, many  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
BF16, FP32, INT32, INT64 = "*bf16", "*fp32", "*i32", "*i64"
NORM = {"gamma": BF16, "beta": BF16, "eps": "fp32"}
STATE = {
    "tokens": INT64, "positions": INT32, "chosen": INT64, "table": BF16, "scale": "fp32", "length": "i32", "steps": "i32",
    "column": "i32",
}  # fmt: skip
ATTEND = {
    "keys": BF16, "values": BF16, "positions": INT32, "rotary": FP32, "left": BF16, "right": BF16, "scale": "fp32",
    "keys_row": "i32", "keys_head": "i32", "values_row": "i32", "values_head": "i32", "sines": "i32", "left_row": "i32",
}  # fmt: skip
LINEAR = {"weight": BF16, "bias": BF16, "width": "i32", "features": "i32"}


def cases():
    """Of each kernel: argument types, constants, warps."""
    for n in (1, 3):
        for gated, highest in ((False, False), (True, False), (False, True)):
            types = LINEAR | NORM | {"x": FP32, "y": FP32, "h": FP32, "best": FP32, "where": INT32}
            constants = {"N": n, "GATED": gated, "HIGHEST": highest, "LATE": not gated, "COLUMNS": 1024, "ROWS": 8}
            yield few._norm_linear, types, constants, 8
        types = LINEAR | {"x": FP32, "highest": FP32, "total": FP32, "residual": FP32, "y": FP32}
        yield few._linear_add, types, {"N": n, "PARTS": 8, "D": 64, "COLUMNS": 1024, "ROWS": 8}, 8
        yield few._linear_add, types, {"N": n, "PARTS": 0, "D": 2432, "COLUMNS": 4096, "ROWS": 2}, 4
    yield few._embed, {"tokens": INT64, "table": BF16, "x": FP32, "width": "i32", "scale": "fp32"}, {"BLOCK": 1024}, 4
    for rank, factored in ((64, False), (16, True), (24, True)):
        shape = {
            "H": 14,
            "D": 64,
            "R": rank,
            "BLOCK_D": 64,
            "BLOCK_R": max(16, triton.next_power_of_2(rank)),
            "FACTORED": factored,
        }
        for parts, tile, kind in ((8, attention._FEW, FP32), (1, attention._SOME, BF16), (1, attention._MANY, BF16)):
            types = ATTEND | dict.fromkeys(("qkv", "out", "highest", "total"), kind)
            constants = shape | {name: tile[name] for name in ("BLOCK", "MATRIX")}
            for adjacent in (True, False):
                yield attention._attend, types, constants | {"PARTS": parts, "ADJACENT": adjacent}, tile["num_warps"]
    for kind in ("", "GATED", "ADD", "HIGHEST"):
        types = dict.fromkeys(("x", "weight", "bias", "residual"), BF16)
        types |= {"y": FP32 if kind in ("ADD", "HIGHEST") else BF16, "where": INT32}
        types |= {"sequences": "i32", "inputs": "i32", "features": "i32"}
        tile = {"BN": 32, "BF": 32, "BK": 128, "STEPS": 7, "LINES": 16, "LATE": not kind}
        yield many._dot, types, tile | {name: name == kind for name in ("GATED", "ADD", "HIGHEST")}, 4
    types = NORM | {"x": FP32, "residual": BF16, "y": BF16, "sequences": "i32", "width": "i32"}
    yield many._norm, types, {"PARTS": 4, "ADD": False, "BLOCK": 1024}, 4
    yield many._silu_product, {"both": BF16, "y": BF16, "features": "i32"}, {"BLOCK": 512}, 4
    names = ("u", "gate_up", "gate_up_bias", "down", "down_bias", "y")
    types = NORM | dict.fromkeys(names, BF16) | {"rows": "i32"}
    for width in (16, 64, 128):
        constants = {"UNITS": 8, "GLUS": 2, "D": width, "F": 192, "BLOCK": 64, "ROWS": 16, "STAGES": 3}
        yield many._residual_network, types, constants, 4
    blocks = {"best": FP32, "where": INT32}
    yield choice._highest_of_block, blocks | {"logits": FP32, "vocabulary": "i32"}, {"BLOCK": 2048}, 4
    width = {"WIDTH": 896, "COLUMNS": 1024}
    yield choice._highest_of_row, STATE | blocks | {"x": FP32, "blocks": "i32"}, width | {"BLOCK": 2048}, 4
    types = STATE | dict.fromkeys(
        ("logits", "uniform", "temperature", "top_p", "penalty", "logprobs", "embedded"), FP32
    )
    types |= {"top_k": INT32, "seen": "*u8", "vocabulary": "i32"}
    yield choice._choose, types, width | {"SEEN": True, "BLOCK": 32768}, 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "types", "constants", "warps"), cases(), ids=lambda value: getattr(value, "__name__", "")
)
def test_kernels_compile(kernel, types, constants, warps):
    constants = constants | {"PDL": True}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, values), target=HOPPER, options={"num_warps": warps, "launch_pdl": True}
    )
    assert "griddepcontrol.wait" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024


def training_cases():
    """Of each kernel for training: argument types, constants, warps, registers."""
    rows = dict.fromkeys(("rows", "width", "count", "inner", "steps", "length", "operators"), "i32") | {"eps": "fp32"}
    for width in (32, 64, 128):
        for kernel, tile in (
            (metric_learner._learner_forward, metric_learner.FORWARD),
            (metric_learner._learner_rows, metric_learner.BACKWARD),
            (metric_learner._learner_weights, metric_learner.WEIGHTS),
        ):
            block, warps, stages, registers = metric_learner._tile(tile, width, torch.bfloat16)
            types = dict.fromkeys(
                ("rows", "gradient", "vectors", "output", "scale", "by_rows", "sums", "partial"), FP32
            )
            types = rows | types | dict.fromkeys(("weights", "kept", "ahead"), BF16)
            constants = {"GLUS": 4, "UNITS": 2, "D": width, "F": 192, "CHUNK": 64, "PRECISION": "tf32"}
            yield kernel, types, constants | {"ROWS": block, "STAGES": stages}, warps, registers
        types = rows | {"flat": FP32, "weights": BF16, "vectors": FP32}
        constants = {"GLUS": 4, "UNITS": 2, "D": width, "F": 192, "CHUNK": 64}
        yield metric_learner._learner_pack, types, constants, 8, None
        strides = [f"{name}of_{what}" for name in ("", "query_") for what in ("sequence", "position", "head")]
        types = rows | dict.fromkeys(strides, "i32") | dict.fromkeys(("query", "gradient", "output", "by_query"), BF16)
        types |= {"G_LM": FP32, "by_operator": FP32}
        constants = {"H": 14, "D": width, "ROWS": bilinear._ROWS, "PRECISION": "tf32"}
        yield bilinear._operator_product, types, constants, 4, None
        for density in (False, True):
            yield bilinear._operator_backward, types, constants | {"DENSITY": density}, 4, None
        types = (
            rows
            | dict.fromkeys([*strides, "angles"], "i32")
            | {"packed": BF16, "part": BF16}
            | dict.fromkeys(("sums", "cos", "sin"), FP32)
        )
        for adjacent, rotate, back in ((True, True, False), (False, True, True), (True, False, True)):
            constants = {
                "H": 14,
                "D": width,
                "ROTATE": rotate,
                "ADJACENT": adjacent,
                "BACK": back,
                "ROWS": projections._ROWS,
            }
            yield projections._rotate, types, constants, 4, None
    types = rows | dict.fromkeys(("both", "inner", "by_both"), BF16) | {"sums": FP32}
    yield aligned._silu_product, types | {"inner": BF16}, {"BLOCK": 1024}, 4, None
    yield aligned._silu_product_backward, types | {"inner": BF16}, {"ROWS": 128, "STEP": 32, "BLOCK": 128}, 8, None
    types = rows | dict.fromkeys(("residual", "weight", "bias", "y", "scale", "gradient", "by_residual", "sums"), FP32)
    types |= dict.fromkeys(("x", "low", "of_rounded", "by_x"), BF16) | {"kept": "*fp16"}
    for rounded in (False, True):
        constants = {"ROUNDED": rounded, "BLOCK": 1024, "ROWS": norm._ROWS}
        yield norm._norm_forward, types, constants, 4, None
        yield norm._norm_backward, types, constants, 4, None
    types = {"logits": BF16, "targets": INT64, "losses": FP32, "correct": FP32, "vocabulary": "i32", "stride": "i32"}
    yield cross_entropy._softmax_gradient, types, {"IGNORED": -100, "BLOCK": 4096}, 8, None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "types", "constants", "warps", "registers"),
    training_cases(),
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_training_kernels_compile(kernel, types, constants, warps, registers):
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": warps, "maxnreg": registers}
    compiled = triton.compile(ASTSource(kernel, signature, values), target=HOPPER, options=options)
    assert compiled.metadata.shared <= 227 * 1024
