"""The Mamba-2 mixer's inner part: causal convolution, state-space scan and gated norm, all aware of packing.

The torch functions here are the reference: differentiable, memory linear in T, and of the same signature as
the kernels of mamba-ssm, which take their place on CUDA. Where documents are packed, `seq_idx` says which
tokens belong together; convolution and state stop at its edges.

Shapes: B batch, T tokens, H heads, P head dim, G groups (H a multiple), R = H / G heads a group, N state,
C chunks, L tokens a chunk, K conv width, D conv channels.
Source: Dao and Gu, "Transformers are SSMs" (2024), section 6: the block decomposition of the SSD matrix.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from nemo_ray.model.remake import Remake

DtLimit = tuple[float, float]
REFERENCE_SLOWDOWN = 1.7  # of a step, measured with Nano's shape in 4 bits and 4,096 tokens on an H100


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Depthwise causal convolution that sees nothing of the previous document.

    Args:
        x: (B, T, D).
        weight: (D, K); `weight[:, K-1]` meets the token itself.
        seq_idx: (B, T) document numbers, or None where a row is one document.
        activation: None or "silu".

    Returns: (B, T, D) in x's dtype.
    """
    num_tokens, width = x.shape[1], weight.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    values, weight = x.to(compute), weight.to(compute)
    out = values * weight[:, width - 1]
    for lag in range(1, min(width, num_tokens)):
        earlier = values[:, :-lag] * weight[:, width - 1 - lag]
        if seq_idx is not None:
            same = seq_idx[:, lag:] == seq_idx[:, :-lag]
            earlier = earlier * same.unsqueeze(-1)
        out = out + F.pad(earlier, (0, 0, lag, 0))
    if bias is not None:
        out = out + bias.to(compute)
    assert activation in (None, "silu"), f"no activation {activation!r}"
    return (F.silu(out) if activation else out).to(x.dtype)


