"""Mamba-2's kernels in plain PyTorch, under mamba_ssm's names, for machines without Triton GPUs.

The scan is the chunked state-space dual form (Dao and Gu 2024, arXiv 2405.21060): matrix
products inside a chunk, a recurrence from chunk to chunk. One chunk is in flight at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbridge_prune.reference.stand_in import register


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """Gated RMS norm over groups of channels. x, z: (..., d); weight, bias: (d,).

    Returns (..., d) in x's dtype; computed in fp32 (fp64 stays fp64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(wide))
    groups = y.unflatten(-1, (-1, group_size or y.shape[-1]))
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    y = groups.flatten(-2) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype)


class RMSNorm(nn.Module):
    """`rmsnorm_fn` with a weight of (hidden_size,)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z: (..., hidden_size). Returns the same shape."""
        return rmsnorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


def _scan_chunk(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of the scan.

    x: (b, g, r, q, p), already times dt, r heads a group; log_decay: (b, g, r, q), inclusive
    sums; B, C: (b, g, q, n); state: (b, g, r, n, p) from before the chunk.
    Returns y (b, g, r, q, p) and the state after the chunk.
    """
    q = x.shape[-2]
    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    between = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    y = ((C @ B.mT).unsqueeze(2) * between) @ x
    y = y + (C.unsqueeze(2) @ state) * log_decay.exp().unsqueeze(-1)
    to_end = (log_decay[..., -1:] - log_decay).exp().unsqueeze(-1)
    state = state * log_decay[..., -1, None, None].exp() + B.mT.unsqueeze(2) @ (x * to_end)
    return y, state


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """h_t = exp(A dt_t) h_{t-1} + dt_t x_t B_t^T;  y_t = h_t C_t + D x_t, times silu(z_t).

    x, z: (b, l, h, p); dt: (b, l, h); A, dt_bias: (h,); B, C: (b, l, g, n); D: (h,) or (h, p);
    initial_states: (b, h, p, n). Returns y (b, l, h, p) in x's dtype, and with
    `return_final_states` also the last state (b, h, p, n). Computed in fp32 (fp64 stays fp64).
    """
    if seq_idx is not None or cu_seqlens is not None or return_varlen_states:
        raise NotImplementedError(
            "packed sequences need the real mamba_ssm; on the CPU pass one sequence a row"
        )
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, dt = x.to(wide), dt.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit != (0.0, float("inf")):
        dt = dt.clamp(*dt_limit)

    def by_group(t: Tensor) -> Tensor:  # (b, l, h, ...) -> (b, g, r, l, ...)
        return t.unflatten(2, (groups, heads // groups)).movedim(1, 3)

    x_in = by_group(x_wide * dt.unsqueeze(-1))
    log_a = by_group(dt * A.to(wide))
    B_in, C_in = B.to(wide).transpose(1, 2), C.to(wide).transpose(1, 2)
    if initial_states is None:
        state = x_wide.new_zeros(batch, groups, heads // groups, state_dim, head_dim)
    else:
        state = initial_states.to(wide).mT.unflatten(1, (groups, heads // groups))
    pieces = []
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        y, state = _scan_chunk(
            x_in[..., part, :],
            log_a[..., part].cumsum(-1),
            B_in[..., part, :],
            C_in[..., part, :],
            state,
        )
        pieces.append(y)
    y = torch.cat(pieces, dim=-2).movedim(3, 1).flatten(2, 3)
    if D is not None:
        y = y + x_wide * (D if D.dim() == 2 else D.unsqueeze(-1)).to(wide)
    if z is not None:
        y = y * F.silu(z.to(wide))
    y = y.to(x.dtype)
    return (y, state.flatten(1, 2).mT) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """A Mamba-2 mixer between its projections: split, causal convolution, scan, gate.

    zxbcdt: (b, l, 2 h p + 2 g n + h); conv1d_weight: (h p + 2 g n, w); D: (h,) with `headdim`
    given, or (h, p). Returns (b, l, h p), or (b, l, d_model) with an output projection.
    """
    if seq_idx is not None:
        raise NotImplementedError(
            "packed sequences need the real mamba_ssm; on the CPU pass one sequence a row"
        )
    if activation not in ("silu", "swish"):
        raise NotImplementedError(f"activation={activation!r}: the kernel knows silu only")
    heads = dt_bias.shape[0]
    head_dim = D.shape[1] if D.dim() == 2 else headdim
    if head_dim is None:
        raise ValueError("headdim is needed where D has one value a head")
    conv_dim, width = conv1d_weight.shape
    inner = heads * head_dim
    state_dim = (conv_dim - inner) // (2 * ngroups)
    z, xbc, dt = zxbcdt.split([inner, conv_dim, heads], dim=-1)
    length = xbc.shape[1]
    xbc = F.conv1d(xbc.mT, conv1d_weight.unsqueeze(1), conv1d_bias, padding=width - 1, groups=conv_dim)[
        ..., :length
    ].mT
    x, B, C = F.silu(xbc).split([inner, ngroups * state_dim, ngroups * state_dim], dim=-1)
    z_heads = z.unflatten(-1, (heads, head_dim))
    result = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, head_dim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, state_dim)),
        C.unflatten(-1, (ngroups, state_dim)),
        chunk_size,
        D=D,
        z=z_heads if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    y, final = result if return_final_states else (result, None)
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if outproj_weight is not None:
        y = F.linear(y.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y


def install() -> None:
    """Register the stand-in modules. Called by `reference.enable` only."""
    register("mamba_ssm", __version__="2.2.4")
    register("mamba_ssm.ops")
    register("mamba_ssm.ops.triton")
    register("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=RMSNorm, rmsnorm_fn=rmsnorm_fn)
    register(
        "mamba_ssm.ops.triton.ssd_combined",
        mamba_chunk_scan_combined=mamba_chunk_scan_combined,
        mamba_split_conv1d_scan_combined=mamba_split_conv1d_scan_combined,
    )
