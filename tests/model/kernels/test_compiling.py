"""Every kernel compiles for a GPU, without one.

The interpreter takes what the compiler refuses, such as a name whose shape changes in a loop.
"""

import subprocess
import sys

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nemo_ray.model.kernels import grouped_lora, log_probs, nf4, relu_squared, rms_norm, routing

def check(kernel, warps, types, **constants):
    types = types.split() + ["constexpr"] * (len(kernel.arg_names) - len(types.split()))
    source = ASTSource(
        kernel,
        dict(zip(kernel.arg_names, types, strict=True)),
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})

sizes = dict(E=12, EP=16, K=3, KP=4, NORMALIZE=True, TOKENS=16)
check(routing._choose, 1, "*fp32 *bf16 *fp32 *i64 *fp32 i32 fp32", **sizes)
check(routing._choose_backward, 1, "*fp32 *i64 *fp32 *fp32 i32 fp32", **sizes)
check(routing._count, 4, "*i64 *i32 i32 i32", BLOCK=128)
check(routing._place, 4, "*i64 *i32 *i64 *i64 *i32 i32 i32", E=12, EP=16, BLOCK=128)
check(routing._spread, 4, "*bf16 *i64 *bf16", H=24, K=3, WIDTH=32)
check(routing._combine, 4, "*bf16 *i64 *fp32 *bf16", H=24, K=3, WIDTH=32)
check(routing._combine, 4, "*bf16 *i64 constexpr *bf16", weights=None, H=24, K=3, WIDTH=32)

check(nf4._dequantize, 4, "*i32 *u8 *fp32 *fp32 *fp32 *bf16 i32", BLOCK=64, SCALE_BLOCK=256, WORDS=nf4.WORDS)

check(relu_squared._relu_squared, 4, "*bf16 *bf16 i32", BLOCK=relu_squared.BLOCK)
check(relu_squared._relu_squared_gradient, 4, "*bf16 *bf16 *bf16 i32", BLOCK=relu_squared.BLOCK)

check(rms_norm._rms_norm, 8, "*bf16 *fp32 *bf16 *fp32 fp32", H=24, WIDTH=32)
types = "*bf16 *bf16 *bf16 *fp32 *fp32 *bf16"
check(rms_norm._rms_norm_gradient, 8, types, HAS_RESIDUAL=True, H=24, WIDTH=32)
types = "*bf16 constexpr *bf16 *fp32 *fp32 *bf16"
check(rms_norm._rms_norm_gradient, 8, types, grad_residual=None, HAS_RESIDUAL=False, H=24, WIDTH=32)

sizes = dict(RANK=16, ROWS=grouped_lora.BLOCK_ROWS, COLUMNS=grouped_lora.BLOCK_COLUMNS)
cases = ((True, False, False, 128), (True, True, True, 512), (False, True, False, 128))
for factors, gradient, keep, experts in cases:
    left = "*bf16 *bf16" if factors else "constexpr constexpr"
    kept = "*bf16" if keep else "constexpr"
    right = f"*bf16 *fp32 {kept} *fp32" if gradient else "constexpr constexpr constexpr constexpr"
    absent = dict.fromkeys(() if factors else ("inner", "factors"))
    absent |= dict.fromkeys(() if gradient else ("hidden", "weights", "dots"))
    absent |= dict.fromkeys(() if keep else ("activated",))
    flags = dict(HAS_FACTORS=factors, ACTIVATION_GRADIENT=gradient, KEEP=keep, EXPERTS=experts)
    types = f"*bf16 {left} *i32 {right}" + 8 * " i32"
    check(grouped_lora._add_factors, grouped_lora.NUM_WARPS, types, **flags, **sizes, **absent)

for slope in (True, False):
    check(log_probs._log_probs, 8, "*bf16 *i64 *fp32 i32 i32", SLOPE=slope, BLOCK=log_probs.BLOCK)
"""


def test_the_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=300)
