"""The gated delta rule in plain PyTorch, under flash-linear-attention's names.

The chunked form of Yang et al. 2024 (arXiv 2412.06464): inside a chunk the corrections of all tokens
are the solution of one unit triangular system; a recurrence carries the state from chunk to chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbridge_prune.reference.stand_in import register


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(sum of squares + eps) over the last dimension, in fp32 (fp64 stays fp64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return normed.to(output_dtype or x.dtype)


def _delta_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk of c tokens.

    q, k: (b, h, c, d); v: (b, h, c, e); g: (b, h, c), inclusive sums of the log decay; beta: (b, h, c);
    state: (b, h, d, e) from before the chunk. Returns the output (b, h, c, e) and the state after it.
    """
    between = (g.unsqueeze(-1) - g.unsqueeze(-2)).tril().exp().tril()
    beta, since_start = beta.unsqueeze(-1), g.exp().unsqueeze(-1)
    system = beta * (k @ k.mT) * between  # its diagonal is taken to be one
    corrections = torch.linalg.solve_triangular(
        system, beta * (v - since_start * (k @ state)), upper=False, unitriangular=True
    )
    out = since_start * (q @ state) + (q @ k.mT * between) @ corrections
    to_end = (g[..., -1:] - g).exp().unsqueeze(-1)
    return out, state * g[..., -1, None, None].exp() + (k * to_end).mT @ corrections


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    **ignored: Any,
) -> tuple[Tensor, Tensor | None]:
    """S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T with a_t = exp(g_t);  o_t = scale S_t^T q_t.

    q, k: (b, t, h, d); v: (b, t, h, e); g (log decay, <= 0), beta: (b, t, h); initial_state:
    (b, h, d, e). `scale` is d ** -0.5 where None. Returns o (b, t, h, e) in v's dtype and the last
    state, or None without `output_final_state`. Computed in fp32 (fp64 stays fp64).
    """
    if cu_seqlens is not None:
        raise NotImplementedError(
            "packed sequences need the real flash-linear-attention; on the CPU pass one sequence a row"
        )
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, values, g, beta = (t.to(wide).transpose(1, 2) for t in (q, k, v, g, beta))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    if initial_state is None:
        state = values.new_zeros(*k.shape[:2], k.shape[-1], values.shape[-1])
    else:
        state = initial_state.to(wide)
    pieces = []
    for start in range(0, k.shape[2], chunk_size):
        part = slice(start, start + chunk_size)
        out, state = _delta_chunk(
            q[:, :, part], k[:, :, part], values[:, :, part],
            g[:, :, part].cumsum(-1), beta[:, :, part], state,
        )  # fmt: skip
        pieces.append(out)
    o = torch.cat(pieces, dim=2).transpose(1, 2).to(v.dtype)
    return o, state if output_final_state else None


def install() -> None:
    """Register the stand-in modules. Called by `reference.enable` only.

    Without a `__version__` transformers does not take them for the real package.
    """
    register("fla")
    register("fla.modules")
    register("fla.modules.l2norm", l2norm=l2norm)
    register("fla.ops")
    register("fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule)