def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: DtLimit = (0.0, float("inf")),
    return_final_states: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective state-space scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t; in chunks.

    Computes in float32 (float64 for float64 inputs). The state is zero at the start of each document of
    `seq_idx`; `initial_states` belong to the document of the first token.

    Args:
        x: (B, T, H, P).  dt: (B, T, H).  A: (H,), negative.  B, C: (B, T, G, N).  D: (H,).  dt_bias: (H,).
        chunk_size: tokens a chunk; T need not be a multiple of it.
        initial_states: (B, H, P, N).
        seq_idx: (B, T), never decreasing along T.

    Returns: y (B, T, H, P) in x's dtype; with `return_final_states` also the state after the last token
    (B, H, P, N) in the compute dtype.
    """
    batch, num_tokens, num_heads, head_dim = x.shape
    groups, state = B.shape[2], B.shape[3]
    per_group = num_heads // groups
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32

    dt = dt.to(compute)
    if dt_bias is not None:
        dt = dt + dt_bias.to(compute)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)

    # 1. Cut into chunks. Tokens added at the end have dt = 0: they neither decay nor feed the state.
    length = min(chunk_size, num_tokens)
    padding = -num_tokens % length
    chunks = (num_tokens + padding) // length

    def chunked(t: torch.Tensor, *dims: int) -> torch.Tensor:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding))
        return t.reshape(batch, chunks, length, *dims)

    xs = chunked(x.to(compute), groups, per_group, head_dim).permute(0, 1, 3, 4, 2, 5)  # B C G R L P
    dts = chunked(dt, groups, per_group).permute(0, 1, 3, 4, 2)  # B C G R L
    Bs = chunked(B.to(compute), groups, state).permute(0, 1, 3, 2, 4).unsqueeze(3)  # B C G 1 L N
    Cs = chunked(C.to(compute), groups, state).permute(0, 1, 3, 2, 4).unsqueeze(3)
    log_decay = (dts * A.to(compute).view(groups, per_group, 1)).cumsum(
        -1
    )  # from the chunk's start, inclusive
    fed = xs * dts.unsqueeze(-1)

    # 2. Within a chunk: y_l = sum over s <= l of the same document, decayed from s to l.
    visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    if seq_idx is not None:
        docs = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, padding)], dim=1).view(batch, chunks, length)
        visible = visible & (docs.unsqueeze(-1) == docs.unsqueeze(-2))[:, :, None, None]
    between = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(~visible, float("-inf")).exp()
    y = ((Cs @ Bs.transpose(-1, -2)) * between) @ fed

    # 3. What a chunk leaves to the next: only its last document, and all before it only if that is the same.
    to_end = (log_decay[..., -1:] - log_decay).exp()
    through = log_decay[..., -1].exp()  # B C G R
    from_start = log_decay.exp()
    if seq_idx is not None:
        last = docs[:, :, -1]
        before = torch.cat(
            [docs[:, :1, 0], last[:, :-1]], dim=1
        )  # document that the incoming state belongs to
        to_end = to_end * (docs == last.unsqueeze(-1))[:, :, None, None]
        through = through * (last == before)[:, :, None, None]
        from_start = from_start * (docs == before.unsqueeze(-1))[:, :, None, None]
    left = (fed * to_end.unsqueeze(-1)).transpose(-1, -2) @ Bs  # B C G R P N

    if initial_states is None:
        carried = x.new_zeros(batch, groups, per_group, head_dim, state, dtype=compute)
    else:
        carried = initial_states.to(compute).view(batch, groups, per_group, head_dim, state)
    incoming = []
    # unbind, not indexing: the gradient of an index is a tensor of all chunks, work quadratic in T.
    for decay, fed_in in zip(through.unbind(1), left.unbind(1), strict=True):
        incoming.append(carried)
        carried = carried * decay[..., None, None] + fed_in

    # 4. What the incoming state gives each token.
    states = torch.stack(incoming, dim=1)
    y = y + (Cs @ states.transpose(-1, -2)) * from_start.unsqueeze(-1)

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * length, num_heads, head_dim)[:, :num_tokens]
    if D is not None:
        y = y + x.to(compute) * D.to(compute).view(num_heads, 1)
    y = y.to(x.dtype)
    return (y, carried.view(batch, num_heads, head_dim, state)) if return_final_states else y


def gated_group_norm(
    y: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, groups: int
) -> torch.Tensor:
    """RMS norm of `y * silu(gate)` over each of `groups` parts of the last dim. y, gate (B, T, H*P)."""
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    gated = y.to(compute) * F.silu(gate.to(compute))
    parts = gated.unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    return weight * parts.flatten(-2).to(y.dtype)


def split_conv1d_scan(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: DtLimit = (0.0, float("inf")),
    activation: str = "silu",
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    headdim: int = 64,
    ngroups: int = 1,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    """All between in_proj and out_proj, with the argument names of mamba-ssm's fused kernel.

    Args:
        zxbcdt: (B, T, 2*H*P + 2*G*N + H), in_proj's output: gate, x, B, C, dt.
        conv1d_weight: (H*P + 2*G*N, K).
        norm_before_gate: must be False, as in Nemotron-H; there for the kernel's signature.

    Returns: (B, T, H*P).
    """
    assert not norm_before_gate and rmsnorm_weight is not None
    batch, num_tokens, _ = zxbcdt.shape
    num_heads, conv_dim = A.shape[0], conv1d_weight.shape[0]
    inner = num_heads * headdim
    state = (conv_dim - inner) // (2 * ngroups)
    gate, xBC, dt = zxbcdt.split([inner, conv_dim, num_heads], dim=-1)
    xBC = causal_conv1d(xBC, conv1d_weight, conv1d_bias, seq_idx, activation)
    x, B, C = xBC.split([inner, ngroups * state, ngroups * state], dim=-1)
    y = ssd_scan(
        x.view(batch, num_tokens, num_heads, headdim),
        dt,
        A,
        B.view(batch, num_tokens, ngroups, state),
        C.view(batch, num_tokens, ngroups, state),
        chunk_size,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
    )
    return gated_group_norm(y.flatten(2), gate, rmsnorm_weight, rmsnorm_eps, ngroups)


def select_split_conv1d_scan(device: torch.device) -> Callable[..., tuple[torch.Tensor, Remake | None]]:
    """mamba-ssm's fused function on CUDA where it and causal-conv1d are installed, else the torch reference;
    with how the result comes once more, which only the kernels keep enough for."""
    if device.type != "cuda" or missing_kernels(device) is not None:
        return reference_scan
    from nemo_ray.model.kernels.mamba import split_conv1d_scan as fused_scan

    return fused_scan


def reference_scan(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """`split_conv1d_scan`, whose result is kept by who needs it."""
    return split_conv1d_scan(*args, **kwargs), None


def missing_kernels(device: torch.device) -> str | None:
    """What to tell a user whose GPU runs the reference, since one of the two kernel packages is not there."""
    if device.type != "cuda":
        return None
    for module in ("causal_conv1d", "mamba_ssm.ops.triton.ssd_combined"):
        try:
            import_module(module)
        except ImportError:
            return (
                f"{module.partition('.')[0]} is not installed: Mamba-2 runs in plain torch on this GPU, "
                f"exact, but a step takes {REFERENCE_SLOWDOWN} times as long; install the extra `cuda` as "
                "the README says"
            )
    return None


def select_chunk_scan(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`ssd_scan`, or its kernel on CUDA where mamba-ssm is installed, with return_final_states set."""
    if device.type != "cuda" or missing_kernels(device) is not None:
        return ssd_scan
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined
